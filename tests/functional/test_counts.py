from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from _tolerances import FLOAT32, FLOAT64, LGAMMA_DIFFERENCE, LIMIT_1E7, LOG_EPS, N_STANDARD_ERRORS, TRUNCATED_SUM
from torch.testing import assert_close

from scvi_ext._contract import Expression
from scvi_ext.functional.counts import (
    LIKELIHOODS,
    log_detection,
    log_mixture_nb,
    log_nb_positive,
    log_normal,
    log_poisson,
    log_zinb_positive,
)

COUNTS = (0, 1, 2, 3, 10, 57, 1e3, 1e4, 1e6)
MEANS = (1e-8, 1e-4, 0.03, 1.0, 7.5, 1e3, 1e6)
THETAS = (1e-4, 0.02, 1.0, 9.0, 1e3, 1e6)


def grid(*axes) -> tuple[torch.Tensor, ...]:
    axes = [torch.tensor(a, dtype=torch.float64) for a in axes]
    return tuple(t.reshape(-1) for t in torch.meshgrid(*axes, indexing="ij"))


def some(*shape: int, low: float = 0.1, high: float = 5.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def counts(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 6, shape, generator=generator).double()


# ---- negative binomial ---------------------------------------------------------------------------------------------


def test_nb_is_scipys():
    x, mu, theta = grid(COUNTS, MEANS, THETAS)
    # scipy takes p = theta / (theta + mu), which has lost mu where it is much smaller than theta: see the next test.
    well_posed = mu / theta > 1e-6
    assert well_posed.sum() > 200
    x, mu, theta = x[well_posed], mu[well_posed], theta[well_posed]
    expected = scipy.stats.nbinom.logpmf(x.numpy(), theta.numpy(), (theta / (theta + mu)).numpy())
    assert_close(log_nb_positive(x, mu, theta, eps=0.0), torch.from_numpy(expected), **LGAMMA_DIFFERENCE)


def test_nb_is_the_product_of_its_factors():
    # Gamma(x + theta) / Gamma(theta) = theta (theta + 1) ... (theta + x - 1), without cancellation for any theta.
    x, mu, theta = grid([c for c in COUNTS if c <= 1e3], MEANS, THETAS)
    rising = [torch.log(t + torch.arange(int(n), dtype=torch.float64)).sum() for n, t in zip(x, theta, strict=True)]
    log_p, log_q = -torch.log1p(mu / theta), -torch.log1p(theta / mu)
    expected = torch.stack(rising) - torch.lgamma(x + 1) + theta * log_p + x * log_q
    assert_close(log_nb_positive(x, mu, theta, eps=0.0), expected, **LGAMMA_DIFFERENCE)


def test_eps_moves_the_nb_by_no_more_than_it_must():
    x, mu, theta = grid(COUNTS, MEANS, THETAS)
    eps, exact = 1e-8, log_nb_positive(x, mu, theta, eps=0.0)
    moved = (log_nb_positive(x, mu, theta, eps) - exact).abs()
    # x log(mu + eps), and theta + eps in place of theta in both other terms.
    bound = x * torch.log1p(eps / mu) + x * eps / (theta + mu) + eps
    rounding = LGAMMA_DIFFERENCE["atol"] + LGAMMA_DIFFERENCE["rtol"] * exact.abs()
    assert (moved <= bound + rounding).all()


@pytest.mark.parametrize(("mu", "theta"), [(0.05, 0.3), (3.0, 0.7), (3.0, 50.0), (40.0, 8.0)])
def test_nb_and_zinb_sum_to_one(mu, theta):
    x = torch.arange(20_000, dtype=torch.float64)
    mu, theta, pi = (torch.tensor(v, dtype=torch.float64) for v in (mu, theta, 0.4))
    one = torch.tensor(1.0, dtype=torch.float64)
    assert_close(log_nb_positive(x, mu, theta, eps=0.0).exp().sum(), one, **TRUNCATED_SUM)
    assert_close(log_zinb_positive(x, mu, theta, pi, eps=1e-15).exp().sum(), one, **TRUNCATED_SUM)


def test_nb_with_infinite_theta_is_poisson():
    x, mu = grid(range(11), (0.01, 0.5, 4.0, 10.0))
    nb = log_nb_positive(x, mu, torch.tensor(1e7, dtype=torch.float64), eps=0.0)
    assert_close(nb, log_poisson(x, mu, eps=0.0), **LIMIT_1E7)


def test_nb_has_the_stated_mean_and_variance():
    x = torch.arange(5_000, dtype=torch.float64)
    mu, theta = torch.tensor(6.0, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    p = log_nb_positive(x, mu, theta, eps=0.0).exp()
    mean = (p * x).sum()
    assert_close(mean, mu, **TRUNCATED_SUM)
    assert_close((p * (x - mean) ** 2).sum(), mu + mu**2 / theta, **TRUNCATED_SUM)


# ---- zero inflation ------------------------------------------------------------------------------------------------


def test_zinb_closed_forms():
    x, mu, theta, pi = grid((0, 1, 2, 9), (0.05, 1.0, 8.0), (0.3, 2.0, 20.0), (-6.0, -0.5, 0.0, 3.0))
    weight = torch.sigmoid(pi)  # of a technical zero
    nb = log_nb_positive(x, mu, theta).exp()
    expected = torch.log((1 - weight) * nb + torch.where(x == 0, weight, 0.0))
    assert_close(log_zinb_positive(x, mu, theta, pi), expected, **LOG_EPS)


def test_zinb_without_dropout_is_nb():
    x, mu, theta = grid((0, 1, 2, 9, 57), (0.05, 1.0, 8.0), (0.3, 2.0, 20.0))
    assert_close(
        log_zinb_positive(x, mu, theta, torch.tensor(-60.0, dtype=torch.float64)),
        log_nb_positive(x, mu, theta),
        **FLOAT64,
    )


def test_zinb_with_certain_dropout():
    mu = theta = torch.tensor(2.0, dtype=torch.float64)
    pi = torch.tensor(800.0, dtype=torch.float64)
    certain, impossible = log_zinb_positive(torch.tensor([0.0, 3.0], dtype=torch.float64), mu, theta, pi)
    assert certain == 0
    assert_close(impossible, -pi + log_nb_positive(torch.tensor(3.0, dtype=torch.float64), mu, theta), **FLOAT64)


# ---- mixture -------------------------------------------------------------------------------------------------------


def test_mixture_weights_the_first_component_by_sigmoid_pi():
    x, mu_1, mu_2, pi = grid((0, 1, 5, 40), (0.1, 2.0), (9.0, 30.0), (-4.0, 0.0, 1.5))
    theta_1, theta_2 = torch.tensor(0.8, dtype=torch.float64), torch.tensor(6.0, dtype=torch.float64)
    weight = torch.sigmoid(pi)
    first, second = log_nb_positive(x, mu_1, theta_1).exp(), log_nb_positive(x, mu_2, theta_2).exp()
    expected = torch.log(weight * first + (1 - weight) * second)
    assert_close(log_mixture_nb(x, mu_1, mu_2, theta_1, theta_2, pi), expected, **FLOAT64)


@pytest.mark.parametrize(("pi", "which"), [(500.0, 0), (-500.0, 1)])
def test_mixture_with_a_certain_component(pi, which):
    x, mu_1, mu_2, theta = counts(7), some(7), some(7, high=50.0, seed=1), some(7, seed=2)
    only = (log_nb_positive(x, mu_1, theta), log_nb_positive(x, mu_2, theta))[which]
    assert_close(log_mixture_nb(x, mu_1, mu_2, theta, None, torch.full_like(x, pi)), only, **FLOAT64)


def test_mixture_shares_theta_when_the_second_is_none():
    x, mu_1, mu_2, theta, pi = counts(3, 5), some(3, 5), some(3, 5, seed=1), some(5, seed=2), some(3, 5, low=-2, seed=3)
    shared, given = (log_mixture_nb(x, mu_1, mu_2, theta, second, pi) for second in (None, theta))
    assert torch.equal(shared, given)


# ---- the other likelihoods -----------------------------------------------------------------------------------------


def test_poisson_is_scipys():
    x, mu = grid(COUNTS, MEANS)
    expected = torch.from_numpy(scipy.stats.poisson.logpmf(x.numpy(), mu.numpy()))
    assert_close(log_poisson(x, mu, eps=0.0), expected, **LGAMMA_DIFFERENCE)


def test_normal_is_scipys():
    x, mu, sd = grid((0, 1, 30), (0.1, 7.5, 1e3), (0.01, 1.0, 40.0))
    expected = torch.from_numpy(scipy.stats.norm.logpdf(x.numpy(), mu.numpy(), sd.numpy()))
    assert_close(log_normal(x, mu, sd), expected, **FLOAT64)


def test_detection_is_bernoulli_of_a_poisson_that_is_not_zero():
    x, mu = grid((0, 1, 2, 57), (0.05, 0.7, 3.0, 12.0))
    detected = -torch.expm1(-mu)
    bernoulli = torch.distributions.Bernoulli(probs=detected)
    assert_close(log_detection(x, mu), bernoulli.log_prob((x > 0).double()), **LOG_EPS)
    not_zero = 1 - log_poisson(torch.zeros_like(mu), mu, eps=0.0).exp()
    assert_close(detected, not_zero, **FLOAT64)


def test_detection_is_minus_the_binary_cross_entropy():
    x, mu = counts(6, 9), some(6, 9)
    target = (x > 0).double()
    cross_entropy = torch.nn.functional.binary_cross_entropy(-torch.expm1(-mu), target, reduction="none")
    assert_close(log_detection(x, mu), -cross_entropy, **LOG_EPS)


# ---- all of them ---------------------------------------------------------------------------------------------------

LOG_PROBABILITIES = {
    "poisson": (log_poisson, 1),
    "nb": (log_nb_positive, 2),
    "zinb": (log_zinb_positive, 3),
    "mixture": (log_mixture_nb, 5),
    "normal": (log_normal, 2),
    "detection": (log_detection, 1),
}


@pytest.mark.parametrize("name", LOG_PROBABILITIES)
def test_gradients(name):
    log_probability, n_parameters = LOG_PROBABILITIES[name]
    x = counts(4, 6)
    assert 0 < (x == 0).sum() < x.numel()
    parameters = [some(4, 6, seed=1 + i).requires_grad_() for i in range(n_parameters)]
    assert torch.autograd.gradcheck(lambda *p: log_probability(x, *p), parameters)


@pytest.mark.parametrize("name", LOG_PROBABILITIES)
def test_parameters_broadcast_over_cells(name):
    log_probability, n_parameters = LOG_PROBABILITIES[name]
    x = counts(4, 6)
    per_gene = [some(6, seed=1 + i) for i in range(n_parameters)]
    value = log_probability(x, *per_gene)
    assert value.shape == x.shape
    assert torch.equal(value, log_probability(x, *(p.expand(4, 6).clone() for p in per_gene)))


@pytest.mark.parametrize("name", LOG_PROBABILITIES)
def test_integer_counts_are_counts(name):
    log_probability, n_parameters = LOG_PROBABILITIES[name]
    x = counts(4, 6)
    parameters = [some(4, 6, seed=1 + i) for i in range(n_parameters)]
    assert_close(log_probability(x.int(), *parameters), log_probability(x, *parameters), **FLOAT32)


@pytest.mark.parametrize("name", sorted(LOG_PROBABILITIES.keys() - {"normal"}))  # squares of a mean of 1e30 overflow
@pytest.mark.parametrize("extreme", [1e-30, 1e30])
def test_finite_with_finite_gradient_in_float32(name, extreme):
    log_probability, n_parameters = LOG_PROBABILITIES[name]
    x = torch.tensor([0.0, 1.0, 1e5])
    parameters = [torch.full((3,), v, requires_grad=True) for v in (extreme, 1.0, 0.5, 0.5, 0.5)[:n_parameters]]
    value = log_probability(x, *parameters)
    value.sum().backward()
    assert value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in parameters)


def test_likelihoods_read_the_decoders_expression():
    x, rate, theta, logits = counts(4, 6), some(4, 6), some(6, seed=1), some(4, 6, low=-2, seed=2)
    px = Expression(rate / 7, rate, theta, logits)
    expected = {
        "zinb": log_zinb_positive(x, rate, theta, logits),
        "nb": log_nb_positive(x, rate, theta),
        "poisson": log_poisson(x, rate),
        "normal": log_normal(x, rate, theta),
        "bernoulli": log_detection(x, rate),
    }
    assert LIKELIHOODS.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(LIKELIHOODS[name](x, px), value), name


def test_nb_matches_gamma_poisson_sampling():
    rng = np.random.default_rng(1)
    mu, theta, n = 3.0, 0.8, 200_000
    drawn = rng.poisson(rng.gamma(theta, mu / theta, n))
    x = torch.arange(12, dtype=torch.float64)
    p = log_nb_positive(x, torch.tensor(mu), torch.tensor(theta)).exp().numpy()
    observed = np.bincount(drawn, minlength=12)[:12] / n
    assert (np.abs(observed - p) < N_STANDARD_ERRORS * np.sqrt(p * (1 - p) / n)).all()
