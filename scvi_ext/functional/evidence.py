"""How well a module explains cells: the seed's functions of a module and its minibatches, and what ours are made of.

Of the seed's, ``posterior`` is any iterable of :class:`~scvi_ext._contract.Minibatch`; every cell weighs the same,
whatever the size of the last minibatch. Call ``vae.eval()`` before: in training mode the cells of a minibatch depend on
each other. All of them return a loss (lower is better), as in scVI 0.5.0; ``tl.get_elbo`` and ``tl.get_marginal_ll``
have the other sign.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import logsumexp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from scvi_ext._contract import Loss, Minibatch


def compute_elbo(vae: nn.Module, posterior: Iterable[Minibatch]) -> float:
    """Mean negative ELBO per cell, at one posterior sample.

    The divergence of what all cells share (delta of AutoZI) counts once, for the cells of ``posterior`` together: this
    bounds their evidence, however many were trained on. ``tl.get_elbo`` gives each cell the share that it would have
    among those trained on, so that the value of a cell does not depend on the company it is asked about in.
    """

    def per_cell(cells: Minibatch) -> Tensor:
        loss = vae.loss(cells)
        return loss.reconstruction + loss.kl_z + loss.kl_library

    return _mean_over_cells(per_cell, posterior, vae.kl_shared().item())


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
def compute_marginal_log_likelihood_autozi(
    autozivae: nn.Module, posterior: Iterable[Minibatch], n_samples_mc: int = 100
) -> float:
    """-log p(x) of all cells together, divided by their number, by importance sampling: a draw of delta for all cells.

    Where each count has a delta of its own it is integrated out, and cells are independent, as for
    :func:`compute_marginal_log_likelihood_scvi`.
    """
    shared = [autozivae.draw_shared() for _ in range(n_samples_mc)]
    if shared[0] is None:
        return compute_marginal_log_likelihood_scvi(autozivae, posterior, n_samples_mc)
    log_weights, n = np.zeros(n_samples_mc), 0
    for cells in posterior:
        log_weights += log_weights_of_all(autozivae, cells, None, shared).cpu().numpy()
        n += cells.x.shape[0]
    return -log_marginal_of_all(autozivae, log_weights, shared) / n


def log_weights_of_all(vae: nn.Module, cells: Minibatch, noise: Tensor | None, shared: Sequence[Tensor]) -> Tensor:
    """log p(x, z, l | s) - log q(z, l | x) at each draw s of what all cells share, the sum over cells: (S,), float64.

    Every draw has posterior samples of its own, made from ``noise`` (B, S, n_noise) or by torch's generator.
    """
    posteriors = vae.posteriors(cells)
    draws = enumerate(shared)
    sums = (vae.log_weight(cells, posteriors, None if noise is None else noise[:, s], draw) for s, draw in draws)
    return torch.stack([log_weight.double().sum() for log_weight in sums])


@torch.no_grad()
def log_marginal_of_all(vae: nn.Module, log_weights: np.ndarray, shared: Sequence[Tensor]) -> float:
    """log p(x) of all cells together, from what :func:`log_weights_of_all` says of them, summed over minibatches."""
    of_shared = [vae.log_weight_shared(draw).item() for draw in shared]
    return float(logsumexp(log_weights + of_shared) - math.log(len(shared)))


def elbo_of_cells(vae: nn.Module, cells: Minibatch, noise: Tensor, shared: Sequence[Tensor | None]) -> Tensor:
    """ELBO of each cell, shape (B,), averaged over the posterior samples that are made from ``noise`` (B, S, n_noise).

    ``shared`` are S draws of what all cells share, or S times None. Higher is better.
    """
    return sum(loss_at(vae, cells, noise[:, s], draw).elbo for s, draw in enumerate(shared)) / len(shared)


def loss_at(vae: nn.Module, cells: Minibatch, noise: Tensor, shared: Tensor | None) -> Loss:
    """The loss at the posterior sample that is made from ``noise`` (B, n_noise), and a draw of what all cells share."""
    return vae.loss(cells, noise=noise) if shared is None else vae.loss(cells, noise=noise, shared=shared)


@torch.no_grad()
def draws_of_shared(vae: nn.Module, n_samples: int, seed: int) -> list[Tensor | None]:
    """So many draws of what all cells share, the same whatever the cells; None each where there is no such thing."""
    return [vae.draw_shared(np.random.default_rng([seed, s])) for s in range(n_samples)]


def effective_sample_size(log_weights: np.ndarray) -> np.ndarray:
    """(sum w)^2 / sum w^2 over the first axis: how many samples of equal weight are worth as much (Kong 1992)."""
    size = np.exp(2 * logsumexp(log_weights, axis=0) - logsumexp(2 * log_weights, axis=0))
    return np.clip(size, 1, len(log_weights))  # but for roundings it is between them


@torch.no_grad()
def _mean_over_cells(
    per_cell: Callable[[Minibatch], Tensor], posterior: Iterable[Minibatch], of_all: float = 0.0
) -> float:
    """``of_all``: what counts once for all cells together."""
    total, n = of_all, 0
    for cells in posterior:
        total += per_cell(cells).double().sum().item()
        n += cells.x.shape[0]
    return total / n
