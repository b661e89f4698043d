from __future__ import annotations

import numpy as np
import pytest
from _tolerances import FLOAT64, N_STANDARD_ERRORS
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss

from scvi_ext.functional.calibration import expected_calibration_error, fit_temperature, tempered


def draw(n_cells: int, n_labels: int = 5, sharpness: float = 2.0, seed: int = 0):
    """Log-probabilities, and labels that are drawn from exactly these."""
    rng = np.random.default_rng(seed)
    log_p = log_softmax(sharpness * rng.normal(size=(n_cells, n_labels)), axis=1)
    return log_p, (rng.random((n_cells, 1)) > np.exp(log_p).cumsum(1)[:, :-1]).sum(1)


def information(log_p: np.ndarray) -> float:
    """Fisher information of ln T at T = 1: the variance of ln p under p, summed over cells."""
    p = np.exp(log_p)
    return float(((p * log_p**2).sum(1) - (p * log_p).sum(1) ** 2).sum())


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_logits_that_were_multiplied_are_set_right(factor):
    log_p, labels = draw(20_000)
    found = fit_temperature(factor * log_p, labels)
    error = abs(np.log(found) - np.log(factor))
    # the prior takes off ln(factor) / information, which is a hundredth of a standard error here
    assert error < (N_STANDARD_ERRORS + 0.05) / information(log_p) ** 0.5
    assert 1 / information(log_p) ** 0.5 < 0.01
    np.testing.assert_allclose(tempered(factor * log_p, factor), log_p, **FLOAT64)


def test_the_temperature_minimises_the_loss_of_scikit_learn():
    log_p, labels = draw(300, sharpness=6.0, seed=1)
    log_p *= 3

    def objective(log_temperature: np.ndarray) -> float:
        p = softmax(log_p / np.exp(log_temperature[0]), axis=1)
        return log_loss(labels, p, labels=range(5), normalize=False) + log_temperature[0] ** 2 / 2

    best = minimize(objective, [0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    # a bounded search ends within 1e-5 of the minimum of a scale of one
    assert np.log(fit_temperature(log_p, labels)) == pytest.approx(best.x[0], abs=1e-4)


def test_the_prior_decides_where_cells_cannot():
    assert fit_temperature(np.empty((0, 3)), np.empty(0, dtype=int)) == pytest.approx(1, abs=1e-5)
    assert fit_temperature(np.zeros((50, 3)), np.zeros(50, dtype=int)) == pytest.approx(1, abs=1e-5)
    sure = np.log(np.array([[0.9, 0.05, 0.05]] * 1000))
    right, wrong = fit_temperature(sure, np.zeros(1000, dtype=int)), fit_temperature(sure, np.ones(1000, dtype=int))
    assert 0.1 < right < 1 < 10 < wrong < 150  # e^5
    few = [fit_temperature(sure[:n], np.zeros(n, dtype=int)) for n in (1, 10, 100)]
    assert 1 > few[0] > few[1] > few[2] > right


def test_logits_and_log_probabilities_are_the_same():
    log_p, labels = draw(200)
    shifted = log_p + np.random.default_rng(2).normal(size=(200, 1)) * 100
    assert fit_temperature(shifted, labels) == pytest.approx(fit_temperature(log_p, labels), rel=1e-6)
    np.testing.assert_allclose(tempered(shifted, 2.0), tempered(log_p, 2.0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.exp(tempered(log_p, 2.0)).sum(1), 1, **FLOAT64)
    assert (tempered(log_p, 7.0).argmax(1) == log_p.argmax(1)).all()


def test_probabilities_that_were_lost_to_rounding():
    log_p = np.array([[0.0, -np.inf], [-np.inf, 0.0], [0.0, -np.inf]])
    found = fit_temperature(log_p, np.array([0, 1, 1]))
    assert 1 < found < 150
    assert np.isfinite(tempered(log_p, found)).all()


@pytest.mark.parametrize("n_bins", [1, 2, 15, 100])
def test_calibration_error_is_that_of_its_definition(n_bins):
    rng = np.random.default_rng(3)
    confidence = np.r_[rng.random(400), 0.0, 1.0, np.arange(1, 15) / 15]
    correct = rng.random(len(confidence)) < confidence**2
    expected = 0.0
    for low, high in zip(np.arange(n_bins) / n_bins, np.arange(1, n_bins + 1) / n_bins, strict=True):
        inside = (confidence > low) & (confidence <= high) | ((low == 0) & (confidence == 0))
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    # a confidence on the border of two bins may fall into either by rounding: one cell of 416 each, of which 14 are
    assert expected_calibration_error(confidence, correct, n_bins) == pytest.approx(expected, abs=14 / 416)
    clear = np.abs(confidence * n_bins - np.rint(confidence * n_bins)) > 1e-9
    found = expected_calibration_error(confidence[clear], correct[clear], n_bins)
    bins = (confidence[clear] * n_bins).astype(int)
    by_bin = [abs((correct[clear] - confidence[clear])[bins == b].sum()) for b in range(n_bins)]
    assert found == pytest.approx(sum(by_bin) / clear.sum(), rel=1e-12)


def test_calibration_error_of_known_classifiers():
    log_p, labels = draw(50_000, seed=4)
    confidence, correct = np.exp(log_p.max(1)), log_p.argmax(1) == labels
    # each bin's distance is noise: at most 1/2 / sqrt(cells in the bin), in sum sqrt(15 / 50,000) / 2 on average
    assert expected_calibration_error(confidence, correct) < N_STANDARD_ERRORS * (15 / 50_000) ** 0.5 / 2
    assert expected_calibration_error(np.ones(4), [True, True, True, False]) == 0.25
    assert expected_calibration_error(np.ones(4), [True] * 4) == 0.0
    assert expected_calibration_error(np.ones(2, dtype=np.float32) + np.float32(1e-7), [False, False]) == 1.0
    assert np.isnan(expected_calibration_error([], []))
    sharper = tempered(log_p, 0.4)
    before = expected_calibration_error(np.exp(sharper.max(1)), correct)
    mended = tempered(sharper, fit_temperature(sharper[:25_000], labels[:25_000]))
    after = expected_calibration_error(np.exp(mended.max(1)), correct)
    assert after < 0.02 < 0.1 < before


def test_what_is_wrong_is_said():
    log_p, labels = draw(10)
    for wrong in (labels[:9], labels - 1, labels + 5, labels.astype(float)):
        with pytest.raises(ValueError, match="labels must be 10 codes from 0 to 4"):
            fit_temperature(log_p, wrong)
    with pytest.raises(ValueError, match="of 1 cells are missing, or give no label a chance"):
        tempered(np.where(np.arange(10)[:, None] == 3, np.nan, log_p), 1.0)
    with pytest.raises(ValueError, match=r"have shape \(10,\); cells x labels is needed"):
        tempered(log_p[:, 0], 1.0)
    for wrong in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match=r"temperature=.* must be above 0"):
            tempered(log_p, wrong)
    with pytest.raises(TypeError, match="temperature='1' is a str"):
        tempered(log_p, "1")
    with pytest.raises(ValueError, match=r"have shapes \(2,\) and \(3,\)"):
        expected_calibration_error([0.5, 0.5], [True, False, True])
    for wrong in (1.1, -0.1, np.nan):
        with pytest.raises(ValueError, match="missing or outside 0 to 1"):
            expected_calibration_error([wrong], [True])
    with pytest.raises(ValueError, match="n_bins=0 must be 1 or more"):
        expected_calibration_error([0.5], [True], 0)
