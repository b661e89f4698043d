"""Counts that stay on disk are those in memory, and stay there when they would take too much of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from anndata.io import write_elem

import scvi_ext as sx
from scvi_ext.data import disk, memory
from scvi_ext.data import store as store_module
from scvi_ext.data.disk import _READ_BYTES, DiskCounts, chunk_rows, chunks_of_block, estimated_bytes, memory_limit
from scvi_ext.data.matrix import UnreadableRowsError
from scvi_ext.data.registry import read_setup
from scvi_ext.data.stacked import Stacked
from scvi_ext.data.store import CellStore

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = frozenset({"labels", "size_factor", "categorical", "continuous"})
SPARSE, DENSE = sp.csr_matrix, np.asarray

# How a file holds the counts: format, layout, kind of number, shape of the chunks (None as anndata writes them).
FILES = {
    "h5ad CSR": ("h5ad", SPARSE, np.float32, None),
    "h5ad CSR, compressed": ("h5ad", SPARSE, np.float32, 100),
    "h5ad CSR, float64": ("h5ad", SPARSE, np.float64, None),
    "h5ad CSR, int64": ("h5ad", SPARSE, np.int64, None),
    "h5ad dense": ("h5ad", DENSE, np.float32, None),
    "h5ad dense, chunks of rows and genes": ("h5ad", DENSE, np.float32, (10, 7)),
    "h5ad dense, uint16": ("h5ad", DENSE, np.uint16, (33, 60)),
    "zarr CSR": ("zarr", SPARSE, np.float32, None),
    "zarr CSR, chunks of 64 entries": ("zarr", SPARSE, np.float32, (64,)),
    "zarr CSR, int32": ("zarr", SPARSE, np.int32, (1000,)),
    "zarr dense": ("zarr", DENSE, np.float32, None),
    "zarr dense, chunks of single rows": ("zarr", DENSE, np.float64, (1, 60)),
    "zarr dense, chunks of columns": ("zarr", DENSE, np.float32, (201, 3)),
}


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    """``settings.memory_limit`` is restored; 0 leaves everything on disk."""
    before = sx.settings.memory_limit
    sx.settings.memory_limit = 0
    monkeypatch.setattr(store_module, "_STRETCH_BYTES", 2**13)  # some stretches
    yield
    sx.settings.memory_limit = before


def write(adata: ad.AnnData, folder: Path, kind: str, layout, dtype, chunks, name: str = "counts") -> ad.AnnData:
    """Write a file and open it, with its counts on disk."""
    adata = adata.copy()
    adata.X = layout(adata.X.toarray().astype(dtype))
    path = folder / f"{name}.{kind}"
    if kind == "h5ad":
        adata.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            rewrite(file, adata.X, chunks, {"compression": "gzip"} if layout is SPARSE else {})
        return ad.read_h5ad(path, backed="r")
    adata.write_zarr(path)
    rewrite(zarr.open_group(path, use_consolidated=False), adata.X, chunks, {})
    zarr.consolidate_metadata(zarr.open_group(path).store)
    return sx.io.read_backed(str(path))


def rewrite(file, matrix, chunks, options) -> None:
    if chunks is not None:
        chunks = (chunks,) if isinstance(chunks, int) else chunks
        write_elem(file, "X", matrix, dataset_kwargs={"chunks": chunks, **options})


def setup(adata: ad.AnnData, **options) -> ad.AnnData:
    sx.pp.setup_anndata(
        adata,
        batch_key="batch",
        labels_key="cell_type",
        size_factor_key="size",
        categorical_covariate_keys=["sex"],
        continuous_covariate_keys=["age"],
        **options,
    )
    return adata


def read(adata: ad.AnnData, **options) -> CellStore:
    return CellStore.from_adata(adata, read_setup(adata), columns=COLUMNS, **options)


def assert_same_counts(one: sp.csr_matrix, other: sp.csr_matrix) -> None:
    """Bit for bit, and each in the form that kernels need."""
    assert one.dtype == other.dtype == np.float32
    assert one.shape == other.shape
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert one.has_sorted_indices
    assert one.has_canonical_format


def assert_same_cells(one: CellStore, other: CellStore) -> None:
    assert_same_counts(one.counts, other.counts)
    for name in ("batch_index", *COLUMNS):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert one.obs_names.equals(other.obs_names)
    assert one.var_names.equals(other.var_names)


def assert_same_store(on_disk: CellStore, in_memory: CellStore, registry) -> None:
    """All that a store is asked for."""
    assert on_disk.on_disk
    assert not in_memory.on_disk
    assert isinstance(on_disk.counts, DiskCounts)
    assert (on_disk.n_cells, on_disk.n_genes) == (in_memory.n_cells, in_memory.n_genes)
    assert on_disk.fingerprint() == in_memory.fingerprint()
    assert on_disk.summary(registry) == in_memory.summary(registry)
    np.testing.assert_array_equal(on_disk.totals, in_memory.totals)
    np.testing.assert_array_equal(on_disk.sizes, in_memory.sizes)
    assert on_disk.n_bytes == in_memory.n_bytes
    assert on_disk.counts.nnz == in_memory.counts.nnz
    n, rng = on_disk.n_cells, np.random.default_rng(0)
    for rows in (np.arange(n), rng.permutation(n)[: n // 2], rng.integers(0, n, 3 * n), [n - 1, 0], np.arange(0)):
        rows = np.asarray(rows, dtype=np.int64)
        taken = on_disk.take(rows)
        assert not taken.on_disk
        assert_same_cells(taken, in_memory.take(rows))
    stretches = list(on_disk.stretches())
    assert [stretch.start for stretch, _ in stretches] == [0, *(stretch.stop for stretch, _ in stretches[:-1])]
    assert len(stretches) > 1
    assert_same_counts(sp.vstack([counts for _, counts in stretches], format="csr"), in_memory.counts)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES.keys())
def test_on_disk_is_in_memory(counts, tmp_path, file):
    backed = setup(write(counts, tmp_path, *file))
    setup(counts)
    order = counts.var_names[::-1][: counts.n_vars // 2]  # of a model: fewer genes, in another order
    for options in ({}, {"indices": np.arange(200, -1, -3)}, {"var_names": order}, {"indices": [5, 200, 5] * 20}):
        on_disk, in_memory = read(backed, **options), read(counts, **options)
        assert_same_store(on_disk, in_memory, read_setup(counts))
        assert on_disk.chunk >= 1
        assert in_memory.chunk is None


def test_a_layer_on_disk(counts, tmp_path):
    counts.layers["counts"] = counts.X.copy()
    counts.X = np.log1p(counts.X)
    counts.write_zarr(tmp_path / "counts.zarr")
    backed = setup(sx.io.read_backed(str(tmp_path / "counts.zarr")), layer="counts")
    assert_same_store(read(backed), read(setup(counts, layer="counts")), read_setup(counts))


def test_several_files_with_genes_in_other_orders(counts, tmp_path):
    rng = np.random.default_rng(1)
    parts = [counts[:70], counts[70:130, rng.permutation(counts.n_vars)], counts[130:]]
    kinds = [("h5ad", SPARSE, np.float32, None), ("zarr", DENSE, np.int16, (7, 9)), ("h5ad", DENSE, np.float64, None)]
    for i, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
        write(part.copy(), tmp_path, *kind, name=str(i))
    paths = [str(tmp_path / f"{i}.{kind[0]}") for i, kind in enumerate(kinds)]
    backed = setup(sx.io.read_backed(paths))
    setup(counts)
    for options in ({}, {"var_names": counts.var_names[::-1]}, {"indices": [200, 69, 70, 0, 130, 70] * 9}):
        assert_same_store(read(backed, **options), read(counts, **options), read_setup(counts))
    damaged = read(backed)
    damaged.fingerprint()
    damaged.counts.marks[[128, 131]] += 1
    with pytest.raises(UnreadableRowsError, match=r"Rows 58 to 59 of .*1\.zarr, X; rows 0 to 1 of .*2\.h5ad, X cannot"):
        damaged.take(np.arange(60, 140))


def test_counts_of_one_gene_given_in_two_parts_add_up(counts, tmp_path):
    halves = sp.csr_matrix(counts.X)
    twice = sp.csr_matrix((np.repeat(halves.data / 2, 2), np.repeat(halves.indices, 2), 2 * halves.indptr))
    counts.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        write_elem(file, "X", twice)
    backed = setup(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"), check="warn")
    on_disk, in_memory = read(backed), read(setup(counts, check="warn"))
    assert_same_cells(on_disk.take(np.arange(201)[::-1]), in_memory.take(np.arange(201)[::-1]))
    assert on_disk.fingerprint() == in_memory.fingerprint()
    np.testing.assert_array_equal(on_disk.sizes, in_memory.sizes)


def test_estimated_counts_have_one_fingerprint_whatever_they_are_read_in(counts, tmp_path, monkeypatch):
    # Corrected counts are no integers, and sums of them are rounded: in whichever pieces they are read.
    rng = np.random.default_rng(0)
    counts.X.data = (counts.X.data * rng.lognormal(0, 8, counts.X.nnz)).astype(np.float32)
    backed = write(counts, tmp_path, *FILES["h5ad CSR"])
    for adata in (counts, backed):
        with pytest.warns(sx.ScviExtWarning):
            setup(adata, check="warn")
    prints = {read(counts).fingerprint()}
    for size in (2**10, 2**14, 2**26):
        monkeypatch.setattr(store_module, "_STRETCH_BYTES", size)
        prints.add(read(backed).fingerprint())
    assert len(prints) == 1


def test_columns_first_are_refused_where_they_do_not_fit(counts, tmp_path):
    counts.X = sp.csc_matrix(counts.X)
    counts.write_h5ad(tmp_path / "columns.h5ad")
    backed = setup(ad.read_h5ad(tmp_path / "columns.h5ad", backed="r"))
    with pytest.raises(
        ValueError, match=r"columns\.h5ad, X is stored by columns \(CSC\).*raise settings\.memory_limit"
    ):
        read(backed)
    sx.settings.memory_limit = 1
    assert_same_cells(read(backed).take(np.arange(201)), read(setup(counts)).take(np.arange(201)))


def test_what_is_no_count_any_more_is_named(counts, tmp_path):
    backed = setup(write(counts, tmp_path, *FILES["h5ad dense"]))
    backed.file.close()
    with h5py.File(tmp_path / "counts.h5ad", "r+") as file:
        file["X"][77, 5] = 0.5
    backed.file.open()
    with pytest.raises(ValueError, match=r"1 entries that are no counts, first 0\.5 in cell 'cell77', gene 'gene5'"):
        read(backed).fingerprint()


@pytest.mark.parametrize(
    ("change", "n"),
    [
        pytest.param({"data": 1}, 1, id="another count"),
        pytest.param({"indices": 1}, 1, id="another gene"),
        pytest.param({"data": 1, "next": -1}, 1, id="other counts with the same sum"),
    ],
)
def test_rows_that_change_after_they_were_read_are_refused(counts, tmp_path, change, n):
    """Formats without checksums hand out whatever is there; each change is one that could be read as counts."""
    backed = setup(write(counts, tmp_path, *FILES["h5ad CSR"]))
    store = read(backed)
    store.fingerprint()
    backed.file.close()
    with h5py.File(tmp_path / "counts.h5ad", "r+") as file:
        first = file["X/indptr"][100]
        gaps = np.diff(file["X/indices"][first : file["X/indptr"][101]])
        place = first + int(np.argmax(gaps > 1)) if "indices" in change else first + int(np.argmax(gaps > 0))
        if "indices" in change:
            file["X/indices"][place] += 1
        else:
            file["X/data"][place] += change["data"]
            file["X/data"][place + 1] += change.get("next", 0)
            assert file["X/data"][place + 1] >= 0
    backed.file.open()
    store = replace(store, counts=reopened(store.counts, backed))
    with pytest.raises(
        UnreadableRowsError,
        match=r"Rows 100 to 100 of .*counts\.h5ad, X cannot be used: 1 of them .*when they were first read\. The file "
        r"is damaged, or has been changed since: restore it from a copy",
    ):
        store.take(np.arange(90, 110))
    store.take(np.r_[0:100, 101:201])


def reopened(counts: DiskCounts, adata: ad.AnnData) -> DiskCounts:
    """The same, which remember what they were, of a file that was closed in between."""
    counts.matrix = adata.X
    return counts


@pytest.mark.parametrize("lost", ["data", "indices"])
def test_a_chunk_of_zarr_that_is_gone_is_not_read_as_zeros(counts, tmp_path, lost):
    backed = setup(write(counts, tmp_path, *FILES["zarr CSR, chunks of 64 entries"]))
    store = read(backed)
    store.fingerprint()
    (tmp_path / f"counts.zarr/X/{lost}/3").unlink()
    with pytest.raises(UnreadableRowsError, match=r"Rows \d to \d of .*counts\.zarr, X cannot be used: \d of them"):
        store.take(np.arange(201))


# ---- how much may be held ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (1, 10**9), (0.5, 5 * 10**8), (np.float32(2), 2 * 10**9), (np.inf, 2**63)]
)
def test_the_limit_is_in_gigabytes(value, expected):
    sx.settings.memory_limit = value
    assert memory_limit() == expected


@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("-inf")])
def test_impossible_limits_are_refused(value):
    sx.settings.memory_limit = value
    with pytest.raises(
        ValueError, match=r"settings\.memory_limit=.* must be a number of gigabytes, 0 or more, or None"
    ):
        memory_limit()


@pytest.mark.parametrize("value", ["8 GB", True, [1]])
def test_limits_that_are_no_numbers_are_refused(value, registered, tmp_path):
    registered.write_h5ad(tmp_path / "a.h5ad")
    sx.settings.memory_limit = value
    with pytest.raises(TypeError, match=r"settings\.memory_limit=.*a number is needed"):
        read(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"))


def test_what_fits_is_read(counts, tmp_path):
    backed = setup(write(counts, tmp_path, *FILES["h5ad CSR"]))
    needed = counts.X.nnz * 8 / 1e9
    for value, on_disk in ((needed * 0.999, True), (needed * 1.001, False), (np.inf, False), (None, False)):
        sx.settings.memory_limit = value
        store = read(backed)
        assert store.on_disk is on_disk
        assert store.chunk >= 1  # an order in blocks, whether or not they are needed
        assert store.n_bytes == counts.X.nnz * 8
    sx.settings.memory_limit = needed / 2  # half of the cells fit where all of them do not
    assert not read(backed, indices=np.arange(90)).on_disk


def test_what_is_in_memory_stays_there(counts):
    assert not read(setup(counts)).on_disk


def test_none_takes_half_of_what_is_free(monkeypatch):
    sx.settings.memory_limit = None
    monkeypatch.setattr(disk, "free_memory", lambda: 10**10)
    assert memory_limit() == 5 * 10**9


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """``groups(lines, {group: (limit, used, cached)})``: control groups as the system shows them, in ``tmp_path``."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")

    def make(lines: str, found: dict[str, tuple], version: int = 2) -> int:
        (tmp_path / "own").write_text(lines)
        limit_name, used_name, cached_name = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            2: ("memory.max", "memory.current", "inactive_file"),
        }[version]
        for group, (limit, used, cached) in found.items():
            place = tmp_path / group
            place.mkdir(parents=True, exist_ok=True)
            (place / limit_name).write_text(f"{limit}\n")
            (place / used_name).write_text(f"{used}\n")
            (place / "memory.stat").write_text(f"anon 17\n{cached_name} {cached}\n")
        return memory.free_memory()

    return make


