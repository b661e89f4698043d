"""Log-likelihoods of counts straight from a decoder's outputs, with all gradients made in the same pass.

A kernel is a function ``run(x, softmax, logits, log_library, log_theta, dropout, weight, gradients)`` that returns the
log-probability of each row, and ``weight`` times its gradients by the four tensors. Those of the processor also take
``summed``: then the gradient by ``log_theta`` has a few rows that add up to the sum over all. The plain formulas of
:mod:`scvi_ext.functional.counts` are what it is checked against, and what is used where there is none.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from scvi_ext._contract import Expression
from scvi_ext._errors import first_line
from scvi_ext.functional.counts import LIKELIHOODS
from scvi_ext.kernels.sparse import SparseRows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


# Largest deviation of a kernel from the formula in float64, relative to the largest entry, before it is not trusted:
# some hundred roundings of float32.
_TRUSTED = 2e-5


@cache
def choose(name: str, device: str, dtype: torch.dtype) -> tuple[Callable | None, str]:
    """The kernel of a likelihood on a kind of device, and a sentence about it; None stands for the plain formula.

    It is compiled here, on first use, and compared with the plain formula in float64 before it is trusted.

    Parameters
    ----------
    name
        Option value of ``reconstruction_loss``.
    device
        ``"cpu"`` or ``"cuda"``.
    dtype
        Of the parameters.
    """
    return trusted(name, device, dtype, lambda run: np.max([_deviation(run, name, device, s) for s in (True, False)]))


def trusted(
    name: str, device: str, dtype: torch.dtype, deviation_of: Callable[[Callable], float]
) -> tuple[Callable | None, str]:
    """The same for any likelihood that has a kernel; ``deviation_of`` says how far that is from the formula."""
    if dtype != torch.float32:
        return None, f"plain formula of {name}, because the parameters are {dtype}"
    started = time.perf_counter()
    try:
        if device == "cpu":
            from scvi_ext.kernels import cpu as backend
        else:
            from scvi_ext.kernels import cuda as backend
        if name not in backend.LIKELIHOODS:
            return None, f"plain formula of {name}, for which there is no kernel"
        run = backend.LIKELIHOODS[name]
        deviation = deviation_of(run)
    except Exception as error:  # whatever a compiler may raise: there is a formula that needs none
        return None, f"plain formula of {name}, because its kernel does not run here ({first_line(error)})"
    if not deviation < _TRUSTED:
        return None, f"plain formula of {name}, because its kernel deviates from it by {deviation:.1g} here"
    seconds = time.perf_counter() - started
    return run, f"fused kernel of {name}" + (f", compiled in {seconds:.0f} s" if seconds > 1 else "")


def log_likelihood(
    run: Callable,
    x: SparseRows | Tensor,
    softmax: bool,
    logits: Tensor,
    log_library: Tensor,
    log_theta: Tensor | None,
    dropout: Tensor | None,
) -> Tensor:
    """log p(x) of each cell, shape (B,) or (S, B).

    Parameters
    ----------
    run
        A kernel.
    x
        Counts of B cells.
    softmax
        Whether the normalised profile is the softmax or the softplus of the logits.
    logits, dropout
        Shape (B, G) or (S, B, G); ``dropout`` only where the likelihood is zero-inflated. Where gradients are asked
        for, they are written over these.
    log_library
        Broadcastable to (B, 1) or (S, B, 1).
    log_theta
        Shape (G,), (B, G) or (S, B, G).

    Raises
    ------
    ValueError
        The numbers of genes differ.
    """
    if x.shape[-1] != logits.shape[-1]:
        msg = f"Counts of {x.shape[-1]} genes were given to a decoder of {logits.shape[-1]}."
        raise ValueError(msg)
    shape = logits.shape[:-1]
    if log_theta is not None and log_theta.dim() > 1:
        log_theta = log_theta.expand(logits.shape).flatten(0, -2)
    rows = (
        _own(logits),
        log_library.expand(*shape, 1).flatten(),
        log_theta,
        None if dropout is None else _own(dropout),
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in rows):
        return _LogLikelihood.apply(run, x, softmax, *rows).view(shape)
    return run(x, softmax, *rows, 1.0, False)[0].view(shape)


def _own(outputs: Tensor) -> Tensor:
    """The rows of a decoder's outputs, which a kernel may overwrite; a copy of what is no output."""
    rows = outputs.flatten(0, -2).contiguous()
    origin = outputs if outputs._base is None else outputs._base  # of a view
    return rows.clone() if origin.is_leaf else rows


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, softmax, logits, log_library, log_theta, dropout):
        # A loss is minus the mean over cells: gradients that are made for that need not be scaled afterwards.
        ctx.weight = -1 / max(len(logits), 1)
        log_p, *gradients = run(x, softmax, logits, log_library, log_theta, dropout, ctx.weight, True)
        ctx.shared_theta = log_theta is not None and log_theta.dim() == 1
        ctx.save_for_backward(*gradients)
        return log_p

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_p):
        d_logits, d_library, d_theta, d_dropout = ctx.saved_tensors
        # Looking at it costs a synchronisation on a device, and multiplying costs little there.
        if d_log_p.is_cuda or not (d_log_p.numpy() == np.float32(ctx.weight)).all():
            scale = d_log_p / ctx.weight
            d_logits, d_theta, d_dropout = (
                None if gradient is None else gradient * scale.unsqueeze(-1)
                for gradient in (d_logits, d_theta, d_dropout)
            )
            d_library = d_library * scale
        if ctx.shared_theta:
            d_theta = d_theta.sum(0)
        return None, None, None, d_logits, d_library, d_theta, d_dropout


@torch.inference_mode(mode=False)  # a read-out may be the first to ask
@torch.enable_grad()
def _deviation(run: Callable, name: str, device: str, softmax: bool) -> float:
    """Largest deviation of a kernel from the formula in float64 on a few cells, relative to the largest entry."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.3, 8.0, (5, 43))).astype(np.float32)
    x = torch.from_numpy(counts)
    leaves = [
        torch.from_numpy(rng.normal(0, 2, shape).astype(np.float32)) for shape in ((5, 43), (5, 1), (43,), (5, 43))
    ]
    leaves[1] += 4  # log library sizes
    has_theta, has_dropout = name != "poisson", name == "zinb"
    used = [True, True, has_theta, has_dropout]

    exact = [leaf.double().requires_grad_() for leaf in leaves]
    logits, log_library, log_theta, dropout = exact
    rate = torch.exp(log_library) * (torch.softmax(logits, -1) if softmax else softplus(logits))
    log_p = LIKELIHOODS[name](x.double(), Expression(rate, rate, torch.exp(log_theta), dropout)).sum(-1)
    kept = [leaf for leaf, is_used in zip(exact, used, strict=True) if is_used]
    expected = [log_p.detach(), *torch.autograd.grad(log_p.mean(), kept)]

    fused = [leaf.to(device).requires_grad_() if is_used else None for leaf, is_used in zip(leaves, used, strict=True)]
    rows = SparseRows.from_dense(x) if device == "cpu" else x.to(device)
    log_p = log_likelihood(run, rows, softmax, *fused)
    found = [log_p.detach(), *torch.autograd.grad(log_p.mean(), [leaf for leaf in fused if leaf is not None])]
    pairs = zip(found, expected, strict=True)
    # numpy's maximum is NaN where there is one; Python's may pass it over.
    return float(np.max([float((f.cpu().double() - e).abs().max() / e.abs().max()) for f, e in pairs]))
