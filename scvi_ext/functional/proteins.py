"""What a decoder says of proteins, put together: functions of a ProteinExpression, shape (B, P) throughout.

``noise`` are standard normal draws of this shape; without them, expectations are in closed form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_ext.functional.counts import log_nb_positive

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_ext._contract import ProteinExpression


def background_mean(py: ProteinExpression, noise: Tensor | None = None) -> Tensor:
    """Mean count of the background, or where there is ``noise``, a draw from q of it."""
    loc, scale = py.background
    return torch.exp(loc + (scale**2 / 2 if noise is None else scale * noise))


def foreground_probability(py: ProteinExpression, noise: Tensor | None = None) -> Tensor:
    """P(foreground), or where there is ``noise``, one with this probability and otherwise zero."""
    probability = torch.sigmoid(-py.mixing_logits)
    return probability if noise is None else (torch.special.ndtr(noise) < probability).to(probability.dtype)


def denoised(py: ProteinExpression, background: Tensor, foreground: Tensor, include_background: bool) -> Tensor:
    """Mean count of what is foreground with these weights, and if it is to be included, of the background too."""
    values = foreground * background * torch.exp(py.log_ratio)
    return values + (1 - foreground) * background if include_background else values


def foreground_given_counts(y: Tensor, py: ProteinExpression, background: Tensor) -> Tensor:
    """P(foreground | y) by Bayes' theorem, at this mean count of the background."""
    of_background = log_nb_positive(y, background, py.theta)
    of_foreground = log_nb_positive(y, background * torch.exp(py.log_ratio), py.theta)
    return torch.sigmoid(of_foreground - of_background - py.mixing_logits)
