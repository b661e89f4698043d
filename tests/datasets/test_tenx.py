"""Each format of Cell Ranger on files made here, which a web server on this machine hands out."""

from __future__ import annotations

import warnings
from importlib import import_module

import numpy as np
import pytest
import scipy.sparse as sp
from _old_pickle import pickled
from _tenx_writing import git, h5_v2, h5_v3, md5, mex_v2, mex_v3

import scvi_ext as sx

pytest.importorskip("requests")
tenx_files = import_module("scvi_ext.datasets._tenx_files")
tenx = import_module("scvi_ext.datasets._tenx")

BARCODES = ["CC-2", "AA-1", "GG-10"]
COUNTS = np.array([[0, 3, 1, 0], [2, 0, 0, 7], [1, 0, 300, 0]])
IDS, SYMBOLS = ["ENSG1", "ENSG2", "ENSG3", "ENSG4"], ["CD3E", "TBCE", "MS4A1", "TBCE"]


@pytest.fixture
def offer(datasetdir, host, monkeypatch):
    """Have the host offer a file as that of a sample, of which a checksum is published (or not)."""
    monkeypatch.setattr(tenx_files, "_URL", host.url + "{file}")

    def call(name, kind, content, *, published=True, shape=None):
        sample = tenx_files._Sample("1.0", kind, md5(content) if published else None, shape)
        monkeypatch.setitem(tenx_files.SAMPLES, name, sample)
        host.files[f"{name}_filtered_{kind}"] = content

    return call


def check(adata, genes=(0, 1, 2, 3), symbols=("CD3E", "TBCE", "MS4A1", "TBCE-1")):
    assert isinstance(adata.X, sp.csr_matrix)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[:, genes])
    assert list(adata.obs_names) == BARCODES
    assert list(adata.var_names) == list(symbols)
    assert list(adata.var["gene_ids"]) == [IDS[i] for i in genes]
    assert list(adata.obs["batch"]) == ["2", "1", "10"]
    assert list(adata.obs["batch"].cat.categories) == ["1", "2", "10"]


@pytest.mark.parametrize("folder", ["filtered_matrices_mex/hg19", "filtered_gene_bc_matrices/GRCh38"])
def test_text_of_version_2(offer, roundtrip, assert_same, folder):
    offer("pbmc4k", "gene_bc_matrices.tar.gz", mex_v2(COUNTS, BARCODES, IDS, SYMBOLS, folder))
    adata = sx.datasets.dataset_10x("pbmc4k")
    check(adata)
    assert list(adata.var) == ["gene_ids"]
    assert not adata.obsm
    assert_same(roundtrip(adata).X, adata.X)


def test_text_of_version_3_with_proteins(offer):
    names = ["CD3E", "CD3_TotalSeqB", "MS4A1", "IgG1_control_TotalSeqB"]
    types = ["Gene Expression", "Antibody Capture"] * 2
    offer("pbmc_10k_protein_v3", "feature_bc_matrix.tar.gz", mex_v3(COUNTS, BARCODES, IDS, names, types))
    adata = sx.datasets.dataset_10x("pbmc_10k_protein_v3")
    check(adata, (0, 2), ("CD3E", "MS4A1"))
    proteins = adata.obsm["protein_expression"]
    assert list(proteins) == ["CD3", "IgG1_control"]
    assert list(proteins.index) == BARCODES
    np.testing.assert_array_equal(proteins, COUNTS[:, [1, 3]])
    assert set(proteins.dtypes) == {np.dtype("int64")}
    sx.pp.setup_anndata(adata[:2].copy(), protein_obsm_key="protein_expression")


def test_hdf5_of_version_2(offer, tmp_path):
    h5_v2(tmp_path / "x.h5", COUNTS, BARCODES, IDS, SYMBOLS, "mm10")
    offer("1M_neurons", "gene_bc_matrices_h5.h5", (tmp_path / "x.h5").read_bytes())
    check(sx.datasets.dataset_10x("1M_neurons"))


