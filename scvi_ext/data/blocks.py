"""Cells that are resident on a device, and how their rows become minibatches there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._contract import Minibatch
from scvi_ext._errors import first_line
from scvi_ext.kernels.sparse import SparseRows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scipy.sparse import csr_matrix

    from scvi_ext._contract import Stream
    from scvi_ext.data.disk import DiskCounts
    from scvi_ext.data.store import CellStore


# Share of non-zero counts from which a dense product with the first layer, made dense and with its gradient, is the
# faster one: 0.54 against 0.65 ms at 0.1, 0.92 against 0.67 ms at 0.2 (128 cells, 2,000 genes, two cores).
_DENSE_FROM = 0.125


@dataclass(frozen=True)
class Room:
    """What a block must hold that is loaded again and again, in the same memory."""

    n_cells: int
    n_entries: int
    width: int  # entries of the cell that has most


def few_entries(counts: csr_matrix | DiskCounts) -> bool:
    """Whether a product with a matrix had better go over the entries."""
    return counts.nnz < _DENSE_FROM * counts.shape[0] * counts.shape[1]


def host_counts(counts: csr_matrix, multiply_sparse: bool | None = None) -> SparseRows:
    """Counts in host memory; they stay sparse."""
    return SparseRows(
        torch.from_numpy(counts.indptr.astype(np.int64)),
        torch.from_numpy(counts.indices.astype(np.int32, copy=False)),
        torch.from_numpy(counts.data.astype(np.float32, copy=False)),
        counts.shape[1],
        multiply_sparse=few_entries(counts) if multiply_sparse is None else multiply_sparse,
    )


class DeviceCounts:
    """Sparse counts (CSR) in device memory; rows are gathered and made dense there, without a sync."""

    def __init__(self, counts: csr_matrix, device: torch.device, room: Room | None = None):
        room = room or Room(counts.shape[0], counts.nnz, int(np.diff(counts.indptr).max(initial=0)))
        self.n_genes = counts.shape[1]
        self.indptr = torch.zeros(room.n_cells + 1, dtype=torch.int64, device=device)
        # One entry more than there are, for reads beyond the end of an empty matrix.
        self.genes = torch.zeros(room.n_entries + 1, dtype=torch.int32, device=device)
        self.values = torch.zeros(room.n_entries + 1, device=device)
        self.lane = torch.arange(room.width, device=device)
        self.load(counts)
        self.gather, self.note = self._kernel() if device.type == "cuda" else (None, "")

    def load(self, counts: csr_matrix) -> None:
        """Other counts, in the same memory."""
        pairs = (self.indptr, counts.indptr), (self.genes, counts.indices), (self.values, counts.data)
        for tensor, array in pairs:
            tensor[: len(array)].copy_(_as_tensor(array, tensor), non_blocking=True)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Dense rows, shape (B, G), float32."""
        if self.gather is not None:
            x = torch.empty(len(rows), self.n_genes, device=self.values.device)
            self.gather(self.indptr, self.genes, self.values, rows, x)
            return x
        return self.rows_by_torch(rows)

    def rows_by_torch(self, rows: torch.Tensor) -> torch.Tensor:
        """The same with operations of torch, which read every row as wide as the longest one."""
        start = self.indptr[rows].unsqueeze(1)  # (B, 1)
        inside = self.lane < self.indptr[rows + 1].unsqueeze(1) - start  # (B, width)
        position = torch.where(inside, start + self.lane, 0)
        values = torch.where(inside, self.values[position], 0.0)
        x = torch.zeros(len(rows), self.n_genes, device=values.device)
        return x.scatter_add_(1, self.genes[position].long(), values)

    def _kernel(self) -> tuple[Callable | None, str]:
        """The kernel that gathers in one go, if it compiles here and gives the same rows, and why it is not used."""
        try:
            from scvi_ext.kernels.cuda import gather_rows

            some = torch.arange(min(3, len(self.indptr) - 1), device=self.values.device)
            expected = self.rows_by_torch(some)
            found = torch.full_like(expected, torch.nan)
            gather_rows(self.indptr, self.genes, self.values, some, found)
        except Exception as error:  # no triton, or whatever its compiler may raise
            return None, f"cells gathered without a kernel, which does not run here ({first_line(error)})"
        if not torch.equal(found, expected):
            return None, "cells gathered without a kernel, which gives other rows here"
        return gather_rows, ""