def test_memory_without_control_groups(groups):
    of_machine = groups("", {})
    assert of_machine > 10**7
    assert groups("0::/gone\n", {}) > 10**7
    assert groups("0::/job\n", {"job": ("max", 500_000, 0)}) > 10**7  # no limit
    assert groups("4:memory:/job\n", {"memory/job": (2**62, 500_000, 0)}, version=1) > 10**7  # how version 1 says that


@pytest.mark.parametrize(
    ("lines", "found", "version", "free"),
    [
        ("0::/\n", {"": (2_000_000, 500_000, 0)}, 2, 1_500_000),
        ("0::/job/step\n", {"job/step": ("max", 5, 0), "job": (2_000_000, 500_000, 0)}, 2, 1_500_000),
        ("0::/job/step\n", {"job/step": (900_000, 0, 0), "job": (2_000_000, 500_000, 0)}, 2, 900_000),
        ("0::/job\n", {"job": (2_000_000, 3_000_000, 0)}, 2, 0),  # over it already
        ("0::/job\n", {"job": (2_000_000, 1_900_000, 1_400_000)}, 2, 1_500_000),  # a file that was read counts as used
        ("0::/of/the/machine/outside\n", {"": (2_000_000, 500_000, 0)}, 2, 1_500_000),
        ("5:cpu:/\n4:memory:/job\n0::/\n", {"memory/job": (2_000_000, 500_000, 100_000)}, 1, 1_600_000),
    ],
)
def test_the_memory_of_a_job_is_what_its_control_groups_leave(groups, lines, found, version, free):
    assert groups(lines, found, version) == free


