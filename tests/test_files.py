"""Paths where an AnnData may stand: the same numbers, written into the files, and nothing else in them is touched."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import scvi_ext as sx
from scvi_ext import files
from scvi_ext.engine import map_cells
from scvi_ext.engine.step import TrainingStep
from scvi_ext.files import spool, writing

QUICK = {"n_hidden": 8, "n_latent": 3, "max_epochs": 2, "progress": False}


def write(adata: ad.AnnData, path: Path) -> str:
    adata = adata.copy()
    if path.suffix == ".zarr":
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    return str(path)


def read(path: str) -> ad.AnnData:
    return ad.read_zarr(path) if Path(path).suffix == ".zarr" else ad.read_h5ad(path)


def fit_and_read_out(adata, **setup) -> None:
    sx.pp.setup_anndata(adata, batch_key="batch", **setup)
    sx.tl.fit(adata, "ldvae", **QUICK)
    sx.tl.get_latent(adata, return_dist=True)
    sx.tl.get_normalized_expression(adata, seed=1)
    sx.tl.get_likelihood_parameters(adata, seed=1)
    sx.tl.get_loadings(adata)
    sx.tl.get_elbo(adata, seed=1, return_mean=False)


def equal(one: ad.AnnData, other: ad.AnnData) -> None:
    """The same results, value for value, and nothing else."""
    other = other[:, one.var_names].copy()
    for slot in ("obs", "var"):
        pd.testing.assert_frame_equal(
            getattr(one, slot), getattr(other, slot), check_dtype=False, check_categorical=False
        )
    for slot in ("layers", "obsm", "varm"):
        assert set(getattr(one, slot)) == set(getattr(other, slot))
        for name, values in getattr(one, slot).items():
            found = getattr(other, slot)[name]
            assert found.shape == values.shape
            np.testing.assert_array_equal(*(v.toarray() if sp.issparse(v) else np.asarray(v) for v in (found, values)))
    state, found = (a.uns["scvi_ext"]["fits"]["ldvae"]["state"] for a in (one, other))
    assert state.keys() == found.keys()
    for name, values in state.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.fixture
def three(counts, tmp_path) -> list[str]:
    """The counts in three files: h5ad and zarr, dense and sparse, genes in another order, other batches in one."""
    order = np.random.default_rng(1).permutation(counts.n_vars)
    parts = [counts[:70].copy(), counts[70:130, order].copy(), counts[130:].copy()]
    parts[2].X = parts[2].X.toarray()
    return [write(part, tmp_path / name) for part, name in zip(parts, ("a.h5ad", "b.zarr", "c.h5ad"), strict=True)]


# ---- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "kind", "layer"),
    [("h5ad", sp.csr_matrix, None), ("zarr", np.asarray, "counts"), ("h5ad", np.asarray, None)],
)
def test_a_path_gives_what_the_same_in_memory_gives(make_counts, tmp_path, suffix, kind, layer):
    adata = make_counts()
    adata.X = kind(adata.X.toarray())
    if layer:
        adata.layers[layer] = adata.X
        adata.X = np.log1p(adata.X)
    adata.strings_to_categoricals()
    path = write(adata, tmp_path / f"one.{suffix}")
    for which in (adata, path):
        fit_and_read_out(which, layer=layer)
    equal(adata, read(path))
    assert sx.get.history(path)["elbo_train"].tolist() == sx.get.history(adata)["elbo_train"].tolist()
    assert sorted(sx.get.fits(path).index) == ["ldvae"]
    assert [file.name for file in tmp_path.iterdir()] == [f"one.{suffix}"]


def test_three_files_give_what_one_in_memory_gives_and_each_works_alone(counts, three):
    counts.strings_to_categoricals()
    for which in (counts, three):
        fit_and_read_out(which)
    for path, rows in zip(three, (slice(70), slice(70, 130), slice(130, None)), strict=True):
        alone = read(path)
        equal(counts[rows].copy(), alone)
        sx.tl.get_latent(alone, key_added="again")
        # The same encoder, but other cells beside each cell in a product of matrices
        np.testing.assert_allclose(alone.obsm["again"], alone.obsm["X_ldvae"], rtol=1e-5, atol=1e-6)
    assert sx.get.loadings_df(three).index.tolist() == counts.var_names.tolist()


def test_a_zarr_may_come_first(counts, three):
    for which in (counts, backwards := [three[1], three[0]]):
        sx.pp.setup_anndata(which, batch_key="batch", labels_key="cell_type")
    sx.tl.fit(backwards, "scanvi", **QUICK)
    sx.tl.classify(backwards, min_confidence=0.4)
    found = read(three[0])
    assert found.uns["scvi_ext"]["setup"]["batch_categories"].tolist() == ["b0", "b1", "b2"]
    assert "scanvi_prediction" in found.obs
    sx.tl.get_latent(found)


def test_the_cells_asked_for_are_those_that_are_written(fitted, tmp_path):
    path = write(fitted, tmp_path / "one.h5ad")
    indices = [150, 3, 77, 4, 0]
    for which in (fitted, path):
        sx.tl.get_latent(which, indices=indices, key_added="some")
        sx.tl.get_normalized_expression(which, indices=indices, seed=1, key_added="some")
        sx.tl.get_normalized_expression(which, indices=indices, seed=1, gene_list=["gene3"], key_added="table")
    found = read(path)
    assert np.isnan(found.obsm["some"]).any(axis=1).sum() == 201 - 5
    np.testing.assert_array_equal(found.obsm["some"], fitted.obsm["some"])
    np.testing.assert_array_equal(found.layers["some"], fitted.layers["some"])
    pd.testing.assert_frame_equal(found.obsm["table"], fitted.obsm["table"])


def test_genes_that_the_fit_does_not_know_are_nan_in_the_file_too(fitted, make_counts, tmp_path):
    more = make_counts(n_cells=201, n_genes=65)[:, np.random.default_rng(0).permutation(65)].copy()
    more.uns = fitted.uns
    path = write(more, tmp_path / "one.zarr")
    for which in (more, path):
        sx.tl.get_normalized_expression(which, seed=1)
    np.testing.assert_array_equal(read(path).layers["scvi_normalized"], more.layers["scvi_normalized"])
    assert np.isnan(more.layers["scvi_normalized"]).all(axis=0).sum() == 5


def test_a_result_is_replaced_and_nothing_else_is_touched(fitted, tmp_path):
    fitted.uns["note"] = {"by": "hand"}
    path = write(fitted, tmp_path / "one.h5ad")
    sx.tl.get_elbo(path, seed=1, return_mean=False)
    sx.tl.get_latent(path)
    with h5py.File(path, "r+") as file:
        file["obsm"].attrs["mine"] = 1
        file["more"] = np.arange(3)
        before = {
            name: h5py.h5o.get_info(file[name].id).addr for name in ("X", "uns/note", "uns/scvi_ext/fits", "obs/age")
        }
        first = file["obs/scvi_elbo"][:], file["obsm/X_scvi"][:]
    sx.tl.get_elbo(path, seed=2, return_mean=False)
    sx.tl.get_latent(path, give_mean=False, seed=3)
    with h5py.File(path) as file:
        assert {name: h5py.h5o.get_info(file[name].id).addr for name in before} == before
        assert file["obsm"].attrs["mine"] == 1
        assert file["more"].shape == (3,)
        assert (file["obs/scvi_elbo"][:] != first[0]).any()
        assert (file["obsm/X_scvi"][:] != first[1]).all()
        assert list(file["obs"].attrs["column-order"]).count("scvi_elbo") == 1


def test_tables_of_uns_and_corrupted_layers_go_to_every_file(counts, three):
    sx.pp.setup_anndata(three, batch_key="batch")
    sx.tl.fit(three, **QUICK)
    sx.tl.differential_expression(three, "cell_type", n_samples=100)
    sx.pp.corrupt(three)
    found = sx.get.de_df(three)
    for path in three:
        pd.testing.assert_frame_equal(sx.get.de_df(path), found)
        assert sp.issparse(read(path).layers["corrupted"])


def test_data_sets_of_a_joint_fit_may_be_paths(make_counts, tmp_path):
    datasets = {name: make_counts(n_cells=40, seed=seed) for seed, name in enumerate(("rna", "spatial"))}
    for adata in datasets.values():
        sx.pp.setup_anndata(adata, check="warn")
    paths = {name: write(adata, tmp_path / f"{name}.h5ad") for name, adata in datasets.items()}
    for which in (datasets, paths):
        sx.tl.fit(which, "gimvi", n_latent=3, dim_hidden_encoder=8, max_epochs=2, progress=False)
    state, found = (a.uns["scvi_ext"]["fits"]["gimvi"]["state"] for a in (datasets["rna"], read(paths["spatial"])))
    for name, values in state.items():
        np.testing.assert_array_equal(found[name], values)


def test_a_query_may_be_a_path(fitted, make_counts, tmp_path):
    query = make_counts(n_cells=50, seed=5)[:, :55].copy()
    path = write(query, tmp_path / "query.h5ad")
    aligned = sx.pp.align_query(path, fitted)
    assert aligned.shape == (50, 60)
    assert type(aligned) is ad.AnnData
    sx.io.write_model(write(fitted, tmp_path / "one.h5ad"), tmp_path / "model")
    assert sx.io.read_model(tmp_path / "model").model == "scvi"


def test_files_that_differ_are_set_up_together_and_keep_what_they_have(fitted, make_counts, tmp_path):
    paths = [write(a, tmp_path / f"{i}.h5ad") for i, a in enumerate((fitted[:100], make_counts()[100:]))]
    with pytest.warns(sx.ScviExtWarning, match=r"is not the same in these files"):
        sx.pp.setup_anndata(paths, labels_key="cell_type")
    for path in paths:
        assert read(path).uns["scvi_ext"]["setup"]["labels_key"] == "cell_type"
    assert set(read(paths[0]).uns["scvi_ext"]["fits"]) == {"ldvae", "scvi"}


# ---- one stretch after the other -----------------------------------------------------------------------------------


def test_values_can_be_had_one_stretch_after_the_other(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(map_cells, "_BLOCK_CELLS", 64)
    path = write(fitted, tmp_path / "one.h5ad")
    backed = sx.io.read_backed(path)
    sx.tl.get_latent(fitted, return_dist=True)
    sx.tl.get_normalized_expression(fitted, seed=1)
    backed.close()
    for which in (fitted, sx.io.read_backed(path).to_memory(), path, [path]):
        slices, blocks = zip(*sx.tl.get_latent(which, iterate=True), strict=True)
        assert [(s.start, s.stop) for s in slices] == [(0, 64), (64, 128), (128, 192), (192, 201)]
        np.testing.assert_array_equal(np.concatenate(blocks), fitted.obsm["X_scvi"])
        blocks = [block for _, block in sx.tl.get_normalized_expression(which, iterate=True, seed=1)]
        np.testing.assert_array_equal(np.concatenate(blocks), fitted.layers["scvi_normalized"])
    (_, (loc, variance)), *_ = sx.tl.get_latent(path, iterate=True, return_dist=True)
    np.testing.assert_array_equal(variance, fitted.obsm["X_scvi_var"][:64])
    ((cells, block),) = sx.tl.get_normalized_expression(
        path, iterate=True, indices=[5, 1], gene_list=["gene9", "gene2"], n_samples=3, return_mean=False
    )
    assert (cells, block.shape) == (slice(0, 2), (3, 2, 2))
    assert loc.shape == (64, 4)
    assert not read(path).obsm


def test_an_iterator_keeps_its_file_open_until_it_ends_or_is_closed(fitted, tmp_path):
    path = write(fitted, tmp_path / "one.h5ad")
    blocks = sx.tl.get_latent(path, iterate=True, batch_size=100)
    assert isinstance(blocks, Iterator)
    next(blocks)
    with pytest.raises(OSError, match=r"cannot be opened for writing"):
        files.check_writable(path)
    blocks.close()
    files.check_writable(path)
    list(sx.tl.get_latent(path, iterate=True))
    files.check_writable(path)


@pytest.mark.parametrize("function", [sx.tl.get_latent, sx.tl.get_normalized_expression])
def test_what_iterates_writes_nothing(fitted, function):
    for option in ({"key_added": "name"}, {"copy": True}):
        with pytest.raises(ValueError, match=r"iterate=True returns an iterator and writes nothing"):
            function(fitted, iterate=True, **option)


# ---- what cannot be done -------------------------------------------------------------------------------------------


def test_a_copy_of_files_is_refused(fitted, tmp_path):
    path = write(fitted, tmp_path / "one.h5ad")
    with pytest.raises(ValueError, match=r"copy=True has no effect on files"):
        sx.tl.get_latent(path, copy=True)


def test_paths_and_other_things_together_are_refused(fitted, tmp_path):
    path = write(fitted, tmp_path / "one.h5ad")
    with pytest.raises(TypeError, match=r"adata is a list of paths and other things"):
        sx.tl.get_latent([path, fitted])
    with pytest.raises(FileNotFoundError, match=r"'missing.h5ad' does not exist"):
        sx.tl.get_latent("missing.h5ad")
    with pytest.raises(ValueError, match=r"There are no files to read"):
        sx.tl.get_latent([])


def test_an_error_of_the_function_leaves_the_file_as_it_was(counts, tmp_path):
    path = Path(write(counts, tmp_path / "one.h5ad"))
    before = path.read_bytes()
    with pytest.raises(KeyError, match=r"setup_anndata"):
        sx.tl.fit(str(path))
    assert path.read_bytes() == before
    files.check_writable(path)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(registered, tmp_path, monkeypatch):
    paths = [write(registered, tmp_path / name) for name in ("one.h5ad", "one.zarr")]
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    for path in paths:
        with pytest.raises(PermissionError, match=r"one\.\w+' is read-only, and results are written into it"):
            sx.tl.fit(path, "no such model")
        assert len(sx.get.setup(path))
        with pytest.raises(PermissionError):
            sx.tl.get_elbo(path, return_mean=False)
        with pytest.raises(KeyError, match=r"no fit"):  # which would write nothing
            sx.tl.get_elbo(path)


HOLD = "import h5py, sys; f = h5py.File(sys.argv[1], sys.argv[2]); print(1, flush=True); input()"


def hold(path: str, mode: str) -> subprocess.Popen:
    """Another process that has the file open until it is told something."""
    command = [sys.executable, "-c", HOLD, path, mode]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    return other


def test_a_file_that_is_open_elsewhere_is_refused_before_the_work(registered, tmp_path):
    path = write(registered, tmp_path / "one.h5ad")
    with hold(path, "r") as other:
        with pytest.raises(
            OSError, match=r"one.h5ad' cannot be opened for writing: .*It is open here or in another process"
        ):
            sx.tl.fit(path, "no such model")
        assert len(sx.get.setup(path))  # reading is no trouble
        other.communicate("\n")
    backed = ad.read_h5ad(path, backed="r")
    with pytest.raises(OSError, match=r"It is open here or in another process: close it there, adata.file.close"):
        sx.tl.fit(path, "no such model")
    backed.file.close()


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_a_fit_that_cannot_be_written_is_not_lost(registered, tmp_path, monkeypatch, logged, suffix):
    path = write(registered, tmp_path / f"one.{suffix}")
    original, others = writing.write_changes, []

    def late(target, changes):
        if target == Path(path) and suffix == "h5ad":
            others.append(hold(path, "r"))
        elif target == Path(path):
            raise OSError(28, "No space left on device")
        original(target, changes)

    monkeypatch.setattr(files, "write_changes", late)
    with pytest.raises(
        OSError, match=r"could not be written to: .* The results \(.*uns/scvi_ext/fits/scvi.*rescue.h5ad'"
    ):
        sx.tl.fit(path, **QUICK)
    for other in others:
        other.communicate("\n")
        other.wait()
    rescued = ad.read_h5ad(f"{path}.scvi_ext_rescue.h5ad")
    assert rescued.obs_names.equals(registered.obs_names)
    sx.tl.fit(registered, **QUICK)
    registered.uns["scvi_ext"]["fits"] = rescued.uns["scvi_ext"]["fits"]
    sx.tl.get_latent(registered)
    assert "fits" not in read(path).uns["scvi_ext"]
    monkeypatch.setattr(files, "write_changes", original)
    sx.tl.fit(path, resume="auto", **QUICK)
    assert "was finished already: taken from" in logged()
    assert list(sx.get.fits(path).index) == ["scvi"]


def test_an_interrupted_fit_is_written(registered, tmp_path, monkeypatch):
    path, step, n_calls = write(registered, tmp_path / "one.h5ad"), TrainingStep.__call__, iter(range(100))

    def interrupted(self):
        if next(n_calls) == 5:
            signal.raise_signal(signal.SIGINT)
        step(self)

    monkeypatch.setattr(TrainingStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(path, **QUICK | {"max_epochs": 10})
    monkeypatch.undo()
    assert sx.get.fits(path).loc["scvi", "stop_reason"] == "interrupted"
    sx.tl.get_latent(path)
    assert list(read(path).obsm) == ["X_scvi"]


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_who_asks_to_stop_while_results_are_written_waits_until_they_are(
    registered, tmp_path, monkeypatch, signum, raised
):
    path, write_elem = write(registered, tmp_path / "one.h5ad"), writing.write_elem

    def asked(store, key, value):
        if key == writing._NEW:
            signal.raise_signal(signum)
        write_elem(store, key, value)

    sx.tl.fit(path, **QUICK)
    monkeypatch.setattr(writing, "write_elem", asked)
    with pytest.raises(raised):
        sx.tl.get_elbo(path, return_mean=False)
    assert "scvi_elbo" in read(path).obs
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- read-outs that go to disk as they come ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_an_interrupted_read_out_leaves_nothing_behind(fitted, tmp_path, monkeypatch, suffix):
    path = write(fitted, tmp_path / f"one.{suffix}")
    monkeypatch.setattr(map_cells, "_BLOCK_CELLS", 64)
    fill, seen = spool.Spools._check_space, []

    def pressed(self, *args):
        seen.append(args)
        fill(self, *args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(spool.Spools, "_check_space", pressed)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.get_normalized_expression(path)
    assert len(seen) == 1
    assert not read(path).layers
    assert [file.name for file in tmp_path.iterdir()] == [f"one.{suffix}"]


def test_room_on_the_disk_is_looked_for_first(fitted, tmp_path, monkeypatch):
    path = write(fitted, tmp_path / "one.h5ad")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 201 * 60 * 4 * 2 - 1}))
    with pytest.raises(
        OSError, match=re.escape("layers['scvi_normalized'] takes 9.65e-05 GB on disk until it is in its")
    ):
        sx.tl.get_normalized_expression(path)
    sx.tl.get_latent(path)
    assert list(read(path).obsm) == ["X_scvi"]


KILLED = """
import os, signal, sys
import scvi_ext as sx
from scvi_ext.files import spool, writing

