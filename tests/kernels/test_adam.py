"""Adam of the processor against torch's in float64."""

from __future__ import annotations

import pytest
import torch

from scvi_ext.kernels.adam import Adam

SHAPES = [(40, 300), (7,), (300, 40), (1,), (13, 1)]


def _parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in SHAPES]
    parameters[0] = parameters[0].t().contiguous().t()  # column by column, as the first layer of an encoder
    return [p.to(dtype).requires_grad_() for p in parameters]


def _give_gradients(parameters: list[torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torch(weight_decay):
    found, exact = _parameters(), _parameters(torch.float64)
    options = {"eps": 0.01, "weight_decay": weight_decay}
    ours = Adam(found, lr=torch.tensor(0.02), **options)
    theirs = torch.optim.Adam(exact, lr=0.02, **options)
    for step in range(30):
        _give_gradients(found, step)
        _give_gradients(exact, step)
        ours.step()
        theirs.step()
    for a, b in zip(found, exact, strict=True):
        # 30 steps of 0.02 at most, each rounded once at a parameter of size 1
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=0, atol=30 * 1.2e-7)
        assert ours.state[a]["step"] == 30
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[a][moment].double(), theirs.state[b][moment], rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_stays_and_has_no_state():
    parameters = _parameters()
    _give_gradients(parameters, 0)
    parameters[1].grad = None
    before = [p.detach().clone() for p in parameters]
    optimizer = Adam(parameters, lr=torch.tensor(0.02))
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(parameters, before, strict=True)]
    assert moved == [True, False, True, True, True]
    assert not optimizer.state[parameters[1]]


def test_the_learning_rate_is_read_at_every_step():
    parameters, lr = _parameters(), torch.tensor(0.0)
    optimizer = Adam(parameters, lr=lr)
    before = [p.detach().clone() for p in parameters]
    _give_gradients(parameters, 0)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    lr.fill_(0.02)
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_a_step_has_the_same_bits_on_any_number_of_threads():
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        parameters = _parameters()
        optimizer = Adam(parameters, lr=torch.tensor(0.02), eps=0.01)
        torch.set_num_threads(n)
        try:
            for step in range(3):
                _give_gradients(parameters, step)
                optimizer.step()
        finally:
            torch.set_num_threads(threads)
        results.append(parameters)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_gradient_that_is_not_a_number_reaches_its_parameter_alone():
    parameters = _parameters()
    _give_gradients(parameters, 0)
    parameters[2].grad[0, 0] = float("nan")
    Adam(parameters, lr=torch.tensor(0.02)).step()
    assert [int(p.isnan().sum()) for p in parameters] == [0, 0, 1, 0, 0]
