"""What several processes share that train one module together, each on its part of every minibatch.

Each of ``n`` processes has the same number b of cells: that of rank r the rows r b to (r + 1) b of a minibatch of n b.
What a module makes of them is what it would make of all of them in one process, provided that

- random draws of cells are made here, by generators that are in the same state in all processes. Each draws for all
  cells and keeps its own, so that the generators stay alike; draws that all cells share are alike by themselves;
- a mean over cells that is more than summed up into the loss is one over all processes, see :func:`mean`.

Cells lie along the last dimension but one, (B, ...) or (S, B, ...), wherever they come several at a time. A process
that is alone, which is every one outside of :func:`training_as`, does what torch does, to the bit; but for dropout on
the processor, whose random bits are not torch's (see :func:`~scvi_ext.kernels.hidden.dropout_factors`).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed
from torch.autograd.function import once_differentiable

from scvi_ext.kernels import hidden

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """One of several processes.

    Parameters
    ----------
    rank
        Which of them this is, from 0.
    n
        How many there are.

    Raises
    ------
    ValueError
        There is no such process.
    """

    rank: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.n:
            msg = f"rank={self.rank} is none of n={self.n} processes: they count from 0."
            raise ValueError(msg)


_current = Ranks()


def current() -> Ranks:
    """The process as which modules are trained here; alone outside of :func:`training_as`."""
    return _current


@contextmanager
def training_as(ranks: Ranks) -> Iterator[None]:
    """Inside, modules take what they are given for the part of one of several processes.

    This belongs to the whole process, as torch's generators do: one thread at a time can be inside.
    """
    global _current
    before, _current = _current, ranks
    try:
        yield
    finally:
        _current = before


def normal_like(x: Tensor) -> Tensor:
    """Standard normal draws for the cells of ``x``, (B, n) or (S, B, n)."""
    if _current.n == 1:
        return torch.randn_like(x)
    return _own(torch.randn(_shape_of_all(x), dtype=x.dtype, device=x.device))


def dropout(x: Tensor, p: float) -> Tensor:
    """``x`` of cells, (B, n) or (S, B, n), each entry zero with probability ``p``, else divided by 1 - p."""
    if x.is_cpu:
        return x * _own(hidden.dropout_factors(_shape_of_all(x), p)).to(x.dtype) if p else x
    if _current.n == 1:
        return torch.nn.functional.dropout(x, p, training=True)
    # The mask by torch itself, so that it is the one of a process that has all cells, whatever kernel makes it.
    return x * _own(torch.nn.functional.dropout(x.new_ones(_shape_of_all(x)), p, training=True))


def mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes, through which gradients flow to what each of them has put in.

    They are those of the mean of the losses of all processes, once the gradients of parameters are averaged too. All
    processes must come here, in the same order.
    """
    return x if _current.n == 1 else _Mean.apply(x, _current.n)


class _Mean(torch.autograd.Function):
    # torch.distributed.nn has the same, and warns of its end.

    @staticmethod
    def forward(ctx, x: Tensor, n: int) -> Tensor:
        ctx.n = n
        return _averaged(x, n)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mean: Tensor) -> tuple[Tensor, None]:
        return _averaged(d_mean, ctx.n), None


def _averaged(x: Tensor, n: int) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total.div_(n)


def _shape_of_all(x: Tensor) -> tuple[int, ...]:
    *lead, n_cells, n_columns = x.shape
    return *lead, _current.n * n_cells, n_columns


def _own(of_all: Tensor) -> Tensor:
    n_cells = of_all.shape[-2] // _current.n
    return of_all.narrow(-2, _current.rank * n_cells, n_cells)
