"""Log-probabilities of counts, entry by entry: the readable reference.

Parameters are ``mu`` (mean), ``theta`` (inverse dispersion, variance = mu + mu^2 / theta) and ``pi`` (logit of a
technical zero). Everything broadcasts; the result has the shape of ``x`` and is summed over genes by the caller.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from scvi_ext._contract import Expression

_EPS = 1e-8  # keeps log(mu) and log(theta) finite; the value of scVI 0.5.0


def log_poisson(x: Tensor, mu: Tensor, eps: float = _EPS) -> Tensor:
    """Log-probability of a Poisson distribution with mean ``mu``."""
    return x * torch.log(mu + eps) - mu - torch.lgamma(x + 1)


def log_nb_positive(x: Tensor, mu: Tensor, theta: Tensor, eps: float = _EPS) -> Tensor:
    """Log-probability of a negative binomial distribution (scVI, Lopez et al. 2018, eq. 3 of the methods).

    Parameters
    ----------
    x
        Counts, shape (B, G).
    mu
        Means, positive.
    theta
        Inverse dispersions, positive.
    eps
        Added inside the logarithms.
    """
    return _log_nb(x, mu, theta, _log_ratio(mu, theta, eps), eps)


def log_zinb_positive(x: Tensor, mu: Tensor, theta: Tensor, pi: Tensor, eps: float = _EPS) -> Tensor:
    """Log-probability of a zero-inflated negative binomial; ``pi`` is the *logit* of a technical zero.

    With s = softplus: x = 0 gives s(-pi + log NB(0)) - s(-pi); x > 0 gives -pi - s(-pi) + log NB(x).
    """
    log_ratio = _log_ratio(mu, theta, eps)
    s = softplus(-pi)
    zero = softplus(-pi - theta * log_ratio) - s
    positive = -pi - s + _log_nb(x, mu, theta, log_ratio, eps)
    return torch.where(x < eps, zero, positive)


def log_mixture_nb(
    x: Tensor,
    mu_1: Tensor,
    mu_2: Tensor,
    theta_1: Tensor,
    theta_2: Tensor | None,
    pi: Tensor,
    eps: float = _EPS,
) -> Tensor:
    """Log-probability of a mixture of two negative binomials; sigmoid(``pi``) is the weight of the first component.

    In totalVI the first component is the background (Gayoso et al. 2021). ``theta_2=None`` shares ``theta_1``.
    """
    first = log_nb_positive(x, mu_1, theta_1, eps)
    second = log_nb_positive(x, mu_2, theta_1 if theta_2 is None else theta_2, eps)
    return torch.logaddexp(first, second - pi) - softplus(-pi)


def log_normal(x: Tensor, mu: Tensor, sd: Tensor) -> Tensor:
    """Log-density of a normal distribution with mean ``mu`` and standard deviation ``sd``."""
    return -0.5 * ((x - mu) / sd) ** 2 - torch.log(sd) - 0.5 * math.log(2 * math.pi)


def log_detection(x: Tensor, mu: Tensor, eps: float = _EPS) -> Tensor:
    """Log-probability of detection, 1{x > 0} ~ Bernoulli(1 - exp(-mu)): minus the binary cross-entropy.

    1 - exp(-mu) is the chance that a Poisson count with mean ``mu`` is not zero, so the decoder keeps its meaning.
    """
    return torch.where(x > 0, torch.log(-torch.expm1(-mu) + eps), -mu)


def _log_ratio(mu: Tensor, theta: Tensor, eps: float) -> Tensor:
    """log((theta + mu) / theta), accurate for theta much larger than mu too."""
    return torch.log1p(mu / (theta + eps))


def _log_nb(x: Tensor, mu: Tensor, theta: Tensor, log_ratio: Tensor, eps: float) -> Tensor:
    binomial = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return binomial - theta * log_ratio + x * (torch.log(mu + eps) - torch.log(theta + eps) - log_ratio)


LIKELIHOODS: dict[str, Callable[[Tensor, Expression], Tensor]] = {
    "zinb": lambda x, px: log_zinb_positive(x, px.rate, px.theta, px.dropout_logits),
    "nb": lambda x, px: log_nb_positive(x, px.rate, px.theta),
    "poisson": lambda x, px: log_poisson(x, px.rate),
    "normal": lambda x, px: log_normal(x, px.rate, px.theta),
    "bernoulli": lambda x, px: log_detection(x, px.rate),
}
"""Option value of ``reconstruction_loss`` -> log-probability of counts given a decoder's Expression."""
