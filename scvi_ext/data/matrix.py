"""Rows of a count matrix as CSR in the order asked for, whatever the matrix is stored as."""

from __future__ import annotations

import sys
from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import h5py
import numpy as np
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset

from scvi_ext._errors import first_line, listing, missing_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData

_CHUNK_ENTRIES = 2**24  # 64 MB as dense float32
_STARTS: WeakKeyDictionary[CSRDataset, np.ndarray] = WeakKeyDictionary()  # of the rows of matrices in files
_GAP = 128  # rows on disk: reading on over a shorter gap is cheaper than a second access of about 1 ms


def counts_matrix(adata: AnnData, layer: str | None, role: str = "", name: str = "adata") -> Any:
    """``adata.X`` or ``adata.layers[layer]``, neither copied nor read from disk.

    ``role`` and ``name``: what messages call it, and the AnnData.
    """
    if layer is not None:
        if layer not in adata.layers:
            raise missing_key(f"{name}.layers", layer, adata.layers, role)
        return still_open(adata.layers[layer])
    if adata.X is None:
        msg = f"{name}.X is None. Name the layer with the counts, layer=..., out of: {listing(adata.layers)}."
        raise TypeError(msg)
    return still_open(adata.X)


def still_open(matrix: Any) -> Any:
    """The matrix; a ValueError if it is in a file that has been closed."""
    for part in getattr(matrix, "parts", (matrix,)):
        node = getattr(part, "group", part)
        if isinstance(node, h5py.Group | h5py.Dataset) and not node:
            msg = "The file that the counts are in has been closed: open it again, e.g. by scvi_ext.io.read_backed."
            raise ValueError(msg)
    return matrix


def on_disk(matrix: Any) -> bool:
    """Whether a matrix is an array in a file."""
    zarr = sys.modules.get("zarr")  # optional: a zarr array can only be here if zarr has been imported
    return isinstance(matrix, h5py.Dataset | CSRDataset | CSCDataset) or (
        zarr is not None and isinstance(matrix, zarr.Array)
    )


def _check_supported(matrix: Any) -> None:
    kind = f"{type(matrix).__module__.partition('.')[0]}.{type(matrix).__name__}"
    in_memory = (isinstance(matrix, np.ndarray) and not isinstance(matrix, np.ma.MaskedArray)) or sp.issparse(matrix)
    if not (in_memory or on_disk(matrix)):
        advice = {
            "dask": "Compute it first: adata = adata.to_memory().",
            "torch": "Convert it first, e.g. x.numpy(force=True).",
            "numpy": "Fill the masked entries first: x.filled(0).",
            "cupy": "Bring it to host memory first: x.get().",
            "cupyx": "Bring it to host memory first: x.get().",
        }.get(kind.partition(".")[0], "Convert it to a NumPy array or a SciPy CSR matrix first.")
        msg = f"Counts are a {kind}; a NumPy array, a SciPy sparse matrix or a backed AnnData is needed. {advice}"
        raise TypeError(msg)
    if matrix.dtype.kind not in "biuf":
        msg = (
            f"Counts are a {kind} of dtype {matrix.dtype}; integers, floats or booleans are needed. Convert them "
            "first, e.g. x.astype('float32')."
        )
        raise TypeError(msg)
    if len(matrix.shape) != 2:
        msg = f"Counts have shape {matrix.shape}; a matrix of cells x genes is needed."
        raise ValueError(msg)


def _as_csr(block: Any) -> sp.csr_matrix:
    if not sp.issparse(block) and block.dtype == np.float16:  # which SciPy's sparse matrices do not have
        block = block.astype(np.float32)
    block = sp.csr_matrix(block)
    if not block.has_canonical_format:  # several entries for one cell and gene add up
        block = block.copy()
        block.sum_duplicates()
    return block


def _rows_first(matrix: Any) -> Any:
    """The same matrix in a form whose rows are cheap to slice: compressed columns are converted, all at once."""
    if isinstance(matrix, CSCDataset):
        matrix = matrix.to_memory()
    return matrix.tocsr() if sp.issparse(matrix) else matrix


class UnreadableRowsError(OSError):
    """Rows of a file cannot be read, or are not what they were."""


def unreadable(rows: str, reason: str) -> UnreadableRowsError:
    """The error about ``rows`` of a file, "rows 12,288 to 16,383 of atlas.h5ad, X"."""
    return UnreadableRowsError(
        f"{rows[:1].upper()}{rows[1:]} cannot be used: {reason}. The file is damaged, or has been changed since: "
        "restore it from a copy."
    )


def rows_of(matrix: Any, start: int, stop: int) -> str:
    """What messages call the rows from ``start`` to before ``stop`` of a matrix on disk."""
    return f"rows {start:,} to {stop - 1:,} of {place(matrix)}"


def place(matrix: Any) -> str:
    """The file and the entry of it that a matrix on disk is."""
    node = getattr(matrix, "group", matrix)  # of a sparse one
    if isinstance(node, h5py.Group | h5py.Dataset):
        return f"{node.file.filename}, {node.name.strip('/')}"
    store = node.store
    return f"{getattr(store, 'root', getattr(store, 'path', store))}, {node.path}"


