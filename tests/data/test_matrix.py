from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scvi_ext.data import matrix as matrix_module
from scvi_ext.data.matrix import counts_matrix, read_all, read_rows, row_chunks

N, G = 300, 17
COUNTS = np.random.default_rng(1).poisson(0.6, (N, G))
COUNTS[11] = 0

IN_MEMORY = {
    "dense": lambda: COUNTS.astype(np.float32),
    "fortran": lambda: np.asfortranarray(COUNTS.astype(np.float32)),
    "csr": lambda: sp.csr_matrix(COUNTS.astype(np.float32)),
    "csr_array": lambda: sp.csr_array(COUNTS.astype(np.float32)),
    "csc": lambda: sp.csc_matrix(COUNTS.astype(np.float32)),
    "int64": lambda: COUNTS,
    "uint8": lambda: sp.csr_matrix(COUNTS.astype(np.uint8)),
    "float64": lambda: sp.csr_matrix(COUNTS.astype(np.float64)),
    "float16": lambda: COUNTS.astype(np.float16),
    "unsorted": lambda: unsorted(),
    "view dense": lambda: ad.AnnData(padded(COUNTS.astype(np.float32)))[1:-1].X,
    "view csr": lambda: ad.AnnData(sp.csr_matrix(padded(COUNTS.astype(np.float32))))[1:-1].X,
    "view csc": lambda: ad.AnnData(sp.csc_matrix(padded(COUNTS.astype(np.float32))))[1:-1].X,
}
ON_DISK = ["dense", "csr", "csc", "zarr dense", "zarr csr"]


def padded(counts: np.ndarray) -> np.ndarray:
    return np.pad(counts, ((1, 1), (0, 0)), constant_values=9)


def unsorted() -> sp.csr_matrix:
    """Genes in descending order within a cell, and each count in two parts."""
    counts = sp.csr_matrix(COUNTS.astype(np.float32))
    twice = sp.csr_matrix(
        (
            np.repeat(counts.data[::-1] / 2, 2),
            np.repeat(counts.indices[::-1], 2),
            2 * (counts.nnz - counts.indptr[::-1]),
        ),
        shape=counts.shape,
    )
    return twice[::-1]


@pytest.fixture(params=[*IN_MEMORY, *(f"disk {kind}" for kind in ON_DISK)])
def matrix(request, tmp_path):
    if not request.param.startswith("disk"):
        return IN_MEMORY[request.param]()
    return on_disk(request.param.removeprefix("disk "), tmp_path)


def on_disk(kind: str, folder):
    counts = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix}[kind.split()[-1]](COUNTS.astype("f4"))
    if kind.startswith("zarr"):
        import zarr
        from anndata.io import sparse_dataset

        ad.AnnData(counts).write_zarr(folder / "a.zarr")
        stored = zarr.open(folder / "a.zarr", mode="r")["X"]
        return stored if kind == "zarr dense" else ad.AnnData(sparse_dataset(stored)).X
    ad.AnnData(counts).write_h5ad(folder / "a.h5ad")
    return ad.read_h5ad(folder / "a.h5ad", backed="r").X


def assert_counts(result, expected):
    assert type(result) is sp.csr_matrix
    assert result.dtype == np.float32
    assert result.has_canonical_format
    np.testing.assert_array_equal(result.toarray(), expected)


def test_read_all(matrix):
    assert_counts(read_all(matrix), COUNTS)


@pytest.mark.parametrize("chunk_entries", [2**24, 40 * G])
def test_any_order_of_rows(matrix, chunk_entries, monkeypatch):
    monkeypatch.setattr(matrix_module, "_CHUNK_ENTRIES", chunk_entries)
    rng = np.random.default_rng(2)
    for rows in (
        np.arange(N)[::-1],
        rng.permutation(N),
        rng.integers(0, N, 500),
        np.array([5, 2, 9]),
        np.array([N - 1, 0, 0, N - 1, 11]),
        np.array([7]),
        np.array([], dtype=int),
    ):
        assert_counts(read_rows(matrix, rows), COUNTS[rows])


