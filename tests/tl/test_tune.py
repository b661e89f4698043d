"""A search finds planted optima, leaves nothing but its result, and is shared by processes of which one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import optuna
import pandas as pd
import pytest
import scanpy as sc

import scvi_ext as sx
from scvi_ext.data.sampler import split_cells
from scvi_ext.tl import _search, _study

if TYPE_CHECKING:
    from pathlib import Path

fit_module, tune_module = (import_module(f"scvi_ext.tl.{name}") for name in ("_fit_into", "_tune"))

SMALL = {"max_epochs": 2, "n_hidden": 16, "progress": False}


@pytest.fixture
def adata(make_counts) -> ad.AnnData:
    adata = make_counts(90, 30)
    sx.pp.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    return adata


def distance_to_seven(adata: ad.AnnData) -> float:
    """A metric whose best value is known: of a latent space of 7 units."""
    return abs(adata.obsm["X_scvi"].shape[1] - 7)


# ---- what it finds -------------------------------------------------------------------------------------------------


def test_a_planted_optimum_is_found_and_fitted(adata):
    sx.tl.tune(adata, space={"n_latent": (2, 12)}, metric=distance_to_seven, direction="minimize", n_trials=25, **SMALL)
    trials, params = sx.get.tuning_df(adata), sx.get.tuning_params(adata)
    assert params["best_value"] == 0
    assert trials.loc[params["best_trial"], "n_latent"] == 7
    np.testing.assert_array_equal(trials["value"], abs(trials["n_latent"] - 7))
    sx.tl.get_latent(adata)
    assert adata.obsm["X_scvi"].shape == (90, 7)


@pytest.mark.parametrize("early_stopping", [False, 1])
def test_the_best_fit_comes_out_as_in_its_trial(adata, early_stopping):
    space = {"n_latent": (2, 12), "lr": (1e-3, 3e-2, "log"), "reconstruction_loss": ["zinb", "nb"]}
    fixed = SMALL | {"max_epochs": 4}
    sx.tl.tune(adata, space=space, n_trials=4, early_stopping=early_stopping, seed=3, **fixed)
    params = sx.get.tuning_params(adata)
    history = sx.get.history(adata)["elbo_validation"]
    assert params["best_value"] == (history.max() if early_stopping else history.iloc[-1])
    row = sx.get.tuning_df(adata).loc[params["best_trial"]]
    assert row["value"] == params["best_value"] == sx.get.tuning_df(adata)["value"].max()

    again = adata.copy()
    best = {name: row[name] for name in space}
    sx.tl.fit(again, key_added="by hand", early_stopping=early_stopping, seed=3, **fixed, **best)
    assert again.uns["scvi_ext"]["fits"]["by hand"]["history"]["elbo_validation"].equals(history)


def test_the_first_trial_is_the_fit_with_the_defaults(adata):
    sx.tl.fit(adata, key_added="default", max_epochs=3, progress=False)
    sx.tl.tune(adata, n_trials=2, max_epochs=3, progress=False)
    first = sx.get.tuning_df(adata).iloc[0]
    assert first["value"] == sx.get.history(adata, "default")["elbo_validation"].iloc[-1]
    assert (first["n_latent"], first["n_hidden"], first["reconstruction_loss"]) == (10, 128, "zinb")
    assert sx.get.tuning_params(adata)["best_value"] >= first["value"]
    # What is not within the search is proposed like all others.
    sx.tl.tune(adata, space={"n_latent": (20, 22), "n_layers": (1, 3)}, n_trials=1, **SMALL)
    first = sx.get.tuning_df(adata).iloc[0]
    assert first["n_layers"] == 1
    assert 20 <= first["n_latent"] <= 22


def test_marginal_ll_is_that_of_the_held_out_cells(adata):
    sx.tl.tune(adata, space={"n_latent": [2, 3]}, metric="marginal_ll", n_trials=2, train_size=0.8, **SMALL)
    held_out = split_cells(90, train_size=0.8, validation_size=None, seed=0)[1]
    value = sx.tl.get_marginal_ll(adata, indices=held_out, n_mc_samples=100, seed=0)
    assert value == pytest.approx(sx.get.tuning_params(adata)["best_value"], rel=1e-6)  # float32 weights


def test_a_metric_of_the_package_takes_the_latent_space_of_the_trial(adata):
    sx.tl.tune(adata, space={"n_latent": [2, 8]}, metric=sx.metrics.knn_purity, n_trials=2, key_added="k", **SMALL)
    sx.tl.get_latent(adata)
    assert sx.metrics.knn_purity(adata) == sx.get.tuning_params(adata)["best_value"]
    assert "progress" in adata.uns["k_tuning"]


def test_poor_trials_are_given_up_where_most_others_were_better(adata):
    """Where the best that a trial had so far is below the median of those that were carried out, there."""
    space = {"lr": (1e-5, 3e-2, "log")}
    sx.tl.tune(adata, space=space, n_trials=20, max_epochs=10, n_hidden=16, prune=True)
    trials, progress = sx.get.tuning_df(adata), sx.get.tuning_df(adata, table="progress")
    pruned = trials.index[trials["state"] == "pruned"]
    assert len(pruned) >= 3
    assert trials["state"][:5].eq("complete").all()
    assert trials.loc[pruned, "value"].isna().all()
    curves = progress.pivot(index="trial", columns="percent", values="elbo")
    for trial in pruned:
        reached = curves.loc[trial].dropna()
        assert reached.index[-1] >= 60
        complete = [i for i in trials.index[:trial] if trials["state"][i] == "complete"]
        assert reached.max() < curves.loc[complete, reached.index[-1]].median()
    sx.tl.tune(adata, space=space, n_trials=8, key_added="all", **SMALL)
    assert sx.get.tuning_df(adata)["state"].eq("complete").all()


def test_progress_is_told_in_percent_of_the_plan_whatever_the_number_of_epochs(adata):
    sx.tl.tune(adata, space={"max_epochs": [3, 20]}, n_trials=4, n_hidden=16)
    progress = sx.get.tuning_df(adata, table="progress")
    epochs = sx.get.tuning_df(adata)["max_epochs"]
    assert set(epochs) == {3, 20}
    for trial, rows in progress.groupby("trial"):
        expected = [30, 60, 100] if epochs[trial] == 3 else list(range(10, 101, 10))
        assert rows["percent"].tolist() == expected or sx.get.tuning_df(adata)["note"][trial]


def test_what_has_been_tried_is_not_tried_again(adata):
    calls = []
    metric = lambda adata: calls.append(1) or float(adata.obsm["X_scvi"].shape[1])  # noqa: E731
    sx.tl.tune(adata, space={"n_latent": [2, 3]}, metric=metric, n_trials=6, **SMALL)
    trials = sx.get.tuning_df(adata)
    assert len(calls) == trials["n_latent"].nunique() == 2
    assert trials["note"].str.startswith("as trial ").sum() == 4
    np.testing.assert_array_equal(trials["value"], trials["n_latent"])


def test_a_seed_gives_the_same_search_and_touches_no_generator(adata):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    tables = []
    for seed in (1, 1, 2):
        sx.tl.tune(adata, space={"lr": (1e-3, 1e-2)}, n_trials=3, refit=False, seed=seed, **SMALL)
        tables.append(sx.get.tuning_df(adata, "scvi").drop(columns="seconds"))
    assert tables[0].equals(tables[1])
    assert not tables[0]["lr"].equals(tables[2]["lr"])
    np.testing.assert_array_equal(np.random.get_state()[1], before)


# ---- what it leaves ------------------------------------------------------------------------------------------------


def test_trials_leave_nothing_behind(adata):
    sx.tl.fit(adata, key_added="before", **SMALL)
    before = adata.copy()
    sx.tl.tune(adata, space={"n_latent": [2, 3]}, metric=sx.metrics.knn_purity, n_trials=2, refit=False, **SMALL)
    assert set(adata.uns) - set(before.uns) == {"scvi_tuning"}
    assert list(adata.uns["scvi_ext"]["fits"]) == ["before"]
    assert adata.uns["scvi_ext"]["last_fit"] == "before"
    assert adata.obs.equals(before.obs)
    assert adata.var.equals(before.var)
    assert set(adata.obsm) == set(before.obsm)
    assert (adata.X != before.X).nnz == 0


@pytest.mark.parametrize("kind", ["copy", "view", "backed"])
def test_kinds_of_anndata(adata, tmp_path, kind):
    options = {"space": {"n_latent": [2, 3]}, "metric": sx.metrics.knn_purity, "n_trials": 2, **SMALL}
    if kind == "copy":
        result = sx.tl.tune(adata, copy=True, **options)
        assert "scvi_tuning" not in adata.uns
    elif kind == "view":
        result = adata[10:]
        sx.tl.tune(result, **options)
        assert "scvi_tuning" not in adata.uns
    else:
        adata.write_h5ad(tmp_path / "backed.h5ad")
        result = sc.read_h5ad(tmp_path / "backed.h5ad", backed="r")
        sx.tl.tune(result, **options)
        result.file.close()
    assert sx.get.tuning_df(result)["state"].tolist() == ["complete"] * 2
    assert sx.get.fits(result).index.tolist() == ["scvi"]


@pytest.mark.parametrize("file", ["tuned.h5ad", "tuned.zarr"])
def test_tables_travel(adata, tmp_path, file):
    space = {"n_latent": [2, 3], "log_variational": [True, False], "weight_decay": [0.0, 1e-4], "lr": [None, 0.01]}
    sx.tl.tune(adata, space=space, n_trials=3, **SMALL)
    if file.endswith("zarr"):
        adata.write_zarr(tmp_path / file)
        back = ad.read_zarr(tmp_path / file)
    else:
        adata.write_h5ad(tmp_path / file)
        back = ad.read_h5ad(tmp_path / file)
    for table in ("trials", "progress"):
        pd.testing.assert_frame_equal(sx.get.tuning_df(back, table=table), sx.get.tuning_df(adata, table=table))
    assert sx.get.tuning_params(back) == sx.get.tuning_params(adata)


def test_several_data_sets(make_counts):
    parts = {"rna": make_counts(60, 30), "spatial": make_counts(50, 30)[:, :12].copy()}
    for part in parts.values():
        sx.pp.setup_anndata(part)
    small = {"max_epochs": 2, "dim_hidden_encoder": 16, "progress": False}
    for metric in ("elbo", "marginal_ll", lambda parts: float(parts["rna"].obsm["X_gimvi"].shape[1])):
        sx.tl.tune(parts, "gimvi", space={"n_latent": [2, 4]}, metric=metric, n_trials=2, **small)
        for part in parts.values():
            assert sx.get.tuning_df(part).equals(sx.get.tuning_df(parts["rna"]))
    assert sx.get.tuning_params(parts["rna"])["best_value"] == 4
    sx.tl.get_latent(parts["spatial"])
    assert parts["spatial"].obsm["X_gimvi"].shape == (50, 4)


def test_a_mudata_keeps_the_search():
    mudata = pytest.importorskip("mudata")
    cite = sx.datasets.synthetic_cite()[:120].copy()
    protein = ad.AnnData(cite.obsm.pop("protein_expression"))
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData({"rna": cite, "prot": protein})
    sx.pp.setup_mudata(mdata, batch_key="batch")
    sx.tl.tune(mdata, "totalvi", space={"n_latent": [2, 3]}, n_trials=2, **SMALL)
    assert sx.get.tuning_df(mdata)["n_latent"].isin([2, 3]).all()


def test_a_model_without_a_likelihood_is_judged_by_a_function(adata):
    sx.tl.fit(adata, **SMALL)

    def accuracy(adata: ad.AnnData) -> float:
        sx.tl.classify(adata)
        return float((adata.obs["classifier_prediction"].astype(str) == adata.obs["cell_type"].astype(str)).mean())

    options = {"init_from": "scvi", "classifies": "z", "max_epochs": 3, "n_trials": 2, "progress": False}
    sx.tl.tune(adata, "classifier", space={"lr": [1e-3, 1e-2]}, metric=accuracy, **options)
    assert accuracy(adata) == sx.get.tuning_params(adata)["best_value"]
    with pytest.raises(ValueError, match="no likelihood of counts"):
        sx.tl.tune(adata, "classifier", space={"lr": [1e-3, 1e-2]}, **options)


# ---- trials that fail, and searches that are stopped ---------------------------------------------------------------


def test_impossible_combinations_are_told_and_passed_over(adata, monkeypatch):
    train = _search.train

    def diverges(start, *args, **kwargs):
        if start.fits[0].config["n_latent"] == 3:
            raise FloatingPointError("The loss is not finite.\nMore of it.")
        return train(start, *args, **kwargs)

    monkeypatch.setattr(_search, "train", diverges)
    sx.tl.tune(adata, space={"n_latent": (2, 5)}, n_trials=8, **SMALL)
    trials = sx.get.tuning_df(adata)
    failed = trials["n_latent"] == 3
    assert 0 < failed.sum() < 8
    assert (trials["state"][failed] == "failed").all()
    assert (trials["note"][failed] == "The loss is not finite.").all()
    assert trials["state"][~failed].isin(["complete", "pruned"]).all()
    with pytest.raises(ValueError, match=r"None of the trials could be carried out: 'The loss is not finite\.'"):
        sx.tl.tune(adata, space={"n_latent": [3]}, n_trials=2, key_added="none", **SMALL)
    assert "none_tuning" not in adata.uns


def test_a_metric_that_fails_at_once_is_an_error_and_later_a_failed_trial(adata):
    options = {"space": {"n_latent": (2, 12)}, "n_trials": 5, **SMALL}
    before = adata.copy()
    with pytest.raises(KeyError, match="no_such_column"):
        sx.tl.tune(adata, metric=lambda adata: adata.obs["no_such_column"].mean(), **options)
    with pytest.raises(TypeError, match="gave a dict; a number is needed"):
        sx.tl.tune(adata, metric=sx.metrics.clustering_scores, **options)
    with pytest.raises(ValueError, match="gave nan"):
        sx.tl.tune(adata, metric=lambda adata: np.nan, **options)
    assert set(adata.uns) == set(before.uns)

    calls = []
    sx.tl.tune(adata, metric=lambda adata: np.nan if calls.append(1) or len(calls) == 2 else 1.0, **options)
    assert sx.get.tuning_df(adata)["state"].tolist().count("failed") == 1


@pytest.mark.parametrize("where", ["training", "metric"])
def test_ctrl_c_keeps_the_trials_and_the_fit_that_was_there(adata, tmp_path, monkeypatch, where):
    sx.tl.fit(adata, **SMALL)
    kept = sx.get.history(adata)
    calls = []

    def third(*args) -> bool:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return False

    options = {"space": {"n_latent": (2, 12)}, "storage": tmp_path / "search.log", **SMALL}
    metric = distance_to_seven
    if where == "training":
        monkeypatch.setattr(_search.Rungs, "give_up", third)
    else:
        metric = lambda adata: third() or distance_to_seven(adata)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        sx.tl.tune(adata, metric=metric, n_trials=5, **options)
    # Training is given up, here after the first of two epochs of the second trial; a metric is computed to its end.
    so_far = ["complete", "interrupted"] if where == "training" else ["complete"] * 3
    assert sx.get.tuning_df(adata)["state"].tolist() == so_far
    assert sx.get.history(adata).equals(kept)

    sx.tl.tune(adata, metric=metric, n_trials=5, **options)  # the same call goes on
    left = 5 - so_far.count("complete")
    assert sx.get.tuning_df(adata)["state"].tolist() == so_far + ["complete"] * left
    assert not sx.get.history(adata).equals(kept)


def test_a_second_ctrl_c_ends_a_metric(adata):
    def twice(adata: ad.AnnData) -> float:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return 1.0

    calls = []
    metric = lambda adata: twice(adata) if calls.append(1) or len(calls) == 3 else 1.0  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        sx.tl.tune(adata, space={"n_latent": (2, 12)}, metric=metric, n_trials=5, **SMALL)
    assert sx.get.tuning_df(adata)["state"].tolist() == ["complete", "complete", "interrupted"]


@pytest.mark.parametrize("module", ["_study", "_search"])
def test_ctrl_c_between_trials_loses_none(adata, monkeypatch, module):
    """Whatever is under way then: the search looks whether it was pressed when it is safe to stop."""
    name = {"_study": "n_finished", "_search": "said"}[module]
    function, calls = getattr({"_study": _study, "_search": _search}[module], name), []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return function(*args)

    monkeypatch.setattr({"_study": _study, "_search": _search}[module], name, pressed)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.tune(adata, space={"n_latent": (2, 12)}, n_trials=9, **SMALL)
    assert 2 <= len(sx.get.tuning_df(adata)) <= 3


def test_an_interrupted_last_fit_is_kept_as_tl_fit_does(adata, monkeypatch):
    sx.tl.fit(adata, **SMALL)
    fit_into = tune_module.fit_into

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    def pressed(adata, start, *args, **kwargs):
        train = fit_module.train
        monkeypatch.setattr(fit_module, "train", lambda *a, **k: train(*a, after_epoch=lambda *row: interrupted(), **k))
        return fit_into(adata, start, *args, **kwargs)

    monkeypatch.setattr(tune_module, "fit_into", pressed)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.tune(adata, space={"n_latent": (2, 12)}, n_trials=2, **SMALL)
    assert sx.get.fits(adata).index.tolist() == ["scvi", "scvi_interrupted"]
    assert len(sx.get.tuning_df(adata)) == 2  # it is found, although the last fit has another name


def test_a_timeout_begins_no_further_trial(adata):
    sx.tl.tune(adata, space={"n_latent": (2, 12)}, n_trials=1000, timeout=0.5, **SMALL)
    assert 1 <= len(sx.get.tuning_df(adata)) < 1000
    with pytest.raises(ValueError, match="No trial was complete after timeout=1e-09 seconds"):
        sx.tl.tune(adata, space={"n_latent": (2, 12)}, timeout=1e-9, **SMALL)


# ---- shared searches -----------------------------------------------------------------------------------------------


def near_seven(adata: ad.AnnData) -> float:
    return -distance_to_seven(adata)


# Of each of two processes. The first one waits in its first trial until it is killed.
WORKER = """
import sys, time
from pathlib import Path
import anndata as ad
import scvi_ext as sx

