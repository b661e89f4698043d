"""A search finds planted optima, leaves nothing but its result, and is shared by processes of which one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import optuna
import pandas as pd
import pytest
import scanpy as sc

import scvi_ext as sx
from scvi_ext.data.sampler import split_cells
from scvi_ext.tl import _search

if TYPE_CHECKING:
    from pathlib import Path

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
    space = {"lr": (1e-5, 3e-2, "log")}
    sx.tl.tune(adata, space=space, n_trials=20, max_epochs=10, n_hidden=16)
    trials, progress = sx.get.tuning_df(adata), sx.get.tuning_df(adata, table="progress")
    pruned = trials.index[trials["state"] == "pruned"]
    assert len(pruned) >= 3
    assert trials["state"][:5].eq("complete").all()
    assert trials.loc[pruned, "value"].isna().all()
    curves = progress.pivot(index="trial", columns="percent", values="elbo")
    for trial in pruned:
        reached = curves.loc[trial].dropna()
        assert reached.index[-1] >= 30
        complete = [i for i in trials.index[:trial] if trials["state"][i] == "complete"]
        assert reached.max() < curves.loc[complete, reached.index[-1]].median()
    sx.tl.tune(adata, space=space, n_trials=8, prune=False, key_added="all", **SMALL)
    assert sx.get.tuning_df(adata)["state"].eq("complete").all()


def test_progress_is_told_in_percent_of_the_plan_whatever_the_number_of_epochs(adata):
    sx.tl.tune(adata, space={"max_epochs": [3, 20]}, n_trials=4, n_hidden=16, prune=False)
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
    with pytest.raises(ValueError, match=r"None of 2 trials could be carried out: 'The loss is not finite\.'"):
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

    options = {"space": {"n_latent": (2, 12)}, "storage": tmp_path / "search.log", **SMALL, "max_epochs": 1}
    metric = distance_to_seven
    if where == "training":
        monkeypatch.setattr(_search.Rungs, "give_up", third)
    else:
        metric = lambda adata: third() or distance_to_seven(adata)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        sx.tl.tune(adata, metric=metric, n_trials=5, **options)
    trials = sx.get.tuning_df(adata)
    assert trials["state"].tolist() == ["complete", "complete", "interrupted"]
    assert sx.get.history(adata).equals(kept)

    sx.tl.tune(adata, metric=metric, n_trials=5, **options)  # the same call goes on
    trials = sx.get.tuning_df(adata)
    assert trials["state"].tolist() == ["complete", "complete", "interrupted", "complete", "complete", "complete"]
    assert not sx.get.history(adata).equals(kept)


def test_a_timeout_begins_no_further_trial(adata):
    sx.tl.tune(adata, space={"n_latent": (2, 12)}, n_trials=1000, timeout=0.5, **SMALL)
    assert 1 <= len(sx.get.tuning_df(adata)) < 1000


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
def test_every_model_has_something_to_search(model):
    adata = sx.datasets.synthetic_cite()[:80].copy()
    adata.obs["label"] = np.resize(["a", "b"], 80)
    sx.pp.setup_anndata(adata, batch_key="batch", labels_key="label", protein_obsm_key="protein_expression")
    sx.tl.tune(adata, model, n_trials=1, max_epochs=1, progress=False)
    searched = set(sx.get.tuning_df(adata)) - {"state", "value", "seconds", "note"}
    assert {"n_latent", "n_hidden", "n_layers", "lr"} <= searched


def test_a_search_that_is_not_there(adata):
    with pytest.raises(KeyError, match=r"call scvi_ext\.tl\.tune first"):
        sx.get.tuning_df(adata)
    sx.tl.tune(adata, space={"n_latent": [2]}, n_trials=1, key_added="mine", refit=False, **SMALL)
    with pytest.raises(KeyError, match="there are searches called 'mine'"):
        sx.get.tuning_df(adata)
    assert len(sx.get.tuning_df(adata, "mine")) == 1


def test_verbosity_and_loggers_are_left_as_they_were(adata):
    before = sc.settings.verbosity, optuna.logging.get_verbosity()
    sx.tl.tune(adata, space={"n_latent": [2]}, metric=sx.metrics.knn_purity, n_trials=1, **SMALL)
    assert (sc.settings.verbosity, optuna.logging.get_verbosity()) == before
