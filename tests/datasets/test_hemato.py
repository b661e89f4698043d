"""The parser on files of the original's layout, made here."""

from __future__ import annotations

import gzip
import io
import zipfile
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from _tenx_writing import git

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._hemato")

CELLS = ["bm1_a", "bm2_b", "bm2_c", "bm3_d", "bm3_e"]
COUNTS = np.array([[9, 9, 9, 9], [0, 1, 2, 3], [4, 0, 0, 5], [0, 0, 6, 1], [1, 1, 1, 1]])
GENES = ["Gata1", "Cd34", "Mpo", "Kit"]
FATES = ["Potential", "Pr_Er", "Pr_Gr", "Pr_Ly", "Pr_DC", "Pr_Mk", "Pr_Mo", "Pr_Ba"]


@pytest.fixture
def offer(datasetdir, host, monkeypatch):
    def call(
        genes=("Mpo", "Gata1"), shape=(3, 2), files=("bBM.spring_and_pba.csv", "bBM.filtered_gene_list.paper.txt")
    ):
        of_cells = pd.DataFrame(
            {
                "cell_id": CELLS,
                "barcode": list("ACGTA"),
                "library_id": ["basal_bm1", "basal_bm2", "basal_bm2", "basal_bm3", "basal_bm3"],
                "seq_run_id": ["run1", "run1", "run2", "run2", "run2"],
                "pass_filter": [1, 1, 1, 0, 1],
            }
        )
        counts = of_cells.join(pd.DataFrame(COUNTS, columns=GENES)).to_csv(index=False)
        host.files["counts"] = gzip.compress(counts.encode())
        # Without the fourth cell, the first one of poor quality, in another order
        fates = pd.DataFrame({"cell_id": [CELLS[i] for i in (4, 2, 1, 0)]})
        fates = fates.assign(library_id=["basal_bm3", "basal_bm2", "basal_bm2", "basal_bm1"])
        fates = fates.assign(x_spring=[4.0, 2.0, 1.0, 0.0], y_spring=[-4.0, -2.0, -1.0, 0.0])
        fates = fates.assign(**{name: np.array([4.0, 2.0, 1.0, 0.0]) + i for i, name in enumerate(FATES)})
        contents = dict(zip(files, (fates.to_csv(index=False), "".join(f"{g}\n" for g in genes)), strict=True))
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as opened:
            for name, text in contents.items():
                opened.writestr(f"data/HEMATO/{name}", text)
                opened.writestr(f"__MACOSX/HEMATO/._{name}", "resources")
            opened.writestr("data/RETINA/ClustAssignFile.txt", "no")
        host.files["tables"] = archive.getvalue()
        monkeypatch.setattr(module, "_COUNTS", module.File(host.url + "counts", "counts.csv.gz", None, shape=shape))
        tables = module.File(host.url + "tables", "tables.zip", git(host.files["tables"]))
        monkeypatch.setattr(module, "_TABLES", tables)

    return call


@pytest.mark.parametrize("rows", [500, 2])
def test_cells_with_a_fate_and_genes_of_the_paper(offer, monkeypatch, rows, roundtrip):
    offer()
    monkeypatch.setattr(module, "_ROWS", rows)
    adata = sx.datasets.hemato()
    assert list(adata.obs_names) == ["bm2_b", "bm2_c", "bm3_e"]
    assert list(adata.var_names) == ["Mpo", "Gata1"]
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[[1, 2, 4]][:, [2, 0]])
    assert isinstance(adata.X, sp.csr_matrix)
    assert adata.X.dtype == np.float32
    assert list(adata.obs["batch"]) == ["basal_bm2", "basal_bm2", "basal_bm3"]
    assert list(adata.obs["barcode"]) == ["C", "G", "A"]
    assert list(adata.obs["seq_run_id"]) == ["run1", "run2", "run2"]
    for i, name in enumerate(FATES):
        assert list(adata.obs[name]) == [1.0 + i, 2.0 + i, 4.0 + i]
    np.testing.assert_array_equal(adata.obsm["X_spring"], [[1, -1], [2, -2], [4, -4]])
    assert set(adata.obs) == {"batch", "barcode", "seq_run_id", *FATES}
    np.testing.assert_array_equal(roundtrip(adata).obsm["X_spring"], adata.obsm["X_spring"])
    sx.pp.setup_anndata(adata)


def test_another_number_of_cells_is_another_file(offer):
    offer(shape=(4016, 7397))
    with pytest.raises(ValueError, match="has 3 cells and 2 genes, expected 4016 cells and 7397 genes"):
        sx.datasets.hemato()


def test_columns_that_are_missing(offer):
    offer(genes=["Mpo", "Sox2"])
    with pytest.raises(ValueError, match=r"'counts\.csv\.gz' lacks 1 columns, among them 'Sox2'"):
        sx.datasets.hemato()


def test_tables_that_are_missing(offer):
    offer(files=("fates.csv", "bBM.filtered_gene_list.paper.txt"))
    with pytest.raises(ValueError, match=r"'tables\.zip' lacks 'bBM\.spring_and_pba\.csv' or"):
        sx.datasets.hemato()


def test_where_the_files_are():
    assert module._TABLES.checksum == "git:66a97af75222cd3b23cae83c89ae364523ce43ee"
    assert module._COUNTS.shape == (4016, 7397)
    assert module._COUNTS.url.endswith("/" + module._COUNTS.name)
