"""Whether a classifier is as sure as it is right, and how to make it so (Guo et al. 2017, ICML, 1321)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from scvi_ext._errors import number, whole_number

# A classifier gives no label probability zero: what is below the smallest float32 has been lost to rounding.
_LOG_TINY = float(np.log(np.finfo(np.float32).tiny))
_WIDEST = 5.0  # standard deviations of the prior that are searched: temperatures from 0.007 to 148


def tempered(log_probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Log-softmax of log p / T: a classifier that is less sure (temperature above 1), or surer (below 1).

    Parameters
    ----------
    log_probabilities
        Shape (n, C), each row up to a constant, so that logits will do.
    temperature
        Above 0.

    Returns
    -------
    float64, shape (n, C), normalised; the order of the labels is that of ``log_probabilities``.
    """
    if not number("temperature", temperature) > 0:
        msg = f"temperature={temperature!r} must be above 0."
        raise ValueError(msg)
    return log_softmax(_checked(log_probabilities) / temperature, axis=1)


def fit_temperature(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    r"""The temperature at which cells that a classifier has not seen bear out its probabilities.

    Minimises :math:`-\sum_c \ln \mathrm{softmax}(\ln p_c / T)_{y_c} + \tfrac{1}{2} (\ln T)^2` over :math:`\ln T`: the
    negative log-likelihood of Guo et al. and a standard normal prior of ln T. The prior weighs about as much as one
    cell. It decides where the cells cannot: the likelihood alone would take T to 0 where all of them are right, and to
    infinity where none is. Without any cell T is 1.

    Parameters
    ----------
    log_probabilities
        Of held-out cells, shape (n, C), each row up to a constant.
    labels
        Codes of their labels, from 0 to C - 1, shape (n,).

    Returns
    -------
    The temperature T, see :func:`tempered`.
    """
    log_probabilities, labels = _checked(log_probabilities), np.asarray(labels)
    n_cells, n_labels = log_probabilities.shape
    if labels.shape != (n_cells,) or labels.dtype.kind not in "iu" or not np.isin(labels, np.arange(n_labels)).all():
        msg = f"labels must be {n_cells} codes from 0 to {n_labels - 1}, one for each row of log_probabilities."
        raise ValueError(msg)
    rows = np.arange(n_cells)

    def objective(log_temperature: float) -> float:
        log_p = log_softmax(log_probabilities * np.exp(-log_temperature), axis=1)
        return 0.5 * log_temperature**2 - log_p[rows, labels].sum()

    return float(np.exp(minimize_scalar(objective, bounds=(-_WIDEST, _WIDEST), method="bounded").x))


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 15) -> float:
    """How far confidence is from accuracy: their mean distance over bins of equal width, weighted by cells.

    Parameters
    ----------
    confidence
        Probability of the predicted label, from 0 to 1, shape (n,).
    correct
        Whether it is the true one, shape (n,).
    n_bins
        Bins of confidence from 0 to 1.

    Returns
    -------
    From 0 (of cells with confidence p, a share p is right) to 1. NaN where there is no cell.
    """
    whole_number("n_bins", n_bins, 1)
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1:
        msg = (
            f"confidence and correct have shapes {confidence.shape} and {correct.shape}; one value per cell is needed."
        )
        raise ValueError(msg)
    slack = 1e-6  # softmax in float32 may add up to a little more than 1
    if not ((confidence >= -slack) & (confidence <= 1 + slack)).all():
        msg = "confidence has values that are missing or outside 0 to 1: leave such cells out."
        raise ValueError(msg)
    if len(confidence) == 0:
        return float("nan")
    confidence = np.clip(confidence, 0, 1)
    # Bins are open on the left, as in the paper.
    bins = np.maximum(np.ceil(confidence * n_bins) - 1, 0).astype(np.int64)
    return float(np.abs(np.bincount(bins, weights=correct - confidence)).sum() / len(confidence))


def _checked(log_probabilities: np.ndarray) -> np.ndarray:
    log_probabilities = np.asarray(log_probabilities, dtype=np.float64)
    if log_probabilities.ndim != 2 or log_probabilities.shape[1] == 0:
        msg = f"log_probabilities have shape {log_probabilities.shape}; cells x labels is needed."
        raise ValueError(msg)
    highest = log_probabilities.max(axis=1, keepdims=True)
    if not np.isfinite(highest).all():
        msg = f"log_probabilities of {(~np.isfinite(highest)).sum()} cells are missing, or give no label a chance."
        raise ValueError(msg)
    return np.maximum(log_probabilities - highest, _LOG_TINY)
