"""Training and reading out from disk: the numbers are those of memory, and damage to a file loses nothing."""

from __future__ import annotations

import shutil
import signal
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from _tolerances import FLOAT32

import scvi_ext as sx
from scvi_ext.data.matrix import UnreadableRowsError
from scvi_ext.data.sampler import split_cells
from scvi_ext.data.stream import Resident, Streamed
from scvi_ext.engine import fit as engine
from scvi_ext.engine.checkpoint import load_module, module_arrays
from scvi_ext.engine.step import TrainingStep
from scvi_ext.models.scvi import VAE
from scvi_ext.tl import _train

if TYPE_CHECKING:
    from pathlib import Path

N = 300
RUN = {"max_epochs": 3, "batch_size": 30, "train_size": 0.6, "n_hidden": 8, "n_latent": 3}  # 6 steps in an epoch
OF_SCVI = {"max_epochs": 1} | {name: RUN[name] for name in ("n_hidden", "n_latent")}
CASES = {
    "scvi": ("scvi", {}),
    "scvi, with a library and covariates": ("scvi", {"library": "latent", "encode_covariates": True, "n_layers": 2}),
    "scvi, early stopping": ("scvi", {"early_stopping": 1, "lr": 0.3, "max_epochs": 8}),
    "ldvae": ("ldvae", {}),
    "vaec": ("vaec", {}),
    "scanvi": ("scanvi", {"n_samples_per_label": 5}),
    "autozi": ("autozi", {}),
    "totalvi": ("totalvi", {}),
    "classifier": ("classifier", {"init_from": "base", "classifies": "z"}),
}
DISK, MEMORY = 0, None


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five blocks in an epoch, and held-out cells in more than one piece, so that they are streamed too."""
    before = sx.settings.memory_limit
    monkeypatch.setattr("scvi_ext.data.store.BLOCK_BYTES", 25_000)
    monkeypatch.setattr("scvi_ext.engine.map_cells.BLOCK_BYTES", 25_000)
    monkeypatch.setitem(engine._VALIDATION_CELLS, "cpu", 25)
    # The library of HDF5 keeps the last megabytes that it has read, which is all of a file as small as these.
    plain = h5py.File.__init__
    monkeypatch.setattr(h5py.File, "__init__", lambda *given, **options: plain(*given, rdcc_nbytes=0, **options))
    yield
    sx.settings.memory_limit = before


@pytest.fixture
def sources(monkeypatch) -> list:
    """Where the cells of each fit came from."""
    found, plain = [], engine.cells_of_run

    def noted(*arguments):
        found.append(plain(*arguments))
        return found[-1]

    monkeypatch.setattr(engine, "cells_of_run", noted)
    return found


@pytest.fixture
def cells(make_counts) -> ad.AnnData:
    """300 cells with a label for two of three, and proteins."""
    adata = make_counts(N)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    adata.obs["known"] = adata.obs["cell_type"].where(np.arange(N) % 3 > 0, "?")
    proteins = np.random.default_rng(0).poisson(6.0, (N, 4)).astype(np.float32)
    adata.obsm["protein"] = pd.DataFrame(proteins, index=adata.obs_names, columns=[f"p{i}" for i in range(4)])
    return adata


@pytest.fixture(params=["h5ad", "zarr"])
def file(request, cells, tmp_path) -> Path:
    """The cells in a file: sparse, or dense in chunks that are no blocks."""
    path = tmp_path / f"cells.{request.param}"
    if request.param == "h5ad":
        cells.write_h5ad(path)
    else:
        cells.X = cells.X.toarray()
        cells.write_zarr(path, chunks=(37, 60))
    return path


@pytest.fixture
def h5ad(cells, tmp_path) -> Path:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def opened(path: Path, limit: float | None, model: str = "scvi", **options) -> ad.AnnData:
    """The file, set up for a model, with its counts on disk or in memory."""
    sx.settings.memory_limit = limit
    adata = sx.io.read_backed(str(path))
    extra = {"scanvi": {"unlabeled_category": "?"}, "totalvi": {"protein_obsm_key": "protein"}}.get(model, {})
    if model in ("scanvi", "classifier", "vaec"):
        extra["labels_key"] = "known" if model == "scanvi" else "cell_type"
    covariates = {"categorical_covariate_keys": ["sex"], "continuous_covariate_keys": ["age"]}
    sx.pp.setup_anndata(adata, batch_key="batch", **covariates | extra | options)
    return adata


def fit(path: Path, limit: float | None, model: str = "scvi", **options) -> ad.AnnData:
    adata = opened(path, limit, model)
    if "init_from" in options:
        sx.tl.fit(adata, key_added="base", **OF_SCVI)
        options = {"max_epochs": 3, "batch_size": 30, "train_size": 0.6} | options
    else:
        options = RUN | options
    sx.tl.fit(adata, model, **options)
    return adata


_UNINTERRUPTED: dict[str, ad.AnnData] = {}


def uninterrupted(path: Path, kind: str) -> ad.AnnData:
    """A fit of scVI from disk; files of the same kind have the same cells."""
    if kind not in _UNINTERRUPTED:
        _UNINTERRUPTED[kind] = fit(path, DISK)
    return _UNINTERRUPTED[kind]


def assert_same_fit(one: ad.AnnData, other: ad.AnnData, key: str = "scvi") -> None:
    """Bit for bit."""
    a, b = (adata.uns["scvi_ext"]["fits"][key] for adata in (one, other))
    assert a["state"].keys() == b["state"].keys()
    for name in a["state"]:
        np.testing.assert_array_equal(a["state"][name], b["state"][name], err_msg=name)
    histories = [sx.get.history(adata, key).drop(columns="cells_per_second") for adata in (one, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    statuses = [{k: v for k, v in f["status"].items() if k not in ("versions", "device")} for f in (a, b)]
    assert statuses[0] == statuses[1]
    assert "checkpoint" not in a
    assert "checkpoint" not in b


# ---- from disk is from memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_from_disk_is_in_memory_in_the_same_order(file, case, sources):
    model, options = case
    on_disk = fit(file, DISK, model, **options)
    assert all(isinstance(source, Streamed) for source in sources)
    sources.clear()
    in_memory = fit(file, MEMORY, model, **options)
    assert all(isinstance(source, Resident) for source in sources)
    assert_same_fit(on_disk, in_memory, model)
    saved = on_disk.uns["scvi_ext"]["fits"][model]
    assert saved["run"]["blocks"]["n_blocks"] >= 5
    if "early_stopping" in options:
        assert saved["status"]["stop_reason"] == "early stopping"
        assert saved["status"]["epochs"] < 8


@pytest.mark.parametrize("limit", [DISK, MEMORY])
def test_where_all_cells_are_one_block_a_file_gives_the_fit_of_memory(cells, file, limit, monkeypatch, sources):
    monkeypatch.setattr("scvi_ext.data.store.BLOCK_BYTES", 2**28)
    backed = fit(file, limit)
    sx.pp.setup_anndata(cells, batch_key="batch", categorical_covariate_keys=["sex"], continuous_covariate_keys=["age"])
    sx.tl.fit(cells, **RUN)
    assert [type(source) for source in sources] == [Streamed if limit == DISK else Resident, Resident]
    assert "blocks" not in backed.uns["scvi_ext"]["fits"]["scvi"]["run"]
    assert_same_fit(backed, cells)


def test_the_limit_does_not_change_a_fit(h5ad, sources):
    whole = fit(h5ad, np.inf)
    for limit in (1e-5, 1e-9, 1000):
        assert_same_fit(fit(h5ad, limit), whole)
    assert [type(source) for source in sources] == [Resident, Streamed, Streamed, Resident]


def test_where_counts_are_is_logged(h5ad, logged):
    fit(h5ad, DISK, max_epochs=1)
    assert "stay on disk and are read in blocks: more than the 0 MB of memory that they may take" in logged()
    fit(h5ad, MEMORY, max_epochs=1)
    assert "in host memory, read from disk: within the " in logged()


# ---- interrupted ---------------------------------------------------------------------------------------------------


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(7, action)`` calls ``action()`` in the 7th training step from now on."""
    plain = TrainingStep.__call__

    def at_step(n, action):
        count = 0

        def step(self):
            nonlocal count
            count += 1
            if count == n:
                action()
            plain(self)

        monkeypatch.setattr(TrainingStep, "__call__", step)

    yield at_step
    monkeypatch.setattr(TrainingStep, "__call__", plain)