# ---- what is read together -----------------------------------------------------------------------------------------


def test_rows_are_read_in_pieces_worth_a_look_at_a_disk(counts, tmp_path):
    backed = write(counts, tmp_path, *FILES["h5ad CSR"])
    per_row = counts.X.nnz * 8 / counts.n_obs
    assert chunk_rows(backed.X) == pytest.approx(_READ_BYTES / per_row, abs=1)
    dense = write(counts, tmp_path, "zarr", DENSE, np.float64, (1, 60), "rows")
    assert chunk_rows(dense.X) == pytest.approx(_READ_BYTES / (60 * 8), abs=1)
    whole = write(counts, tmp_path, "zarr", DENSE, np.float32, (201, 3), "columns")
    assert chunk_rows(whole.X) >= 201
    assert chunk_rows(Stacked([whole.X, dense.X])) == max(chunk_rows(dense.X), chunk_rows(whole.X))


def test_what_a_matrix_would_take(counts, tmp_path):
    backed = write(counts, tmp_path, *FILES["h5ad CSR"])
    assert estimated_bytes(backed.X, 201) == counts.X.nnz * 8
    dense = write(counts, tmp_path, *FILES["zarr dense"])
    assert estimated_bytes(dense.X, 100) == 100 * 60 // 2 * 8
    assert estimated_bytes(Stacked([dense.X, dense.X]), 402) == 402 * 60 // 2 * 8
    assert estimated_bytes(Stacked([backed.X, backed.X]), 402) == 2 * counts.X.nnz * 8


