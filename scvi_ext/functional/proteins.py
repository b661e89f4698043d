"""What a decoder says of proteins, put together: functions of a ProteinExpression, shape (B, P) throughout.

``noise`` are standard normal draws of this shape; without them, expectations are in closed form. Draws of counts are
made in host memory, in double precision and with a random generator for each cell, see
:mod:`scvi_ext.functional.generate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._contract import Expression
from scvi_ext.functional.counts import log_nb_positive
from scvi_ext.functional.generate import draw_counts, draw_rates, on_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
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


def components(py: ProteinExpression, background: Tensor) -> Tensor:
    """Mean counts of background and foreground, theta and P(foreground), shape (4, B, P), for draws in host memory."""
    foreground = background * torch.exp(py.log_ratio)
    return torch.stack([background, foreground, py.theta.expand_as(background), foreground_probability(py)])


def draw_protein_counts(parts: Tensor, streams: Sequence[Generator]) -> np.ndarray:
    """One draw of every count, from :func:`components`."""
    background, foreground, is_foreground = _drawn(parts, streams)
    mean = np.where(is_foreground, foreground.rate, background.rate)
    return draw_counts("nb", foreground._replace(rate=mean), streams)


def draw_protein_rates(parts: Tensor, streams: Sequence[Generator]) -> np.ndarray:
    """One draw of what a foreground count is a Poisson count of; zero where it is background."""
    _, foreground, is_foreground = _drawn(parts, streams)
    return draw_rates("nb", foreground.rate, foreground, streams) * is_foreground


def _drawn(parts: Tensor, streams: Sequence[Generator]) -> tuple[Expression, Expression, np.ndarray]:
    """The two components, and whether each count is foreground."""
    *means, theta, probability = parts
    uniform = np.stack([rng.random(probability.shape[1]) for rng in streams])
    background, foreground = (on_host(Expression(mean, mean, theta)) for mean in means)
    return background, foreground, uniform < probability.cpu().numpy()
