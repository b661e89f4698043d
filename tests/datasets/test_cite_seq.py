"""The parser on small tables like those of GEO: genes or proteins x cells, compressed."""

from __future__ import annotations

import gzip
import hashlib
from importlib import import_module

import numpy as np
import pandas as pd
import pytest

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._cite_seq")

CELLS = ["CTGTTTACACCGCTAG", "CTCTACGGTGTGGCTC", "AGCAGCCAGGCTCATT"]
RNA = pd.DataFrame(
    [[3, 0, 0], [1, 2, 0], [0, 2, 1], [0, 12, 7]],
    index=["HUMAN_A1BG", "HUMAN_NA", "HUMAN_HLA_DRA", "MOUSE_ACTB"],
    columns=CELLS,
)
ADT = pd.DataFrame([[60, 52, 89], [72, 49, 112]], index=["CD3", "CD4"], columns=CELLS)
CLR = pd.DataFrame([[-0.15, 0.25, 1.5], [0.5, -0.75, 2.0]], index=["CD3", "CD4"], columns=CELLS)


@pytest.fixture
def tables(host, datasetdir, monkeypatch):
    """Offer tables in place of those of a data set."""

    def offer(name, rna=RNA, adt=ADT, clr=CLR):
        monkeypatch.setattr(module, "_URL", host.url)
        for kind, table in {"rna": rna, "protein": adt, "clr": clr}.items():
            file = f"GSE100866_{module._STEMS[name]}-{module._ENDS[kind]}.csv.gz"
            host.files[file] = gzip.compress(table.to_csv().encode())
            monkeypatch.setitem(module._MD5[name], kind, hashlib.md5(host.files[file]).hexdigest())

    return offer


def test_human_genes_and_proteins(tables, roundtrip, assert_same):
    tables("cbmc")
    adata = sx.datasets.cite_seq("cbmc")
    assert list(adata.var_names) == ["A1BG", "NA", "HLA_DRA"]
    assert list(adata.obs_names) == CELLS
    np.testing.assert_array_equal(adata.X.toarray(), RNA.to_numpy()[:3].T)
    assert (adata.X.format, adata.X.dtype) == ("csr", np.float32)
    np.testing.assert_allclose(adata.obs["human_share"], [1, 4 / 16, 1 / 8], rtol=1e-15)  # exact in float64
    pd.testing.assert_frame_equal(adata.obsm["protein_expression"], ADT.T)
    assert list(adata.obsm) == ["protein_expression"]
    assert_same(roundtrip(adata), adata)


def test_proteins_are_ready_to_be_set_up(tables):
    tables("pbmc")
    adata = sx.datasets.cite_seq("pbmc")
    sx.pp.setup_anndata(adata, protein_obsm_key="protein_expression")
    assert list(adata.uns["scvi_ext"]["setup"]["protein_names"]) == ["CD3", "CD4"]


def test_the_ratios_of_the_authors_are_downloaded_only_if_asked_for(tables, host):
    tables("cbmc")
    assert "protein_clr" not in sx.datasets.cite_seq("cbmc").obsm
    assert not any("clr" in request["path"] for request in host.requests)
    pd.testing.assert_frame_equal(sx.datasets.cite_seq("cbmc", clr=True).obsm["protein_clr"], CLR.T)


def test_proteins_follow_the_cells_of_the_genes(tables):
    tables("cbmc", adt=ADT[CELLS[::-1]], clr=CLR[[*CELLS[1:], CELLS[0]]])
    adata = sx.datasets.cite_seq("cbmc", clr=True)
    pd.testing.assert_frame_equal(adata.obsm["protein_expression"], ADT.T)
    pd.testing.assert_frame_equal(adata.obsm["protein_clr"], CLR.T)


def test_sorted_cells_have_a_gate_and_no_species(tables):
    names = ["AAAC_high", "AAAG_off", "AAAT_high"]
    rna = RNA.set_axis(names, axis=1).set_axis(["A1BG", "MT-CO1", "CD8A", "ACTB"])
    tables("cd8", rna, ADT.set_axis(names, axis=1))
    adata = sx.datasets.cite_seq("cd8")
    assert list(adata.var_names) == ["A1BG", "MT-CO1", "CD8A", "ACTB"]
    assert list(adata.obs["gate"]) == ["high", "off", "high"]
    assert list(adata.obs["gate"].cat.categories) == ["high", "off"]
    assert "human_share" not in adata.obs


def test_cells_without_human_genes_are_left_out(tables):
    rna = RNA.copy()
    rna.iloc[:3, 1] = 0
    tables("cbmc", rna)
    adata = sx.datasets.cite_seq("cbmc")
    assert list(adata.obs_names) == [CELLS[0], CELLS[2]]
    pd.testing.assert_frame_equal(adata.obsm["protein_expression"], ADT.T.iloc[[0, 2]])


def test_a_table_of_many_genes_is_read_in_pieces(tables, monkeypatch):
    rng = np.random.default_rng(1)
    rna = pd.DataFrame(rng.poisson(1.0, (50, 3)), index=[f"HUMAN_g{i}" for i in range(50)], columns=CELLS)
    tables("cbmc", rna)
    monkeypatch.setattr("scvi_ext.datasets._files._ROWS", 7)
    adata = sx.datasets.cite_seq("cbmc")
    np.testing.assert_array_equal(adata.X.toarray(), rna.to_numpy().T)
    assert list(adata.var_names) == [f"g{i}" for i in range(50)]


def test_other_cells(tables):
    tables("cbmc", adt=ADT.set_axis([*CELLS[:2], "other"], axis=1))
    with pytest.raises(ValueError, match=r"has other cells than the table of genes: 'AGCAGCCAGGCTCATT', 'other'"):
        sx.datasets.cite_seq("cbmc")


def test_another_name(host, datasetdir):
    with pytest.raises(ValueError, match=r"name='cmbc' is not one of 'cbmc', 'cd8', 'pbmc'. Did you mean 'cbmc'"):
        sx.datasets.cite_seq("cmbc")


def test_another_file_is_not_read(tables, monkeypatch):
    tables("cbmc")
    monkeypatch.setitem(module._MD5["cbmc"], "rna", "0" * 32)
    with pytest.raises(ValueError, match="checksum is md5"):
        sx.datasets.cite_seq("cbmc")
