"""Draws without technical noise, and the correlation between genes in them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from _tolerances import N_STANDARD_ERRORS
from scipy import stats

import scvi_ext as sx
from scvi_ext.engine import map_cells as engine

SLOT = "scvi_correlation"
QUICK = {"n_hidden": 8, "n_latent": 2, "max_epochs": 2}
ROUNDED = {"rtol": 0, "atol": 2e-7}  # a correlation in float64, rounded to float32


@pytest.fixture
def fit_with(counts):
    def fit(model="scvi", **options):
        sx.pp.setup_anndata(counts, batch_key="batch", labels_key="cell_type", size_factor_key="size")
        sx.tl.fit(counts, model, key_added="scvi", **QUICK | {"library": "observed"} | options)
        return counts

    return fit


def correlation(adata, **options) -> np.ndarray:
    return sx.tl.feature_correlation(adata, copy=True, **{"n_samples": 3} | options).varp[SLOT]


# ---- denoised samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "normal", "bernoulli"])
def test_draws_are_gamma_around_the_profile(fit_with, likelihood):
    adata, n_samples = fit_with(reconstruction_loss=likelihood), 200
    options = {"n_samples": n_samples, "seed": 1, "indices": slice(0, 20)}
    drawn = sx.tl.denoised_samples(adata, **options, library_size=500)
    profile = sx.tl.get_normalized_expression(adata, **options, library_size=500, return_mean=False)
    assert drawn.shape == (n_samples, 20, 60)
    assert drawn.dtype == np.float32
    if likelihood not in ("zinb", "nb"):
        np.testing.assert_allclose(drawn, profile, rtol=1e-5)
        return
    theta = np.exp(adata.uns["scvi_ext"]["fits"]["scvi"]["state"]["dispersion.log_theta"].astype(float))
    for gene in range(60):  # divided by its mean, every draw of a gene has the same distribution
        relative = (drawn / profile)[:, :, gene].ravel()
        assert stats.kstest(relative, stats.gamma(theta[gene], scale=1 / theta[gene]).cdf).pvalue > 1e-6 / 60


@pytest.mark.parametrize(
    "options",
    [
        {"dispersion": "gene-cell"},
        {"dispersion": "gene-batch", "library": "latent", "latent_distribution": "ln"},
        {"dispersion": "gene-label", "library": "size_factor"},
    ],
    ids=lambda o: o["dispersion"],
)
def test_every_dispersion_has_draws(fit_with, options):
    adata = fit_with(**options)
    drawn = sx.tl.denoised_samples(adata, n_samples=100, seed=1)
    assert (np.isfinite(drawn) & (drawn >= 0)).all()
    profile = sx.tl.get_normalized_expression(adata, n_samples=100, seed=1, return_mean=False, library_size=1000)
    ratio = (drawn / profile).mean((0, 1))  # one on average
    error = (drawn / profile).mean(0).std(0) / np.sqrt(adata.n_obs)
    assert (np.abs(ratio - 1) < N_STANDARD_ERRORS * error).all()


@pytest.mark.parametrize(("library", "is_the_sum"), [("observed", True), ("latent", True), ("size_factor", False)])
def test_profiles_are_scaled_to_the_library_size_but_for_size_factors(fit_with, library, is_the_sum):
    adata = fit_with(library=library, reconstruction_loss="poisson")
    drawn = sx.tl.denoised_samples(adata, n_samples=1, library_size=300)[0]
    sx.tl.get_normalized_expression(adata, library_size=300)
    for x in (drawn, adata.layers["scvi_normalized"]):
        assert np.allclose(x.sum(1), 300, rtol=1e-4) == is_the_sum


def test_draws_scale_with_the_library_and_depend_on_seed_and_cell(fitted):
    one = sx.tl.denoised_samples(fitted, n_samples=2, seed=1)
    np.testing.assert_allclose(sx.tl.denoised_samples(fitted, n_samples=2, seed=1, library_size=2000.0), 2 * one)
    assert not np.allclose(sx.tl.denoised_samples(fitted, n_samples=2, seed=2), one)
    assert not np.allclose(one[0], one[1])


def test_the_batch_to_decode_in_has_an_effect(fitted):
    own = sx.tl.denoised_samples(fitted, n_samples=2)
    moved = sx.tl.denoised_samples(fitted, n_samples=2, transform_batch="b1")
    here = (fitted.obs["batch"] == "b1").to_numpy()
    np.testing.assert_array_equal(moved[:, here], own[:, here])
    assert np.abs(moved[:, ~here] - own[:, ~here]).max() > 1


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_neither_batch_size_nor_blocks_nor_the_choice_of_genes_matters(fitted, monkeypatch, batch_size):
    expected = sx.tl.denoised_samples(fitted, n_samples=2)
    monkeypatch.setattr(engine, "_BLOCK_CELLS", 50)
    # rates of another minibatch differ by roundings of float32
    found = sx.tl.denoised_samples(fitted, n_samples=2, batch_size=batch_size)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-30)
    found = sx.tl.denoised_samples(fitted, n_samples=2, gene_list=["gene9", "gene2"])
    np.testing.assert_allclose(found, expected[:, :, [9, 2]], rtol=1e-5, atol=1e-30)
    found = sx.tl.denoised_samples(fitted, n_samples=2, indices=[0, 1, 2])
    np.testing.assert_allclose(found, expected[:, :3], rtol=1e-5, atol=1e-30)


def test_nothing_is_written_and_no_global_generator_is_touched(fitted):
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    before = fitted.copy()
    sx.tl.denoised_samples(fitted, n_samples=2)
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert list(before.uns) == list(fitted.uns)
    assert not set(fitted.layers) | set(fitted.obsm) | set(fitted.varp)


@pytest.mark.parametrize("function", [sx.tl.denoised_samples, sx.tl.feature_correlation], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_samples": 0}, ValueError, "n_samples=0 must be 1 or more"),
        ({"n_samples": 2.5}, TypeError, "a whole number is needed"),
        ({"library_size": -1}, ValueError, "library_size=-1 must be positive"),
        ({"library_size": "latent"}, TypeError, "a number is needed"),
        ({"transform_batch": "b7"}, ValueError, "transform_batch='b7' is not one of"),
        ({"gene_list": ["nope"]}, KeyError, "1 of the 1 genes in gene_list are not in the fit: 'nope'"),
        ({"gene_list": [True, False]}, TypeError, r"gene_list holds True \(bool\); names are needed"),
        ({"gene_list": np.arange(3)}, TypeError, r"gene_list holds .*0.* \(int64\); names are needed"),
        ({"indices": []}, ValueError, "There are no cells"),
        ({"key": "nope"}, KeyError, "'nope' is not in"),
    ],
)
def test_wrong_options_are_refused(fitted, function, options, error, message):
    with pytest.raises(error, match=message):
        function(fitted, **options)
    assert not set(fitted.varp)


def test_samples_of_several_batches_are_refused(fitted):
    with pytest.raises(ValueError, match="names 2 batches, and a sample is drawn in one"):
        sx.tl.denoised_samples(fitted, transform_batch=["b0", "b1"])


# ---- correlation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spearman", "pearson"])
def test_it_is_the_correlation_of_the_denoised_samples(fitted, method):
    rows = sx.tl.denoised_samples(fitted, n_samples=3, seed=4).reshape(-1, 60).astype(float)
    expected = stats.spearmanr(rows).statistic if method == "spearman" else np.corrcoef(rows, rowvar=False)
    found = correlation(fitted, method=method, seed=4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, **ROUNDED)
    np.testing.assert_allclose(correlation(fitted, method=method, seed=4, batch_size=31), found, rtol=0, atol=1e-5)


def test_ranks_are_the_default(fitted):
    np.testing.assert_array_equal(correlation(fitted), correlation(fitted, method="spearman"))


@pytest.mark.parametrize("method", ["spearman", "pearson"])
def test_correlations_are_averaged_over_batches(fitted, method):
    parts = [correlation(fitted, method=method, transform_batch=batch) for batch in ("b0", "b2")]
    found = correlation(fitted, method=method, transform_batch=["b0", "b2"])
    assert np.abs(parts[0] - parts[1]).max() > 0.01
    np.testing.assert_allclose(found, (parts[0] + parts[1]) / 2, **ROUNDED)


def test_genes_that_are_not_known_are_nan(fitted, with_genes):
    whole = correlation(fitted)
    larger = with_genes(fitted, ["new", *fitted.var_names[::-1]])
    found = correlation(larger)
    assert np.isnan(found[0]).all()
    assert np.isnan(found[:, 0]).all()
    np.testing.assert_array_equal(found[1:, 1:], whole[::-1, ::-1])


def test_a_list_of_genes_is_a_sparse_matrix_of_their_entries(fitted, with_genes, tmp_path):
    whole = correlation(fitted)
    larger = with_genes(fitted, ["new", *fitted.var_names[::-1]])
    genes = ["gene50", "gene3", "gene7"]
    sx.tl.feature_correlation(larger, n_samples=3, gene_list=genes)
    found = larger.varp[SLOT]
    assert isinstance(found, sp.csr_matrix)
    assert found.dtype == np.float32
    assert found.shape == (61, 61)
    assert found.nnz == 9
    assert found.has_sorted_indices
    of_genes = larger[:, genes].varp[SLOT].toarray()
    np.testing.assert_allclose(of_genes, whole[np.ix_([50, 3, 7], [50, 3, 7])], **ROUNDED)
    larger.write_h5ad(tmp_path / "a.h5ad")
    larger.write_zarr(tmp_path / "a.zarr")
    for read in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        assert (read.varp[SLOT] != found).nnz == 0


def test_a_pair_of_genes_that_do_not_vary_has_an_entry(fitted, monkeypatch):
    values = np.array([[1, np.nan, 0], [np.nan, np.nan, np.nan], [0, np.nan, 1]])
    monkeypatch.setattr("scvi_ext.tl._feature_correlation.spearman", lambda drawn: values)
    found = correlation(fitted, gene_list=["gene9", "gene2", "gene4"])
    assert found.nnz == 9
    np.testing.assert_array_equal(found[[9, 2, 4]][:, [9, 2, 4]].toarray(), values)


def test_it_sees_genes_that_vary_together():
    """Two groups of genes, each following one of two independent factors."""
    rng = np.random.default_rng(0)
    factors = rng.gamma(2.0, 1.0, (400, 2))
    mean = 4 * np.repeat(factors, 6, axis=1) + 1
    adata = ad.AnnData(np.hstack([rng.poisson(mean), rng.poisson(20.0, (400, 6))]).astype(np.float32))
    sx.pp.setup_anndata(adata)
    sx.tl.fit(adata, reconstruction_loss="nb", n_hidden=32, n_latent=3, max_epochs=60)
    sx.tl.feature_correlation(adata)
    found, group = adata.varp[SLOT][:12, :12], np.arange(12) // 6
    within = found[(group[:, None] == group) & ~np.eye(12, dtype=bool)]
    between = found[group[:, None] != group]
    assert within.min() > between.max()


def test_one_cell_and_one_sample_have_no_correlation(fitted):
    with pytest.raises(ValueError, match="One sample of one cell has no correlation"):
        sx.tl.feature_correlation(fitted, n_samples=1, indices=[3])
    assert correlation(fitted, n_samples=2, indices=[3]).shape == (60, 60)
    with pytest.raises(ValueError, match="method='kendall' is not one of 'pearson', 'spearman'"):
        sx.tl.feature_correlation(fitted, method="kendall")


def test_it_writes_its_slot_and_travels(fitted, tmp_path, logged):
    assert sx.tl.feature_correlation(fitted, n_samples=2) is None
    assert f"'{SLOT}'" in logged()
    assert set(fitted.varp) == {SLOT}
    sx.tl.feature_correlation(fitted, n_samples=2, method="pearson", key_added="mine")
    assert set(fitted.varp) == {SLOT, "mine"}
    fitted.write_h5ad(tmp_path / "a.h5ad")
    fitted.write_zarr(tmp_path / "a.zarr")
    for read in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        np.testing.assert_array_equal(read.varp[SLOT], fitted.varp[SLOT])
