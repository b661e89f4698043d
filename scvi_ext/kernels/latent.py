"""The latent variable on the processor (numba): its posterior from hidden units, and how far that is from the prior.

All of it is small, and by operations of torch takes as long as they take to call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from scvi_ext.kernels.compiler import arrays, kernel, widest_vectors
from scvi_ext.kernels.cpu import _exp, _log

if TYPE_CHECKING:
    from torch import Tensor, nn

f4 = np.float32


def takes(*tensors: Tensor) -> bool:
    """Whether the functions here do: float32 in host memory, a row for each cell."""
    return all(t.is_cpu and t.dtype == torch.float32 and t.dim() == 2 for t in tensors)


def posterior(h: Tensor, mean: nn.Linear, log_var: nn.Linear, max_log_var: float, eps: float) -> tuple[Tensor, Tensor]:
    """Location ``mean(h)`` and scale sqrt(exp(min(``log_var(h)``, max_log_var)) + eps), (B, L) each."""
    return _Posterior.apply(h, mean.weight, mean.bias, log_var.weight, log_var.bias, max_log_var, eps)


def kl_standard_normal(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale^2) || N(0, I)) of each row, shape (B,)."""
    return _Divergence.apply(loc, scale)


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, mean_weight, mean_bias, log_var_weight, log_var_bias, max_log_var, eps):
        weight = torch.cat([mean_weight, log_var_weight])  # one product for both
        both = torch.addmm(torch.cat([mean_bias, log_var_bias]), h, weight.t())  # (B, 2 L)
        loc, scale, ctx.slope = (np.empty((len(h), len(mean_weight)), f4) for _ in range(3))
        spread_kernel(*arrays(both), loc, scale, ctx.slope, f4(max_log_var), f4(eps))
        ctx.save_for_backward(h, weight)
        return torch.from_numpy(loc), torch.from_numpy(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loc, d_scale):
        h, weight = ctx.saved_tensors
        d_both = torch.empty(len(h), len(weight))
        _spread_gradient(*arrays(d_loc, d_scale), ctx.slope, *arrays(d_both))
        d_mean, d_log_var = (d_both.t() @ h).chunk(2)
        d_mean_bias, d_log_var_bias = d_both.sum(0).chunk(2)
        return d_both @ weight, d_mean, d_mean_bias, d_log_var, d_log_var_bias, None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loc, scale):
        ctx.save_for_backward(loc, scale)
        kl = torch.empty(len(loc))
        divergence_kernel(*arrays(loc, scale, kl))
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, d_kl):
        loc, scale = ctx.saved_tensors
        d_loc, d_scale = torch.empty(loc.shape), torch.empty(loc.shape)
        _divergence_gradients(*arrays(loc, scale, d_kl, d_loc, d_scale))
        return d_loc, d_scale


# ---- kernels ------------------------------------------------------------------------------------------------------


@kernel
def spread_kernel(both, loc, scale, slope, max_log_var, eps):
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
def divergence_kernel(loc, scale, kl):
    """Write KL(N(loc, scale^2) || N(0, I)) of each row."""
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
