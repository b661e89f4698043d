"""Data sets with fixed seeds against the laws they are documented to follow.

``LEVEL`` and ``SIGMAS`` are set so that a right program with a fresh seed would fail less than once in 10^6.
"""

from __future__ import annotations

from inspect import signature

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.sparse import csr_matrix

from scvi_ext.datasets import (
    synthetic_cite,
    synthetic_corr,
    synthetic_iid,
    synthetic_random,
    synthetic_zero_inflated,
    synthetic_zi_corr,
)

GENERATORS = [
    synthetic_iid,
    synthetic_random,
    synthetic_corr,
    synthetic_zi_corr,
    synthetic_cite,
    synthetic_zero_inflated,
]
ZERO_INFLATED = [synthetic_iid, synthetic_random, synthetic_zi_corr]
LEVEL = 1e-7  # of a chi-square test; some ten of them are made here
SIGMAS = 6  # 2e-9 two-sided

each = pytest.mark.parametrize("generate", GENERATORS)


def assert_follows(sample, law):
    """Chi-square test of counts against a frozen scipy law, with tails pooled to at least 20 expected."""
    sample = np.asarray(sample).ravel()
    values = np.arange(int(sample.max()) + 1)
    common = values[law.pmf(values) * sample.size >= 20]
    low, high = common[0], common[-1]
    seen = [(sample == value).sum() for value in common]
    expected = law.pmf(common) * sample.size
    seen += [(sample < low).sum(), (sample > high).sum()]
    expected = np.append(expected, [law.cdf(low - 1) * sample.size, law.sf(high) * sample.size])
    keep = expected > 1
    assert expected[~keep].sum() < 1
    statistic = ((np.asarray(seen) - expected)[keep] ** 2 / expected[keep]).sum()
    assert stats.chi2.sf(statistic, keep.sum() - 1) > LEVEL


def assert_share(hits, probability):
    hits = np.asarray(hits)
    assert abs(hits.mean() - probability) <= SIGMAS * np.sqrt(probability * (1 - probability) / hits.size)


@each
def test_layout(generate):
    adata = generate()
    n_cells, n_genes = adata.shape
    assert isinstance(adata.X, csr_matrix)
    assert adata.X.dtype == np.float32
    assert adata.X.has_canonical_format
    assert adata.X.data.min() >= 1  # no stored zeros
    np.testing.assert_array_equal(adata.X.data, np.rint(adata.X.data))
    assert list(adata.obs_names) == [f"cell_{i}" for i in range(n_cells)]
    assert list(adata.var_names) == [f"gene_{i}" for i in range(n_genes)]
    for column in adata.obs:
        assert isinstance(adata.obs[column].dtype, pd.CategoricalDtype)


@each
def test_seed_decides_everything_and_the_global_generator_is_left_alone(generate, assert_same):
    before = np.random.get_state()
    first = generate(seed=3)
    after = np.random.get_state()
    np.testing.assert_array_equal(after[1], before[1])
    assert after[2:] == before[2:]

    np.random.random()
    again, other = generate(seed=3), generate(seed=4)
    assert_same(again, first)
    assert (other.X.toarray()[:100] != first.X.toarray()[:100]).mean() > 0.1


@each
def test_truth_survives_h5ad_and_zarr(generate, roundtrip, assert_same):
    adata = generate()
    assert_same(roundtrip(adata), adata)


@each
def test_truth_survives_copy_and_subset(generate, assert_same):
    adata = generate()
    assert_same(adata.copy(), adata)
    subset = adata[::3, 1::2].copy()
    for name, layer in adata.layers.items():
        assert_same(subset.layers[name], layer[::3, 1::2])


@pytest.mark.parametrize("generate", ZERO_INFLATED)
def test_a_technical_zero_is_a_zero(generate):
    adata = generate()
    is_technical = adata.layers["is_technical"]
    assert isinstance(is_technical, csr_matrix)
    assert is_technical.dtype == bool
    assert not adata.X.toarray()[is_technical.toarray()].any()
    assert (adata.X.toarray()[~is_technical.toarray()] == 0).any()  # and biological ones exist


