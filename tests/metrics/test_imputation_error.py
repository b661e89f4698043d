"""Any layer is judged by the measures of ``tl.imputation_score``."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from _tolerances import FLOAT32

import scvi_ext as sx


@pytest.fixture
def corrupted(counts):
    """201 cells x 60 genes, of whose entries half have lost most of their molecules."""
    sx.pp.corrupt(counts, rate=0.5, method="binomial")
    return counts


def test_it_agrees_with_the_score_of_a_fit(corrupted):
    sx.pp.setup_anndata(corrupted, layer="corrupted", batch_key="batch")
    sx.tl.fit(corrupted, max_epochs=2, n_hidden=8, n_latent=3)
    sx.tl.get_likelihood_parameters(corrupted)
    sx.tl.imputation_score(corrupted)
    scores = sx.get.imputation_df(corrupted)
    for layer, method in {"scvi_mean": "fit", "corrupted": "no imputation"}.items():
        found = sx.metrics.imputation_error(corrupted, layer)
        pd.testing.assert_series_equal(found, scores.loc[method], check_names=False, **FLOAT32)


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_it_is_a_loop_over_the_entries_that_differ(corrupted, kind):
    original, changed = corrupted.X.toarray(), corrupted.layers["corrupted"].toarray()
    imputed = np.random.default_rng(0).gamma(2, 1, original.shape)
    imputed[::3] = 0
    corrupted.layers["mine"] = kind(imputed)
    rows = np.array([5, 0, 130, 17])
    for indices, part in {None: slice(None), "rows": rows}.items():
        where = (original != changed)[part]
        error = np.where(where, np.abs(original - imputed)[part], np.nan)
        found = sx.metrics.imputation_error(corrupted, "mine", indices=None if indices is None else rows)
        of_cells, of_genes = error[where.any(1)], error[:, where.any(0)]
        expected = [
            np.nanmedian(error),
            np.nanmean(error),
            np.nanmedian(of_cells, axis=1).mean(),
            np.nanmedian(of_genes, axis=0).mean(),
        ]
        assert found.index.tolist() == ["median", "mean", "median_per_cell", "median_per_gene"]
        np.testing.assert_allclose(found, expected, **FLOAT32)


def test_the_originals_have_no_error(corrupted):
    assert (sx.metrics.imputation_error(corrupted) == 0).all()


def test_nothing_is_written(corrupted):
    before = corrupted.copy()
    sx.metrics.imputation_error(corrupted, "corrupted")
    assert set(corrupted.uns) == set(before.uns)
    assert list(corrupted.layers) == ["corrupted"]


def test_values_that_are_missing_matter_only_where_something_was_changed(corrupted):
    changed = (corrupted.X != corrupted.layers["corrupted"]).toarray()
    layer = corrupted.X.toarray()
    layer[~changed] = np.nan
    corrupted.layers["mine"] = layer
    assert (sx.metrics.imputation_error(corrupted, "mine") == 0).all()
    layer[3:5] = np.nan
    with pytest.raises(ValueError, match=rf"adata\.layers\['mine'\] is NaN or infinite at {changed[3:5].sum()} of"):
        sx.metrics.imputation_error(corrupted, "mine")
    assert (sx.metrics.imputation_error(corrupted, "mine", indices=slice(10, None)) == 0).all()


def test_what_is_not_there_is_said(corrupted):
    with pytest.raises(KeyError, match=r"'magic' is not in adata\.layers, which has: 'corrupted'"):
        sx.metrics.imputation_error(corrupted, "magic")
    with pytest.raises(KeyError, match=r"'other' is not in"):
        sx.metrics.imputation_error(corrupted, "corrupted", corruption="other")
    for nobody in ([], np.zeros(201, bool)):
        with pytest.raises(ValueError, match="There are no cells"):
            sx.metrics.imputation_error(corrupted, "corrupted", indices=nobody)
    with pytest.raises(ValueError, match="There are no cells"):
        sx.metrics.imputation_error(corrupted[:0].copy(), "corrupted")
    sx.pp.restore(corrupted)
    with pytest.raises(KeyError, match=r"has no corruptions: call scvi_ext\.pp\.corrupt"):
        sx.metrics.imputation_error(corrupted)


def test_layers_of_a_corruption_that_are_gone_are_called_what_they_were(counts):
    counts.layers["raw"] = counts.X.copy()
    sx.pp.corrupt(counts, layer="raw")
    layers = dict(counts.layers)
    for name, role in {
        "raw": "the originals of the corruption 'corrupted'",
        "corrupted": "which pp.corrupt wrote",
    }.items():
        counts.layers.pop(name)
        with pytest.raises(KeyError, match=rf"'{name}', {role}, is not in adata\.layers"):
            sx.metrics.imputation_error(counts)
        counts.layers[name] = layers[name]
