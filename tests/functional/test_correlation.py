from __future__ import annotations

import numpy as np
import pytest
from _tolerances import FLOAT64
from scipy import stats

from scvi_ext.functional import correlation


@pytest.fixture
def values():
    """Counts with many ties, a column of large numbers that hardly vary, and a column that follows another one."""
    rng = np.random.default_rng(0)
    x = rng.poisson(2.0, (300, 7)).astype(np.float32)
    x[:, 3] = 1e4 + rng.normal(size=300)
    x[:, 4] = -2 * x[:, 0] + 0.1 * x[:, 1]
    return x


@pytest.mark.parametrize("rows", [1, 7, 100, 300, 1000])
def test_pearson_is_numpy_s_however_rows_come(values, rows):
    found = correlation.pearson(values[i : i + rows] for i in range(0, len(values), rows))
    np.testing.assert_allclose(found, np.corrcoef(values.astype(float), rowvar=False), **FLOAT64)


@pytest.mark.parametrize("floats", [1, 100, 2**23])
def test_spearman_is_scipy_s(values, monkeypatch, floats):
    monkeypatch.setattr(correlation, "_FLOATS", floats)
    expected = stats.spearmanr(values).statistic
    found = correlation.spearman(values.copy())
    # a diagonal of ones is the product of two roundings here
    np.testing.assert_allclose(found, expected, **FLOAT64)


def test_a_constant_column_correlates_with_nothing(values):
    values[:, 2], values[:, 5] = 0, 0.1
    for found in (correlation.pearson([values[:100], values[100:]]), correlation.spearman(values.copy())):
        constant = np.isin(np.arange(7), [2, 5])
        assert np.isnan(found[constant]).all()
        assert np.isnan(found[:, constant]).all()
        assert np.isfinite(found[~constant][:, ~constant]).all()


def test_it_stays_within_one(values):
    values[:, 1] = 3 * values[:, 0]
    found = correlation.pearson([values])
    assert found[0, 1] == pytest.approx(1, rel=1e-12)
    assert np.abs(found).max() <= 1
