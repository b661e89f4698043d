"""Counts that stay on disk: when they do, and how their rows are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scvi_ext._errors import number
from scvi_ext._settings import settings
from scvi_ext._torchrun import n_on_this_machine
from scvi_ext.data.matrix import on_disk, read_all, read_rows, row_chunks, unreadable
from scvi_ext.data.memory import free_memory
from scvi_ext.data.stacked import parts_of, where

if TYPE_CHECKING:
    from collections.abc import Callable

ENTRY_BYTES = 8  # in memory: a float32 and the int32 of its gene
BLOCK_BYTES = 2**28  # of a block: half a second to read, and some thousand minibatches to mix
_READ_BYTES = 2**22  # at once, at least: with 1 MB, a virtual disk that had to find the places gave two thirds
_CHUNKS = 16  # in a block, at least: places of the file that minibatches are mixed from
_SHARE = 0.5  # of the memory that is free, for all processes that torchrun has started on a machine


def memory_limit() -> int:
    """How many bytes of counts may be held in host memory."""
    if settings.memory_limit is None:
        return int(free_memory() * _SHARE) // n_on_this_machine()
    limit = number("settings.memory_limit", settings.memory_limit)
    if not limit >= 0:
        msg = f"settings.memory_limit={settings.memory_limit!r} must be a number of gigabytes, 0 or more, or None."
        raise ValueError(msg)
    return int(limit * 1e9) if math.isfinite(limit) else 2**63


def estimated_bytes(matrix: Any, n_rows: int) -> int:
    """What so many rows of a matrix on disk take in host memory; of a dense one, if half its entries are not zero."""
    n, n_genes = matrix.shape
    per_row = n_genes / 2 if _entries(matrix) is None else _entries(matrix) / max(n, 1)
    return int(n_rows * per_row * ENTRY_BYTES)


def _entries(matrix: Any) -> int | None:
    """Stored entries of a sparse matrix; None of a dense one."""
    parts = parts_of(matrix)
    if len(parts) > 1:
        of_parts = [_entries(part.matrix) for part in parts]
        return None if None in of_parts else sum(of_parts)
    matrix = parts[0].matrix
    group = getattr(matrix, "group", None)
    return getattr(matrix, "nnz", None) if group is None else group["indices"].shape[0]


def check_chunks(matrix: Any) -> None:
    """Raise an UnreadableRowsError if a file of zarr lacks chunks of sparse counts: it would read them as zeros."""
    for part in parts_of(matrix):
        group = getattr(part.matrix, "group", None)
        for array in () if group is None else (group["data"], group["indices"]):
            lacking = getattr(array, "nchunks", 0) - getattr(array, "nchunks_initialized", 0)
            if lacking > 0:
                reason = f"{lacking} chunks of {array.path} are not there"
                raise unreadable(where(part.matrix, 0, part.matrix.shape[0]), reason)


def read_into_memory(matrix: Any) -> sp.csr_matrix:
    """All rows of a matrix on disk as float32 counts, (n, G), of a sparse one without holding them twice."""
    entries = _entries(matrix)
    if entries is None:
        return read_all(matrix)
    n_cells, n_genes = matrix.shape
    counts, genes = np.empty(entries, np.float32), np.empty(entries, np.int32 if entries < 2**31 else np.int64)
    starts = np.zeros(n_cells + 1, genes.dtype)
    for first, chunk in row_chunks(matrix):
        rows, here = slice(first + 1, first + 1 + chunk.shape[0]), starts[first]
        stretch = slice(here, here + chunk.nnz)
        counts[stretch], genes[stretch], starts[rows] = chunk.data, chunk.indices, here + chunk.indptr[1:]
    used = slice(starts[-1])  # less than there were where several entries were for one gene
    read = sp.csr_matrix((counts[used], genes[used], starts), (n_cells, n_genes))
    read.has_canonical_format = True
    return read


def chunk_rows(matrix: Any) -> int:
    """Rows of a matrix on disk to be read at once: 1 MB, or what the file keeps together."""
    parts = parts_of(matrix)
    if len(parts) > 1:
        return max(chunk_rows(part.matrix) for part in parts)
    matrix = parts[0].matrix
    n, entries = max(matrix.shape[0], 1), _entries(matrix)
    if not on_disk(matrix):
        return 1
    if entries is None:
        together, row_bytes = (matrix.chunks or (1,))[0], matrix.shape[1] * matrix.dtype.itemsize
    else:
        stored = (matrix.group["indices"].chunks or (1,))[0]
        together, row_bytes = math.ceil(stored * n / max(entries, 1)), entries * ENTRY_BYTES / n
    return max(1, together, math.ceil(_READ_BYTES / max(row_bytes, 1)))


def chunks_of_block(chunk: int, n_cells: int, n_blocks: int) -> int:
    """Cells to a chunk, so that a block mixes some."""
    return max(1, min(chunk, n_cells // (_CHUNKS * n_blocks)))


@dataclass(eq=False)
class DiskCounts:
    """Rows of a matrix on disk, read when they are asked for: the few words of a CSR matrix that a store uses."""

    matrix: Any  # (N, G') on disk
    chosen: np.ndarray | None  # (n,) which of its rows; None for all
    genes: np.ndarray | None  # (G,) which of its columns, in which order; None for all as they stand
    check: Callable[[sp.csr_matrix, np.ndarray], None]  # of rows and their positions: raises unless they are counts
    has_canonical_format: bool = True
    sizes: np.ndarray | None = field(default=None, init=False)  # (n,) entries that rows had when all were read
    marks: np.ndarray | None = field(default=None, init=False)  # (n,) and what row_marks said of them

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return (
            self.matrix.shape[0] if self.chosen is None else len(self.chosen),
            self.matrix.shape[1] if self.genes is None else len(self.genes),
        )

    @property
    def nnz(self) -> int:
        """Entries of all rows, once they have been read."""
        assert self.sizes is not None, "the counts have not been read yet"
        return int(self.sizes.sum())

    def __getitem__(self, positions: slice | np.ndarray) -> sp.csr_matrix:
        """These rows, in the order asked for, in host memory."""
        positions = np.arange(self.shape[0])[positions] if isinstance(positions, slice) else np.asarray(positions)
        rows = positions if self.chosen is None else self.chosen[positions]
        counts = read_rows(self.matrix, rows)
        self.check(counts, positions)
        if self.genes is not None:
            counts = counts[:, self.genes]
            counts.sort_indices()
        if self.marks is not None:
            changed = row_marks(counts) != self.marks[positions]
            changed &= ~np.isnan(self.marks[positions])
            if changed.any():
                first, last = int(rows[changed].min()), int(rows[changed].max())
                reason = f"{changed.sum()} of them are not what they were when they were first read"
                raise unreadable(where(self.matrix, first, last + 1), reason)
        return counts

    def remember(self, sizes: np.ndarray, marks: np.ndarray) -> None:
        """What was found when all rows were read: from now on, rows that are not the same any more are refused."""
        self.sizes, self.marks = sizes, marks


def row_totals(counts: sp.csr_matrix) -> np.ndarray:
    """Float64 sum of each row."""
    return counts @ np.ones(counts.shape[1])


def row_marks(counts: sp.csr_matrix) -> np.ndarray:
    """Float64 sum of each row in which gene i counts i times: it changes with a count, and where one changes its gene.

    A chunk of gene numbers that is gone, which zarr reads as zeros, would leave the plain sum as it was.
    """
    return counts @ np.arange(1.0, counts.shape[1] + 1)
