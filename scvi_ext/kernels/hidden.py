"""What follows the product in a hidden layer, on the processor (numba): normalisation, ReLU and dropout at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import prange
from torch.autograd.function import once_differentiable

from scvi_ext.kernels.compiler import arrays, fast, in_parallel, kernel, parallel, widest_vectors

if TYPE_CHECKING:
    from torch import Tensor, nn

f4, f8, u4, u8 = np.float32, np.float64, np.uint32, np.uint64
_ZERO = f4(0)
_LOW = u8(0xFFFFFFFF)
_LARGEST = 2**18  # entries, those of 1,024 cells and 256 units: one thread has done with fewer before others are awake


def dropout_factors(shape: tuple[int, ...], p: float) -> Tensor:
    """What dropout multiplies by, float32 of this shape: 0 with probability ``p``, else 1 / (1 - p).

    Torch's generator gives one number, from which Philox 4x32-10 makes all others (Salmon et al. 2011), so that they
    can be made in any order and on any thread.
    """
    factors = np.empty(shape, f4)
    in_parallel(_dropout_in_parts, seed_for(p), threshold(p), factor(p), factors.reshape(-1, shape[-1]))
    return torch.from_numpy(factors)


def takes(x: Tensor, norm: nn.BatchNorm1d) -> bool:
    """Whether :func:`activate` does: cells in training, (B, n), float32 in host memory, no more than one thread likes.

    One cell has no variance, and torch says so.
    """
    return x.is_cpu and x.dtype == torch.float32 and takes_cells(len(x), norm)


def takes_cells(n_cells: int, norm: nn.BatchNorm1d) -> bool:
    """The same of so many cells, wherever they are."""
    fits = 1 < n_cells and n_cells * norm.num_features <= _LARGEST
    return fits and norm.training and norm.weight.dtype == torch.float32


def activate(x: Tensor, norm: nn.BatchNorm1d, p: float) -> Tensor:
    """Dropout with probability ``p`` of the ReLU of ``norm``, (B, n) to the same."""
    return _Activation.apply(x, norm.weight, norm.bias, norm, p)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm, p):
        n_cells, n = x.shape
        # `out` belongs to numpy, or it would hold on to itself.
        normal, out, inverse_std = np.empty((n_cells, n), f4), np.empty((n_cells, n), f4), np.empty(n, f4)
        of_norm = arrays(weight, bias, norm.running_mean, norm.running_var)
        settings = seed_for(p), threshold(p), factor(p), norm.momentum, norm.eps
        activate_kernel(*settings, *arrays(x), *of_norm, normal, out, inverse_std)
        norm.num_batches_tracked.add_(1)
        ctx.kept = settings[2], normal, out, inverse_std, of_norm[0]
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        n = d_out.shape[1]
        made = torch.empty(d_out.shape), torch.empty(n), torch.empty(n)
        gradients_kernel(*ctx.kept, *arrays(d_out, *made))
        return *made, None, None


def seed_for(p: float) -> np.uint64:
    """Of the bits of a dropout; where nothing is dropped, torch's generator is not asked."""
    return u8(torch.empty((), dtype=torch.int64).random_().item()) if p else u8(0)


def factor(p: float) -> np.float32:
    """Of what is not dropped."""
    return f4(1 / (1 - p)) if p < 1 else _ZERO


def threshold(p: float) -> np.uint64:
    """Of 32 random bits: what is below is dropped."""
    return u8(round(p * 2**32))


# ---- kernels ------------------------------------------------------------------------------------------------------


@fast
def _philox(row, column, seed):
    """Four times 32 random bits for a place and a seed: Philox 4x32-10, whose counter are row and column."""
    a, b, c, d = row & _LOW, column & _LOW, u8(0), u8(0)
    key, other_key = seed & _LOW, seed >> u8(32)
    for _ in range(10):
        ab, cd = u8(0xD2511F53) * a, u8(0xCD9E8D57) * c
        a, b, c, d = (cd >> u8(32)) ^ b ^ key, cd & _LOW, (ab >> u8(32)) ^ d ^ other_key, ab & _LOW
        key, other_key = (key + u8(0x9E3779B9)) & _LOW, (other_key + u8(0xBB67AE85)) & _LOW
    return a, b, c, d


