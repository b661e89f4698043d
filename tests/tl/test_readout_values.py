"""The numbers that read-outs give, against formulas written out here."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from _tolerances import FLOAT32, N_STANDARD_ERRORS
from scipy.special import expit, logsumexp
from scipy.stats import nbinom, norm

import scvi_ext as sx
from scvi_ext import models
from scvi_ext._contract import Capability
from scvi_ext.data.blocks import Block
from scvi_ext.data.registry import read_setup
from scvi_ext.data.store import CellStore

QUICK = {"n_hidden": 16, "n_latent": 4, "max_epochs": 3}

# Models of several data sets have tests of their own, test_joint_alone.
OF_ONE = [name for name in models.names() if Capability.JOINT not in models.get(name).capabilities]
WITH_DISPERSION = [name for name in OF_ONE if "dispersion" in {field.name for field in fields(models.get(name).config)}]


@pytest.fixture
def fit_with(counts):
    """``fit_with(model=..., **options)``: the small counts with one quick fit called "scvi", all columns registered."""

    def fit(model="scvi", **options):
        keys = {"batch_key": "batch", "labels_key": "cell_type", "size_factor_key": "size"}
        sx.pp.setup_anndata(counts, **keys)
        sx.tl.fit(counts, model, key_added="scvi", **QUICK | {"library": "observed"} | options)
        return counts

    return fit


def minibatch(adata):
    store = CellStore.from_adata(adata, read_setup(adata), columns=frozenset({"labels", "size_factor"}))
    return Block(store, torch.device("cpu")).minibatch(np.arange(adata.n_obs))


# ---- latent --------------------------------------------------------------------------------------------------------


def test_the_latent_mean_is_the_location_of_q(fitted):
    sx.tl.get_latent(fitted)
    with torch.no_grad():
        qz = sx.get.model(fitted).encode(minibatch(fitted))
    np.testing.assert_allclose(fitted.obsm["X_scvi"], qz.loc, **FLOAT32)
    sx.tl.get_latent(fitted, return_dist=True)
    np.testing.assert_allclose(fitted.obsm["X_scvi"], qz.loc, **FLOAT32)
    np.testing.assert_allclose(fitted.obsm["X_scvi_var"], qz.scale**2, **FLOAT32)


def test_the_variance_goes_beside_a_named_slot(fitted):
    sx.tl.get_latent(fitted, return_dist=True, key_added="mine")
    assert {"mine", "mine_var"} <= set(fitted.obsm)
    assert not {"X_scvi", "X_scvi_var"} & set(fitted.obsm)


def test_samples_of_the_latent_follow_q(fitted):
    sx.tl.get_latent(fitted, return_dist=True)
    loc, sd = fitted.obsm["X_scvi"].copy(), np.sqrt(fitted.obsm["X_scvi_var"])
    z = []
    for seed in range(20):
        sx.tl.get_latent(fitted, give_mean=False, seed=seed)
        z.append((fitted.obsm["X_scvi"] - loc) / sd)
    z = np.array(z)  # 20 x 201 x 4 standard normal draws
    assert abs(z.mean()) < N_STANDARD_ERRORS / np.sqrt(z.size)
    assert abs(z.var() - 1) < N_STANDARD_ERRORS * np.sqrt(2 / z.size)
    assert abs(np.corrcoef(z.reshape(-1, 4).T)[np.triu_indices(4, 1)]).max() < N_STANDARD_ERRORS / np.sqrt(z.size / 4)


def test_a_logistic_normal_latent_lies_on_the_simplex(fit_with):
    adata = fit_with(latent_distribution="ln")
    sx.tl.get_latent(adata, mc_samples=4000)
    mean = adata.obsm["X_scvi"].copy()
    np.testing.assert_allclose(mean.sum(1), 1, **FLOAT32)
    sx.tl.get_latent(adata, give_mean=False)
    np.testing.assert_allclose(adata.obsm["X_scvi"].sum(1), 1, **FLOAT32)
    # the mean of the softmax, by draws of our own from the distribution before it
    sx.tl.get_latent(adata, return_dist=True)
    loc, sd = adata.obsm["X_scvi"], np.sqrt(adata.obsm["X_scvi_var"])
    y = loc + sd * np.random.default_rng(0).normal(size=(4000, *loc.shape))
    z = np.exp(y - logsumexp(y, axis=2, keepdims=True))
    error = np.sqrt(2 * z.var(0) / 4000)
    assert (np.abs(mean - z.mean(0)) < N_STANDARD_ERRORS * error + 1e-6).all()
    sx.tl.get_latent(adata, mc_samples=10)
    assert not np.allclose(adata.obsm["X_scvi"], mean, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"give_mean": False, "return_dist": True},
            "give_mean=False asks for a sample and return_dist=True for the dist",
        ),
        ({"mc_samples": 0}, "mc_samples=0 must be 1 or more"),
    ],
    ids=str,
)
def test_latents_that_cannot_be_are_refused(fitted, options, message):
    with pytest.raises(ValueError, match=message):
        sx.tl.get_latent(fitted, **options)
    assert "X_scvi" not in fitted.obsm


# ---- normalised expression -----------------------------------------------------------------------------------------


def normalized(adata, **options):
    return sx.tl.get_normalized_expression(adata, copy=True, **options).layers["scvi_normalized"]


@pytest.mark.parametrize("library_size", [1, 1e4, 3.5])
def test_profiles_sum_to_the_library_size(fitted, library_size):
    sums = normalized(fitted, library_size=library_size, n_samples=3).sum(1)
    np.testing.assert_allclose(sums, library_size, **FLOAT32)


def test_the_default_library_size_is_ten_thousand(fitted):
    np.testing.assert_array_equal(normalized(fitted), normalized(fitted, library_size=1e4))


def test_library_sizes_of_the_cells_themselves(fit_with):
    adata = fit_with()
    totals = adata.X.toarray().sum(1)
    np.testing.assert_allclose(normalized(adata, library_size="latent").sum(1), totals, rtol=1e-5)
    np.testing.assert_allclose(
        normalized(adata, library_size="latent"), normalized(adata, library_size=1) * totals[:, None], rtol=1e-5
    )
    fit_with(library="latent")
    inferred = normalized(adata, library_size="latent", n_samples=50).sum(1)
    assert not np.allclose(inferred, totals, rtol=1e-2)
    fit_with(library="size_factor")
    factors = adata.obs["size"].to_numpy()[:, None]
    np.testing.assert_allclose(
        normalized(adata, library_size="latent"), normalized(adata, library_size=1) * factors, rtol=1e-5
    )


def test_the_observed_batch_changes_nothing(fitted):
    own = normalized(fitted, n_samples=2)
    for batch in ("b0", "b1", "b2"):
        rows = (fitted.obs["batch"] == batch).to_numpy()
        there = normalized(fitted, n_samples=2, transform_batch=batch)
        np.testing.assert_allclose(there[rows], own[rows], **FLOAT32)
        assert not np.allclose(there[~rows], own[~rows], rtol=1e-3)


def test_several_batches_are_averaged(fitted):
    each = [normalized(fitted, transform_batch=batch) for batch in ("b0", "b1", "b2")]
    np.testing.assert_allclose(normalized(fitted, transform_batch=["b0", "b2"]), (each[0] + each[2]) / 2, **FLOAT32)
    np.testing.assert_allclose(normalized(fitted, transform_batch=("b0", "b1", "b2")), sum(each) / 3, **FLOAT32)
    np.testing.assert_allclose(
        normalized(fitted, transform_batch=fitted.obs["batch"].cat.categories), sum(each) / 3, **FLOAT32
    )


def test_batches_that_are_numbers_are_named_as_numbers(counts):
    counts.obs["batch"] = np.arange(201) % 3 + 7
    sx.pp.setup_anndata(counts, batch_key="batch")
    sx.tl.fit(counts, **QUICK)
    np.testing.assert_array_equal(normalized(counts, transform_batch=8), normalized(counts, transform_batch="8"))
    np.testing.assert_array_equal(
        normalized(counts, transform_batch=[8, 9]), normalized(counts, transform_batch=["8", "9"])
    )


def test_a_list_of_genes_is_written_as_a_table(fitted):
    genes = ["gene7", "gene0", "gene59"]
    whole = normalized(fitted, n_samples=2)
    sx.tl.get_normalized_expression(fitted, n_samples=2, gene_list=genes)
    table = fitted.obsm["scvi_normalized"]
    assert list(table.columns) == genes
    assert table.index.equals(fitted.obs_names)
    np.testing.assert_array_equal(table.to_numpy(), whole[:, [7, 0, 59]])
    assert "scvi_normalized" not in fitted.layers
    sx.tl.get_normalized_expression(fitted, gene_list="gene3", key_added="one", indices=[4, 5])
    assert fitted.obsm["one"].shape == (201, 1)
    assert fitted.obsm["one"]["gene3"].notna().sum() == 2


def test_samples_are_returned_and_their_mean_is_what_is_written(fitted):
    samples = sx.tl.get_normalized_expression(fitted, n_samples=5, return_mean=False)
    assert samples.shape == (5, 201, 60)
    assert samples.dtype == np.float32
    assert "scvi_normalized" not in fitted.layers
    np.testing.assert_allclose(samples.mean(0), normalized(fitted, n_samples=5), **FLOAT32)
    assert len(np.unique(samples[:, 0, 0])) == 5
    some = sx.tl.get_normalized_expression(
        fitted, n_samples=2, return_mean=False, gene_list=["gene4", "gene1"], indices=[0, 8, 9], batch_size=2
    )
    assert some.shape == (2, 3, 2)
    one = sx.tl.get_normalized_expression(fitted, return_mean=False)
    np.testing.assert_array_equal(one[0], normalized(fitted))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"transform_batch": "b3"}, ValueError, r"transform_batch='b3' is not one of 'b0', 'b1', 'b2'\."),
        ({"transform_batch": ["b0", "x"]}, ValueError, r"transform_batch='x' is not one of 'b0', 'b1', 'b2'"),
        ({"transform_batch": []}, ValueError, "transform_batch is an empty list: name at least one batch"),
        ({"gene_list": ["gene1", "XIST"]}, KeyError, "1 of the 2 genes in gene_list are not in the fit: 'XIST'"),
        ({"gene_list": []}, ValueError, "gene_list is empty: name at least one gene, or None for all"),
        ({"gene_list": ["gene1", "gene1"]}, ValueError, "gene_list has genes more than once: 'gene1'"),
        ({"library_size": 0}, ValueError, "library_size=0 must be positive, or 'latent'"),
        ({"library_size": np.inf}, ValueError, "library_size=inf must be positive"),
        ({"library_size": "observed"}, ValueError, "library_size='observed' is not one of 'latent'"),
        ({"weights": "uniform", "n_samples": 5}, ValueError, "weights='uniform' is not one of 'importance'"),
        ({"weights": "importance"}, ValueError, "weights='importance' has no effect: it weighs samples"),
        (
            {"weights": "importance", "n_samples": 5, "return_mean": False},
            ValueError,
            "weights='importance' has no effect",
        ),
        ({"return_mean": False, "copy": True}, ValueError, "return_mean=False returns an array and writes nothing"),
        ({"return_mean": False, "key_added": "a"}, ValueError, "return_mean=False returns an array and writes nothing"),
    ],
    ids=str,
)
def test_expression_that_cannot_be_is_refused(fitted, options, error, message):
    with pytest.raises(error, match=message):
        sx.tl.get_normalized_expression(fitted, **options)
    assert not fitted.layers
    assert not fitted.obsm


def test_without_batches_there_is_none_to_decode_in(counts):
    sx.pp.setup_anndata(counts)
    sx.tl.fit(counts, **QUICK)
    with pytest.raises(ValueError, match="transform_batch='b0' has no meaning: fit 'scvi' knows no batches"):
        sx.tl.get_normalized_expression(counts, transform_batch="b0")


# ---- parameters of the counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "layers", "var"),
    [
        ("zinb", {"scvi_mean", "scvi_dropout"}, True),
        ("nb", {"scvi_mean"}, True),
        ("normal", {"scvi_mean"}, True),
        ("poisson", {"scvi_mean"}, False),
        ("bernoulli", {"scvi_mean"}, False),
    ],
)
def test_a_distribution_has_the_parameters_it_has(fit_with, loss, layers, var):
    adata = fit_with(reconstruction_loss=loss)
    sx.tl.get_likelihood_parameters(adata)
    assert set(adata.layers) == layers
    assert ("scvi_dispersion" in adata.var) is var
    assert (adata.layers["scvi_mean"] > 0).all()
    if "scvi_dropout" in layers:
        assert ((adata.layers["scvi_dropout"] > 0) & (adata.layers["scvi_dropout"] < 1)).all()


@pytest.mark.parametrize(
    ("dispersion", "column"), [("gene-batch", "batch"), ("gene-label", "cell_type"), ("gene-cell", None)]
)
@pytest.mark.parametrize("model", WITH_DISPERSION)
def test_a_dispersion_that_differs_between_cells_is_a_layer(fit_with, model, dispersion, column):
    adata = fit_with(model, dispersion=dispersion)
    sx.tl.get_likelihood_parameters(adata)
    theta = adata.layers["scvi_dispersion"]
    assert "scvi_dispersion" not in adata.var
    assert (theta > 0).all()
    if column is None:
        assert len(np.unique(theta[:, 0])) > 190
    else:
        fitted_theta = np.exp(adata.uns["scvi_ext"]["fits"]["scvi"]["state"]["dispersion.log_theta"])
        np.testing.assert_allclose(theta, fitted_theta[adata.obs[column].cat.codes], **FLOAT32)


def test_the_mean_is_the_normalized_expression_at_the_library_of_the_cell(fitted):
    sx.tl.get_likelihood_parameters(fitted, n_samples=3, seed=4)
    np.testing.assert_allclose(
        fitted.layers["scvi_mean"], normalized(fitted, library_size="latent", n_samples=3, seed=4), **FLOAT32
    )


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize("loss", ["zinb", "nb"])
def test_parameters_and_counts_give_the_reconstruction_error(fit_with, loss, dispersion):
    """With the same seed both see the same posterior samples, so SciPy's log-probabilities must add up to the error."""
    adata = fit_with(reconstruction_loss=loss, dispersion=dispersion)
    sx.tl.get_likelihood_parameters(adata, seed=2)
    sx.tl.get_reconstruction_error(adata, seed=2, return_mean=False)
    x, mean = adata.X.toarray().astype(float), adata.layers["scvi_mean"].astype(float)
    theta = adata.var["scvi_dispersion"].to_numpy() if dispersion == "gene" else adata.layers["scvi_dispersion"]
    log_prob = nbinom.logpmf(x, theta.astype(float), theta / (theta + mean))
    if loss == "zinb":
        dropout = adata.layers["scvi_dropout"].astype(float)
        log_prob = np.logaddexp(np.log(dropout) + np.where(x == 0, 0, -np.inf), np.log1p(-dropout) + log_prob)
    # parameters have gone through float32, each of 60 genes adds its error, and the formula has 1e-8 in its logarithms
    np.testing.assert_allclose(adata.obs["scvi_reconstruction_error"], -log_prob.sum(1), rtol=1e-4)


