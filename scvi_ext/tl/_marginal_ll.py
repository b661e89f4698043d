"""The marginal log-likelihood of a fit: what tl.get_marginal_ll gives."""

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


def marginal_ll(
    adata: AnnData,
    *,
    key: str | None = None,
    indices: Sequence | None = None,
    n_mc_samples: int,
    return_mean: bool = True,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> float | AnnData | None:
    """The mean over cells, or a value per cell that is written."""
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