# iid


def test_iid_sizes():
    adata = synthetic_iid(n_cells_batch=7, n_genes=5, n_proteins=4, n_batches=3, n_labels=2)
    assert adata.shape == (21, 5)
    assert list(adata.obs["batch"]) == ["batch_0"] * 7 + ["batch_1"] * 7 + ["batch_2"] * 7
    assert list(adata.obs["labels"].cat.categories) == ["label_0", "label_1"]
    protein = adata.obsm["protein_expression"]
    assert protein.index.equals(adata.obs_names)
    assert list(protein.columns) == [f"protein_{i}" for i in range(4)]
    assert (protein.dtypes == np.int64).all()


def test_iid_without_proteins_has_the_same_counts():
    adata = synthetic_iid(n_proteins=0)
    assert not adata.obsm
    np.testing.assert_array_equal(adata.X.toarray(), synthetic_iid().X.toarray())


def test_iid_law():
    adata = synthetic_iid(n_cells_batch=400)
    x, is_technical = adata.X.toarray(), adata.layers["is_technical"].toarray()
    law = stats.nbinom(5, 0.3)
    assert_share(is_technical, 0.3)
    assert_follows(x[~is_technical], law)
    assert_follows(adata.obsm["protein_expression"], law)
    assert_share(adata.obs["labels"] == "label_0", 1 / 3)
    np.testing.assert_allclose(adata.var["rate"], law.mean(), rtol=1e-12)  # both computed in float64
    rate, theta = adata.var["rate"], adata.var["theta"]
    np.testing.assert_allclose(rate + rate**2 / theta, law.var(), rtol=1e-12)
    np.testing.assert_array_equal(adata.var["dropout"], 0.3)


def test_iid_has_no_batch_or_label_effect():
    adata = synthetic_iid(n_cells_batch=400)
    x = adata.X.toarray()
    for column, a, b in [("batch", "batch_0", "batch_1"), ("labels", "label_0", "label_1")]:
        groups = [x[(adata.obs[column] == name).to_numpy()] for name in (a, b)]
        difference = groups[0].mean() - groups[1].mean()
        error = np.sqrt(sum(group.var() / group.size for group in groups))
        assert abs(difference) <= SIGMAS * error


# random


@pytest.mark.parametrize("parameters", [{}, {"mu": 1.5, "theta": 0.5, "dropout": 0.2}, {"dropout": 0.0}])
def test_random_law(parameters):
    adata = synthetic_random(n_cells=500, n_genes=200, **parameters)
    assert adata.shape == (500, 200)  # with 200 genes an empty cell has probability below 1e-20
    mu, theta, dropout = ({"mu": 4.0, "theta": 2.0, "dropout": 0.7} | parameters).values()
    is_technical = adata.layers["is_technical"].toarray()
    assert_share(is_technical, dropout)
    assert_follows(adata.X.toarray()[~is_technical], stats.nbinom(theta, theta / (theta + mu)))
    for name, value in {"rate": mu, "theta": theta, "dropout": dropout}.items():
        np.testing.assert_array_equal(adata.var[name], value)
        assert adata.var[name].dtype == np.float64


def test_random_leaves_out_empty_cells():
    adata = synthetic_random()
    assert adata.n_vars == 10
    assert adata.X.sum(axis=1).min() >= 1
    p_zero = 0.7 + 0.3 * stats.nbinom(2, 2 / 6).pmf(0)
    p_kept = 1 - p_zero**10
    assert abs(adata.n_obs - 2000 * p_kept) <= SIGMAS * np.sqrt(2000 * p_kept * (1 - p_kept))


def test_random_refuses_to_return_nothing():
    with pytest.raises(ValueError, match="None of 3 cells has a count"):
        synthetic_random(mu=1e-12, n_cells=3, n_genes=1)


# corr


