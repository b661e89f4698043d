"""A run that is kept in a file while it is under way, and goes on when its process has come to an end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

import scvi_ext as sx
from scvi_ext import files
from scvi_ext.data import store
from scvi_ext.data.matrix import UnreadableRowsError
from scvi_ext.engine.step import TrainingStep
from scvi_ext.tl import _checkpoint
from scvi_ext.tl._checkpoint import CheckpointFile

if TYPE_CHECKING:
    from pathlib import Path

RUN = {"max_epochs": 4, "batch_size": 60, "n_hidden": 8, "n_latent": 2}  # 181 cells: 4 steps in an epoch, 16 in all


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch):
    """Written at the end of each epoch, and not once a minute."""
    monkeypatch.setattr(_checkpoint, "_EVERY", 0)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.checkpoint"


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(7, action)`` calls ``action()`` in the 7th training step from now on; 0 calls it in none."""
    plain = TrainingStep.__call__

    def at_step(n, action=None):
        count = 0

        def step(self):
            nonlocal count
            count += 1
            if count == n:
                action()
            plain(self)

        monkeypatch.setattr(TrainingStep, "__call__", step)

    return at_step


@pytest.fixture
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


class Killed(BaseException):
    """What ends a run without a word, as near as an exception comes to it."""


def kill():
    raise Killed


@pytest.fixture
def fresh(make_counts):
    """The cells anew, as another process would read them."""

    def fresh(**options) -> ad.AnnData:
        adata = make_counts()
        sx.pp.setup_anndata(adata, **{"batch_key": "batch"} | options)
        return adata

    return fresh


_UNINTERRUPTED: dict[str, ad.AnnData] = {}


@pytest.fixture
def uninterrupted(fresh):
    def uninterrupted(**options) -> ad.AnnData:
        if str(options) not in _UNINTERRUPTED:
            adata = fresh()
            sx.tl.fit(adata, **RUN | options)
            _UNINTERRUPTED[str(options)] = adata
        return _UNINTERRUPTED[str(options)]

    return uninterrupted


def assert_same_fit(one: ad.AnnData, other: ad.AnnData) -> None:
    """Bit for bit."""
    a, b = (adata.uns["scvi_ext"]["fits"]["scvi"] for adata in (one, other))
    assert a["state"].keys() == b["state"].keys()
    for name in a["state"]:
        np.testing.assert_array_equal(a["state"][name], b["state"][name], err_msg=name)
    histories = [sx.get.history(adata).drop(columns="cells_per_second") for adata in (one, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert a["status"] == b["status"]
    assert a["config"] == b["config"]
    assert a["run"] == b["run"]


def kept(path: Path):
    return CheckpointFile(path).read()


# ---- what is written, and when -------------------------------------------------------------------------------------


@pytest.fixture
def writings(monkeypatch) -> list:
    """Steps and reason to stop of all that is written."""
    found, plain = [], CheckpointFile.write

    def write(file, fitted):
        plain(file, fitted)
        again = kept(file.path)
        for name, values in fitted.state.items():
            np.testing.assert_array_equal(again.state[name], values, err_msg=name)
        found.append((again.status["steps"], again.status["stop_reason"], len(again.history)))

    monkeypatch.setattr(CheckpointFile, "write", write)
    return found


def test_it_is_written_when_an_epoch_ends_and_when_the_run_does(fresh, path, writings, uninterrupted):
    adata = fresh()
    sx.tl.fit(adata, checkpoint=path, **RUN)
    epochs = [(4 * epoch, "interrupted", epoch) for epoch in (1, 2, 3, 4)]
    assert writings == [*epochs, (16, "finished", 4)]
    assert_same_fit(adata, uninterrupted())
    assert not sx.get.fits(adata).loc["scvi", "resumable"]  # the file is, that was asked for
    assert kept(path).checkpoint is not None
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("every", "n"), [(60, 0), (1e-9, 4)])
def test_it_is_written_once_a_minute(fresh, path, writings, monkeypatch, every, n):
    monkeypatch.setattr(_checkpoint, "_EVERY", every)
    sx.tl.fit(fresh(), checkpoint=str(path), **RUN)
    assert len(writings) == n + 1


def test_the_minute_begins_with_the_last_writing(path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "_EVERY", 60)
    now = 1000.0
    monkeypatch.setattr(_checkpoint.time, "monotonic", lambda: now)
    file = CheckpointFile(path)
    assert not file.due
    now += 60
    assert file.due


def test_what_was_there_stays_until_the_new_one_is_complete(fresh, path, at_step, monkeypatch):
    """Whenever a machine fails, one of both is there, and whole."""
    at_step(11, kill)
    with pytest.raises(Killed):
        sx.tl.fit(fresh(), checkpoint=path, **RUN)
    at_step(0)
    fitted = kept(path)
    assert fitted.status["steps"] == 8
    before = path.read_bytes()

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            patch.setattr(type(path), "replace", fails) if name == "replace" else None
            with pytest.raises(OSError, match="No space left"):
                CheckpointFile(path).write(fitted)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_disk_that_is_full_does_not_end_the_run(fresh, path, monkeypatch, uninterrupted):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoint.os, "fsync", fails)
    adata = fresh()
    with pytest.warns(sx.ScviExtWarning, match=rf"{path.name}' could not be written .*No space left"):
        sx.tl.fit(adata, checkpoint=path, **RUN)
    assert_same_fit(adata, uninterrupted())
    assert not path.exists()


