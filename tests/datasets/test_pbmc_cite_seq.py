"""The parser on files of the original's layout, made here; the real ones where they are at hand."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._pbmc_cite_seq")
SHARED = Path(__file__).parents[3] / "shared" / "data"
NOWHERE = "http://127.0.0.1:9/{}"  # nobody listens there


@pytest.fixture
def folder(datasetdir, monkeypatch):
    monkeypatch.setattr(module, "_URL", NOWHERE)
    datasetdir.mkdir()
    return datasetdir


def write(folder: Path, name: str, genes: list[str], proteins: list[str]) -> dict[str, np.ndarray]:
    """A file as it is offered: dense counts, proteins as an array, their names apart."""
    rng = np.random.default_rng(len(proteins))
    x, y = rng.poisson(2, (5, len(genes))), rng.poisson(9, (5, len(proteins)))
    cells = pd.DataFrame(index=[f"{name}-cell{i}" for i in range(5)])
    adata = ad.AnnData(x.astype("float32"), obs=cells, var=pd.DataFrame(index=genes))
    adata.obsm["protein_expression"] = y
    adata.uns["protein_names"] = np.array([f"{p}_TotalSeqB" for p in proteins], dtype=object)
    adata.write_h5ad(folder / f"pbmc_{name}_protein_v3_200_cells.h5ad")
    return {"x": x, "y": y}


def digests(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((folder / f"pbmc_{name}_protein_v3_200_cells.h5ad").read_bytes()).hexdigest()
        for name in ("10k", "5k")
    }


def test_two_panels_become_one_table(folder, monkeypatch):
    large = write(folder, "10k", ["A", "B", "C"], ["CD3", "CD19"])
    small = write(folder, "5k", ["C", "A"], ["CD14", "CD19", "CD3"])
    monkeypatch.setattr(module, "_SHA256", digests(folder))
    adata = sx.datasets.pbmc_cite_seq()
    assert adata.shape == (10, 2)
    assert adata.obs["batch"].tolist() == ["10k"] * 5 + ["5k"] * 5
    found = pd.DataFrame(adata.X.toarray(), adata.obs_names, adata.var_names)
    np.testing.assert_array_equal(found["A"], np.r_[large["x"][:, 0], small["x"][:, 1]])
    proteins = adata.obsm["protein_expression"]
    assert list(proteins.columns) == ["CD14", "CD19", "CD3"]
    np.testing.assert_array_equal(proteins["CD3"], np.r_[large["y"][:, 0], small["y"][:, 2]])
    np.testing.assert_array_equal(proteins["CD14"], np.r_[np.zeros(5), small["y"][:, 0]])


def test_a_file_that_cannot_be_had(folder):
    with pytest.raises(OSError, match=r"not in .* and cannot be downloaded .*127\.0\.0\.1.*datasetdir"):
        sx.datasets.pbmc_cite_seq()


def test_a_file_that_is_another_is_not_read(folder, monkeypatch):
    write(folder, "10k", ["A"], ["CD3"])
    monkeypatch.setattr(ad, "read_h5ad", lambda path: pytest.fail("read in spite of its checksum"))
    with pytest.raises(ValueError, match="not the file it should be"):
        sx.datasets.pbmc_cite_seq()


def test_the_real_files(folder):
    for name in ("10k", "5k"):
        source = SHARED / f"tests_test_data_pbmc_{name}_protein_v3.h5ad"
        if not source.exists():
            pytest.skip(f"{source.name} is not there")
        (folder / f"pbmc_{name}_protein_v3_200_cells.h5ad").symlink_to(source)
    adata = sx.datasets.pbmc_cite_seq()
    assert adata.shape == (400, 15792)
    assert adata.obsm["protein_expression"].shape == (400, 29)
    sc.pp.filter_genes(adata, min_cells=1)
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein_expression")
    missing = adata.uns["scvi_ext"]["setup"]["missing_proteins"]
    assert len(missing["0"]) == 15
    assert len(missing["1"]) == 0
