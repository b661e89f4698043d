from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from _tolerances import N_STANDARD_ERRORS
from scipy.special import expit

import scvi_ext as sx
from scvi_ext.engine import map_cells as engine

SLOT = "scvi_posterior_predictive"
QUICK = {"n_hidden": 8, "n_latent": 2, "max_epochs": 2}


def sample(adata, **options) -> sp.csr_matrix:
    return sx.tl.posterior_predictive_sample(adata, copy=True, **options).layers[SLOT]


def assert_same(one, other):
    assert one.shape == other.shape
    assert (one != other).nnz == 0


@pytest.fixture
def fit_with(counts):
    def fit(model="scvi", **options):
        sx.pp.setup_anndata(counts, batch_key="batch", labels_key="cell_type", size_factor_key="size")
        sx.tl.fit(counts, model, key_added="scvi", **QUICK | {"library": "observed"} | options)
        return counts

    return fit


def test_it_writes_a_sparse_layer_of_counts_and_nothing_else(fitted, logged):
    before = fitted.copy()
    assert sx.tl.posterior_predictive_sample(fitted) is None
    layer = fitted.layers[SLOT]
    assert isinstance(layer, sp.csr_matrix)
    assert layer.dtype == np.float32
    assert layer.has_sorted_indices
    assert layer.shape == fitted.shape
    assert layer.nnz == (layer.data > 0).sum()
    np.testing.assert_array_equal(layer.data, np.rint(layer.data))
    assert set(fitted.layers) == {SLOT}
    assert (fitted.X != before.X).nnz == 0
    assert list(fitted.obs) == list(before.obs)
    assert f"'{SLOT}'" in logged()


def test_a_copy_and_a_view(fitted):
    copied = sx.tl.posterior_predictive_sample(fitted, copy=True, key_added="mine")
    assert set(copied.layers) == {"mine"}
    assert not set(fitted.layers)
    view = fitted[50:60]
    sx.tl.posterior_predictive_sample(view)
    assert not view.is_view
    assert view.layers[SLOT].shape == (10, 60)
    assert not set(fitted.layers)


