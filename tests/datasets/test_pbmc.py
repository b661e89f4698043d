"""Both data sets on files made here in the format of the originals."""

from __future__ import annotations

import hashlib
import pickle
from importlib import import_module

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from _old_pickle import pickled
from _tenx_writing import git, md5, mex_v2

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._pbmc")
tenx_files = import_module("scvi_ext.datasets._tenx_files")

IDS, SYMBOLS = ["ENSG1", "ENSG2", "ENSG3", "ENSG4"], ["NOC2L", "ISG15", "AGRN", "SDF4"]
# "CC-1" is in both samples, and called "CC-11" where it comes for the second time.
OF_8K, OF_4K = ["AA-1", "CC-1", "low-1"], ["GG-1", "CC-1"]
COUNTS_8K = np.array([[1, 2, 0, 4], [0, 6, 7, 8], [1, 1, 1, 1]])
COUNTS_4K = np.array([[9, 0, 0, 3], [5, 0, 2, 1]])
IN_TABLE = ["CC-1", "AA-1", "GG-1", "CC-11"]
FROM_4K = np.array([0, 0, 1, 1])


@pytest.fixture
def offer(datasetdir, host, monkeypatch):
    def call(genes=("ENSG3", "ENSG1"), cells=IN_TABLE):
        monkeypatch.setattr(tenx_files, "_URL", host.url + "{file}")
        for name, counts, barcodes in (("pbmc8k", COUNTS_8K, OF_8K), ("pbmc4k", COUNTS_4K, OF_4K)):
            content = mex_v2(counts, barcodes, IDS, SYMBOLS, "filtered_gene_bc_matrices/GRCh38")
            host.files[f"{name}_filtered_gene_bc_matrices.tar.gz"] = content
            sample = tenx_files.SAMPLES[name]._replace(checksum=md5(content))
            monkeypatch.setitem(tenx_files.SAMPLES, name, sample)
        rows = list(range(1, len(cells) + 1))
        quality = {"num_umi": np.array([21, 7, 12, 8]), "mapped_reads": np.array([0.5, 0.25, 1.0, 0.0])}
        pcs = np.arange(8.0).reshape(4, 2)
        table = {
            "design": ({"(Intercept)": np.ones(4, int), "batchpbmc4k": FROM_4K, "WPC1": pcs[:, 0]}, rows, None),
            "raw_qc": (quality, cells, "x"),
            "qc_pc": pcs,
            "normalized_qc": ({name: values - 1.0 for name, values in quality.items()}, rows, None),
            "clusters": np.array([1, 0, 2, 1]),
            "list_clusters": np.array(["B cells", "NK cells", "Other"], dtype=object),
        }
        arrays = pd.DataFrame({"ENSG": genes, "GS": "?", "CD_logFC": [0.5, -1.5], "BDC_B": [1.0, 2.0]}, index=[5, 7])
        contents = {"_CELLS": pickled(table), "_GENES": arrays.to_csv().encode()}
        for name, content in contents.items():
            host.files[name] = content
            monkeypatch.setattr(module, name, module.File(host.url + name, f"{name}.file", git(content), len(content)))

    return call


def test_cells_of_both_samples_are_told_apart(offer, roundtrip, assert_same):
    offer()
    adata = sx.datasets.pbmc()
    assert list(adata.obs_names) == ["CC-1-pbmc8k", "AA-1-pbmc8k", "GG-1-pbmc4k", "CC-1-pbmc4k"]
    assert list(adata.obs["batch"]) == ["pbmc8k", "pbmc8k", "pbmc4k", "pbmc4k"]
    assert list(adata.var_names) == ["AGRN", "NOC2L"]
    expected = np.vstack([COUNTS_8K[[1, 0]], COUNTS_4K])[:, [2, 0]]
    np.testing.assert_array_equal(adata.X.toarray(), expected)
    assert isinstance(adata.X, sp.csr_matrix)
    assert adata.X.dtype == np.float32
    assert list(adata.obs["cell_type"]) == ["NK cells", "B cells", "Other", "NK cells"]
    assert list(adata.obs["cell_type"].cat.categories) == ["B cells", "NK cells", "Other"]
    assert list(adata.obs["num_umi"]) == [21, 7, 12, 8]
    assert list(adata.obs["mapped_reads"]) == [0.5, 0.25, 1.0, 0.0]
    assert list(adata.obsm["normalized_qc"]["num_umi"]) == [20, 6, 11, 7]
    np.testing.assert_array_equal(adata.obsm["qc_pc"], np.arange(8.0).reshape(4, 2))
    assert list(adata.var["gene_ids"]) == ["ENSG3", "ENSG1"]
    assert list(adata.var["CD_logFC"]) == [0.5, -1.5]
    assert list(adata.var["BDC_B"]) == [1.0, 2.0]
    assert "GS" not in adata.var
    assert_same(roundtrip(adata).obsm["normalized_qc"], adata.obsm["normalized_qc"])
    sx.pp.setup_anndata(adata, labels_key="cell_type")


