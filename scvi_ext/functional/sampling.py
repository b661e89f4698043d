"""Reparameterised samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_ext.functional import ranks

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_ext._contract import Posterior


def reparameterize_gaussian(mu: Tensor, var: Tensor) -> Tensor:
    """A sample of N(mu, var) through which gradients flow: mu + sqrt(var) * noise."""
    return mu + torch.sqrt(var) * ranks.normal_like(mu)


def sample_normal(q: Posterior, noise: Tensor | None = None) -> Tensor:
    """A reparameterised sample of ``q``; ``noise`` are standard normal draws, made here where they are not given."""
    return q.loc + q.scale * (ranks.normal_like(q.loc) if noise is None else noise)