@pytest.mark.parametrize("n_overlap", [0, 2])
def test_corr_blocks_and_rates(n_overlap):
    adata = synthetic_corr(
        n_cells_cluster=6, n_clusters=4, n_genes_high=5, n_overlap=n_overlap, weight_high=3, weight_low=0.5, lam_0=90
    )
    step = 5 - n_overlap
    assert adata.shape == (24, 4 * step + n_overlap)
    assert list(adata.obs["labels"]) == np.repeat([f"label_{k}" for k in range(4)], 6).tolist()
    is_high = adata.varm["is_high"]
    assert list(is_high.columns) == list(adata.obs["labels"].cat.categories)
    for k in range(4):
        assert is_high.index[is_high[f"label_{k}"]].tolist() == [f"gene_{g}" for g in range(k * step, k * step + 5)]
    shared = is_high["label_0"] & is_high["label_1"]
    assert shared.sum() == n_overlap

    rate = adata.layers["rate"]
    assert rate.dtype == np.float32
    np.testing.assert_allclose(rate.sum(axis=1), 90, rtol=1e-5)  # a float32 sum of some twenty terms
    for row, label in zip(rate, adata.obs["labels"], strict=True):
        high = is_high[label].to_numpy()
        np.testing.assert_allclose(row[high], 6 * row[~high][0], rtol=1e-6)  # float32
        np.testing.assert_array_equal(row[~high], row[~high][0])


def test_corr_law():
    adata = synthetic_corr(n_cells_cluster=400)
    assert adata.shape == (1200, 75)
    x, rate = adata.X.toarray(), adata.layers["rate"]
    assert_follows(x[rate > 1], stats.poisson(4 / 3))
    assert_follows(x[rate < 1], stats.poisson(1 / 3))
    assert_follows(x.sum(axis=1), stats.poisson(50))


def test_corr_has_its_name_from_genes_of_one_block():
    """Between cells, rates differ by 1 between clusters: covariance 2/9 within a block, -1/9 across."""
    x = synthetic_corr(n_cells_cluster=400).X.toarray()
    covariance = np.cov(x.T)
    block = np.repeat(np.arange(3), 25)
    same = (block[:, None] == block) & ~np.eye(75, dtype=bool)
    other = block[:, None] != block
    # standard deviation over 120 seeds: 0.0034 and 0.0017, so both tolerances are beyond six of them
    np.testing.assert_allclose(covariance[same].mean(), 2 / 9, rtol=0, atol=0.021)
    np.testing.assert_allclose(covariance[other].mean(), -1 / 9, rtol=0, atol=0.011)


# zi_corr


def test_zi_corr_is_corr_with_technical_zeros():
    adata, clean = synthetic_zi_corr(seed=5, n_overlap=3), synthetic_corr(seed=5, n_overlap=3)
    kept = ~adata.layers["is_technical"].toarray()
    np.testing.assert_array_equal(adata.X.toarray(), np.where(kept, clean.X.toarray(), 0))
    np.testing.assert_array_equal(adata.layers["rate"], clean.layers["rate"])
    pd.testing.assert_frame_equal(adata.obs, clean.obs)
    pd.testing.assert_frame_equal(adata.varm["is_high"], clean.varm["is_high"])


@pytest.mark.parametrize(("lam_high", "lam_low"), [(0.0, 0.0), (0.5, 3.0)])
def test_zi_corr_law(lam_high, lam_low):
    adata = synthetic_zi_corr(
        n_cells_cluster=400,
        dropout_coef_high=0.4,
        dropout_coef_low=0.6,
        lam_dropout_high=lam_high,
        lam_dropout_low=lam_low,
    )
    rate, is_technical = adata.layers["rate"], adata.layers["is_technical"].toarray()
    dropout = adata.layers["dropout"]
    assert dropout.dtype == np.float32
    high = rate > 1
    for group, rate_of_group, coefficient, lam in [(high, 4 / 3, 0.4, lam_high), (~high, 1 / 3, 0.6, lam_low)]:
        expected = coefficient * np.exp(-lam * rate_of_group**2)
        np.testing.assert_allclose(dropout[group], expected, rtol=1e-5)  # float32
        assert_share(is_technical[group], expected)
        # technical zeros do not look at the count they erase
        assert_follows(adata.X.toarray()[group & ~is_technical], stats.poisson(rate_of_group))


