"""How far imputed counts are from the original ones, and what can be imputed without any model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    import scipy.sparse as sp

_CHUNK_FLOATS = 2**22  # of the profiles that are dense at once: 32 MiB


def error_measures(original: np.ndarray, imputed: np.ndarray, cells: np.ndarray, genes: np.ndarray) -> dict[str, float]:
    """Absolute errors of imputed entries, summed up in four ways.

    Parameters
    ----------
    original, imputed
        Values of the entries, shape (m,).
    cells, genes
        Where the entries are, integers, shape (m,).

    Returns
    -------
    ``median`` and ``mean`` over all entries, and the means of ``median_per_cell`` and ``median_per_gene`` over those
    cells and genes that have entries.
    """
    error = np.abs(np.subtract(original, imputed, dtype=np.float64))
    return {
        "median": float(np.median(error)),
        "mean": float(error.mean()),
        "median_per_cell": float(group_medians(error, cells, np.unique(cells)).mean()),
        "median_per_gene": float(group_medians(error, genes, np.unique(genes)).mean()),
    }


def group_medians(values: np.ndarray, groups: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Median of the values in each of the ``wanted`` groups, each of which has some."""
    return np.asarray(ndimage.median(values, groups, wanted), dtype=np.float64)


def pooled_rates(
    counts: sp.csr_matrix, pools: sp.csr_matrix, libraries: np.ndarray, cells: np.ndarray, genes: np.ndarray
) -> np.ndarray:
    """Counts that cells would have if their profiles were those of pools: the estimate of a Poisson model.

    Parameters
    ----------
    counts
        Counts to pool, shape (n, G).
    pools
        Row c marks the rows of ``counts`` that are pooled for cell c: shape (C, n), or (1, n) for one pool of all.
    libraries
        Counts of each cell, shape (C,).
    cells, genes
        The entries, shape (m,), in ascending order of ``cells``.

    Returns
    -------
    Library size of the cell times share of the gene in the pool, shape (m,); 0 where a pool has no counts.
    """
    in_pool = pools @ np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    shares = np.empty(len(cells))
    chunk = max(1, _CHUNK_FLOATS // max(1, counts.shape[1]))
    for first in range(0, pools.shape[0], chunk):
        pooled = (pools[first : first + chunk] @ counts).toarray() / np.maximum(in_pool[first : first + chunk, None], 1)
        if pools.shape[0] == 1:
            return libraries[cells] * pooled[0, genes]
        stretch = slice(*np.searchsorted(cells, [first, first + chunk]))
        shares[stretch] = pooled[cells[stretch] - first, genes[stretch]]
    return libraries[cells] * shares
