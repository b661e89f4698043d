"""Small helpers of the seed's vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def one_hot(index: Tensor, n_cat: int) -> Tensor:
    """Codes of shape (B,) or (B, 1), of any number type, as float32 indicators of shape (B, n_cat)."""
    index = index.reshape(-1, 1).long()
    return torch.zeros(len(index), n_cat, device=index.device).scatter_(1, index, 1.0)


def enumerate_discrete(x: Tensor, y_dim: int) -> Tensor:
    """Every label for every cell, label by label: float32 indicators of shape (y_dim * B, y_dim)."""
    return torch.eye(y_dim, device=x.device).repeat_interleave(x.shape[0], 0)


def broadcast_labels(y: Tensor | None, *o: Tensor | None, n_broadcast: int = -1) -> tuple:
    """One-hot labels beside other arguments; unknown labels are enumerated and the arguments repeated to match.

    Parameters
    ----------
    y
        Codes of shape (B,) or (B, 1), or None: then all ``n_broadcast`` labels are tried for every cell.
    *o
        Tensors whose first axis is the cell (None stays None); at least one.
    n_broadcast
        Number of labels.

    Returns
    -------
    The labels, then ``*o``, with B rows (``y`` given) or n_broadcast * B rows.
    """
    if not o:
        msg = "broadcast_labels needs at least one tensor besides y, to know how many cells there are."
        raise ValueError(msg)
    if y is not None:
        return (one_hot(y, n_broadcast), *o)
    repeated = iterate(o, lambda t: t.repeat(n_broadcast, *[1] * (t.dim() - 1)))
    return (enumerate_discrete(o[0], n_broadcast), *repeated)


def iterate(obj: object, func: Callable) -> object:
    """Apply ``func`` to every entry of nested lists and tuples; None stays None."""
    if isinstance(obj, list | tuple):
        return type(obj)(iterate(o, func) for o in obj)
    return None if obj is None else func(obj)


def logsumexp(input: Tensor, dim: int | tuple[int, ...], keepdim: bool = False, out: Tensor | None = None) -> Tensor:
    """Logarithm of summed exponentials along ``dim``, stable for large and for very negative entries."""
    return torch.logsumexp(input, dim, keepdim, out=out)
