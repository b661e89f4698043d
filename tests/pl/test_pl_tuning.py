"""The picture of a search shows what the table says."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import scvi_ext as sx


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def adata(make_counts):
    """A search as tl.tune writes it, with a trial of each kind."""
    adata = make_counts(10, 5)
    trials = pd.DataFrame(
        {
            "state": ["complete", "complete", "pruned", "failed", "complete", "complete"],
            "value": [-110.0, -105.0, np.nan, np.nan, -900.0, -100.0],
            "lr": [1e-4, 1e-3, 1e-2, 1e-1, 3e-4, 2e-3],
            "library": ["None", "b", "a", "a", "b", "a"],
            "n_latent": [2, 3, 4, 5, 6, 7],
            "seconds": 1.0,
            "note": ["", "", "", "no", "", ""],
        },
        index=pd.Index(range(6), name="trial"),
    )
    progress = pd.DataFrame({"trial": [2, 2, 3], "percent": [10, 20, 10], "elbo": [-130.0, -115.0, -1.0]})
    params = {"metric": "elbo", "direction": "maximize", "best_trial": 5, "best_value": -100.0}
    adata.uns["scvi_tuning"] = {"trials": trials, "progress": progress, "params": params}
    return adata


def points(ax, i: int) -> list[list[float]]:
    return ax.collections[i].get_offsets().tolist()


def test_trials_in_their_order(adata):
    ax = sx.pl.tuning(adata, show=False)
    assert points(ax, 0) == [[0, -110], [1, -105], [4, -900], [5, -100]]
    assert points(ax, 1) == [[2, -115]]  # where it was given up
    assert points(ax, 2) == [[5, -100]]  # the best
    assert ax.lines[0].get_ydata().tolist() == [-110, -105, -105, -100]
    assert ax.get_xlabel() == "trial"
    assert ax.get_ylabel() == "held-out ELBO per cell"
    low, high = ax.get_ylim()
    assert -900 < low < -115
    assert high > -100
    assert [text.get_text() for text in ax.texts] == ["1 below"]


def test_a_measure_that_should_be_low(adata):
    search = adata.uns["scvi_tuning"]
    search["trials"]["value"] *= -1
    search["progress"]["elbo"] *= -1
    search["params"] |= {"direction": "minimize", "metric": "mine"}
    ax = sx.pl.tuning(adata, show=False)
    assert ax.lines[0].get_ydata().tolist() == [110, 105, 105, 100]
    assert ax.get_ylabel() == "mine"
    assert ax.get_ylim()[0] < 100
    assert 115 < ax.get_ylim()[1] < 900
    assert [text.get_text() for text in ax.texts] == ["1 above"]


def test_trials_by_an_option(adata):
    ax = sx.pl.tuning(adata, option="lr", show=False)
    assert ax.get_xscale() == "log"
    assert points(ax, 0) == [[1e-4, -110], [1e-3, -105], [3e-4, -900], [2e-3, -100]]
    assert not ax.lines
    ax = sx.pl.tuning(adata, option="n_latent", show=False)
    assert ax.get_xscale() == "linear"
    ax = sx.pl.tuning(adata, option="library", show=False)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["None", "a", "b"]
    assert points(ax, 0) == [[0, -110], [2, -105], [2, -900], [1, -100]]
    with pytest.raises(ValueError, match="Did you mean 'lr'"):
        sx.pl.tuning(adata, option="Lr")


def test_axes_and_files(adata, tmp_path):
    _, ax = plt.subplots()
    assert sx.pl.tuning(adata, ax=ax, show=False) is ax
    sx.pl.tuning(adata, save=tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").stat().st_size > 0