def test_zi_corr_defaults():
    adata = synthetic_zi_corr()
    assert adata.shape == (600, 75)
    np.testing.assert_array_equal(np.unique(adata.layers["dropout"]), np.float32([0.05, 0.08]))
    none = synthetic_zi_corr(dropout_coef_high=0, dropout_coef_low=0)
    assert none.layers["is_technical"].nnz == 0
    np.testing.assert_array_equal(none.X.toarray(), synthetic_corr().X.toarray())


# cite


def tables(adata):
    return [adata.obsm[name].to_numpy() for name in ("protein_expression", "is_foreground", "background", "foreground")]


def test_cite_sizes():
    adata = synthetic_cite(n_cells_batch=7, n_genes=5, n_proteins=4, n_batches=3, n_types=2)
    assert adata.shape == (21, 5)
    assert list(adata.obs["batch"]) == ["batch_0"] * 7 + ["batch_1"] * 7 + ["batch_2"] * 7
    assert list(adata.obs["cell_type"].cat.categories) == ["type_0", "type_1"]
    for name, dtype in zip(
        ("protein_expression", "is_foreground", "background", "foreground"),
        (np.int64, bool, np.float64, np.float64),
        strict=True,
    ):
        table = adata.obsm[name]
        assert table.index.equals(adata.obs_names)
        assert list(table.columns) == [f"protein_{i}" for i in range(4)]
        assert (table.dtypes == dtype).all()


def test_cite_law_of_proteins():
    adata = synthetic_cite(n_cells_batch=1000)
    y, is_foreground, background, foreground = tables(adata)
    mean = np.where(is_foreground, foreground, background)
    law = stats.nbinom(10, 10 / (10 + mean))
    # y is somewhere between these two, uniformly if it follows the law
    position = law.cdf(y - 1) + np.random.default_rng(0).random(y.shape) * law.pmf(y)
    assert stats.kstest(position.ravel(), "uniform").pvalue > LEVEL
    ratio = np.log(foreground / background)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[0], ratio.shape), rtol=1e-9)  # one for each protein
    assert (ratio >= np.log(5)).all()
    assert (ratio <= np.log(20)).all()
    for batch in ("batch_0", "batch_1"):
        logs = np.log(background[adata.obs["batch"] == batch])
        assert stats.kstest(((logs - logs.mean(0)) / 0.3).ravel(), "norm").pvalue > LEVEL


def test_cite_proteins_are_expressed_by_some_types():
    adata = synthetic_cite(n_cells_batch=1000)
    shares = adata.obsm["is_foreground"].groupby(adata.obs["cell_type"], observed=True).mean().to_numpy()
    n = adata.obs["cell_type"].value_counts(sort=False).to_numpy()[:, None]
    expressed = shares > 0.5
    expected = np.where(expressed, 0.95, 0.02)
    assert (np.abs(shares - expected) <= SIGMAS * np.sqrt(expected * (1 - expected) / n)).all()
    proteins = np.arange(15)
    assert expressed[proteins % 4, proteins].all()
    assert not expressed[(proteins + 1) % 4, proteins].any()


def test_cite_law_of_genes():
    """Three times as high in the type that a gene belongs to, but for what normalisation makes of it."""
    adata = synthetic_cite(n_cells_batch=2000, n_batches=1)
    x = adata.X.toarray()
    total = x.sum(1)
    # A standard error of 0.3 / sqrt(2000); genes are far from independent of the library, so the median's is larger.
    assert abs(np.log(np.median(total)) - np.log(500)) < SIGMAS * 0.02
    shares = np.array([(x / total[:, None])[adata.obs["cell_type"] == f"type_{k}"].mean(0) for k in range(4)])
    is_marker = np.arange(100) % 4 == np.arange(4)[:, None]
    of_others = np.where(is_marker, np.nan, shares)
    fold = shares[is_marker].sum() / np.nanmean(of_others, 0).sum()
    np.testing.assert_allclose(fold, 3, rtol=0.05)  # normalisers of the four types differ by some percent


