"""Count likelihoods and the gathering of cells on a CUDA device (Triton).

One program takes one cell: it reads what the decoder said about its genes once, and writes the log-probability and
every gradient. All is float32, and nothing large cancels, for counts from 0 to 1e6 and theta from 1e-4 to 1e6: the
log-probability is written as its distance from the best possible one (Loader 2000), with the eps of
``functional.counts`` kept exactly. With mu' = mu + eps, theta' = theta + eps, s = theta' + mu, b = x + theta,
rho = b / s and phi(u) = (1 + u) log(1 + u) - u, which is u^2 / 2 near 0:

    log NB(0) = -theta log(1 + v)                                      (v is mu / theta' for x = 0)
    log NB(x) = -mu' rho phi(u) - theta' rho phi(v) + eps rho
                + delta(b) - delta(theta) - delta(x) - 1/2 log(2 pi x b / theta)
    u = x / (mu' rho) - 1 = theta (x - mu') / (b mu'),      v = theta / (theta' rho) - 1 = (mu theta / theta' - x) / b
    d log NB / d log mu    = mu theta (x - mu') / (mu' s)
    d log NB / d log theta = theta (rho v - log(1 + v)) + x / 2b + W(theta) - W(b) theta / b

where delta(z) = lgamma(z) - (z - 1/2) log z + z - 1/2 log 2 pi and W(z) = z (log z - digamma z) - 1/2 are what is left
of Stirling's formula; both vanish as 1 / 12z. There is no case of large and small counts, so the threads stay together.

References
----------
Loader (2000), Fast and accurate computation of binomial probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_EPS = tl.constexpr(1e-8)  # as in functional.counts
_HALF_LOG_2_PI = tl.constexpr(0.9189385332046727)
_LN2_HIGH = tl.constexpr(0.693359375)  # log 2 in two parts: k times the first is exact in float32
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)  # of the float32 sqrt(1/2)
_LOWEST = tl.constexpr(-87.0)  # exp of it is about the smallest normal float32

# Bounds of log theta: beyond them theta is 0 or infinite for every count, and products below would leave float32.
_LOG_THETA_MIN, _LOG_THETA_MAX = tl.constexpr(-30.0), tl.constexpr(30.0)

# Bound of the log mean of a protein, whose square must be in float32 too: 2e17, and no count is ever above 1e6.
_LOG_MEAN_MAX = tl.constexpr(40.0)

# Genes that a program holds at once and genes per thread: at 4 per thread everything stays in registers, and 2048
# genes are 16 warps, of which an SM holds at least two programs.
_MAX_BLOCK, _GENES_PER_WARP = 2048, 128


# ---- special functions --------------------------------------------------------------------------------------------


@triton.jit
def _log1p(u, p):
    """log(p) and the part of it beyond u, for p = 1 + u > 0; the second is for small u alone, as the third says."""
    bits = p.to(tl.int32, bitcast=True)
    k = (bits - _SQRT_HALF_BITS) >> 23  # sqrt(1/2) <= p / 2^k < sqrt(2)
    small = k == 0
    f = tl.where(small, u, (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0)
    s = 6.915584207e-2  # (log(1 + f) - f) / f^2, minimax polynomial: 7e-10 of log(1 + f)
    s = s * f - 1.178993359e-1
    s = s * f + 1.187293902e-1
    s = s * f - 1.238432080e-1
    s = s * f + 1.421865970e-1
    s = s * f - 1.666925251e-1
    s = s * f + 2.000222653e-1
    s = s * f - 2.499998659e-1
    s = s * f + 3.333331048e-1
    s = s * f - 0.5
    beyond = s * f * f
    exponent = k.to(tl.float32)
    return f + (beyond + exponent * _LN2_LOW) + exponent * _LN2_HIGH, beyond, small


@triton.jit
def _phi(u, p, log_p, beyond, small):
    """(1 + u) log(1 + u) - u, without cancellation for small u."""
    return tl.where(small, u * u + p * beyond, p * log_p - u)


@triton.jit
def _delta(t):
    """delta(1 / t) for t <= 1: minimax polynomial, 2e-9."""
    p = 1.292662782e-4
    p = p * t - 6.032678648e-4
    p = p * t + 1.009982894e-3
    p = p * t - 2.827919889e-5
    p = p * t - 2.780447248e-3
    p = p * t + 9.269468819e-7
    return (p * t + 8.333328366e-2) * t


@triton.jit
def _w(t):
    """W(1 / t) for t <= 1: minimax polynomial, 2e-9."""
    p = -3.515877179e-4
    p = p * t + 2.122015925e-3
    p = p * t - 5.290575791e-3
    p = p * t + 6.204722449e-3
    p = p * t - 5.334122106e-4
    p = p * t - 8.264954202e-3
    p = p * t - 3.935036602e-6
    return (p * t + 8.333339542e-2) * t


@triton.jit
def _step_down(z, t, delta, w):
    """delta(z) and W(z) from those at 1 / t, which is z + 1 where z < 1 and z itself elsewhere."""
    below = z < 1.0
    step = -tl.log(z * t)
    return tl.where(below, delta + (z + 0.5) * step - 1.0, delta), tl.where(below, z * (t * (w + 0.5) - step) + 0.5, w)


@triton.jit
def _at_least_one(z):
    return tl.where(z < 1.0, z + 1.0, z)


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


# ---- likelihoods of one count -------------------------------------------------------------------------------------
# A division costs as much as eight products, so quotients share them: 1 / a = b / (a b).


@triton.jit
def _poisson(x, mu):
    """Log-probability and its derivative by log mu."""
    positive = x > 0
    count = tl.where(positive, x, 1.0)
    low_mu, beyond_one = mu + _EPS, _at_least_one(count)
    i = 1.0 / (low_mu * beyond_one)
    i_mu, t = beyond_one * i, low_mu * i
    u, p = (x - low_mu) * i_mu, count * i_mu
    log_p, beyond, small = _log1p(u, p)
    delta = _delta(t)
    if _any(count < 1.0):
        delta, _ = _step_down(count, t, delta, delta)
    ll = _EPS - low_mu * _phi(u, p, log_p, beyond, small) - 0.5 * tl.log(count) - _HALF_LOG_2_PI - delta
    return tl.where(positive, ll, -mu), mu * i_mu * (x - low_mu)


@triton.jit
def _remainders(x, theta):
    """delta(b) - delta(theta) - delta(x), W(theta) and W(b) for b = x + theta."""
    b = x + theta
    x_1, b_1, theta_1 = _at_least_one(x), _at_least_one(b), _at_least_one(theta)
    i = 1.0 / (x_1 * b_1 * theta_1)
    t_x, t_b, t_theta = b_1 * theta_1 * i, x_1 * theta_1 * i, x_1 * b_1 * i
    delta_x, delta_b, w_b = _delta(t_x), _delta(t_b), _w(t_b)
    if _any(x < 1.0):  # fractions: rare enough to wait for
        delta_x, _ = _step_down(x, t_x, delta_x, delta_x)
        delta_b, w_b = _step_down(b, t_b, delta_b, w_b)
    delta_theta, w_theta = _step_down(theta, t_theta, _delta(t_theta), _w(t_theta))
    return delta_b - delta_theta - delta_x, w_theta, w_b


@triton.jit
def _negative_binomial(x, mu, theta, log_theta):
    """Log-probability but for the log of a factor, that factor, the log-probability of a zero, and the derivatives.

    The derivatives are by log mu and by log theta. Sums over the first are taken without the rest, so what is not
    needed for it, as the log-probability itself, must not reach it.
    """
    positive = x > 0
    count = tl.where(positive, x, 1.0)
    delta, w_theta, w_b = _remainders(count, theta)
    low_mu, low_theta = mu + _EPS, theta + _EPS
    b, s = x + theta, low_theta + mu
    i, j = 1.0 / (b * s), 1.0 / (low_mu * low_theta)
    i_b, i_s, i_mu, r = s * i, b * i, low_theta * j, mu * low_mu * j
    share, rho, above = theta * i_b, b * i_s, x - low_mu

    v, q = (mu - x - _EPS * r) * i_b, share * (1.0 + r)
    log_q, beyond_v, small_v = _log1p(v, q)
    u, p = share * above * i_mu, count * i_mu * s * i_b
    log_p, beyond_u, small_u = _log1p(u, p)

    ll = _EPS * rho - low_mu * rho * _phi(u, p, log_p, beyond_u, small_u)
    ll -= low_theta * rho * _phi(v, q, log_q, beyond_v, small_v)
    ll += delta + (0.5 * log_theta - _HALF_LOG_2_PI)
    zero = -theta * log_q
    ll = tl.where(positive, ll, zero)
    factor = tl.where(positive, tl.rsqrt(count * (count + theta)), 1.0)

    d = mu * i_mu * (theta * i_s) * above
    # rho v - log(1 + v), where rho - 1 = (x - mu') / s
    d_theta = theta * tl.where(small_v, v * above * i_s - beyond_v, rho * v - log_q)
    d_theta += tl.where(positive, 0.5 * x * i_b + (w_theta - w_b * share), 0.0)
    return ll, factor, zero, d, d_theta


@triton.jit
def _inflate(positive, ll, factor, zero, d, d_theta, logit):
    """The same with zeros inflated at this logit, and the derivative by it: P(technical | x) - P(technical)."""
    u = logit - zero
    e_u, e_p = tl.exp(-tl.abs(u)), tl.exp(-tl.abs(logit))
    w_u, w_p = 1.0 + e_u, 1.0 + e_p
    i = 1.0 / (w_u * w_p)
    i_u, i_p = w_p * i, w_u * i
    technical = tl.where(positive, 0.0, tl.where(u > 0, 1.0, e_u) * i_u)
    sampled = tl.where(positive, 1.0, tl.where(u > 0, e_u, 1.0) * i_u)
    ll = tl.where(positive, ll, tl.maximum(logit, zero)) - tl.maximum(logit, 0.0)
    factor = tl.where(positive, factor, w_u) * i_p
    return ll, factor, sampled * d, sampled * d_theta, technical - tl.where(logit > 0, 1.0, e_p) * i_p


# ---- likelihoods of a cell ----------------------------------------------------------------------------------------


@triton.jit
def _of_genes(genes, n_genes, x, logits, log_theta, dropout, library, top, i_total, SOFTMAX: tl.constexpr):
    """Log-probability of some genes, its derivatives by log mu, log theta and dropout, and what leads to the logits.

    The last is the softmax, or d log softplus / d logit.
    """
    mask = genes < n_genes
    count = tl.load(x + genes, mask=mask, other=0.0).to(tl.float32)
    logit = tl.load(logits + genes, mask=mask, other=0.0).to(tl.float32)
    nothing = 0.0 * (count + logit)  # NaN for what is not finite: comparisons and bits below would hide it
    nothing += tl.where(count < 0, float("nan"), 0.0)
    if SOFTMAX:
        link = tl.exp(logit - top) * i_total
        mu = library * link
    else:
        e = tl.exp(tl.maximum(-tl.abs(logit), _LOWEST))
        log_1_e, _, _ = _log1p(e, 1.0 + e)
        softplus = tl.maximum(logit, 0.0) + log_1_e
        link = tl.where(logit > 0, 1.0, e) / ((1.0 + e) * softplus)
        mu = library * softplus
    d_theta, d_dropout = link, link
    if log_theta is None:
        ll, d = _poisson(count, mu)
    else:
        l_theta = tl.load(log_theta + genes, mask=mask, other=0.0).to(tl.float32)
        nothing += 0.0 * l_theta
        l_theta = tl.minimum(tl.maximum(l_theta, _LOG_THETA_MIN), _LOG_THETA_MAX)
        ll, factor, zero, d, d_theta = _negative_binomial(count, mu, tl.exp(l_theta), l_theta)
        if dropout is not None:
            pi = tl.load(dropout + genes, mask=mask, other=0.0).to(tl.float32)
            nothing += 0.0 * pi
            ll, factor, d, d_theta, d_dropout = _inflate(count > 0, ll, factor, zero, d, d_theta, pi)
        ll += tl.log(factor)
    return tl.where(mask, ll + nothing, 0.0), tl.where(mask, d, 0.0), d_theta, d_dropout, link


@triton.jit
def _likelihood_kernel(
    x,
    logits,
    log_library,
    log_theta,
    dropout,
    ll,
    d_logits,
    d_library,
    d_theta,
    d_dropout,
    x_stride,
    logits_stride,
    library_stride,
    theta_stride,
    dropout_stride,
    d_stride,
    n_cells,
    n_genes,
    weight,
    SOFTMAX: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: rows times genes may pass 2^31
    l_library = tl.load(log_library + row * library_stride)
    library = tl.exp(l_library)
    x += (row % n_cells) * x_stride
    logits += row * logits_stride
    d_logits += row * d_stride
    if log_theta is not None:
        log_theta += row * theta_stride
        d_theta += row * n_genes
    if dropout is not None:
        dropout += row * dropout_stride
        d_dropout += row * d_stride
    block = tl.arange(0, BLOCK)

    top, total, i_total, d_total, d_sum, ll_total = -float("inf"), 0.0, 0.0, 0.0, 0.0, 0.0
    if SOFTMAX:
        for start in range(0, n_genes, BLOCK):
            genes = start + block
            logit = tl.load(logits + genes, mask=genes < n_genes, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(logit, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher), 0)
            top = higher
        i_total = 1.0 / total
        if not WHOLE_ROW:  # the softmax needs the sum of d before any gradient is written
            for start in range(0, n_genes, BLOCK):
                _, d, _, _, _ = _of_genes(
                    start + block, n_genes, x, logits, log_theta, dropout, library, top, i_total, SOFTMAX
                )
                d_total += tl.sum(d, 0)

    for start in range(0, n_genes, BLOCK):
        genes = start + block
        mask = genes < n_genes
        ll_g, d, d_theta_g, d_dropout_g, link = _of_genes(
            genes, n_genes, x, logits, log_theta, dropout, library, top, i_total, SOFTMAX
        )
        ll_total += tl.sum(ll_g, 0)
        d_sum += tl.sum(d, 0)
        if SOFTMAX:
            if WHOLE_ROW:
                d_total = d_sum
            d_logit = d - link * d_total
        else:
            d_logit = d * link
        tl.store(d_logits + genes, (weight * d_logit).to(d_logits.dtype.element_ty), mask=mask)
        if log_theta is not None:
            tl.store(d_theta + genes, weight * d_theta_g, mask=mask)
        if dropout is not None:
            tl.store(d_dropout + genes, (weight * d_dropout_g).to(d_dropout.dtype.element_ty), mask=mask)
    tl.store(ll + row, ll_total + 0.0 * (l_library + library))  # NaN where the library is not finite
    tl.store(d_library + row, weight * d_sum)


def log_likelihood(
    x: Tensor,
    softmax: bool,
    logits: Tensor,
    log_library: Tensor,
    log_theta: Tensor | None,
    dropout: Tensor | None,
    weight: float,
    gradients: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Log-probability of every cell and its gradients: one kernel, which a CUDA graph can capture.

    The rate of a gene is exp(``log_library``) times the softmax or the softplus of ``logits``. Rows may lie apart by
    more than their length, as in a slice of a wider product; the genes of a row lie side by side.

    Parameters
    ----------
    x
        Counts, shape (B, G), float32.
    softmax
        Whether the rates of a cell sum to its library; else each is a softplus.
    logits
        Shape (n, G), where n is a multiple of B and row i belongs to cell i % B; float32 or bfloat16.
    log_library
        Shape (n,).
    log_theta
        Log of the inverse dispersion, shape (G,) or (n, G); None for a Poisson distribution.
    dropout
        Logit of a technical zero, shape (n, G), in the dtype of ``logits``; None without zero inflation.
    weight
        Factor of the gradients, not of the log-probability.
    gradients
        Whether they are wanted. They are made in any case: next to reading the genes they cost little.

    Returns
    -------
    The log-probability summed over genes, shape (n,), float32, NaN for a row with an input that is not finite; and
    ``weight`` times its gradients by ``logits`` (n, G), ``log_library`` (n,), ``log_theta`` (n, G) whatever its shape
    and ``dropout`` (n, G), None for what is None. Those by ``logits`` and ``dropout`` keep their dtype and are the
    two halves of one tensor of shape (n, 2 G); the others are float32.
    """
    (n_cells, n_genes), n = x.shape, logits.shape[0]
    assert all(t is None or n_genes == 1 or t.stride(-1) == 1 for t in (x, logits, log_theta, dropout))
    halves = logits.new_empty(n, n_genes if dropout is None else 2 * n_genes)
    d_logits, d_dropout = halves[:, :n_genes], None if dropout is None else halves[:, n_genes:]
    ll, d_library = torch.empty(2, n, device=x.device)
    d_theta = None if log_theta is None else torch.empty(n, n_genes, device=x.device)
    theta_stride = log_theta.stride(0) if log_theta is not None and log_theta.ndim == 2 else 0
    block = min(triton.next_power_of_2(n_genes), _MAX_BLOCK)
    with torch.cuda.device_of(x):
        _likelihood_kernel[(n,)](
            x,
            logits,
            log_library,
            log_theta,
            dropout,
            ll,
            d_logits,
            d_library,
            d_theta,
            d_dropout,
            x.stride(0),
            logits.stride(0),
            log_library.stride(0),
            theta_stride,
            0 if dropout is None else dropout.stride(0),
            d_logits.stride(0),
            n_cells,
            n_genes,
            weight,
            SOFTMAX=softmax,
            WHOLE_ROW=block >= n_genes,
            BLOCK=block,
            num_warps=max(1, block // _GENES_PER_WARP),
            enable_fp_fusion=True,
        )
    return ll, d_logits, d_library, d_theta, d_dropout


# ---- proteins: background or foreground ----------------------------------------------------------------------------


@triton.jit
def _nb_mixture_kernel(
    y,
    measured,
    log_background,
    log_ratio,
    log_theta,
    mixing,
    ll,
    d_background,
    d_ratio,
    d_theta,
    d_mixing,
    y_stride,
    measured_stride,
    background_stride,
    ratio_stride,
    theta_stride,
    mixing_stride,
    n_proteins,
    weight,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    total = 0.0
    for start in range(0, n_proteins, BLOCK):
        proteins = start + block
        inside = proteins < n_proteins
        counted = tl.load(measured + row * measured_stride + proteins, mask=inside, other=0) != 0
        # What was not measured is not read: whatever stands there, none of it shows.
        count = tl.load(y + row * y_stride + proteins, mask=counted, other=0.0)
        l_background = tl.load(log_background + row * background_stride + proteins, mask=counted, other=0.0)
        l_ratio = tl.load(log_ratio + row * ratio_stride + proteins, mask=counted, other=0.0)
        l_theta = tl.load(log_theta + row * theta_stride + proteins, mask=counted, other=0.0)
        logit = tl.load(mixing + row * mixing_stride + proteins, mask=counted, other=0.0)
        nothing = 0.0 * (count + l_background + l_ratio + l_theta + logit)  # NaN for what is not finite
        nothing += tl.where(count < 0, float("nan"), 0.0)

        l_theta = tl.minimum(tl.maximum(l_theta, _LOG_THETA_MIN), _LOG_THETA_MAX)
        theta = tl.exp(l_theta)
        back = tl.exp(tl.minimum(l_background, _LOG_MEAN_MAX))
        fore = tl.exp(tl.minimum(l_background + l_ratio, _LOG_MEAN_MAX))
        # The factor has no mean in it, so that it is the same for both.
        ll_back, factor, _, d_back, d_theta_back = _negative_binomial(count, back, theta, l_theta)
        ll_fore, factor, _, d_fore, d_theta_fore = _negative_binomial(count, fore, theta, l_theta)
        u = ll_back - ll_fore + logit  # log odds of background, given the count
        e_u, e_p = tl.exp(-tl.abs(u)), tl.exp(-tl.abs(logit))
        w_u, w_p = 1.0 + e_u, 1.0 + e_p
        i = 1.0 / (w_u * w_p)
        i_u, i_p = w_p * i, w_u * i
        is_back, is_fore = tl.where(u > 0, 1.0, e_u) * i_u, tl.where(u > 0, e_u, 1.0) * i_u
        log_p = tl.maximum(ll_back, ll_fore - logit) - tl.maximum(-logit, 0.0) + tl.log(factor * w_u * i_p)
        total += tl.sum(tl.where(counted, log_p + nothing, 0.0), 0)

        d_fore *= is_fore
        made = row * n_proteins + proteins
        tl.store(d_background + made, tl.where(counted, weight * (is_back * d_back + d_fore), 0.0), mask=inside)
        tl.store(d_ratio + made, tl.where(counted, weight * d_fore, 0.0), mask=inside)
        d_theta_both = is_back * d_theta_back + is_fore * d_theta_fore
        tl.store(d_theta + made, tl.where(counted, weight * d_theta_both, 0.0), mask=inside)
        d_logit = is_back - tl.where(logit > 0, 1.0, e_p) * i_p
        tl.store(d_mixing + made, tl.where(counted, weight * d_logit, 0.0), mask=inside)
    tl.store(ll + row, total)


def nb_mixture(
    y: Tensor,
    measured: Tensor,
    log_background: Tensor,
    log_ratio: Tensor,
    log_theta: Tensor,
    mixing: Tensor,
    weight: float,
    gradients: bool = True,
) -> tuple[Tensor, ...]:
    """Log-probability of each row under a mixture of background and foreground: one kernel, which a graph can capture.

    Parameters
    ----------
    y, measured
        Counts, float32, and which of them count, bool: (n, P).
    log_background, log_ratio
        Log mean of the background, and log of the foreground's over it, (n, P).
    log_theta
        Log inverse dispersion of both, (P,) or (n, P).
    mixing
        Logit of being background, (n, P).
    weight
        Factor of the gradients, not of the log-probability.
    gradients
        Whether they are wanted. They are made in any case.

    Returns
    -------
    The log-probability summed over the measured proteins, shape (n,), NaN for a row with an input that is not finite;
    and ``weight`` times its gradients by the four last tensors, (n, P) each, zero where nothing was measured.
    """
    n, n_proteins = mixing.shape
    inputs = (y, measured.view(torch.uint8), log_background, log_ratio, log_theta, mixing)
    assert all(n_proteins == 1 or t.stride(-1) == 1 for t in inputs)
    ll = torch.empty(n, device=y.device)
    made = torch.empty(4, n, n_proteins, device=y.device)
    block = min(triton.next_power_of_2(n_proteins), _MAX_BLOCK // 4)  # two distributions are held at once
    with torch.cuda.device_of(y):
        _nb_mixture_kernel[(n,)](
            *inputs,
            ll,
            *made,
            *(t.stride(0) if t.ndim == 2 else 0 for t in inputs),
            n_proteins,
            weight,
            BLOCK=block,
            num_warps=max(1, block // (_GENES_PER_WARP // 2)),
            enable_fp_fusion=True,
        )
    return ll, *made


LIKELIHOODS: dict[str, Callable] = {
    "zinb": log_likelihood,
    "nb": log_likelihood,
    "poisson": log_likelihood,
    "nb mixture": nb_mixture,
}


# ---- gathering ----------------------------------------------------------------------------------------------------


@triton.jit
def _gather_kernel(indptr, genes, values, rows, x, x_stride, n_genes, BLOCK: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + cell)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    x += cell * x_stride
    block = tl.arange(0, BLOCK)
    for start in range(0, n_genes, BLOCK):
        tl.store(x + start + block, tl.zeros((BLOCK,), tl.float32), mask=start + block < n_genes)
    tl.debug_barrier()  # other threads wrote the zeros
    for start in range(begin, end, BLOCK):
        entry = start + block
        inside = entry < end
        gene = tl.load(genes + entry, mask=inside, other=0)
        tl.store(x + gene, tl.load(values + entry, mask=inside, other=0.0), mask=inside)


def gather_rows(indptr: Tensor, genes: Tensor, values: Tensor, rows: Tensor, x: Tensor) -> None:
    """Write some cells of a CSR matrix on the device into a dense tensor: one kernel.

    Parameters
    ----------
    indptr
        Where the entries of each cell begin, int64, shape (cells + 1,).
    genes
        Column of each entry, int32, each at most once in a cell.
    values
        Count of each entry, float32.
    rows
        Cells to gather, int64, shape (B,).
    x
        Filled, shape (B, G), float32.
    """
    with torch.cuda.device_of(x):
        _gather_kernel[(rows.shape[0],)](
            indptr, genes, values, rows, x, x.stride(0), x.shape[1], BLOCK=512, num_warps=4
        )