def test_dropout_is_a_probability(fitted):
    sx.tl.get_likelihood_parameters(fitted, seed=3)
    module, cells = sx.get.model(fitted), minibatch(fitted)
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((201, 1, 5), dtype=np.float32))[:, 0]
    with torch.no_grad():
        z, log_library = module.draw(cells, module.posteriors(cells), noise)
        logits = module.decode(z, cells, log_library).dropout_logits.numpy()
    np.testing.assert_allclose(fitted.layers["scvi_dropout"], expit(logits), **FLOAT32)


# ---- library size --------------------------------------------------------------------------------------------------


def test_an_observed_library_is_the_sum_of_the_counts(fit_with):
    adata = fit_with(library="observed")
    sx.tl.get_library_size(adata)
    np.testing.assert_allclose(adata.obs["scvi_library_size"], adata.X.toarray().sum(1), rtol=1e-5)


def test_a_given_library_is_the_size_factor(fit_with):
    adata = fit_with(library="size_factor")
    sx.tl.get_library_size(adata)
    np.testing.assert_allclose(adata.obs["scvi_library_size"], adata.obs["size"], rtol=1e-5)


def test_a_latent_library_is_the_mean_of_the_log_normal(fit_with):
    adata = fit_with(library="latent")
    sx.tl.get_library_size(adata)
    with torch.no_grad():
        ql = sx.get.model(adata).encode_library(minibatch(adata))
    loc, sd = ql.loc.numpy().ravel().astype(float), ql.scale.numpy().ravel().astype(float)
    # E exp(l) by quadrature
    z = np.linspace(-10, 10, 4001)
    expected = np.trapezoid(norm.pdf(z) * np.exp(loc[:, None] + sd[:, None] * z), z, axis=1)
    np.testing.assert_allclose(adata.obs["scvi_library_size"], expected, rtol=1e-5)