def features(types=("Gene Expression",) * 4, genomes=("hg19", "hg19", "mm10", "mm10"), names=SYMBOLS):
    return {"id": IDS, "name": names, "feature_type": types, "genome": genomes}


def test_hdf5_of_version_3_with_two_species(offer, tmp_path):
    h5_v3(tmp_path / "x.h5", COUNTS, BARCODES, features())
    offer("hgmm_1k_v3", "feature_bc_matrix.h5", (tmp_path / "x.h5").read_bytes(), published=False)
    adata = sx.datasets.dataset_10x("hgmm_1k_v3")
    check(adata)
    assert list(adata.var["genome"]) == ["hg19", "hg19", "mm10", "mm10"]
    assert adata.var["genome"].dtype == "category"


def test_hdf5_of_version_3_with_proteins_and_others(offer, tmp_path, logged):
    types = ["Gene Expression", "Antibody Capture", "Antibody Capture", "CRISPR Guide Capture"]
    names = ["CD3E", "CD3_TotalSeqA", "CD3_TotalSeqB", "guide"]  # told apart by their end only
    columns = features(types, ["hg19", "", "", ""], names) | {"pattern": ["", "5PNN", "5PNN", ""]}
    h5_v3(tmp_path / "x.h5", COUNTS, BARCODES, columns)
    offer("pbmc_1k_protein_v3", "feature_bc_matrix.h5", (tmp_path / "x.h5").read_bytes())
    adata = sx.datasets.dataset_10x("pbmc_1k_protein_v3")
    assert adata.shape == (2, 1)  # the first cell has no count of a gene
    np.testing.assert_array_equal(adata.X.toarray().ravel(), COUNTS[1:, 0])
    np.testing.assert_array_equal(adata.obsm["protein_expression"], COUNTS[1:, 1:3])
    assert list(adata.obsm["protein_expression"]) == ["CD3_TotalSeqA", "CD3_TotalSeqB"]
    assert list(adata.var) == ["gene_ids", "genome"]
    assert "1 features of type 'CRISPR Guide Capture'" in logged()
    assert "1 of 3 cells" in logged()


def test_barcodes_that_are_not_filtered(offer, host):
    raw = np.array([[0, 0, 0, 0], *COUNTS])
    content = mex_v2(raw, ["TT-1", *BARCODES], IDS, SYMBOLS, "raw_gene_bc_matrices/GRCh38")
    offer("pbmc4k", "gene_bc_matrices.tar.gz", b"")
    host.files["pbmc4k_raw_gene_bc_matrices.tar.gz"] = content
    check(sx.datasets.dataset_10x("pbmc4k", filtered=False))


def test_numbers_that_were_published_are_checked(offer):
    content = mex_v2(COUNTS, BARCODES, IDS, SYMBOLS, "filtered_matrices_mex/hg19")
    offer("b_cells", "gene_bc_matrices.tar.gz", content, published=False, shape=(10085, 32738))
    with pytest.raises(ValueError, match="has 3 cells and 4 genes, expected 10085 cells and 32738 genes"):
        sx.datasets.dataset_10x("b_cells")


def test_what_is_no_output_of_cell_ranger(offer, datasetdir):
    offer("t_4k", "gene_bc_matrices.tar.gz", b"<html>Please log in</html>", published=False)
    with pytest.raises(ValueError, match=r"'t_4k_filtered_gene_bc_matrices\.tar\.gz' cannot be read .*delete it from"):
        sx.datasets.dataset_10x("t_4k")
    assert not list(datasetdir.glob("*.sha256"))


def test_a_checksum_that_was_published_is_checked(offer, host):
    offer("pbmc4k", "gene_bc_matrices.tar.gz", b"right")
    host.files["pbmc4k_filtered_gene_bc_matrices.tar.gz"] = b"wrong"
    with pytest.raises(ValueError, match="its checksum is md5:"):
        sx.datasets.dataset_10x("pbmc4k")


