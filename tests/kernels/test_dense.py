"""Products on the processor against float64, whoever computes them."""

from __future__ import annotations

import pytest
import torch
from _tolerances import PRODUCT_OF_LARGEST
from torch.nn import functional

from scvi_ext.kernels import dense

needs_onednn = pytest.mark.skipif(dense.onednn() is None, reason="torch was built without oneDNN")


@pytest.fixture(params=["onednn", "torch"])
def whoever(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(dense, "onednn", lambda: None)
    elif dense.onednn() is None:
        pytest.skip("torch was built without oneDNN")


def by_input(weight):
    return weight.t().contiguous().t()


def part(weight):
    return torch.cat([weight, torch.ones(len(weight), 5)], dim=1)[:, : weight.shape[1]]


def scattered(x):
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("lay_out", [torch.clone, by_input, part], ids=lambda f: f.__name__)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "n_out"), [((128, 128), 2000), ((3, 40, 128), 777), ((100, 3000), 64), ((1, 3000), 3001)], ids=str
)
def test_value_and_gradients(whoever, shape, n_out, has_bias, lay_out):
    torch.manual_seed(0)
    x, weight, d_y = torch.randn(shape), torch.randn(n_out, shape[-1]), torch.randn(*shape[:-1], n_out)
    bias = torch.randn(n_out) if has_bias else None
    assert x.numel() * n_out >= dense._LARGE
    here = [t.requires_grad_() for t in (x, lay_out(weight).detach(), bias) if t is not None]
    there = [t.detach().double().requires_grad_() for t in here]
    y, expected = dense.linear(*here), functional.linear(*there)
    assert y.shape == expected.shape
    found = [y, *torch.autograd.grad(y, here, scattered(d_y))]
    expected = [expected, *torch.autograd.grad(expected, there, d_y.double())]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= PRODUCT_OF_LARGEST * b.abs().max()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert torch.equal(dense.linear(*here), y)


@needs_onednn
def test_only_gradients_that_are_asked_for_are_made(monkeypatch):
    made = []
    run = dense.onednn()
    monkeypatch.setattr(dense, "onednn", lambda: lambda *args: made.append(args[0].shape) or run(*args))
    x, weight = torch.randn(128, 128), torch.randn(2000, 128, requires_grad=True)
    dense.linear(x, weight).sum().backward()
    assert made == [(128, 128), (128, 128)]  # forwards, and that by the weights; none by x
    weight.requires_grad_(False)
    x.requires_grad_()
    dense.linear(x, weight).sum().backward()
    assert made[2:] == [(128, 128), (128, 2000)]


@needs_onednn
def test_a_part_of_a_larger_matrix_is_copied_first(monkeypatch):
    """It is right without, and takes a hundred times as long."""
    seen = []
    run = dense.onednn()
    monkeypatch.setattr(dense, "onednn", lambda: lambda *args: seen.extend(args[:2]) or run(*args))
    x, weight = scattered(torch.randn(128, 128)).requires_grad_(), part(torch.randn(2000, 128)).requires_grad_()
    dense.linear(x, weight).sum().backward()
    assert len(seen) == 6
    assert all(matrix.is_contiguous() or matrix.t().is_contiguous() for matrix in seen)


@needs_onednn
def test_the_gradient_lies_in_memory_as_weights_by_input_do():
    weight = by_input(torch.randn(2000, 128)).detach().requires_grad_()
    dense.linear(torch.randn(128, 128), weight).sum().backward()
    assert weight.grad.stride() == weight.stride() == (1, 2000)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(8, 16), torch.randn(32, 16)),
        (torch.randn(128, 128).double(), torch.randn(2000, 128).double()),
        (torch.randn(128, 128).bfloat16(), torch.randn(2000, 128).bfloat16()),
    ],
    ids=["small", "float64", "bfloat16"],
)
def test_all_else_is_left_to_torch(x, weight, monkeypatch):
    monkeypatch.setattr(dense, "onednn", lambda: pytest.fail("was asked"))
    assert torch.equal(dense.linear(x, weight), functional.linear(x, weight))


@needs_onednn
def test_it_is_found_whatever_the_default_precision_is():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert dense.onednn.__wrapped__() is not None
    finally:
        torch.set_default_dtype(before)


def test_a_torch_without_the_operator_multiplies_itself(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert dense.onednn.__wrapped__() is None


@needs_onednn
@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_an_operator_that_is_off_is_not_trusted(change, monkeypatch):
    class Wrong:
        class _linear_pointwise:
            @staticmethod
            def default(x, weight, bias, *rest):
                return functional.linear(x, weight, bias) + change

    monkeypatch.setattr(torch.ops, "mkldnn", Wrong)
    assert dense.onednn.__wrapped__() is None