def test_the_seed_decides_and_global_generators_do_not(fitted):
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = sample(fitted, seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert_same(sample(fitted, seed=1), first)
    assert (sample(fitted, seed=2) != first).nnz > 1000
    assert not np.allclose(first[0].toarray(), first[1].toarray())


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_neither_batch_size_nor_blocks_matter(fitted, monkeypatch, batch_size):
    expected = sample(fitted)
    assert_same(sample(fitted, batch_size=batch_size), expected)
    monkeypatch.setattr(engine, "_BLOCK_CELLS", 50)
    assert_same(sample(fitted, batch_size=batch_size), expected)


LIKELIHOODS = [
    {"reconstruction_loss": "zinb"},
    {"reconstruction_loss": "zinb", "dispersion": "gene-cell", "library": "latent"},
    {"reconstruction_loss": "nb", "dispersion": "gene-batch", "latent_distribution": "ln"},
    {"reconstruction_loss": "nb", "dispersion": "gene-label", "library": "size_factor"},
    {"reconstruction_loss": "poisson", "model": "ldvae"},
    {"reconstruction_loss": "normal", "dispersion": "gene-batch"},
    {"reconstruction_loss": "bernoulli"},
]


@pytest.mark.parametrize("options", LIKELIHOODS, ids=lambda o: ",".join(o.values()))
def test_counts_average_to_the_mean_of_the_likelihood_at_the_same_samples(fit_with, options):
    adata, n_samples = fit_with(**options), 20
    drawn = sx.tl.posterior_predictive_sample(adata, n_samples=n_samples, seed=3)
    sx.tl.get_likelihood_parameters(adata, n_samples=n_samples, seed=3)
    mean = adata.layers["scvi_mean"].astype(float)
    if options["reconstruction_loss"] == "bernoulli":
        assert {x for matrix in drawn for x in np.unique(matrix.data)} == {1.0}
        return
    if options["reconstruction_loss"] == "zinb":  # mean and dropout are averaged apart; here they hardly vary together
        mean *= 1 - adata.layers["scvi_dropout"]
    difference = np.mean([matrix.toarray() for matrix in drawn], axis=0) - mean
    error = difference.std(0) / np.sqrt(adata.n_obs)
    slack = 0.01 * mean.mean(0) if options["reconstruction_loss"] == "zinb" else 0
    assert (np.abs(difference.mean(0)) < N_STANDARD_ERRORS * error + slack).all()


def test_detections_are_as_frequent_as_the_likelihood_says(fit_with):
    adata = fit_with(reconstruction_loss="bernoulli")
    drawn = sx.tl.posterior_predictive_sample(adata, n_samples=20, seed=3)
    module = sx.get.model(adata)
    rate = sx.tl.get_normalized_expression(adata, n_samples=20, seed=3, return_mean=False, library_size="latent")
    assert module.reconstruction_loss == "bernoulli"
    difference = np.mean([matrix.toarray() for matrix in drawn], axis=0) + np.expm1(-rate.astype(float)).mean(0)
    error = difference.std(0) / np.sqrt(adata.n_obs)
    assert (np.abs(difference.mean(0)) <= N_STANDARD_ERRORS * error).all()


def test_zeros_are_as_frequent_as_the_likelihood_says(fit_with):
    adata, n_samples = fit_with(reconstruction_loss="zinb"), 10
    drawn = sx.tl.posterior_predictive_sample(adata, n_samples=n_samples, seed=3)
    saved = adata.uns["scvi_ext"]["fits"]["scvi"]["state"]
    theta = np.exp(saved["dispersion.log_theta"].astype(float))
    rate = sx.tl.get_normalized_expression(adata, n_samples=n_samples, seed=3, return_mean=False, library_size="latent")
    sx.tl.get_likelihood_parameters(adata, n_samples=n_samples, seed=3)
    dropout = adata.layers["scvi_dropout"].astype(float)
    assert (expit(-3) < dropout).any()
    nb_zero = ((theta / (theta + rate)) ** theta).mean(0)
    difference = np.mean([matrix.toarray() == 0 for matrix in drawn], axis=0) - (dropout + (1 - dropout) * nb_zero)
    error = difference.std(0) / np.sqrt(adata.n_obs)
    assert (np.abs(difference.mean(0)) < N_STANDARD_ERRORS * error + 0.002).all()  # averaged apart, see above


def test_a_latent_library_that_is_far_off_gives_counts(fit_with):
    adata = fit_with(reconstruction_loss="nb", library="latent")
    adata.uns["scvi_ext"]["fits"]["scvi"]["state"]["library.encoder.mean_encoder.bias"] += np.float32(60)
    assert sample(adata).max() == pytest.approx(1e8, rel=1e-3)
    check = sx.tl.posterior_predictive_check(adata, n_samples=2, copy=True).uns[SLOT]
    assert np.isfinite(check["genes"]).all(axis=None)


def test_a_counterfactual_at_the_observed_batch_changes_nothing(fitted):
    own, moved = sample(fitted), sample(fitted, transform_batch="b1")
    here = (fitted.obs["batch"] == "b1").to_numpy()
    assert_same(own[here], moved[here])
    assert (own[~here] != moved[~here]).nnz > 0


def test_several_samples_are_returned(fitted):
    drawn = sx.tl.posterior_predictive_sample(fitted, n_samples=3, indices=[5, 2], gene_list=["gene7", "gene1"])
    assert len(drawn) == 3
    assert all(isinstance(m, sp.csr_matrix) and m.shape == (2, 2) and m.dtype == np.float32 for m in drawn)
    whole = sx.tl.posterior_predictive_sample(fitted, n_samples=3)
    assert whole[0].shape == fitted.shape
    assert (whole[0] != whole[1]).nnz > 1000
    assert not set(fitted.layers)
    assert not set(fitted.obsm)


def test_a_list_of_genes_is_a_table_of_the_same_counts(fitted):
    whole = sample(fitted)
    sx.tl.posterior_predictive_sample(fitted, gene_list=["gene7", "gene1"])
    table = fitted.obsm[SLOT]
    assert list(table.columns) == ["gene7", "gene1"]
    assert (table.dtypes == np.float32).all()
    np.testing.assert_array_equal(table, whole[:, [7, 1]].toarray())
    sx.tl.posterior_predictive_sample(fitted, gene_list="gene3", indices=[3, 150], key_added="one")
    assert np.isfinite(fitted.obsm["one"]["gene3"]).tolist() == [i in (3, 150) for i in range(201)]


def test_genes_in_another_order_get_their_own_counts(fitted, with_genes):
    order = np.random.default_rng(0).permutation(fitted.n_vars)
    shuffled = with_genes(fitted, list(fitted.var_names[order]))
    layer = sample(shuffled)
    assert layer.has_sorted_indices
    assert_same(layer, sample(fitted)[:, order])


def test_what_a_sparse_layer_cannot_say_is_refused(fitted, with_genes):
    larger = with_genes(fitted, [*fitted.var_names, "new"])
    with pytest.raises(ValueError, match=r"1 of 61 genes of adata are not in fit 'scvi' .* which has no NaN: give"):
        sx.tl.posterior_predictive_sample(larger)
    with pytest.raises(ValueError, match="indices would leave cells without counts"):
        sx.tl.posterior_predictive_sample(fitted, indices=[1, 2])
    assert not set(larger.layers) | set(fitted.layers)
    assert sx.tl.posterior_predictive_sample(larger, n_samples=2)[0].shape == (201, 60)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_samples": 0}, ValueError, "n_samples=0 must be 1 or more"),
        ({"n_samples": 2, "copy": True}, ValueError, "returns matrices and writes nothing: leave out copy"),
        ({"n_samples": 2, "key_added": "a"}, ValueError, "returns matrices and writes nothing: leave out copy"),
        ({"transform_batch": ["b0", "b1"]}, ValueError, "names 2 batches, and a sample is drawn in one"),
        ({"transform_batch": "b7"}, ValueError, "transform_batch='b7' is not one of"),
        ({"gene_list": ["nope"]}, KeyError, "1 of the 1 genes in gene_list are not in the fit: 'nope'"),
        ({"key": "nope"}, KeyError, "'nope' is not in"),
        ({"key_added": "a/b"}, ValueError, "without '/'"),
    ],
)
def test_wrong_options_are_refused(fitted, options, error, message):
    with pytest.raises(error, match=message):
        sx.tl.posterior_predictive_sample(fitted, **options)
    assert not set(fitted.layers) | set(fitted.obsm)


@pytest.mark.parametrize("kind", [sp.csc_matrix, np.asarray, lambda x: sp.csr_matrix(x, dtype=np.int64)])
def test_the_kind_of_matrix_does_not_matter(fitted, kind):
    other = fitted.copy()
    other.X = kind(fitted.X.toarray())
    assert_same(sample(other), sample(fitted))


def test_one_cell_is_enough(fitted):
    assert sample(fitted[7].copy()).shape == (1, 60)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_the_layer_travels(fitted, tmp_path, kind):
    sx.tl.posterior_predictive_sample(fitted)
    sx.tl.posterior_predictive_sample(fitted, gene_list=["gene1"])
    getattr(fitted, f"write_{kind}")(tmp_path / f"a.{kind}")
    read = ad.read_h5ad(tmp_path / "a.h5ad") if kind == "h5ad" else ad.read_zarr(tmp_path / "a.zarr")
    assert_same(read.layers[SLOT], fitted.layers[SLOT])
    pd.testing.assert_frame_equal(read.obsm[SLOT], fitted.obsm[SLOT])
