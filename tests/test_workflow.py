"""The main job as a scanpy user does it, on the files that scanpy writes and reads, and on every kind of AnnData."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.io
import scipy.sparse as sp
from sklearn.metrics import adjusted_rand_score

import scvi_ext as sx

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cells(make_counts) -> ad.AnnData:
    """301 cells of three types in three batches, with identifiers as 10x Genomics gives them."""
    adata = make_counts(301, 80)
    rng = np.random.default_rng(0)
    adata.obs_names = ["".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(adata.n_obs)]
    adata.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    return adata


def workflow(adata: ad.AnnData, obs: pd.DataFrame, folder: Path) -> None:
    sx.pp.setup_anndata(adata, batch_key="batch")
    sx.tl.fit(adata, max_epochs=30, n_hidden=32)
    sx.tl.get_latent(adata)
    sc.pp.neighbors(adata, use_rep="X_scvi")
    sc.tl.umap(adata, maxiter=20)
    sc.tl.leiden(adata, resolution=0.3, flavor="igraph", n_iterations=2, directed=False)
    axes = sc.pl.embedding(adata, basis="scvi", color="leiden", show=False)
    assert len(axes.collections[0].get_offsets()) == adata.n_obs
    plt.close("all")
    sx.tl.get_normalized_expression(adata)
    adata.write_h5ad(folder / "fitted.h5ad")

    assert adata.obsm["X_scvi"].shape == (adata.n_obs, 10)
    assert adata.obsm["X_umap"].shape == (adata.n_obs, 2)
    np.testing.assert_allclose(adata.layers["scvi_normalized"].sum(1), 1e4, rtol=1e-5)  # float32 sums
    # Three planted types with most genes different: clusters of the latent space find them, whatever the batch.
    assert adjusted_rand_score(adata.obs["leiden"], obs.loc[adata.obs_names, "cell_type"]) > 0.8
    assert adjusted_rand_score(adata.obs["leiden"], obs.loc[adata.obs_names, "batch"]) < 0.1

    tomorrow = ad.read_h5ad(folder / "fitted.h5ad")
    sx.tl.get_latent(tomorrow, key_added="again")
    np.testing.assert_array_equal(tomorrow.obsm["again"], adata.obsm["X_scvi"])
    assert sx.get.fits(tomorrow).equals(sx.get.fits(adata))


def with_obs(adata: ad.AnnData, obs: pd.DataFrame) -> ad.AnnData:
    """10x files hold no metadata: users add it by barcode."""
    adata.obs = adata.obs.join(obs[["batch"]])
    return adata


def from_h5ad(adata, folder):
    adata.write_h5ad(folder / "counts.h5ad")
    return sc.read_h5ad(folder / "counts.h5ad")


def from_zarr(adata, folder):
    adata.write_zarr(folder / "counts.zarr")
    return ad.read_zarr(folder / "counts.zarr")


def from_10x_mtx(adata, folder):
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(adata.X.T.astype(np.int64)))
    features = adata.var.reset_index()[["gene_ids", "index"]].assign(kind="Gene Expression")
    features.to_csv(folder / "features.tsv.gz", sep="\t", header=False, index=False)
    pd.Series(adata.obs_names).to_csv(folder / "barcodes.tsv.gz", header=False, index=False)
    return with_obs(sc.read_10x_mtx(folder), adata.obs)


def from_10x_h5(adata, folder):
    counts = adata.X.astype(np.int32).tocsr()  # cells x genes by row is genes x cells by column, as 10x has it
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        matrix["shape"] = np.array(counts.shape[::-1], dtype=np.int32)
        matrix["data"], matrix["indices"], matrix["indptr"] = counts.data, counts.indices, counts.indptr
        matrix["barcodes"] = adata.obs_names.to_numpy().astype("S")
        features = matrix.create_group("features")
        features["id"] = adata.var["gene_ids"].to_numpy().astype("S")
        features["name"] = adata.var_names.to_numpy().astype("S")
        features["feature_type"] = np.array([b"Gene Expression"] * adata.n_vars)
        features["genome"] = np.array([b"GRCh38"] * adata.n_vars)
    return with_obs(sc.read_10x_h5(folder / "filtered_feature_bc_matrix.h5"), adata.obs)


@pytest.mark.parametrize("read", [from_h5ad, from_zarr, from_10x_mtx, from_10x_h5])
def test_files_that_scanpy_reads(cells, tmp_path, read):
    adata = read(cells, tmp_path)
    assert adata.shape == (301, 80)
    assert abs(adata.X - cells.X).sum() == 0
    workflow(adata, cells.obs, tmp_path)


def as_view(adata):
    adata = adata[10:, adata.var_names != "gene5"]
    assert adata.is_view
    return adata


def as_kind(convert):
    def kind(adata):
        adata.X = convert(adata.X)
        return adata

    return kind


@pytest.mark.parametrize(
    "kind",
    [
        as_view,
        as_kind(sp.csc_matrix),
        as_kind(lambda x: x.toarray()),
        as_kind(lambda x: x.toarray().astype(np.int64)),
        as_kind(lambda x: x.astype(np.int32)),
    ],
    ids=["view", "csc", "dense", "integer", "sparse integer"],
)
def test_kinds_of_anndata(cells, tmp_path, kind):
    workflow(kind(cells), cells.obs.copy(), tmp_path)


def test_a_backed_anndata(cells, tmp_path):
    cells.write_h5ad(tmp_path / "counts.h5ad")
    backed = sc.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    workflow(backed, cells.obs, tmp_path)
    assert backed.isbacked
    backed.file.close()


def test_the_verbs_at_the_top_are_those_of_the_namespaces():
    assert sx.setup_anndata is sx.pp.setup_anndata
    assert sx.fit is sx.tl.fit
    assert sx.get_latent is sx.tl.get_latent


def test_real_counts_of_a_shared_file(shared_data):
    adata = sc.read_h5ad(shared_data / "pbmc3k.h5ad")
    sc.pp.filter_genes(adata, min_cells=300)
    adata = adata[:600]
    sx.pp.setup_anndata(adata)
    sx.tl.fit(adata, max_epochs=30, n_hidden=32)
    elbo = sx.get.history(adata)["elbo_validation"]
    assert elbo.iloc[-1] > elbo.iloc[0] + 50  # it starts from equal expression of all genes, hundreds of nats away
