from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from _tolerances import FLOAT32

import scvi_ext as sx
from scvi_ext.engine import refit

if TYPE_CHECKING:
    import anndata as ad

SLOT = "scvi_amortization_gap"
QUICK = {"n_paths": 1, "max_epochs": 5, "progress": False}


def gaps(adata, **options) -> np.ndarray:
    return sx.tl.amortization_gap(adata, return_mean=False, copy=True, **QUICK | options).obs[SLOT].to_numpy()


def states(adata) -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in adata.uns["scvi_ext"]["fits"]["scvi"]["state"].items()}


def perturbed(adata: ad.AnnData, scale: float) -> ad.AnnData:
    """The same fit with noise on the weights of the mean of q(z | x)."""
    adata = adata.copy()
    state = adata.uns["scvi_ext"]["fits"]["scvi"]["state"]
    weight = state["z_encoder.mean_encoder.weight"]
    noise = np.random.default_rng(0).normal(0, scale, weight.shape)
    state["z_encoder.mean_encoder.weight"] = (weight + noise).astype(np.float32)
    return adata


def test_a_spoilt_encoder_has_a_larger_gap_which_is_recovered(registered):
    """The decoder is the same, so the best bound is: what was spoilt comes back, and is the difference of the gaps."""
    sx.tl.fit(registered, n_hidden=16, n_latent=4, max_epochs=40)
    spoilt = perturbed(registered, 0.5)
    lost = sx.tl.get_elbo(registered, n_samples=25) - sx.tl.get_elbo(spoilt, n_samples=25)
    options = {"n_paths": 2, "max_epochs": 60, "progress": False}
    good, bad = (sx.tl.amortization_gap(adata, **options) for adata in (registered, spoilt))
    assert lost > 5
    assert 0 < good < bad
    assert bad - good == pytest.approx(lost, rel=0.15)


def test_the_gap_is_the_difference_of_two_elbos_at_the_same_draws(fitted, monkeypatch):
    found = []
    fit = refit.fit

    def remember(encoders, *args, **options):
        result = fit(encoders, *args, **options)
        found.append({name: t.numpy().copy() for name, t in encoders.whole[0].state_dict().items()})
        return result

    monkeypatch.setattr(refit, "fit", remember)
    gap = gaps(fitted, n_samples=7, seed=3)
    sx.tl.get_elbo(fitted, n_samples=7, seed=3, return_mean=False)
    before = fitted.obs["scvi_elbo"].to_numpy()
    fitted.uns["scvi_ext"]["fits"]["scvi"]["state"] = found[0]
    sx.tl.get_elbo(fitted, n_samples=7, seed=3, return_mean=False)
    # differences of ELBOs of some hundred nats in float32
    np.testing.assert_allclose(gap, fitted.obs["scvi_elbo"].to_numpy() - before, atol=1e-3)


def test_the_fit_and_all_else_stay(fitted):
    before, columns = states(fitted), list(fitted.obs)
    generators = np.random.get_state()[1].copy(), torch.get_rng_state()
    gap = sx.tl.amortization_gap(fitted, **QUICK)
    assert isinstance(gap, float)
    assert gap > 0
    np.testing.assert_array_equal(np.random.get_state()[1], generators[0])
    assert torch.equal(torch.get_rng_state(), generators[1])
    after = states(fitted)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert list(fitted.obs) == columns


def test_one_value_per_cell_averages_to_the_mean(fitted, logged):
    mean = sx.tl.amortization_gap(fitted, **QUICK)
    assert sx.tl.amortization_gap(fitted, return_mean=False, **QUICK) is None
    assert fitted.obs[SLOT].dtype == np.float64
    assert fitted.obs[SLOT].mean() == pytest.approx(mean, rel=1e-9)
    assert f"'{SLOT}'" in logged()
    chosen = gaps(fitted, indices=[7, 3, 50])
    assert np.flatnonzero(np.isfinite(chosen)).tolist() == [3, 7, 50]
    assert np.isfinite(gaps(fitted, indices=["cell9"])[9])


