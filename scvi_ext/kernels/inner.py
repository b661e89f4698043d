"""What lies between an encoder's first product and a decoder's last hidden layer, in one call each way (numba).

Of networks with one hidden layer each: a hidden layer, the posterior of z, a sample of it, and another hidden layer
that sees covariates too. All of this is small and takes longer to call one after the other than to do, so it is put
together here of :mod:`~scvi_ext.kernels.hidden`, :mod:`~scvi_ext.kernels.latent` and products of our own; one thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext.kernels import hidden, latent
from scvi_ext.kernels.compiler import kernel, widest_vectors
from scvi_ext.kernels.hidden import f4

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

_LARGEST = 2**22  # multiplications of one product, which one thread does in half a millisecond
_VECTOR = 16  # numbers in the widest


def takes(n_cells: int, norms: Sequence[nn.BatchNorm1d], n_latent: int) -> bool:
    """Whether one thread does this for so many cells before others would be awake."""
    widest = max(norm.num_features for norm in norms)
    return 2 * n_latent * widest * n_cells <= _LARGEST and all(hidden.takes_cells(n_cells, norm) for norm in norms)


class Inner:
    """Both hidden layers and what is between them, for minibatches of one size.

    Parameters and buffers have to stay where they are. What one call returns lies where the next one writes.

    Parameters
    ----------
    n_cells
        Of a minibatch.
    norms, dropout_rates
        Of the two hidden layers.
    mean, log_var, out
        The maps to location and to log variance of z, and the decoder's first product, of z and of categories.
    n_categories
        Of each categorical covariate that the decoder sees.
    max_log_var, var_eps
        The scale of z is sqrt(exp(min(log variance, max_log_var)) + var_eps).
    """

    def __init__(
        self,
        n_cells: int,
        norms: tuple[nn.BatchNorm1d, nn.BatchNorm1d],
        dropout_rates: tuple[float, float],
        mean: nn.Linear,
        log_var: nn.Linear,
        out: nn.Linear,
        n_categories: Sequence[int],
        max_log_var: float,
        var_eps: float,
    ):
        n_latent, n_in = mean.out_features, mean.in_features
        self.dropout_rates, self.n_categories = dropout_rates, n_categories
        self.layers = [_Layer(n_cells, norm, rate) for norm, rate in zip(norms, dropout_rates, strict=True)]
        self.codes = np.empty((n_cells, len(n_categories)), np.int64)
        self.firsts = n_latent + np.cumsum([0, *n_categories])
        self.maps = [_array_of(t) for layer in (mean, log_var, out) for t in (layer.weight, layer.bias)]
        self.loc, self.scale, self.slope, self.noise, self.z = np.empty((5, n_cells, n_latent), f4)
        self.kl, self.d_x, self.none = np.empty(n_cells, f4), np.empty((n_cells, n_in), f4), np.zeros_like(self.loc)
        self.limits = f4(max_log_var), f4(var_eps)
        made = self.layers[1].made[1], self.kl, self.z, self.d_x, self.noise
        self.h, self.divergence, self.sample, self.gradient, self.drawn = map(torch.from_numpy, made)
        parameters = [t for layer in (mean, log_var, out, *norms) for t in (layer.weight, layer.bias)]
        self.gradients = [(parameter, torch.zeros_like(parameter)) for parameter in parameters]
        # The decoder's first bias has no gradient: the normalisation takes off what it adds.
        self.d_parameters = [_array_of(d) for p, d in self.gradients if p is not out.bias]

    def forwards(self, x: np.ndarray, codes: Sequence[np.ndarray], draw: Callable[[Tensor], Tensor]) -> None:
        """Make the last hidden layer ``h`` (B, n_out), ``divergence`` of z from N(0, I) (B,), and ``sample`` (B, L).

        Parameters
        ----------
        x
            What the encoder's first product makes of the cells, (B, n_in).
        codes
            Of the categories, (B,) each.
        draw
            Fills a tensor with standard normal draws for the cells.

        Raises
        ------
        IndexError
            A code is none of these.
        """
        for i, code in enumerate(codes):
            self.codes[:, i] = code
        (into, out), seeds = self.layers, [hidden.seed_for(self.dropout_rates[0])]
        draw(self.drawn)
        seeds.append(hidden.seed_for(self.dropout_rates[1]))
        w_mean, b_mean, w_var, b_var, w_out, b_out = self.maps
        wrong = _forwards(
            x, seeds[0], *into.settings, *into.state, *into.made, w_mean, b_mean, w_var, b_var, *self.limits,
            self.noise, self.loc, self.scale, self.slope, self.z, self.kl, self.codes, self.firsts,
            w_out, b_out, seeds[1], *out.settings, *out.state, *out.made,
        )  # fmt: skip
        if wrong >= 0:
            n = self.n_categories[wrong]
            msg = f"Codes of {n} categories are from 0 to {n - 1}; there are others."
            raise IndexError(msg)

    def backwards(self, d_h: Sequence[np.ndarray], d_z: np.ndarray | None, d_kl: float) -> None:
        """Make ``gradient`` by x, and those of the parameters.

        Of gradients by ``h``, one or two to be added up, by ``sample``, and by each divergence.
        """
        (into, out), (w_mean, _, w_var, _, w_out, _) = self.layers, self.maps
        _backwards(
            into.settings[1], out.settings[1], *into.made, into.state[0], w_mean, w_var, self.loc, self.scale,
            self.slope, self.noise, self.z, self.codes, self.firsts, w_out, *out.made, out.state[0],
            d_h[0], d_h[1] if len(d_h) > 1 else None, self.none if d_z is None else d_z, f4(d_kl),
            self.d_x, *self.d_parameters,
        )  # fmt: skip


class _Layer:
    """Where a hidden layer has its settings and state, and puts what it makes."""

    def __init__(self, n_cells: int, norm: nn.BatchNorm1d, dropout_rate: float):
        self.settings = hidden.threshold(dropout_rate), hidden.factor(dropout_rate), norm.momentum, norm.eps
        self.state = [_array_of(t) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
        self.state.append(_array_of(norm.num_batches_tracked.view(1)))
        n = norm.num_features
        self.made = np.empty((n_cells, n), f4), np.empty((n_cells, n), f4), np.empty(n, f4)


def _array_of(tensor: Tensor) -> np.ndarray:
    """The memory itself, also of a parameter."""
    return tensor.detach().numpy()


# ---- kernels ------------------------------------------------------------------------------------------------------


@kernel
def _add_product(x, weight, out):
    """Add x @ weight, (n, k) times (k, m), four of the k at a time."""
    widest_vectors()
    n, k = x.shape
    fours = k - k % 4
    for i in range(n):
        row, to = x[i], out[i]
        for j in range(0, fours, 4):
            v0, v1, v2, v3 = row[j], row[j + 1], row[j + 2], row[j + 3]
            w0, w1, w2, w3 = weight[j], weight[j + 1], weight[j + 2], weight[j + 3]
            for m in range(to.size):
                to[m] += (v0 * w0[m] + v1 * w1[m]) + (v2 * w2[m] + v3 * w3[m])
        for j in range(fours, k):
            v, w = row[j], weight[j]
            for m in range(to.size):
                to[m] += v * w[m]


@kernel
def _add_crossed(x, y, out):
    """Add x.T @ y, (n, k) and (n, m) to (k, m), four of the n at a time."""
    widest_vectors()
    n, k = x.shape
    fours = n - n % 4
    for i in range(0, fours, 4):
        y0, y1, y2, y3 = y[i], y[i + 1], y[i + 2], y[i + 3]
        for j in range(k):
            v0, v1, v2, v3, to = x[i, j], x[i + 1, j], x[i + 2, j], x[i + 3, j], out[j]
            for m in range(to.size):
                to[m] += (v0 * y0[m] + v1 * y1[m]) + (v2 * y2[m] + v3 * y3[m])
    for i in range(fours, n):
        row = y[i]
        for j in range(k):
            v, to = x[i, j], out[j]
            for m in range(to.size):
                to[m] += v * row[m]


@kernel
def _add_rows(x, total):
    """Add the rows of x up."""
    widest_vectors()
    for i in range(len(x)):
        row = x[i]
        for j in range(row.size):
            total[j] += row[j]


@kernel
def _without_categories(codes, firsts):
    """The first column with a code that is no category; -1 if there is none."""
    for c in range(codes.shape[1]):
        for i in range(len(codes)):
            if not 0 <= codes[i, c] < firsts[c + 1] - firsts[c]:
                return c
    return -1


@kernel
def _forwards(
    x, in_seed, in_threshold, in_factor, in_momentum, in_eps, in_weight, in_bias, in_mean, in_var, in_steps,
    in_normal, in_out, in_inverse, w_mean, b_mean, w_var, b_var, max_log_var, var_eps,
    noise, loc, scale, slope, z, kl, codes, firsts, w_out, b_out,
    out_seed, out_threshold, out_factor, out_momentum, out_eps, out_weight, out_bias, out_mean, out_var, out_steps,
    out_normal, out_out, out_inverse,
):  # fmt: skip
    widest_vectors()
    wrong = _without_categories(codes, firsts)
    if wrong >= 0:
        return wrong
    in_steps[0] += 1
    out_steps[0] += 1
    n, n_latent = z.shape
    n_in, n_out = in_out.shape[1], out_out.shape[1]
    hidden.activate_kernel(
        in_seed, in_threshold, in_factor, in_momentum, in_eps, x, in_weight, in_bias, in_mean, in_var,
        in_normal, in_out, in_inverse,
    )  # fmt: skip
    # Location and log variance side by side, in whole vectors.
    width = (2 * n_latent + _VECTOR - 1) // _VECTOR * _VECTOR
    weight, both = np.zeros((n_in, width), f4), np.zeros((n, width), f4)
    for k in range(n_latent):
        for j in range(n_in):
            weight[j, k], weight[j, n_latent + k] = w_mean[k, j], w_var[k, j]
    for i in range(n):
        both[i, :n_latent], both[i, n_latent : 2 * n_latent] = b_mean, b_var
    _add_product(in_out, weight, both)
    latent.spread_kernel(both, loc, scale, slope, max_log_var, var_eps)
    latent.divergence_kernel(loc, scale, kl)
    for i in range(n):
        for k in range(n_latent):
            z[i, k] = loc[i, k] + scale[i, k] * noise[i, k]
    by_input = w_out.T.copy()
    for i in range(n):
        out_out[i] = b_out
        for c in range(codes.shape[1]):
            row, to = by_input[firsts[c] + codes[i, c]], out_out[i]
            for j in range(n_out):
                to[j] += row[j]
    _add_product(z, by_input[:n_latent], out_out)
    hidden.activate_kernel(
        out_seed, out_threshold, out_factor, out_momentum, out_eps, out_out, out_weight, out_bias, out_mean, out_var,
        out_normal, out_out, out_inverse,
    )  # fmt: skip
    return wrong


@kernel
def _backwards(
    in_factor, out_factor, in_normal, in_out, in_inverse, in_weight, w_mean, w_var, loc, scale, slope, noise, z,
    codes, firsts, w_out, out_normal, out_out, out_inverse, out_weight, d_h, d_h_too, d_z, d_kl,
    d_x, d_w_mean, d_b_mean, d_w_var, d_b_var, d_w_out, d_in_weight, d_in_bias, d_out_weight, d_out_bias,
):  # fmt: skip
    widest_vectors()
    n, n_latent = z.shape
    n_in, n_out = in_out.shape[1], out_out.shape[1]
    if d_h_too is not None:
        for i in range(n):
            for j in range(n_out):
                d_h[i, j] += d_h_too[i, j]
    d_pre = np.empty((n, n_out), f4)
    hidden.gradients_kernel(
        out_factor, out_normal, out_out, out_inverse, out_weight, d_h, d_pre, d_out_weight, d_out_bias
    )  # fmt: skip
    by_input = np.zeros((w_out.shape[1], n_out), f4)
    _add_crossed(z, d_pre, by_input[:n_latent])
    for i in range(n):
        for c in range(codes.shape[1]):
            to, row = by_input[firsts[c] + codes[i, c]], d_pre[i]
            for j in range(n_out):
                to[j] += row[j]
    d_w_out[:] = by_input.T
    width = (n_latent + _VECTOR - 1) // _VECTOR * _VECTOR
    weight, through = np.zeros((n_out, width), f4), np.zeros((n, width), f4)
    weight[:, :n_latent] = w_out[:, :n_latent]
    _add_product(d_pre, weight, through)
    d_loc, d_log_var = np.empty((n, n_latent), f4), np.empty((n, n_latent), f4)
    for i in range(n):
        for k in range(n_latent):
            of_sample = through[i, k] + d_z[i, k]
            d_loc[i, k] = of_sample + d_kl * loc[i, k]
            d_scale = of_sample * noise[i, k] + d_kl * (scale[i, k] - f4(1) / scale[i, k])
            d_log_var[i, k] = d_scale * slope[i, k]
    d_w_mean[:], d_w_var[:], d_b_mean[:], d_b_var[:] = 0, 0, 0, 0
    _add_crossed(d_loc, in_out, d_w_mean)
    _add_crossed(d_log_var, in_out, d_w_var)
    _add_rows(d_loc, d_b_mean)
    _add_rows(d_log_var, d_b_var)
    d_in = np.zeros((n, n_in), f4)
    _add_product(d_loc, w_mean, d_in)
    _add_product(d_log_var, w_var, d_in)
    hidden.gradients_kernel(in_factor, in_normal, in_out, in_inverse, in_weight, d_in, d_x, d_in_weight, d_in_bias)