# ---- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, "auto"])
@pytest.mark.parametrize("options", [{}, {"early_stopping": 2}, {"library": "latent", "n_layers": 2}], ids=str)
def test_a_run_whose_process_has_gone_goes_on_from_the_file(fresh, path, at_step, uninterrupted, resume, options):
    at_step(11, kill)
    first = fresh()
    with pytest.raises(Killed):
        sx.tl.fit(first, checkpoint=path, **RUN | options)
    assert "fits" not in first.uns["scvi_ext"]
    at_step(0)
    adata = fresh()
    sx.tl.fit(adata, checkpoint=path, resume=resume, **({} if resume is True else RUN | options))
    assert_same_fit(adata, uninterrupted(**options))
    assert kept(path).status["stop_reason"] == "finished"


def test_a_run_that_had_stopped_early_does_not_go_on(fresh, path, monkeypatch):
    """Its process ended between the epoch that was one too many and the end of the run."""
    options = RUN | {"max_epochs": 20, "early_stopping": 1, "lr": 0.3}
    expected = fresh()
    sx.tl.fit(expected, **options)
    assert sx.get.fits(expected).loc["scvi", "stop_reason"] == "early stopping"
    n = len(sx.get.history(expected))
    plain, count = CheckpointFile.write, 0

    def write(file, fitted):
        nonlocal count
        plain(file, fitted)
        count += 1
        if count == n:
            raise Killed

    monkeypatch.setattr(CheckpointFile, "write", write)
    with pytest.raises(Killed):
        sx.tl.fit(fresh(), checkpoint=path, **options)
    monkeypatch.setattr(CheckpointFile, "write", plain)
    adata = fresh()
    sx.tl.fit(adata, checkpoint=path, resume=True)
    assert_same_fit(adata, expected)


