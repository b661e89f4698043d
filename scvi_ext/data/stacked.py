"""Rows of several matrices on disk, one below the other, as one of the matrices that an AnnData may hold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset

from scvi_ext.data.matrix import in_order, on_disk, place, read_slice, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CHUNK_ENTRIES = 2**24  # of some columns of all rows: whole rows are read, 64 MB at a time when dense


@dataclass(frozen=True, eq=False)
class Part:
    """A matrix, on disk or in memory, which is the rows from ``first`` to before ``stop`` of a whole."""

    matrix: Any
    first: int
    stop: int
    columns: np.ndarray | None = None  # of ``matrix`` that are the columns of the whole; None = as they stand

    def rows(self, first: int, stop: int) -> sp.csr_matrix:
        """Rows of the whole, which must be in this part."""
        block = read_slice(self.matrix, first - self.first, stop - self.first)
        if self.columns is not None:
            block = block[:, self.columns]
            block.sort_indices()
        return block


class Stacked(CSRDataset):
    """Rows of several matrices, one below the other; nothing is read before it is asked for.

    It can be ``X`` or a layer of an AnnData. What is read is a CSR matrix, in the order asked for.

    Parameters
    ----------
    matrices
        Dense or CSR, on disk or in memory, with the same columns.
    columns
        For each matrix its columns in the order of the whole, or None where they are in order.
    """

    def __init__(self, matrices: Sequence[Any], columns: Sequence[np.ndarray | None] | None = None):
        if not matrices:
            msg = "There are no matrices to put one below the other: give at least one."
            raise ValueError(msg)
        columns = [None] * len(matrices) if columns is None else columns
        for matrix in matrices:
            _check_rows_first(matrix)
        widths = {m.shape[1] if order is None else len(order) for m, order in zip(matrices, columns, strict=True)}
        if len(widths) > 1:
            msg = f"The matrices have {', '.join(map(str, sorted(widths)))} columns; all must have the same number."
            raise ValueError(msg)
        stops = list(accumulate(matrix.shape[0] for matrix in matrices))
        self.parts = tuple(matrices)
        self.pieces = tuple(
            Part(matrix, stop - matrix.shape[0], stop, order)
            for matrix, stop, order in zip(matrices, stops, columns, strict=True)
        )
        self.shape = (stops[-1], widths.pop())
        kinds = [np.dtype(matrix.dtype) for matrix in matrices]
        self.dtype = np.result_type(*(np.float32 if kind == np.float16 else kind for kind in kinds))

    @property
    def backend(self) -> str:
        """Kind of the first file; ``"memory"`` where it is none."""
        node = getattr(self.parts[0], "group", self.parts[0])
        return {"h5py": "hdf5", "zarr": "zarr"}.get(type(node).__module__.partition(".")[0], "memory")

    def __repr__(self) -> str:
        n_rows, n_columns = self.shape
        return f"Stacked: {n_rows} x {n_columns}, {self.dtype}, of {len(self.parts)} matrices"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> sp.csr_matrix:
        """Rows, or ``(rows, columns)``: slices, positions in any order or masks, each on its own as in an AnnData."""
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        rows, columns = _plain(rows), _plain(columns)
        if isinstance(rows, slice):
            first, stop, step = rows.indices(len(self))
            if step == 1:
                return self._stretch(first, max(first, stop), columns)
            rows = np.arange(first, stop, step)
        elif rows.dtype == bool:
            rows = np.flatnonzero(rows)
        outside = (rows < -len(self)) | (rows >= len(self))
        if outside.any():
            msg = f"Row {rows[outside][0]} was asked for, and there are {len(self)} rows."
            raise IndexError(msg)
        if len(rows) == 0:
            return self._stretch(0, 0, columns)
        chunk = max(1, _CHUNK_ENTRIES // max(1, self.shape[1]))
        return in_order(rows % len(self), lambda start, stop: self._stretch(start, stop, columns), chunk)

    def to_memory(self) -> sp.csr_matrix:
        """Everything, as one CSR matrix."""
        return self._stretch(0, len(self), slice(None))

    def copy(self) -> Stacked:
        """Itself: it is not written to."""
        return self

    def _stretch(self, first: int, stop: int, columns: slice | np.ndarray) -> sp.csr_matrix:
        if isinstance(columns, slice) and columns == slice(None):
            pieces = list(self._blocks(first, stop))
        else:  # no more is held than is kept
            step = max(1, _CHUNK_ENTRIES // max(1, self.shape[1]))
            starts = range(first, stop, step)
            pieces = [b[:, columns] for start in starts for b in self._blocks(start, min(start + step, stop))]
        if not pieces:
            return sp.csr_matrix((0, np.arange(self.shape[1])[columns].size), dtype=self.dtype)
        return pieces[0] if len(pieces) == 1 else sp.vstack(pieces, format="csr", dtype=self.dtype)

    def _blocks(self, first: int, stop: int) -> Iterator[sp.csr_matrix]:
        for part in _overlapping(self, first, stop):
            yield part.rows(max(first, part.first), min(stop, part.stop)).astype(self.dtype, copy=False)


def _plain(index: Any) -> slice | np.ndarray:
    """A slice, or one-dimensional positions or mask: AnnData asks with the arrays of ``np.ix_``."""
    return index if isinstance(index, slice) else np.asarray(index).ravel()


def _check_rows_first(matrix: Any) -> None:
    if isinstance(matrix, CSCDataset):
        msg = (
            f"{place(matrix)} is stored by columns (CSC), and of several files single rows are read. Write it by rows: "
            "adata = anndata.read_h5ad(...), adata.X = adata.X.tocsr() (or the layer), adata.write_h5ad(...)."
        )
        raise ValueError(msg)


def parts_of(matrix: Any) -> tuple[Part, ...]:
    """What a matrix is stacked of; any other is its own only part."""
    return matrix.pieces if isinstance(matrix, Stacked) else (Part(matrix, 0, matrix.shape[0]),)


def _overlapping(matrix: Any, first: int, stop: int) -> list[Part]:
    return [part for part in parts_of(matrix) if max(first, part.first) < min(stop, part.stop)]


def where(matrix: Any, first: int, stop: int) -> str:
    """Where the rows from ``first`` to before ``stop`` are kept: ``rows 12,288 to 16,383 of atlas.h5ad, X``.

    Rows are counted from 0 within each file, and the last one is named too.
    """
    found = []
    for part in _overlapping(matrix, first, stop):
        start, end = max(first, part.first) - part.first, min(stop, part.stop) - part.first
        in_memory = f"rows {start:,} to {end - 1:,} of a matrix in memory"
        found.append(rows_of(part.matrix, start, end) if on_disk(part.matrix) else in_memory)
    return "; ".join(found) or "no rows"
