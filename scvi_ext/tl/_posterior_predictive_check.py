from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import whole_number
from scvi_ext.engine.device import resolve_seed
from scvi_ext.fitted import Fitted
from scvi_ext.functional.generate import coverage, distribution_function, draw_counts
from scvi_ext.tl._expressions import expressions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws

_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the calibration curve
_SHOWN = (0.5, 0.8, 0.95)  # of them, those of each gene and cell
_COLUMNS = [
    *(f"{name}_{which}" for name in ("mean", "cv", "zero_fraction") for which in ("observed", "predicted", "sd")),
    *(f"coverage_{level:.0%}".rstrip("%") for level in _SHOWN),
]


def posterior_predictive_check(
    adata: AnnData,
    *,
    key: str | None = None,
    n_samples: int = 10,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Compare the counts with counts that the model would have drawn itself.

    For each gene over the cells, and each cell over the genes: mean, coefficient of variation (standard deviation over
    mean) and share of zeros, of the observed counts and of ``n_samples`` replicates of the whole data set (see
    :func:`~scvi_ext.tl.posterior_predictive_sample`; Poisson rates beyond 1e8 are drawn from as 1e8). And calibration:
    how many of the observed counts lie within the central intervals of their own predictive distribution, which is
    exact for counts, too: a count that reaches over the end of an interval counts in part, so that under the true model
    the expected share is the level itself.

    The cells have been seen twice, by the encoder and as the counts compared with, so predictions are a little too good
    in sight of the data; a model that fails here fails anyway. With ``reconstruction_loss="bernoulli"``, counts are
    compared as detected or not. One pass over the cells; memory does not depend on their number but for the results.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    n_samples
        Replicates, 2 or more.
    indices
        The cells: positions, mask or names.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples. Every cell has a stream of random numbers of its own.
    key_added
        Slot to write, ``"<key>_posterior_predictive"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets ``adata.uns["<key>_posterior_predictive"]``, a dict of

    ``"genes"``, ``"cells"``
        DataFrame, float64, the genes of the fit or the chosen cells x ``mean_observed``, ``mean_predicted`` (average of
        the replicates), ``mean_sd`` (their standard deviation), the same for ``cv`` (NaN where there is no count, or
        where the mean of a replicate is below 0, as that of normal draws can be) and ``zero_fraction``, and
        ``coverage_50``, ``coverage_80``, ``coverage_95``.
    ``"calibration"``
        DataFrame: ``level`` of the central interval, ``coverage`` of all counts, and ``coverage_expressed`` of those
        with a predicted rate of 1 or more (of the others, most are zeros that any model covers), NaN where none has.
    ``"params"``
        ``fit``, ``n_samples`` and ``seed``.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        Fewer than two replicates.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.posterior_predictive_check(adata, n_samples=2)
    >>> list(adata.uns["scvi_posterior_predictive"])
    ['genes', 'cells', 'calibration', 'params']

    References
    ----------
    Gelman, Meng and Stern (1996), Statistica Sinica 6, 733. Czado, Gneiting and Held (2009), Predictive model
    assessment for count data, Biometrics 65, 1254.
    """
    whole_number("n_samples", n_samples, 2)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices)
    slot = fitted.slot("uns", fitted.keys.posterior_predictive, key_added)
    module, store = fitted.module, fitted.store
    likelihood = module.reconstruction_loss

    def compare(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor, ...]:
        x = cells.x.to_dense().cpu().numpy().astype(np.float64)
        x = (x > 0).astype(np.float64) if likelihood == "bernoulli" else x
        streams = draws.streams(len(x))
        by_gene, by_cell = [_sums(x, 0)], [_sums(x, 1)]
        rate, below, up_to = 0.0, 0.0, 0.0
        for px, *_ in expressions(module, cells, draws, n_samples):
            drawn = draw_counts(likelihood, px, streams)
            by_gene.append(_sums(drawn, 0))
            by_cell.append(_sums(drawn, 1))
            parts = distribution_function(likelihood, x, px)
            rate, below, up_to = rate + px.rate, below + parts[0], up_to + parts[1]
        inside = [coverage(below / n_samples, up_to / n_samples, level) for level in _LEVELS]
        expressed = rate >= n_samples
        arrays = (
            np.stack(by_gene),
            np.stack([share.sum(0) for share in inside]),
            _statistics(np.stack(by_cell), np.stack([share.sum(1) for share in inside]), x.shape[1]),
            np.array([expressed.sum(), *(share[expressed].sum() for share in inside)]),
        )
        return tuple(map(torch.from_numpy, arrays))

    start = logg.info(f"comparing the counts with those of fit {fitted.fit.key!r}")
    seed = resolve_seed(seed)
    size = max(n_samples * module.n_noise, 2 * store.n_genes)  # double precision
    gene_sums, gene_inside, expressed, cells = 0.0, 0.0, 0.0, []
    for _, (sums, inside, of_cells, of_expressed) in fitted.map(
        compare, batch_size=batch_size, seed=seed, floats_per_cell=size
    ):
        gene_sums, gene_inside, expressed = gene_sums + sums, gene_inside + inside, expressed + of_expressed
        cells.append(of_cells)
    genes = _statistics(gene_sums, gene_inside, store.n_cells)
    n_expressed, *inside_expressed = expressed
    calibration = {
        "level": _LEVELS,
        "coverage": gene_inside.mean(1) / store.n_cells,
        "coverage_expressed": np.array(inside_expressed) / (n_expressed or np.nan),
    }
    check = {
        "genes": pd.DataFrame(genes, index=store.var_names, columns=_COLUMNS),
        "cells": pd.DataFrame(np.concatenate(cells), index=store.obs_names, columns=_COLUMNS),
        "calibration": pd.DataFrame(calibration),
        "params": {"fit": fitted.fit.key, "n_samples": int(n_samples), "seed": seed},
    }
    results.write_uns(adata, slot, check)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, posterior predictive check (adata.uns)")
    return adata if copy else None


def _sums(x: np.ndarray, axis: int) -> np.ndarray:
    """Sum, sum of squares and number of zeros along an axis, shape (3, n)."""
    return np.stack([x.sum(axis), (x**2).sum(axis), (x == 0).sum(axis)])


def _statistics(sums: np.ndarray, inside: np.ndarray, n: int) -> np.ndarray:
    """The rows of a table from sums over ``n`` counts: (1 + S, 3, rows) observed and replicated, (levels, rows)."""
    total, squares, zeros = sums.swapaxes(0, 1)
    mean = total / n
    sd = np.sqrt(np.maximum(squares / n - mean**2, 0))
    cv = np.divide(sd, mean, out=np.full(mean.shape, np.nan), where=mean > 0)
    cv[1:, (mean[1:] < 0).any(0)] = np.nan  # not the average of those that happen to be above 0
    columns = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, where no or a single replicate has a count
        for observed, *replicates in (mean, cv, zeros / n):
            columns += [observed, np.nanmean(replicates, axis=0), np.nanstd(replicates, axis=0, ddof=1)]
    return np.column_stack([*columns, *(inside[_LEVELS.index(level)] / n for level in _SHOWN)])
