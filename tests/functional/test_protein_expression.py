"""What is made of a decoder's words about proteins, against scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _tolerances import FLOAT64, LOG_EPS, N_STANDARD_ERRORS
from scipy import stats

from scvi_ext._contract import Posterior, ProteinExpression
from scvi_ext.functional import proteins

B, P = 7, 5


@pytest.fixture
def py() -> ProteinExpression:
    rng = np.random.default_rng(0)
    loc, ratio, mixing = (torch.from_numpy(rng.normal(m, 1, (B, P))) for m in (1.5, 1.5, 0.0))
    scale = torch.from_numpy(rng.uniform(0.2, 0.8, (B, P)))
    return ProteinExpression(Posterior(loc, scale), ratio.abs(), torch.from_numpy(rng.uniform(0.5, 5, P)), mixing)


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(B, P)))


def test_the_mean_of_the_background_is_that_of_a_log_normal(py):
    loc, scale = (t.numpy() for t in py.background)
    expected = stats.lognorm(s=scale, scale=np.exp(loc)).mean()
    np.testing.assert_allclose(proteins.background_mean(py), expected, **FLOAT64)


def test_a_draw_of_the_background_is_a_quantile_of_it(py, noise):
    loc, scale = (t.numpy() for t in py.background)
    expected = stats.lognorm(s=scale, scale=np.exp(loc)).ppf(stats.norm.cdf(noise.numpy()))
    np.testing.assert_allclose(proteins.background_mean(py, noise), expected, rtol=1e-9)  # of an inverse function


def test_a_draw_is_foreground_where_its_quantile_is_below_the_probability(py, noise):
    probability = proteins.foreground_probability(py)
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(py.mixing_logits.numpy())), **FLOAT64)
    drawn = proteins.foreground_probability(py, noise)
    np.testing.assert_array_equal(drawn, stats.norm.cdf(noise.numpy()) < probability.numpy())


@pytest.mark.parametrize("include_background", [False, True])
def test_denoised_is_the_mean_of_what_is_foreground(py, include_background):
    background, foreground = proteins.background_mean(py), proteins.foreground_probability(py)
    b, p, ratio = background.numpy(), foreground.numpy(), np.exp(py.log_ratio.numpy())
    expected = p * ratio * b + (1 - p) * b * include_background
    found = proteins.denoised(py, background, foreground, include_background)
    np.testing.assert_allclose(found, expected, **FLOAT64)


def test_the_foreground_given_counts_is_bayes_theorem(py, noise):
    y = np.random.default_rng(2).poisson(20, (B, P))
    background = proteins.background_mean(py, noise)
    theta, prior = py.theta.numpy(), proteins.foreground_probability(py).numpy()

    def probability(mean):
        return stats.nbinom(theta, theta / (theta + mean)).pmf(y)

    fore, back = (probability(mean) for mean in ((background * torch.exp(py.log_ratio)).numpy(), background.numpy()))
    expected = prior * fore / (prior * fore + (1 - prior) * back)
    found = proteins.foreground_given_counts(torch.from_numpy(y), py, background)
    np.testing.assert_allclose(found, expected, **LOG_EPS)


def test_counts_are_drawn_from_the_mixture(py):
    parts = proteins.components(py, proteins.background_mean(py))
    n = 4000
    streams = [np.random.default_rng(i) for i in range(B)]
    drawn = np.stack([proteins.draw_protein_counts(parts, streams) for _ in range(n)])
    back, fore, theta, p = parts.numpy()
    mean = p * fore + (1 - p) * back
    second = sum(w * (m + m**2 / theta + m**2) for w, m in ((p, fore), (1 - p, back)))
    error = np.sqrt((second - mean**2) / n)
    assert (np.abs(drawn.mean(0) - mean) < N_STANDARD_ERRORS * error).all()
    zero = sum(w * stats.nbinom(theta, theta / (theta + m)).pmf(0) for w, m in ((p, fore), (1 - p, back)))
    assert (np.abs((drawn == 0).mean(0) - zero) < N_STANDARD_ERRORS * np.sqrt(zero * (1 - zero) / n)).all()
    np.testing.assert_array_equal(drawn, np.rint(drawn))


def test_rates_are_zero_or_gamma_around_the_foreground(py):
    parts = proteins.components(py, proteins.background_mean(py))
    n = 4000
    streams = [np.random.default_rng(i) for i in range(B)]
    drawn = np.stack([proteins.draw_protein_rates(parts, streams) for _ in range(n)])
    _, fore, theta, p = parts.numpy()
    shape = np.broadcast_to(theta, p.shape)
    for cell in range(B):
        for protein in range(P):
            values = drawn[:, cell, protein]
            share = p[cell, protein]
            assert abs((values > 0).mean() - share) < N_STANDARD_ERRORS * np.sqrt(share * (1 - share) / n)
            law = stats.gamma(shape[cell, protein], scale=fore[cell, protein] / shape[cell, protein])
            assert stats.kstest(values[values > 0], law.cdf).pvalue > 1e-8  # 35 such tests


def test_a_mean_that_has_overflown_is_still_drawn(py):
    parts = proteins.components(py, torch.full((B, P), torch.inf))
    streams = [np.random.default_rng(i) for i in range(B)]
    assert np.isfinite(proteins.draw_protein_counts(parts, streams)).all()
