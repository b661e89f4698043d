"""Log-likelihood of protein counts, background and foreground, with all gradients made in the same pass.

A kernel is a function ``run(y, measured, log_background, log_ratio, log_theta, mixing, weight, gradients)`` that
returns the log-probability of each row, and ``weight`` times its gradients by the four last tensors. The plain formula
is :func:`scvi_ext.functional.counts.log_mixture_nb`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from scvi_ext.functional import fused
from scvi_ext.functional.counts import log_mixture_nb

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NAME = "nb mixture"


@cache
def choose(device: str, dtype: torch.dtype) -> tuple[Callable | None, str]:
    """The kernel on a kind of device, and a sentence about it, see :func:`scvi_ext.functional.fused.choose`."""
    return fused.trusted(NAME, device, dtype, lambda run: _deviation(run, device))


def log_likelihood(
    y: Tensor, measured: Tensor, log_background: Tensor, log_ratio: Tensor, log_theta: Tensor, mixing: Tensor
) -> Tensor:
    """log p(y) of the measured proteins of each cell, shape (B,) or (S, B).

    Parameters
    ----------
    y, measured
        Counts, and which of them count, (B, P).
    log_background, log_ratio
        Log mean of the background, and log of the foreground's over it: (B, P) or (S, B, P).
    log_theta
        Log inverse dispersion of both, (P,) or (B, P).
    mixing
        Logit of being background, (B, P) or (S, B, P).
    """
    run, _ = choose(mixing.device.type, mixing.dtype)
    if run is None:
        return plain(y, measured, log_background, log_ratio, log_theta, mixing)
    shape = mixing.shape
    rows = [t.expand(shape).reshape(-1, shape[-1]) for t in (y, measured, log_background, log_ratio)]
    if log_theta.dim() > 1:
        log_theta = log_theta.expand(shape).reshape(-1, shape[-1])
    rows += [log_theta, mixing.reshape(-1, shape[-1])]
    if torch.is_grad_enabled() and any(t.requires_grad for t in rows[2:]):
        return _LogLikelihood.apply(run, *rows).view(shape[:-1])
    return run(*rows, 1.0, False)[0].view(shape[:-1])


def plain(
    y: Tensor, measured: Tensor, log_background: Tensor, log_ratio: Tensor, log_theta: Tensor, mixing: Tensor
) -> Tensor:
    """The same by the formula."""
    background = torch.exp(log_background)
    y = torch.where(measured, y, 0.0)  # else what is not finite there would reach the gradients, as 0 times NaN
    log_p = log_mixture_nb(y, background, background * torch.exp(log_ratio), torch.exp(log_theta), None, mixing)
    return torch.where(measured, log_p, 0.0).sum(-1)


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, y, measured, log_background, log_ratio, log_theta, mixing):
        log_p, *gradients = run(y, measured, log_background, log_ratio, log_theta, mixing, 1.0, True)
        ctx.shared_theta = log_theta.dim() == 1
        ctx.save_for_backward(*gradients)
        return log_p

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_p):
        scale = d_log_p.unsqueeze(-1)
        d_background, d_ratio, d_theta, d_mixing = (gradient * scale for gradient in ctx.saved_tensors)
        return None, None, None, d_background, d_ratio, d_theta.sum(0) if ctx.shared_theta else d_theta, d_mixing


@torch.inference_mode(mode=False)  # a read-out may be the first to ask
@torch.enable_grad()
def _deviation(run: Callable, device: str) -> float:
    """Largest deviation of the kernel from the formula in float64 on a few cells, relative to the largest entry."""
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.poisson(rng.gamma(0.5, 40.0, (5, 11))).astype(np.float32))
    measured = torch.from_numpy(rng.random((5, 11)) < 0.8)
    shapes = {"log_background": (5, 11), "log_ratio": (5, 11), "log_theta": (11,), "mixing": (5, 11)}
    leaves = [torch.from_numpy(rng.normal(0, 2, shape).astype(np.float32)) for shape in shapes.values()]
    leaves[1].abs_()

    exact = [leaf.double().requires_grad_() for leaf in leaves]
    log_p = plain(y.double(), measured, *exact)
    expected = [log_p.detach(), *torch.autograd.grad(log_p.sum(), exact)]
    found = [leaf.to(device).requires_grad_() for leaf in leaves]
    log_p = _LogLikelihood.apply(run, y.to(device), measured.to(device), *found)
    found = [log_p.detach(), *torch.autograd.grad(log_p.sum(), found)]
    pairs = zip(found, expected, strict=True)
    return float(np.max([float((f.cpu().double() - e).abs().max() / e.abs().max()) for f, e in pairs]))
