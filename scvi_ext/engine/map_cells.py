"""The inference loop: a function of minibatches, mapped over cells in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from scvi_ext._errors import whole_number
from scvi_ext._settings import settings
from scvi_ext.data.blocks import Block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from scvi_ext._contract import Minibatch
    from scvi_ext.data.store import CellStore

    T = TypeVar("T")

_BLOCK_CELLS = 2**16  # resident at once
_FLOATS = 2**24  # of one intermediate array: 64 MiB


class Draws:
    """Standard normal draws for the cells in order, one stream whatever the size of the minibatches."""

    def __init__(self, seed: int, device: torch.device):
        self.rng = np.random.default_rng(seed)
        self.device = device

    def normal(self, n_cells: int, *shape: int) -> torch.Tensor:
        """Shape (n_cells, *shape); call it once per minibatch, with the same ``shape``."""
        return torch.from_numpy(self.rng.standard_normal((n_cells, *shape), dtype=np.float32)).to(self.device)


@torch.inference_mode()
def map_cells(
    fn: Callable[[Minibatch, Draws], T],
    module: nn.Module,
    store: CellStore,
    *,
    device: torch.device,
    batch_size: int | None = None,
    seed: int = 0,
    floats_per_cell: int = 0,
) -> Iterator[tuple[slice, T]]:
    """Yield ``(rows, fn(cells, draws))`` for consecutive stretches of the store.

    Parameters
    ----------
    fn
        Called under ``inference_mode`` with a minibatch and :class:`Draws`.
    module
        Moved to ``device``, in evaluation mode.
    store
        The cells.
    batch_size
        Cells per call; None takes ``settings.batch_size``, or fewer where intermediate arrays would be large.
    seed
        Of the draws.
    floats_per_cell
        Size of the largest intermediate array of ``fn`` for one cell, if that is more than one value per gene.
    """
    module.to(device).eval()
    if batch_size is None:
        batch_size = max(1, min(settings.batch_size, _FLOATS // max(store.n_genes, floats_per_cell, 1)))
    else:
        whole_number("batch_size", batch_size, 1)
    draws = Draws(seed, device)
    for first in range(0, store.n_cells, _BLOCK_CELLS):
        stop = min(first + _BLOCK_CELLS, store.n_cells)
        block = Block(store, device, first, stop)
        for start in range(0, stop - first, batch_size):
            rows = np.arange(start, min(start + batch_size, stop - first))
            yield slice(first + start, first + start + len(rows)), fn(block.minibatch(block.rows(rows)), draws)
