"""Zero inflation that is itself uncertain: the Beta distribution, and a mixture of a count with and without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from scvi_ext.functional.counts import log_nb_positive

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from scvi_ext._contract import Expression

_TINY = 1e-30  # far above the smallest float32, far below anything that a likelihood notices


def sample_logit_beta(alpha: Tensor, beta: Tensor, rng: np.random.Generator | None = None) -> Tensor:
    r"""The logit of a Beta variable through which gradients flow, by torch's generator or by ``rng`` (without them).

    The logit is log X - log Y for X ~ Gamma(alpha), Y ~ Gamma(beta). Of small parameters these variables are below
    what a number can hold, so their logarithms are drawn: log Gamma(a) = log Gamma(a + 1) + log(U) / a, with U uniform
    (Marsaglia and Tsang 2000).
    """
    return _log_gamma(alpha, rng) - _log_gamma(beta, rng)


def _log_gamma(a: Tensor, rng: np.random.Generator | None) -> Tensor:
    if rng is None:
        gamma, uniform = torch._standard_gamma(a + 1), torch.rand_like(a)
    else:
        shape = a.detach().cpu().double().numpy()
        gamma, uniform = (torch.from_numpy(v).to(a) for v in (rng.standard_gamma(shape + 1), rng.random(shape.shape)))
    return torch.log(gamma + _TINY) + torch.log(uniform.clamp(min=_TINY)) / a


def log_beta(logit: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Log-density of Beta(alpha, beta) at sigmoid(``logit``), entry by entry."""
    return (alpha - 1) * logsigmoid(logit) + (beta - 1) * logsigmoid(-logit) - _log_beta_function(alpha, beta)


def kl_beta(alpha_q: Tensor, beta_q: Tensor, alpha_p: Tensor, beta_p: Tensor) -> Tensor:
    """KL(Beta(alpha_q, beta_q) || Beta(alpha_p, beta_p)), entry by entry."""
    of_sum = torch.digamma(alpha_q + beta_q)
    return (
        _log_beta_function(alpha_p, beta_p)
        - _log_beta_function(alpha_q, beta_q)
        + (alpha_q - alpha_p) * (torch.digamma(alpha_q) - of_sum)
        + (beta_q - beta_p) * (torch.digamma(beta_q) - of_sum)
    )


def _log_beta_function(alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)


class _InflationLogits(torch.autograd.Function):
    """Every entry is touched as few times as torch allows: a third of the time of a loss would go here otherwise."""

    @staticmethod
    def forward(ctx: object, dropout: Tensor, log_delta: Tensor, minimal: float) -> Tensor:
        delta, not_delta = torch.sigmoid(log_delta), torch.sigmoid(-log_delta)
        inflation = torch.sigmoid(dropout)
        inflated = (inflation * (1 - minimal)).add_(minimal).mul_(not_delta).clamp_(min=_TINY)  # q
        rest = torch.sigmoid(-dropout).mul_((1 - minimal) * not_delta).add_(delta).clamp_(min=_TINY)  # 1 - q
        ctx.save_for_backward(inflation, inflated, rest, delta, not_delta)
        ctx.minimal = minimal
        return torch.log(inflated / rest)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        inflation, inflated, rest, delta, not_delta = ctx.saved_tensors
        by_q = gradient / (inflated * rest)  # d logit(q) / dq = 1 / (q (1 - q))
        of_dropout = None
        if ctx.needs_input_grad[0]:
            of_dropout = (inflation * (1 - inflation)).mul_(by_q).mul_((1 - ctx.minimal) * not_delta)
        of_delta = None
        if ctx.needs_input_grad[1]:
            of_delta = (gradient / rest).mul_(-delta).sum_to_size(delta.shape)
        return of_dropout, of_delta, None


def inflation_logits(dropout: Tensor, logit_delta: Tensor, minimal: float) -> Tensor:
    r"""The logit of a technical zero where a gene is inflated at all with probability 1 - delta.

    .. math::
        \delta\, p + (1 - \delta) \left(\pi' 1_{x = 0} + (1 - \pi') p\right) = q 1_{x = 0} + (1 - q) p, \qquad
        q = (1 - \delta) \pi', \quad \pi' = \pi_{min} + (1 - \pi_{min})\, \mathrm{sigmoid}(d)

    so that the mixture of a negative binomial with and without zero inflation (Clivio et al. 2019) is one with.

    Parameters
    ----------
    dropout
        d, shape (..., B, G).
    logit_delta
        logit(delta), broadcastable to it.
    minimal
        Smallest inflation of an inflated gene.
    """
    return _InflationLogits.apply(dropout, logit_delta, minimal)


def technical_zero_probability(x: Tensor, px: Expression) -> Tensor:
    r"""Probability that a count of a zero-inflated negative binomial is a technical zero, given the count: (B, G).

    .. math::
        \frac{q}{q + (1 - q)\, \mathrm{NB}(0)} \text{ of a zero}, \qquad 0 \text{ of any other count}
    """
    log_nb_of_zero = log_nb_positive(torch.zeros_like(px.rate), px.rate, px.theta)
    return torch.sigmoid(px.dropout_logits - log_nb_of_zero) * (x == 0)
