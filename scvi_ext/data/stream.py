"""The cells of a run as they come to the device: all of them at once, or block by block while others are read."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext.data.blocks import Block, Room, few_entries
from scvi_ext.data.disk import memory_limit
from scvi_ext.data.joint import JointStore, resident
from scvi_ext.data.sampler import Blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scvi_ext._contract import Minibatch, Stream
    from scvi_ext.data.store import CellStore

    Passes = Sequence[Sequence[np.ndarray]]  # of a pass, positions of the cells of each stream

_DEVICE_SHARE = 0.6  # of the free memory of a device, for counts
_DEVICE_BLOCK_BYTES = 2**31  # of a block in host memory, which is sent while the one before is trained on


def cells_of_run(
    store: CellStore | JointStore,
    device: torch.device,
    streams: Sequence[Stream],
    shape: tuple[int, int],
    blocks: Blocks | None,
) -> Resident | Streamed:
    """The cells, all on the device if they fit there; ``shape``: steps of an epoch, cells of a step."""
    if fits(store, device):
        return Resident(store, device, streams, blocks)
    return Streamed(store, device, streams, shape, blocks or Blocks(1, store.chunk or 1))


def order_of(store: CellStore | JointStore, device: torch.device) -> Blocks | None:
    """The order of cells that come block by block: from a file, or because a device does not hold all of them."""
    if isinstance(store, JointStore):
        return None
    if store.chunk is None and not fits(store, device):
        return Blocks(math.ceil(store.n_bytes / _DEVICE_BLOCK_BYTES), 1)
    return store.blocks()


def placement(store: CellStore | JointStore, device: torch.device) -> str:
    """Where the counts of a run are, and why, in words."""
    if isinstance(store, JointStore):
        return f"counts on {device}"
    size = f"counts ({_in_words(store.n_bytes)})"
    allowed = f"the {_in_words(memory_limit())} of memory that they may take (settings.memory_limit)"
    if store.on_disk:
        return f"{size} stay on disk and are read in blocks: more than {allowed}"
    if not fits(store, device):
        return f"{size} in host memory, sent in blocks: more than the memory of {device} takes"
    if device.type != "cpu":
        return f"{size} on {device}, which holds all of them"
    return f"{size} in host memory" + ("" if store.chunk is None else f", read from disk: within {allowed}")


def _in_words(n_bytes: float) -> str:
    number, unit = (n_bytes / 1e9, "GB") if n_bytes >= 1e9 else (n_bytes / 1e6, "MB")
    return f"{number:.2g} {unit}" if number < 10 else f"{number:,.0f} {unit}"


def fits(store: CellStore | JointStore, device: torch.device) -> bool:
    """Whether the counts are in host memory, and fit into that of the device."""
    if isinstance(store, JointStore) or device.type == "cpu":
        return isinstance(store, JointStore) or not store.on_disk
    return store.n_bytes < torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE


def read_ahead(store: CellStore, wanted: Sequence[np.ndarray], reader: ThreadPoolExecutor) -> Iterator[CellStore]:
    """The cells at these positions, one array of them after the other, the next of which is read meanwhile."""
    if not wanted:
        return
    ahead = reader.submit(store.take, wanted[0])
    try:
        for positions in [*wanted[1:], None]:
            part = ahead.result()
            ahead = None if positions is None else reader.submit(store.take, positions)
            yield part
    finally:
        if ahead is not None and not ahead.cancel():
            ahead.exception()  # the reader is in the middle of it: one thing at a time


class Resident:
    """All cells, on the device for the whole run."""

    def __init__(
        self,
        store: CellStore | JointStore,
        device: torch.device,
        streams: Sequence[Stream],
        blocks: Blocks | None = None,
    ):
        self.blocks = blocks or Blocks(1, 1)
        self.block = resident(store, device)
        self.sources = [self.block.of(stream) for stream in streams]

    def pieces(self, rows: np.ndarray, first: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Steps from, to, and positions in the block (streams, steps, B) that they take.

        As many pieces as where they are read one by one: of several processes some may have all cells in memory.
        """
        yield from ((a, z, rows[:, a:z]) for a, z in self.blocks.bounds(rows.shape[1], first))

    def first_piece(self, rows: np.ndarray) -> np.ndarray:
        """Positions in the block of the first piece of an epoch."""
        return rows

    def minibatches(self, passes: Passes, *, keep: bool = False) -> Iterator[list[Minibatch | None]]:
        """Cells in the order given; a stream without cells has None."""
        for rows in passes:
            yield [source.minibatch(r) if len(r) else None for source, r in zip(self.sources, rows, strict=True)]

    def close(self) -> None:
        """There is nothing to close."""


