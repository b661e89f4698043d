"""Cells that are resident on a device, and how their rows become minibatches there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._contract import Minibatch
from scvi_ext._errors import first_line
from scvi_ext.kernels.sparse import SparseRows

if TYPE_CHECKING:
    from collections.abc import Callable

    from scipy.sparse import csr_matrix

    from scvi_ext._contract import Stream
    from scvi_ext.data.store import CellStore


# Share of non-zero counts from which a dense product with the first layer, made dense and with its gradient, is the
# faster one: 0.54 against 0.65 ms at 0.1, 0.92 against 0.67 ms at 0.2 (128 cells, 2,000 genes, two cores).
_DENSE_FROM = 0.125


def host_counts(counts: csr_matrix) -> SparseRows:
    """Counts in host memory; they stay sparse."""
    n_cells, n_genes = counts.shape
    return SparseRows(
        torch.from_numpy(counts.indptr.astype(np.int64)),
        torch.from_numpy(counts.indices.astype(np.int32, copy=False)),
        torch.from_numpy(counts.data.astype(np.float32, copy=False)),
        n_genes,
        multiply_sparse=counts.nnz < _DENSE_FROM * n_cells * n_genes,
    )


class DeviceCounts:
    """Sparse counts (CSR) in device memory; rows are gathered and made dense there, without a sync."""

    def __init__(self, counts: csr_matrix, device: torch.device):
        self.n_genes = counts.shape[1]
        self.indptr = torch.from_numpy(counts.indptr.astype(np.int64)).to(device)
        # One entry more than there are, for reads beyond the end of an empty matrix.
        self.genes = torch.from_numpy(np.append(counts.indices, 0).astype(np.int32)).to(device)
        self.values = torch.from_numpy(np.append(counts.data, 0).astype(np.float32)).to(device)
        width = int(np.diff(counts.indptr).max(initial=0))
        self.lane = torch.arange(width, device=device)
        self.gather, self.note = self._kernel() if device.type == "cuda" else (None, "")

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
    """

    def __init__(self, store: CellStore, device: torch.device, start: int = 0, stop: int | None = None):
        self.device = device
        self.genes = np.arange(store.n_genes)  # positions in the names of the store
        whole = start == 0 and (stop is None or stop >= store.n_cells)
        counts = store.counts if whole else store.counts[start:stop]
        if not counts.has_canonical_format:  # kernels go over each gene of a cell once
            counts = counts.copy()
            counts.sum_duplicates()
        self.counts = host_counts(counts) if device.type == "cpu" else DeviceCounts(counts, device)
        self.note = "" if device.type == "cpu" else self.counts.note
        fields = ("batch_index", "labels", "size_factor", "categorical", "continuous", "protein")
        columns = {name: getattr(store, name) for name in fields}
        self.columns = {
            name: torch.from_numpy(np.ascontiguousarray(column[start:stop])).to(device)
            for name, column in columns.items()
            if column is not None
        }

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
