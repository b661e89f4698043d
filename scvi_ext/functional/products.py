"""The matrix products of layers: in float32, or of inputs in bfloat16 where a fit on the processor asked for that."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable

from scvi_ext.kernels import dense

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_in_bfloat16 = False


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """Inside, :func:`linear` rounds its inputs, and the gradients that it multiplies, to bfloat16 (7 bits of mantissa).

    Small products, which gain nothing by it, remain as they are.

    This belongs to the whole process, as torch's own settings do: one thread at a time can be inside.
    """
    global _in_bfloat16
    before, _in_bfloat16 = _in_bfloat16, True
    try:
        yield
    finally:
        _in_bfloat16 = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """That of torch, (..., n_in) to (..., n_out). Parameters, results and sums over cells are float32 in any case."""
    if _in_bfloat16 and dense.is_large(x, weight):
        return _Rounded.apply(x, weight, bias)
    return dense.linear(x, weight, bias)


def linear_once(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same outside of autograd, and ``x`` and ``weight`` as :func:`gradients` needs them."""
    if not (_in_bfloat16 and dense.is_large(x, weight)):
        return dense.linear_once(x, weight, bias)
    x, weight = x.bfloat16(), weight.bfloat16()
    y = torch.nn.functional.linear(x, weight).float()
    return y if bias is None else y.add_(bias), x, weight


def gradients(x: Tensor, weight: Tensor, d_y: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """By x, weight and bias; of these the ``wanted`` ones."""
    if x.dtype != torch.bfloat16:
        return dense.gradients(x, weight, d_y, wanted)
    of_cells = d_y.flatten(0, -2)  # (S B, n_out)
    d_bias = of_cells.sum(0) if wanted[2] else None
    of_cells = of_cells.bfloat16()
    d_x = (of_cells @ weight).float().view_as(x) if wanted[0] else None  # counts want none
    d_weight = (x.flatten(0, -2).t() @ of_cells).float()  # (n_in, n_out)
    return d_x, d_weight.t(), d_bias


class _Rounded(torch.autograd.Function):
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