@pytest.mark.parametrize(("name", "meant"), [("pbmc4K", "pbmc4k"), ("PBMC_10k_v3", "pbmc_10k_v3"), ("cd-34", "cd34")])
def test_a_name_that_is_wrong_by_little(name, meant):
    with pytest.raises(ValueError, match=rf"name='{name}' is not one of .*Did you mean '{meant}'"):
        sx.datasets.dataset_10x(name)


def test_without_a_network(datasetdir, monkeypatch):
    monkeypatch.setattr(tenx_files, "_URL", "http://127.0.0.1:9/{version}/{name}/{file}")
    with pytest.raises(
        OSError, match=r"http://127\.0\.0\.1:9/3\.0\.0/heart_1k_v3/heart_1k_v3_raw_feature_bc_matrix\.h5"
    ):
        sx.datasets.dataset_10x("heart_1k_v3", filtered=False)


def test_the_table_of_samples():
    text = sx.datasets.dataset_10x.__doc__
    short = {"frozen_pbmc_donor_b": "_b", "frozen_pbmc_donor_c": "_c"}
    assert all(short.get(name, name) in text for name in tenx_files.SAMPLES)
    assert f"one of {len(tenx_files.SAMPLES)} samples" in text
    published = [s for s in tenx_files.SAMPLES.values() if s.checksum]
    assert f"For {len(published)} samples somebody" in " ".join(text.split())
    assert all(s.checksum.startswith("md5:") and len(s.checksum) == 36 for s in published)
    assert len({s.checksum for s in published}) == len(published)
    file = tenx_files.sample_file("pbmc4k")
    assert file.url == (
        "https://cf.10xgenomics.com/samples/cell-exp/2.1.0/pbmc4k/pbmc4k_filtered_gene_bc_matrices.tar.gz"
    )


# ---- brain_small ---------------------------------------------------------------------------------------------------


@pytest.fixture
def brain(offer, host, monkeypatch):
    """Have both files offered; the table has its cells in another order."""

    def call(cells):
        offer("neuron_9k", "gene_bc_matrices.tar.gz", mex_v2(COUNTS, BARCODES, IDS, SYMBOLS, "x/mm10"), published=False)
        n = len(cells)
        table = {
            "raw_qc": ({"num_umi": np.arange(n), "mapped_reads": np.linspace(0, 1, n)}, cells, "barcode"),
            "clusters": ({"Cluster": np.array([10, 2, 1])[:n]}, cells, "Barcode"),
        }
        content = pickled(table)
        host.files["table"] = content
        file = tenx.File(host.url + "table", "table.pickle", git(content))
        monkeypatch.setattr(tenx, "_BRAIN_SMALL", file)

    return call


def test_brain_small(brain):
    brain(["AA-1", "GG-10", "CC-2"])
    adata = sx.datasets.brain_small()
    check(adata)
    assert list(adata.obs["cluster"]) == ["1", "10", "2"]
    assert list(adata.obs["cluster"].cat.categories) == ["1", "2", "10"]
    assert list(adata.obs["num_umi"]) == [2, 0, 1]
    assert list(adata.obs["mapped_reads"]) == [1.0, 0.0, 0.5]
    sx.pp.setup_anndata(adata, labels_key="cluster")


def test_brain_small_with_other_cells(brain):
    brain(["AA-1", "GG-10", "TT-2"])
    with pytest.raises(ValueError, match=r"'neuron_9k_filtered.* has other barcodes than the table of its quality"):
        sx.datasets.brain_small()


def test_nothing_warns_of_names(offer):
    offer("pbmc4k", "gene_bc_matrices.tar.gz", mex_v2(COUNTS, BARCODES, IDS, ["A"] * 4, "x/hg19"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adata = sx.datasets.dataset_10x("pbmc4k")
    assert list(adata.var_names) == ["A", "A-1", "A-2", "A-3"]
