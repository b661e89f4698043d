"""How many molecules of a cell were seen: observed, inferred, or given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from scvi_ext._contract import Posterior
from scvi_ext.functional.divergences import kl_normal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from scvi_ext._contract import Minibatch
    from scvi_ext.nn.encoders import Encoder, EncoderInput

_EMPTY = 1e-8  # keeps the log of an empty cell finite; without effect in float32 from one count on


class ObservedLibrary(nn.Module):
    """The library size is the sum of the counts."""

    def posterior(self, cells: Minibatch, encoder_input: EncoderInput) -> None:
        """There is none: the library is known."""

    def point(self, cells: Minibatch) -> Tensor:
        """Log library size, shape (B, 1)."""
        return torch.log(cells.x.sum(-1, keepdim=True) + _EMPTY)

    def kl(self, ql: None, cells: Minibatch) -> Tensor:
        """Zero, shape (B,)."""
        return torch.zeros(len(cells.x), device=cells.batch_index.device)


class SizeFactorLibrary(ObservedLibrary):
    """The library size is the registered size factor."""

    def point(self, cells: Minibatch) -> Tensor:
        """Log size factor, shape (B, 1)."""
        return torch.log(cells.size_factor).unsqueeze(-1)


class LatentLibrary(nn.Module):
    """The log library size is a latent variable with a normal prior in each batch.

    Parameters
    ----------
    encoder
        From the counts to q(l | x).
    log_means, log_vars
        Mean and variance of the prior in each batch, shape (K,); empty where each call brings its own prior.
    """

    def __init__(self, encoder: Encoder, log_means: Sequence[float], log_vars: Sequence[float]):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("log_means", torch.as_tensor(log_means, dtype=torch.float32))
        self.register_buffer("log_vars", torch.as_tensor(log_vars, dtype=torch.float32))
        if len(log_means):  # start there: a short fit would not get from a library of one count to thousands
            with torch.no_grad():
                encoder.mean_encoder.bias.copy_(self.log_means.mean())

    def posterior(self, cells: Minibatch, encoder_input: EncoderInput) -> Posterior:
        """q(l | x), shape (B, 1)."""
        return self.encoder.of(encoder_input)

    def prior(self, cells: Minibatch) -> Posterior:
        """p(l) in the batch of each cell, shape (B, 1)."""
        if not len(self.log_means):
            msg = "A latent library needs a prior: build the module with library_log_means and library_log_vars."
            raise ValueError(msg)
        loc, var = self.log_means[cells.batch_index], self.log_vars[cells.batch_index]
        return Posterior(loc.unsqueeze(-1), torch.sqrt(var).unsqueeze(-1))

    def kl(self, ql: Posterior, cells: Minibatch) -> Tensor:
        """KL(q(l | x) || p(l)), shape (B,)."""
        return kl_normal(ql, self.prior(cells))


def make_library(kind: str, make_encoder: Callable[[], Encoder], log_means: Sequence, log_vars: Sequence) -> nn.Module:
    """The library of a model; only a latent one has an encoder, so that no parameter is without a gradient."""
    if kind == "latent":
        return LatentLibrary(make_encoder(), log_means, log_vars)
    return SizeFactorLibrary() if kind == "size_factor" else ObservedLibrary()
