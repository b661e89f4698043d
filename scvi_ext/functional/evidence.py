"""How well a module explains cells: the seed's functions of a module and its minibatches.

``posterior`` is any iterable of :class:`~scvi_ext._contract.Minibatch`; every cell weighs the same, whatever the size
of the last minibatch. Call ``vae.eval()`` before: in training mode the cells of a minibatch depend on each other. All
three return a loss (lower is better), as in scVI 0.5.0; ``tl.get_elbo`` and ``tl.get_marginal_ll`` have the other sign.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from scvi_ext._contract import Minibatch


def compute_elbo(vae: nn.Module, posterior: Iterable[Minibatch]) -> float:
    """Mean negative ELBO per cell, at one posterior sample."""

    def per_cell(cells: Minibatch) -> Tensor:
        loss = vae.loss(cells)
        return loss.reconstruction + loss.kl_z + loss.kl_library

    return _mean_over_cells(per_cell, posterior)


def compute_reconstruction_error(vae: nn.Module, posterior: Iterable[Minibatch]) -> float:
    """Mean of -log p(x | z, l) per cell, at one posterior sample."""
    return _mean_over_cells(lambda cells: vae.loss(cells).reconstruction, posterior)


def compute_marginal_log_likelihood_scvi(
    vae: nn.Module, posterior: Iterable[Minibatch], n_samples_mc: int = 100
) -> float:
    """Mean of -log p(x) per cell, by importance sampling with ``n_samples_mc`` posterior samples."""

    def per_cell(cells: Minibatch) -> Tensor:
        posteriors = vae.posteriors(cells)
        draws = [vae.log_weight(cells, posteriors) for _ in range(n_samples_mc)]
        return -(torch.logsumexp(torch.stack(draws), 0) - math.log(n_samples_mc))

    return _mean_over_cells(per_cell, posterior)


@torch.no_grad()
def _mean_over_cells(per_cell: Callable[[Minibatch], Tensor], posterior: Iterable[Minibatch]) -> float:
    total, n = 0.0, 0
    for cells in posterior:
        total += per_cell(cells).double().sum().item()
        n += cells.x.shape[0]
    return total / n
