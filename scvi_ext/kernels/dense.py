"""Dense matrix products on the processor: by oneDNN, which is a part of most builds of torch, where they are large.

torch itself asks MKL for products in float32, whose kernels are slow on an AMD processor (see the page on performance).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_LARGE = 2**23  # multiplications: those of 128 cells, 128 units and 512 genes
_TRUSTED = 1e-5  # deviation from the product in float64, relative to its largest entry: some roundings of float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """That of torch, (..., n_in) to (..., n_out)."""
    return (_Linear.apply if _by_onednn(x, weight) else functional.linear)(x, weight, bias)


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether their product is work enough to be worth a detour."""
    return x.numel() * len(weight) >= _LARGE


@cache
def onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """The product of oneDNN, without gradients; None where torch has none, or not the right one."""
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        x, weight, bias = (torch.linspace(-1, 1, n, dtype=torch.float32) for n in (6 * 40, 70 * 40, 70))
        x, weight = x.view(6, 40), weight.view(70, 40)
        expected = functional.linear(x.double(), weight.double(), bias.double())
        found = [operator(x, w, bias, "none", [], "") for w in (weight, weight.t().contiguous().t())]
        deviation = (torch.stack(found) - expected).abs().max()  # NaN where there is one
        if not deviation <= _TRUSTED * expected.abs().max():
            return None
    except (AttributeError, RuntimeError, TypeError):
        return None
    return lambda x, weight, bias: operator(x, weight, bias, "none", [], "")


def linear_once(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same outside of autograd, and ``x`` and ``weight`` as :func:`gradients` needs them."""
    if not _by_onednn(x, weight):
        return functional.linear(x, weight, bias), x, weight
    x = x.contiguous()
    if not weight.t().is_contiguous():  # a part of a larger matrix takes oneDNN a hundred times as long
        weight = weight.contiguous()
    return onednn()(x, weight, bias), x, weight


def gradients(x: Tensor, weight: Tensor, d_y: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """By x, weight and bias; of these the ``wanted`` ones."""
    d_rows, cells = d_y.flatten(0, -2), x.flatten(0, -2)  # (S B, n)
    d_bias = d_rows.sum(0) if wanted[2] else None
    if not _by_onednn(x, weight):
        return (d_rows @ weight).view_as(x) if wanted[0] else None, d_rows.t() @ cells if wanted[1] else None, d_bias
    d_rows = d_rows.contiguous()
    d_x = onednn()(d_rows, weight.t(), None).view_as(x) if wanted[0] else None  # counts want none
    return d_x, _gradient_of_weight(cells, d_rows) if wanted[1] else None, d_bias


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    on_host = x.is_cpu and x.dtype == weight.dtype == torch.float32
    return on_host and is_large(x, weight) and onednn() is not None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y, x, weight = linear_once(x, weight, bias)
        ctx.save_for_backward(x, weight)
        ctx.wanted = *ctx.needs_input_grad[:2], bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(*ctx.saved_tensors, d_y, ctx.wanted)


def _gradient_of_weight(x: Tensor, d_y: Tensor) -> Tensor:
    """``d_y.T @ x``, (n_out, n_in), from (B, n_in) and (B, n_out). It lies in memory input by input."""
    if x.shape[1] > d_y.shape[1]:  # oneDNN would bring the wider of the two into another order first
        return (x.t() @ d_y).t()
    return onednn()(x.t().contiguous(), d_y.t(), None).t()
