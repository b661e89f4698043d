"""Inputs of the mixture kernels, and what they are compared with."""

from __future__ import annotations

import numpy as np
import torch

from scvi_ext.functional import mixture

NAMES = ("log_background", "log_ratio", "log_theta", "mixing")


def draw(n_cells: int = 5, n_proteins: int = 33, theta: str = "protein", n_samples: int = 1, seed: int = 0):
    """Counts, which of them count, and the float32 parameters of the mixture."""
    g = torch.Generator().manual_seed(100 * n_proteins + 10 * n_samples + seed)
    lead = (n_cells, n_proteins) if n_samples == 1 else (n_samples, n_cells, n_proteins)

    def normal(*shape, scale=2.0):
        return scale * torch.randn(*shape, generator=g)

    y = torch.poisson(40 * torch.rand(n_cells, n_proteins, generator=g) ** 3, generator=g)
    y[:, ::7] *= 31
    y[:, 3::11] += 0.25
    measured = torch.rand(n_cells, n_proteins, generator=g) < 0.8
    return (y, measured), {
        "log_background": normal(*lead) + 1,
        "log_ratio": normal(*lead).abs(),
        "log_theta": normal(*((n_proteins,) if theta == "protein" else (n_cells, n_proteins))),
        "mixing": normal(*lead),
    }


def differentiate(log_p_of, counts, parameters, weights=None):
    """Log-probabilities, and gradients of their weighted sum."""
    leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    log_p = log_p_of(*counts, **leaves)
    weights = torch.ones_like(log_p) if weights is None else weights.to(log_p.dtype)
    gradients = torch.autograd.grad((weights * log_p).sum(), list(leaves.values()))
    return {"log_p": log_p.detach(), **dict(zip(leaves, gradients, strict=True))}


def by_formula(counts, parameters, weights=None):
    y, measured = counts
    double = {key: value.double() for key, value in parameters.items()}
    return differentiate(mixture.plain, (y.double(), measured), double, weights)


# The ends of the range.
COUNTS = (0, 0.25, 1, 8, 57, 1e3, 1e6)
MEANS = (1e-8, 1e-3, 1.0, 30.0, 1e3, 1e6)
RATIOS = (0.0, 1e-7, 0.4, 5.0, 14.0)
THETAS = (1e-4, 0.02, 1.0, 90.0, 1e6)
LOGITS = (-40.0, -1.0, 0.0, 2.0, 40.0)


def grid():
    """Every combination, each as a cell with one protein."""
    axes = (COUNTS, np.log(MEANS), RATIOS, np.log(THETAS), LOGITS)
    columns = (torch.from_numpy(c.reshape(-1, 1)).float() for c in np.meshgrid(*axes, indexing="ij"))
    y, *parameters = columns
    return (y, torch.ones_like(y, dtype=torch.bool)), dict(zip(NAMES, parameters, strict=True))
