"""Counts of a minibatch as sparse rows in host memory: the few words of a tensor that models use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import prange
from torch.autograd.function import once_differentiable

from scvi_ext.kernels import dense
from scvi_ext.kernels.compiler import arrays, fast, in_parallel, kernel, parallel, widest_vectors

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from torch import Tensor


_FEW = 2**17  # entries, which one thread has summed up before others are awake


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Rows of a compressed sparse matrix.

    Parameters
    ----------
    indptr, genes, values
        As in ``scipy.sparse.csr_matrix``, no gene twice in a row: int64 (B + 1,), int32 and float32 (one per entry).
    n_genes
        Number of columns.
    multiply_sparse
        Whether a product with a matrix goes over the entries; else the rows are made dense for it.
    """

    indptr: Tensor
    genes: Tensor
    values: Tensor
    n_genes: int
    multiply_sparse: bool = True

    @classmethod
    def from_dense(cls, x: Tensor) -> SparseRows:
        """The entries of ``x`` (B, G) that are not zero."""
        rows, genes = torch.nonzero(x, as_tuple=True)
        indptr = torch.searchsorted(rows, torch.arange(len(x) + 1))
        return cls(indptr, genes.int(), x[rows, genes], x.shape[1])

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return len(self), self.n_genes

    def rows(self, rows: Tensor) -> SparseRows:
        """The rows at these positions."""
        gathered = in_parallel(_gather_in_parts, *arrays(self.indptr, self.genes, self.values, rows))
        indptr, genes, values = map(torch.from_numpy, gathered)
        return replace(self, indptr=indptr, genes=genes, values=values)

    def __truediv__(self, divisors: Tensor) -> SparseRows:
        """Each row divided by its own number, (B, 1)."""
        return replace(self, values=self.values / divisors.flatten().repeat_interleave(self.indptr.diff()))

    def mean(self, dim: int, keepdim: bool = False) -> Tensor:
        """Mean over the genes (``dim=-1``), shape (B,), or (B, 1) with ``keepdim``."""
        return self.sum(dim, keepdim) / self.n_genes

    def log1p(self) -> SparseRows:
        """log(1 + x)."""
        return replace(self, values=torch.log1p(self.values))

    def sum(self, dim: int, keepdim: bool = False) -> Tensor:
        """Sum over the genes (``dim=-1``), shape (B,), or (B, 1) with ``keepdim``."""
        if dim not in (-1, 1):
            msg = f"dim={dim}: sparse rows are summed over genes only, dim=-1."
            raise ValueError(msg)
        sums = torch.empty(len(self))
        if self.values.numel() <= _FEW:
            _row_sums(0, len(self), *arrays(self.indptr, self.values, sums))
        else:
            in_parallel(_row_sums_in_parts, *arrays(self.indptr, self.values, sums))
        return sums.unsqueeze(-1) if keepdim else sums

    def to_dense(self) -> Tensor:
        """All entries, shape (B, G), float32."""
        dense = torch.zeros(self.shape)
        in_parallel(_fill_in_parts, *arrays(self.indptr, self.genes, self.values, dense))
        return dense

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``, shape (B, H), for ``weight`` of shape (H, G)."""
        self.refuse_others(weight)
        if not (self.multiply_sparse and weight.dtype == torch.float32):
            return dense.linear(self.to_dense().to(weight.dtype), weight, bias)
        return _Product.apply(self, weight, bias)

    def refuse_others(self, weight: Tensor) -> None:
        """Raise a ValueError unless ``weight`` (H, G) is of as many genes: kernels would read beyond its end."""
        if weight.shape[1] != self.n_genes:
            msg = f"Counts of {self.n_genes} genes were given to a layer for {weight.shape[1]}."
            raise ValueError(msg)


def linear_once(x: SparseRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` over the entries of x, outside of autograd.

    The kernel goes along the rows of weight.T, so a weight that is stored gene by gene needs no copy.
    """
    out = np.empty((len(x), len(weight)), np.float32)
    out[:] = 0 if bias is None else arrays(bias)[0]
    in_parallel(_multiply_in_parts, *arrays(x.indptr, x.genes, x.values, weight.t()), out)
    return torch.from_numpy(out)


