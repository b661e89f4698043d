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

_SUMMED = 64  # largest count whose distribution function is a sum of probabilities
_UNDERFLOW = 1e-290  # a probability of zero below which such a sum loses digits
_LARGEST = 1e8  # rate of a Poisson draw, as in scVI 0.5.0; NumPy has none beyond 9.2e18
_SMALLEST = np.finfo(np.float32).tiny  # an inverse dispersion that float32 has rounded to zero


def on_host(px: Expression) -> Expression:
    """The same numbers as NumPy arrays in double precision, infinite rates as the largest one of float32."""
    px = Expression(*(None if t is None else t.double().cpu().numpy() for t in px))
    return px._replace(rate=np.minimum(px.rate, np.finfo(np.float32).max))


def draw_counts(name: str, px: Expression, streams: Sequence[Generator]) -> np.ndarray:
    """One draw from a likelihood for each cell and gene; rates of Poisson draws are 1e8 at most.

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
    if name == "normal":
        up_to = ndtr((x - px.rate) / px.theta)
        return up_to, up_to
    if name == "bernoulli":
        none = np.exp(-px.rate)
        return np.where(x > 0, none, 0.0), np.where(x > 0, 1.0, none)
    below, some = np.zeros(x.shape), np.nonzero(x)
    if name == "poisson":
        up_to = np.exp(-px.rate)
        below[some] = gammaincc(np.ceil(x[some]), px.rate[some])
        up_to[some] = gammaincc(np.floor(x[some]) + 1, px.rate[some])
        return below, up_to
    theta = np.broadcast_to(np.maximum(px.theta, _SMALLEST), x.shape)
    up_to = np.exp(-theta * np.log1p(px.rate / theta))
    below[some], up_to[some] = _nb_function(x[some], px.rate[some], theta[some], up_to[some])
    if px.dropout_logits is not None:
        dropout = expit(px.dropout_logits)
        below[some] += dropout[some] * (1 - below[some])
        up_to += dropout * (1 - up_to)
    return below, up_to


def _nb_function(x: np.ndarray, rate: np.ndarray, theta: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(X < x) and P(X <= x) of positive counts, shape (n,), from the probability of zero.

    Small counts, which most are, sum the probabilities one by one, each from the one before; the incomplete beta
    function of the others takes a hundred times as long.
    """
    share = rate / (rate + theta)
    below, up_to = np.empty(x.shape), np.empty(x.shape)
    small = (x <= _SUMMED) & (x == np.floor(x)) & (zero > _UNDERFLOW)
    rest = np.flatnonzero(~small)
    below[rest] = betaincc(np.ceil(x[rest]), theta[rest], share[rest])
    up_to[rest] = betaincc(np.floor(x[rest]) + 1, theta[rest], share[rest])
    order = np.flatnonzero(small)
    order = order[np.argsort(-x[order], kind="stable")]  # those that reach furthest first
    reach, share, theta, p = x[order], share[order], theta[order], zero[order]
    total = np.zeros(len(order))
    for k in range(1, int(reach[0]) + 1 if len(order) else 1):
        n = np.searchsorted(-reach, -k, side="right")
        total[:n] += p[:n]
        p[:n] *= share[:n] * ((k - 1 + theta[:n]) / k)
    below[order], up_to[order] = total, np.minimum(total + p, 1.0)
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
    return rng.poisson(np.minimum(rate, _LARGEST))


def _nb(rng: Generator, rate: np.ndarray, theta: np.ndarray, _: object) -> np.ndarray:
    return _poisson(rng, _gamma(rng, rate, theta, None))


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
