from __future__ import annotations

import pytest
import torch
from _tolerances import FLOAT64, N_STANDARD_ERRORS
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing import assert_close

from scvi_ext._contract import Posterior
from scvi_ext.functional.divergences import kl_normal, kl_standard_normal, log_density

B, L = 6, 3


@pytest.fixture
def q() -> Posterior:
    return normal(0)


@pytest.fixture
def p() -> Posterior:
    return normal(1)


def normal(seed: int) -> Posterior:
    generator = torch.Generator().manual_seed(seed)
    loc, log_scale = torch.randn(2, B, L, generator=generator, dtype=torch.float64)
    return Posterior(loc, torch.exp(0.5 * log_scale))


def torchs(p: Posterior) -> Independent:
    return Independent(Normal(p.loc, p.scale), 1)


def test_kl_is_torchs(q, p):
    assert_close(kl_normal(q, p), kl_divergence(torchs(q), torchs(p)), **FLOAT64)


def test_kl_to_the_standard_normal_is_torchs(q):
    standard = Posterior(torch.zeros_like(q.loc), torch.ones_like(q.scale))
    assert_close(kl_standard_normal(q), kl_divergence(torchs(q), torchs(standard)), **FLOAT64)
    assert_close(kl_standard_normal(q), kl_normal(q, standard), **FLOAT64)


def test_kl_is_the_closed_form_of_the_seed(q):
    var = q.scale**2
    expected = 0.5 * (var + q.loc**2 - torch.log(var) - 1).sum(-1)
    assert_close(kl_standard_normal(q), expected, **FLOAT64)


def test_kl_is_positive_and_zero_only_for_equals(q, p):
    assert (kl_normal(q, p) > 0).all()
    assert (kl_normal(p, q) > 0).all()
    assert_close(kl_normal(q, q), torch.zeros(B, dtype=torch.float64), **FLOAT64)


def test_kl_is_the_mean_log_ratio_of_samples(q, p):
    n = 200_000
    noise = torch.randn(n, B, L, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = q.loc + q.scale * noise
    log_ratio = log_density(z, q) - log_density(z, p)  # (n, B)
    error = (log_ratio.mean(0) - kl_normal(q, p)).abs()
    assert (error < N_STANDARD_ERRORS * log_ratio.std(0) / n**0.5).all()


def test_log_density_is_torchs(q):
    value = normal(2).loc
    assert_close(log_density(value, q), torchs(q).log_prob(value), **FLOAT64)


@pytest.mark.parametrize(
    "function",
    [kl_normal, lambda q, p: kl_standard_normal(q), lambda q, p: log_density(p.loc, q)],
    ids=["kl_normal", "kl_standard_normal", "log_density"],
)
def test_gradients(q, p, function):
    tensors = [t.requires_grad_() for t in (*q, *p)]
    assert torch.autograd.gradcheck(lambda a, b, c, d: function(Posterior(a, b), Posterior(c, d)), tensors)