def test_ctrl_c_keeps_the_run_in_the_file_too(fresh, path, at_step, ctrl_c, uninterrupted, logged):
    first = fresh()
    at_step(6, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(first, checkpoint=path, **RUN)
    at_step(0)
    assert (kept(path).status["steps"], kept(path).status["stop_reason"]) == (6, "interrupted")
    assert sx.get.fits(first).loc["scvi", "resumable"]
    assert f"kept as 'scvi' and in '{path}'" in logged()
    assert f"tl.fit(adata, 'scvi', key_added='scvi', checkpoint='{path}', resume=True)" in logged()
    adata = fresh()
    sx.tl.fit(adata, checkpoint=path, resume=True)  # as it says
    assert_same_fit(adata, uninterrupted())


def test_the_advice_holds_where_a_finished_fit_has_the_name(fresh, path, at_step, ctrl_c, uninterrupted, logged):
    adata = fresh()
    sx.tl.fit(adata, **RUN, seed=5)
    at_step(6, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(adata, checkpoint=path, **RUN)
    at_step(0)
    assert sx.get.fits(adata)["stop_reason"].to_dict() == {"scvi": "finished", "scvi_interrupted": "interrupted"}
    (advice,) = (line for line in logged().splitlines() if "Go on with" in line)
    eval(advice.partition("Go on with ")[2].removesuffix("."), {"tl": sx.tl, "adata": adata})
    assert_same_fit(adata, uninterrupted())


def test_auto_begins_where_nothing_is_there(fresh, path, uninterrupted):
    adata = fresh()
    sx.tl.fit(adata, checkpoint=path, resume="auto", **RUN)
    assert_same_fit(adata, uninterrupted())
    assert path.exists()


def test_auto_begins_anew_beside_a_finished_fit_of_other_options(fresh, uninterrupted):
    adata = fresh()
    sx.tl.fit(adata, **RUN | {"max_epochs": 1})
    sx.tl.fit(adata, resume="auto", **RUN)
    assert_same_fit(adata, uninterrupted())


@pytest.mark.parametrize("saved", ["h5ad", "zarr", None])
def test_auto_goes_on_inside_an_anndata(fresh, tmp_path, at_step, ctrl_c, uninterrupted, saved):
    adata = fresh()
    at_step(6, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(adata, **RUN)
    if saved == "h5ad":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad")
    elif saved == "zarr":
        adata.write_zarr(tmp_path / "a.zarr")
        adata = ad.read_zarr(tmp_path / "a.zarr")
    at_step(11, kill)  # 10 steps are left: it does not begin again
    sx.tl.fit(adata, resume="auto", **RUN)
    assert_same_fit(adata, uninterrupted())


@pytest.mark.parametrize("resume", ["auto", True])
def test_a_finished_run_is_taken_over_without_training(fresh, path, at_step, uninterrupted, logged, resume):
    sx.tl.fit(fresh(), checkpoint=path, **RUN)
    at_step(1, kill)
    adata = fresh()
    sx.tl.fit(adata, checkpoint=path, resume=resume, **({} if resume is True else RUN))
    assert_same_fit(adata, uninterrupted())
    assert not sx.get.fits(adata).loc["scvi", "resumable"]
    if resume == "auto":
        assert f"fit 'scvi' was finished already: taken from '{path}'" in logged()


@pytest.fixture
def begun(fresh, path, at_step):
    """A file with a run that stands at the end of its second epoch."""
    at_step(11, kill)
    with pytest.raises(Killed):
        sx.tl.fit(fresh(), checkpoint=path, **RUN)
    at_step(1, kill)  # nothing of what follows may train
    return path


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_epochs": 5}, r": 'max_epochs'\."),
        ({"n_latent": 3}, "'n_latent'"),
        ({"seed": 4, "train_size": 0.8}, "'seed', 'train_size'"),
        ({"early_stopping": True}, r": 'early_stopping'\."),
        ({"model": "ldvae", "key_added": "scvi"}, "."),
    ],
    ids=str,
)
def test_other_options_are_refused_by_name(fresh, begun, options, named):
    adata, before = fresh(), begun.read_bytes()
    with pytest.raises(ValueError, match=rf"The fit 'scvi' to go on with was given other options.*{named}"):
        sx.tl.fit(adata, checkpoint=begun, resume="auto", **RUN | options)
    assert "fits" not in adata.uns["scvi_ext"]
    assert begun.read_bytes() == before


def test_options_are_left_out_of_a_run_that_is_resumed(fresh, begun):
    with pytest.raises(ValueError, match="resume=True goes on with the options of the run it continues; leave out"):
        sx.tl.fit(fresh(), checkpoint=begun, resume=True, max_epochs=9)


@pytest.mark.parametrize("resume", ["auto", True])
@pytest.mark.parametrize("change", ["count", "order", "batches"])
def test_other_data_are_refused(fresh, begun, change, resume):
    adata = fresh()
    if change == "count":
        adata.X.data[7] += 1
    elif change == "order":
        adata = adata[::-1].copy()
    else:
        adata.obs["batch"] = adata.obs["batch"].to_numpy()[::-1]
    options = RUN if resume == "auto" else {}
    with pytest.raises(ValueError, match="other data: cells, counts or covariates"):
        sx.tl.fit(adata, checkpoint=begun, resume=resume, **options)
    assert "fits" not in adata.uns["scvi_ext"]


def test_another_setup_is_refused(fresh, begun):
    adata = fresh(batch_key=None)
    for options in ({"resume": True}, {"resume": "auto"} | RUN):
        with pytest.raises(ValueError, match=r"batch_key|other data|set up"):
            sx.tl.fit(adata, checkpoint=begun, **options)


def test_another_name_is_refused(fresh, begun):
    for options in ({"resume": True}, {"resume": "auto"} | RUN):
        with pytest.raises(ValueError, match=r"'scvi'.*'other'|'other'.*'scvi'"):
            sx.tl.fit(fresh(), key_added="other", checkpoint=begun, **options)


def test_without_resume_it_is_written_anew(fresh, begun, at_step, uninterrupted):
    at_step(0)
    adata = fresh()
    sx.tl.fit(adata, checkpoint=begun, **RUN)
    assert_same_fit(adata, uninterrupted())
    assert kept(begun).status["stop_reason"] == "finished"


def test_nothing_to_resume_is_said(fresh, path):
    with pytest.raises(KeyError, match="has no fits"):
        sx.tl.fit(fresh(), checkpoint=path, resume=True)


# ---- what is no checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut off", "overwritten", "empty", "text"])
@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_damaged_file_is_named(fresh, begun, damage, resume):
    content = begun.read_bytes()
    begun.write_bytes(
        {
            "cut off": content[: len(content) // 2],
            "overwritten": b"\xff" * 200 + content[200:],
            "empty": b"",
            "text": b"epoch 1, epoch 2",
        }[damage]
    )
    adata = fresh()
    with pytest.raises(ValueError, match=r"run\.checkpoint' cannot be read \(.*damaged, or no checkpoint\. Remove it"):
        sx.tl.fit(adata, checkpoint=begun, resume=resume, **({} if resume is True else RUN))
    assert "fits" not in adata.uns["scvi_ext"]


def test_a_file_of_somebody_else_is_named(fresh, path):
    save_file({"weight": np.ones(3, np.float32)}, path)
    with pytest.raises(ValueError, match="is not a checkpoint that this version of scvi_ext has written"):
        sx.tl.fit(fresh(), checkpoint=path, resume="auto", **RUN)


def test_a_folder_is_no_file(fresh, tmp_path):
    for name in (".", "nowhere/run"):
        with pytest.raises(ValueError, match=r"cannot be a file: give a name in a folder that exists"):
            sx.tl.fit(fresh(), checkpoint=tmp_path / name, **RUN)


def test_what_cannot_be_written_is_said_before_training(fresh, path, at_step, monkeypatch):
    at_step(1, kill)
    monkeypatch.setattr(_checkpoint.os, "access", lambda *arguments: False)  # the tests may run as root, who can all
    with pytest.raises(
        PermissionError, match=r"run\.checkpoint' cannot be written: the file or its folder is read-only"
    ):
        sx.tl.fit(fresh(), checkpoint=path, **RUN)


@pytest.mark.parametrize("value", [5, None, ["a"], b"run"])
def test_checkpoint_is_true_false_or_a_path(fresh, value):
    with pytest.raises(TypeError, match=r"checkpoint=.* is a .*; True, False or the path of a file is needed"):
        sx.tl.fit(fresh(), checkpoint=value, **RUN)


@pytest.mark.parametrize("value", ["yes", "Auto", None, 2])
def test_resume_is_true_false_or_auto(fresh, value):
    with pytest.raises(ValueError, match=r"resume=.*'auto'"):
        sx.tl.fit(fresh(), resume=value, **RUN)


def test_several_data_sets_have_no_file(make_counts, path):
    parts = {}
    for name in ("seq", "spatial"):
        parts[name] = make_counts(n_cells=60)
        sx.pp.setup_anndata(parts[name])
    with pytest.raises(ValueError, match=r"has no effect: a fit to several data sets is kept inside them only"):
        sx.tl.fit(parts, "gimvi", checkpoint=path, max_epochs=1)
    with pytest.raises(ValueError, match=r"resume='auto' is for one data set"):
        sx.tl.fit(parts, "gimvi", resume="auto", max_epochs=1)


def test_a_home_folder_may_be_written_as_a_tilde(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sx.tl.fit(fresh(), checkpoint="~/run", **RUN | {"max_epochs": 1})
    assert kept(tmp_path / "run").status["epochs"] == 1


# ---- real processes: both are given a real signal in the middle of an epoch ----------------------------------------

SCRIPT = """
    import signal, sys, time
    import anndata as ad, torch
    import scvi_ext as sx
    from scvi_ext.engine.step import TrainingStep
    from scvi_ext.tl import _checkpoint

    torch.set_num_threads(1)
    _checkpoint._EVERY = 0
    plain, steps = TrainingStep.__call__, []

    def step(self):
        steps.append(self)
        if len(steps) == 10:
            waiting = signal.getsignal(signal.SIGTERM)
            print("training", flush=True)
            while signal.getsignal(signal.SIGTERM) is waiting:  # the first one gives way to what was there before
                time.sleep(0.01)
        plain(self)

    TrainingStep.__call__ = step
    adata = ad.read_h5ad(sys.argv[1])
    sx.pp.setup_anndata(adata, batch_key="batch")
    sx.tl.fit(adata, checkpoint=sys.argv[2], max_epochs=4, batch_size=60, n_hidden=8, n_latent=2)
"""


def test_killed_and_terminated_processes_leave_a_file_to_go_on_from(fresh, counts, tmp_path, uninterrupted):
    counts.write_h5ad(tmp_path / "counts.h5ad")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    signals = {signal.SIGKILL: (-signal.SIGKILL, 8), signal.SIGTERM: (143, 10)}  # exit status, steps in the file
    running = {}
    try:
        for signum in signals:
            given = [str(tmp_path / "counts.h5ad"), str(tmp_path / signum.name)]
            running[signum] = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(SCRIPT), *given],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=tmp_path,
            )
        for signum, (status, steps) in signals.items():
            process, path = running[signum], tmp_path / signum.name
            assert process.stdout.readline() == "training\n", process.stderr.read()
            assert path.exists()  # since the end of the first epoch
            process.send_signal(signum)
            _, errors = process.communicate(timeout=120)
            assert process.returncode == status, errors
            assert kept(path).status["steps"] == steps
            if signum == signal.SIGTERM:
                assert f"interrupted at step 10; what was trained is kept as 'scvi' and in '{path}'" in errors
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["SIGKILL", "SIGTERM", "counts.h5ad"]
    for signum in signals:
        for options in ({"resume": True}, {"resume": "auto"} | RUN):
            copy = tmp_path / "copy"
            copy.write_bytes((tmp_path / signum.name).read_bytes())
            adata = fresh()
            sx.tl.fit(adata, checkpoint=copy, **options)
            assert_same_fit(adata, uninterrupted())


def test_what_a_process_has_left_half_written_is_not_taken_for_the_run(fresh, begun, at_step, uninterrupted):
    """Killed while it wrote: what it wrote lies beside the file, under a name of its own."""
    beside = begun.with_name(f".{begun.name}.12345")
    beside.write_bytes(begun.read_bytes()[:1000])
    at_step(0)
    adata = fresh()
    sx.tl.fit(adata, checkpoint=begun, resume=True)
    assert_same_fit(adata, uninterrupted())


def test_time_is_not_what_the_file_depends_on(fresh, path, monkeypatch, uninterrupted):
    """A clock that jumps neither ends a run nor changes it."""
    times = iter(np.random.default_rng(0).normal(0, 1e6, 10_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    monkeypatch.setattr(_checkpoint, "_EVERY", 60)
    adata = fresh()
    sx.tl.fit(adata, checkpoint=path, **RUN)
    assert_same_fit(adata, uninterrupted())


def test_nothing_but_a_checkpoint_is_overwritten(registered, tmp_path):
    path = tmp_path / "precious.h5ad"
    registered.write_h5ad(path)
    before = path.read_bytes()
    for target in (registered, path):
        with pytest.raises(ValueError, match=r"precious\.h5ad' exists and is no checkpoint: give another name"):
            sx.tl.fit(target, max_epochs=1, checkpoint=path)
    assert path.read_bytes() == before


def test_what_a_process_left_that_was_killed_while_it_wrote_is_taken_away(registered, tmp_path):
    (tmp_path / ".run.checkpoint.0").write_bytes(b"half of it")
    sx.tl.fit(registered, max_epochs=2, n_hidden=8, checkpoint=tmp_path / "run.checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["run.checkpoint"]


# ---- without being asked -------------------------------------------------------------------------------------------


@pytest.fixture
def in_file(counts, tmp_path):
    """``in_file(name)``: the path of the cells in a file, set up."""

    def in_file(name: str) -> Path:
        path = tmp_path / name
        counts.write_zarr(path) if path.suffix == ".zarr" else counts.write_h5ad(path)
        sx.pp.setup_anndata(path, batch_key="batch")
        return path

    return in_file


def fit_in(path: Path) -> ad.AnnData:
    return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_a_fit_by_path_is_kept_beside_its_file_until_it_is_inside(in_file, name, at_step, writings, uninterrupted):
    path = in_file(name)
    beside = path.with_name(f"{name}.scvi.checkpoint")
    at_step(7, kill)
    with pytest.raises(Killed):
        sx.tl.fit(path, **RUN)
    assert beside.exists()
    assert "fits" not in fit_in(path).uns["scvi_ext"]
    at_step(0)
    sx.tl.fit(path, resume="auto", **RUN)
    assert writings == [(4, "interrupted", 1), *((4 * n, "interrupted", n) for n in (2, 3, 4)), (16, "finished", 4)]
    assert_same_fit(fit_in(path), uninterrupted())
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_it_stays_until_the_fit_is_in_the_file(in_file, monkeypatch):
    """A process that is ended while the file is written to would else have lost the fit."""
    path, seen, plain = in_file("cells.h5ad"), [], files.write_changes

    def look(*arguments):
        seen.append(path.with_name("cells.h5ad.scvi.checkpoint").exists())
        plain(*arguments)

    monkeypatch.setattr(files, "write_changes", look)
    sx.tl.fit(path, **RUN)
    assert seen == [True]
    assert [entry.name for entry in path.parent.iterdir()] == ["cells.h5ad"]


def test_ctrl_c_leaves_a_fit_by_path_in_its_file_alone(in_file, at_step, ctrl_c, uninterrupted, logged):
    path = in_file("cells.h5ad")
    at_step(7, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(path, **RUN)
    assert f"kept as 'scvi'. Go on with tl.fit({str(path)!r}, 'scvi', key_added='scvi', resume=True)" in logged()
    assert [entry.name for entry in path.parent.iterdir()] == ["cells.h5ad"]
    sx.tl.fit(path, "scvi", key_added="scvi", resume=True)
    assert "goes on after step 7 of 16" in logged()
    assert_same_fit(fit_in(path), uninterrupted())


def test_a_file_that_is_damaged_under_a_fit_may_be_replaced_by_a_copy(in_file, at_step, uninterrupted, monkeypatch):
    """What was trained is in the damaged file, and beside it."""
    path, copy = in_file("cells.h5ad"), in_file("copy.h5ad")
    monkeypatch.setattr(sx.settings, "memory_limit", 0)
    monkeypatch.setattr(store, "BLOCK_BYTES", 10_000)

    def damage():
        with path.open("r+b") as raw:
            raw.truncate(path.stat().st_size // 3)

    sx.tl.fit(copy, key_added="whole", **RUN)
    sx.tl.fit(copy, **RUN)
    expected = fit_in(copy)
    in_file("copy.h5ad")
    at_step(7, damage)
    with pytest.raises(UnreadableRowsError, match=r"Rows \d+ to \d+ of .*cells\.h5ad, X cannot be used") as caught:
        sx.tl.fit(path, **RUN)
    at_step(0)
    go_on, rescued = caught.value.__notes__
    assert f"Go on with tl.fit({str(path)!r}, 'scvi', key_added='scvi', resume=True)" in go_on
    assert "cells.h5ad' could not be written to" in rescued
    copy.replace(path)
    sx.tl.fit(path, "scvi", key_added="scvi", resume=True)
    assert_same_fit(fit_in(path), expected)
    assert not path.with_name("cells.h5ad.scvi.checkpoint").exists()


def test_a_file_that_takes_the_place_of_the_one_that_was_read_is_left_as_it_is(in_file, at_step, counts, uninterrupted):
    path, other = in_file("cells.h5ad"), in_file("other.h5ad")
    at_step(7, lambda: path.rename(path.with_name("moved.h5ad")) and counts[::-1].copy().write_h5ad(path))
    with pytest.raises(
        OSError, match=r"other cells than when it was read.* give resume='auto': the fit is in its chec"
    ):
        sx.tl.fit(path, **RUN)
    at_step(0)
    assert "scvi_ext" not in fit_in(path).uns
    other.replace(path)
    sx.tl.fit(path, resume="auto", **RUN)
    assert_same_fit(fit_in(path), uninterrupted())


def test_a_finished_run_of_other_options_gives_way(fresh, path, uninterrupted):
    adata = fresh()
    sx.tl.fit(adata, checkpoint=path, **RUN | {"max_epochs": 2})
    sx.tl.fit(adata, checkpoint=path, resume="auto", **RUN)
    assert_same_fit(adata, uninterrupted())
    assert kept(path).status["epochs"] == 4


def test_a_run_that_can_go_on_does_not_give_way_unsaid(in_file, at_step, logged):
    path = in_file("cells.h5ad")
    at_step(7, kill)
    with pytest.raises(Killed):
        sx.tl.fit(path, **RUN)
    at_step(0)
    sx.tl.fit(path, **RUN)
    assert "cells.h5ad.scvi.checkpoint' is of a run that was interrupted at step 4, and is replaced" in logged()


@pytest.mark.parametrize("writable", [True, False])
def test_where_the_folder_is_read_only_there_is_none(in_file, writings, monkeypatch, writable):
    path, plain = in_file("cells.h5ad"), os.access
    monkeypatch.setattr(os, "access", lambda place, mode: plain(place, mode) and (writable or place != path.parent))
    sx.tl.fit(path, **RUN)
    assert bool(writings) == writable


def test_an_object_that_was_read_backed_has_none(in_file, writings):
    path = in_file("cells.h5ad")
    with sx.io.read_backed(path) as adata:
        sx.tl.fit(adata, **RUN)
    assert writings == []


def test_a_name_that_no_file_can_have_is_refused_as_a_name(in_file):
    path = in_file("cells.h5ad")
    with pytest.raises(ValueError, match="key_added='a/b' must be a name"):
        sx.tl.fit(path, key_added="a/b", **RUN)


def test_what_is_left_of_a_run_that_was_over_is_taken_away(in_file, monkeypatch, uninterrupted):
    """Its process ended when the fit was complete, and not yet in the file."""
    path, plain = in_file("cells.h5ad"), files.write_changes
    monkeypatch.setattr(files, "write_changes", lambda *arguments: kill())
    with pytest.raises(Killed):
        sx.tl.fit(path, **RUN)
    monkeypatch.setattr(files, "write_changes", plain)
    assert kept(path.with_name("cells.h5ad.scvi.checkpoint")).status["stop_reason"] == "finished"
    sx.tl.fit(path, resume="auto", **RUN)
    assert_same_fit(fit_in(path), uninterrupted())
    assert [entry.name for entry in path.parent.iterdir()] == ["cells.h5ad"]