path, kind = sys.argv[1:]
writing._AT_ONCE = 60 * 4 * 16  # bytes: 16 cells
rows, flush = spool.Spooled.rows, writing._File._list_column

def killed_while_filling(self, first, stop):
    if first >= 160:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows(self, first, stop)

def killed_between(self, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if kind == "layer":
    spool.Spooled.rows = killed_while_filling
    sx.tl.get_normalized_expression(path)
else:
    writing._File._list_column = killed_between
    sx.tl.get_elbo(path, return_mean=False)
"""


@pytest.mark.parametrize(("kind", "suffix"), [("layer", "h5ad"), ("layer", "zarr"), ("column", "h5ad")])
def test_a_file_whose_writer_is_killed_stays_what_it_was(fitted, tmp_path, suffix, kind):
    sx.tl.get_latent(fitted)
    path = write(fitted, tmp_path / f"one.{suffix}")
    run = subprocess.run([sys.executable, "-c", KILLED, path, kind], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    found = read(path)
    np.testing.assert_array_equal(found.obsm["X_scvi"], fitted.obsm["X_scvi"])
    np.testing.assert_array_equal(found.X.toarray(), fitted.X.toarray())
    assert not found.layers
    assert "scvi_elbo" not in found.obs
    assert [file.name for file in tmp_path.iterdir()] == [f"one.{suffix}"]
    sx.tl.get_normalized_expression(path)
    sx.tl.get_elbo(path, return_mean=False)
    found = read(path)
    assert "scvi_elbo" in found.obs
    assert np.isfinite(found.layers["scvi_normalized"]).all()
    assert "raw.scvi_ext_new" not in (h5py.File(path) if suffix == "h5ad" else [f.name for f in Path(path).iterdir()])


MEMORY = """
import resource, sys
import scvi_ext as sx

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for path in sys.argv[1:]:
    sx.tl.get_normalized_expression(path, indices=slice(0, 2000), gene_list=["gene1"])
    before = peak()
    sx.tl.get_normalized_expression(path)
    print(peak() - before)
"""


def test_memory_does_not_grow_with_the_cells_of_a_read_out(make_counts, tmp_path):
    """100 MB of output; in memory it is at least that."""
    few = make_counts(n_cells=100, n_genes=2500)
    sx.pp.setup_anndata(few)
    sx.tl.fit(few, **QUICK)
    counts = sp.random(10_000, 2500, 0.002, "csr", np.float32, random_state=np.random.default_rng(0))
    counts.data[:] = 1
    many = ad.AnnData(counts, obs=pd.DataFrame(index=[f"c{i}" for i in range(10_000)]), var=few.var, uns=few.uns)
    paths = [write(many, tmp_path / f"many.{suffix}") for suffix in ("h5ad", "zarr")]
    run = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=True)
    assert max(map(int, run.stdout.split())) < 50e6
    with h5py.File(paths[0]) as file:
        assert file["layers/scvi_normalized"].shape == (10_000, 2500)


# ---- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidated", [False, True])
def test_metadata_of_zarr_are_consolidated_again_where_they_were(fitted, tmp_path, zarr_format, consolidated):
    if zarr.__version__.startswith("2") and zarr_format == 3:
        pytest.skip("zarr 2 knows one format only")
    path = tmp_path / "one.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {} if zarr.__version__.startswith("2") else {"zarr_format": zarr_format}
        group = zarr.open_group(str(path), mode="w", **options)
        ad.io.write_elem(group, "/", fitted)
        if consolidated:
            zarr.consolidate_metadata(str(path))
    sx.tl.get_latent(path)
    sx.tl.get_elbo(path, return_mean=False)
    sx.tl.get_normalized_expression(path)
    found = ad.read_zarr(path)
    assert list(found.obsm) == ["X_scvi"]
    assert list(found.layers) == ["scvi_normalized"]
    assert "scvi_elbo" in found.obs
    inside = (path / "zarr.json").read_text() if zarr_format == 3 else [file.name for file in path.iterdir()]
    assert ('"consolidated_metadata"' in inside or ".zmetadata" in inside) == consolidated
    assert "raw.scvi_ext_new" not in inside


def test_a_layer_of_zarr_has_chunks_of_whole_rows(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_AT_ONCE", 60 * 4 * 50)
    path = write(fitted, tmp_path / "one.zarr")
    sx.tl.get_normalized_expression(path)
    assert zarr.open_group(path)["layers/scvi_normalized"].chunks == (50, 60)
    path = write(fitted, tmp_path / "one.h5ad")
    sx.tl.get_normalized_expression(path)
    with h5py.File(path) as file:
        assert file["layers/scvi_normalized"].chunks is None
        assert file["layers/scvi_normalized"].dtype == np.float32


def test_a_column_that_names_are_kept_under_is_not_written_over(fitted, tmp_path):
    fitted.obs.index.name = "barcode"
    path = write(fitted, tmp_path / "one.h5ad")
    with pytest.raises(OSError, match=r"'barcode' is what names are kept under in obs"):
        sx.tl.get_elbo(path, key_added="barcode", return_mean=False)
    assert read(path).obs_names.equals(fitted.obs_names)
    assert "barcode" in ad.read_h5ad(f"{path}.scvi_ext_rescue.h5ad").obs


def test_what_was_written_into_which_file_is_logged(fitted, three, logged, tmp_path):
    sx.tl.get_latent(write(fitted, tmp_path / "one.h5ad"))
    assert "one.h5ad': 'obsm/X_scvi'" in logged()
    sx.pp.setup_anndata(three)
    assert re.search(r"written into '.*a.h5ad', '.*b.zarr', '.*c.h5ad': 'uns/scvi_ext/format', ", logged())


def test_a_fit_of_one_file_leaves_those_of_the_list_where_they_are(make_counts, tmp_path):
    cells = make_counts()
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    for path, part in zip(paths, (cells[:100], cells[100:]), strict=True):
        part.copy().write_h5ad(path)
    sx.pp.setup_anndata(paths, batch_key="batch")
    sx.tl.fit(paths, max_epochs=1, n_hidden=8)
    sx.tl.fit(paths[0], max_epochs=1, n_hidden=8, key_added="solo")
    with pytest.warns(sx.ScviExtWarning, match="which is left out: they differ in 'fits/solo'"):
        sx.tl.get_latent(paths)
    assert list(sx.get.fits(paths[0]).index) == ["scvi", "solo"]
    assert ad.read_h5ad(paths[1]).obsm["X_scvi"].shape == (101, 10)


def test_the_note_of_the_last_fit_is_in_every_file_even_if_a_process_ended_before(registered, tmp_path, monkeypatch):
    paths = [write(registered[cells], tmp_path / f"{cells.start}.h5ad") for cells in (slice(100), slice(100, 201))]
    plain, n_calls = writing._File.write, iter(range(100))

    def killed(self, change):
        if change.place[-1] == "last_fit" and next(n_calls) == 1:
            raise KeyboardInterrupt
        plain(self, change)

    monkeypatch.setattr(writing._File, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(paths, **QUICK)
    assert ["last_fit" in read(path).uns["scvi_ext"] for path in paths] == [True, False]
    sx.tl.fit(paths, resume="auto", **QUICK)
    assert [read(path).uns["scvi_ext"]["last_fit"] for path in paths] == ["scvi", "scvi"]


def test_a_rescue_that_fails_leaves_nothing_behind(registered, tmp_path, monkeypatch):
    path, elsewhere, plain = write(registered, tmp_path / "one.h5ad"), tmp_path / "elsewhere", ad.AnnData.write_h5ad
    elsewhere.mkdir()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    def half(self, target):
        plain(self, target)
        if target.parent == tmp_path:
            full()

    monkeypatch.setattr(ad.AnnData, "write_h5ad", half)
    monkeypatch.setattr(writing.tempfile, "gettempdir", lambda: str(elsewhere))
    monkeypatch.setattr(files, "write_changes", full)
    with pytest.raises(OSError, match=r"The results \(.*fits/scvi.*elsewhere/one\.h5ad\.scvi_ext_rescue\.h5ad'"):
        sx.tl.fit(path, **QUICK)
    assert not (tmp_path / "one.h5ad.scvi_ext_rescue.h5ad").exists()


def test_an_empty_file_is_refused_as_it_is(tmp_path):
    path = tmp_path / "empty.h5ad"
    path.touch()
    with pytest.raises(OSError, match=r"empty\.h5ad' is empty: it is no h5ad file"):
        sx.pp.setup_anndata(path)
    assert path.stat().st_size == 0
