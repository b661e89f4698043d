from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _tolerances import FLOAT64, N_STANDARD_ERRORS, QUADRATURE
from scipy import stats
from scipy.special import betaln, digamma, polygamma
from torch.distributions import Beta, kl_divergence
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from scvi_ext._contract import Expression
from scvi_ext.functional.counts import log_nb_positive, log_zinb_positive
from scvi_ext.functional.inflation import (
    inflation_logits,
    kl_beta,
    log_beta,
    sample_logit_beta,
    technical_zero_probability,
)

LEVEL = 1e-7  # of a test of a distribution; a dozen of them are made here
PARAMETERS = [0.01, 0.1, 0.5, 0.99]
PAIRS = [(a, b) for a in PARAMETERS for b in PARAMETERS]
N = 20_000


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the mixture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minimal", [0.0, 0.01, 0.5])
def test_a_mixture_with_and_without_inflation_is_one_with(minimal):
    x, mu, theta, dropout, logit_delta = torch.meshgrid(
        double(0, 1, 30),
        double(0.05, 2, 50),
        double(0.3, 5, 1e4),
        double(-60, -3, 0, 4, 60),
        double(-700, -40, -2, 0, 3, 40, 700),
        indexing="ij",
    )
    # Both likelihoods with their weights; log pi' from its definition, where it would be lost in 1 - pi'.
    log_inflated = torch.log(minimal + (1 - minimal) * torch.sigmoid(dropout))
    log_rest = math.log1p(-minimal) + logsigmoid(-dropout)
    nb = log_nb_positive(x, mu, theta)
    zinb = torch.where(x == 0, torch.logaddexp(log_inflated, log_rest + nb), log_rest + nb)
    expected = torch.logaddexp(logsigmoid(logit_delta) + nb, logsigmoid(-logit_delta) + zinb)
    found = log_zinb_positive(x, mu, theta, inflation_logits(dropout, logit_delta, minimal))
    # Where delta is 0 to float64 and pi' is 1, 1 - q is kept above 1e-30.
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_certainly_inflated_leaves_the_inflation_as_it_is():
    dropout = torch.linspace(-20, 20, 9, dtype=torch.float64)
    assert_close(inflation_logits(dropout, double(-math.inf), 0.0), dropout, **FLOAT64)
    floor = inflation_logits(double(-100.0), double(-math.inf), 0.2)
    assert_close(torch.sigmoid(floor), double(0.2), **FLOAT64)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 4)])
def test_its_gradient(shape):
    generator = torch.Generator().manual_seed(0)
    dropout = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    logit_delta = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    logit_delta.requires_grad_()
    for minimal in (0.0, 0.1):
        assert torch.autograd.gradcheck(lambda d, s, m=minimal: inflation_logits(d, s, m), (dropout, logit_delta))
    assert torch.autograd.gradcheck(lambda d: inflation_logits(d, logit_delta.detach(), 0.1), (dropout,))


def test_a_zero_is_technical_by_bayes():
    rate, theta, logits, x = torch.meshgrid(
        double(0.1, 3, 40), double(0.5, 10), double(-4, 0, 2), double(0, 1, 7), indexing="ij"
    )
    q = torch.sigmoid(logits).numpy()
    of_zero = stats.nbinom(theta.numpy(), (theta / (theta + rate)).numpy()).pmf(0)
    expected = np.where(x == 0, q / (q + (1 - q) * of_zero), 0)
    found = technical_zero_probability(x, Expression(rate, rate, theta, logits))
    # eps = 1e-8 inside the logarithms of the likelihood
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