def gradient_of_weight(x: SparseRows, d_out: Tensor) -> Tensor:
    """``d_out.T @ x``, (H, G), gene by gene in memory."""
    indptr, genes, values, d_out = arrays(x.indptr, x.genes, x.values, d_out)
    starts = np.zeros(x.n_genes + 2, np.int64)
    cells, by_gene = np.empty_like(genes), np.empty_like(values)
    _by_gene(indptr, genes, values, starts, cells, by_gene)
    d_weight = torch.empty(x.n_genes, d_out.shape[1])
    in_parallel(_multiply_gradient_in_parts, starts, cells, by_gene, d_out, *arrays(d_weight))
    return d_weight.t()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: SparseRows, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.x, ctx.has_bias = x, bias is not None
        return linear_once(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[None, Tensor, Tensor | None]:
        return None, gradient_of_weight(ctx.x, d_out), d_out.sum(0) if ctx.has_bias else None


# ---- kernels ------------------------------------------------------------------------------------------------------


@kernel
def _copy_rows(begin, end, indptr, genes, values, rows, new_indptr, new_genes, new_values):
    for i in range(begin, end):
        first, last = indptr[rows[i]], indptr[rows[i] + 1]
        new_genes[new_indptr[i] : new_indptr[i + 1]] = genes[first:last]
        new_values[new_indptr[i] : new_indptr[i + 1]] = values[first:last]


@parallel
def _gather_in_parts(parts, indptr, genes, values, rows):
    n = rows.size
    new_indptr = np.zeros(n + 1, np.int64)
    for i in range(n):
        new_indptr[i + 1] = new_indptr[i] + indptr[rows[i] + 1] - indptr[rows[i]]
    new_genes, new_values = np.empty(new_indptr[-1], np.int32), np.empty(new_indptr[-1], np.float32)
    for part in prange(parts):
        begin, end = part * n // parts, (part + 1) * n // parts
        _copy_rows(begin, end, indptr, genes, values, rows, new_indptr, new_genes, new_values)
    return new_indptr, new_genes, new_values


@kernel
def _row_sums(begin, end, indptr, values, sums):
    """In float64, in eight lanes, which vectorise."""
    lanes = np.empty(8)
    for i in range(begin, end):
        row = values[indptr[i] : indptr[i + 1]]
        lanes[:] = 0
        eights = row.size - row.size % 8
        for start in range(0, eights, 8):
            for lane in range(8):
                lanes[lane] += row[start + lane]
        total = 0.0
        for lane in range(8):
            total += lanes[lane]
        for e in range(eights, row.size):
            total += row[e]
        sums[i] = total


@parallel
def _row_sums_in_parts(parts, indptr, values, sums):
    for part in prange(parts):
        _row_sums(part * sums.size // parts, (part + 1) * sums.size // parts, indptr, values, sums)


@kernel
def _fill(begin, end, indptr, genes, values, dense):
    for i in range(begin, end):
        for e in range(indptr[i], indptr[i + 1]):
            dense[i, genes[e]] += values[e]


@parallel
def _fill_in_parts(parts, indptr, genes, values, dense):
    n = dense.shape[0]
    for part in prange(parts):
        _fill(part * n // parts, (part + 1) * n // parts, indptr, genes, values, dense)


@fast
def _add_products(begin, end, rows, values, matrix, out):
    """Add the rows of ``matrix`` that the entries name to ``out``, four at a time, so that it is touched less often."""
    widest_vectors()
    fours = begin + (end - begin) // 4 * 4
    for e in range(begin, fours, 4):
        v0, v1, v2, v3 = values[e], values[e + 1], values[e + 2], values[e + 3]
        r0, r1, r2, r3 = matrix[rows[e]], matrix[rows[e + 1]], matrix[rows[e + 2]], matrix[rows[e + 3]]
        for h in range(out.size):
            out[h] += (v0 * r0[h] + v1 * r1[h]) + (v2 * r2[h] + v3 * r3[h])
    for e in range(fours, end):
        v, r = values[e], matrix[rows[e]]
        for h in range(out.size):
            out[h] += v * r[h]


@kernel
def _multiply(begin, end, indptr, genes, values, weight, out):
    for i in range(begin, end):
        _add_products(indptr[i], indptr[i + 1], genes, values, weight, out[i])


@kernel
def _by_gene(indptr, genes, values, starts, cells, by_gene):
    """Bring the entries into the order of their genes; those of gene g end up from starts[g] to starts[g + 1]."""
    for e in range(genes.size):
        starts[genes[e] + 2] += 1
    for g in range(2, starts.size):
        starts[g] += starts[g - 1]
    for i in range(indptr.size - 1):
        for e in range(indptr[i], indptr[i + 1]):
            place = starts[genes[e] + 1]
            cells[place], by_gene[place] = i, values[e]
            starts[genes[e] + 1] += 1


@kernel
def _multiply_gradient(begin, end, starts, cells, values, d_out, d_weight):
    for g in range(begin, end):
        d_weight[g] = 0
        _add_products(starts[g], starts[g + 1], cells, values, d_out, d_weight[g])


@parallel
def _multiply_in_parts(parts, indptr, genes, values, weight, out):
    n = out.shape[0]
    for part in prange(parts):
        _multiply(part * n // parts, (part + 1) * n // parts, indptr, genes, values, weight, out)


@parallel
def _multiply_gradient_in_parts(parts, starts, cells, values, d_out, d_weight):
    n = d_weight.shape[0]
    for part in prange(parts):
        _multiply_gradient(part * n // parts, (part + 1) * n // parts, starts, cells, values, d_out, d_weight)


def all_counts(values: np.ndarray, largest: float) -> bool:
    """Whether all of these float32 numbers are whole, not negative and at most ``largest``.

    On one thread: this runs beside training, in the thread that reads. Would that have threads of OpenMP, too, there
    were more of them than processors, and those that train would sleep between two operations instead of waiting.
    """
    return _all_counts(values, np.float32(largest))


@kernel
def _all_counts(values, largest):
    widest_vectors()
    all_counts = True
    for i in range(len(values)):  # to the end, whatever is found: so it goes over many at a time
        all_counts &= (values[i] == np.trunc(values[i])) & (values[i] >= 0) & (values[i] <= largest)
    return all_counts


def sums_by_set(counts: csr_matrix, sets: np.ndarray, per_cell: np.ndarray, n_sets: int) -> np.ndarray:
    """Sums over the cells of each set, (3, S, G): of their counts, of counts times ``per_cell``, and of cells with any.

    ``counts`` has n cells in compressed rows; ``sets`` and ``per_cell`` have a value for each.
    """
    parts = np.zeros((torch.get_num_threads(), 3, n_sets, counts.shape[1]))
    in_parallel(_sums_by_set_in_parts, parts, counts.indptr, counts.indices, counts.data, sets, per_cell)
    return parts.sum(0)


@parallel
def _sums_by_set_in_parts(n_parts, parts, indptr, genes, values, sets, per_cell):
    n_cells = len(sets)
    for part in prange(n_parts):
        first, stop = part * n_cells // n_parts, (part + 1) * n_cells // n_parts
        _sums_by_set(parts[part], indptr, genes, values, sets, per_cell, first, stop)


@kernel
def _sums_by_set(sums, indptr, genes, values, sets, per_cell, first, stop):
    for cell in range(first, stop):
        of_counts, weighted, of_cells = sums[0, sets[cell]], sums[1, sets[cell]], sums[2, sets[cell]]
        weight = per_cell[cell]
        for i in range(indptr[cell], indptr[cell + 1]):
            gene, value = np.uint32(genes[i]), values[i]  # unsigned: an index that may count from the end costs time
            of_counts[gene] += value
            weighted[gene] += value * weight
            of_cells[gene] += value > 0
