from __future__ import annotations

import pytest
import torch
from _tolerances import FLOAT32, N_STANDARD_ERRORS
from torch import nn
from torch.testing import assert_close

from scvi_ext.nn.encoders import Encoder, EncoderTOTALVI

B, G, L = 9, 7, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_variance_is_an_exponential_plus_its_floor():
    encoder, x = Encoder(G, L, n_layers=2, n_hidden=8).eval(), torch.randn(B, G)
    h = encoder.encoder(x)
    mean, var, sample = encoder(x)
    assert mean.shape == var.shape == sample.shape == (B, L)
    assert_close(mean, encoder.mean_encoder(h), **FLOAT32)
    assert_close(var, torch.exp(encoder.var_encoder(h)) + 1e-4, **FLOAT32)


def test_posterior_holds_the_standard_deviation():
    encoder, x = Encoder(G, L, n_hidden=8).eval(), torch.randn(B, G)
    mean, var, _ = encoder(x)
    q = encoder.posterior(x)
    assert_close(q.loc, mean, **FLOAT32)
    assert_close(q.scale**2, var, **FLOAT32)


def test_the_sample_is_one_of_the_posterior():
    n = 100_000
    encoder, x = Encoder(G, L, n_hidden=8).eval(), torch.randn(1, G).expand(n, G)
    mean, var, sample = encoder(x)
    standardised = (sample - mean) / torch.sqrt(var)
    assert standardised.mean(0).abs().max() < N_STANDARD_ERRORS / n**0.5
    assert (standardised.var(0) - 1).abs().max() < N_STANDARD_ERRORS * (2 / n) ** 0.5


@pytest.mark.parametrize(("bias", "smallest", "largest"), [(1e4, 1e8, 1e9), (-1e4, 1e-4, 1.1e-4)])
def test_variance_neither_overflows_nor_vanishes(bias, smallest, largest):
    encoder = Encoder(G, L, n_hidden=8)
    nn.init.constant_(encoder.var_encoder.bias, bias)
    q = encoder.posterior(torch.randn(B, G))
    var = q.scale**2
    assert (var > 0.99 * smallest).all()
    assert (var < largest).all()
    (q.scale.sum() + torch.log(q.scale).sum()).backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_covariates_and_layer_options_are_passed_on():
    codes = torch.arange(B) % 2
    encoder = Encoder(G, L, [2], n_layers=2, n_hidden=8, use_layer_norm=True, inject_covariates=False).eval()
    assert [layer.linear.in_features for layer in encoder.encoder.layers] == [G + 2, 8]
    assert isinstance(encoder.encoder.layers[0].rest[0], nn.LayerNorm)
    x = torch.randn(B, G)
    assert not torch.equal(encoder.posterior(x, codes).loc, encoder.posterior(x, 1 - codes).loc)


def test_dropout_rate_is_the_encoders():
    def rate(**options) -> float:
        return next(m.p for m in Encoder(G, L, **options).modules() if isinstance(m, nn.Dropout))

    assert rate() == 0.1
    assert rate(dropout_rate=0.3) == 0.3


@pytest.mark.parametrize("distribution", ["ln", "normal"])
def test_the_encoder_of_totalvi_gives_z_and_the_library(distribution):
    encoder, x = EncoderTOTALVI(G, L, [2], n_hidden=8, distribution=distribution).eval(), torch.randn(B, G).abs()
    codes = torch.arange(B) % 2
    qz_m, qz_v, ql_m, ql_v, latent, untransformed = encoder(x, codes)
    assert qz_m.shape == qz_v.shape == latent["z"].shape == (B, L)
    assert ql_m.shape == ql_v.shape == latent["l"].shape == (B, 1)
    for found, expected in (((qz_m, qz_v), encoder.z_encoder), ((ql_m, ql_v), encoder.l_encoder)):
        q = expected.posterior(x, codes)
        assert_close(found, (q.loc, q.scale**2), **FLOAT32)
    assert_close(latent["l"], torch.exp(untransformed["l"]), **FLOAT32)
    z = untransformed["z"]
    assert_close(latent["z"], torch.softmax(z, -1) if distribution == "ln" else z, **FLOAT32)
    draws = torch.stack([encoder(x, codes)[-1]["z"] for _ in range(400)])
    error = torch.sqrt(qz_v / 400)
    assert ((draws.mean(0) - qz_m).abs() < N_STANDARD_ERRORS * error).all()
    with pytest.raises(ValueError, match="distribution"):
        EncoderTOTALVI(G, L, distribution="gamma")