# ---- the Beta distribution -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["torch", "numpy"])
@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_samples_follow_the_beta_distribution(alpha, beta, by):
    torch.manual_seed(1)
    rng = np.random.default_rng(0) if by == "numpy" else None
    a, b = (torch.full((N,), value, dtype=torch.float64) for value in (alpha, beta))
    logit = sample_logit_beta(a, b, rng).numpy()
    assert np.isfinite(logit).all()
    law = stats.beta(alpha, beta)
    delta = 1 / (1 + np.exp(-np.clip(logit, -700, 700)))
    assert abs(delta.mean() - law.mean()) < N_STANDARD_ERRORS * law.std() / math.sqrt(N)
    mean, variance = digamma(alpha) - digamma(beta), polygamma(1, alpha) + polygamma(1, beta)
    assert abs(logit.mean() - mean) < N_STANDARD_ERRORS * math.sqrt(variance / N)
    below = (logit < 0).mean()
    p = law.cdf(0.5)
    assert abs(below - p) < N_STANDARD_ERRORS * math.sqrt(p * (1 - p) / N)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.3, 0.8), (0.99, 0.2)])
def test_the_distribution_of_samples(alpha, beta):
    torch.manual_seed(0)
    sample = torch.sigmoid(sample_logit_beta(torch.full((N,), alpha).double(), torch.full((N,), beta).double()))
    assert stats.kstest(sample.numpy(), stats.beta(alpha, beta).cdf).pvalue > LEVEL


@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_gradients_of_samples_are_those_of_the_mean(alpha, beta):
    torch.manual_seed(2)
    a, b = (torch.full((N,), value, dtype=torch.float64, requires_grad=True) for value in (alpha, beta))
    logit = sample_logit_beta(a, b)
    expected = {
        "logit": (polygamma(1, alpha), -polygamma(1, beta)),
        "delta": (beta / (alpha + beta) ** 2, -alpha / (alpha + beta) ** 2),
    }
    for name, value in {"logit": logit, "delta": torch.sigmoid(logit)}.items():
        gradients = torch.autograd.grad(value.sum(), (a, b), retain_graph=True)
        for found, exact in zip(gradients, expected[name], strict=True):
            error = found.std().item() / math.sqrt(N)
            assert abs(found.mean().item() - exact) < N_STANDARD_ERRORS * error


def test_the_same_generator_gives_the_same_sample():
    a = torch.full((3, 5), 0.4)
    first, again, other = (sample_logit_beta(a, a, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32


@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_log_density(alpha, beta):
    logit = torch.linspace(-15, 15, 31, dtype=torch.float64)
    found = log_beta(logit, double(alpha), double(beta))
    expected = Beta(double(alpha), double(beta)).log_prob(torch.sigmoid(logit))
    # log(1 - delta) of a rounded delta: 1e-16 / e^-15
    assert_close(found, expected, rtol=1e-7, atol=1e-7)
    far = log_beta(double(-1e5, 1e5), double(alpha), double(beta))
    expected = np.array([(1 - alpha) * 1e5, (1 - beta) * 1e5]) - betaln(alpha, beta)
    np.testing.assert_allclose(far, expected, **FLOAT64)


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.2, 0.9)])
def test_divergence(a, b, alpha, beta):
    q, p = (double(a), double(b)), (double(alpha), double(beta))
    found = kl_beta(*q, *p)
    assert_close(found, kl_divergence(Beta(*q), Beta(*p)), **FLOAT64)
    assert found.item() >= -1e-12
    assert_close(kl_beta(*q, *q), double(0), **FLOAT64)


def test_divergence_is_the_integral():
    q, p = (double(0.4), double(0.7)), (double(0.5), double(0.2))
    logit = torch.linspace(-150, 150, 60_001, dtype=torch.float64)
    # d delta = delta (1 - delta) d logit
    density = torch.exp(log_beta(logit, *q) + logsigmoid(logit) + logsigmoid(-logit))
    ratio = log_beta(logit, *q) - log_beta(logit, *p)
    assert_close(torch.trapezoid(density, logit), torch.ones((), dtype=torch.float64), **QUADRATURE)
    assert_close(torch.trapezoid(density * ratio, logit), kl_beta(*q, *p).squeeze(), **QUADRATURE)