def _as_tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """On its way to a device from memory that it reads by itself, while the host goes on."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(like.dtype)
    return tensor.pin_memory() if like.is_cuda else tensor


def _cells(store: CellStore, start: int, stop: int | None) -> tuple[csr_matrix, dict[str, np.ndarray]]:
    """Counts of a stretch of cells in host memory, and their other columns."""
    whole = start == 0 and (stop is None or stop >= store.n_cells) and not store.on_disk
    counts = store.counts if whole else store.counts[start:stop]
    if not counts.has_canonical_format:  # kernels go over each gene of a cell once
        counts = counts.copy()
        counts.sum_duplicates()
    fields = ("batch_index", "labels", "size_factor", "categorical", "continuous", "protein")
    columns = {name: getattr(store, name) for name in fields}
    return counts, {name: column[start:stop] for name, column in columns.items() if column is not None}


class Block:
    """A stretch of cells of a store, resident on one device.

    Parameters
    ----------
    store
        The cells.
    device
        Where minibatches are made.
    start, stop
        The stretch; all cells by default. Positions given to :meth:`minibatch` count from ``start``.
    room
        On a device, memory for more than these cells, which others may be loaded into.
    multiply_sparse
        Of :class:`~scvi_ext.kernels.sparse.SparseRows`; as these counts have it by default.
    """

    def __init__(
        self,
        store: CellStore,
        device: torch.device,
        start: int = 0,
        stop: int | None = None,
        *,
        room: Room | None = None,
        multiply_sparse: bool | None = None,
    ):
        self.device = device
        self.genes = np.arange(store.n_genes)  # positions in the names of the store
        self.multiply_sparse = multiply_sparse
        counts, columns = _cells(store, start, stop)
        if device.type == "cpu":
            self._take(counts, columns)
            self.note = ""
            return
        self.counts = DeviceCounts(counts, device, room)
        self.note = self.counts.note
        n_cells = counts.shape[0] if room is None else room.n_cells
        self.columns = {
            name: torch.zeros((n_cells, *column.shape[1:]), dtype=torch.from_numpy(column).dtype, device=device)
            for name, column in columns.items()
        }
        self._copy(columns)

    def load(self, store: CellStore) -> None:
        """Other cells, all those of ``store``; on a device in the same memory, so that a captured step finds them."""
        counts, columns = _cells(store, 0, None)
        if self.device.type == "cpu":
            self._take(counts, columns)
        else:
            self.counts.load(counts)
            self._copy(columns)

    def _take(self, counts: csr_matrix, columns: Mapping[str, np.ndarray]) -> None:
        self.counts = host_counts(counts, self.multiply_sparse)
        self.columns = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}

    def _copy(self, columns: Mapping[str, np.ndarray]) -> None:
        for name, column in columns.items():
            self.columns[name][: len(column)].copy_(_as_tensor(column, self.columns[name]), non_blocking=True)

    def of(self, stream: Stream) -> Block:
        """Where the minibatches of a stream come from."""
        return self

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        """Positions on this block's device: move them once, then slice."""
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def minibatch(self, rows: torch.Tensor | np.ndarray) -> Minibatch:
        """The cells at these positions."""
        if isinstance(rows, np.ndarray):
            rows = self.rows(rows)
        columns = {name: column.index_select(0, rows) for name, column in self.columns.items()}
        return Minibatch(self.counts.rows(rows), **columns)
