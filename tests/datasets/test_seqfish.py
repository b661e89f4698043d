"""The parsers on small files with the layout of the originals: an Excel file of three sheets, an archive of tables."""

from __future__ import annotations

import io
import zipfile
from importlib import import_module

import numpy as np
import pandas as pd
import pytest

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._seqfish")

X = np.array([[14, 15, 0], [0, 0, 9], [1, 0, 0], [100, 7, 3]])  # cells x genes


# ---- seqFISH -------------------------------------------------------------------------------------------------------

FIELDS, PLACES = [33, 33, 40, 53], np.array([[1.5, 2.0, 0.5], [700.25, 3.0, 9.0], [11.0, 12.5, 13.0], [4.0, 5.0, 6.0]])


def workbook(x=X, genes=("'Dmbx1'", "'Emx2'", "'slc1a2'")) -> bytes:
    """Genes x cells without a header, one row of fields, one row of coordinates for each cell."""
    pytest.importorskip("openpyxl")
    counts = pd.DataFrame(x.T)
    counts.insert(0, "gene", list(genes))
    content = io.BytesIO()
    with pd.ExcelWriter(content, engine="openpyxl") as book:
        tables = {"Hippocampus Counts": counts, "Fields": pd.DataFrame([FIELDS]), "Centroids": pd.DataFrame(PLACES)}
        for sheet, table in tables.items():
            table.to_excel(book, sheet_name=sheet, header=False, index=False)
    return content.getvalue()


def test_counts_fields_and_places(offer, roundtrip, assert_same):
    offer(module, "_SEQFISH", workbook())
    adata = sx.datasets.seqfish()
    np.testing.assert_array_equal(adata.X.toarray(), X)
    assert (adata.X.format, adata.X.dtype) == ("csr", np.float32)
    assert list(adata.var_names) == ["Dmbx1", "Emx2", "slc1a2"]
    assert list(adata.obs["field"]) == ["33", "33", "40", "53"]
    np.testing.assert_array_equal(adata.obsm["spatial"], PLACES)
    assert_same(roundtrip(adata), adata)
    sx.pp.setup_anndata(adata)


def test_numbers_that_are_no_counts(offer):
    offer(module, "_SEQFISH", workbook(X + 0.5))
    with pytest.raises(ValueError, match=r"'seqfish_mmc6.xlsx' has numbers that are no counts: '14.5', '15.5', '0.5'"):
        sx.datasets.seqfish()


def test_without_openpyxl(offer, monkeypatch):
    offer(module, "_SEQFISH", b"a workbook")

    def no_openpyxl(*args, **kwargs):
        raise ImportError("Missing optional dependency 'openpyxl'.")

    monkeypatch.setattr(pd, "read_excel", no_openpyxl)
    with pytest.raises(ImportError, match=r"openpyxl, which is not installed: pip install 'scvi-ext\[data\]'"):
        sx.datasets.seqfish()


# ---- seqFISH+ ------------------------------------------------------------------------------------------------------

CENTROIDS = pd.DataFrame(
    {
        "Field of View": [0, 0, 1, 6],
        "Cell ID": [1, 2, 1, 1],
        "X": [1305.7, 669.51, 1185.9, 4.0],
        "Y": [414.98, 457.53, 507.11, 2.5],
        "Region": ["Cortex", "Cortex", "SVZ", "Cortex"],
    }
)


def archive(*, index: bool, x=X) -> bytes:
    """Both regions, the olfactory bulb with twice the counts; ``index``: with the numbers of the rows, as some have."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("sourcedata/", "")
        for stem, counts, centroids in (
            ("cortex_svz", x, CENTROIDS),
            ("ob", 2 * x, CENTROIDS.drop(columns="Region")),
        ):
            counts = pd.DataFrame(counts, columns=["1700022a21rik", "Aanat", "Aatf"])
            file.writestr(f"sourcedata/{stem}_counts.csv", counts.to_csv(index=index))
            file.writestr(f"sourcedata/{stem}_cellcentroids.csv", centroids.to_csv(index=index))
    return content.getvalue()


@pytest.mark.parametrize("index", [True, False])
def test_the_cortex(offer, index, roundtrip, assert_same):
    offer(module, "_SEQFISH_PLUS", archive(index=index))
    adata = sx.datasets.seqfish_plus()
    np.testing.assert_array_equal(adata.X.toarray(), X)
    assert (adata.X.format, adata.X.dtype) == ("csr", np.float32)
    assert list(adata.var_names) == ["1700022a21rik", "Aanat", "Aatf"]
    assert list(adata.obs["field_of_view"]) == ["0", "0", "1", "6"]
    assert adata.obs["cell_id"].tolist() == [1, 2, 1, 1]
    assert list(adata.obs["region"]) == list(CENTROIDS["Region"])
    np.testing.assert_array_equal(adata.obsm["spatial"], CENTROIDS[["X", "Y"]])
    assert_same(roundtrip(adata), adata)
    sx.pp.setup_anndata(adata, labels_key="region")


def test_the_olfactory_bulb(offer, host):
    offer(module, "_SEQFISH_PLUS", archive(index=False))
    adata = sx.datasets.seqfish_plus("olfactory bulb")
    np.testing.assert_array_equal(adata.X.toarray(), 2 * X)
    assert list(adata.obs) == ["field_of_view", "cell_id"]
    sx.datasets.seqfish_plus("subventricular cortex")
    assert len(host.requests) == 1  # one archive for both


def test_another_region(host, datasetdir):
    with pytest.raises(ValueError, match="tissue_region='olfactory' is not one of 'olfactory bulb', 'subventricular"):
        sx.datasets.seqfish_plus("olfactory")
    assert host.requests == []
