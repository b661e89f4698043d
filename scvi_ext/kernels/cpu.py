"""Count likelihoods on the processor (numba).

Each likelihood goes once over the genes of a cell and writes its log-probability and every gradient. For most entries
the count is zero, so the formula for zero is applied to all genes in a loop without branches, which vectorises, and
the few others are put right afterwards: small whole counts by products, the rest in float64 with Stirling's series.

Written out with r = mu / (theta + eps), q = 1 / (1 + r), t = theta log1p(r):

    log NB(0) = -t
    log NB(x) = Q - lgamma(x + 1) + x log(mu + eps) - x log1p(r) - t
    Q         = lgamma(x + theta) - lgamma(theta) - x log(theta + eps)  = sum_{j<x} log((theta + j) / (theta + eps))

where nothing large cancels, neither for theta = 1e6 (Poisson) nor for theta = 1e-4.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import prange

from scvi_ext.kernels.compiler import arrays, fast, in_parallel, kernel, parallel, widest_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_ext.kernels.sparse import SparseRows

    Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

f4, i4 = np.float32, np.int32
_ZERO, _HALF, _ONE = f4(0), f4(0.5), f4(1)
_EPS = f4(1e-8)  # inside the logarithms, as in functional.counts


# ---- elementary functions that vectorise --------------------------------------------------------------------------


@fast
def _exp(x):
    """exp(x) in float32; 0 < result < inf always."""
    x = min(max(x, f4(-87.0)), f4(88.0))
    k = np.floor(x * f4(1.44269504) + _HALF)
    r = x - k * f4(0.693359375) + k * f4(2.12194440e-4)
    p = f4(1.9875691500e-4)
    p = p * r + f4(1.3981999507e-3)
    p = p * r + f4(8.3334519073e-3)
    p = p * r + f4(4.1665795894e-2)
    p = p * r + f4(1.6666665459e-1)
    p = p * r + f4(5.0000001201e-1)
    p = p * r * r + r + _ONE
    return p * i4((i4(k) + i4(127)) << i4(23)).view(f4)


@fast
def _log_series(f):
    """(log(1 + f) - f) / f^2 for sqrt(1/2) <= 1 + f <= sqrt(2)."""
    p = f4(7.0376836292e-2)
    p = p * f + f4(-1.1514610310e-1)
    p = p * f + f4(1.1676998740e-1)
    p = p * f + f4(-1.2420140846e-1)
    p = p * f + f4(1.4249322787e-1)
    p = p * f + f4(-1.6668057665e-1)
    p = p * f + f4(2.0000714765e-1)
    p = p * f + f4(-2.4999993993e-1)
    p = p * f + f4(3.3333331174e-1)
    return p * f - _HALF


@fast
def _exponent(w):
    """k with sqrt(1/2) <= w / 2^k < sqrt(2), as int32."""
    return (f4(w).view(i4) - i4(0x3F3504F3)) >> i4(23)


@fast
def _log(w):
    """log(w) in float32 for a positive normal number."""
    k = _exponent(w)
    f = i4(f4(w).view(i4) - (k << i4(23))).view(f4) - _ONE
    return f + f * f * _log_series(f) + f4(k) * f4(-2.12194440e-4) + f4(k) * f4(0.693359375)


@fast
def _log1p(r):
    """log(1 + r) in float32 for r >= 0, accurate for tiny r too."""
    w = _ONE + r
    k = _exponent(w)
    m = i4(f4(w).view(i4) - (k << i4(23))).view(f4) - _ONE
    f = r if k == i4(0) else m
    return f + f * f * _log_series(f) + f4(k) * f4(-2.12194440e-4) + f4(k) * f4(0.693359375)


# ---- what every likelihood needs ----------------------------------------------------------------------------------


@fast
def _new(n):
    return np.empty(n, f4)


@fast
def _is_finite(row):
    """Whether every entry of a float32 row is finite; in integers, whose disjunction vectorises."""
    bad = i4(0)
    bits = row.view(i4)
    for g in range(row.size):
        bad |= i4((bits[g] & i4(0x7F800000)) == i4(0x7F800000))
    return bad == i4(0)


@fast
def _are_counts(values):
    """Whether every entry is finite and not negative."""
    bad = i4(0)
    bits = values.view(i4)
    for e in range(values.size):
        bad |= i4((bits[e] & i4(0x7F800000)) == i4(0x7F800000)) | i4(bits[e] < i4(0) and bits[e] != i4(-0x80000000))
    return bad == i4(0)


@fast
def _largest(row):
    """The largest entry of a float32 row; in integers of the same order, whose maximum vectorises."""
    bits, largest = row.view(i4), i4(-0x7FFFFFFF)
    for g in range(row.size):
        largest = max(largest, bits[g] ^ ((bits[g] >> i4(31)) & i4(0x7FFFFFFF)))
    return i4(largest ^ ((largest >> i4(31)) & i4(0x7FFFFFFF))).view(f4)


@fast
def _rate(logits, library, softmax, rate, lanes):
    """Write the mean of every gene: the library times the softmax, or the softplus, of the logits."""
    if softmax:
        top = _largest(logits)
        for g in range(logits.size):
            rate[g] = _exp(logits[g] - top)
        library /= _sum(rate, lanes)
        for g in range(logits.size):
            rate[g] *= library
    else:
        for g in range(logits.size):
            rate[g] = library * (max(logits[g], _ZERO) + _log1p(_exp(-abs(logits[g]))))


@fast
def _sum(row, lanes):
    """Sum of a float32 row in 64 lanes, which vectorise, and whose order does not depend on the compiler."""
    lanes[:] = _ZERO
    whole = row.size - row.size % 64
    for start in range(0, whole, 64):
        for lane in range(64):
            lanes[lane] += row[start + lane]
    total = _ZERO
    for lane in range(64):
        total += lanes[lane]
    for g in range(whole, row.size):
        total += row[g]
    return total


@fast
def _through_activation(logits, library, softmax, rate, d, weight, d_logits, lanes):
    """From d, by the log of the rate, to the gradient by the logits; return the one by the log library."""
    total = _sum(d, lanes)
    if softmax:
        share = total / library
        for g in range(d.size):
            d_logits[g] = weight * (d[g] - share * rate[g])
    else:
        for g in range(d.size):
            d_logits[g] = weight * d[g] * library / (rate[g] * (_ONE + _exp(-logits[g])))
    return weight * total


# ---- negative binomial at counts above zero -----------------------------------------------------------------------


@fast
def _log64(w, low):
    """log(w + low) in float64 for w >= 1/2 or low = 0, where low is what w lost in rounding 1 + low."""
    bits = np.float64(w).view(np.int64)
    k = (bits - np.int64(0x3FE6A09E667F3BCD)) >> np.int64(52)
    f = np.int64(bits - (k << np.int64(52))).view(np.float64) - 1.0
    if k == 0 and low != 0.0:
        f = low
    s = f / (2.0 + f)
    z = s * s
    p = 1.479819860511658591e-1
    p = p * z + 1.531383769920937332e-1
    p = p * z + 1.818357216161805012e-1
    p = p * z + 2.222219843214978396e-1
    p = p * z + 2.857142874366239149e-1
    p = p * z + 3.999999999940941908e-1
    p = p * z + 6.666666666666735130e-1
    half = 0.5 * f * f
    return f - (half - s * (half + p * z)) + np.float64(k) * 0.6931471805599453


@fast
def _gammas(xk, th):
    """log of Gamma(x + theta) / (Gamma(theta) x! (theta + eps)^x), and digamma(x + theta) - digamma(theta), for x >= 0.

    Eight factors are split off each gamma function, Stirling's series does the rest.
    """
    iv = 1.0 / (th + 1e-8)
    above, below, factorial, digammas = 1.0, 1.0, 1.0, 0.0
    for j in range(8):
        above *= th + j
        below *= xk + th + j
        factorial *= xk + 1.0 + j
        digammas += xk / ((th + j) * (xk + th + j))
    a, b, c = th + 8.0, xk + th + 8.0, xk + 9.0
    ia, ib, ic = 1.0 / a, 1.0 / b, 1.0 / c
    ia2, ib2, ic2 = ia * ia, ib * ib, ic * ic
    ratio = _log64(1.0 + xk * ia, xk * ia)
    q = _log64(above / below, 0.0) + (b - 0.5) * ratio - xk + xk * _log64(a * iv, 0.0)
    q += ib * (1 / 12 - ib2 * (1 / 360 - ib2 * (1 / 1260 - ib2 * (1 / 1680))))
    q -= ia * (1 / 12 - ia2 * (1 / 360 - ia2 * (1 / 1260 - ia2 * (1 / 1680))))
    digammas += ratio + 0.5 * (ia - ib)
    digammas += ia2 * (1 / 12 - ia2 * (1 / 120 - ia2 * (1 / 252)))
    digammas -= ib2 * (1 / 12 - ib2 * (1 / 120 - ib2 * (1 / 252)))
    log_factorial = (c - 0.5) * _log64(c, 0.0) - c + 0.9189385332046727 - _log64(factorial, 0.0)
    log_factorial += ic * (1 / 12 - ic2 * (1 / 360 - ic2 * (1 / 1260 - ic2 * (1 / 1680))))
    return q - log_factorial, digammas


@fast
def _of_gammas(q, digammas, xk, th, m):
    """From these and the mean: log NB(x) and its derivatives by log mu and log theta."""
    iv = 1.0 / (th + 1e-8)
    r = m * iv
    odds = 1.0 / (1.0 + r)
    log_r = _log64(1.0 + r, r)
    ll = q + xk * (_log64(m + 1e-8, 0.0) - log_r) - th * log_r
    d = xk * m / (m + 1e-8) - (xk + th) * r * odds
    return ll, d, th * (digammas - log_r + (xk + th) * r * odds * iv - xk * iv)


@fast
def _of_large_counts(begin, end, x, mu, theta, ll, d, d_theta):
    """For any x > 0, in float64."""
    for k in range(begin, end):
        xk, th = np.float64(x[k]), np.float64(theta[k])
        q, digammas = _gammas(xk, th)
        ll[k], d[k], d_theta[k] = _of_gammas(q, digammas, xk, th, np.float64(mu[k]))


@fast
def _of_small_counts(n, x, mu, theta, inverse, ll, d, d_theta):
    """For x in 1, ..., 8: the gamma functions are products and the digamma functions sums of x terms."""
    for k in range(n):
        xk, th, iv, m = x[k], theta[k], inverse[k], mu[k]
        low, high, s = th * iv, _ONE, _ZERO  # two products, so that none overflows for theta near 0
        for j in range(1, 4):
            jf = f4(j)
            inside = jf < xk
            low *= (th + jf) * iv / (jf + _ONE) if inside else _ONE
            s += jf / (th + jf) if inside else _ZERO
        for j in range(4, 8):
            jf = f4(j)
            inside = jf < xk
            high *= (th + jf) * iv / (jf + _ONE) if inside else _ONE
            s += jf / (th + jf) if inside else _ZERO
        r = m * iv
        q = _ONE / (_ONE + r)
        t = th * _log1p(r)
        ll[k] = _log(low) + _log(high) + xk * _log((m + _EPS) * q) - t
        d[k] = xk * m / (m + _EPS) - (xk + th) * r * q
        d_theta[k] = xk * q * (r + _EPS * iv) - s - th * _excess(r, q, iv)


@fast
def _excess(r, q, inverse):
    """log1p(r) - r q theta / (theta + eps), without cancellation for small and for large r."""
    w = _ONE + r
    k = _exponent(w)
    m = i4(f4(w).view(i4) - (k << i4(23))).view(f4) - _ONE
    f = r if k == i4(0) else m
    series = f * f * _log_series(f)
    small = r * q * (r + _EPS * inverse)
    large = f + f4(k) * f4(0.6931472) - r * q * (_ONE - _EPS * inverse)
    return series + (small if k == i4(0) else large)


# ---- the likelihoods ----------------------------------------------------------------------------------------------


@fast
def _theta_of(log_theta, theta, inverse):
    for g in range(log_theta.size):
        th = _exp(log_theta[g])
        theta[g] = th
        inverse[g] = _ONE / (th + _EPS)


@fast
def _nb_of_zeros(n, mu, theta, inverse, ll, d, d_theta):
    """Log-probability of a zero and its derivatives by log mu and log theta."""
    for g in range(n):
        th, iv = theta[g], inverse[g]
        r = mu[g] * iv
        q = _ONE / (_ONE + r)
        ll[g] = -th * _log1p(r)
        d[g] = -th * r * q
        d_theta[g] = -th * _excess(r, q, iv)


@fast
def _inflate_zeros(n, logits, ll, d, d_theta, d_dropout, ratio):
    """Turn these into those of a zero-inflated distribution, and write the derivative by the logit of a dropout."""
    for g in range(n):
        p, log_nb = logits[g], ll[g]
        u = p - log_nb
        e1, e2 = _exp(-abs(u)), _exp(-abs(p))
        w1, w2 = _ONE + e1, _ONE + e2
        inverse = _ONE / (w1 * w2)  # one division for two
        i1, i2 = w2 * inverse, w1 * inverse
        sampled = i1 * (e1 if u > _ZERO else _ONE)  # P(a zero is of the negative binomial)
        not_inflated = i2 * (e2 if p > _ZERO else _ONE)
        ratio[g] = w1 * i2
        d[g] *= sampled
        d_theta[g] *= sampled
        d_dropout[g] = not_inflated - sampled
    for g in range(n):  # by itself, because a loop with three of these functions is slow
        ll[g] = max(logits[g], ll[g]) - max(logits[g], _ZERO) + _log(ratio[g])


@fast
def _is_small(x):
    return x <= f4(8) and x == np.floor(x)


@fast
def _split(begin, end, genes, values, where, x):
    """List the counts above zero of a cell, small whole ones first; return how many are small, and how many in all."""
    n_small, n = 0, 0
    for e in range(begin, end):
        n_small += _is_small(values[e]) and values[e] > _ZERO
        n += values[e] > _ZERO
    small, large = 0, n_small
    for e in range(begin, end):
        if values[e] > _ZERO:
            if _is_small(values[e]):
                x[small], where[small] = values[e], genes[e]
                small += 1
            else:
                x[large], where[large] = values[e], genes[e]
                large += 1
    return n_small, n


@kernel
def _negative_binomial(
    begin, end, indptr, genes, values, logits, log_library, softmax, log_theta, dropout, weight,
    ll, d_logits, d_library, d_theta, d_dropout, summed,
):  # fmt: skip
    """(Zero-inflated, where ``dropout`` is given) negative binomial for the rows from ``begin`` to ``end``.

    ``d_theta`` has a row for each of all rows, or one for the sum over these.
    """
    widest_vectors()
    n_genes, n_cells = logits.shape[1], indptr.size - 1
    rate, theta, inverse, library, lanes = _new(n_genes), _new(n_genes), _new(n_genes), _new(1), _new(64)
    log_zero, d, d_theta_i, d_p = _new(n_genes), _new(n_genes), _new(n_genes), _new(n_genes)
    # Of the counts above zero: which genes they are of, and the same for them alone.
    where, x, mu, th, iv = np.empty(n_genes, np.int32), _new(n_genes), _new(n_genes), _new(n_genes), _new(n_genes)
    log_nb, d_mu, d_th, p = _new(n_genes), _new(n_genes), _new(n_genes), _new(n_genes)
    wanted, shared = d_logits.shape[0] > 0, log_theta.shape[0] == 1
    if summed:
        d_theta[0] = _ZERO
    if shared:
        _theta_of(log_theta[0], theta, inverse)
    for i in range(begin, end):
        c = i % n_cells
        library[0] = np.exp(np.float64(log_library[i]))
        log_theta_i = log_theta[0 if shared else i]
        finite = _are_counts(values[indptr[c] : indptr[c + 1]]) and _is_finite(logits[i]) and _is_finite(log_theta_i)
        finite = finite and _is_finite(log_library[i : i + 1]) and _is_finite(library)
        if dropout is not None:
            finite = finite and _is_finite(dropout[i])
        if not finite:
            ll[i] = np.nan
            if wanted:
                d_logits[i], d_library[i], d_theta[0 if summed else i] = np.nan, np.nan, np.nan
                if dropout is not None:
                    d_dropout[i] = np.nan
            continue

        _rate(logits[i], library[0], softmax, rate, lanes)
        if not shared:
            _theta_of(log_theta_i, theta, inverse)
        _nb_of_zeros(n_genes, rate, theta, inverse, log_zero, d, d_theta_i)
        if dropout is not None:
            _inflate_zeros(n_genes, dropout[i], log_zero, d, d_theta_i, d_p, log_nb)

        n_small, n = _split(indptr[c], indptr[c + 1], genes, values, where, x)
        for k in range(n):
            g = where[k]
            mu[k], th[k], iv[k] = rate[g], theta[g], inverse[g]
            log_zero[g] = _ZERO  # not taken off the sum later, which would leave its rounding there
        total = np.float64(_sum(log_zero, lanes))
        _of_small_counts(n_small, x, mu, th, iv, log_nb, d_mu, d_th)
        _of_large_counts(n_small, n, x, mu, th, log_nb, d_mu, d_th)
        for k in range(n):
            g = where[k]
            total += log_nb[k]
            d[g], d_theta_i[g] = d_mu[k], d_th[k]
        if dropout is not None:
            for k in range(n):
                p[k] = dropout[i, where[k]]
            for k in range(n):
                e = _exp(-abs(p[k]))
                x[k] = max(p[k], _ZERO) + _log(_ONE + e)  # -log P(not inflated)
                p[k] = -(_ONE if p[k] > _ZERO else e) / (_ONE + e)
            for k in range(n):
                total -= x[k]
                d_p[where[k]] = p[k]
            if wanted:
                for g in range(n_genes):
                    d_dropout[i, g] = weight * d_p[g]
        ll[i] = total
        if wanted:
            if summed:
                total_theta = d_theta[0]
                for g in range(n_genes):
                    total_theta[g] += weight * d_theta_i[g]
            else:
                for g in range(n_genes):
                    d_theta[i, g] = weight * d_theta_i[g]
            d_library[i] = _through_activation(logits[i], library[0], softmax, rate, d, weight, d_logits[i], lanes)


@kernel
def _poisson(
    begin, end, indptr, genes, values, logits, log_library, softmax, weight, ll, d_logits, d_library
):  # fmt: skip
    """Poisson distribution for the rows from ``begin`` to ``end``."""
    widest_vectors()
    n_genes, n_cells = logits.shape[1], indptr.size - 1
    rate, d, library, lanes = _new(n_genes), _new(n_genes), _new(1), _new(64)
    wanted = d_logits.shape[0] > 0
    for i in range(begin, end):
        c = i % n_cells
        library[0] = np.exp(np.float64(log_library[i]))
        finite = _are_counts(values[indptr[c] : indptr[c + 1]]) and _is_finite(logits[i])
        if not (finite and _is_finite(log_library[i : i + 1]) and _is_finite(library)):
            ll[i] = np.nan
            if wanted:
                d_logits[i], d_library[i] = np.nan, np.nan
            continue
        _rate(logits[i], library[0], softmax, rate, lanes)
        for g in range(n_genes):
            d[g] = -rate[g]
        total = np.float64(_sum(d, lanes))
        for e in range(indptr[c], indptr[c + 1]):
            x, mu = np.float64(values[e]), np.float64(rate[genes[e]])
            if x > 0.0:
                total += x * math.log(mu + 1e-8) - math.lgamma(x + 1.0)
                d[genes[e]] += x * mu / (mu + 1e-8)
        ll[i] = total
        if wanted:
            d_library[i] = _through_activation(logits[i], library[0], softmax, rate, d, weight, d_logits[i], lanes)


# ---- all threads --------------------------------------------------------------------------------------------------


@parallel
def _negative_binomial_parallel(
    parts, indptr, genes, values, logits, log_library, softmax, log_theta, dropout, weight,
    ll, d_logits, d_library, d_theta, d_dropout, summed,
):  # fmt: skip
    n = logits.shape[0]
    for part in prange(parts):
        own = d_theta[part : part + 1] if summed else d_theta
        _negative_binomial(
            part * n // parts, (part + 1) * n // parts, indptr, genes, values, logits, log_library, softmax, log_theta,
            dropout, weight, ll, d_logits, d_library, own, d_dropout, summed,
        )  # fmt: skip


@parallel
def _poisson_parallel(
    parts, indptr, genes, values, logits, log_library, softmax, weight, ll, d_logits, d_library
):  # fmt: skip
    n = logits.shape[0]
    for part in prange(parts):
        _poisson(
            part * n // parts, (part + 1) * n // parts, indptr, genes, values, logits, log_library, softmax, weight,
            ll, d_logits, d_library,
        )  # fmt: skip


# ---- the public functions: torch tensors in, torch tensors out -----------------------------------------------------


@fast
def _exp64(x):
    """exp(x) in float64 for |x| < 700; beyond, as if it were there."""
    x = min(max(x, -700.0), 700.0)
    k = np.floor(x * 1.4426950408889634 + 0.5)
    r = x - k * 6.93145751953125e-1 - k * 1.42860682030941723212e-6
    p = 1.0 / 479001600
    for n in (39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0):
        p = p * r + 1.0 / n
    return p * np.int64((np.int64(k) + np.int64(1023)) << np.int64(52)).view(np.float64)


@kernel
def _nb_mixture(begin, end, y, measured, log_background, log_ratio, log_theta, mixing, weight, ll, gradients):
    """Mixture of two negative binomials for the rows from ``begin`` to ``end``, in float64: proteins are few."""
    widest_vectors()
    n = y.shape[1]
    shared, wanted = log_theta.shape[0] == 1, gradients.shape[1] > 0
    of_cell, made = np.empty(n), np.empty((4, n))
    for i in range(begin, end):
        log_theta_i = log_theta[0 if shared else i]
        for t in range(n):
            x, th = np.float64(y[i, t]), _exp64(np.float64(log_theta_i[t]))
            back, p = _exp64(np.float64(log_background[i, t])), np.float64(mixing[i, t])
            fore = back * _exp64(np.float64(log_ratio[i, t]))
            q, digammas = _gammas(x, th)
            ll_back, d_back, dt_back = _of_gammas(q, digammas, x, th, back)
            ll_fore, d_fore, dt_fore = _of_gammas(q, digammas, x, th, fore)
            u = ll_back - ll_fore + p  # log odds of background, given the count
            e, e_p = _exp64(-abs(u)), _exp64(-abs(p))
            is_back, is_fore = (1.0 if u > 0 else e) / (1 + e), (e if u > 0 else 1.0) / (1 + e)
            of_cell[t] = max(ll_back, ll_fore - p) - max(-p, 0.0) + _log64((1 + e) / (1 + e_p), 0.0)
            made[0, t] = is_back * d_back + is_fore * d_fore
            made[1, t] = is_fore * d_fore
            made[2, t] = is_back * dt_back + is_fore * dt_fore
            made[3, t] = is_back - (1.0 if p > 0 else e_p) / (1 + e_p)
        total = 0.0
        for t in range(n):
            if measured[i, t]:
                # What is not finite must show, and the bits above would hide it.
                total += 0.0 * (log_theta_i[t] + log_background[i, t] + log_ratio[i, t] + mixing[i, t] + y[i, t])
                total += of_cell[t] if y[i, t] >= 0 else np.nan
        ll[i] = total
        if wanted:
            for j in range(4):
                for t in range(n):
                    gradients[j, i, t] = weight * made[j, t] if measured[i, t] else 0.0


@parallel
def _nb_mixture_parallel(parts, y, measured, log_background, log_ratio, log_theta, mixing, weight, ll, gradients):
    n = ll.size
    for part in prange(parts):
        _nb_mixture(
            part * n // parts, (part + 1) * n // parts,
            y, measured, log_background, log_ratio, log_theta, mixing, weight, ll, gradients,
        )  # fmt: skip


def negative_binomial(
    x: SparseRows,
    softmax: bool,
    logits: Tensor,
    log_library: Tensor,
    log_theta: Tensor,
    dropout: Tensor | None,
    weight: float,
    gradients: bool,
    *,
    summed: bool = False,
) -> Gradients:
    """Log-probability of each row under a (zero-inflated) negative binomial, and ``weight`` times its gradients.

    The gradients are written over ``logits`` and ``dropout``. That by ``log_theta`` has a row for each row, or with
    ``summed`` a few, which add up to the sum over all.
    """
    n, n_genes = logits.shape
    ll = torch.empty(n)
    kept = n if gradients else 0
    d_library = torch.empty(kept)
    d_theta = torch.empty(torch.get_num_threads() if summed else kept, n_genes)
    # Over the outputs of the decoder, which nobody needs any more and which are in the cache.
    d_logits = logits.detach() if gradients else torch.empty(0, n_genes)
    d_dropout = dropout.detach() if gradients and dropout is not None else dropout
    in_parallel(
        _negative_binomial_parallel,
        *arrays(x.indptr, x.genes, x.values, logits, log_library),
        softmax,
        *arrays(log_theta.reshape(-1, n_genes), dropout),
        f4(weight),
        *arrays(ll, d_logits, d_library, d_theta, d_dropout),
        summed,
    )
    return ll, d_logits, d_library, d_theta, d_dropout


def poisson(
    x: SparseRows,
    softmax: bool,
    logits: Tensor,
    log_library: Tensor,
    log_theta: None,
    dropout: None,
    weight: float,
    gradients: bool,
    *,
    summed: bool = False,
) -> Gradients:
    """Log-probability of each row under a Poisson distribution, and ``weight`` times its gradients, over ``logits``."""
    n, n_genes = logits.shape
    ll = torch.empty(n)
    d_library = torch.empty(n)
    d_logits = logits.detach() if gradients else torch.empty(0, n_genes)
    in_parallel(
        _poisson_parallel,
        *arrays(x.indptr, x.genes, x.values, logits, log_library),
        softmax,
        f4(weight),
        *arrays(ll, d_logits, d_library),
    )
    return ll, d_logits, d_library, None, None


def nb_mixture(
    y: Tensor,
    measured: Tensor,
    log_background: Tensor,
    log_ratio: Tensor,
    log_theta: Tensor,
    mixing: Tensor,
    weight: float,
    gradients: bool,
) -> tuple[Tensor, ...]:
    """Log-probability of each row under a mixture of background and foreground, and ``weight`` times its gradients."""
    n, n_proteins = y.shape
    ll = torch.empty(n)
    made = torch.empty(4, n if gradients else 0, n_proteins)
    in_parallel(
        _nb_mixture_parallel,
        *arrays(y, measured, log_background, log_ratio, log_theta.reshape(-1, n_proteins), mixing),
        f4(weight),
        *arrays(ll, made),
    )
    return ll, *made


LIKELIHOODS = {
    "zinb": negative_binomial,
    "nb": negative_binomial,
    "poisson": poisson,
    "nb mixture": nb_mixture,
}
