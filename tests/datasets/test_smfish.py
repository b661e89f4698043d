"""The parser on a small file with the layout of the original, and on the real counts where they are at hand."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._smfish")
SHARED = Path(__file__).parents[3] / "shared" / "data"

CLUSTERS = (
    "Inhibitory CP,Excluded,pyramidal L4,Pyramidal L2-3,Hippocampus,Perivascular Macrophages,Microglia,Pericytes,"
    "Oligodendrocyte Precursor cells,Endothelial 1,Astrocyte Gfap,C. Plexus,Vascular Smooth Muscle,Ependymal"
).split(",")
TYPES = {
    "Inhibitory CP": "Inhibitory",
    "pyramidal L4": "Pyramidals",
    "Pyramidal L2-3": "Pyramidals",
    "Hippocampus": "Pyramidals",
    "Perivascular Macrophages": "Microglias",
    "Microglia": "Microglias",
    "Oligodendrocyte Precursor cells": "Oligodendrocytes",
    "Endothelial 1": "Endothelials",
    "Astrocyte Gfap": "Astrocytes",
}
GENES = ["Gad2", "Slc32a1", "Crhbp"]


def loom(path: Path, x: np.ndarray, genes, clusters, places: np.ndarray) -> bytes:
    n = len(x)
    with h5py.File(path, "w") as file:
        file["matrix"] = np.asarray(x).T.astype(float)
        file["row_attrs/Gene"] = np.array(genes, dtype="S")
        file["row_attrs/Hybridization"] = np.arange(len(genes))
        columns = {
            "CellID": np.array([str(i + 7) for i in range(n)], dtype="S"),
            "ClusterName": np.array(clusters, dtype="S"),
            "ClusterID": np.arange(n),
            "Region": np.array([f"Layer {i % 3}" for i in range(n)], dtype="S"),
            "X": places[:, 0],
            "Y": places[:, 1],
        }
        for name, values in columns.items():
            file[f"col_attrs/{name}"] = values
    return path.read_bytes()


@pytest.fixture
def x():
    return 1 + np.arange(len(CLUSTERS) * len(GENES)).reshape(-1, len(GENES))


@pytest.fixture
def places():
    return np.random.default_rng(0).uniform(0, 4e4, (len(CLUSTERS), 2))


@pytest.fixture
def small(offer, tmp_path, x, places):
    offer(module, "_FILE", loom(tmp_path / "a.loom", x, GENES, CLUSTERS, places), x.shape)


def test_types_of_scvi(small, x, places, roundtrip, assert_same):
    adata = sx.datasets.smfish()
    kept = [i for i, cluster in enumerate(CLUSTERS) if cluster in TYPES]
    np.testing.assert_array_equal(adata.X.toarray(), x[kept])
    assert (adata.X.format, adata.X.dtype) == ("csr", np.float32)
    assert list(adata.var_names) == GENES
    assert list(adata.obs_names) == [str(i + 7) for i in kept]
    assert list(adata.obs["cluster"]) == [CLUSTERS[i] for i in kept]
    assert list(adata.obs["cell_type"]) == [TYPES[CLUSTERS[i]] for i in kept]
    assert list(adata.obs["cell_type"].cat.categories) == sorted(set(TYPES.values()))
    assert list(adata.obs["region"]) == [f"Layer {i % 3}" for i in kept]
    np.testing.assert_array_equal(adata.obsm["spatial"], places[kept])
    assert_same(roundtrip(adata), adata)
    sx.pp.setup_anndata(adata, labels_key="cell_type")


def test_clusters_of_the_paper(small, x, places):
    adata = sx.datasets.smfish(use_high_level_cluster=False)
    kept = [i for i, cluster in enumerate(CLUSTERS) if cluster != "Excluded"]
    np.testing.assert_array_equal(adata.X.toarray(), x[kept])
    np.testing.assert_array_equal(adata.obsm["spatial"], places[kept])
    assert list(adata.obs["cell_type"]) == [CLUSTERS[i] for i in kept]
    assert list(adata.obs["cell_type"]) == list(adata.obs["cluster"])
    assert "Excluded" not in adata.obs["cluster"].cat.categories
    sx.pp.setup_anndata(adata, labels_key="cell_type")


def test_the_real_counts(offer, tmp_path):
    """Those that scVI's authors have made of the original, written as that is, among cells that are left out."""
    source = SHARED / "smfish.h5ad"
    if not source.exists():
        pytest.skip(f"{source.name} is not there")
    real = ad.read_h5ad(source)
    one_of_each = {scvi: cluster for cluster, scvi in TYPES.items()}
    clusters = np.array([one_of_each[scvi] for scvi in real.obs["str_labels"]], dtype=object)
    places = real.obs[["x_coord", "y_coord"]].to_numpy()
    at = np.arange(0, len(clusters), 100)  # an excluded cell before each of these
    x = np.insert(real.X.toarray().astype(int), at, 3, axis=0)
    content = loom(
        tmp_path / "a.loom", x, real.var_names, np.insert(clusters, at, "Excluded"), np.insert(places, at, 0, axis=0)
    )
    offer(module, "_FILE", content, x.shape)
    adata = sx.datasets.smfish()
    assert adata.shape == (4530, 33)
    np.testing.assert_array_equal(adata.X.toarray(), real.X.toarray())
    np.testing.assert_array_equal(adata.obsm["spatial"], places)
    assert list(adata.obs["cell_type"]) == list(real.obs["str_labels"])
    sx.pp.setup_anndata(adata, labels_key="cell_type")


def test_another_number_of_cells(offer, tmp_path, x, places):
    offer(module, "_FILE", loom(tmp_path / "a.loom", x, GENES, CLUSTERS, places), (6471, 33))
    with pytest.raises(ValueError, match="has 14 cells and 3 genes, expected 6471 cells and 33 genes"):
        sx.datasets.smfish()
