from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from scvi_ext.functional.evidence import log_marginal_of_all, log_weights_of_all
from scvi_ext.tl._per_cell import per_cell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from torch import Tensor, nn

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws
    from scvi_ext.fitted import Fitted


def get_marginal_ll(
    adata: AnnData,
    *,
    key: str | None = None,
    indices: Sequence | None = None,
    n_mc_samples: int = 1000,
    return_mean: bool = True,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> float | AnnData | None:
    """Marginal log-likelihood log p(x) of each cell, by importance sampling from q. Higher is better.

    log p(x) is estimated by log 1/S sum_s p(x, z_s, l_s) / q(z_s, l_s | x). The estimate is too low on average, by
    less the more samples are taken. For a model with proteins x are genes and the proteins that were measured.

    Of a model with latent variables that all cells share (delta of AutoZI), cells are not independent: their mean is
    log p(x) of all of them together, divided by their number, with one draw of delta for all cells in every sample.
    Hundreds of cells in one weight leave it to few samples, so that the estimate is not far above the ELBO: compare
    fits on the same cells with as many samples. The values of single cells, ``return_mean=False``, are log p(x) of a
    cell given the posterior of delta. A count depends on one delta only, and linearly, so that they are exact at its
    mean; their sum is not what all cells have together.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    indices
        The cells: positions, mask or names.
    n_mc_samples
        Posterior samples per cell.
    return_mean
        Return the mean over cells, each of them weighing the same. False: write one value per cell instead.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples.
    key_added
        Slot to write with ``return_mean=False``, ``"<key>_marginal_ll"`` by default.
    copy
        With ``return_mean=False``: return a copy instead of changing ``adata``.

    Returns
    -------
    The mean per cell, in nats. With ``return_mean=False``: ``None``, or the changed copy, and sets

    ``adata.obs["<key>_marginal_ll"]``
        float64, one value per cell, NaN for cells that were not asked for.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        ``key_added`` or ``copy`` together with ``return_mean=True``.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_marginal_ll(adata, n_mc_samples=50) < 0
    True

    References
    ----------
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR, eq. 8.
    """
    return per_cell(
        adata,
        _marginal_ll,
        "marginal_ll",
        key=key,
        indices=indices,
        n_samples=n_mc_samples,
        return_mean=return_mean,
        batch_size=batch_size,
        seed=seed,
        key_added=key_added,
        copy=copy,
        mean_of_all=_of_all_cells,
    )


def _of_all_cells(fitted: Fitted, shared: Sequence[Tensor], batch_size: int | None, seed: int | None) -> float:
    """log p(x) of all cells together, per cell; memory does not depend on their number."""
    module = fitted.module

    def sums(cells: Minibatch, draws: Draws) -> tuple[Tensor]:
        noise = draws.normal(len(cells.x), len(shared), module.n_noise)
        return (log_weights_of_all(module, cells, noise, shared),)

    floats_per_cell = len(shared) * module.n_noise
    parts = fitted.map(sums, batch_size=batch_size, seed=seed, floats_per_cell=floats_per_cell)
    log_weights = sum(of_cells for _, (of_cells,) in parts)
    return log_marginal_of_all(module, log_weights, shared) / fitted.store.n_cells


def _marginal_ll(module: nn.Module, cells: Minibatch, noise: Tensor, shared: Sequence[Tensor | None]) -> Tensor:
    """log-mean-exp of the importance weights, shape (B,); memory does not depend on the number of samples."""
    posteriors = module.posteriors(cells)
    log_sum = torch.full((len(cells.x),), -math.inf, dtype=torch.float64, device=cells.batch_index.device)
    for s in range(noise.shape[1]):
        log_sum = torch.logaddexp(log_sum, module.log_weight(cells, posteriors, noise[:, s]).double())
    return log_sum - math.log(noise.shape[1])
