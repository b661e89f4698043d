from __future__ import annotations

import pytest
import torch
from _tolerances import FLOAT32, FLOAT64
from torch import nn
from torch.testing import assert_close

from scvi_ext.nn.decoders import DISPERSIONS, Decoder, DecoderSCVI, LinearDecoderSCVI

B, L, G, S = 9, 3, 7, 4
COUNT_DECODERS = pytest.mark.parametrize("decoder_class", [DecoderSCVI, LinearDecoderSCVI])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(B, L)


@pytest.fixture
def log_library() -> torch.Tensor:
    return 5 + torch.randn(B, 1)


# ---- normal ----------------------------------------------------------------------------------------------------------


def test_normal_decoder(z):
    decoder = Decoder(L, G, [2], n_layers=2, n_hidden=8).eval()
    codes = torch.arange(B) % 2
    mean, var = decoder(z, codes)
    h = decoder.decoder(z, codes)
    assert mean.shape == var.shape == (B, G)
    assert_close(mean, decoder.mean_decoder(h), **FLOAT32)
    assert_close(var, torch.exp(decoder.var_decoder(h)), **FLOAT32)
    assert not any(isinstance(m, nn.Dropout) for m in decoder.modules())


# ---- counts ----------------------------------------------------------------------------------------------------------


@COUNT_DECODERS
@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_seeds_call(decoder_class, dispersion, z, log_library):
    scale, r, rate, dropout = decoder_class(L, G).eval()(dispersion, z, log_library)
    assert scale.shape == rate.shape == dropout.shape == (B, G)
    assert_close(scale.sum(-1), torch.ones(B), **FLOAT32)
    assert_close(rate, torch.exp(log_library) * scale, **FLOAT32)
    if dispersion == "gene-cell":
        assert r.shape == (B, G)
    else:
        assert r is None


@COUNT_DECODERS
def test_heads_are_there_only_where_asked_for(decoder_class, z):
    decoder = decoder_class(L, G, gene_cell=False, zero_inflation=False)
    logits, r, dropout = decoder.eval().heads(z)
    assert logits.shape == (B, G)
    assert r is None
    assert dropout is None
    assert {name.split(".")[0] for name, _ in decoder.named_parameters()} < {
        "px_decoder",
        "px_scale_decoder",
        "factor_regressor",
    }


@COUNT_DECODERS
def test_gene_cell_needs_its_head(decoder_class, z, log_library):
    with pytest.raises(ValueError, match="dispersion='gene-cell' needs a decoder built with gene_cell=True"):
        decoder_class(L, G, gene_cell=False)("gene-cell", z, log_library)


@COUNT_DECODERS
def test_unknown_dispersion(decoder_class, z, log_library):
    with pytest.raises(ValueError, match="dispersion='cell' is not one of 'gene', 'gene-batch', 'gene-cell'"):
        decoder_class(L, G)("cell", z, log_library)


@COUNT_DECODERS
def test_unknown_scale_activation(decoder_class):
    with pytest.raises(ValueError, match="scale_activation='relu' is not one of 'softmax', 'softplus'"):
        decoder_class(L, G, scale_activation="relu")


@COUNT_DECODERS
def test_softplus_scale_is_positive_and_free_in_its_sum(decoder_class, z, log_library):
    scale = decoder_class(L, G, scale_activation="softplus").eval()("gene", z, log_library)[0]
    assert (scale > 0).all()
    assert (scale.sum(-1) - 1).abs().min() > 0.1


@COUNT_DECODERS
def test_the_scale_alone_is_that_of_all_heads(decoder_class):
    decoder, codes, z = decoder_class(L, G, [3]).eval(), torch.arange(B) % 3, torch.randn(B, L)
    assert_close(decoder.scale(z, codes), decoder.scale_activation(decoder.heads(z, codes)[0]), **FLOAT32)


@COUNT_DECODERS
def test_samples_are_independent(decoder_class):
    decoder, codes = decoder_class(L, G, [3]).eval(), torch.arange(B) % 3
    z = torch.randn(S, B, L)
    together = decoder.heads(z, codes)
    alone = [decoder.heads(z[s], codes) for s in range(S)]
    for i, parameter in enumerate(together):
        assert_close(parameter, torch.stack([one[i] for one in alone]), **FLOAT32)


@COUNT_DECODERS
def test_covariates_change_every_parameter(decoder_class, z, log_library):
    decoder, codes = decoder_class(L, G, [3]).eval(), torch.arange(B) % 3
    here = decoder("gene-cell", z, log_library, codes)
    there = decoder("gene-cell", z, log_library, codes.roll(1))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(here, there, strict=True))


def test_layers_of_the_network_decoder():
    decoder = DecoderSCVI(L, G, [3], 2, 8, use_batch_norm=False, use_layer_norm=True, inject_covariates=False)
    assert [layer.linear.in_features for layer in decoder.px_decoder.layers] == [L + 3, 8]
    kinds = {type(m) for m in decoder.modules()}
    assert nn.LayerNorm in kinds
    assert not kinds & {nn.BatchNorm1d, nn.Dropout}


# ---- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_batch_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale_activation", ["softmax", "softplus"])
def test_linear_decoder_is_linear_in_z(use_batch_norm, bias, scale_activation):
    decoder = LinearDecoderSCVI(L, G, [2], use_batch_norm=use_batch_norm, bias=bias, scale_activation=scale_activation)
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    decoder.double().eval()
    codes, log_library = torch.arange(B) % 2, torch.zeros(B, 1, dtype=torch.float64)

    def linear_predictors(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale, r, _, dropout = decoder("gene-cell", z, log_library, codes)
        if scale_activation == "softplus":
            return torch.log(torch.expm1(scale)), r, dropout
        logits = torch.log(scale)  # the softmax leaves a constant per cell open
        return logits - logits.mean(-1, keepdim=True), r, dropout

    a, b = torch.randn(2, B, L, dtype=torch.float64)
    for at_a, at_b, between in zip(*(linear_predictors(z) for z in (a, b, 0.3 * a + 0.7 * b)), strict=True):
        assert_close(between, 0.3 * at_a + 0.7 * at_b, **FLOAT64)


def test_linear_decoder_has_no_bias_of_its_own_by_default():
    names = {name for name, _ in LinearDecoderSCVI(L, G).factor_regressor.named_parameters()}
    assert names == {"layers.0.linear.weight", "layers.0.batch_norm.0.weight", "layers.0.batch_norm.0.bias"}


@pytest.mark.parametrize("layers", [{"n_layers": 2}, {"n_hidden": 64}])
def test_linear_decoder_refuses_layers(layers):
    with pytest.raises(ValueError, match="a linear decoder has neither layers nor hidden units"):
        LinearDecoderSCVI(L, G, **layers)


def test_the_batch_starts_stronger_than_z():
    torch.manual_seed(0)
    first = DecoderSCVI(10, 20, [5]).px_decoder.layers[0].linear.weight
    ratio = first[:, 10:].std() / first[:, :10].std()
    assert 4 < ratio < 6  # 640 and 1,280 uniform numbers, one five times the other