@pytest.mark.parametrize("n_blocks", [1, 2, 7, 100])
@pytest.mark.parametrize("chunk", [1, 5, 400, 10**6])
@pytest.mark.parametrize("n_cells", [1, 16, 1000, 100_000])
def test_a_block_mixes_sixteen_chunks_or_more(chunk, n_cells, n_blocks):
    found = chunks_of_block(chunk, n_cells, n_blocks)
    assert 1 <= found <= chunk
    if n_cells >= 16 * n_blocks:
        assert found * 16 * n_blocks <= n_cells


def test_blocks_follow_from_the_file_and_not_from_the_machine(counts, tmp_path, monkeypatch):
    backed = setup(write(counts, tmp_path, *FILES["h5ad CSR"]))
    assert read(backed).blocks() is None  # all cells are one block
    monkeypatch.setattr(store_module, "BLOCK_BYTES", 10_000)
    found = []
    for value in (0, None, np.inf):
        sx.settings.memory_limit = value
        found.append(read(backed).blocks())
    assert found[0] == found[1] == found[2]
    assert found[0].n_blocks == -(-counts.X.nnz * 8 // 10_000)
    assert read(setup(counts)).blocks() is None  # which did not come from a file


@pytest.mark.parametrize("limit", [0, None])
def test_a_file_of_zarr_that_lacks_a_chunk_from_the_beginning_is_refused(counts, tmp_path, limit):
    sx.settings.memory_limit = limit
    backed = setup(write(counts, tmp_path, *FILES["zarr CSR, chunks of 64 entries"]))
    read(backed)
    again = sx.io.read_backed(tmp_path / "counts.zarr")
    folder = tmp_path / "counts.zarr" / "X" / "indices"
    chunks = [path for path in folder.rglob("*") if path.is_file() and path.name[0] not in ".z"]
    chunks[0].unlink()
    with pytest.raises(
        UnreadableRowsError, match=r"counts\.zarr, X cannot be used: 1 chunks of X/indices are not there"
    ):
        read(backed)
    with pytest.raises(UnreadableRowsError, match="chunks of X/indices are not there"):
        sx.pp.setup_anndata(again)
    assert "scvi_ext" not in again.uns