def read_slice(matrix: Any, start: int, stop: int) -> sp.csr_matrix:
    """Consecutive rows in their own precision."""
    if not on_disk(matrix):
        return _as_csr(matrix[start:stop])
    try:
        block = _read(matrix, start, stop)
        if sp.issparse(block) and (block.indices.min(initial=0) < 0 or block.indices.max(initial=0) >= block.shape[1]):
            raise unreadable(rows_of(matrix, start, stop), "they name genes that are not there")
        return _as_csr(block)
    except UnreadableRowsError:
        raise
    except Exception as error:  # whatever the libraries of files and of compression raise
        first, last = _first_and_last(partial(_fails, matrix), start, stop)
        raise unreadable(rows_of(matrix, first, last + 1), first_line(error)) from error


def _fails(matrix: Any, start: int, stop: int) -> bool:
    try:
        _read(matrix, start, stop)
    except Exception:
        return True
    return False


def _first_and_last(fails: Callable[[int, int], bool], start: int, stop: int) -> tuple[int, int]:
    """The first and the last of the rows that cannot be read, of a stretch that could not."""
    rows = range(start, stop)
    if not fails(start, stop):  # a second time
        return start, stop - 1
    first = start + bisect_left(rows, x=True, key=lambda row: fails(start, row + 1))
    last = stop - 1 - bisect_left(rows, x=True, key=lambda row: fails(stop - 1 - (row - start), stop))
    return first, last


def _read(matrix: Any, start: int, stop: int) -> Any:
    return matrix[start:stop] if getattr(matrix, "group", None) is None else _entries_of(matrix, start, stop)


def _entries_of(matrix: CSRDataset, start: int, stop: int) -> sp.csr_matrix:
    """Consecutive rows of a sparse matrix: anndata's own slices spend most of their time on finding versions."""
    group, starts = matrix.group, _STARTS.get(matrix)
    if starts is None:
        starts = _STARTS[matrix] = group["indptr"][:]
    entries = slice(int(starts[start]), int(starts[stop]))
    indptr = starts[start : stop + 1] - starts[start]
    return sp.csr_matrix((group["data"][entries], group["indices"][entries], indptr), (stop - start, matrix.shape[1]))


def check_rows_stored(matrix: Any) -> None:
    """Raise a ValueError if a matrix on disk is stored by columns, so that its rows cannot be read one by one."""
    if isinstance(matrix, CSCDataset):
        msg = (
            f"{place(matrix)} is stored by columns (CSC), of which single cells cannot be read, and is too large for "
            "memory: write it by rows (adata.X = adata.X.tocsr()), or raise settings.memory_limit."
        )
        raise ValueError(msg)


def _chunk_rows(matrix: Any) -> int:
    return max(1, _CHUNK_ENTRIES // max(1, matrix.shape[1]))


def _counts(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Float32, one entry per cell and gene, genes in order; nothing is copied where this holds already."""
    return matrix.astype(np.float32, copy=False)


def row_chunks(matrix: Any, chunk: int | None = None) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Consecutive rows of ``matrix`` in its own precision, as pairs of the first row's number and a CSR matrix.

    Parameters
    ----------
    matrix
        Counts, shape (n, G).
    chunk
        Rows per chunk; by default as many as take 64 MB when dense.
    """
    _check_supported(matrix)
    matrix = _rows_first(matrix)
    chunk = chunk or _chunk_rows(matrix)
    for start in range(0, max(1, matrix.shape[0]), chunk):  # no cells: one empty chunk
        yield start, read_slice(matrix, start, min(start + chunk, matrix.shape[0]))


def read_rows(matrix: Any, rows: np.ndarray) -> sp.csr_matrix:
    """Read rows in the order asked for.

    Parameters
    ----------
    matrix
        Counts, shape (n, G): dense, sparse or on disk.
    rows
        Row numbers, shape (m,), in any order; repeats are allowed.

    Returns
    -------
    float32 counts, shape (m, G).
    """
    _check_supported(matrix)
    rows = np.asarray(rows, dtype=np.int64)
    matrix = _rows_first(matrix)
    if on_disk(matrix):
        return _read_disk_rows(matrix, rows)
    return _counts(_as_csr(matrix[rows]))


def _read_disk_rows(matrix: Any, rows: np.ndarray) -> sp.csr_matrix:
    if len(rows) == 0:
        return sp.csr_matrix((0, matrix.shape[1]), dtype=np.float32)
    return in_order(rows, lambda start, stop: _counts(read_slice(matrix, start, stop)), _chunk_rows(matrix))


def in_order(rows: np.ndarray, read: Callable[[int, int], sp.csr_matrix], chunk: int) -> sp.csr_matrix:
    """Some rows of a file through ``read(start, stop)``, which gives consecutive ones, at most ``chunk`` at a time.

    Files are read forwards, each row once and in contiguous pieces; the order asked for is restored in memory.
    """
    ordered, position = np.unique(rows, return_inverse=True)
    breaks = np.flatnonzero((np.diff(ordered) > _GAP) | (np.diff(ordered // chunk) > 0)) + 1
    pieces = []
    for piece in np.split(ordered, breaks):
        first, stop = int(piece[0]), int(piece[-1]) + 1
        found = read(first, stop)
        pieces.append(found if len(piece) == stop - first else found[piece - first])
    found = sp.vstack(pieces, format="csr") if len(pieces) > 1 else pieces[0]
    return found if np.array_equal(position, np.arange(len(ordered))) else found[position]


def read_all(matrix: Any) -> sp.csr_matrix:
    """Read all rows as float32 counts, shape (n, G). A CSR matrix of float32 is handed back without a copy."""
    _check_supported(matrix)
    matrix = _rows_first(matrix)
    if sp.issparse(matrix):
        return _counts(_as_csr(matrix))
    return sp.vstack([_counts(chunk) for _, chunk in row_chunks(matrix)], format="csr")