@fast
def _draw(i, begin, seed, bits):
    """Random bits for four rows from ``i`` on, and the columns from ``begin`` on."""
    for j in range(bits.shape[1]):
        a, b, c, d = _philox(u8(i), u8(begin + j), seed)
        bits[0, j], bits[1, j], bits[2, j], bits[3, j] = u4(a), u4(b), u4(c), u4(d)


@kernel
def _dropout(begin, end, seed, threshold, factor, factors):
    widest_vectors()
    bits = np.empty((4, end - begin), np.uint32)
    for i in range(len(factors)):
        if i % 4 == 0:
            _draw(i, begin, seed, bits)
        row, random = factors[i, begin:end], bits[i % 4]
        for j in range(row.size):
            row[j] = factor if random[j] >= threshold else _ZERO


@parallel
def _dropout_in_parts(parts, seed, threshold, factor, factors):
    n = factors.shape[1]
    for part in prange(parts):
        _dropout(part * n // parts, (part + 1) * n // parts, seed, threshold, factor, factors)


@kernel
def activate_kernel(
    seed, threshold, factor, momentum, eps, x, weight, bias, running_mean, running_var, normal, out, inverse_std
):
    """Write what is normalised, what comes out, and 1 / std of each unit; ``out`` may be ``x``."""
    widest_vectors()
    n, width = x.shape
    mean, var, bits = np.zeros(width), np.zeros(width), np.zeros((4, width), np.uint32)
    for i in range(n):
        row = x[i]
        for j in range(width):
            mean[j] += f8(row[j])
    for j in range(width):
        mean[j] /= n
    for i in range(n):
        row = x[i]
        for j in range(width):
            centred = f8(row[j]) - mean[j]
            var[j] += centred * centred
    for j in range(width):
        running_mean[j] += momentum * (mean[j] - running_mean[j])
        running_var[j] += momentum * (var[j] / (n - 1) - running_var[j])
        inverse_std[j] = 1 / np.sqrt(var[j] / n + eps)
    for i in range(n):
        if threshold > 0 and i % 4 == 0:
            _draw(i, 0, seed, bits)
        row, to, to_normal, random = x[i], out[i], normal[i], bits[i % 4]
        for j in range(width):
            to_normal[j] = f4(f8(row[j]) - mean[j]) * inverse_std[j]
        for j in range(width):
            y = to_normal[j] * weight[j] + bias[j]
            to[j] = _ZERO if y <= _ZERO or random[j] < threshold else factor * y


@kernel
def gradients_kernel(factor, normal, out, inverse_std, weight, d_out, d_x, d_weight, d_bias):
    """Write the gradients by ``x``, and by weights and biases of the normalisation."""
    widest_vectors()
    n, width = out.shape
    of_weight, of_bias = np.zeros(width), np.zeros(width)
    for i in range(n):
        row, made, of_out, to = normal[i], out[i], d_out[i], d_x[i]
        for j in range(width):
            to[j] = _ZERO if made[j] == _ZERO else factor * of_out[j]
        for j in range(width):
            of_bias[j] += f8(to[j])
            of_weight[j] += f8(to[j] * row[j])
    mean, slope, scale = np.empty(width, f4), np.empty(width, f4), np.empty(width, f4)
    for j in range(width):
        d_weight[j], d_bias[j] = of_weight[j], of_bias[j]
        slope[j], mean[j], scale[j] = of_weight[j] / n, of_bias[j] / n, weight[j] * inverse_std[j]
    for i in range(n):
        row, to = normal[i], d_x[i]
        for j in range(width):
            to[j] = (to[j] - mean[j] - row[j] * slope[j]) * scale[j]