class Streamed:
    """One block of the cells on the device, and the next one on its way from disk or host memory.

    Parameters
    ----------
    store, device, streams
        What is trained on, where, and the minibatches that the loss takes.
    shape
        Steps of an epoch, and cells of a step.
    blocks
        The order of the cells.
    """

    def __init__(
        self,
        store: CellStore,
        device: torch.device,
        streams: Sequence[Stream],
        shape: tuple[int, int],
        blocks: Blocks,
    ):
        self.store, self.device, self.blocks = store, device, blocks
        self.n_cells = min(store.n_cells, len(streams) * shape[1] * int(np.diff(blocks.steps(shape[0])).max()))
        self.multiply_sparse = few_entries(store.counts)
        self.room = None if device.type == "cpu" else _room(store, self.n_cells)
        self.reader = ThreadPoolExecutor(1, "scvi_ext-read")
        some = store.take(np.arange(0 if self.room is None else min(3, self.n_cells)))  # a kernel is tried on them
        self.block = Block(some, device, room=self.room, multiply_sparse=self.multiply_sparse)
        self.kept: tuple[np.ndarray, Block] | None = None

    def pieces(self, rows: np.ndarray, first: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """The same for one block after the other, each loaded when it is its turn; those before step ``first`` are not.

        While the caller is at work on one, the next is read.
        """
        yield from self._pieces(rows, self.blocks.bounds(rows.shape[1], first))

    def first_piece(self, rows: np.ndarray) -> np.ndarray:
        """Load the first block of an epoch; the positions in it."""
        ((_, _, local),) = self._pieces(rows, self.blocks.bounds(rows.shape[1], 0)[:1])
        return local

    def _pieces(self, rows: np.ndarray, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, np.ndarray]]:
        wanted = [np.unique(rows[:, a:z], return_inverse=True) for a, z in bounds]
        parts = self._read_ahead([positions for positions, _ in wanted])
        for (a, z), (_, local), part in zip(bounds, wanted, parts, strict=True):
            self.block.load(part)
            yield a, z, local.reshape(len(rows), z - a, -1)

    def minibatches(self, passes: Passes, *, keep: bool = False) -> Iterator[list[Minibatch | None]]:
        """Cells in the order given; a stream without cells has None.

        ``keep``: the same cells will be asked for again, and stay on the device if they are not more than a block.
        """
        groups = _groups(passes, self.n_cells)
        if keep and len(groups) == 1:
            cells = _cells_of(groups[0])
            if self.kept is None or not np.array_equal(self.kept[0], cells):
                self.kept = cells, self._as_block(self.store.take(cells))
            yield from _from_block(self.kept[1], cells, groups[0])
            return
        parts = self._read_ahead([_cells_of(group) for group in groups])
        for group, part in zip(groups, parts, strict=True):
            yield from _from_block(self._as_block(part), _cells_of(group), group)

    def _as_block(self, part: CellStore) -> Block:
        return Block(part, self.device, multiply_sparse=self.multiply_sparse)

    def _read_ahead(self, wanted: Sequence[np.ndarray]) -> Iterator[CellStore]:
        return read_ahead(self.store, wanted, self.reader)

    def close(self) -> None:
        """End the thread that reads."""
        self.reader.shutdown()


def _room(store: CellStore, n_cells: int) -> Room:
    """For any so many cells."""
    sizes = store.sizes
    largest = np.partition(sizes, len(sizes) - n_cells)[len(sizes) - n_cells :]
    return Room(n_cells, int(largest.sum()), int(sizes.max(initial=0)))


def _groups(passes: Passes, n_cells: int) -> list[list[Sequence[np.ndarray]]]:
    """Consecutive passes together, as long as they have at most so many cells."""
    groups: list[list[Sequence[np.ndarray]]] = []
    room = 0
    for rows in passes:
        size = sum(map(len, rows))
        if not groups or size > room:
            groups.append([])
            room = n_cells
        groups[-1].append(rows)
        room -= size
    return groups


def _cells_of(group: Passes) -> np.ndarray:
    return np.unique(np.concatenate([cells for rows in group for cells in rows]))


def _from_block(block: Block, cells: np.ndarray, group: Passes) -> Iterator[list[Minibatch | None]]:
    """Minibatches of a block that holds these sorted positions."""
    for rows in group:
        yield [block.minibatch(np.searchsorted(cells, r)) if len(r) else None for r in rows]
