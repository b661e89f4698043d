from __future__ import annotations

import numpy as np
import pytest
import torch

import scvi_ext as sx
from scvi_ext.data.blocks import Block
from scvi_ext.data.registry import read_setup
from scvi_ext.data.sampler import split_cells
from scvi_ext.data.store import CellStore

# Many units on few cells at a constant rate: it overfits soon, and there is a best epoch in the middle.
RUN = {
    "max_epochs": 150,
    "plan": "scvi-tools",
    "kl_warmup": 0,
    "lr": 0.02,
    "train_size": 0.15,
    "n_hidden": 64,
    "dropout_rate": 0.0,
}


@pytest.fixture
def stopped(registered):
    sx.tl.fit(registered, early_stopping=10, **RUN)
    return registered


def test_it_stops_when_the_held_out_elbo_has_not_improved_for_so_many_epochs(stopped):
    elbo = sx.get.history(stopped)["elbo_validation"]
    status = stopped.uns["scvi_ext"]["fits"]["scvi"]["status"]
    assert status["stop_reason"] == "early stopping"
    assert status["best_epoch"] == elbo.idxmax()
    assert len(elbo) == elbo.idxmax() + 10 < RUN["max_epochs"]


def test_the_best_state_is_the_one_that_remains(stopped):
    """The held-out ELBO of the restored module is that of the best epoch, computed here anew."""
    history = sx.get.history(stopped)
    best = history["elbo_validation"].idxmax()
    store = CellStore.from_adata(stopped, read_setup(stopped))
    held_out = split_cells(stopped.n_obs, RUN["train_size"], None, seed=0)[1]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(hash((0, best - 1, 0)) % 2**63)  # the draws of that epoch's first pass
        loss = sx.get.model(stopped).loss(Block(store, torch.device("cpu")).minibatch(held_out))
    elbo = -(loss.reconstruction + loss.kl_z + loss.kl_library).double().mean().item()
    assert elbo == pytest.approx(history["elbo_validation"][best], rel=1e-6)  # one pass of float32
    # The last state would have been another: ten times as far as the line above allows.
    assert history["elbo_validation"].iloc[-1] < elbo - 1e-3


def test_it_is_the_beginning_of_the_run_without_it(stopped, make_counts):
    other = make_counts()
    sx.pp.setup_anndata(other, batch_key="batch")
    sx.tl.fit(other, **RUN)
    history, whole = sx.get.history(stopped), sx.get.history(other)
    assert other.uns["scvi_ext"]["fits"]["scvi"]["status"]["stop_reason"] == "finished"
    assert "best_epoch" not in other.uns["scvi_ext"]["fits"]["scvi"]["status"]
    np.testing.assert_array_equal(history["elbo_validation"], whole["elbo_validation"][: len(history)])


def test_a_run_that_ends_before_keeps_its_best_state_too(registered):
    sx.tl.fit(registered, early_stopping=1000, **RUN)
    status = registered.uns["scvi_ext"]["fits"]["scvi"]["status"]
    assert status["stop_reason"] == "finished"
    assert status["epochs"] == RUN["max_epochs"]
    assert status["best_epoch"] == sx.get.history(registered)["elbo_validation"].idxmax() < RUN["max_epochs"]
    again = sx.tl.fit(registered, copy=True, **RUN | {"max_epochs": status["best_epoch"]})
    for name, values in again.uns["scvi_ext"]["fits"]["scvi"]["state"].items():
        np.testing.assert_array_equal(registered.uns["scvi_ext"]["fits"]["scvi"]["state"][name], values, err_msg=name)


def test_true_takes_the_patience_of_the_plan(registered):
    sx.tl.fit(registered, early_stopping=True, max_epochs=2, n_hidden=8)
    run = registered.uns["scvi_ext"]["fits"]["scvi"]["run"]
    assert run["patience"] == run["plan"]["patience"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping": 0}, "early_stopping=0 must be True, False or a number of epochs, 1 or more"),
        ({"early_stopping": -2}, "early_stopping=-2 must be"),
        ({"early_stopping": True, "train_size": 1.0}, "early_stopping watches held-out cells, and there are none"),
        ({"early_stopping": 3, "validation_size": 0}, "early_stopping watches held-out cells, and there are none"),
        ({"early_stopping": 3, "validation_size": 0.001}, "early_stopping watches held-out cells, and there are none"),
    ],
    ids=str,
)
def test_it_needs_held_out_cells(registered, options, message):
    with pytest.raises(ValueError, match=message):
        sx.tl.fit(registered, max_epochs=2, **options)
    assert "fits" not in registered.uns["scvi_ext"]