# ---- loadings ------------------------------------------------------------------------------------------------------


def test_loadings_are_what_a_step_in_the_latent_space_does(fitted):
    sx.tl.get_loadings(fitted, key="ldvae")
    loadings = fitted.varm["ldvae_loadings"]
    assert loadings.shape == (60, 4)
    assert loadings.dtype == np.float32
    module, cells = sx.get.model(fitted, "ldvae"), minibatch(fitted)
    with torch.no_grad():
        z = module.encode(cells).loc
        for unit in range(4):
            step = torch.zeros(4)
            step[unit] = 1
            change = torch.log(module.decode(z + step, cells).scale) - torch.log(module.decode(z, cells).scale)
            # the softmax takes away what is common to all genes
            centred = (change - change.mean(1, keepdim=True)).numpy()
            expected = loadings[:, unit] - loadings[:, unit].mean()
            np.testing.assert_allclose(
                centred, np.tile(expected, (201, 1)), rtol=1e-3, atol=1e-4
            )  # differences of logs


def test_loadings_are_found_by_name_and_are_nan_for_other_genes(fitted, with_genes):
    sx.tl.get_loadings(fitted, key="ldvae", key_added="mine")
    names = ["new", *fitted.var_names[::-1]]
    other = with_genes(fitted, names)
    assert sx.tl.get_loadings(other, key="ldvae") is None
    found = other.varm["ldvae_loadings"]
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1:], fitted.varm["mine"][::-1])
    assert "ldvae_loadings" not in fitted.varm
    copy = sx.tl.get_loadings(fitted, key="ldvae", copy=True)
    assert "ldvae_loadings" in copy.varm
    assert "ldvae_loadings" not in fitted.varm