folder, name, storage = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
adata = ad.read_h5ad(folder / "cells.h5ad")

def near_seven(adata):
    (folder / f"{name}.began").touch()
    while name == "first":
        time.sleep(0.05)
    return -abs(adata.obsm["X_scvi"].shape[1] - 7)

space = {"n_latent": (2, 12)}
sx.tl.tune(adata, space=space, metric=near_seven, n_trials=6, storage=storage, max_epochs=1, n_hidden=16)
adata.write_h5ad(folder / f"{name}.h5ad")
"""
OPTIONS = {"space": {"n_latent": (2, 12)}, "metric": near_seven, "n_trials": 6, "max_epochs": 1, "n_hidden": 16}


def wait_for(file: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "the worker did not begin"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_two_processes_share_a_search_and_one_of_them_is_killed(adata, tmp_path, kind):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    storage = str(tmp_path / "search.log") if kind == "journal" else f"sqlite:///{tmp_path / 'search.db'}"

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", WORKER, str(tmp_path), name, storage]
        env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)

    first = start("first")
    second = None
    try:
        wait_for(tmp_path / "first.began", first)
        second = start("second")
        wait_for(tmp_path / "second.began", second)  # both are in it
        first.kill()
        assert second.wait(timeout=120) == 0, second.communicate()[1].decode()
    finally:
        first.kill()
        first.wait()
        for process in filter(None, (first, second)):
            process.stdout.close()
            process.stderr.close()
    assert not (tmp_path / "first.h5ad").exists()

    trials = sx.get.tuning_df(ad.read_h5ad(tmp_path / "second.h5ad"))
    assert trials["state"].value_counts().to_dict() == {"complete": 6, "running": 1}  # the one that was killed
    # A third one finds nothing left to do, and fits the best of all.
    sx.tl.tune(adata, **OPTIONS, storage=storage)
    mine = sx.get.tuning_df(adata)
    assert mine.drop(columns="seconds").equals(trials.drop(columns="seconds"))
    sx.tl.get_latent(adata)
    assert adata.obsm["X_scvi"].shape[1] == mine["n_latent"][sx.get.tuning_params(adata)["best_trial"]]


def test_proposals_follow_from_the_number_of_the_trial_not_from_the_process(adata, tmp_path):
    """Two processes with one seed do not try the same, as they would with a sampler each."""
    options = {"space": {"lr": (1e-3, 1e-2)}, "refit": False, **SMALL}
    sx.tl.tune(adata, n_trials=4, **options)
    at_once = sx.get.tuning_df(adata, "scvi")["lr"]
    for n in (1, 2, 3, 4):
        sx.tl.tune(adata, n_trials=n, storage=tmp_path / "search.log", **options)
    assert sx.get.tuning_df(adata, "scvi")["lr"].equals(at_once)
    assert at_once.is_unique


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"max_epochs": 3}, "options"),
        ({"seed": 1}, "seed"),
        ({"space": {"n_latent": [2, 4]}}, "space"),
        ({"metric": "marginal_ll"}, "metric"),
        ({"model": "ldvae"}, "model"),
    ],
)
def test_a_kept_search_about_something_else_is_refused(adata, tmp_path, change, what):
    options = {"model": "scvi", "space": {"n_latent": [2, 3]}, "n_trials": 1, "study_name": "s", **SMALL}
    options |= {"storage": tmp_path / "search.log", "refit": False}
    sx.tl.tune(adata, **options)
    with pytest.raises(ValueError, match=f"something else .*{what}.* give another study_name"):
        sx.tl.tune(adata, **options | change)
    sx.tl.tune(adata, **options | change | {"study_name": "another"})


def test_metrics_are_told_apart_by_their_arguments(adata, tmp_path):
    options = {"space": {"n_latent": [2, 4]}, "n_trials": 1, "storage": tmp_path / "search.log", **SMALL}
    sx.tl.tune(adata, metric=partial(sx.metrics.knn_purity, n_neighbors=5), **options)
    assert sx.get.tuning_params(adata)["metric"] == "knn_purity(n_neighbors=5)"
    sx.tl.tune(adata, metric=partial(sx.metrics.knn_purity, n_neighbors=5), **options)
    with pytest.raises(ValueError, match="about something else"):
        sx.tl.tune(adata, metric=partial(sx.metrics.knn_purity, n_neighbors=6), **options)
    options |= {"study_name": "lambda"}
    sx.tl.tune(adata, metric=lambda adata: adata.obsm["X_scvi"].std().item(), **options)
    sx.tl.tune(adata, metric=lambda adata: adata.obsm["X_scvi"].std().item(), **options)
    with pytest.raises(ValueError, match="about something else"):
        sx.tl.tune(adata, metric=lambda adata: adata.obsm["X_scvi"].mean().item(), **options)


def test_the_fit_that_is_started_from_makes_another_search(adata, tmp_path):
    options = {"init_from": "scvi", "n_trials": 1, "max_epochs": 1, "storage": tmp_path / "search.log"}
    for seed in (0, 1):
        sx.tl.fit(adata, seed=seed, **SMALL)
        if seed:
            with pytest.raises(ValueError, match=r"about something else .*starts from"):
                sx.tl.tune(adata, "scanvi", **options)
        else:
            sx.tl.tune(adata, "scanvi", **options)
    assert set(sx.get.tuning_df(adata, "scanvi")) == {"state", "value", "lr", "seconds", "note"}


def test_what_says_the_same_is_the_same_search(adata, tmp_path):
    options = {"space": {"n_latent": [2, 4]}, "storage": tmp_path / "search.log", "n_trials": 1}
    sx.tl.tune(adata, max_epochs=2, **options)
    sx.tl.tune(adata, max_epochs=np.int64(2), n_layers=1, device="cpu", **options)
    assert sx.get.tuning_params(adata)["options"] == "max_epochs=2"


def test_a_study_of_another_program_is_left_alone(adata, tmp_path):
    file = str(tmp_path / "theirs.log")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file))
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.create_study(storage=storage, study_name="scvi", direction="minimize")
    optuna.create_study(storage=storage, study_name="two", directions=["minimize", "maximize"])
    optuna.logging.set_verbosity(verbosity)
    for name in ("scvi", "two"):
        with pytest.raises(ValueError, match=r"not made by tl\.tune: give another study_name"):
            sx.tl.tune(adata, space={"n_latent": [2]}, n_trials=1, storage=file, study_name=name, **SMALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes\n", "a file of something else"),
        (b"my notes, in one line", "a file of something else"),
        (b'{"other": 1}\n', "a file of something else"),
        (b"\x89HDF\r\n\x1a\n\x00", "a file of something else"),
    ],
)
def test_files_of_something_else_stay_as_they_are(adata, tmp_path, content, message):
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sx.tl.tune(adata, space={"n_latent": [2]}, n_trials=1, storage=file, **SMALL)
    assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_places_that_cannot_be_used_are_named(adata, tmp_path):
    options = {"space": {"n_latent": [2]}, "n_trials": 1, **SMALL}
    with pytest.raises(OSError, match=f"storage='{tmp_path}' cannot be read and written"):
        sx.tl.tune(adata, storage=tmp_path, **options)
    with pytest.raises(ValueError, match="is no database that can be reached"):
        sx.tl.tune(adata, storage="nothing://me:secret@host/search", **options)
    with pytest.raises(OSError, match=r"search\.db' cannot be used"):
        sx.tl.tune(adata, storage=f"sqlite:///{tmp_path}/no/search.db", **options)
    assert "secret" not in _study._shown("postgresql://me:secret@host/search")


def test_half_a_line_that_a_lost_process_has_left_is_passed_over(adata, tmp_path):
    options = {"space": {"n_latent": (2, 12)}, "storage": tmp_path / "search.log", **SMALL}
    sx.tl.tune(adata, n_trials=2, **options)
    with (tmp_path / "search.log").open("ab") as file:
        file.write(b'{"op_code": 6, "worker_id": "lost')
    sx.tl.tune(adata, n_trials=4, **options)
    assert sx.get.tuning_df(adata)["state"].tolist() == ["complete"] * 4


def test_a_lock_that_a_lost_process_has_left_can_be_seen_to_be_old(adata, tmp_path, monkeypatch):
    """Optuna breaks it after a while; of a relative path it could not tell how old it is."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    locks = []
    lock = optuna.storages.journal.JournalFileSymlinkLock
    monkeypatch.setattr(
        optuna.storages.journal, "JournalFileSymlinkLock", lambda path: locks.append(path) or lock(path)
    )
    sx.tl.tune(adata, space={"n_latent": [2]}, n_trials=1, storage="folder/search.log", **SMALL)
    assert locks == [str(tmp_path / "folder" / "search.log")]