def test_chunks_cover_all_rows_in_the_original_precision(matrix):
    chunks = list(row_chunks(matrix, 70))
    assert [start for start, _ in chunks] == [0, 70, 140, 210, 280]
    np.testing.assert_array_equal(np.vstack([chunk.toarray() for _, chunk in chunks]), COUNTS)
    assert matrix.dtype in (chunks[0][1].dtype, np.float16)


def test_chunks_keep_what_float32_would_lose():
    large = np.array([[2.0**24 + 1, 1 + 1e-9]])
    np.testing.assert_array_equal(next(row_chunks(large))[1].toarray(), large)


def test_booleans_count_as_one():
    assert_counts(read_all(COUNTS > 0), COUNTS > 0)
    assert_counts(read_rows(sp.csr_matrix(COUNTS > 0), np.array([3, 1])), (COUNTS > 0)[[3, 1]])


def test_no_cells():
    for empty in (np.empty((0, G)), sp.csr_matrix((0, G)), sp.csc_matrix((0, G))):
        assert_counts(read_all(empty), np.empty((0, G)))


def test_csr_float32_is_not_copied():
    counts = sp.csr_matrix(COUNTS.astype(np.float32))
    assert np.shares_memory(read_all(counts).data, counts.data)


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_the_input_is_left_alone(kind):
    matrix = IN_MEMORY[kind]()
    before = matrix.copy()
    read_all(matrix)
    read_rows(matrix, np.array([4, 2]))
    list(row_chunks(matrix, 50))
    if sp.issparse(matrix):
        for name in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(matrix, name), getattr(before, name))
    else:
        np.testing.assert_array_equal(matrix, before)


def test_counts_matrix_is_x_or_the_layer():
    adata = ad.AnnData(COUNTS.astype("f4"), layers={"counts": COUNTS})
    assert counts_matrix(adata, None) is adata.X
    assert counts_matrix(adata, "counts") is adata.layers["counts"]
    with pytest.raises(KeyError, match=r"'count' is not in adata\.layers, which has: 'counts'.*Did you mean 'counts'"):
        counts_matrix(adata, "count")


def test_no_x():
    adata = ad.AnnData(shape=(3, 2), layers={"counts": np.ones((3, 2))})
    with pytest.raises(TypeError, match=r"adata\.X is None.*out of: 'counts'"):
        counts_matrix(adata, None)


class Lazy:
    """Stands for an array of a library that is not installed here."""

    def __init__(self, module: str):
        self.__class__ = type("Array", (), {"__module__": module})


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (Lazy("dask.array.core"), r"Counts are a dask\.Array.*adata\.to_memory\(\)"),
        (Lazy("cupy"), r"Counts are a cupy\.Array.*x\.get\(\)"),
        (
            Lazy("other"),
            r"Counts are a other\.Array; a NumPy array, a SciPy sparse matrix or a backed AnnData.*Convert",
        ),
        (None, r"Counts are a builtins\.NoneType"),
        (np.ma.masked_array(COUNTS, COUNTS > 1), r"Counts are a numpy\.MaskedArray.*filled"),
        (COUNTS.astype(object), r"dtype object; integers, floats or booleans.*astype\('float32'\)"),
        (COUNTS.astype(complex), r"dtype complex128"),
    ],
)
def test_unsupported_kinds(matrix, message):
    for read in (read_all, lambda m: read_rows(m, np.array([0])), lambda m: next(row_chunks(m))):
        with pytest.raises(TypeError, match=message):
            read(matrix)


def test_torch_tensor_is_refused_with_advice():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"Counts are a torch\.Tensor.*numpy\(force=True\)"):
        read_all(torch.ones(2, 2))


def test_one_dimension_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\); a matrix of cells x genes"):
        read_all(np.ones(3))


def test_far_rows_on_disk_are_read_apart(tmp_path, monkeypatch):
    """Few rows of a large file must not mean reading what lies between them."""
    stored = on_disk("csr", tmp_path)
    read = []
    original = matrix_module.read_slice
    monkeypatch.setattr(matrix_module, "read_slice", lambda *where: read.append(where[1:]) or original(*where))
    assert_counts(read_rows(stored, np.array([290, 3, 5])), COUNTS[[290, 3, 5]])
    assert read == [(3, 6), (290, 291)]
