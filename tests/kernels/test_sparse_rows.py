"""Sparse rows are the tensor that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from _tolerances import FLOAT32, FLOAT64
from torch.testing import assert_close

from scvi_ext.kernels import sparse
from scvi_ext.kernels.sparse import SparseRows

B, G, H = 9, 31, 6


def draw(density: float = 0.3, n_cells: int = B, n_genes: int = G) -> tuple[torch.Tensor, SparseRows]:
    """A dense tensor with rows that are empty (the first, one in the middle, the last) and full, and its sparse rows.

    The rows hold explicit zeros, and the genes of a row are in no order.
    """
    rng = np.random.default_rng(0)
    matrix = sp.random(n_cells, n_genes, density, "csr", np.float32, rng, data_rvs=lambda n: rng.gamma(1.0, 9.0, n))
    dense = matrix.toarray()
    dense[[0, n_cells // 2, n_cells - 1]] = 0
    dense[1] = 1.5
    indptr, genes, values = [0], [], []
    for row in dense:
        zeros = np.flatnonzero(row == 0)[::3] if row.any() else []
        stored = rng.permutation(np.concatenate([np.flatnonzero(row), zeros])).astype(np.int32)
        genes.append(stored)
        values.append(row[stored])
        indptr.append(indptr[-1] + len(stored))
    rows = SparseRows(
        torch.tensor(indptr), *(torch.from_numpy(np.concatenate(part)) for part in (genes, values)), n_genes
    )
    return torch.from_numpy(dense), rows


def test_there_and_back():
    dense, rows = draw()
    assert rows.shape == (len(rows), rows.n_genes) == (B, G)
    assert torch.equal(rows.to_dense(), dense)
    again = SparseRows.from_dense(dense)
    assert torch.equal(again.to_dense(), dense)
    assert (again.values != 0).all()
    assert (again.indptr.dtype, again.genes.dtype, again.values.dtype) == (torch.int64, torch.int32, torch.float32)


@pytest.mark.parametrize("which", [[0], [3, 3, 0, 8, 1], list(range(B)), []], ids=str)
def test_rows_are_taken_in_any_order(which):
    dense, rows = draw()
    taken = rows.rows(torch.tensor(which, dtype=torch.int64))
    assert torch.equal(taken.to_dense(), dense[which])
    assert (taken.indptr.dtype, taken.genes.dtype, taken.values.dtype) == (torch.int64, torch.int32, torch.float32)
    assert taken.shape == (len(which), G)
    assert torch.equal(rows.to_dense(), dense)


@pytest.mark.parametrize("multiply_sparse", [True, False])
def test_taking_rows_keeps_how_they_are_multiplied(multiply_sparse):
    _, rows = draw()
    rows = SparseRows(rows.indptr, rows.genes, rows.values, G, multiply_sparse)
    assert rows.rows(torch.tensor([1, 2])).multiply_sparse is multiply_sparse
    assert rows.log1p().multiply_sparse is multiply_sparse
    assert (rows / torch.ones(B, 1)).multiply_sparse is multiply_sparse


def test_log1p_and_sum():
    dense, rows = draw()
    assert torch.equal(rows.log1p().to_dense(), torch.log1p(dense))
    assert torch.equal(rows.to_dense(), dense)
    for dim in (-1, 1):
        assert_close(rows.sum(dim), dense.sum(dim), **FLOAT32)
        assert_close(rows.sum(dim, keepdim=True), dense.sum(dim, keepdim=True), **FLOAT32)


def test_the_sum_is_over_genes_only():
    for over_cells in (draw()[1].sum, draw()[1].mean):
        with pytest.raises(ValueError, match=r"dim=0: sparse rows are summed over genes only, dim=-1\."):
            over_cells(0)


def test_mean_and_quotient():
    dense, rows = draw()
    for dim in (-1, 1):
        assert_close(rows.mean(dim), dense.mean(dim), **FLOAT32)
        assert_close(rows.mean(dim, keepdim=True), dense.mean(dim, keepdim=True), **FLOAT32)
    divisors = 1 + dense.mean(-1, keepdim=True)
    assert torch.equal((rows / divisors).to_dense(), dense / divisors)
    assert torch.equal(rows.to_dense(), dense)
    assert (rows / divisors).shape == rows.shape


def test_no_rows_at_all():
    none = draw()[1].rows(torch.tensor([], dtype=torch.int64))
    weight = torch.ones(H, G, requires_grad=True)
    assert none.sum(-1).shape == (0,)
    assert none.to_dense().shape == (0, G)
    out = none.linear(weight, torch.ones(H))
    assert out.shape == (0, H)
    out.sum().backward()
    assert (weight.grad == 0).all()


# ---- the product ---------------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype, by_gene: bool, bias: bool) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(H, G, generator=g, dtype=dtype)
    if by_gene:
        weight = weight.t().contiguous().t()
    return [weight.requires_grad_(), torch.randn(H, generator=g, dtype=dtype).requires_grad_() if bias else None]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("by_gene", [True, False], ids=["by-gene", "by-unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("multiply_sparse", [True, False], ids=["sparse", "dense"])
def test_the_product_and_its_gradients(multiply_sparse, dtype, by_gene, bias):
    dense, rows = draw()
    rows = SparseRows(rows.indptr, rows.genes, rows.values, G, multiply_sparse)
    weights = torch.randn(B, H, generator=torch.Generator().manual_seed(2), dtype=dtype)

    here = parameters(dtype, by_gene, bias)
    found = rows.linear(*here)
    (weights * found).sum().backward()
    there = [None if t is None else t.detach().double().requires_grad_() for t in here]
    expected = torch.nn.functional.linear(dense.double(), *there)
    (weights.double() * expected).sum().backward()

    assert found.dtype == dtype
    tolerance = FLOAT32 if dtype == torch.float32 else FLOAT64
    atol = tolerance["atol"] * float(dense.max())  # the counts are not of order one
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(here, there, strict=True) if a is not None)]
    for f, e in pairs:
        assert_close(f.double(), e, rtol=tolerance["rtol"], atol=atol)
    assert here[0].grad.stride() == here[0].stride()


@pytest.mark.parametrize(("n_cells", "n_genes"), [(4, 1), (4, 2003), (257, 31)])
def test_the_product_in_other_sizes(n_cells, n_genes):
    dense, rows = draw(0.1, n_cells, n_genes)
    weight = torch.randn(H, n_genes, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = rows.linear(weight)
    (d_found,) = torch.autograd.grad(found.square().sum(), weight)
    exact = weight.detach().double().requires_grad_()
    expected = dense.double() @ exact.t()
    (d_expected,) = torch.autograd.grad(expected.square().sum(), exact)
    for f, e in ((found, expected), (d_found, d_expected)):
        assert_close(f.double(), e, rtol=0, atol=FLOAT32["rtol"] * float(e.detach().abs().max()))


def test_genes_that_no_cell_has_get_a_gradient_of_zero():
    dense, rows = draw()
    taken = rows.rows(torch.tensor([2, 3]))
    weight = torch.ones(H, G, requires_grad=True)
    taken.linear(weight).sum().backward()
    assert torch.equal((weight.grad != 0).all(0), dense[[2, 3]].sum(0) != 0)
    assert torch.equal((weight.grad != 0).any(0), dense[[2, 3]].sum(0) != 0)


def test_it_is_differentiated_once():
    rows, weight = draw()[1], torch.ones(H, G, requires_grad=True)
    (gradient,) = torch.autograd.grad(rows.linear(weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_is_not_finite_stays_in_its_row():
    _, rows = draw()
    values = rows.values.clone()
    values[rows.indptr[2]] = torch.nan
    out = SparseRows(rows.indptr, rows.genes, values, G).linear(torch.ones(H, G))
    assert torch.isnan(out).all(1).tolist() == [i == 2 for i in range(B)]
    assert torch.isfinite(out[[i for i in range(B) if i != 2]]).all()


def test_sums_of_many_entries_are_those_of_few(monkeypatch):
    x = torch.randint(0, 9, (37, 61)).float()
    rows = SparseRows.from_dense(x)
    few = rows.sum(-1)
    monkeypatch.setattr(sparse, "_FEW", 0)
    assert torch.equal(rows.sum(-1), few)
    assert torch.equal(few, x.sum(-1))
