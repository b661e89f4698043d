"""Distributions of log fold changes between sets of draws, from histograms of the log scale (numba).

A histogram is a row of ``K`` bins, one for each 1 / ``PER_DOUBLING`` of a power of two. A draw between two bin centres
is split over both in proportion, so that its mean is kept. All pairs of a draw of one set with a draw of the other
count: the difference of two histograms is their cross-correlation.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from scvi_ext.kernels.compiler import fast, kernel, parallel, widest_vectors

PER_DOUBLING = 32
# Splitting a draw that is anywhere between two centres adds the mean of f (1 - f) to a variance, in bins squared.
SPLIT_VARIANCE = 1 / 6

# What is known of a change, in the order of the last axis of what `changes` returns.
OUTPUTS = ("up", "down", "mean", "variance", "median", "low", "high", "up_variance", "down_variance", "mean_variance")


@parallel
def add(n_parts, histograms, positions, sets, weights):
    """Add draws ``positions`` (B, G), in bins, to ``histograms`` (S, G, K): draw b to set ``sets[b]``."""
    n_genes = positions.shape[1]
    for part in prange(n_parts):
        first, stop = part * n_genes // n_parts, (part + 1) * n_genes // n_parts
        _add(histograms, positions, sets, weights, first, stop)


@kernel
def _add(histograms, positions, sets, weights, first, stop):
    for b in range(positions.shape[0]):
        of_set, weight = histograms[sets[b]], weights[b]
        for g in range(first, stop):
            position = positions[b, g]
            k = int(position)
            above = weight * (position - k)
            of_set[g, k] += weight - above
            of_set[g, k + 1] += above


@parallel
def add_up(n_parts, sums, values, sets, weights):
    """Add ``values`` (B, G) to ``sums`` (S, G), row b to set ``sets[b]``, by the weights (B,)."""
    n_genes = values.shape[1]
    for part in prange(n_parts):
        first, stop = part * n_genes // n_parts, (part + 1) * n_genes // n_parts
        _add_up(sums, values, sets, weights, first, stop)


@kernel
def _add_up(sums, values, sets, weights, first, stop):
    widest_vectors()
    for b in range(values.shape[0]):
        of_set, weight = sums[sets[b]], weights[b]
        for g in range(first, stop):
            of_set[g] += weight * values[b, g]


@parallel
def changes(n_parts, histograms, totals, shares, draws, left, right, slots, fractions, spread, delta, tail, outputs):
    """Describe log2(left + c) - log2(right + c) for every gene and comparison.

    Parameters
    ----------
    histograms
        Draws of the log scale, (D, S, G, K): decode batches, sets of cells, genes, bins.
    totals
        What each of them adds up to, (D, S).
    shares, draws
        Weight of each decode batch, (D,); (effective) number of draws in each histogram, (D, S).
    left, right
        Shares of the sets on both sides of a comparison, (C, S), rows add up to 1.
    slots, fractions
        Where the pseudocount of a comparison moves each bin: to ``slots`` and, by ``fractions``, the one above, (C, K).
    spread
        Variance that splitting has added to the draws of a bin, after that move, (C, K); it is taken off again.
    delta
        Smallest change that counts, in bins, (C,).
    tail
        Probability below and above the credible interval.
    outputs
        (C, G, len(OUTPUTS)): probabilities, and values and variances in bins and bins squared. The last three are the
        Monte-Carlo variances of the probabilities of a change up and down and of the mean.
    """
    n_genes = histograms.shape[2]
    for part in prange(n_parts):
        first, stop = part * n_genes // n_parts, (part + 1) * n_genes // n_parts
        _changes(
            histograms, totals, shares, draws, left, right, slots, fractions, spread, delta, tail, outputs, first, stop
        )


@kernel
def _changes(
    histograms, totals, shares, draws, left, right, slots, fractions, spread, delta, tail, outputs, first, stop
):
    n_batches, n_sets, _, n_bins = histograms.shape
    mixed = np.zeros(n_bins, np.float32)
    a, b = np.zeros(n_bins + 1, np.float32), np.zeros(n_bins + 1, np.float32)
    difference = np.zeros(2 * n_bins + 2, np.float32)  # of j - n_bins bins
    ends = np.zeros((n_batches, n_sets, 2), np.int64)
    for g in range(first, stop):
        for batch in range(n_batches):
            for s in range(n_sets):
                ends[batch, s, 0], ends[batch, s, 1] = _ends(histograms[batch, s, g], 0, n_bins - 1)
        for c in range(len(left)):
            out = outputs[c, g]
            out[:] = 0
            lowest, highest, added = 2 * n_bins + 1, 0, 0.0
            move = (slots[c], fractions[c], spread[c])
            for batch in range(n_batches):
                share = shares[batch]
                of_gene = histograms[batch, :, g]
                weights_a, weights_b = left[c] / totals[batch], right[c] / totals[batch]
                a0, a1, split_a = _mixture(of_gene, ends[batch], weights_a, move, mixed, a)
                b0, b1, split_b = _mixture(of_gene, ends[batch], weights_b, move, mixed, b)
                lowest, highest = min(lowest, a0 - b1 + n_bins), max(highest, a1 - b0 + n_bins)
                added += share * (split_a + split_b)
                _subtract(difference, share, a, a0, a1, b[b0 : b1 + 1][::-1].copy(), n_bins - b1)
                n_a, n_b = _effective(left[c], draws[batch]), _effective(right[c], draws[batch])
                up, down = _tails(a, a0, a1, b, b0, b1, delta[c], n_a, n_b, share, out)
                out[0] += share * up
                out[1] += share * down
                a[a0 : a1 + 1] = 0
                b[b0 : b1 + 1] = 0
            out[0], out[1] = min(out[0], 1.0), min(out[1], 1.0)  # float32 masses add up to 1 within their roundings
            _moments(difference, lowest, highest, n_bins, added, out)
            out[4] = _quantile(difference, lowest, highest, 0.5) - n_bins
            out[5] = _quantile(difference, lowest, highest, tail) - n_bins
            out[6] = _quantile(difference, lowest, highest, 1 - tail) - n_bins
            difference[lowest : highest + 1] = 0


@fast
def _ends(histogram, lowest, highest):
    """The first and the last bin with mass between two bins."""
    while lowest < highest and histogram[lowest] == 0:
        lowest += 1
    while highest > lowest and histogram[highest] == 0:
        highest -= 1
    return lowest, highest


@kernel
def _mixture(of_gene, ends, weights, move, mixed, moved):
    """The mixture of histograms (S, K) with a pseudocount added: its ends, and the variance that splitting added."""
    widest_vectors()
    slots, fractions, spread = move
    lowest, highest = len(mixed), 0
    for s in range(len(weights)):
        if weights[s] != 0:
            weight, histogram = np.float32(weights[s]), of_gene[s]
            lowest, highest = min(lowest, ends[s, 0]), max(highest, ends[s, 1])
            for k in range(ends[s, 0], ends[s, 1] + 1):
                mixed[k] += weight * histogram[k]
    split = 0.0
    for k in range(lowest, highest + 1):
        mass = mixed[k]
        above = mass * fractions[k]
        moved[slots[k]] += mass - above
        moved[slots[k] + 1] += above
        split += mass * spread[k] + above * (1 - fractions[k])
        mixed[k] = 0
    lowest, highest = _ends(moved, slots[lowest], slots[highest] + 1)
    return lowest, highest, split


@kernel
def _subtract(difference, share, a, a0, a1, reversed_b, shift):
    """Add all pairs of ``a`` and ``b`` to the bins of their difference, b in the order of falling bins."""
    widest_vectors()
    for i in range(a0, a1 + 1):
        mass = np.float32(share) * a[i]
        if mass != 0:
            row = difference[i + shift :]
            for k in range(len(reversed_b)):
                row[k] += mass * reversed_b[k]


@fast
def _effective(shares, draws):
    """Draws that a mixture of sets is worth: a mean over it has the variance of one over so many."""
    per_draw = 0.0
    for s in range(len(shares)):
        if shares[s] != 0:
            per_draw += shares[s] ** 2 / draws[s]
    return 1 / per_draw


@kernel
def _tails(a, a0, a1, b, b0, b1, delta, n_a, n_b, share, out):
    """P(a - b >= delta) and P(a - b <= -delta), and to ``out`` the Monte-Carlo variances of these and of the mean.

    The variance of a mean over all pairs is that of its conditional means, given one or the other member (Hoeffding).
    """
    up = down = up2_a = down2_a = up2_b = down2_b = 0.0
    mean_a = mean_b = square_a = square_b = 0.0
    below = np.zeros(b1 - b0 + 2)  # mass of b below the lower edge of bin b0 + j
    for j in range(b1 - b0 + 1):
        below[j + 1] = below[j] + b[b0 + j]
    for i in range(a0, a1 + 1):
        mass = a[i]
        if mass != 0:
            u, d = _below(below, i - delta - b0 + 0.5), 1 - _below(below, i + delta - b0 + 0.5)
            up, down = up + mass * u, down + mass * d
            up2_a, down2_a = up2_a + mass * u * u, down2_a + mass * d * d
            mean_a, square_a = mean_a + mass * i, square_a + mass * i * i
    below = np.zeros(a1 - a0 + 2)
    for j in range(a1 - a0 + 1):
        below[j + 1] = below[j] + a[a0 + j]
    for k in range(b0, b1 + 1):
        mass = b[k]
        if mass != 0:
            u, d = 1 - _below(below, k + delta - a0 + 0.5), _below(below, k - delta - a0 + 0.5)
            up2_b, down2_b = up2_b + mass * u * u, down2_b + mass * d * d
            mean_b, square_b = mean_b + mass * k, square_b + mass * k * k
    weight = share * share
    out[7] += weight * (max(up2_a - up * up, 0.0) / n_a + max(up2_b - up * up, 0.0) / n_b)
    out[8] += weight * (max(down2_a - down * down, 0.0) / n_a + max(down2_b - down * down, 0.0) / n_b)
    out[9] += weight * (max(square_a - mean_a**2, 0.0) / n_a + max(square_b - mean_b**2, 0.0) / n_b)
    return up, down


@fast
def _below(cumulative, edge):
    """Mass below ``edge``, in bins from the first one's lower edge; that of a bin lies evenly over its width."""
    if edge <= 0:
        return 0.0
    if edge >= len(cumulative) - 1:
        return 1.0
    k = int(edge)
    return cumulative[k] + (edge - k) * (cumulative[k + 1] - cumulative[k])


@kernel
def _moments(difference, lowest, highest, zero, added, out):
    mean = 0.0
    for j in range(lowest, highest + 1):
        mean += difference[j] * (j - zero)
    variance = 0.0
    for j in range(lowest, highest + 1):
        variance += difference[j] * (j - zero - mean) ** 2
    out[2] = mean
    out[3] = max(variance - added, 0.0)


@kernel
def _quantile(histogram, lowest, highest, q):
    """Quantile in bins; the mass of a bin lies evenly over its width, half to either side of its centre."""
    below = 0.0
    for j in range(lowest, highest + 1):
        if below + histogram[j] >= q:
            return j - 0.5 + (q - below) / histogram[j]
        below += histogram[j]
    return highest + 0.5
