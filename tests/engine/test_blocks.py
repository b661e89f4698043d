from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scvi_ext.data.blocks import Block, DeviceCounts, host_counts
from scvi_ext.data.registry import read_setup
from scvi_ext.data.store import CellStore
from scvi_ext.pp import setup_anndata

CPU = torch.device("cpu")


def counts(kind):
    rng = np.random.default_rng(0)
    x = rng.poisson(0.7, (40, 13)).astype(np.float32)
    if kind == "with empty rows":
        x[[0, 17, 39]] = 0
    elif kind == "one full row":
        x[:] = 0
        x[5] = np.arange(1, 14)
    elif kind == "empty":
        x[:] = 0
    elif kind == "no genes in the end":
        x[:, 6:] = 0
    return sp.csr_matrix(x)


@pytest.mark.parametrize("kind", ["full", "with empty rows", "one full row", "empty", "no genes in the end"])
@pytest.mark.parametrize("rows", [[3], [0, 39, 17], [5, 5, 5, 0], list(range(40)), []], ids=len)
def test_host_and_device_counts_are_the_dense_rows(kind, rows):
    matrix, rows = counts(kind), np.array(rows, dtype=np.int64)
    expected = torch.from_numpy(matrix.toarray()[rows])
    rows = torch.from_numpy(rows)
    for found in (host_counts(matrix).rows(rows).to_dense(), DeviceCounts(matrix, CPU).rows(rows)):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_device_counts_do_not_change_the_matrix():
    matrix = counts("full")
    before = matrix.copy()
    DeviceCounts(matrix, CPU).rows(torch.arange(40))
    assert (matrix != before).nnz == 0


def fails(*args):
    msg = "no such device\nand pages of it"
    raise RuntimeError(msg)


@pytest.mark.parametrize(
    ("gather", "note"),
    [
        (fails, "cells gathered without a kernel, which does not run here (no such device)"),
        (
            lambda indptr, genes, values, rows, x: x.zero_(),
            "cells gathered without a kernel, which gives other rows here",
        ),
        (None, ""),
    ],
    ids=["fails", "wrong", "right"],
)
def test_a_gather_kernel_is_used_only_if_it_gathers_the_same_rows(gather, note, monkeypatch):
    store = DeviceCounts(counts("full"), CPU)

    def right(indptr, genes, values, rows, x):
        x.copy_(store.rows_by_torch(rows))

    monkeypatch.setitem(sys.modules, "scvi_ext.kernels.cuda", SimpleNamespace(gather_rows=gather or right))
    kernel, why = store._kernel()
    assert why == note
    assert (kernel is None) == bool(note)


@pytest.fixture
def store(make_counts):
    adata = make_counts()
    setup_anndata(
        adata,
        batch_key="batch",
        labels_key="cell_type",
        size_factor_key="size",
        categorical_covariate_keys="sex",
        continuous_covariate_keys="age",
    )
    columns = frozenset({"labels", "size_factor", "categorical", "continuous"})
    return CellStore.from_adata(adata, read_setup(adata), columns=columns)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 50), (50, 120), (120, 201)])
def test_a_block_counts_its_cells_from_its_start(store, start, stop):
    block = Block(store, CPU, start, stop)
    rows = np.array([4, 0, 31, 4])
    cells = block.minibatch(block.rows(rows))
    where = rows + start
    np.testing.assert_array_equal(cells.x.to_dense(), store.counts.toarray()[where])
    for name in ("batch_index", "labels", "size_factor", "categorical", "continuous"):
        column = getattr(store, name)
        found = getattr(cells, name)
        np.testing.assert_array_equal(found, column[where])
        assert found.numpy().dtype == column.dtype
    assert cells.protein is None


def test_columns_that_are_not_read_are_absent(registered):
    store = CellStore.from_adata(registered, read_setup(registered))
    cells = Block(store, CPU).minibatch(np.arange(3))
    assert {name for name, value in cells._asdict().items() if value is not None} == {"x", "batch_index"}


def test_entries_that_a_matrix_holds_twice_are_added_up(store):
    counts = store.counts
    twice = sp.csr_matrix(
        (np.repeat(counts.data, 2), np.repeat(counts.indices, 2), 2 * counts.indptr), shape=counts.shape
    )
    assert not twice.has_canonical_format
    block = Block(replace(store, counts=twice), CPU)
    np.testing.assert_array_equal(block.minibatch(np.arange(5)).x.to_dense(), 2 * counts[:5].toarray())
    assert twice.nnz == 2 * counts.nnz  # the store is as it was
