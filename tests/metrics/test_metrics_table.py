from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scvi_ext as sx

BATCH, LABELS = ["entropy_batch_mixing"], ["knn_purity", "ASW", "NMI", "ARI", "UCA"]


@pytest.fixture
def latents(fitted) -> ad.AnnData:
    """201 cells with the latent spaces of two fits, and with a poor representation."""
    for key in ("scvi", "ldvae"):
        sx.tl.get_latent(fitted, key=key)
    fitted.obsm["X_noise"] = np.random.default_rng(0).normal(size=(fitted.n_obs, 3))
    return fitted


def test_one_row_for_each_representation(latents):
    reps = ["X_noise", "X_scvi"]
    assert sx.metrics.table(latents, labels_key="cell_type", use_reps=reps, seed=3) is None
    table = sx.get.metrics_df(latents)
    assert table.index.tolist() == reps
    assert table.columns.tolist() == BATCH + LABELS
    assert (table.dtypes == np.float64).all()
    for rep, row in table.iterrows():
        assert row["entropy_batch_mixing"] == sx.metrics.entropy_batch_mixing(latents, use_rep=rep)
        assert row["knn_purity"] == sx.metrics.knn_purity(latents, "cell_type", use_rep=rep)
        scores = sx.metrics.clustering_scores(latents, "cell_type", use_rep=rep, seed=3)
        assert row[list(scores)].to_dict() == scores
    assert latents.uns["scvi_ext_metrics"]["params"] == {
        "batch_key": "batch",
        "labels_key": "cell_type",
        "n_cells": 201,
    }


def test_latent_spaces_that_are_there_are_the_default(latents):
    sx.metrics.table(latents)
    assert sx.get.metrics_df(latents).index.tolist() == ["X_ldvae", "X_scvi"]
    assert sx.get.metrics_df(latents).columns.tolist() == BATCH
    latents.obsm["X_pca"] = latents.obsm["X_noise"]
    del latents.obsm["X_ldvae"]
    sx.metrics.table(latents)
    assert sx.get.metrics_df(latents).index.tolist() == ["X_pca", "X_scvi"]


def test_labels_without_batches(latents):
    del latents.uns["scvi_ext"]
    sx.metrics.table(latents, labels_key="cell_type", use_reps="X_scvi")
    assert sx.get.metrics_df(latents).columns.tolist() == LABELS
    with pytest.raises(ValueError, match="Neither batch nor labels are registered"):
        sx.metrics.table(latents, use_reps="X_scvi")
    with pytest.raises(ValueError, match="has neither 'X_pca' nor the latent space of a fit"):
        sx.metrics.table(latents, batch_key="batch")


def test_all_rows_are_of_the_same_cells(latents, logged):
    latents.obs["cell_type"] = latents.obs["cell_type"].where(np.arange(201) >= 10)
    latents.obsm["X_noise"][5:20] = np.nan
    rest = latents[20:].copy()
    for adata in (latents, rest):
        sx.metrics.table(adata, labels_key="cell_type", use_reps=["X_scvi", "X_noise"])
    assert "left out 20 of 201 cells, without a batch, a label or a value" in logged()
    pd.testing.assert_frame_equal(sx.get.metrics_df(latents), sx.get.metrics_df(rest), rtol=1e-10)
    assert latents.uns["scvi_ext_metrics"]["params"]["n_cells"] == 181


def test_copies_names_and_the_log(latents, logged):
    copied = sx.metrics.table(latents, key_added="mine", copy=True)
    assert "mine" not in latents.uns
    assert "scvi_ext_metrics" not in copied.uns
    assert "added\n    'mine', table of metrics (adata.uns)" in logged()
    table = sx.get.metrics_df(copied, "mine")
    table["entropy_batch_mixing"] = 0
    assert (sx.get.metrics_df(copied, "mine")["entropy_batch_mixing"] > 0).all()
    view = latents[:150]
    sx.metrics.table(view)
    assert not view.is_view
    assert "scvi_ext_metrics" not in latents.uns


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_the_table_travels(latents, tmp_path, suffix):
    sx.metrics.table(latents, labels_key="cell_type")
    path = tmp_path / f"cells.{suffix}"
    latents.write_h5ad(path) if suffix == "h5ad" else latents.write_zarr(path)
    back = ad.read_h5ad(path) if suffix == "h5ad" else ad.read_zarr(path)
    pd.testing.assert_frame_equal(sx.get.metrics_df(back), sx.get.metrics_df(latents))


def test_nothing_is_written_where_something_is_wrong(latents):
    with pytest.raises(KeyError, match=r"'X_c' is not in adata.obsm"):
        sx.metrics.table(latents, use_reps=["X_scvi", "X_c"])
    with pytest.raises(KeyError, match=r"'nope' is not in adata.obs"):
        sx.metrics.table(latents, labels_key="nope")
    with pytest.raises(ValueError, match=r"use_reps=\['X_scvi', 'X_scvi'\] must name at least one .* each one once"):
        sx.metrics.table(latents, use_reps=["X_scvi", "X_scvi"])
    with pytest.raises(ValueError, match=r"use_reps=\[\] must name at least one"):
        sx.metrics.table(latents, use_reps=[])
    with pytest.raises(ValueError, match="key_added='a/b' must be a name"):
        sx.metrics.table(latents, key_added="a/b")
    latents.obs["one"] = "t"
    with pytest.raises(ValueError, match="201 cells have 1 labels"):
        sx.metrics.table(latents, labels_key="one")
    assert "scvi_ext_metrics" not in latents.uns


def test_a_table_that_is_not_there(latents):
    with pytest.raises(KeyError, match=r"adata.uns has no 'scvi_ext_metrics': call scvi_ext.metrics.table\(adata\)"):
        sx.get.metrics_df(latents)
    with pytest.raises(KeyError, match=r"'mine' is not in adata.uns, which has: 'scvi_ext'"):
        sx.get.metrics_df(latents, "mine")


def test_the_fits_are_not_overwritten(fitted):
    before = fitted.uns["scvi_ext"].keys()
    with pytest.raises(ValueError, match="holds the fits themselves"):
        sx.metrics.table(fitted, labels_key="cell_type", key_added="scvi_ext")
    assert fitted.uns["scvi_ext"].keys() == before
    fitted.uns["other"] = {}
    with pytest.raises(KeyError, match="has no table of metrics"):
        sx.get.metrics_df(fitted, "other")
