from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu

import scvi_ext as sx

SMALL = {"n_hidden": 16, "n_latent": 4, "max_epochs": 3}
QUICK = {"max_epochs": 2, "progress": False}
SLOTS = ["scvi_drift", "scvi_drift_share"]
_FITTED: list[tuple[ad.AnnData, ad.AnnData]] = []


@pytest.fixture
def pair(counts) -> tuple[ad.AnnData, ad.AnnData]:
    """A reference of two batches, and a third one that is mapped onto it."""
    if not _FITTED:
        new = (counts.obs["batch"] == "b2").to_numpy()
        reference, query = counts[~new].copy(), counts[new].copy()
        sx.pp.setup_anndata(reference, batch_key="batch")
        sx.tl.fit(reference, **SMALL)
        sx.tl.map_query(query, reference, **QUICK)
        _FITTED.append((reference, query))
    reference, query = _FITTED[0]
    return reference.copy(), query.copy()


def test_it_is_that_of_the_latent_space(pair):
    reference, query = pair
    sx.tl.get_drift(query, reference, n_neighbors=7)
    for adata in pair:
        sx.tl.get_latent(adata)
    z, own = query.obsm["X_scvi"].astype(float), reference.obsm["X_scvi"].astype(float)
    usual = np.sort(cdist(own, own), axis=1)[:, 7]
    found = np.sort(cdist(z, own), axis=1)[:, 6]
    np.testing.assert_allclose(query.obs["scvi_drift"], found / np.median(usual), rtol=1e-5)  # float32 latents
    expected = [(1 + (usual >= distance).sum()) / (1 + len(usual)) for distance in found]
    np.testing.assert_allclose(query.obs["scvi_drift_share"], expected, atol=2.5 / len(usual))  # ties may fall apart
    assert "X_umap" not in query.obsm


def test_a_cell_type_that_the_reference_lacks_drifts(make_counts):
    """Of three planted types one is left out of the reference; the batch of the query is new in any case."""
    adata = make_counts(1500, 100)
    new, absent = (adata.obs["batch"] == "b2").to_numpy(), (adata.obs["cell_type"] == "t2").to_numpy()
    reference, query = adata[~new & ~absent].copy(), adata[new].copy()
    sx.pp.setup_anndata(reference, batch_key="batch")
    sx.tl.fit(reference, n_hidden=32, n_latent=5)
    sx.tl.map_query(query, reference, progress=False)
    sx.tl.get_drift(query, reference)
    is_absent = (query.obs["cell_type"] == "t2").to_numpy()
    drift, share = (query.obs[slot].to_numpy() for slot in SLOTS)
    auroc = mannwhitneyu(drift[is_absent], drift[~is_absent]).statistic / (is_absent.sum() * (~is_absent).sum())
    assert auroc > 0.9
    assert np.median(drift[is_absent]) > 1.5
    assert np.median(drift[~is_absent]) < 1.3
    assert np.median(share[is_absent]) < 0.05 < np.median(share[~is_absent])


def test_some_cells_a_copy_and_another_name(pair):
    reference, query = pair
    whole = sx.tl.get_drift(query, reference, copy=True)
    assert "scvi_drift" not in query.obs
    sx.tl.get_drift(query, reference, indices=slice(0, 10), key_added="far", batch_size=3)
    np.testing.assert_allclose(query.obs["far"][:10], whole.obs["scvi_drift"][:10], rtol=1e-5)
    np.testing.assert_allclose(query.obs["far_share"][:10], whole.obs["scvi_drift_share"][:10], atol=0.02)
    assert query.obs["far"][10:].isna().all()


def test_the_fit_that_was_mapped_is_found(pair):
    reference, query = pair
    sx.tl.fit(reference, key_added="other", **SMALL | {"seed": 5})
    sx.tl.get_drift(query, reference)
    with pytest.raises(ValueError, match="map the query onto it"):
        sx.tl.get_drift(query, reference, reference_key="other")
    sx.tl.map_query(query, reference, key="scvi", freeze=False, **QUICK)
    with pytest.raises(ValueError, match="freeze=True"):
        sx.tl.get_drift(query, reference)


def test_genes_in_another_order_and_files(pair, tmp_path):
    reference, query = pair
    expected = sx.tl.get_drift(query, reference, copy=True).obs[SLOTS]
    shuffled = query[:, ::-1].copy()
    sx.tl.get_drift(shuffled, reference[:, ::-1].copy())
    np.testing.assert_array_equal(shuffled.obs[SLOTS], expected)
    shuffled.write_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "a.h5ad").obs[SLOTS], expected)


def test_the_log_counts_those_that_lie_far_out(pair, logged):
    reference, query = pair
    sx.tl.get_drift(query, reference)
    n = int((query.obs["scvi_drift_share"] < 0.05).sum())
    assert f"{n} of them" in logged()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_neighbors": 134}, ValueError, "below the number of reference cells"),
        ({"n_neighbors": 0}, ValueError, "n_neighbors"),
        ({"key": "nothing"}, KeyError, "nothing"),
        ({"reference_key": "nothing"}, KeyError, "nothing"),
        ({"key_added": "batch"}, ValueError, "what fit 'scvi' reads"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(pair, options, error, match):
    reference, query = pair
    with pytest.raises(error, match=match):
        sx.tl.get_drift(query, reference, **options)
    assert list(query.obs) == list(_FITTED[0][1].obs)


@pytest.mark.parametrize("options", [{"latent_distribution": "ln"}, {"encode_covariates": True}], ids=str)
def test_other_latent_spaces(counts, options):
    new = (counts.obs["batch"] == "b2").to_numpy()
    reference, query = counts[~new].copy(), counts[new].copy()
    sx.pp.setup_anndata(reference, batch_key="batch")
    sx.tl.fit(reference, **SMALL | options)
    sx.tl.map_query(query, reference, **QUICK)
    sx.tl.get_drift(query, reference)
    assert (query.obs["scvi_drift"] > 0).all()