@pytest.fixture
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", [1, 9, 12, 18])
@pytest.mark.parametrize("then", [DISK, MEMORY], ids=["on disk", "in memory"])
def test_interrupted_and_resumed_is_uninterrupted(h5ad, at_step, ctrl_c, step, then):
    expected = uninterrupted(h5ad, "plain")
    adata = opened(h5ad, DISK)
    at_step(step, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(adata, **RUN)
    saved = adata.uns["scvi_ext"]["fits"]["scvi"]
    assert saved["status"]["steps"] == step
    at_step(0, None)
    if step < 18:
        assert saved["status"]["stop_reason"] == "interrupted"
        sx.settings.memory_limit = then
        sx.tl.fit(adata, resume=True)
    assert_same_fit(adata, expected)


def test_begun_in_memory_and_resumed_on_disk(file, at_step, ctrl_c, sources):
    expected = fit(file, MEMORY, early_stopping=5)
    adata = opened(file, MEMORY)
    at_step(8, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(adata, **RUN, early_stopping=5)
    at_step(0, None)
    sx.settings.memory_limit = DISK
    sx.tl.fit(adata, resume="auto", early_stopping=5, **RUN)
    assert isinstance(sources[-1], Streamed)
    assert_same_fit(adata, expected)


# ---- cells that cannot be modelled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [7, 154])
def test_the_guard_finds_the_same_cells(h5ad, cell):
    with h5py.File(h5ad, "r+") as file:
        place = file["X/indptr"][cell]
        file["X/data"][place] = np.inf
        gene = f"gene{file['X/indices'][place]}"
    fits = []
    for limit in (DISK, MEMORY):
        with pytest.warns(sx.ScviExtWarning, match="are infinite"):
            adata = opened(h5ad, limit, check="warn")
        with pytest.warns(sx.ScviExtWarning, match=rf"left out cells without a finite loss: 'cell{cell}'"):
            sx.tl.fit(adata, **RUN)
        status = adata.uns["scvi_ext"]["fits"]["scvi"]["status"]
        assert status["non_finite_cells"] == [f"cell{cell}"]
        assert status["non_finite_genes"] == [gene]
        assert status["epochs"] == 3
        fits.append(adata)
    assert_same_fit(*fits)


# ---- damaged files -------------------------------------------------------------------------------------------------


def compressed(cells: ad.AnnData, path: Path) -> None:
    """An h5ad with compressed chunks, some of each block: what disks lose is noticed when they are unpacked."""
    cells.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for name in ("data", "indices"):
            values = file[f"X/{name}"][:]
            del file[f"X/{name}"]
            file.create_dataset(f"X/{name}", data=values, chunks=(500,), compression="gzip")


def overwrite_a_chunk(path: Path) -> None:
    with h5py.File(path, "r") as file:
        chunk = file["X/data"].id.get_chunk_info(12)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)


def change_values(path: Path) -> None:
    """Of a cell that is trained on, and of one that is held out."""
    train, held_out = split_cells(N, RUN["train_size"], None, 0)
    with h5py.File(path, "r") as file:
        data, places = file["X/data"], file["X/indptr"][:][[train[90], held_out[60]]]
        chunks = [data.id.get_chunk_info(place // data.chunks[0]).byte_offset for place in places]
        places = [chunk + 4 * (place % data.chunks[0]) for chunk, place in zip(chunks, places, strict=True)]
    with path.open("r+b") as raw:
        for place in places:
            raw.seek(place)
            raw.write(np.float32(77).tobytes())


def truncate(path: Path) -> None:
    with path.open("r+b") as raw:
        raw.truncate(path.stat().st_size // 2)


def lose_a_chunk(path: Path) -> None:
    (path / "X/2.0").unlink()


def truncate_a_chunk(path: Path) -> None:
    truncate(path / "X/2.0")


# What happens to a file, how it is written, and what is said of it.
DAMAGE = {
    "a chunk is overwritten": ("compressed", overwrite_a_chunk, "cannot be used: "),
    "values are others": ("plain", change_values, "not what they were when they were first read"),
    "a chunk is gone": ("zarr", lose_a_chunk, "not what they were when they were first read"),
    "a chunk is cut off": ("zarr", truncate_a_chunk, "cannot be used: "),
}


@pytest.fixture(params=DAMAGE.values(), ids=DAMAGE.keys())
def damage(request, cells, tmp_path):
    """A file and its kind, a function that damages it, one that repairs it, and the message that follows."""
    kind, harm, message = request.param
    path = tmp_path / ("cells.zarr" if kind == "zarr" else "cells.h5ad")
    if kind == "zarr":
        cells.X = cells.X.toarray()
        cells.write_zarr(path, chunks=(37, 60))
    elif kind == "compressed":
        compressed(cells, path)
    else:
        cells.write_h5ad(path)
    kept = tmp_path / "kept"
    copy = shutil.copytree if path.is_dir() else shutil.copyfile
    copy(path, kept)

    def repair():
        for part in [kept, *kept.rglob("*")] if kept.is_dir() else [kept]:
            if part.is_file():  # in place, for the file is open
                (path / part.relative_to(kept) if kept.is_dir() else path).write_bytes(part.read_bytes())

    return (path, kind), lambda: harm(path), repair, rf"Rows [\d,]+ to [\d,]+ of .*{path.name}, X.*{message}"


def test_damage_while_training_keeps_what_was_trained(damage, at_step):
    (path, kind), harm, repair, message = damage
    expected = uninterrupted(path, kind)
    adata = opened(path, DISK)
    at_step(8, harm)
    with pytest.raises(UnreadableRowsError, match=message) as caught:
        sx.tl.fit(adata, **RUN)
    at_step(0, None)
    saved = adata.uns["scvi_ext"]["fits"]["scvi"]
    assert saved["status"]["stop_reason"] == "interrupted"
    assert 8 <= saved["status"]["steps"] < 18
    (note,) = caught.value.__notes__
    assert f"What was trained until step {saved['status']['steps']} is kept as 'scvi'" in note
    assert "resume=True" in note
    with pytest.raises((OSError, ValueError), match=r"Rows [\d,]+ to|trained on other data"):
        sx.tl.fit(adata, resume=True)  # the damage is still there
    assert adata.uns["scvi_ext"]["fits"]["scvi"] is saved
    repair()
    sx.tl.fit(adata, resume=True)
    assert_same_fit(adata, expected)


@pytest.mark.parametrize("damage", [d for d in DAMAGE.values() if "first read" not in d[2]], indirect=True)
def test_damage_before_the_first_step_writes_nothing(damage):
    (path, kind), harm, repair, message = damage
    adata = opened(path, DISK)
    harm()
    with pytest.raises(UnreadableRowsError, match=message):
        sx.tl.fit(adata, **RUN)
    assert "fits" not in adata.uns["scvi_ext"]
    repair()
    sx.tl.fit(adata, **RUN)
    assert_same_fit(adata, uninterrupted(path, kind))


def test_damage_while_held_out_cells_are_looked_at(damage, at_step):
    (path, kind), harm, repair, message = damage
    expected = uninterrupted(path, kind)
    adata = opened(path, DISK)
    at_step(12, harm)  # the last one of an epoch
    with pytest.raises(UnreadableRowsError, match=message):
        sx.tl.fit(adata, **RUN)
    at_step(0, None)
    assert adata.uns["scvi_ext"]["fits"]["scvi"]["status"]["steps"] == 12
    assert len(sx.get.history(adata)) == 1  # the second epoch is not over before they are
    repair()
    sx.tl.fit(adata, resume=True)
    assert_same_fit(adata, expected)


def test_damage_while_the_guard_looks_for_the_culprit(h5ad, monkeypatch):
    """The loss is not finite once, and then the file cannot be read: the epoch before is what remains."""
    adata = opened(h5ad, DISK)
    kept = h5ad.read_bytes()
    plain, count = VAE.loss, 0

    def loss(module, *cells, **options):
        nonlocal count
        training = isinstance(options.get("kl_weight"), torch.Tensor)
        count += training
        result = plain(module, *cells, **options)
        return result._replace(total=result.total * torch.nan) if training and count == 8 else result

    guarded, before = engine.find_culprits, {}

    def damaged(step, source, cells, epoch, origin):
        change_values(h5ad)
        before.update(module_arrays(step.module))
        load_module(step.module, origin)  # as it is where the guard looks a second time
        return guarded(step, source, cells, epoch, origin)

    monkeypatch.setattr(VAE, "loss", loss)
    monkeypatch.setattr(VAE, "loss_at_once", lambda module, n_cells: None)
    monkeypatch.setattr(engine, "find_culprits", damaged)
    with pytest.raises(UnreadableRowsError, match=r"Rows \d+ to \d+ of .*cells\.h5ad, X cannot be used"):
        sx.tl.fit(adata, **RUN)
    monkeypatch.setattr(VAE, "loss", plain)
    saved = adata.uns["scvi_ext"]["fits"]["scvi"]
    assert saved["status"]["steps"] == 6
    assert saved["status"]["stop_reason"] == "interrupted"
    for name, values in before.items():
        np.testing.assert_array_equal(saved["state"][name], values, err_msg=name)
    first = sx.get.history(adata)
    h5ad.write_bytes(kept)
    sx.tl.fit(adata, resume=True)
    assert sx.get.fits(adata).loc["scvi", "stop_reason"] == "finished"
    pd.testing.assert_frame_equal(sx.get.history(adata)[:1], first)


@pytest.mark.parametrize("early", [{}, {"early_stopping": 1, "lr": 0.3, "max_epochs": 12}], ids=["to the end", "early"])
def test_damage_after_the_last_step_keeps_what_was_trained(h5ad, monkeypatch, early):
    """Held-out labels calibrate a classifier when all is trained: what was trained must not be lost for that."""
    options = RUN | early
    expected = fit(h5ad, DISK, "scanvi", **options)
    reason = sx.get.fits(expected).loc["scanvi", "stop_reason"]
    assert reason == ("early stopping" if early else "finished")
    adata = opened(h5ad, DISK, "scanvi")
    plain = _train.map_cells

    def damaged(*arguments, **keywords):
        raise UnreadableRowsError("Rows 3 to 4 of cells.h5ad, X cannot be used.")

    monkeypatch.setattr(_train, "map_cells", damaged)
    with pytest.raises(UnreadableRowsError, match="Rows 3 to 4"):
        sx.tl.fit(adata, "scanvi", **options)
    monkeypatch.setattr(_train, "map_cells", plain)
    saved = adata.uns["scvi_ext"]["fits"]["scanvi"]
    assert saved["status"]["stop_reason"] == "interrupted"
    sx.tl.fit(adata, "scanvi", resume=True)
    assert_same_fit(adata, expected, "scanvi")


def test_a_damaged_file_that_is_read_at_once_is_named_too(cells, tmp_path):
    path = tmp_path / "cells.h5ad"
    compressed(cells, path)
    adata = opened(path, MEMORY)
    overwrite_a_chunk(path)
    starts = cells.X.indptr  # of 500 entries in a chunk, the one with those from 6000 on is lost
    first, last = np.searchsorted(starts, 6000, "right") - 1, np.searchsorted(starts, 6500) - 1
    with pytest.raises(UnreadableRowsError, match=rf"Rows {first} to {last} of .*cells\.h5ad, X cannot be used: "):
        sx.tl.fit(adata, **RUN)
    assert "fits" not in adata.uns["scvi_ext"]
    with pytest.raises(UnreadableRowsError, match=rf"Rows {first} to {last} of .*cells\.h5ad, X"):
        opened(path, MEMORY)


# ---- read-outs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def both(file) -> tuple[ad.AnnData, ad.AnnData]:
    """One fit, in an AnnData whose counts stay on disk and in one that is in memory."""
    on_disk = fit(file, DISK)
    in_memory = on_disk.to_memory()
    in_memory.X = sp.csr_matrix(in_memory.X)
    return on_disk, in_memory


UNSORTED = np.r_[250, 3, 299, 77:60:-2, 0]


@pytest.mark.parametrize("indices", [None, UNSORTED], ids=["all cells", "unsorted cells"])
def test_read_outs_are_those_of_memory(both, indices):
    # Minibatches end elsewhere, so that products of matrices are rounded in another order: FLOAT32.
    for name, options, slot in (
        ("get_latent", {}, ("obsm", "X_scvi")),
        ("get_latent", {"give_mean": False, "key_added": "drawn"}, ("obsm", "drawn")),
        ("get_elbo", {"return_mean": False}, ("obs", "scvi_elbo")),
        ("get_normalized_expression", {"gene_list": ["gene7", "gene1"]}, ("obsm", "scvi_normalized")),
    ):
        found = []
        for adata in both:
            getattr(sx.tl, name)(adata, indices=indices, **options)
            found.append(np.asarray(getattr(adata, slot[0])[slot[1]], dtype=np.float64))
        np.testing.assert_allclose(*found, **FLOAT32, err_msg=name)
        written = np.isfinite(found[0].reshape(N, -1)).all(1)
        assert np.array_equal(written, np.ones(N, bool) if indices is None else np.isin(np.arange(N), indices))
    samples = [
        sx.tl.get_normalized_expression(adata, indices=indices, n_samples=2, return_mean=False) for adata in both
    ]
    np.testing.assert_allclose(*samples, **FLOAT32)
    if indices is not None:  # rows as asked for
        one = sx.tl.get_normalized_expression(both[0], indices=UNSORTED[::-1], return_mean=False)
        assert one.shape == (1, len(UNSORTED), 60)
        means = [sx.tl.get_latent(adata, indices=indices, copy=True, key_added="z") for adata in both[1:]]
        np.testing.assert_allclose(means[0].obsm["z"][UNSORTED], both[0].obsm["X_scvi"][UNSORTED], **FLOAT32)


def test_genes_that_differ_are_those_of_memory(both):
    tables = []
    for adata in both:
        sx.tl.differential_expression(adata, "cell_type", n_samples=200)
        tables.append(sx.get.de_df(adata))
    assert len(tables[0]) == 3 * 60
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-3)  # counts of pairs of draws, of which some are ties


def test_a_query_on_disk_is_mapped_as_in_memory(cells, tmp_path):
    new = (cells.obs["batch"] == "b2").to_numpy()
    reference = cells[~new].copy()
    sx.pp.setup_anndata(reference, batch_key="batch")
    sx.tl.fit(reference, **OF_SCVI)
    cells[new].copy().write_h5ad(tmp_path / "query.h5ad")
    found = []
    for limit in (DISK, MEMORY):
        sx.settings.memory_limit = limit
        query = ad.read_h5ad(tmp_path / "query.h5ad", backed="r")
        sx.tl.map_query(query, reference, max_epochs=2)
        sx.tl.get_latent(query)
        found.append(query)
    assert_same_fit(*found)
    np.testing.assert_allclose(found[0].obsm["X_scvi"], found[1].obsm["X_scvi"], **FLOAT32)