def test_a_network_without_loadings_is_refused_with_those_that_have_them(fitted):
    with pytest.raises(
        ValueError, match="not possible with a 'scvi' fit, which has no 'get_loadings'; models that have it: 'ldvae'"
    ):
        sx.tl.get_loadings(fitted)
    assert not fitted.varm


# ---- evidence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [1, 4])
def test_elbo_is_reconstruction_less_the_divergence(fitted, n_samples):
    options = {"n_samples": n_samples, "seed": 1, "return_mean": False}
    sx.tl.get_elbo(fitted, **options)
    sx.tl.get_reconstruction_error(fitted, **options)
    sx.tl.get_latent(fitted, return_dist=True)
    loc, var = fitted.obsm["X_scvi"].astype(float), fitted.obsm["X_scvi_var"].astype(float)
    kl = 0.5 * (var + loc**2 - 1 - np.log(var)).sum(1)
    np.testing.assert_allclose(fitted.obs["scvi_elbo"], -fitted.obs["scvi_reconstruction_error"] - kl, rtol=1e-5)


def test_elbo_of_a_latent_library_pays_for_it_too(fit_with):
    adata = fit_with(library="latent")
    sx.tl.get_elbo(adata, return_mean=False)
    sx.tl.get_reconstruction_error(adata, return_mean=False)
    sx.tl.get_latent(adata, return_dist=True)
    with torch.no_grad():
        ql = sx.get.model(adata).encode_library(minibatch(adata))
    loc, var = adata.obsm["X_scvi"].astype(float), adata.obsm["X_scvi_var"].astype(float)
    kl_z = 0.5 * (var + loc**2 - 1 - np.log(var)).sum(1)
    log_totals = np.log(adata.X.toarray().sum(1))
    prior = [
        (log_totals[adata.obs["batch"] == b].mean(), log_totals[adata.obs["batch"] == b].var())
        for b in ("b0", "b1", "b2")
    ]
    m, v = np.array(prior)[adata.obs["batch"].cat.codes].T
    l, s2 = ql.loc.numpy().ravel().astype(float), ql.scale.numpy().ravel().astype(float) ** 2
    kl_library = 0.5 * (s2 / v + (l - m) ** 2 / v - 1 - np.log(s2 / v))
    expected = -adata.obs["scvi_reconstruction_error"] - kl_z - kl_library
    np.testing.assert_allclose(adata.obs["scvi_elbo"], expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"library": "latent"}, {"latent_distribution": "ln"}], ids=str)
