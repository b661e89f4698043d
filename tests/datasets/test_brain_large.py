"""Reading in pieces gives what reading at once gives."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import scipy.sparse as sp
from _tenx_writing import h5_v2, md5

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._brain_large")
tenx_files = import_module("scvi_ext.datasets._tenx_files")

N_CELLS, N_GENES = 50, 12
RNG = np.random.default_rng(4)
COUNTS = RNG.poisson(RNG.permutation(np.geomspace(0.05, 20, N_GENES)), (N_CELLS, N_GENES))
COUNTS[7] = 0
BARCODES = [f"ACGT{i:02}-{1 + i // 4}" for i in range(N_CELLS)]
SYMBOLS = [f"Gene{i // 2}" for i in range(N_GENES)]  # each name twice
IDS = [f"ENSMUSG{i}" for i in range(N_GENES)]


URL = tenx_files.sample_file("1M_neurons").url


@pytest.fixture(autouse=True)
def offered(datasetdir, host, monkeypatch, tmp_path):
    path = tmp_path / "x.h5"
    h5_v2(path, COUNTS, BARCODES, IDS, SYMBOLS, "mm10")
    host.files["1M_neurons_filtered_gene_bc_matrices_h5.h5"] = path.read_bytes()
    monkeypatch.setattr(tenx_files, "_URL", host.url + "{file}")
    sample = tenx_files.SAMPLES["1M_neurons"]._replace(checksum=md5(path.read_bytes()), shape=COUNTS.shape)
    monkeypatch.setitem(tenx_files.SAMPLES, "1M_neurons", sample)


@pytest.mark.parametrize("entries", [1, 40, 2**24])
def test_pieces_are_put_together(monkeypatch, entries):
    monkeypatch.setattr(module, "_ENTRIES", entries)
    adata = sx.datasets.brain_large(n_genes=None)
    assert isinstance(adata.X, sp.csr_matrix)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs_names) == BARCODES
    assert list(adata.var["gene_ids"]) == IDS
    assert list(adata.var_names[:4]) == ["Gene0", "Gene0-1", "Gene1", "Gene1-1"]
    assert list(adata.obs["batch"].cat.categories) == [str(i) for i in range(1, 14)]
    assert list(adata.obs["batch"][:5]) == ["1", "1", "1", "1", "2"]


@pytest.mark.parametrize("entries", [30, 2**24])
@pytest.mark.parametrize(("n_cells", "sample"), [(None, 20), (None, 10_000), (30, 20), (10, 20)])
def test_the_most_variable_genes_of_the_first_cells(monkeypatch, entries, n_cells, sample):
    monkeypatch.setattr(module, "_ENTRIES", entries)
    monkeypatch.setattr(module, "_SAMPLE", sample)
    adata = sx.datasets.brain_large(n_cells=n_cells, n_genes=5)
    seen = COUNTS[: min(sample, n_cells or N_CELLS)]
    expected = np.sort(np.argsort(-seen.var(axis=0), kind="stable")[:5])
    assert list(adata.var["gene_ids"]) == [IDS[i] for i in expected]
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[:n_cells, expected])


def test_no_piece_is_larger_than_it_should_be(monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES", 40)
    starts = sp.csr_matrix(COUNTS).indptr.astype(np.int64)
    matrix = {"data": COUNTS[COUNTS > 0], "indices": np.nonzero(COUNTS)[1]}
    pieces = list(module._pieces(matrix, starts, N_GENES))
    assert max(piece.nnz for piece in pieces) <= 40
    assert len(pieces) <= 2 * starts[-1] / 40 + 1  # and none is needlessly small
    np.testing.assert_array_equal(sp.vstack(pieces).toarray(), COUNTS)


def test_more_than_there_are(host):
    with pytest.raises(ValueError, match="n_cells=51 is more than the 50"):
        sx.datasets.brain_large(n_cells=51)
    with pytest.raises(ValueError, match="n_genes=720 is more than the 12"):
        sx.datasets.brain_large()
    assert host.requests == []


@pytest.mark.parametrize(("options", "error"), [({"n_cells": 0}, ValueError), ({"n_genes": 2.5}, TypeError)])
def test_numbers_that_are_none(options, error, host):
    with pytest.raises(error, match=next(iter(options))):
        sx.datasets.brain_large(**options)
    assert host.requests == []


def test_the_original():
    assert URL == (
        "https://cf.10xgenomics.com/samples/cell-exp/1.3.0/1M_neurons/1M_neurons_filtered_gene_bc_matrices_h5.h5"
    )