def test_all_genes(offer):
    offer()
    adata = sx.datasets.pbmc(all_genes=True)
    assert list(adata.var_names) == SYMBOLS
    np.testing.assert_array_equal(adata.X.toarray(), np.vstack([COUNTS_8K[[1, 0]], COUNTS_4K]))
    np.testing.assert_array_equal(adata.var["CD_logFC"], [-1.5, np.nan, 0.5, np.nan])


def test_cells_and_genes_that_the_samples_lack(offer):
    offer(cells=["CC-1", "AA-1", "GG-1", "TT-1"])
    with pytest.raises(ValueError, match="has 1 cells that the samples lack, among them 'TT-1-pbmc4k'"):
        sx.datasets.pbmc()


def test_genes_that_the_samples_lack(offer):
    offer(genes=["ENSG3", "ENSG99"])
    with pytest.raises(ValueError, match="has 1 genes that the samples lack"):
        sx.datasets.pbmc()


# ---- the pickle ----------------------------------------------------------------------------------------------------

read_frames = import_module("scvi_ext.datasets._pickled").read_frames


def test_a_table_is_restored(tmp_path):
    columns = {"b": np.array([1, 2]), "a": np.array([0.5, 1.5]), "c": np.array([2.5, 3.5])}
    path = tmp_path / "x"
    path.write_bytes(pickled({"table": (columns, ["x", "y"], "cells"), "text": np.array(["u", "v"], dtype=object)}))
    found = read_frames(path)
    expected = pd.DataFrame(columns, index=pd.Index(np.array(["x", "y"], dtype=object), name="cells"))
    pd.testing.assert_frame_equal(found["table"], expected)
    assert list(found["text"]) == ["u", "v"]


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [{"a": Evil()}, {"a": print}, {"a": np.float64}])
def test_a_pickle_of_anything_else_is_refused(tmp_path, capsys, content):
    path = tmp_path / "x"
    path.write_bytes(pickled(content))
    with pytest.raises(ValueError, match=r"cannot be read as tables .*Nothing in it was executed"):
        read_frames(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [b"os\nsystem", b"pandas\nread_pickle", b"numpy\nload", b"builtins\neval"])
def test_names_in_a_pickle_are_not_called(tmp_path, name):
    mark = tmp_path / "mark"
    (tmp_path / "x").write_bytes(b"\x80\x03c" + name + b"\n(V" + f"touch {mark}".encode() + b"\ntR.")
    with pytest.raises(ValueError, match="cannot be read as tables"):
        read_frames(tmp_path / "x")
    assert not mark.exists()


def test_a_pickle_of_no_dict(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="cannot be read as tables"):
        read_frames(tmp_path / "x")


def test_a_pickle_that_is_cut_off(tmp_path):
    (tmp_path / "x").write_bytes(pickled({"table": ({"a": np.arange(2)}, ["x", "y"], None)})[:-40])
    with pytest.raises(ValueError, match="cannot be read as tables"):
        read_frames(tmp_path / "x")


# ---- purified ------------------------------------------------------------------------------------------------------


@pytest.fixture
def purified(datasetdir, monkeypatch):
    """Put a file there by hand."""

    def call(adata):
        datasetdir.mkdir()
        path = datasetdir / "PurifiedPBMCDataset.h5ad"
        adata.write_h5ad(path)
        checksum = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        monkeypatch.setattr(module, "_PURIFIED", module.File("http://127.0.0.1:9/", path.name, checksum))

    return call


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_cells_that_are_there_twice_are_taken_once(purified, kind, logged):
    counts = np.array([[1, 0, 2], [0, 3, 0], [1, 0, 2], [1, 0, 2], [0, 3, 0], [0, 2, 0]], dtype=np.float32)
    types = ["cd4_t_helper", "b_cells", "cd34", "cd4_t_helper", "b_cells", "cd34"]
    names = ["AA-1", "CC-1", "GG-1", "AA-1", "TT-1", "AC-1"]
    obs = pd.DataFrame({"cell_types": types, "n_counts": 1.0}, index=[f"{name}-{i}" for i, name in enumerate(names)])
    purified(ad.AnnData(kind(counts), obs=obs, var=pd.DataFrame(index=["A", "B", "C"])))
    adata = sx.datasets.purified_pbmc()
    # The third has the counts of the first, but another type
    assert list(adata.obs_names) == ["AA-1-0", "CC-1-1", "GG-1-2", "AC-1-5"]
    assert list(adata.obs["cell_type"]) == ["cd4_t_helper", "b_cells", "cd34", "cd34"]
    np.testing.assert_array_equal(adata.X.toarray(), counts[[0, 1, 2, 5]])
    assert isinstance(adata.X, sp.csr_matrix)
    assert list(adata.var_names) == ["A", "B", "C"]
    assert "2 cells in 'PurifiedPBMCDataset.h5ad' are there twice" in logged()
    sx.pp.setup_anndata(adata, labels_key="cell_type")


def test_a_file_without_types(purified):
    purified(ad.AnnData(np.ones((2, 2), np.float32)))
    with pytest.raises(ValueError, match="has no column 'cell_types'"):
        sx.datasets.purified_pbmc()


def test_where_the_files_are():
    for file in (module._CELLS, module._GENES, module._PURIFIED):
        assert "/9a647afc8893604fa11024ddcd5fc5bb22b8e50e/" in file.url
        assert file.size