def test_evidence_is_at_least_its_lower_bound(fit_with, options):
    adata = fit_with(**options)
    elbo = sx.tl.get_elbo(adata, n_samples=50)
    few, many = (sx.tl.get_marginal_ll(adata, n_mc_samples=n) for n in (5, 500))
    assert elbo < few < many < 0  # the bound of importance weighting rises with the samples (Burda et al. 2016)


# ---- against exact integration, on a model with one latent unit ----------------------------------------------------

GRID = np.linspace(-9, 9, 1801)
CELLS = slice(0, 40)


class Quadrature:
    """What exact integration says about cells of a fit with one latent unit."""

    def __init__(self, module, cells):
        n = len(cells.x)
        with torch.no_grad():
            qz = module.encode(cells)
            z = torch.from_numpy(GRID).float().reshape(-1, 1, 1).expand(-1, n, 1)
            px = module.decode(z, cells, torch.log(cells.x.sum(1, keepdim=True)).expand(len(GRID), -1, -1))
            log_likelihood = module.log_likelihood(cells.x, px).double().numpy()  # grid x cells
        loc, sd = (t.double().numpy().ravel() for t in qz)
        log_joint = log_likelihood + norm.logpdf(GRID)[:, None]
        self.profiles = px.scale.double().numpy()  # grid x cells x genes
        self.log_evidence = logsumexp(log_joint, axis=0) + np.log(GRID[1] - GRID[0])
        self.posterior = np.exp(log_joint - self.log_evidence)
        # Where samples of q come to lie but once in 1.7 million times. Beyond, weights p(x, z) / q(z) have no bound.
        reached = np.abs(GRID[:, None] - loc) < 5 * sd
        log_weight = log_joint - self.log_evidence - norm.logpdf(GRID[:, None], loc, sd)
        self.posterior_over_q = np.exp(np.where(reached, log_weight, -np.inf))
        self.weight_variance = self.under_posterior(self.posterior_over_q) - 1
        # Importance sampling can only see what q covers: of these cells, all of the posterior, with moderate weights.
        self.covered = (self.under_posterior(reached) > 0.9999) & (self.weight_variance < 20)

    def under_posterior(self, values):
        """E[values | x] of each cell; values on grid x cells (x genes)."""
        posterior = self.posterior if values.ndim == 2 else self.posterior[:, :, None]
        return np.trapezoid(posterior * values, GRID, axis=0)


