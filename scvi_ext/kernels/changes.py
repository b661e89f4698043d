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
_STRETCH = 64  # bins that are gone over as a whole: the fewest that leave nothing over where loops are unrolled

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
    split = spread + fractions * (1 - fractions)  # the move splits once more
    for part in prange(n_parts):
        first, stop = part * n_genes // n_parts, (part + 1) * n_genes // n_parts
        _changes(
            histograms, totals, shares, draws, left, right, slots, fractions, split, delta, tail, outputs, first, stop
        )


@kernel
def _changes(
    histograms, totals, shares, draws, left, right, slots, fractions, split, delta, tail, outputs, first, stop
):
    n_batches, n_sets, _, n_bins = histograms.shape
    of_gene = np.empty((n_batches, n_sets, n_bins + _STRETCH), np.float32)
    mixed_a, mixed_b = np.empty(n_bins + _STRETCH, np.float32), np.empty(n_bins + _STRETCH, np.float32)
    # What is longer than there are bins stays zero: `_subtract` goes over whole vectors, and four bins of a at a time.
    a, b = np.zeros(n_bins + 4, np.float32), np.zeros(n_bins + 4, np.float32)
    below_a, below_b = np.empty(n_bins + 2), np.empty(n_bins + 2)
    reversed_b = np.zeros(n_bins + 3 + 2 * _LANES, np.float32)
    difference = np.zeros(2 * n_bins + 3 + 2 * _LANES, np.float32)  # of j - n_bins bins
    weights_a, weights_b = left[:, None] / totals, right[:, None] / totals  # (C, D, S)
    n_a, n_b = _effective(left, draws), _effective(right, draws)
    for g in range(first, stop):
        start, n = _gather(histograms, g, of_gene)
        for c in range(len(left)):
            out = outputs[c, g]
            out[:] = 0
            lowest, highest = 2 * n_bins + 1, 0
            w0, w1 = slots[c, start], slots[c, start + n - 1] + 1
            for batch in range(n_batches):
                share = shares[batch]
                _mix(of_gene[batch], n, weights_a[c, batch], mixed_a)
                _mix(of_gene[batch], n, weights_b[c, batch], mixed_b)
                added = _move(mixed_a, mixed_b, n, slots[c, start:], fractions[c, start:], split[c, start:], a, b)
                (a0, a1), (b0, b1) = _ends(a, w0, w1), _ends(b, w0, w1)
                mean, variance_a, variance_b = _cumulate(a, b, w0, w1, below_a, below_b)
                below_a[a1 + 1] = below_b[b1 + 1] = 1
                lowest, highest = min(lowest, a0 - b1 + n_bins), max(highest, a1 - b0 + n_bins)
                _subtract(difference[n_bins - b1 :], np.float32(share), a, a0, a1, b, b0, b1, reversed_b)
                draws_of = n_a[c, batch], n_b[c, batch]
                _tails(a, a0, a1, below_a, b, b0, b1, below_b, delta[c], draws_of, share, out)
                out[2] += share * mean
                out[3] += share * (variance_a + variance_b - added + mean**2)
                out[9] += share**2 * (variance_a / draws_of[0] + variance_b / draws_of[1])
                for i in range(w0, w1 + 1):
                    a[i] = b[i] = 0
            for i in range(2):  # float32 masses add up to 1 within their roundings
                out[i] = min(max(out[i], 0.0), 1.0)
            out[3] = max(out[3] - out[2] ** 2, 0.0)
            _quantiles(difference, lowest, highest, tail, n_bins, out)
            for i in range(lowest, highest + 1):
                difference[i] = 0


@kernel
def _effective(shares, draws):
    """Draws that mixtures of sets are worth, (C, D): a mean over one has the variance of one over so many."""
    per_draw = np.zeros((len(shares), len(draws)))
    for c in range(len(shares)):
        for batch in range(len(draws)):
            for s in range(draws.shape[1]):
                if shares[c, s] != 0:
                    per_draw[c, batch] += shares[c, s] ** 2 / draws[batch, s]
    return 1 / per_draw


