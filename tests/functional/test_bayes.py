"""Decisions from posterior probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from scvi_ext.functional.bayes import bayes_factor, expected_fdr, learned_delta


def test_a_bayes_factor_is_the_log_odds_and_finite_at_both_ends():
    p = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(bayes_factor(p), np.log(p / (1 - p)), atol=1e-6)  # 1e-8 inside the logarithms
    ends = bayes_factor(np.array([0.0, 1.0]))
    assert np.isfinite(ends).all()
    assert ends[1] == -ends[0] > 18


def test_the_expected_share_of_false_discoveries_is_the_mean_over_all_that_are_as_probable():
    p = np.random.default_rng(0).choice([0.2, 0.5, 0.9, 0.99, 1.0], 50)
    expected = [(1 - p[p >= value]).mean() for value in p]
    np.testing.assert_allclose(expected_fdr(p), expected, rtol=1e-12)


def test_it_rises_as_the_probability_falls_and_keeps_the_order_of_the_genes():
    p = np.random.default_rng(1).random(100)
    fdr = expected_fdr(p)
    assert (np.diff(fdr[np.argsort(-p)]) > 0).all()
    assert fdr[p.argmax()] == pytest.approx(1 - p.max())
    assert fdr[p.argmin()] == pytest.approx((1 - p).mean())


def test_the_learned_border_lies_between_noise_and_changes():
    rng = np.random.default_rng(0)
    means = np.concatenate([rng.normal(0, 0.02, 900), rng.normal(1.5, 0.1, 50), rng.normal(-1.5, 0.1, 50)])
    assert learned_delta(means, 0) == pytest.approx(0.6 * 1.5, rel=0.05)  # means of 50 values of sd 0.1
    assert learned_delta(means, 0) == learned_delta(means, 0)
    assert learned_delta(rng.normal(0, 0.01, 500), 0) == 0.1
