"""The latent variable on the processor (numba): its posterior from hidden units, and how far that is from the prior.

All of it is small, and by operations of torch takes as long as they take to call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from scvi_ext.kernels.compiler import arrays, kernel, widest_vectors
from scvi_ext.kernels.cpu import _exp, _log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

f4 = np.float32


class Kept(NamedTuple):
    """What the gradients of a posterior need of it."""

    h: Tensor  # (B, n_hidden)
    weight: Tensor  # (2 L, n_hidden) of both linear maps
    slope: np.ndarray  # (B, L) of the scale by the log variance


def takes(*tensors: Tensor) -> bool:
    """Whether the functions here do: float32 in host memory, a row for each cell."""
    return all(t.is_cpu and t.dtype == torch.float32 and t.dim() == 2 for t in tensors)


def posterior(h: Tensor, mean: nn.Linear, log_var: nn.Linear, max_log_var: float, eps: float) -> tuple[Tensor, Tensor]:
    """Location ``mean(h)`` and scale sqrt(exp(min(``log_var(h)``, max_log_var)) + eps), (B, L) each."""
    return _Posterior.apply(h, mean.weight, mean.bias, log_var.weight, log_var.bias, max_log_var, eps)


def posterior_once(
    h: Tensor,
    mean_weight: Tensor,
    mean_bias: Tensor,
    log_var_weight: Tensor,
    log_var_bias: Tensor,
    max_log_var: float,
    eps: float,
) -> tuple[Tensor, Tensor, Kept]:
    """The same outside of autograd, and what :func:`posterior_gradients` needs of it."""
    weight = torch.cat([mean_weight, log_var_weight])  # one product for both
    both = torch.addmm(torch.cat([mean_bias, log_var_bias]), h, weight.t())  # (B, 2 L)
    loc, scale, slope = (np.empty((len(h), len(mean_weight)), f4) for _ in range(3))
    _spread(*arrays(both), loc, scale, slope, f4(max_log_var), f4(eps))
    return torch.from_numpy(loc), torch.from_numpy(scale), Kept(h, weight, slope)


def posterior_gradients(kept: Kept, d_loc: Tensor, d_scale: Tensor) -> tuple[Tensor, ...]:
    """By h, by weights and biases of the mean, and by those of the log variance."""
    d_both = np.empty((len(kept.h), len(kept.weight)), f4)
    _spread_gradient(*arrays(d_loc, d_scale), kept.slope, d_both)
    d_both = torch.from_numpy(d_both)
    d_mean, d_log_var = (d_both.t() @ kept.h).chunk(2)
    d_mean_bias, d_log_var_bias = d_both.sum(0).chunk(2)
    return d_both @ kept.weight, d_mean, d_mean_bias, d_log_var, d_log_var_bias


def kl_standard_normal(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale^2) || N(0, I)) of each row, shape (B,)."""
    return _Divergence.apply(loc, scale)


def divergence(loc: Tensor, scale: Tensor) -> Tensor:
    """The same outside of autograd."""
    kl = np.empty(len(loc), f4)
    _divergence(*arrays(loc, scale), kl)
    return torch.from_numpy(kl)


def divergence_gradients(loc: Tensor, scale: Tensor, d_kl: Tensor | float) -> tuple[Tensor, Tensor]:
    """By location and scale; ``d_kl`` has shape (B,), or is the same for all."""
    d_loc, d_scale = np.empty(loc.shape, f4), np.empty(loc.shape, f4)
    of_cells = np.full(len(loc), d_kl, f4) if isinstance(d_kl, float) else arrays(d_kl)[0]
    _divergence_gradients(*arrays(loc, scale), of_cells, d_loc, d_scale)
    return torch.from_numpy(d_loc), torch.from_numpy(d_scale)


def beside(z: Tensor, codes: Sequence[tuple[Tensor, int]]) -> Tensor:
    """``z`` (B, L) and indicators of categories: of codes, (B,) int64, and how many of them there are.

    Raises
    ------
    IndexError
        A code is none of these.
    """
    width = z.shape[1] + sum(n for _, n in codes)
    out = np.zeros((len(z), width), f4)
    out[:, : z.shape[1]] = arrays(z)[0]
    first = z.shape[1]
    for code, n in codes:
        if not _mark(*arrays(code), first, n, out):
            msg = f"Codes of {n} categories are from 0 to {n - 1}; there are others."
            raise IndexError(msg)
        first += n
    return torch.from_numpy(out)


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        loc, scale, ctx.kept = posterior_once(*args)
        return loc, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loc, d_scale):
        return *posterior_gradients(ctx.kept, d_loc, d_scale), None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loc, scale):
        ctx.save_for_backward(loc, scale)
        return divergence(loc, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_kl):
        return divergence_gradients(*ctx.saved_tensors, d_kl)


# ---- kernels ------------------------------------------------------------------------------------------------------


@kernel
def _mark(codes, first, n, out):
    """Write a one for each code, in n columns from ``first`` on; return whether all of them are from 0 to n - 1."""
    for i in range(codes.size):
        if not 0 <= codes[i] < n:
            return False
        out[i, first + codes[i]] = f4(1)
    return True


@kernel
def _spread(both, loc, scale, slope, max_log_var, eps):
    """Write the two halves of ``both``, the second as a standard deviation, and its derivative."""
    widest_vectors()
    n = loc.shape[1]
    for i in range(len(loc)):
        mean, log_var = both[i, :n], both[i, n:]
        for j in range(n):
            v = log_var[j]
            var = _exp(min(v, max_log_var))
            std = np.sqrt(var + eps)
            loc[i, j] = mean[j]
            scale[i, j] = std if v == v else v  # the exponential has no NaN
            slope[i, j] = var / (f4(2) * std) if v <= max_log_var else f4(0)


@kernel
def _spread_gradient(d_loc, d_scale, slope, d_both):
    n = d_loc.shape[1]
    for i in range(len(d_loc)):
        for j in range(n):
            d_both[i, j] = d_loc[i, j]
            d_both[i, n + j] = d_scale[i, j] * slope[i, j]


@kernel
def _divergence(loc, scale, kl):
    widest_vectors()
    m, s = loc.reshape(-1), scale.reshape(-1)
    terms = np.empty(m.size, np.float32)
    for e in range(m.size):
        var = s[e] * s[e]
        term = var + m[e] * m[e] - _log(var) - f4(1)
        terms[e] = term if var > f4(0) and var < f4(np.inf) else f4(np.nan)  # the logarithm has neither
    n = loc.shape[1]
    for i in range(kl.size):
        total = 0.0
        for e in range(i * n, (i + 1) * n):
            total += terms[e]
        kl[i] = 0.5 * total


@kernel
def _divergence_gradients(loc, scale, d_kl, d_loc, d_scale):
    for i in range(len(loc)):
        for j in range(loc.shape[1]):
            d_loc[i, j] = d_kl[i] * loc[i, j]
            d_scale[i, j] = d_kl[i] * (scale[i, j] - f4(1) / scale[i, j])
