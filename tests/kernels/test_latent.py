"""The posterior of the latent variable and its divergence by kernels, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from _tolerances import FLOAT32
from torch import nn
from torch.testing import assert_close

from scvi_ext._contract import Posterior
from scvi_ext.functional.divergences import kl_standard_normal
from scvi_ext.kernels import latent
from scvi_ext.nn.encoders import MAX_LOG_VAR, VAR_EPS, Encoder


def maps(n_hidden, n_latent, spread):
    """Linear maps to mean and log variance, whose log variances go from below to beyond what is kept of them."""
    layers = [nn.Linear(n_hidden, n_latent), nn.Linear(n_hidden, n_latent)]
    with torch.no_grad():
        layers[1].weight *= spread
    return layers


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize(("n_cells", "n_hidden", "n_latent"), [(1, 1, 1), (5, 7, 3), (129, 128, 10)])
def test_posterior_and_gradients(n_cells, n_hidden, n_latent, spread):
    torch.manual_seed(0)
    mean, log_var = maps(n_hidden, n_latent, spread)
    h = torch.randn(n_cells, n_hidden, requires_grad=True)
    here = [h, *mean.parameters(), *log_var.parameters()]
    there = [t.detach().double().requires_grad_() for t in here]
    loc, scale = latent.posterior(h, mean, log_var, MAX_LOG_VAR, VAR_EPS)
    log_variance = there[0] @ there[3].T + there[4]
    exact = there[0] @ there[1].T + there[2], torch.sqrt(torch.exp(log_variance.clamp(max=MAX_LOG_VAR)) + VAR_EPS)
    if spread > 1 and n_cells > 100:
        assert (log_variance > MAX_LOG_VAR).any()
        assert (log_variance < torch.log(torch.tensor(VAR_EPS))).any()
    assert_close(loc.double(), exact[0], **FLOAT32)
    # An error of the log variance, of some roundings of its size, is one of its exponential, relative to that.
    roundings = 1 + float(log_variance.detach().abs().max())
    assert ((scale - exact[1]).abs() / exact[1]).max() <= FLOAT32["rtol"] * roundings
    d_loc, d_scale = torch.randn(n_cells, n_latent), torch.randn(n_cells, n_latent) / scale.detach()
    found = torch.autograd.grad([loc, scale], here, [d_loc, d_scale])
    expected = torch.autograd.grad(exact, there, [d_loc.double(), d_scale.double()])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= FLOAT32["rtol"] * roundings * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("scale", [1e-2, 0.3, 1.0, 20.0, 2e4])
@pytest.mark.parametrize("n_latent", [1, 10, 33])
def test_divergence_and_gradients(scale, n_latent):
    torch.manual_seed(0)
    q = Posterior(torch.randn(17, n_latent), scale * (0.5 + torch.rand(17, n_latent)))
    here = [t.requires_grad_() for t in q]
    there = [t.detach().double().requires_grad_() for t in q]
    found, expected = kl_standard_normal(q), kl_standard_normal(Posterior(*there))
    assert_close(found.double(), expected, **FLOAT32)
    d_kl = torch.randn(17)
    gradients = torch.autograd.grad(found, here, d_kl), torch.autograd.grad(expected, there, d_kl.double())
    for a, b in zip(*gradients, strict=True):
        assert_close(a.double(), b, **FLOAT32)


def test_a_divergence_near_nothing_is_not_lost_in_rounding():
    near = Posterior(torch.full((1, 10), 1e-3), torch.full((1, 10), 1 + 1e-3))
    exact = kl_standard_normal(Posterior(*(t.double() for t in near)))
    assert (kl_standard_normal(near) - exact).abs() <= 10 * 2.0**-23  # a rounding of 1 for each unit


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad):
    loc, scale = torch.zeros(3, 2), torch.ones(3, 2)
    scale[1, 0] = bad
    kl = latent.kl_standard_normal(loc, scale)
    assert kl.isfinite().tolist() == [True, False, True]
    mean, log_var = maps(4, 2, 1.0)
    h = torch.randn(3, 4)
    h[1] = bad
    loc, scale = latent.posterior(h, mean, log_var, MAX_LOG_VAR, VAR_EPS)
    assert loc.isfinite().all(-1).tolist() == [True, False, True]


def test_an_encoder_says_the_same_in_float64():
    torch.manual_seed(0)
    encoder = Encoder(20, 4, dropout_rate=0.0)
    exact = Encoder(20, 4, dropout_rate=0.0).double()
    exact.load_state_dict(encoder.state_dict())
    x = torch.randn(30, 20)
    for a, b in zip(encoder.posterior(x), exact.posterior(x.double()), strict=True):
        assert_close(a.double(), b, **FLOAT32)
