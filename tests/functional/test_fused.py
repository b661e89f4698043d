"""When a kernel is trusted, and how it behaves as a part of autograd. Its values are tested in tests/kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from scvi_ext.functional import fused
from scvi_ext.kernels import cpu
from scvi_ext.kernels.sparse import SparseRows

B, G = 4, 11
KERNELS = ("zinb", "nb", "poisson")
choose = fused.choose.__wrapped__  # what is chosen is remembered for the process: not here


def draw(*lead: int) -> tuple[SparseRows, list[torch.Tensor]]:
    """Counts, and logits, log library, log theta and dropout with requires_grad."""
    g = torch.Generator().manual_seed(0)
    x = torch.poisson(2 * torch.rand(B, G, generator=g), generator=g)
    shapes = ((*lead, B, G), (*lead, B, 1), (G,), (*lead, B, G))
    return SparseRows.from_dense(x), [torch.randn(*shape, generator=g).requires_grad_() for shape in shapes]


# ---- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_agrees_is_chosen(name):
    run, how = choose(name, "cpu", torch.float32)
    assert run is cpu.LIKELIHOODS[name]
    assert how.startswith(f"fused kernel of {name}")


@pytest.mark.parametrize("name", ["normal", "bernoulli"])
def test_a_likelihood_without_kernel_says_so(name):
    assert choose(name, "cpu", torch.float32) == (None, f"plain formula of {name}, for which there is no kernel")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions_take_the_plain_formula(dtype):
    assert choose("nb", "cpu", dtype) == (None, f"plain formula of nb, because the parameters are {dtype}")


@pytest.mark.parametrize("error", [RuntimeError, ImportError, AssertionError])
def test_a_kernel_that_does_not_compile_says_why(monkeypatch, error):
    def fail(*inputs):
        raise error("no compiler for this processor")

    monkeypatch.setitem(cpu.LIKELIHOODS, "nb", fail)
    run, how = choose("nb", "cpu", torch.float32)
    assert run is None
    assert how.startswith("plain formula of nb, because its kernel does not ")
    assert "no compiler for this processor" in how


def scaled(tensor):
    return tensor * 1.001


def one_entry(tensor):
    wrong = tensor.clone()
    wrong.view(-1)[-1] += 1
    return wrong


def one_nan(tensor):
    wrong = tensor.clone()
    wrong.view(-1)[-1] = np.nan
    return wrong


@pytest.mark.parametrize("only", ["softmax", "softplus"])
@pytest.mark.parametrize("distort", [scaled, one_entry, one_nan])
@pytest.mark.parametrize("which", range(5), ids=["ll", "logits", "log_library", "log_theta", "dropout"])
def test_a_kernel_that_is_wrong_anywhere_is_not_trusted(monkeypatch, which, distort, only):
    plain = cpu.LIKELIHOODS["zinb"]

    def wrong(x, softmax, *inputs):
        results = list(plain(x, softmax, *inputs))
        if softmax == (only == "softmax"):
            results[which] = distort(results[which])
        return tuple(results)

    monkeypatch.setitem(cpu.LIKELIHOODS, "zinb", wrong)
    run, how = choose("zinb", "cpu", torch.float32)
    assert run is None
    assert how.startswith("plain formula of zinb, because its kernel deviates from it by ")


def test_what_is_chosen_is_remembered():
    assert fused.choose("nb", "cpu", torch.float32) is fused.choose("nb", "cpu", torch.float32)


def test_choosing_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    choose("zinb", "cpu", torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_choosing_works_where_gradients_are_off():
    with torch.no_grad():
        assert choose("poisson", "cpu", torch.float32)[0] is not None


# ---- as a part of autograd -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,)], ids=["", "samples"])
def test_the_result_is_one_number_per_cell_and_sample(lead):
    x, inputs = draw(*lead)
    log_p = fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *inputs)
    assert log_p.shape == (*lead, B)
    assert log_p.requires_grad
    with torch.no_grad():
        alone = fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *inputs)
    assert not alone.requires_grad
    assert torch.equal(alone, log_p)


@pytest.mark.parametrize("asked", range(4), ids=["logits", "log_library", "log_theta", "dropout"])
def test_any_input_alone_may_ask_for_its_gradient(asked):
    x, inputs = draw()
    log_p = fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *inputs)
    expected = torch.autograd.grad(log_p.sum(), inputs)[asked]
    alone = [t if i == asked else t.detach() for i, t in enumerate(inputs)]
    log_p = fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *alone)
    assert torch.equal(torch.autograd.grad(log_p.sum(), inputs[asked])[0], expected)


@pytest.mark.parametrize("as_given", [lambda t: t, torch.Tensor.detach, lambda t: t[None], lambda t: t.view(B, G)])
def test_tensors_of_the_caller_are_not_overwritten(as_given):
    x, inputs = draw()
    before = [t.detach().clone() for t in inputs]
    given = [as_given(inputs[0]), *inputs[1:3], as_given(inputs[3])]
    fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *given).mean().backward()
    for t, b in zip(inputs, before, strict=True):
        assert torch.equal(t.detach(), b)


def test_outputs_of_a_decoder_need_not_lie_row_by_row():
    x, inputs = draw()
    log_p = fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *inputs)
    expected = torch.autograd.grad(log_p.mean(), inputs)
    wide = torch.cat([inputs[0], inputs[3]], 1)  # as one product for both heads gives them
    log_p = fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, wide[:, :G], *inputs[1:3], wide[:, G:])
    for found, exact in zip(torch.autograd.grad(log_p.mean(), inputs), expected, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("reduce", [torch.mean, lambda log_p: (log_p * torch.arange(4.0)).sum()], ids=["mean", "other"])
def test_a_second_backward_is_refused(reduce):
    x, inputs = draw()
    loss = reduce(fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *inputs))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    "reduce",
    [torch.mean, lambda log_p: -log_p.mean(), lambda log_p: (log_p * torch.arange(4.0)).sum()],
    ids=["mean", "minus mean", "weighted"],
)
def test_a_kept_graph_gives_the_same_gradients_again(reduce):
    x, inputs = draw()
    loss = reduce(fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *inputs))
    first = [g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
    for a, b in zip(first, torch.autograd.grad(loss, inputs, retain_graph=True), strict=True):
        assert torch.equal(a, b)


def test_counts_of_another_number_of_genes_are_refused():
    x, inputs = draw()
    fewer = SparseRows.from_dense(x.to_dense()[:, :-1])
    with pytest.raises(ValueError, match=rf"Counts of {G - 1} genes were given to a decoder of {G}\."):
        fused.log_likelihood(cpu.LIKELIHOODS["zinb"], fewer, True, *inputs)
    with pytest.raises(ValueError, match=rf"Counts of {G - 1} genes were given to a layer for {G}\."):
        fewer.linear(torch.zeros(3, G))


def test_gradients_of_gradients_are_refused():
    x, inputs = draw()
    log_p = fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *inputs)
    weights = torch.arange(4.0, requires_grad=True)
    (gradient,) = torch.autograd.grad((weights * log_p).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradients_of_two_losses_add_up():
    x, inputs = draw()
    for weights in (torch.full((B,), -0.25), torch.arange(4.0)):
        (fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *inputs) * weights).sum().backward()
    found = [t.grad for t in inputs]
    log_p = fused.log_likelihood(cpu.LIKELIHOODS["zinb"], x, True, *inputs)
    expected = torch.autograd.grad((log_p * (torch.arange(4.0) - 0.25)).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_a_read_out_may_be_the_first_to_ask():
    with torch.inference_mode():
        run, sentence = fused.choose.__wrapped__("zinb", "cpu", torch.float32)
    assert run is not None, sentence
