"""Correlations between columns that do not fit into memory at once, or hardly do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

if TYPE_CHECKING:
    from collections.abc import Iterable

_FLOATS = 2**23  # of a block of rows in double precision: 64 MiB
_ROUNDING = 1e-7  # float32 values that differ by less, relative to their mean, are constant


def pearson(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Correlation of columns that come as blocks of rows, shape (G, G), float64; NaN for constant columns.

    Means and cross products of two parts are combined as by Chan, Golub and LeVeque (1983, eq. 2.1): nothing cancels,
    and memory is two matrices of this shape.
    """
    n, mean, products = 0, 0.0, 0.0
    for block in blocks:
        here = block.mean(0, dtype=np.float64)
        centred = block - here
        step = here - mean
        both = n + len(block)
        products = products + centred.T @ centred + np.outer(step, step * (n * len(block) / both))
        mean = mean + step * (len(block) / both)
        n = both
    variance = np.diag(products) / n
    sd = np.sqrt(np.where(variance > (_ROUNDING * mean) ** 2, variance, np.nan))
    return np.clip(products / (n * np.outer(sd, sd)), -1, 1)


def spearman(values: np.ndarray) -> np.ndarray:
    """Rank correlation of the columns of ``values`` (rows, G), float32, which is overwritten by its ranks."""
    for column in values.T:
        column[:] = rankdata(column)
    rows = max(1, _FLOATS // values.shape[1])
    return pearson(values[i : i + rows] for i in range(0, len(values), rows))
