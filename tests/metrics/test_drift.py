from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from scvi_ext.metrics import arrays


def brute_force(x: np.ndarray, reference: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    own = np.sort(cdist(reference, reference), axis=1)[:, k]  # the nearest is the cell itself
    found = np.sort(cdist(x, reference), axis=1)[:, k - 1]
    share = [(1 + (own >= distance).sum()) / (1 + len(own)) for distance in found]
    return found / np.median(own), np.array(share)


@pytest.mark.parametrize("k", [1, 7, 99])
def test_it_is_what_the_definition_says(k):
    rng = np.random.default_rng(0)
    reference, x = rng.normal(size=(100, 4)), 2 * rng.normal(size=(30, 4))
    for found, expected in zip(arrays.drift(x, reference, k), brute_force(x, reference, k), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_of_a_large_reference_some_cells_stand_for_all(monkeypatch):
    rng = np.random.default_rng(1)
    reference, x = rng.normal(size=(3000, 3)), rng.normal(size=(100, 3))
    every = arrays.drift(x, reference, 10)
    monkeypatch.setattr(arrays, "DRIFT_CELLS", 1000)
    some = arrays.drift(x, reference, 10, seed=3)
    # a share of 1,000 cells has a standard error of 0.016 at most, and the median of their distances one of 2 %
    np.testing.assert_allclose(some[0], every[0], rtol=0.1)
    np.testing.assert_allclose(some[1], every[1], atol=0.08)
    np.testing.assert_array_equal(some, arrays.drift(x, reference, 10, seed=3))
    assert not np.array_equal(some, arrays.drift(x, reference, 10, seed=4))


def test_shares_of_cells_like_the_reference_are_evenly_spread():
    rng = np.random.default_rng(2)
    reference, x = rng.normal(size=(2000, 3)), rng.normal(size=(2000, 3))
    ratio, share = arrays.drift(x, reference, 50)
    assert np.median(ratio) == pytest.approx(1, abs=0.05)
    for level in (0.05, 0.25, 0.5, 0.9):
        # two samples of 2,000 each: a standard error of sqrt(2 / 2000 * level * (1 - level)) = 0.016 at most
        assert (share <= level).mean() == pytest.approx(level, abs=0.08)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(scale):
    rng = np.random.default_rng(3)
    reference, x = rng.normal(size=(100, 3)), rng.normal(size=(10, 3))
    for found, expected in zip(
        arrays.drift(scale * x, scale * reference + 5 * scale, 5), arrays.drift(x - 5, reference, 5), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        (np.zeros((5, 2)), "below the number of reference cells"),
        (np.zeros((50, 2)), "coincide"),
        (np.full((50, 2), np.nan), "not finite"),
    ],
    ids=["few", "same", "missing"],
)
def test_what_cannot_be_compared(reference, match):
    with pytest.raises(ValueError, match=match):
        arrays.drift(np.zeros((3, 2)), reference, 10)
