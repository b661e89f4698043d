"""The inference loop: a function of minibatches, mapped over cells in order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._errors import whole_number
from scvi_ext._settings import settings
from scvi_ext.data.blocks import Block
from scvi_ext.data.disk import BLOCK_BYTES
from scvi_ext.data.stream import read_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from scvi_ext._contract import Minibatch
    from scvi_ext.data.store import CellStore

    Outputs = tuple[torch.Tensor, ...]

_BLOCK_CELLS = 2**16  # resident at once
_HOST_CELLS = 1024  # at once: more no longer fit the cache, with some thousand genes
_HOST_FLOATS = 2**24  # of one intermediate array: 64 MiB
_DEVICE_SHARE = 1 / 32  # of the free memory for one intermediate array, of which there are about ten


class Draws:
    """Random numbers for the cells in order, the same whatever the size of the minibatches."""

    def __init__(self, seed: int, device: torch.device):
        self.rng = np.random.default_rng(seed)
        self.device = device
        self.seed, self.n_streams = seed, 0

    def normal(self, n_cells: int, *shape: int) -> torch.Tensor:
        """Shape (n_cells, *shape); call it once per minibatch, with the same ``shape``."""
        return torch.from_numpy(self.rng.standard_normal((n_cells, *shape), dtype=np.float32)).to(self.device)

    def streams(self, n_cells: int) -> list[np.random.Generator]:
        """A generator for each cell, for draws that take an unknown number of steps; call it once per minibatch."""
        first, self.n_streams = self.n_streams, self.n_streams + n_cells
        cells = range(first, self.n_streams)
        return [np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(cell,))) for cell in cells]


@torch.inference_mode()
def map_cells(
    fn: Callable[[Minibatch, Draws], Outputs],
    module: nn.Module,
    store: CellStore,
    *,
    device: torch.device,
    batch_size: int | None = None,
    seed: int = 0,
    floats_per_cell: int = 0,
) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
    """Yield ``(rows, arrays)`` for consecutive stretches of the store: what ``fn(cells, draws)`` returned, on the host.

    On CUDA the copies go to pinned memory, and the next stretch is computed while one is copied and used.

    Parameters
    ----------
    fn
        Called under ``inference_mode`` with a minibatch and :class:`Draws`; returns tensors.
    module
        Moved to ``device``, in evaluation mode.
    store
        The cells.
    batch_size
        Cells per call; None takes ``settings.batch_size``, and if that is None too, what suits the device, or fewer
        where intermediate arrays would be large.
    seed
        Of the draws.
    floats_per_cell
        Size of the largest intermediate array of ``fn`` for one cell, if that is more than one value per gene.
    """
    module.to(device).eval()
    if batch_size is None:
        batch_size = _suitable_batch_size(device, max(store.n_genes, floats_per_cell, 1))
    else:
        whole_number("batch_size", batch_size, 1)
    draws = Draws(seed, device)
    on_its_way = None
    for first, stop, block in _blocks(store, device):
        for start in range(0, stop - first, batch_size):
            rows = np.arange(start, min(start + batch_size, stop - first))
            outputs = fn(block.minibatch(block.rows(rows)), draws)
            copies = _Copies(slice(first + start, first + start + len(rows)), outputs)
            if on_its_way is not None:
                yield on_its_way.arrived()
            on_its_way = copies
    if on_its_way is not None:
        yield on_its_way.arrived()


def _blocks(store: CellStore, device: torch.device) -> Iterator[tuple[int, int, Block]]:
    """Consecutive stretches of the cells, each with its first position and the one after its last."""
    length = _BLOCK_CELLS
    if store.on_disk:
        length = max(1, min(length, int(store.n_cells * BLOCK_BYTES / max(store.n_bytes, 1))))
    bounds = [(first, min(first + length, store.n_cells)) for first in range(0, store.n_cells, length)]
    if not store.on_disk:
        yield from ((first, stop, Block(store, device, first, stop)) for first, stop in bounds)
        return
    with ThreadPoolExecutor(1, "scvi_ext-read") as reader:
        parts = read_ahead(store, [np.arange(*stretch) for stretch in bounds], reader)
        for (first, stop), part in zip(bounds, parts, strict=True):
            yield first, stop, Block(part, device)


def _suitable_batch_size(device: torch.device, floats_per_cell: int) -> int:
    if device.type == "cuda":
        cells = _BLOCK_CELLS
        floats = int(torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE) // 4
    else:
        cells, floats = _HOST_CELLS, _HOST_FLOATS
    if settings.batch_size is not None:
        cells = whole_number("settings.batch_size", settings.batch_size, 1)
    return max(1, min(cells, floats // floats_per_cell))


class _Copies:
    """Tensors of a stretch on their way to the host."""

    def __init__(self, rows: slice, tensors: Outputs):
        self.rows, self.event = rows, None
        if tensors[0].is_cuda:
            self.tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for host, tensor in zip(self.tensors, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.tensors = tensors

    def arrived(self) -> tuple[slice, tuple[np.ndarray, ...]]:
        if self.event is not None:
            self.event.synchronize()
        return self.rows, tuple(t.numpy() for t in self.tensors)