def test_cite_hides_a_panel_and_nothing_else():
    adata, whole = synthetic_cite(n_missing=6, seed=2), synthetic_cite(seed=2)
    np.testing.assert_array_equal(adata.X.toarray(), whole.X.toarray())
    for name in ("is_foreground", "background", "foreground"):
        pd.testing.assert_frame_equal(adata.obsm[name], whole.obsm[name])
    hidden = np.zeros((600, 15), bool)
    hidden[300:, 9:] = True
    counts = whole.obsm["protein_expression"].to_numpy()
    np.testing.assert_array_equal(adata.obsm["protein_expression"], np.where(hidden, 0, counts))


# zero_inflated


def test_zero_inflated_sizes():
    adata = synthetic_zero_inflated(n_cells_batch=7, n_genes=5, n_batches=3, n_types=2, share=0.4)
    assert adata.shape == (21, 5)
    assert list(adata.obs["batch"]) == ["batch_0"] * 7 + ["batch_1"] * 7 + ["batch_2"] * 7
    assert list(adata.obs["cell_type"].cat.categories) == ["type_0", "type_1"]
    dropout = adata.varm["dropout"]
    assert dropout.index.equals(adata.var_names)
    assert list(dropout.columns) == ["batch_0", "batch_1", "batch_2"]
    assert (dropout.dtypes == np.float64).all()
    assert ((dropout > 0).sum() == 2).all()
    assert adata.layers["rate"].dtype == np.float32


@pytest.mark.parametrize("by_batch", [False, True])
def test_zero_inflated_genes_are_those_of_all_batches_or_of_each(by_batch):
    dropout = synthetic_zero_inflated(n_cells_batch=1, n_genes=400, n_batches=3, by_batch=by_batch).varm["dropout"]
    first, second = dropout["batch_0"], dropout["batch_1"]
    assert first.equals(second) is not by_batch
    inflated = dropout.to_numpy()[dropout.to_numpy() > 0] if by_batch else first[first > 0]
    assert stats.kstest(inflated, stats.uniform(0.1, 0.5).cdf).pvalue > LEVEL
    if by_batch:  # of half of the genes each, a quarter is inflated in both: hypergeometric
        both = ((first > 0) & (second > 0)).sum()
        law = stats.hypergeom(400, 200, 200)
        assert abs(both - law.mean()) <= SIGMAS * law.std()


def test_zero_inflated_has_so_many_technical_zeros():
    """Beyond what counting explains: the share of zeros is pi + (1 - pi) NB(0), averaged over cells."""
    adata, clean = (synthetic_zero_inflated(n_cells_batch=2000, n_genes=60, share=share, seed=4) for share in (0.5, 0))
    x, whole = adata.X.toarray(), clean.X.toarray()
    np.testing.assert_array_equal(adata.layers["rate"], clean.layers["rate"])
    assert (clean.varm["dropout"] == 0).all(axis=None)
    kept = x > 0
    np.testing.assert_array_equal(x[kept], whole[kept])  # what is left has not changed
    lost = (whole > 0) & ~kept
    dropout = adata.varm["dropout"]["batch_0"].to_numpy()
    assert not lost[:, dropout == 0].any()
    n = (whole > 0).sum(0)
    error = np.sqrt(dropout * (1 - dropout) / np.maximum(n, 1))
    assert (np.abs(lost.sum(0) / n - dropout) <= SIGMAS * error).all()


def test_zero_inflated_law_of_the_others():
    """A negative binomial given the rate: variance rate + rate^2 / theta with theta from 1 to 10."""
    adata = synthetic_zero_inflated(n_cells_batch=4000, n_genes=40, share=0.0)
    x, rate = adata.X.toarray().astype(float), adata.layers["rate"].astype(float)
    residual = x - rate
    assert (np.abs(residual.mean(0)) <= SIGMAS * residual.std(0) / np.sqrt(4000)).all()
    theta = (rate**2).sum(0) / (residual**2 - rate).sum(0)  # by moments; its error is some percent of genes with counts
    many = rate.mean(0) > 3
    assert many.sum() > 10
    assert (theta[many] > 0.6).all()
    assert (theta[many] < 20).all()