@kernel
def _gather(histograms, g, of_gene):
    """Copy the bins of a gene that have mass in any set: which is the first of them, and how many they are.

    Zeros follow, up to whole stretches.
    """
    n_batches, n_sets, _, n_bins = histograms.shape
    lowest, highest = n_bins - 1, 0
    for batch in range(n_batches):
        for s in range(n_sets):
            first, last = _filled(histograms[batch, s, g])
            if histograms[batch, s, g, first] != 0:  # a set may have no draws
                lowest, highest = min(lowest, first), max(highest, last)
    lowest = min(lowest, highest)
    n = highest + 1 - lowest
    for batch in range(n_batches):
        for s in range(n_sets):
            of_gene[batch, s, :n] = histograms[batch, s, g, lowest : highest + 1]
            of_gene[batch, s, n : _whole(n)] = 0
    return lowest, n


@kernel
def _filled(histogram):
    """The first and the last bin with mass; what is empty is passed by in stretches."""
    widest_vectors()
    bits = histogram.view(
        np.uint32
    )  # zero where the number is: unlike sums of numbers, these may be found in any order
    lowest, highest = 0, len(bits) - 1
    while lowest + _STRETCH <= highest and _any(bits[lowest : lowest + _STRETCH]) == 0:
        lowest += _STRETCH
    while highest - _STRETCH >= lowest and _any(bits[highest + 1 - _STRETCH : highest + 1]) == 0:
        highest -= _STRETCH
    return _ends(bits, lowest, highest)


@fast
def _any(bits):
    found = np.uint32(0)
    for k in range(len(bits)):
        found |= bits[k]
    return found


@fast
def _ends(histogram, lowest, highest):
    """The first and the last bin with mass between two bins."""
    while lowest < highest and histogram[lowest] == 0:
        lowest += 1
    while highest > lowest and histogram[highest] == 0:
        highest -= 1
    return lowest, highest


@fast
def _whole(n):
    return (n + _STRETCH - 1) // _STRETCH * _STRETCH


@kernel
def _mix(of_gene, n, weights, mixed):
    """The mixture of ``n`` bins of histograms (S, K)."""
    widest_vectors()
    whole = _whole(n)
    for k in range(whole):
        mixed[k] = 0
    for s in range(len(weights)):
        if weights[s] != 0:
            weight, histogram = np.float32(weights[s]), of_gene[s]
            for k in range(whole):
                mixed[k] += weight * histogram[k]


@fast
def _move(mixed_a, mixed_b, n, slots, fractions, split, a, b):
    """Add the pseudocount: ``n`` bins to where it moves them, in ``a`` and ``b``. Returns what splitting adds to both.

    Both sides at once, here and in `_cumulate`: while one sum waits for its last addition, the other goes on.
    """
    added = 0.0
    for k in range(n):
        slot, fraction, mass_a, mass_b = slots[k], fractions[k], mixed_a[k], mixed_b[k]
        above_a, above_b = mass_a * fraction, mass_b * fraction
        a[slot] += mass_a - above_a
        b[slot] += mass_b - above_b
        a[slot + 1] += above_a
        b[slot + 1] += above_b
        added += (mass_a + mass_b) * split[k]
    return added


@fast
def _cumulate(a, b, w0, w1, below_a, below_b):
    """Mass below the lower edge of each bin from w0 to w1. Returns the difference of the means, and the variances."""
    total_a = total_b = first_a = first_b = second_a = second_b = 0.0
    for i in range(w0, w1 + 1):
        below_a[i], below_b[i] = total_a, total_b
        k, mass_a, mass_b = float(i - w0), float(a[i]), float(b[i])
        total_a, total_b = total_a + mass_a, total_b + mass_b
        first_a, first_b = first_a + mass_a * k, first_b + mass_b * k
        second_a, second_b = second_a + mass_a * k * k, second_b + mass_b * k * k
    mean_a, mean_b = first_a / total_a, first_b / total_b
    variance_a, variance_b = second_a / total_a - mean_a**2, second_b / total_b - mean_b**2
    return mean_a - mean_b, max(variance_a, 0.0), max(variance_b, 0.0)


