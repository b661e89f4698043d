"""Three ways to corrupt counts, so that what a model imputes can be held against what was there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

# Of scVI 0.5.0, dataset.corrupt
_KEPT_WHOLE = 0.9  # uniform: probability that a chosen entry stays as it is; else it becomes 0
_KEPT = 0.2  # binomial: probability that a molecule of a chosen entry stays


def corrupt_uniform(counts: np.ndarray, n_entries: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Choose floor(rate * n) of the ``n`` non-zero counts without replacement, and multiply each by Bernoulli(0.9).

    Parameters
    ----------
    counts
        Counts that are not zero, integers, shape (n,).
    n_entries
        Entries of the matrix, zeros included; of use to :func:`corrupt_binomial` only.
    rate
        Between 0 and 1.
    rng
        Generator of the draws.

    Returns
    -------
    Corrupted counts, shape (n,).
    """
    chosen = rng.choice(len(counts), int(rate * len(counts)), replace=False, shuffle=False)
    return _with(counts, chosen, counts[chosen] * rng.binomial(1, _KEPT_WHOLE, len(chosen)))


def corrupt_binomial(counts: np.ndarray, n_entries: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Choose floor(rate * n_entries) of all entries without replacement, and replace each x by Binomial(x, 0.2).

    A zero stays zero, so only those chosen entries have to be found that are not zero: their number is hypergeometric,
    and they are any of the non-zero ones.
    """
    n_chosen = _hypergeometric(len(counts), n_entries, int(rate * n_entries), rng)
    chosen = rng.choice(len(counts), n_chosen, replace=False, shuffle=False)
    return _with(counts, chosen, rng.binomial(counts[chosen], _KEPT))


def corrupt_thinning(counts: np.ndarray, n_entries: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Lose every molecule with probability ``rate``: each count x becomes Binomial(x, 1 - rate)."""
    return rng.binomial(counts, 1 - rate)


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]] = {
    "uniform": corrupt_uniform,
    "binomial": corrupt_binomial,
    "thinning": corrupt_thinning,
}
"""Value of ``method`` -> corruption of the non-zero counts of a matrix."""


def _with(counts: np.ndarray, chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    corrupted = counts.copy()
    corrupted[chosen] = values
    return corrupted


def _hypergeometric(n_marked: int, n: int, n_chosen: int, rng: np.random.Generator) -> int:
    """How many of ``n_marked`` among ``n`` entries are chosen, if ``n_chosen`` are taken without replacement.

    NumPy's own draw ends at 10^9 entries. Here every entry is first chosen on its own; then as many of those chosen,
    or left, as there are too many, or too few, change sides at random. Since no entry is preferred in either step, the
    chosen set is any of that size with equal probability. Some sqrt(n) entries change sides.
    """
    share = n_chosen / n
    marked, others = rng.binomial(n_marked, share), rng.binomial(n - n_marked, share)
    surplus = marked + others - n_chosen
    if surplus > 0:
        back = rng.choice(marked + others, surplus, replace=False, shuffle=False)
        return int(marked - np.count_nonzero(back < marked))
    more = rng.choice(n - marked - others, -surplus, replace=False, shuffle=False)
    return int(marked + np.count_nonzero(more < n_marked - marked))