def test_processes_that_begin_together_share_a_new_database(tmp_path):
    """Each of them finds no tables yet and makes them."""
    barrier = threading.Barrier(4)
    place = f"sqlite:///{tmp_path}/search.db"

    def begin(_: int) -> int:
        barrier.wait()
        options = {"direction": "maximize", "prune": True, "seed": 0, "about": {"a": "b"}, "first": {"x": 3}}
        with _study.quiet():
            study = _study.open_study(place, "scvi", **options)
            return study.ask({"x": optuna.distributions.IntDistribution(0, 10**6)}).params["x"]

    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(begin, range(4)))
    assert values.count(3) == 1  # the first one has the defaults
    assert len(set(values)) == 4


def test_a_metric_that_is_repaired_still_begins_with_the_defaults(adata, tmp_path):
    def metric(adata: ad.AnnData) -> float:
        if len(mistakes) < 2:
            mistakes.append(1)
            raise NameError("a typo")
        return 1.0

    mistakes = []
    options = {"space": {"n_latent": (2, 40)}, "metric": metric, "storage": tmp_path / "search.log", **SMALL}
    for _ in range(2):
        with pytest.raises(NameError):
            sx.tl.tune(adata, n_trials=2, **options)
    sx.tl.tune(adata, n_trials=2, **options)
    trials = sx.get.tuning_df(adata)
    assert trials["state"].tolist() == ["interrupted", "interrupted", "complete", "complete"]
    assert trials["n_latent"].tolist()[:3] == [10, 10, 10]


