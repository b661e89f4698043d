"""Files as one AnnData: counts and layers stay on disk, and everything is as if the files had been read and joined."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import scvi_ext as sx
from scvi_ext.data.stacked import Stacked, parts_of, where


def write(adata: ad.AnnData, path) -> str:
    adata = adata.copy()
    if path.suffix == ".zarr":
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    return str(path)


@pytest.fixture
def whole(counts) -> ad.AnnData:
    """Counts in X and in a layer, and something in every other slot."""
    counts.layers["counts"] = counts.X.copy()
    counts.X = np.log1p(counts.X.toarray())
    counts.obsm["X_pca"] = np.arange(2.0 * counts.n_obs).reshape(-1, 2)
    counts.obsm["table"] = pd.DataFrame({"a": np.arange(counts.n_obs)}, index=counts.obs_names)
    counts.varm["loadings"] = np.arange(3.0 * counts.n_vars).reshape(-1, 3)
    counts.uns["note"] = {"by": "hand", "numbers": np.array([1.0, np.nan])}
    return counts


@pytest.fixture
def three(whole, tmp_path) -> list[str]:
    """The same in three files: h5ad and zarr, sparse and dense, genes in another order, other categories."""
    order = np.random.default_rng(1).permutation(whole.n_vars)
    parts = [whole[:70].copy(), whole[70:130, order].copy(), whole[130:].copy()]
    parts[1].obs["batch"] = parts[1].obs["batch"].cat.rename_categories({"b0": "other"})
    parts[1].layers["counts"] = parts[1].layers["counts"].toarray()
    parts[2].X = sp.csr_matrix(parts[2].X)
    parts[2].obs["score"] = 1.5
    return [write(part, tmp_path / name) for part, name in zip(parts, ("a.h5ad", "b.zarr", "c.h5ad"), strict=True)]


def dense(matrix) -> np.ndarray:
    matrix = matrix[:]
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_one_file_is_read_but_for_its_matrices(whole, tmp_path, suffix, kind):
    values = whole.X
    whole.X = kind(values)
    path = write(whole, tmp_path / f"one.{suffix}")
    adata = sx.io.read_backed(path)
    assert not isinstance(adata.X, np.ndarray)
    assert not sp.issparse(adata.X)
    assert not sp.issparse(adata.layers["counts"])
    np.testing.assert_array_equal(dense(adata.X), values)
    np.testing.assert_array_equal(dense(adata.layers["counts"]), whole.layers["counts"].toarray())
    pd.testing.assert_frame_equal(adata.obs.astype(str), whole.obs.astype(str))  # text comes back as categories
    np.testing.assert_array_equal(adata.obsm["X_pca"], whole.obsm["X_pca"])
    np.testing.assert_array_equal(adata.varm["loadings"], whole.varm["loadings"])
    assert adata.uns["note"]["by"] == "hand"
    read = adata.to_memory()
    np.testing.assert_array_equal(dense(read.X), values)
    assert type(read) is ad.AnnData


def test_three_files_are_one_below_the_other(whole, three):
    adata = sx.io.read_backed(three, label="file")
    assert isinstance(adata.X, Stacked)
    assert adata.var_names.equals(whole.var_names)
    assert adata.obs_names.equals(whole.obs_names)
    np.testing.assert_array_equal(dense(adata.X), whole.X)
    np.testing.assert_array_equal(dense(adata.layers["counts"]), whole.layers["counts"].toarray())
    np.testing.assert_array_equal(adata.obsm["X_pca"], whole.obsm["X_pca"])
    assert adata.obsm["table"]["a"].tolist() == list(range(201))
    np.testing.assert_array_equal(adata.varm["loadings"], whole.varm["loadings"])
    assert adata.uns["note"]["by"] == "hand"
    assert set(adata.obs["batch"].cat.categories) == {"b0", "b1", "b2", "other"}
    assert (adata.obs["batch"] == "other").sum() == (whole.obs["batch"][70:130] == "b0").sum()
    assert adata.obs["score"].isna().sum() == 130
    assert adata.obs["file"].value_counts(sort=False).to_dict() == {"a.h5ad": 70, "b.zarr": 60, "c.h5ad": 71}


def test_rows_and_columns_come_in_the_order_asked_for(whole, three):
    adata = sx.io.read_backed(three)
    rows, columns = np.array([200, 3, 100, 3, 75]), np.array([7, 0])
    np.testing.assert_array_equal(adata.X[rows].toarray(), whole.X[rows])
    np.testing.assert_array_equal(adata.X[60:140].toarray(), whole.X[60:140])
    np.testing.assert_array_equal(adata.X[-1:5:-9].toarray(), whole.X[-1:5:-9])
    np.testing.assert_array_equal(adata.X[whole.X[:, 1] > 1].toarray(), whole.X[whole.X[:, 1] > 1])
    assert adata.X[5:2].shape == (0, 60)
    with pytest.raises(IndexError, match=r"Row 201 was asked for, and there are 201 rows"):
        adata.X[[0, 201]]
    view = adata[rows, columns]
    np.testing.assert_array_equal(view.X.toarray(), whole.X[np.ix_(rows, columns)])
    np.testing.assert_array_equal(view.layers["counts"].toarray(), whole.layers["counts"][rows][:, columns].toarray())
    copied = adata[rows[:3], columns].copy()
    np.testing.assert_array_equal(copied.X.toarray(), view.X[:3].toarray())
    np.testing.assert_array_equal(adata.obs_vector("gene7"), whole.X[:, 7])


def test_an_anndata_may_stand_among_the_paths(whole, three, tmp_path):
    second, third = ad.read_zarr(three[1]), ad.read_h5ad(three[2], backed="r")
    adata = sx.io.read_backed([three[0], second, third])
    np.testing.assert_array_equal(dense(adata.X), whole.X)
    adata.obs["new"], adata.uns["note"]["by"] = 1, "someone"
    assert "new" not in second.obs
    assert second.uns["note"]["by"] == "hand"


def test_a_copy_reads_the_same_files_and_keeps_what_is_written_to_itself(whole, three):
    adata = sx.io.read_backed(three)
    copied = adata.copy()
    copied.obs["new"] = 1
    copied.uns["note"]["by"] = "someone"
    assert copied.X is adata.X
    assert "new" not in adata.obs
    assert adata.uns["note"]["by"] == "hand"
    one = sx.io.read_backed(three[0])
    np.testing.assert_array_equal(dense(one.copy().X), whole.X[:70])


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_file_can_be_written_as_another(whole, three, tmp_path, suffix, which):
    path, target = three[which], tmp_path / f"copy.{suffix}"
    with sx.io.read_backed(path) as adata:
        adata.obs["new"] = np.arange(adata.n_obs)
        adata.write_h5ad(target) if suffix == "h5ad" else adata.write_zarr(target)
    with sx.io.read_backed(target) as copied, sx.io.read_backed(path) as adata:
        assert "new" in copied.obs
        assert type(copied.X) is type(adata.X) or suffix not in path
        np.testing.assert_array_equal(dense(copied.X), dense(adata.X))
        np.testing.assert_array_equal(dense(copied.layers["counts"]), dense(adata.layers["counts"]))
        np.testing.assert_array_equal(copied.varm["loadings"], adata.varm["loadings"])


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_is_not_written_over_while_it_is_read(whole, three, which):
    path = three[which]
    with sx.io.read_backed(path) as adata:
        for writes in (adata.write_h5ad, adata.write, adata.write_zarr):
            with pytest.raises(ValueError, match="where the counts are read from, and cannot be replaced meanwhile"):
                writes(path)
        cells = whole[adata.obs_names, adata.var_names]
        np.testing.assert_array_equal(dense(adata.X), dense(cells.X))


def test_several_files_are_not_written_as_one_but_named_what_can(three, tmp_path):
    adata = sx.io.read_backed(three)
    for writes in (adata.write_h5ad, adata.write, adata.write_zarr):
        with pytest.raises(ValueError, match=r"several files cannot be written.*concat_on_disk.*adata\.to_memory\(\)"):
            writes(tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("n_files", [1, 3])
def test_files_that_were_closed_are_said_to_be(registered, tmp_path, n_files):
    cells = np.array_split(np.arange(registered.n_obs), n_files)
    adata = sx.io.read_backed([write(registered[c], tmp_path / f"{i}.h5ad") for i, c in enumerate(cells)])
    adata.close()
    for call in (lambda: sx.tl.fit(adata, max_epochs=1), adata.to_memory):
        with pytest.raises(
            ValueError, match=r"file that the counts are in has been closed: open it again, e\.g\. by sc"
        ):
            call()


def test_a_part_of_the_cells_is_read_into_memory_when_it_is_used(registered, tmp_path):
    path = write(registered, tmp_path / "cells.h5ad")
    part = sx.io.read_backed(path)[20:150]
    sx.tl.fit(part, max_epochs=1, n_hidden=8, seed=3)
    other = registered[20:150].copy()
    sx.tl.fit(other, max_epochs=1, n_hidden=8, seed=3)
    assert sx.get.history(part)["elbo_train"].tolist() == sx.get.history(other)["elbo_train"].tolist()


@pytest.mark.parametrize(
    "call",
    [
        lambda adata: sx.tl.fit(adata, max_epochs=1),
        lambda adata: sx.tl.get_latent(adata),
        lambda adata: sx.tl.get_normalized_expression(adata),
        lambda adata: sx.tl.get_elbo(adata, return_mean=False),
        lambda adata: sx.tl.map_query(adata, adata),
        lambda adata: sx.pp.setup_anndata(adata),
    ],
)
def test_writing_to_a_view_of_anndatas_own_backed_mode_is_refused_at_once(fitted, tmp_path, call):
    backed = ad.read_h5ad(write(fitted, tmp_path / "cells.h5ad"), backed="r")
    with pytest.raises(ValueError, match=r"a view of a backed AnnData.*adata\.to_memory\(\)"):
        call(backed[:100])
    assert sx.tl.get_elbo(backed[:100]) == pytest.approx(sx.tl.get_elbo(fitted, indices=range(100)))
    backed.file.close()


def writable(path) -> bool:
    try:
        h5py.File(path, "r+").close()
    except OSError:
        return False
    return True


def test_files_are_closed_when_nothing_reads_from_them_any_more(three):
    adata = sx.io.read_backed(three)
    assert not writable(three[0])
    counts = adata.X
    del adata
    gc.collect()
    assert counts[:3].shape == (3, 60)
    del counts
    gc.collect()
    assert writable(three[0])
    with sx.io.read_backed(three[0]):
        assert not writable(three[0])
    assert writable(three[0])
    with pytest.raises(FileNotFoundError):
        sx.io.read_backed([three[0], "missing.h5ad"])
    assert writable(three[0])


def test_where_rows_are_is_said_by_file(three):
    adata = sx.io.read_backed(three)
    a, b, _ = three
    assert where(adata.X, 60, 140).startswith(f"rows 60 to 69 of {a}, X; rows 0 to 59 of {b}, X; rows 0 to 9 of ")
    assert where(adata.layers["counts"], 71, 72) == f"rows 1 to 1 of {b}, layers/counts"
    assert where(sx.io.read_backed(b).X, 5, 1205) == f"rows 5 to 59 of {b}, X"
    assert where(np.ones((3, 2)), 0, 3) == "rows 0 to 2 of a matrix in memory"
    assert [(part.first, part.stop) for part in parts_of(adata.X)] == [(0, 70), (70, 130), (130, 201)]


# ---- setup and fits ------------------------------------------------------------------------------------------------


def test_a_setup_that_all_files_have_is_used_and_any_other_is_not(registered, tmp_path):
    paths = [write(registered[rows], tmp_path / f"{i}.h5ad") for i, rows in enumerate([slice(90), slice(90, None)])]
    with sx.io.read_backed(paths) as adata:
        assert adata.uns["scvi_ext"]["setup"]["batch_key"] == "batch"
    other = registered[90:].copy()
    sx.pp.setup_anndata(other)
    other.write_h5ad(paths[1])
    with pytest.warns(sx.ScviExtWarning, match=r"is not the same in these files.* differ in 'setup'"):
        adata = sx.io.read_backed(paths)
    assert "scvi_ext" not in adata.uns


def test_a_fit_of_a_file_on_disk_is_that_of_the_file_in_memory(registered, tmp_path):
    path = write(registered, tmp_path / "one.zarr")
    for adata in (registered, backed := sx.io.read_backed(path)):
        sx.tl.fit(adata, max_epochs=2, n_hidden=8, n_latent=2)
        sx.tl.get_latent(adata, indices=[7, 3, 100])
    np.testing.assert_array_equal(backed.obsm["X_scvi"], registered.obsm["X_scvi"])
    assert "X_scvi" not in ad.read_zarr(path).obsm


# ---- what cannot be read -------------------------------------------------------------------------------------------


def test_what_is_no_file_of_an_anndata_is_refused(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'missing.h5ad' does not exist .looked for from"):
        sx.io.read_backed("missing.h5ad")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"'folder' is a folder, and no zarr group"):
        sx.io.read_backed("folder")
    with pytest.raises(ValueError, match=r"'s3://bucket/a.zarr' is an address"):
        sx.io.read_backed("s3://bucket/a.zarr")
    (tmp_path / "multi.h5mu").touch()
    with pytest.raises(ValueError, match=r"holds a MuData: read it with mudata.read"):
        sx.io.read_backed("multi.h5mu")
    (tmp_path / "text.h5ad").write_text("gene,count")
    with pytest.raises(OSError, match=r"'text.h5ad' cannot be opened: .* It is no h5ad file"):
        sx.io.read_backed("text.h5ad")
    with h5py.File("other.h5ad", "w") as file:
        file["counts"] = np.ones((3, 2))
    with pytest.raises(ValueError, match=r"'other.h5ad' holds no AnnData: it has no obs and no var, but 'counts'"):
        sx.io.read_backed("other.h5ad")
    zarr.open_group("other.zarr", mode="w").create_group("counts")
    with pytest.raises(ValueError, match=r"'other.zarr' holds no AnnData"):
        sx.io.read_backed("other.zarr")
    ad.AnnData(obs=whole.obs).write_h5ad("empty.h5ad")
    with pytest.raises(ValueError, match=r"'empty.h5ad' has no X and no layers"):
        sx.io.read_backed("empty.h5ad")
    with pytest.raises(ValueError, match=r"There are no files to read"):
        sx.io.read_backed([])
    with pytest.raises(TypeError, match=r"adatas\[0\] is a int"):
        sx.io.read_backed([3])


def test_a_file_of_the_first_format_is_refused_with_what_to_do(tmp_path):
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["X"] = np.ones((2, 3), np.float32)
        file["obs"] = np.array([(b"cell0", 1.0), (b"cell1", 2.0)], [("index", "S5"), ("size", "f4")])
        file["var"] = np.array([(b"a",), (b"b",), (b"c",)], [("index", "S1")])
    with pytest.raises(ValueError, match=r"old\.h5ad' is in the format of anndata before 0\.7.*write it anew, anndata"):
        sx.pp.setup_anndata(tmp_path / "old.h5ad")


def test_a_truncated_file_is_named(whole, tmp_path):
    path = tmp_path / "one.h5ad"
    whole.write_h5ad(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=r"one.h5ad' cannot be opened: .*truncated.* only a part of one"):
        sx.io.read_backed(path)


def test_a_file_that_another_process_writes_is_said_to_be_open(whole, tmp_path):
    path = write(whole, tmp_path / "one.h5ad")
    command = [sys.executable, "-c", f"import h5py; f = h5py.File({path!r}, 'r+'); print(1, flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(OSError, match=r"It is open elsewhere for writing: close it there first"):
            sx.io.read_backed(path)
        other.communicate("\n")
    assert sx.io.read_backed(path).n_obs == 201


def test_zarr_that_is_not_installed_is_named(whole, tmp_path, monkeypatch):
    path = write(whole, tmp_path / "one.zarr")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r"is read by zarr, which is not installed: pip install 'zarr"):
        sx.io.read_backed(path)


def test_files_of_other_genes_are_refused(whole, tmp_path):
    paths = [write(part, tmp_path / f"{i}.h5ad") for i, part in enumerate([whole[:90], whole[90:, :55]])]
    with pytest.raises(KeyError, match=r"have different genes: 5 of 60 are in .*0.h5ad' only .'gene55'"):
        sx.io.read_backed(paths)


def test_files_with_the_same_cells_are_refused(whole, tmp_path):
    paths = [write(part, tmp_path / f"{i}.h5ad") for i, part in enumerate([whole[:90], whole[88:]])]
    with pytest.raises(ValueError, match=r"2 names of cells are there more than once: 'cell88', 'cell89'.*0.h5ad"):
        sx.io.read_backed(paths)


def test_a_file_is_not_read_twice(three):
    with pytest.raises(ValueError, match=r"a\.h5ad' was given more than once: name each file once"):
        sx.io.read_backed([three[0], three[1], three[0]])


def test_compressed_columns_of_several_files_are_refused(whole, tmp_path):
    whole.X = sp.csc_matrix(whole.X)
    paths = [write(part, tmp_path / f"{i}.h5ad") for i, part in enumerate([whole[:90], whole[90:]])]
    with pytest.raises(ValueError, match=r"0.h5ad, X is stored by columns .CSC.*Write it by rows"):
        sx.io.read_backed(paths)


def test_an_x_that_only_some_files_have_is_refused(whole, tmp_path):
    second = whole[90:].copy()
    second.X = None
    paths = [write(part, tmp_path / f"{i}.h5ad") for i, part in enumerate([whole[:90], second])]
    with pytest.raises(ValueError, match=r"1 of 2 files have no X.*1.h5ad"):
        sx.io.read_backed(paths)


def test_a_label_that_is_a_column_is_refused(three):
    with pytest.raises(ValueError, match=r"label='batch' is a column of obs already"):
        sx.io.read_backed(three, label="batch")


@pytest.mark.skipif(zarr.__version__.startswith("2"), reason="needs zarr 3")
def test_both_formats_of_zarr_are_read(whole, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, ad.settings.zarr_write_format = ad.settings.zarr_write_format, 3
        try:
            path = write(whole, tmp_path / "three.zarr")
        finally:
            ad.settings.zarr_write_format = before
    assert (tmp_path / "three.zarr" / "zarr.json").is_file()
    np.testing.assert_array_equal(dense(sx.io.read_backed(path).X), whole.X)