@pytest.fixture
def line(counts):
    sx.pp.setup_anndata(counts, batch_key="batch")
    sx.tl.fit(counts, n_latent=1, n_hidden=16, max_epochs=150)
    quadrature = Quadrature(sx.get.model(counts), minibatch(counts[CELLS].copy()))
    everything = np.ones((len(GRID), 40))
    np.testing.assert_allclose(quadrature.under_posterior(everything), 1, rtol=1e-6)  # the grid is wide enough
    assert quadrature.covered.sum() > 20
    return counts, quadrature


def test_marginal_likelihood_is_the_integral(line):
    adata, exact = line
    n = 4000
    sx.tl.get_marginal_ll(adata, indices=CELLS, n_mc_samples=n, return_mean=False)
    error = np.abs(adata.obs["scvi_marginal_ll"].to_numpy()[CELLS] - exact.log_evidence)
    # standard error of the log of a mean, and 1e-3 for sums of float32 around 100
    assert (error < N_STANDARD_ERRORS * np.sqrt(exact.weight_variance / n) + 1e-3)[exact.covered].all()
    mean = exact.log_evidence.mean()
    assert sx.tl.get_marginal_ll(adata, indices=CELLS, n_mc_samples=n) == pytest.approx(mean, abs=0.05)
    assert sx.tl.get_elbo(adata, indices=CELLS, n_samples=200) < mean - 0.05


def test_importance_weights_lead_to_the_exact_posterior_mean(line):
    adata, exact = line
    expected = exact.under_posterior(exact.profiles)
    n = 2000
    options = {"indices": CELLS, "library_size": 1, "n_samples": n}
    weighted = np.abs(normalized(adata, weights="importance", **options)[CELLS] - expected)[exact.covered]
    plain = np.abs(normalized(adata, **options)[CELLS] - expected)[exact.covered]
    # delta method: the variance of sum(w f) / sum(w) is E_q[w^2 (f - mean)^2] / n
    variance = exact.under_posterior(exact.posterior_over_q[:, :, None] * (exact.profiles - expected) ** 2) / n
    assert (weighted < N_STANDARD_ERRORS * np.sqrt(variance)[exact.covered] + 1e-6).all()
    assert weighted.mean() < 0.5 * plain.mean()  # without weights the mean stays that of q
