"""Decisions from posterior probabilities of change."""

from __future__ import annotations

import numpy as np
from sklearn.mixture import GaussianMixture

_EPS = 1e-8  # probabilities of 0 and 1 come from a finite number of draws: their Bayes factor is finite too


def bayes_factor(probability: np.ndarray) -> np.ndarray:
    """log p / (1 - p): the logarithm of the Bayes factor where both hypotheses are equally likely beforehand."""
    return np.log(probability + _EPS) - np.log(1 - probability + _EPS)


def expected_fdr(probability: np.ndarray) -> np.ndarray:
    """Expected share of false discoveries among the genes that are at least as probable as each, shape (G,).

    The mean of 1 - p over those genes (Newton et al. 2004, Biostatistics 5, 155, section 5).
    """
    probability = np.asarray(probability, dtype=np.float64)
    falling, first = np.unique(-probability, return_inverse=True)
    n_at_least = np.cumsum(np.bincount(first, minlength=len(falling)))
    expected_false = np.cumsum(np.bincount(first, weights=1 - probability, minlength=len(falling)))
    return (expected_false / n_at_least)[first]


def learned_delta(mean_changes: np.ndarray, seed: int) -> float:
    """A smallest change that counts, from the mean log2 fold change of every gene (Boyeau et al. 2019).

    Three normal components are fitted; the outer two are taken for the genes that change, and 0.6 of their mean
    distance from zero for the border, at least 0.1, as in scvi-tools.
    """
    mixture = GaussianMixture(3, random_state=np.random.RandomState(seed % 2**32)).fit(mean_changes[:, None])
    outer = np.sort(mixture.means_.ravel())[[0, -1]]
    return max(0.1, 0.6 * float(np.abs(outer).mean()))