@kernel
def _subtract(difference, share, a, a0, a1, b, b0, b1, reversed_b):
    """Add all pairs of ``a`` and ``b`` to the bins of their difference, from that of the last bin of ``b`` on.

    Four bins of ``a`` at a time, so that the difference is touched less often.
    """
    widest_vectors()
    n_b = b1 + 1 - b0
    n = (n_b + 2) // _LANES * _LANES + _LANES
    for k in range(n_b):
        reversed_b[3 + k] = b[b1 - k]
    for k in range(3 + n_b, 3 + n):
        reversed_b[k] = 0
    b_0, b_1, b_2, b_3 = reversed_b[3:], reversed_b[2:], reversed_b[1:], reversed_b
    for i in range(a0, a1 + 1, 4):
        a_0, a_1, a_2, a_3 = share * a[i], share * a[i + 1], share * a[i + 2], share * a[i + 3]
        row = difference[i:]
        for k in range(n):
            row[k] += (a_0 * b_0[k] + a_1 * b_1[k]) + (a_2 * b_2[k] + a_3 * b_3[k])


@kernel
def _tails(a, a0, a1, below_a, b, b0, b1, below_b, delta, draws, share, out):
    """Add P(a - b >= delta) and P(a - b <= -delta) to ``out``, and the Monte-Carlo variances of both.

    The variance of a mean over all pairs is that of its conditional means, given one or the other member (Hoeffding).
    """
    up, up2_a = _beyond(a, a0, a1, below_a, b, b0, b1, below_b, delta, True)
    down, down2_a = _beyond(a, a0, a1, below_a, b, b0, b1, below_b, delta, False)
    _, down2_b = _beyond(b, b0, b1, below_b, a, a0, a1, below_a, delta, True)
    _, up2_b = _beyond(b, b0, b1, below_b, a, a0, a1, below_a, delta, False)
    out[0] += share * up
    out[1] += share * down
    out[7] += share**2 * (max(up2_a - up * up, 0.0) / draws[0] + max(up2_b - up * up, 0.0) / draws[1])
    out[8] += share**2 * (max(down2_a - down * down, 0.0) / draws[0] + max(down2_b - down * down, 0.0) / draws[1])


@fast
def _beyond(x, x0, x1, below_x, y, y0, y1, below_y, delta, above):
    """P(x - y >= delta), or if not ``above`` P(x - y <= -delta), given x: mean and mean square over x.

    The mass of a bin lies evenly over its width, so a border inside of it takes a share, the same one in every bin.
    """
    border = 0.5 - delta if above else 0.5 + delta
    shift = int(np.floor(border))
    first = min(max(y0 - shift, x0), x1 + 1)  # with the border among the bins of y, up to stop
    stop = max(min(y1 + 1 - shift, x1 + 1), first)
    certain, sign = (1 - below_x[stop], 1.0) if above else (below_x[first], -1.0)
    share, base = sign * (border - shift), 0.0 if above else 1.0
    mean = square = certain
    for i in range(first, stop):
        p = base + sign * below_y[i + shift] + share * y[i + shift]
        mean += x[i] * p
        square += x[i] * p * p
    return mean, square


@kernel
def _quantiles(histogram, lowest, highest, tail, zero, out):
    """Quantiles in bins; the mass of a bin lies evenly over its width, half to either side of its centre."""
    below, j = 0.0, lowest
    for place, q in ((5, tail), (4, 0.5), (6, 1 - tail)):
        while j <= highest and below + histogram[j] < q:
            below += histogram[j]
            j += 1
        edge = j - 0.5
        out[place] = (edge + (q - below) / histogram[j] if j <= highest else edge) - zero
