"""Draws have the law of the likelihood, and the distribution function is the sum of its probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _tolerances import FLOAT64, LOG_EPS, N_STANDARD_ERRORS
from scipy import stats

from scvi_ext._contract import Expression
from scvi_ext.functional import generate
from scvi_ext.functional.counts import LIKELIHOODS

N = 20_000  # cells, all with the same parameters: draws of one distribution per gene
COUNTS = ("zinb", "nb", "poisson", "bernoulli")
RATE = np.array([0.02, 0.5, 3.0, 40.0])
THETA = np.array([0.3, 2.0, 1e4, 5.0])
DROPOUT = np.array([-20.0, 0.0, 1.0, -2.0])
SD = np.array([0.1, 1.0, 3.0, 7.0])


def expression(name: str, n: int = N, *, shared: bool = True) -> Expression:
    theta = {"zinb": THETA, "nb": THETA, "normal": SD}.get(name)
    return Expression(
        scale=np.tile(RATE / RATE.sum(), (n, 1)),
        rate=np.tile(RATE, (n, 1)),
        theta=theta if theta is None or shared else np.tile(theta, (n, 1)),
        dropout_logits=np.tile(DROPOUT, (n, 1)) if name == "zinb" else None,
    )


def streams(n: int = N, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, cell]) for cell in range(n)]


def moments(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance, written out."""
    keep = 1 / (1 + np.exp(DROPOUT)) if name == "zinb" else np.ones(4)
    if name == "bernoulli":
        detected = 1 - np.exp(-RATE)
        return detected, detected * (1 - detected)
    variance = {"poisson": RATE, "normal": SD**2}.get(name, RATE + RATE**2 / THETA)
    return keep * RATE, keep * (variance + RATE**2) - (keep * RATE) ** 2


def log_probabilities(name: str, support: np.ndarray) -> np.ndarray:
    """What the model is trained with, at every number of the support, shape (support, G)."""
    px = expression(name, len(support))
    px = Expression(*(None if p is None else torch.from_numpy(np.array(p)) for p in px))
    x = torch.from_numpy(np.tile(support[:, None], (1, 4)).astype(float))
    return LIKELIHOODS[name](x, px).numpy()


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    return {name: generate.draw_counts(name, expression(name), streams()) for name in LIKELIHOODS}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_have_the_mean_and_the_variance_of_the_likelihood(drawn, name):
    x = drawn[name]
    mean, variance = moments(name)
    error = np.sqrt(variance / N)
    assert (np.abs(x.mean(0) - mean) <= N_STANDARD_ERRORS * error).all()
    squares = (x - mean) ** 2
    assert (np.abs(squares.mean(0) - variance) <= N_STANDARD_ERRORS * squares.std(0) / np.sqrt(N) + 1e-9).all()


@pytest.mark.parametrize("name", COUNTS)
def test_draws_are_zero_as_often_as_the_likelihood_says(drawn, name):
    zero = np.exp(log_probabilities(name, np.zeros(1)))[0]
    error = np.sqrt(zero * (1 - zero) / N)
    assert (np.abs((drawn[name] == 0).mean(0) - zero) <= N_STANDARD_ERRORS * error + 1e-6).all()


@pytest.mark.parametrize("name", COUNTS)
def test_every_count_is_drawn_as_often_as_the_likelihood_says(drawn, name):
    """Chi square over the counts expected 20 times or more and the rest together; wrong alarms once in 10^7."""
    support = np.arange(2 if name == "bernoulli" else 400)
    expected = N * np.exp(log_probabilities(name, support))
    for gene in range(4):
        often = expected[:, gene] >= 20
        observed = np.array([(drawn[name][:, gene] == k).sum() for k in support[often]])
        rest = max(N - expected[often, gene].sum(), 0)
        statistic = ((observed - expected[often, gene]) ** 2 / expected[often, gene]).sum()
        degrees = often.sum() - 1
        if rest >= 20:
            statistic += (N - observed.sum() - rest) ** 2 / rest
            degrees += 1
        if degrees:
            assert statistic < stats.chi2.isf(1e-7 / 4, degrees)


