from __future__ import annotations

import math

import anndata as ad
import numpy as np
import pytest
import torch
from _tolerances import FLOAT32, FLOAT64
from scipy.special import logsumexp, softmax

import scvi_ext as sx
from scvi_ext.engine import map_cells as engine

SLOT = "scvi_effective_sample_size"
QUICK = {"n_hidden": 8, "n_latent": 2, "max_epochs": 2}


@pytest.mark.parametrize(
    "options",
    [{}, {"library": "latent"}, {"latent_distribution": "ln"}, {"reconstruction_loss": "normal"}],
    ids=lambda o: ",".join(o.values()) or "default",
)
def test_their_log_mean_exp_is_the_marginal_likelihood(registered, options):
    sx.tl.fit(registered, **QUICK, **options)
    weights = sx.tl.get_importance_weights(registered, n_samples=30, seed=2)
    assert weights.shape == (30, 201)
    assert weights.dtype == np.float64
    sx.tl.get_marginal_ll(registered, n_mc_samples=30, seed=2, return_mean=False)
    found = logsumexp(weights, axis=0) - math.log(30)
    np.testing.assert_allclose(found, registered.obs["scvi_marginal_ll"], **FLOAT64)


def test_they_are_the_weights_of_the_normalised_expression(fitted):
    """Sample s is the same one everywhere: weighing the samples by hand gives the weighted mean."""
    options = {"n_samples": 7, "seed": 3}
    share = softmax(sx.tl.get_importance_weights(fitted, **options), axis=0)
    samples = sx.tl.get_normalized_expression(fitted, return_mean=False, **options)
    sx.tl.get_normalized_expression(fitted, weights="importance", **options)
    expected = np.einsum("sc,scg->cg", share, samples)
    # float32 log weights of several hundred nats leave shares known to some 1e-5
    np.testing.assert_allclose(fitted.layers["scvi_normalized"], expected, rtol=1e-3)


def test_the_effective_sample_size_is_that_of_the_weights(fitted, logged):
    weights = sx.tl.get_importance_weights(fitted, n_samples=20)
    before = list(fitted.obs)
    assert sx.tl.get_importance_weights(fitted, n_samples=20, return_weights=False) is None
    share = softmax(weights, axis=0)
    np.testing.assert_allclose(fitted.obs[SLOT], 1 / (share**2).sum(0), **FLOAT64)
    assert fitted.obs[SLOT].between(1, 20).all()
    assert list(fitted.obs) == [*before, SLOT]
    assert f"'{SLOT}'" in logged()


def test_an_exact_posterior_keeps_all_samples(registered):
    """Without influence of z on the counts the posterior is the prior: all weights of a cell are equal."""
    sx.tl.fit(registered, reconstruction_loss="poisson", **QUICK)
    state = registered.uns["scvi_ext"]["fits"]["scvi"]["state"]
    for name in state:
        if name.startswith("decoder") or "mean_encoder" in name or "var_encoder" in name:
            state[name] = np.zeros_like(state[name])
    weights = sx.tl.get_importance_weights(registered, n_samples=5)
    # var = exp(0) + 1e-4 is not quite that of the prior
    np.testing.assert_allclose(weights - weights.mean(0), 0, atol=5e-3)
    sx.tl.get_importance_weights(registered, n_samples=5, return_weights=False)
    np.testing.assert_allclose(registered.obs[SLOT], 5, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_neither_batch_size_nor_blocks_matter(fitted, monkeypatch, batch_size):
    expected = sx.tl.get_importance_weights(fitted, n_samples=4)
    monkeypatch.setattr(engine, "_BLOCK_CELLS", 50)
    np.testing.assert_allclose(
        sx.tl.get_importance_weights(fitted, n_samples=4, batch_size=batch_size), expected, **FLOAT32
    )


def test_chosen_cells(fitted):
    weights = sx.tl.get_importance_weights(fitted, n_samples=4, indices=["cell9", "cell3"])
    assert weights.shape == (4, 2)
    copied = sx.tl.get_importance_weights(fitted, n_samples=4, indices=[9, 3], return_weights=False, copy=True)
    assert SLOT not in fitted.obs
    assert np.flatnonzero(copied.obs[SLOT].notna()).tolist() == [3, 9]
    sx.tl.get_importance_weights(fitted, n_samples=4, return_weights=False, key_added="mine", key="ldvae")
    assert fitted.obs["mine"].notna().all()


def test_the_seed_decides_and_global_generators_do_not(fitted):
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = sx.tl.get_importance_weights(fitted, n_samples=4, seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    np.testing.assert_array_equal(sx.tl.get_importance_weights(fitted, n_samples=4, seed=1), first)
    assert not np.allclose(sx.tl.get_importance_weights(fitted, n_samples=4, seed=2), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples=0 must be 1 or more"),
        ({"copy": True}, "return_weights=True writes nothing: leave out copy"),
        ({"key_added": "a"}, "return_weights=True writes nothing: leave out copy"),
        ({"n_samples": 1, "return_weights": False}, "n_samples=1 has an effective sample size of 1"),
        ({"return_weights": False, "key_added": "batch"}, "is what fit 'scvi' reads"),
        ({"indices": []}, "There are no cells"),
    ],
)
def test_wrong_options_are_refused(fitted, options, message):
    before = list(fitted.obs)
    with pytest.raises(ValueError, match=message):
        sx.tl.get_importance_weights(fitted, **options)
    assert list(fitted.obs) == before


def test_it_travels(fitted, tmp_path):
    sx.tl.get_importance_weights(fitted, n_samples=3, return_weights=False)
    fitted.write_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "a.h5ad").obs[SLOT], fitted.obs[SLOT])
