"""Cells that are resident on a device, and how their rows become minibatches there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._contract import Minibatch

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scvi_ext.data.store import CellStore


class HostCounts:
    """Sparse counts in host memory; rows are made dense by scipy."""

    def __init__(self, counts: csr_matrix):
        self.counts = counts

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        """Dense rows, shape (B, G), float32."""
        return torch.from_numpy(self.counts[rows].toarray())


class DeviceCounts:
    """Sparse counts (CSR) in device memory; rows are gathered and made dense there, at a fixed cost and without a sync.

    Every row is read as wide as the longest one, so that shapes do not depend on the data.
    """

    def __init__(self, counts: csr_matrix, device: torch.device):
        self.n_genes = counts.shape[1]
        self.indptr = torch.from_numpy(counts.indptr.astype(np.int64)).to(device)
        # One entry more than there are, for reads beyond the end of an empty matrix.
        self.genes = torch.from_numpy(np.append(counts.indices, 0).astype(np.int32)).to(device)
        self.values = torch.from_numpy(np.append(counts.data, 0).astype(np.float32)).to(device)
        width = int(np.diff(counts.indptr).max(initial=0))
        self.lane = torch.arange(width, device=device)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Dense rows, shape (B, G), float32."""
        start = self.indptr[rows].unsqueeze(1)  # (B, 1)
        inside = self.lane < self.indptr[rows + 1].unsqueeze(1) - start  # (B, width)
        position = torch.where(inside, start + self.lane, 0)
        values = torch.where(inside, self.values[position], 0.0)
        x = torch.zeros(len(rows), self.n_genes, device=values.device)
        return x.scatter_add_(1, self.genes[position].long(), values)


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
        counts = store.counts if start == 0 and stop is None else store.counts[start:stop]
        self.counts = HostCounts(counts) if device.type == "cpu" else DeviceCounts(counts, device)
        fields = ("batch_index", "labels", "size_factor", "categorical", "continuous", "protein")
        columns = {name: getattr(store, name) for name in fields}
        self.columns = {
            name: torch.from_numpy(np.ascontiguousarray(column[start:stop])).to(device)
            for name, column in columns.items()
            if column is not None
        }

    def rows(self, rows: np.ndarray) -> np.ndarray | torch.Tensor:
        """Positions as this block wants them: move them once, then slice."""
        return rows if self.device.type == "cpu" else torch.from_numpy(rows).to(self.device, non_blocking=True)

    def minibatch(self, rows: np.ndarray | torch.Tensor) -> Minibatch:
        """The cells at these positions."""
        return Minibatch(self.counts.rows(rows), **{name: column[rows] for name, column in self.columns.items()})