def test_a_kept_search_of_other_cells_is_refused(adata, tmp_path):
    options = {"space": {"n_latent": [2, 3]}, "n_trials": 1, "storage": tmp_path / "search.log", **SMALL}
    sx.tl.tune(adata, **options)
    with pytest.raises(ValueError, match=r"about something else .*data"):
        sx.tl.tune(adata[5:].copy(), **options)


# ---- what is refused, before anything is done ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"space": {"n_latnet": [2]}}, TypeError, "no keyword 'n_latnet'. Did you mean 'n_latent'"),
        ({"space": {"n_latent": [2]}, "n_latnet": 2}, TypeError, "Did you mean 'n_latent'"),
        ({"space": {"seed": [1, 2]}}, ValueError, "'seed' cannot be searched"),
        ({"space": {"train_size": [0.5, 0.9]}}, ValueError, "not comparable"),
        ({"space": {}}, ValueError, "nothing to search"),
        ({"space": ["n_latent"]}, TypeError, "a mapping from options to values is needed"),
        ({"space": {"n_latent": 5}}, TypeError, "a list of values or a range"),
        ({"space": {"n_latent": "5"}}, TypeError, "a list of values or a range"),
        ({"space": {"n_latent": []}}, ValueError, "no value to choose"),
        ({"space": {"n_latent": (5, 2)}}, ValueError, "low must be less than high"),
        ({"space": {"n_latent": (1, 2, 3)}}, ValueError, "values to choose from are a list"),
        ({"space": {"lr": (0, 1, "log")}}, ValueError, "more than 0 on a log scale"),
        ({"space": {"n_latent": [[2], [3]]}}, TypeError, "holds a list"),
        ({"space": {"n_latent": [2, 0]}}, ValueError, r"space\['n_latent'\], value 0"),
        ({"space": {"n_latent": [2, "3"]}}, TypeError, r"space\['n_latent'\], value '3'"),
        ({"space": {"reconstruction_loss": ["zinb", "nbb"]}}, ValueError, "Did you mean 'nb'"),
        ({"space": {"reconstruction_loss": ["zinb", "normal"]}}, ValueError, "cannot be compared"),
        ({"space": {"library": ["observed", "latent"]}}, ValueError, "comparable by it"),
        ({"space": {"n_latent": [2]}, "n_latent": 3}, ValueError, "searched and fixed, to 3"),
        ({"space": {"n_latent": [2]}, "metric": "purity"}, ValueError, "metric='purity'"),
        ({"space": {"n_latent": [2]}, "direction": "up"}, ValueError, "direction='up'"),
        ({"space": {"n_latent": [2]}, "direction": "minimize"}, ValueError, "look for the worst fit"),
        ({"space": {"n_latent": [2]}, "metric": len, "prune": True}, ValueError, "says nothing of metric=len"),
        ({"space": {"n_latent": [2]}, "n_trials": 0}, ValueError, "n_trials=0"),
        ({"space": {"n_latent": [2]}, "timeout": 0}, ValueError, "timeout=0"),
        ({"space": {"n_latent": [2]}, "resume": True}, TypeError, "no keyword 'resume'"),
        ({"space": {"n_latent": [2]}, "train_size": 1.0}, ValueError, "there are none: choose a smaller train_size"),
        ({"space": {"n_latent": [2]}, "storage": 5}, TypeError, "storage=5"),
        ({"space": {"n_latent": [2]}, "storage": ""}, TypeError, "storage=''"),
        ({"space": {"n_latent": [2]}, "study_name": ""}, TypeError, "study_name=''"),
        ({"space": {"n_latent": [2]}, "prune": "no"}, TypeError, "prune='no'"),
        ({"space": {"n_latent": {3, 5}}}, TypeError, "is a set; a list of values"),
        ({"space": {"n_latent": [0, 2]}}, ValueError, r"space\['n_latent'\], value 0"),
        ({"space": {"n_latent": [2]}, "storage": "no/such/folder/s.log"}, FileNotFoundError, "no folder"),
        ({"space": {"n_latent": [2]}, "storage": "redis://localhost"}, ValueError, "pickles"),
        ({"space": {"n_latent": [2]}, "key_added": "a/b"}, ValueError, "key_added='a/b'"),
        ({"model": "gimvi"}, TypeError, "joins several data sets"),
        ({"space": {"n_latent": [2]}, "model": "svci"}, ValueError, "Did you mean 'scvi'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(adata, monkeypatch, options, error, message):
    monkeypatch.setattr(_search, "train", None)
    before = set(adata.uns)
    with pytest.raises(error, match=message):
        sx.tl.tune(adata, **{"progress": False, **options})
    assert set(adata.uns) == before


def test_without_optuna_the_extra_is_named(adata, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'scvi-ext\[tune\]'"):
        sx.tl.tune(adata)


def test_distributions_of_optuna_are_taken(adata):
    by_four = optuna.distributions.IntDistribution(4, 12, step=4)
    sx.tl.tune(adata, space={"n_latent": by_four}, n_trials=4, **SMALL)
    assert set(sx.get.tuning_df(adata)["n_latent"]) <= {4, 8, 12}
    assert sx.get.tuning_params(adata)["space"] == "n_latent: 4 to 12 by 4"


@pytest.mark.parametrize("model", ["scvi", "ldvae", "vaec", "scanvi", "autozi", "totalvi"])
def test_every_model_has_something_to_search_and_begins_with_its_defaults(model):
    adata = sx.datasets.synthetic_cite()[:80].copy()
    adata.obs["label"] = np.resize(["a", "b"], 80)
    sx.pp.setup_anndata(adata, batch_key="batch", labels_key="label", protein_obsm_key="protein_expression")
    sx.tl.tune(adata, model, n_trials=1, max_epochs=1, progress=False)
    searched = set(sx.get.tuning_df(adata)) - {"state", "value", "seconds", "note"}
    assert {"n_latent", "n_hidden", "n_layers", "lr"} <= searched
    sx.tl.fit(adata, model, key_added="default", max_epochs=1, progress=False)
    default = sx.get.history(adata, "default")["elbo_validation"].iloc[-1]
    assert sx.get.tuning_df(adata, model)["value"][0] == default


def test_a_search_that_is_not_there(adata):
    with pytest.raises(KeyError, match=r"call scvi_ext\.tl\.tune first"):
        sx.get.tuning_df(adata)
    sx.tl.tune(adata, space={"n_latent": [2]}, n_trials=1, key_added="mine", refit=False, **SMALL)
    assert len(sx.get.tuning_df(adata)) == len(sx.get.tuning_df(adata, "mine")) == 1  # the only one
    with pytest.raises(KeyError, match="no search for the fit 'scvi'; there are those called 'mine'"):
        sx.get.tuning_df(adata, "scvi")


def test_a_metric_may_do_with_its_cells_what_it_likes(adata):
    """Each trial gets a copy: neither the user's cells nor those of the next trial change."""
    adata.layers["counts"] = adata.X.copy()
    adata.obsm["X_mine"] = np.ones((90, 2))
    before, shapes = adata.copy(), []

    def metric(cells: ad.AnnData) -> float:
        shapes.append((cells.shape, "mark" in cells.obs))
        sc.pp.normalize_total(cells)
        sc.pp.log1p(cells)
        cells.layers["counts"].data[:] = 0
        cells.obsm["X_mine"] *= 0
        cells.obs["mark"] = 1
        cells._inplace_subset_obs(np.arange(20))
        return float(len(shapes))

    sx.tl.tune(adata, space={"n_latent": (2, 12)}, metric=metric, n_trials=3, refit=False, **SMALL)
    assert shapes == [((90, 30), False)] * 3
    assert (adata.X != before.X).nnz == 0
    assert (adata.layers["counts"] != before.layers["counts"]).nnz == 0
    np.testing.assert_array_equal(adata.obsm["X_mine"], 1)


def test_verbosity_and_loggers_are_left_as_they_were(adata):
    before = sc.settings.verbosity, optuna.logging.get_verbosity()
    sx.tl.tune(adata, space={"n_latent": [2]}, metric=sx.metrics.knn_purity, n_trials=1, **SMALL)
    assert (sc.settings.verbosity, optuna.logging.get_verbosity()) == before
