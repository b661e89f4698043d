"""Kullback-Leibler divergences and log-densities of diagonal normal and of categorical distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_ext.functional.counts import log_normal
from scvi_ext.kernels import latent

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_ext._contract import Posterior


def kl_normal(q: Posterior, p: Posterior) -> Tensor:
    """KL(q || p), the sum of :func:`normal_divergences`, shape (B,)."""
    return normal_divergences(q, p).sum(-1)


def normal_divergences(q: Posterior, p: Posterior) -> Tensor:
    """KL(q || p) of each variable: log(s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2, shape (B, L)."""
    ratio = (q.scale / p.scale) ** 2
    distance = ((q.loc - p.loc) / p.scale) ** 2
    return 0.5 * (ratio + distance - 1 - torch.log(ratio))


def kl_standard_normal(q: Posterior) -> Tensor:
    """KL(q || N(0, I)) = 1/2 sum of (s^2 + m^2 - log s^2 - 1), shape (B,) (Kingma and Welling 2014, appendix B)."""
    if latent.takes(q.loc, q.scale):
        return latent.kl_standard_normal(q.loc, q.scale)
    var = q.scale**2
    return 0.5 * (var + q.loc**2 - torch.log(var) - 1).sum(-1)


def kl_categorical(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum of q (log q - log p) over the categories of the last axis, shape (B,)."""
    return (torch.exp(log_q) * (log_q - log_p)).sum(-1)


def log_density(value: Tensor, p: Posterior) -> Tensor:
    """Log-density of ``value`` under the diagonal normal ``p``, shape (B,)."""
    return log_normal(value, p.loc, p.scale).sum(-1)
