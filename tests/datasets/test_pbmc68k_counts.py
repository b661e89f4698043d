from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.sparse import csr_matrix

from scvi_ext.datasets import pbmc68k_counts

ROUNDING = 5e-4 + 1e-6  # scanpy's file has three decimals, in float32


@pytest.fixture(scope="module")
def adata():
    return pbmc68k_counts()


@pytest.fixture(scope="module")
def reduced():
    return sc.datasets.pbmc68k_reduced()


def test_layout(adata, reduced):
    assert adata.shape == (700, 765)
    assert isinstance(adata.X, csr_matrix)
    assert adata.X.dtype == np.float32
    assert adata.X.has_canonical_format
    assert adata.obs_names.equals(reduced.obs_names)
    assert adata.var_names.equals(reduced.raw.var_names)
    assert adata.raw is None
    for slot in (adata.uns, adata.obsm, adata.obsp, adata.varm, adata.layers):
        assert not slot
    assert adata.obs["bulk_labels"].nunique() == 10


def test_counts_are_positive_integers_and_start_at_one_in_each_cell(adata):
    np.testing.assert_array_equal(adata.X.data, np.rint(adata.X.data))
    np.testing.assert_array_equal(np.minimum.reduceat(adata.X.data, adata.X.indptr[:-1]), 1)
    assert adata.X.max() == 259


def test_the_smallest_value_of_a_cell_is_the_same_yardstick_as_its_total(adata, reduced):
    """A second way to the counts that never looks at the totals."""
    raw = reduced.raw.X.toarray().astype(float)
    value = np.expm1(raw)
    in_counts = value / np.where(value > 0, value, np.inf).min(axis=1, keepdims=True)
    np.testing.assert_array_equal(np.rint(in_counts), adata.X.toarray())
    # rounding of y moves exp(y) by 0.05 %, twice (value and yardstick): 0.26 at 259 counts if both were worst
    assert np.abs(in_counts - np.rint(in_counts)).max() <= 0.12


def test_counts_give_back_scanpys_values_and_their_neighbours_do_not(adata, reduced):
    raw = reduced.raw.X.toarray().astype(float)
    x = adata.X.toarray().astype(float)
    per_count = 1e4 / adata.obs["n_counts"].to_numpy(float)[:, None]
    assert np.abs(np.log1p(x * per_count) - raw).max() <= ROUNDING
    seen = x > 0
    for other in (x + 1, x - 1):
        assert np.abs(np.log1p(np.maximum(other, 0) * per_count) - raw)[seen].min() > 3 * ROUNDING


def test_scanpys_own_normalisation_gives_back_its_values(adata, reduced):
    """The genes that are not in the file go in as one more column, so that the totals are those of the whole cell."""
    rest = adata.obs["n_counts"].to_numpy() - adata.X.sum(axis=1).A1
    assert rest.min() > 0
    whole = sc.AnnData(np.column_stack([adata.X.toarray(), rest]))
    sc.pp.normalize_total(whole, target_sum=1e4)
    sc.pp.log1p(whole)
    np.testing.assert_allclose(whole.X[:, :-1], reduced.raw.X.toarray(), rtol=0, atol=ROUNDING)


def test_share_of_all_counts_is_as_documented(adata):
    share = adata.X.sum(axis=1).A1 / adata.obs["n_counts"]
    assert 0.105 <= share.min() <= share.max() <= 0.285


def test_batch_is_the_channel_in_the_barcode(adata):
    assert isinstance(adata.obs["batch"].dtype, pd.CategoricalDtype)
    assert list(adata.obs["batch"].cat.categories) == list("12345678")
    assert all(name.endswith(f"-{batch}") for name, batch in adata.obs["batch"].items())
    # replicates of one sample: the common cell types are in every channel
    cells = pd.crosstab(adata.obs["batch"], adata.obs["bulk_labels"])
    assert (cells[["Dendritic", "CD14+ Monocyte", "CD19+ B"]] > 0).all(axis=None)


def test_is_deterministic_and_independent_of_earlier_calls(adata, assert_same):
    first = pbmc68k_counts()
    first.X.data[:] = 0
    first.obs["batch"] = "changed"
    assert_same(pbmc68k_counts(), adata)


def test_survives_h5ad_and_zarr(adata, roundtrip, assert_same):
    assert_same(roundtrip(adata), adata)


@pytest.mark.parametrize("change", ["values", "totals", "missing"])
def test_another_file_is_refused(monkeypatch, change):
    other = sc.datasets.pbmc68k_reduced()
    if change == "values":
        other.raw.X.data[100] += 0.01
    elif change == "totals":
        other.obs["n_counts"] *= 2
    else:
        other.raw.X.data[100] = np.nan
    monkeypatch.setattr(sc.datasets, "pbmc68k_reduced", lambda: other)
    with pytest.raises(RuntimeError, match="cannot be recovered exactly"):
        pbmc68k_counts()
