"""Counts drawn from what a decoder says, and their distribution function: the likelihoods, the other way round.

In host memory and in double precision: an :class:`~scvi_ext._contract.Expression` of NumPy arrays of shape (B, G), or
(G,) for a theta that all cells share. Each cell has a random generator of its own, so that its draws do not depend on
how many other cells are drawn at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import betaincc, expit, gammaincc, ndtr

from scvi_ext._contract import Expression

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.random import Generator

    Draw = Callable[[Generator, np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]
    Function = Callable[[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]

_SMALLEST = np.finfo(np.float32).tiny  # an inverse dispersion that float32 has rounded to zero


def on_host(px: Expression) -> Expression:
    """The same numbers as NumPy arrays in double precision."""
    return Expression(*(None if t is None else t.double().cpu().numpy() for t in px))


def draw_counts(name: str, px: Expression, streams: Sequence[Generator]) -> np.ndarray:
    """One draw from a likelihood for each cell and gene.

    Parameters
    ----------
    name
        Option value of ``reconstruction_loss``. ``"bernoulli"`` draws 0 or 1, the only thing it knows of a count.
    px
        Parameters of the likelihood.
    streams
        One generator per cell.

    Returns
    -------
    Shape (B, G), float64.
    """
    return _by_cell(_DRAWS[name], px.rate, px, streams)


def draw_rates(name: str, mean: np.ndarray, px: Expression, streams: Sequence[Generator]) -> np.ndarray:
    """One draw of what a count is a Poisson count of, before any technical zero, shape (B, G).

    For a (zero-inflated) negative binomial that is a Gamma distribution with these means, shape (B, G), and shape
    parameter theta. Other likelihoods have no such layer, and the means themselves are returned.
    """
    return _by_cell(_gamma, mean, px, streams) if name in ("zinb", "nb") else mean


def distribution_function(name: str, x: np.ndarray, px: Expression) -> tuple[np.ndarray, np.ndarray]:
    """P(X < x) and P(X <= x) of each count, shape (B, G) each; equal where the likelihood has a density.

    Parameters
    ----------
    name
        Option value of ``reconstruction_loss``. For ``"bernoulli"``, ``x`` is detected wherever it is not zero.
    x
        Counts, shape (B, G).
    px
        Parameters of the likelihood.
    """
    theta = None if px.theta is None else np.broadcast_to(px.theta, x.shape)
    x = (x > 0).astype(float) if name == "bernoulli" else x
    if name == "normal":
        up_to = ndtr((x - px.rate) / theta)
        return up_to, up_to
    function = _FUNCTIONS[name]
    up_to = function(np.zeros(()), px.rate, theta, px.dropout_logits)
    below = np.zeros(x.shape)
    some = np.nonzero(x)  # most counts are zero, and the function of zero is a cheap one
    parameters = [None if p is None else p[some] for p in (px.rate, theta, px.dropout_logits)]
    below[some] = function(np.ceil(x[some]) - 1, *parameters)
    up_to[some] = function(np.floor(x[some]), *parameters)
    return below, up_to


def coverage(below: np.ndarray, up_to: np.ndarray, level: float) -> np.ndarray:
    """How much of each count lies in the central interval of this probability.

    A count stands for the stretch from P(X < x) to P(X <= x) of its distribution function. The share of the stretch
    between (1 - level) / 2 and (1 + level) / 2 is on average ``level`` if counts follow the distribution, also where
    they are discrete: it is the expectation of the randomised probability integral transform (Czado, Gneiting and Held
    2009, eq. 2).
    """
    low, high = (1 - level) / 2, (1 + level) / 2
    width = up_to - below
    inside = (np.minimum(up_to, high) - np.maximum(below, low)).clip(min=0)
    return np.divide(inside, width, out=((low <= up_to) & (up_to <= high)).astype(float), where=width > 0)


def _by_cell(draw: Draw, mean: np.ndarray, px: Expression, streams: Sequence[Generator]) -> np.ndarray:
    theta = None if px.theta is None else np.broadcast_to(np.maximum(px.theta, _SMALLEST), mean.shape)
    drawn = np.empty(mean.shape)
    for i, rng in enumerate(streams):
        drawn[i] = draw(rng, *(None if p is None else p[i] for p in (mean, theta, px.dropout_logits)))
    return drawn


# ---- draws: generator, rate, theta, dropout logits -> counts of one cell -------------------------------------------


def _gamma(rng: Generator, rate: np.ndarray, theta: np.ndarray, _: object) -> np.ndarray:
    return rng.standard_gamma(theta) * (rate / theta)


def _poisson(rng: Generator, rate: np.ndarray, *_: object) -> np.ndarray:
    return rng.poisson(rate)


def _nb(rng: Generator, rate: np.ndarray, theta: np.ndarray, _: object) -> np.ndarray:
    return rng.poisson(_gamma(rng, rate, theta, None))


def _zinb(rng: Generator, rate: np.ndarray, theta: np.ndarray, dropout_logits: np.ndarray) -> np.ndarray:
    return _nb(rng, rate, theta, None) * (rng.random(len(rate)) >= expit(dropout_logits))


def _normal(rng: Generator, rate: np.ndarray, sd: np.ndarray, _: object) -> np.ndarray:
    return rng.normal(rate, sd)


def _bernoulli(rng: Generator, rate: np.ndarray, *_: object) -> np.ndarray:
    return rng.random(len(rate)) < -np.expm1(-rate)


_DRAWS: dict[str, Draw] = {
    "zinb": _zinb,
    "nb": _nb,
    "poisson": _poisson,
    "normal": _normal,
    "bernoulli": _bernoulli,
}


# ---- distribution functions: x, rate, theta, dropout logits -> P(X <= x); x = 0 may come as a single number --------


def _nb_function(x: np.ndarray, rate: np.ndarray, theta: np.ndarray, _: object) -> np.ndarray:
    if x.ndim == 0:
        return np.exp(-theta * np.log1p(rate / np.maximum(theta, _SMALLEST)))
    return betaincc(x + 1, theta, rate / (rate + theta))


def _zinb_function(x: np.ndarray, rate: np.ndarray, theta: np.ndarray, dropout_logits: np.ndarray) -> np.ndarray:
    dropout = expit(dropout_logits)
    return dropout + (1 - dropout) * _nb_function(x, rate, theta, None)


def _poisson_function(x: np.ndarray, rate: np.ndarray, *_: object) -> np.ndarray:
    return np.exp(-rate) if x.ndim == 0 else gammaincc(x + 1, rate)


def _bernoulli_function(x: np.ndarray, rate: np.ndarray, *_: object) -> np.ndarray:
    return np.where(x >= 1, 1.0, np.exp(-rate))


_FUNCTIONS: dict[str, Function] = {
    "zinb": _zinb_function,
    "nb": _nb_function,
    "poisson": _poisson_function,
    "bernoulli": _bernoulli_function,
}
