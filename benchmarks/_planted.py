"""Synthetic counts with planted cell types and batches, at any size and density."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from _common import Data

if TYPE_CHECKING:
    from collections.abc import Iterator

_THETA = 2.0  # inverse dispersion of every gene: variance is mean + mean^2 / 2, as in droplet data
_BLOCK = 10_000_000  # entries drawn at a time: 1,000,000 cells fit into memory as CSR, not dense


def planted(
    n_cells: int, n_genes: int = 2000, density: float = 0.08, n_types: int = 12, n_batches: int = 4, seed: int = 0
) -> Data:
    """Gamma-Poisson counts of cell types in families, measured in batches of different size.

    Means of genes are log-normal, and so are library sizes. A family of three types shares markers (5 % of the genes,
    about 7-fold), and each type has its own (3 %, about 4.5-fold), so that some types are easily told apart and some
    not. A batch multiplies every gene by a log-normal factor of its own. The overall level is set such that a share
    ``density`` of the counts is not zero.
    """
    blocks, obs = planted_blocks(n_cells, n_genes, density, n_types, n_batches, seed)
    adata = ad.AnnData(sp.vstack(list(blocks), format="csr"), obs=obs)
    has_counts = np.diff(adata.X.indptr) > 0
    return Data(f"planted-{n_cells}", adata if has_counts.all() else adata[has_counts].copy(), "batch")


def planted_blocks(
    n_cells: int, n_genes: int = 2000, density: float = 0.08, n_types: int = 12, n_batches: int = 4, seed: int = 0
) -> tuple[Iterator[sp.csr_matrix], pd.DataFrame]:
    """The same counts, some thousand cells at a time, and the columns of all cells: more than memory holds."""
    rng = np.random.default_rng(seed)
    log_profile = rng.normal(0, 1.5, n_genes) + np.zeros((n_types, 1))
    families = [_markers(rng, n_genes, 0.05, 2.0, 0.5) for _ in range(-(-n_types // 3))]
    for k in range(n_types):
        log_profile[k] += families[k // 3] + _markers(rng, n_genes, 0.03, 1.5, 0.3)
    log_batch = rng.normal(0, 0.3, (n_batches, n_genes))
    profile = np.exp(log_profile[:, None] + log_batch).reshape(-1, n_genes)  # (types * batches, genes)
    profile /= profile.sum(1, keepdims=True)

    types = rng.choice(n_types, n_cells, p=_shares(n_types, 0.8))
    batches = rng.choice(n_batches, n_cells, p=_shares(n_batches, 0.8))
    group = types * n_batches + batches
    library = rng.lognormal(0, 0.4, n_cells)
    library *= _level(profile[group[:500]], library[:500], density)

    rows = max(1, _BLOCK // n_genes)
    blocks = (
        _draw(rng, profile.astype(np.float32), group[start : start + rows], library[start : start + rows])
        for start in range(0, n_cells, rows)
    )
    columns = {"cell_type": pd.Categorical(types.astype(str)), "batch": pd.Categorical(batches.astype(str))}
    return blocks, pd.DataFrame(columns, index=np.arange(n_cells).astype(str))


def _markers(rng: np.random.Generator, n_genes: int, share: float, mean: float, sd: float) -> np.ndarray:
    """Log-fold changes of so many random genes."""
    change = np.zeros(n_genes)
    chosen = rng.choice(n_genes, max(1, round(share * n_genes)), replace=False)
    change[chosen] = rng.normal(mean, sd, len(chosen))
    return change


def _shares(n: int, ratio: float) -> np.ndarray:
    """Shares that fall by a constant ratio."""
    shares = ratio ** np.arange(n)
    return shares / shares.sum()


def _level(profile: np.ndarray, library: np.ndarray, density: float) -> float:
    """Counts of a cell with library 1 at which a share ``density`` of the entries is not zero, by bisection."""
    low, high = np.log(1e-3), np.log(1e9)
    for _ in range(50):
        middle = (low + high) / 2
        found = 1 - _p_zero(np.exp(middle) * library[:, None] * profile).mean()
        low, high = (middle, high) if found < density else (low, middle)
    return float(np.exp(low))


def _p_zero(mean: np.ndarray) -> np.ndarray:
    return (1 + mean / _THETA) ** -_THETA


def _draw(rng: np.random.Generator, profile: np.ndarray, group: np.ndarray, library: np.ndarray) -> sp.csr_matrix:
    """Counts of some cells, by inversion of the distribution function.

    One uniform number per entry decides whether it is zero, as most are; only for the others the sum goes on.
    """
    mean = profile[group] * library[:, None].astype(np.float32)
    uniform = rng.random(mean.shape, dtype=np.float32)
    cells, genes = np.nonzero(uniform > _p_zero(mean))
    mean, uniform = mean[cells, genes].astype(float), uniform[cells, genes].astype(float)
    counts = np.zeros(len(genes), np.uint16)
    p = cumulative = _p_zero(mean)
    ratio = mean / (mean + _THETA)
    left = np.arange(len(genes))
    k = 0
    # The end of a uniform number's resolution is the end of the sum, too.
    while len(left) and k < np.iinfo(np.uint16).max:
        counts[left] += 1
        p = p * ratio * (k + _THETA) / (k + 1)
        cumulative = cumulative + p
        k += 1
        go_on = (uniform[left] > cumulative) & (p > 1e-12)
        left, p, cumulative, ratio = left[go_on], p[go_on], cumulative[go_on], ratio[go_on]
    indptr = np.concatenate([[0], np.bincount(cells, minlength=len(group)).cumsum()])
    return sp.csr_matrix((counts.astype(np.float32), genes.astype(np.int32), indptr), (len(group), profile.shape[1]))
