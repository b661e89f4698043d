from __future__ import annotations

import torch
from _tolerances import FLOAT64, N_STANDARD_ERRORS
from torch.testing import assert_close

from scvi_ext._contract import Posterior
from scvi_ext.functional.sampling import reparameterize_gaussian, sample_normal

N = 200_000
LOC = torch.tensor([-3.0, 0.0, 40.0], dtype=torch.float64)
SCALE = torch.tensor([0.01, 1.0, 7.0], dtype=torch.float64)


def assert_moments(samples: torch.Tensor) -> None:
    error = (samples.mean(0) - LOC).abs()
    assert (error < N_STANDARD_ERRORS * SCALE / N**0.5).all()
    # The variance of N draws has relative standard error sqrt(2 / N).
    relative = (samples.var(0) / SCALE**2 - 1).abs()
    assert (relative < N_STANDARD_ERRORS * (2 / N) ** 0.5).all()


def test_reparameterize_takes_a_variance():
    torch.manual_seed(0)
    assert_moments(reparameterize_gaussian(LOC.expand(N, 3), SCALE.expand(N, 3) ** 2))


def test_sample_normal_takes_a_standard_deviation():
    torch.manual_seed(0)
    assert_moments(sample_normal(Posterior(LOC.expand(N, 3), SCALE.expand(N, 3))))


def test_sample_normal_uses_the_given_noise():
    noise = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert_close(sample_normal(Posterior(LOC, SCALE), noise), LOC + SCALE * noise, **FLOAT64)
    samples = sample_normal(Posterior(LOC, SCALE), torch.zeros(5, 3, dtype=torch.float64))
    assert torch.equal(samples, LOC.expand(5, 3))


def test_gradients_flow_through_samples():
    mu, var = LOC.clone().requires_grad_(), (SCALE**2).requires_grad_()
    torch.manual_seed(1)
    sample = reparameterize_gaussian(mu, var)
    sample.sum().backward()
    noise = (sample.detach() - LOC) / SCALE
    assert_close(mu.grad, torch.ones_like(LOC), **FLOAT64)
    assert_close(var.grad, noise / (2 * SCALE), **FLOAT64)