# errors


@pytest.mark.parametrize(
    ("generate", "arguments", "message"),
    [
        (synthetic_iid, {"n_cells_batch": 0}, r"n_cells_batch=0 must be 1 or more\."),
        (synthetic_iid, {"n_genes": 0}, r"n_genes=0 must be 1 or more\."),
        (synthetic_iid, {"n_batches": 0}, r"n_batches=0 must be 1 or more\."),
        (synthetic_iid, {"n_labels": 0}, r"n_labels=0 must be 1 or more\."),
        (synthetic_iid, {"n_proteins": -1}, r"n_proteins=-1 must be 0 or more\."),
        (synthetic_random, {"mu": 0}, r"mu=0 is not above 0\."),
        (synthetic_random, {"theta": float("nan")}, r"theta=nan is not above 0\."),
        (synthetic_random, {"dropout": 1.0}, r"dropout=1\.0 is not a probability from 0 to below 1\."),
        (synthetic_random, {"n_cells": 0}, r"n_cells=0 must be 1 or more\."),
        (synthetic_corr, {"n_clusters": 0}, r"n_clusters=0 must be 1 or more\."),
        (synthetic_corr, {"n_overlap": 25}, r"n_overlap=25 is not below n_genes_high=25"),
        (synthetic_corr, {"n_overlap": -1}, r"n_overlap=-1 must be 0 or more\."),
        (synthetic_corr, {"weight_high": 0}, r"weight_high=0 is not above 0\."),
        (synthetic_corr, {"weight_low": -0.1}, r"weight_low=-0\.1 is not at least 0\."),
        (synthetic_corr, {"lam_0": 0}, r"lam_0=0 is not above 0\."),
        (synthetic_zi_corr, {"dropout_coef_high": -0.1}, r"dropout_coef_high=-0\.1 is not a probability"),
        (synthetic_zi_corr, {"dropout_coef_low": 1}, r"dropout_coef_low=1 is not a probability"),
        (synthetic_zi_corr, {"lam_dropout_low": -1}, r"lam_dropout_low=-1 is not at least 0\."),
        (synthetic_zi_corr, {"n_overlap": 30}, r"n_overlap=30 is not below"),
        (synthetic_cite, {"n_types": 1}, r"n_types=1 must be 2 or more\."),
        (synthetic_cite, {"n_missing": -1}, r"n_missing=-1 must be 0 or more\."),
        (synthetic_cite, {"n_missing": 16}, r"n_missing=16 of n_proteins=15 cannot be missing"),
        (synthetic_zero_inflated, {"share": 1.0}, r"share=1\.0 is not a probability from 0 to below 1"),
        (synthetic_zero_inflated, {"least_dropout": -0.1}, r"least_dropout=-0\.1 is not a probability"),
        (synthetic_zero_inflated, {"most_dropout": 0.05}, r"most_dropout=0\.05 is not at least 0\.1"),
        (synthetic_zero_inflated, {"n_types": 0}, r"n_types=0 must be 1 or more\."),
        (synthetic_cite, {"n_missing": 1, "n_batches": 1}, r"cannot be missing in one of n_batches=1"),
    ],
)
def test_values_out_of_range_are_named(generate, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(**arguments)


@each
def test_arguments_of_another_kind_are_named(generate):
    for name, parameter in signature(generate).parameters.items():
        wrong = ["x", None, [1]]
        if not isinstance(parameter.default, bool):
            wrong.append(True)
        if isinstance(parameter.default, int):
            wrong.append(2.5)
        for value in wrong:
            with pytest.raises(TypeError, match=rf"^{name}=.* is a {type(value).__name__}; .* needed\."):
                generate(**{name: value})


@each
def test_arguments_are_by_keyword(generate):
    with pytest.raises(TypeError):
        generate(10)