def test_normal_draws_are_normal(drawn):
    for gene in range(4):
        assert stats.kstest(drawn["normal"][:, gene], stats.norm(RATE[gene], SD[gene]).cdf).pvalue > 1e-7


def test_the_rates_behind_counts_are_gamma():
    mean = np.tile([1.0, 20.0, 300.0, 5.0], (N, 1))
    x = generate.draw_rates("nb", mean, expression("nb"), streams())
    for gene in range(4):
        law = stats.gamma(THETA[gene], scale=mean[0, gene] / THETA[gene])
        assert stats.kstest(x[:, gene], law.cdf).pvalue > 1e-7
    np.testing.assert_array_equal(generate.draw_rates("zinb", mean, expression("zinb"), streams()), x)
    for name in ("poisson", "normal", "bernoulli"):
        assert generate.draw_rates(name, mean, expression(name), streams()) is mean


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_cell_has_its_draws_whoever_is_beside_it(name):
    px = expression(name, 9, shared=False)
    whole = generate.draw_counts(name, px, streams(9))
    parts = [
        generate.draw_counts(name, Expression(*(None if p is None else p[rows] for p in px)), streams(9)[rows])
        for rows in (slice(0, 1), slice(1, 6), slice(6, 9))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(generate.draw_counts(name, expression(name, 9), streams(9)), whole)
    assert not np.array_equal(generate.draw_counts(name, px, streams(9, seed=1)), whole)


@pytest.mark.parametrize("name", ["zinb", "nb", "poisson"])
def test_rates_beyond_reason_are_drawn_from_as_1e8(name):
    rate = torch.tensor([[1e7, 1e12, 1e25, np.inf]])
    px = generate.on_host(Expression(rate, rate, torch.full((4,), 1e6), torch.full((1, 4), -20.0)))
    x = generate.draw_counts(name, px, streams(1))[0]
    # 1e7 has a coefficient of variation of 1e-3 as nb; 1e8 one of 1e-4
    np.testing.assert_allclose(x, [1e7, 1e8, 1e8, 1e8], rtol=7e-3)
    for part in generate.distribution_function(name, np.array([[0.0, 3.0, 1e6, 5.0]]), px):
        np.testing.assert_allclose(part, 0, atol=1e-6)


def test_extreme_parameters_give_counts():
    px = Expression(None, np.array([[5.0, 5.0, 1e9, 0.0]]), np.array([0.0, 1e30, 1e-30, 1.0]), np.zeros((1, 4)))
    for name in ("zinb", "nb"):
        x = generate.draw_counts(name, px, streams(1))
        assert (np.isfinite(x) & (x >= 0)).all()
        assert x[0, 3] == 0
        below, up_to = generate.distribution_function(name, np.array([[0.0, 3.0, 7.0, 0.0]]), px)
        assert ((below >= 0) & (below <= up_to) & (up_to <= 1)).all()


@pytest.mark.parametrize("name", ["zinb", "nb", "poisson"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_distribution_function_sums_probabilities(name, shared):
    support = np.arange(120)
    x = np.tile(support[:, None], (1, 4)).astype(float)
    below, up_to = generate.distribution_function(name, x, expression(name, 120, shared=shared))
    total = np.exp(log_probabilities(name, support)).cumsum(0)
    np.testing.assert_allclose(up_to, total, **LOG_EPS)
    np.testing.assert_array_equal(below[0], 0)
    np.testing.assert_allclose(below[1:], up_to[:-1], **FLOAT64)


def test_the_distribution_functions_are_those_of_scipy():
    x = np.array([[0.0, 1.0, 4.0, 55.0]])
    _, up_to = generate.distribution_function("nb", x, expression("nb", 1))
    np.testing.assert_allclose(up_to[0], stats.nbinom.cdf(x[0], THETA, THETA / (THETA + RATE)), **FLOAT64)
    _, up_to = generate.distribution_function("poisson", x, expression("poisson", 1))
    np.testing.assert_allclose(up_to[0], stats.poisson.cdf(x[0], RATE), **FLOAT64)
    below, up_to = generate.distribution_function("normal", x, expression("normal", 1))
    np.testing.assert_allclose(up_to[0], stats.norm.cdf(x[0], RATE, SD), **FLOAT64)
    np.testing.assert_array_equal(below, up_to)


def test_sums_of_probabilities_and_the_incomplete_beta_function_agree(monkeypatch):
    """On both sides of the largest count that is summed up to, and where the probability of zero is none."""
    x = np.array([[1.0, 40.0, 64.0, 65.0, 300.0, 9e4]])
    for rate, theta in [(50.0, 3.0), (1e5, 1e3), (1e-3, 0.01), (60.0, 1e6)]:
        px = Expression(None, np.full((1, 6), rate), np.full(6, theta))
        law = stats.nbinom(theta, theta / (theta + rate))
        for largest in (0, 64, 500):
            monkeypatch.setattr(generate, "_SUMMED", largest)
            below, up_to = generate.distribution_function("nb", x, px)
            np.testing.assert_allclose(up_to[0], law.cdf(x[0]), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(below[0], law.cdf(x[0] - 1), rtol=1e-9, atol=1e-12)


def test_detection_has_two_outcomes():
    x = np.array([[0.0, 1.0, 4.0, 0.0]])
    below, up_to = generate.distribution_function("bernoulli", x, expression("bernoulli", 1))
    none = np.exp(-RATE)
    np.testing.assert_allclose(up_to[0], [none[0], 1, 1, none[3]], **FLOAT64)
    np.testing.assert_allclose(below[0], [0, none[1], none[2], 0], **FLOAT64)


def test_a_fraction_stands_between_two_counts():
    below, up_to = generate.distribution_function("nb", np.full((1, 4), 2.5), expression("nb", 1))
    np.testing.assert_allclose(below, up_to, **FLOAT64)
    _, at_two = generate.distribution_function("nb", np.full((1, 4), 2.0), expression("nb", 1))
    np.testing.assert_allclose(up_to, at_two, **FLOAT64)


@pytest.mark.parametrize("level", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_truth_is_covered_as_often_as_it_should_be(drawn, name, level):
    below, up_to = generate.distribution_function(name, drawn[name], expression(name))
    inside = generate.coverage(below, up_to, level)
    assert ((inside >= 0) & (inside <= 1)).all()
    error = inside.std(0) / np.sqrt(N)
    assert (np.abs(inside.mean(0) - level) < N_STANDARD_ERRORS * error + 1e-9).all()


def test_coverage_is_the_share_of_a_randomised_transform(drawn):
    """What Czado, Gneiting and Held draw at random is averaged here."""
    x = drawn["zinb"][:50]
    below, up_to = generate.distribution_function("zinb", x, expression("zinb", 50))
    u = below + np.random.default_rng(0).random((20_000, 50, 4)) * (up_to - below)
    for level in (0.3, 0.8):
        share = (np.abs(u - 0.5) <= level / 2).mean(0)
        # 200 shares of 20,000 draws each, standard error 0.0035 at most
        np.testing.assert_allclose(generate.coverage(below, up_to, level), share, rtol=0, atol=6 * 0.0036)


def test_what_has_no_width_is_covered_or_not():
    points = np.array([[0.0, 0.02, 0.5, 0.98, 1.0]])
    np.testing.assert_array_equal(generate.coverage(points, points, 0.9), [[0, 0, 1, 0, 0]])


def test_an_expression_of_tensors_comes_to_the_host():
    px = generate.on_host(Expression(torch.ones(2, 3), torch.zeros(2, 3), None, torch.ones(3)))
    assert px.theta is None
    assert {p.dtype for p in px if p is not None} == {np.dtype(np.float64)}
    assert px.rate.shape == (2, 3)
