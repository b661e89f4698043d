"""Changes between sets of draws, against every pair of draws written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scvi_ext.kernels import changes
from scvi_ext.kernels.compiler import in_parallel

N_BINS = 400


def histogram(positions, sets, n_sets, weights=None):
    """Draws (B, G) as histograms (S, G, K)."""
    positions = np.asarray(positions, np.float32)
    weights = np.ones(len(positions), np.float32) if weights is None else np.asarray(weights, np.float32)
    found = np.zeros((n_sets, positions.shape[1], N_BINS), np.float32)
    in_parallel(changes.add, found, positions, np.asarray(sets), weights)
    return found


def describe(histograms, left, right, draws, *, delta=10.5, tail=0.025, moved=None, shares=None):
    """``histograms`` (D, S, G, K), one comparison: a dict of arrays (G,)."""
    shares = np.full(len(histograms), 1 / len(histograms)) if shares is None else shares
    moved = np.arange(N_BINS, dtype=float) if moved is None else moved
    slots = moved.astype(int)
    fractions, spread = (moved - slots).astype(np.float32), changes.SPLIT_VARIANCE * np.gradient(moved) ** 2
    out = np.empty((1, histograms.shape[2], len(changes.OUTPUTS)))
    sides = [np.atleast_2d(np.asarray(side, float)) for side in (left, right)]
    in_parallel(
        changes.changes,
        *(histograms, histograms[:, :, 0].sum(2), shares, np.asarray(draws, float), *sides),
        *(slots[None], fractions[None], spread[None], np.array([delta]), tail, out),
    )
    return dict(zip(changes.OUTPUTS, out[0].T, strict=True))


def pairs(a, b):
    """Differences of all pairs, (n, m) for one gene."""
    return np.subtract.outer(a, b)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def whole(rng):
    """Draws at bin centres: two sets of 60 and 90 draws of 5 genes."""
    return rng.integers(100, 140, (60, 5)), rng.integers(90, 170, (90, 5))


def test_a_draw_between_two_bins_is_split_in_proportion():
    found = histogram([[10.25, 3.0]], [0], 1)
    assert found[0, 0, [10, 11]].tolist() == [0.75, 0.25]
    assert found[0, 1, 3] == 1
    assert found.sum() == 2


@pytest.mark.parametrize("n_threads", [1, 2])
def test_scales_are_summed_by_set_and_become_positions_of_their_logarithm(n_threads, rng):
    lowest, scales = -10, rng.lognormal(-2, 2, (20, 7)).astype(np.float32)
    scales[0, :4] = 0, 2.0**lowest, 0.25, 1000  # none, the first bin, a power of two, beyond the last bin
    sets, weights, sums = rng.integers(0, 3, 20), rng.random(20).astype(np.float32), np.zeros((3, 7))
    positions, before = scales.copy(), torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        in_parallel(changes.locate, positions, sums, sets, weights, lowest, N_BINS)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(sums, (np.eye(3)[sets].T * weights) @ scales, rtol=1e-6)  # float32 products
    with np.errstate(divide="ignore"):
        expected = (np.log2(scales, dtype=np.float64) - lowest) * changes.PER_DOUBLING
    # float32 holds positions to 3e-5
    np.testing.assert_allclose(positions, np.clip(expected, 0, N_BINS - 1.001), atol=1e-4)
    assert positions.min() >= 0
    assert positions.max() < N_BINS - 1


def test_probabilities_are_the_shares_of_all_pairs(whole):
    a, b = whole
    both = histogram(np.concatenate([a, b]), np.repeat([0, 1], [60, 90]), 2)[None]
    found = describe(both, [1, 0], [0, 1], [[60, 90]])  # a border between two bins: no pair is on it
    for g in range(5):
        difference = pairs(a[:, g], b[:, g])
        # float32 masses of 5,400 pairs
        np.testing.assert_allclose(found["up"][g], (difference >= 11).mean(), atol=1e-5)
        np.testing.assert_allclose(found["down"][g], (difference <= -11).mean(), atol=1e-5)
        np.testing.assert_allclose(found["mean"][g], difference.mean(), atol=1e-3)
        np.testing.assert_allclose(found["variance"][g], difference.var() - 2 * changes.SPLIT_VARIANCE, rtol=1e-4)
        for name, q in (("median", 0.5), ("low", 0.025), ("high", 0.975)):
            assert abs(found[name][g] - np.quantile(difference, q)) <= 1


def test_with_no_border_ties_count_half(whole):
    a, b = whole
    both = histogram(np.concatenate([a, b]), np.repeat([0, 1], [60, 90]), 2)[None]
    found = describe(both, [1, 0], [0, 1], [[60, 90]], delta=0.0)
    expected = [((d := pairs(a[:, g], b[:, g])) > 0).mean() + (d == 0).mean() / 2 for g in range(5)]
    np.testing.assert_allclose(found["up"], expected, atol=1e-5)
    np.testing.assert_allclose(found["up"] + found["down"], 1, atol=1e-5)


def test_sides_are_mixtures_and_only_draws_of_one_decode_batch_make_a_pair(rng):
    draws = rng.integers(100, 160, (2, 3, 40, 4))  # decode batches, sets, draws, genes
    draws[1] += 30
    histograms = np.stack([histogram(d.reshape(120, 4), np.repeat([0, 1, 2], 40), 3) for d in draws])
    left, right = [0.25, 0, 0.75], [0, 1, 0]
    found = describe(histograms, left, right, np.full((2, 3), 40.0), shares=np.array([0.5, 0.5]))
    for g in range(4):
        up = mean = 0
        for d in range(2):
            for s, share in ((0, 0.25), (2, 0.75)):
                difference = pairs(draws[d, s, :, g], draws[d, 1, :, g])
                up += 0.5 * share * (difference >= 11).mean()
                mean += 0.5 * share * difference.mean()
        np.testing.assert_allclose(found["up"][g], up, atol=1e-5)
        np.testing.assert_allclose(found["mean"][g], mean, atol=1e-3)


def test_draws_count_by_their_weights(rng):
    a, b, weights = rng.integers(100, 140, (30, 3)), rng.integers(100, 140, (50, 3)), rng.random(30)
    both = histogram(np.concatenate([a, b]), np.repeat([0, 1], [30, 50]), 2, np.append(weights, np.ones(50)))[None]
    found = describe(both, [1, 0], [0, 1], [[30, 50]])
    expected = [weights @ (pairs(a[:, g], b[:, g]) >= 11).mean(1) / weights.sum() for g in range(3)]
    np.testing.assert_allclose(found["up"], expected, atol=1e-5)


@pytest.mark.parametrize("sd", [3.0, 40.0])
def test_fold_changes_with_a_pseudocount_are_those_of_continuous_draws(sd, rng):
    """Positions anywhere between the bins, and a pseudocount as large as the scales themselves."""
    a, b = rng.normal(220, sd, (400, 2)), rng.normal(210, sd, (300, 2))
    both = histogram(np.concatenate([a, b]), np.repeat([0, 1], [400, 300]), 2)[None]
    per = changes.PER_DOUBLING
    moved = per * np.log2(2 ** (np.arange(N_BINS) / per) + 2 ** (215 / per))
    found = describe(both, [1, 0], [0, 1], [[400, 300]], delta=4.0, moved=moved)
    for g in range(2):
        c = 2 ** (215 / per)
        va, vb = (per * np.log2(2 ** (v[:, g] / per) + c) for v in (a, b))
        difference = pairs(va, vb)
        near = (abs(difference - 4) < 2).mean()  # what the width of the bins can move across the border
        assert abs(found["up"][g] - (difference >= 4).mean()) <= 0.2 * near
        assert abs(found["mean"][g] - difference.mean()) < 0.02
        np.testing.assert_allclose(found["variance"][g], difference.var(), rtol=0.02, atol=0.05)
        for name, q in (("median", 0.5), ("low", 0.025), ("high", 0.975)):
            assert abs(found[name][g] - np.quantile(difference, q)) < 1.5


def test_standard_errors_are_those_of_repeated_draws(rng):
    n_a, n_b, n_repeats = 60, 90, 4000
    a, b = rng.normal(205, 12, (n_a, n_repeats)), rng.normal(195, 20, (n_b, n_repeats))  # a repeat in place of a gene
    both = histogram(np.concatenate([a, b]), np.repeat([0, 1], [n_a, n_b]), 2)[None]
    found = describe(both, [1, 0], [0, 1], [[n_a, n_b]])
    for value, variance in (("up", "up_variance"), ("down", "down_variance"), ("mean", "mean_variance")):
        # 4,000 repeats know the variance to 2.2 %; five of these, and 1/60 for the plug-in estimate
        assert found[variance].mean() / found[value].var() == pytest.approx(1, abs=0.13)


def test_mass_counts_from_the_first_bin_to_the_last(rng):
    """Histograms of any width, at either end, as one draw and as many; a third set lies anywhere."""
    ranges = [(0, 1), (0, N_BINS - 1), (63, 64), (N_BINS - 2, N_BINS - 1), (0, 64), (200, 329)]  # from, below
    a, b = (np.stack([rng.integers(*rng.permutation(ranges)[0], 40) for _ in range(30)], 1) for _ in "ab")
    a[0], b[-1] = 0, N_BINS - 2
    other = rng.integers(0, N_BINS - 1, (1, 30))
    both = histogram(np.concatenate([a, other, b]), np.repeat([0, 1, 2], [40, 1, 40]), 3)[None]
    found = describe(both, [1, 0, 0], [0, 0, 1], [[40, 1, 40]])
    for g in range(30):
        difference = pairs(a[:, g], b[:, g])
        np.testing.assert_allclose(found["up"][g], (difference >= 11).mean(), atol=1e-5)
        np.testing.assert_allclose(found["down"][g], (difference <= -11).mean(), atol=1e-5)
        np.testing.assert_allclose(found["mean"][g], difference.mean(), atol=1e-3)
        expected = max(difference.var() - 2 * changes.SPLIT_VARIANCE, 0)
        np.testing.assert_allclose(found["variance"][g], expected, rtol=1e-5, atol=1e-3)
        # A quantile may lie anywhere between two pairs that are next to each other.
        for name, q in (("median", 0.5), ("low", 0.025), ("high", 0.975)):
            lower, upper = (np.quantile(difference, q, method=method) for method in ("lower", "higher"))
            assert lower - 0.6 <= found[name][g] <= upper + 0.6


def test_results_do_not_depend_on_the_number_of_threads(rng):
    positions, sets = rng.uniform(0, N_BINS - 1.001, (50, 33)), rng.integers(0, 2, 50)
    n_threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            both = histogram(positions, sets, 2)[None]
            found.append((both, describe(both, [1, 0], [0, 1], [[20, 30]])))
    finally:
        torch.set_num_threads(n_threads)
    np.testing.assert_array_equal(found[0][0], found[1][0])
    for name in changes.OUTPUTS:
        np.testing.assert_array_equal(found[0][1][name], found[1][1][name])


def test_one_draw_on_each_side_is_a_point():
    both = histogram([[120.0], [100.0]], [0, 1], 2)[None]
    found = describe(both, [1, 0], [0, 1], [[1, 1]])
    assert (found["up"][0], found["down"][0], found["mean"][0], found["variance"][0]) == (1, 0, 20, 0)
    assert abs(found["median"][0] - 20) <= 0.5
    assert (found["up_variance"][0], found["mean_variance"][0]) == (0, 0)
