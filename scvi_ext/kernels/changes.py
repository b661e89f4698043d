"""Distributions of log fold changes between sets of draws, from histograms of the log scale (numba).

A histogram is a row of ``K`` bins, one for each 1 / ``PER_DOUBLING`` of a power of two. A draw between two bin centres
is split over both in proportion, so that its mean is kept. All pairs of a draw of one set with a draw of the other
count: the difference of two histograms is their cross-correlation.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from scvi_ext.kernels.compiler import fast, kernel, parallel, widest_vectors
from scvi_ext.kernels.cpu import _log

PER_DOUBLING = 32
# Splitting a draw that is anywhere between two centres adds the mean of f (1 - f) to a variance, in bins squared.
SPLIT_VARIANCE = 1 / 6

_LANES = 16  # float32 numbers in the widest vectors

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
        of_set, row, weight = histograms[sets[b], first:stop], positions[b, first:stop], weights[b]
        for g in range(len(row)):
            k = np.int32(row[g])
            above = weight * (row[g] - np.float32(k))
            of_set[g, np.uint32(k)] += weight - above  # unsigned: an index that may count from the end costs time
            of_set[g, np.uint32(k + 1)] += above


@parallel
def locate(n_parts, scales, sums, sets, weights, lowest, n_bins):
    """Turn ``scales`` (B, G) into positions among bins from log2 = ``lowest`` on, in place.

    Before that they are added to ``sums`` (S, G), row b to set ``sets[b]``, by the weights (B,).
    """
    n_genes = scales.shape[1]
    for part in prange(n_parts):
        first, stop = part * n_genes // n_parts, (part + 1) * n_genes // n_parts
        _locate(scales, sums, sets, weights, lowest, n_bins, first, stop)


@kernel
def _locate(scales, sums, sets, weights, lowest, n_bins, first, stop):
    widest_vectors()
    smallest, offset = np.float32(2.0**lowest), np.float32(lowest * PER_DOUBLING)
    per_e_fold, last = np.float32(PER_DOUBLING / np.log(2)), np.float32(n_bins - 1.001)
    for b in range(scales.shape[0]):
        row, of_set, weight = scales[b, first:stop], sums[sets[b], first:stop], weights[b]
        for g in range(len(row)):
            of_set[g] += weight * row[g]
        for g in range(len(row)):
            row[g] = min(max(_log(max(row[g], smallest)) * per_e_fold - offset, np.float32(0)), last)


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
    # What is longer than there are bins stays zero: `_subtract` goes over whole vectors, and four bins of a at a time.
    a, b = np.zeros(n_bins + 4, np.float32), np.zeros(n_bins + 4, np.float32)
    difference = np.zeros(2 * n_bins + 3 + 2 * _LANES, np.float32)  # of j - n_bins bins
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
                _subtract(difference[n_bins - b1 :], np.float32(share), a, a0, a1, b[b0 : b1 + 1][::-1])
                n_a, n_b = _effective(left[c], draws[batch]), _effective(right[c], draws[batch])
                up, down = _tails(a, a0, a1, b, b0, b1, delta[c], n_a, n_b, share, out)
                out[0] += share * up
                out[1] += share * down
                a[a0 : a1 + 1] = 0
                b[b0 : b1 + 1] = 0
            for i in range(2):  # float32 masses add up to 1 within their roundings
                out[i] = min(max(out[i], 0.0), 1.0)
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
            into, filled = mixed[ends[s, 0] : ends[s, 1] + 1], histogram[ends[s, 0] : ends[s, 1] + 1]
            for k in range(len(filled)):
                into[k] += weight * filled[k]
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
def _subtract(difference, share, a, a0, a1, reversed_b):
    """Add all pairs of ``a`` and ``b`` to the bins of their difference, b in the order of falling bins.

    Four bins of ``a`` at a time, so that the difference is touched less often.
    """
    widest_vectors()
    n = (len(reversed_b) + 2) // _LANES * _LANES + _LANES
    padded = np.zeros(n + 3, np.float32)
    padded[3 : 3 + len(reversed_b)] = reversed_b
    b_0, b_1, b_2, b_3 = padded[3:], padded[2:], padded[1:], padded
    for i in range(a0, a1 + 1, 4):
        a_0, a_1, a_2, a_3 = share * a[i], share * a[i + 1], share * a[i + 2], share * a[i + 3]
        row = difference[i:]
        for k in range(n):
            row[k] += (a_0 * b_0[k] + a_1 * b_1[k]) + (a_2 * b_2[k] + a_3 * b_3[k])


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
    up, up2_a, down, down2_a, variance_a = _beyond(a, a0, a1, b, b0, b1, delta)
    _, down2_b, _, up2_b, variance_b = _beyond(b, b0, b1, a, a0, a1, delta)
    weight = share * share
    out[7] += weight * (max(up2_a - up * up, 0.0) / n_a + max(up2_b - up * up, 0.0) / n_b)
    out[8] += weight * (max(down2_a - down * down, 0.0) / n_a + max(down2_b - down * down, 0.0) / n_b)
    out[9] += weight * (variance_a / n_a + variance_b / n_b)
    return up, down


@fast
def _beyond(x, x0, x1, y, y0, y1, delta):
    """P(x - y >= delta) and P(x - y <= -delta), given x: mean and mean square over x of each, and the variance of x.

    The mass of a bin lies evenly over its width, so a border inside of it takes a share, the same one in every bin.
    """
    n = y1 - y0 + 3
    below = np.empty(n + 1)  # mass of y below the lower edge of bin y0 + j - 1
    below[0] = below[1] = 0
    for j in range(y1 - y0 + 1):
        below[j + 2] = below[j + 1] + y[y0 + j]
    below[n - 1] = below[n] = 1
    low, high = np.floor(0.5 - delta), np.floor(0.5 + delta)
    share_low, share_high = 0.5 - delta - low, 0.5 + delta - high
    up = up2 = down = down2 = mean = square = 0.0
    for i in range(x0, x1 + 1):
        mass = x[i]
        j = min(max(i - y0 + 1 + int(low), 0), n - 1)
        u = below[j] + share_low * (below[j + 1] - below[j])
        j = min(max(i - y0 + 1 + int(high), 0), n - 1)
        d = 1 - below[j] - share_high * (below[j + 1] - below[j])
        up, up2 = up + mass * u, up2 + mass * u * u
        down, down2 = down + mass * d, down2 + mass * d * d
        mean, square = mean + mass * i, square + mass * i * i
    return up, up2, down, down2, max(square - mean**2, 0.0)


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