def test_more_paths_are_never_worse_and_differ(fitted):
    one = sx.tl.amortization_gap(fitted, **QUICK)
    three = sx.tl.amortization_gap(fitted, **QUICK | {"n_paths": 3})
    assert three >= one
    assert sx.tl.amortization_gap(fitted, **QUICK) == one
    assert sx.tl.amortization_gap(fitted, **QUICK, seed=5) != one


def test_the_start_is_a_candidate(fitted):
    """A learning rate that ruins the encoder leaves no gap, and no negative one, and is not taken for a good fit."""
    options = QUICK | {"max_epochs": 1, "lr": 50.0}
    advice = "the gap is 0, which says little: take more epochs than max_epochs=1, or another learning rate than lr=50"
    with pytest.warns(sx.ScviExtWarning, match=advice):
        assert sx.tl.amortization_gap(fitted, **options) == 0
    with pytest.warns(sx.ScviExtWarning, match=advice):
        assert not gaps(fitted, **options).any()


def test_more_epochs_find_more(fitted):
    few, many = (sx.tl.amortization_gap(fitted, **QUICK | {"max_epochs": n}) for n in (1, 40))
    assert many > few


@pytest.mark.parametrize("n_samples", [1, 30])
def test_the_number_of_samples_is_that_of_the_bound(fitted, n_samples):
    spread = np.std([gaps(fitted, n_samples=n_samples, seed=seed, max_epochs=1, lr=1e-6) for seed in range(3)], axis=0)
    # nothing is learned at this rate, and the draws before and after are the same: no noise is left
    np.testing.assert_allclose(spread, 0, atol=1e-2)


def test_genes_in_another_order_and_further_ones(fitted, with_genes):
    larger = with_genes(fitted, ["new", *fitted.var_names[::-1]])
    np.testing.assert_allclose(gaps(larger), gaps(fitted), **FLOAT32)


def test_ctrl_c_keeps_what_was_found(fitted, monkeypatch, logged):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    loss, steps = refit.Encoders.loss, []

    def interrupting(self, *cells, **options):
        steps.append(None)
        if len(steps) == 8:
            signal.raise_signal(signal.SIGINT)
        return loss(self, *cells, **options)

    monkeypatch.setattr(refit.Encoders, "loss", interrupting)
    try:
        gap = sx.tl.amortization_gap(fitted, n_paths=3, max_epochs=50, progress=False)
        assert gap > 0
        assert len(steps) < 15
        assert "interrupted in path 1 of 3" in logged()
        steps.clear()
        with pytest.raises(KeyboardInterrupt):
            sx.tl.amortization_gap(fitted, n_paths=3, max_epochs=50, progress=False, return_mean=False)
        assert fitted.obs[SLOT].mean() == pytest.approx(gap)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_of_the_evaluation_writes_nothing(fitted, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    columns = list(fitted.obs)
    monkeypatch.setattr("scvi_ext.tl._amortization_gap.elbo_of_cells", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.amortization_gap(fitted, return_mean=False, **QUICK)
    assert list(fitted.obs) == columns


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_paths": 0}, ValueError, "n_paths=0 must be 1 or more"),
        ({"max_epochs": 0}, ValueError, "max_epochs=0 must be 1 or more"),
        ({"max_epochs": None}, TypeError, "a whole number is needed"),
        ({"n_samples": 0}, ValueError, "n_samples=0 must be 1 or more"),
        ({"lr": 0}, ValueError, "lr=0 must be positive"),
        ({"seed": -1}, ValueError, "seed=-1 must be 0 or more"),
        ({"device": "tpu"}, ValueError, "device='tpu' is not supported"),
        ({"copy": True}, ValueError, "return_mean=True writes nothing"),
        ({"key_added": "a"}, ValueError, "return_mean=True writes nothing"),
        ({"key_added": "batch", "return_mean": False}, ValueError, "is what fit 'scvi' reads"),
        ({"indices": []}, ValueError, "There are no cells"),
        ({"key": "nope"}, KeyError, "'nope' is not in"),
    ],
)
def test_wrong_options_are_refused(fitted, options, error, message):
    columns = list(fitted.obs)
    with pytest.raises(error, match=message):
        sx.tl.amortization_gap(fitted, **options)
    assert list(fitted.obs) == columns
