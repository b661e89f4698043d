from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import whole_number
from scvi_ext.fitted import Fitted
from scvi_ext.functional.evidence import effective_sample_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws


def get_importance_weights(
    adata: AnnData,
    *,
    key: str | None = None,
    n_samples: int = 50,
    return_weights: bool = True,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> np.ndarray | AnnData | None:
    """Importance weights log p(x, z, l) - log q(z, l | x) of posterior samples, or how many samples they leave.

    Samples of q that are weighed by them stand for the exact posterior. Their log-mean-exp over samples is
    :func:`~scvi_ext.tl.get_marginal_ll`; normalised, they are the weights of
    ``get_normalized_expression(weights="importance")``. Their effective sample size (sum w)^2 / sum w^2 is
    ``n_samples`` where q is exact, and 1 where a single sample has all the weight: it tells for which cells q is poor.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    n_samples
        Posterior samples per cell.
    return_weights
        Return the weights. False: write the effective sample size of each cell instead.
    indices
        The cells: positions, mask or names.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples. With the same seed and ``n_samples``, sample s is that of
        ``get_normalized_expression(return_mean=False)``.
    key_added
        Slot to write with ``return_weights=False``, ``"<key>_effective_sample_size"`` by default.
    copy
        With ``return_weights=False``: return a copy instead of changing ``adata``.

    Returns
    -------
    Log weights in nats, not normalised, float64 array, samples x cells. With ``return_weights=False``: ``None``, or the
    changed copy, and sets

    ``adata.obs["<key>_effective_sample_size"]``
        float64, from 1 to ``n_samples``, NaN for cells that were not asked for.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        ``key_added`` or ``copy`` together with ``return_weights=True``, or an effective size of a single sample.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_importance_weights(adata, n_samples=10).shape
    (10, 700)
    >>> sx.tl.get_importance_weights(adata, return_weights=False)
    >>> adata.obs["scvi_effective_sample_size"].between(1, 50).all()
    np.True_

    References
    ----------
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR; effective sample size: Kong (1992),
    A note on importance sampling using standardized weights, University of Chicago, technical report 348.
    """
    whole_number("n_samples", n_samples, 1)
    if return_weights and (copy or key_added is not None):
        msg = "return_weights=True writes nothing: leave out copy and key_added, or ask for return_weights=False."
        raise ValueError(msg)
    if not return_weights and n_samples == 1:
        msg = "n_samples=1 has an effective sample size of 1 in every cell: take more samples."
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices)
    slot = fitted.slot("obs", fitted.keys.effective_sample_size, key_added)
    module = fitted.module

    def weights_of(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        noise = draws.normal(len(cells.x), n_samples, module.n_noise)
        posteriors = module.posteriors(cells)
        weights = [module.log_weight(cells, posteriors, noise[:, s]).double() for s in range(n_samples)]
        return (torch.stack(weights),)  # (S, B)

    start = logg.info(f"computing importance weights of fit {fitted.fit.key!r}")
    parts = fitted.map(weights_of, batch_size=batch_size, seed=seed, floats_per_cell=n_samples * module.n_noise)
    if return_weights:
        weights = np.concatenate([part for _, (part,) in parts], axis=1)
        logg.info("    finished", time=start)
        return weights
    sizes = np.concatenate([effective_sample_size(part) for _, (part,) in parts])
    results.write_obs(adata, slot, sizes, fitted.rows)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, effective sample size (adata.obs)")
    return adata if copy else None
