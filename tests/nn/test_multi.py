from __future__ import annotations

import inspect

import pytest
import torch
from _tolerances import FLOAT32, N_STANDARD_ERRORS
from torch.testing import assert_close

from scvi_ext.nn.multi import MultiDecoder, MultiEncoder

B, L, G = 9, 3, 7
N_INPUT = (5, 4, 6)
REQUIRED = inspect.Parameter.empty


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def arguments(cls) -> dict[str, object]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def test_arguments_and_defaults_of_the_seed():
    assert arguments(MultiEncoder) == {
        "n_heads": REQUIRED,
        "n_input_list": REQUIRED,
        "n_output": REQUIRED,
        "n_hidden": 128,
        "n_layers_individual": 1,
        "n_layers_shared": 2,
        "n_cat_list": None,
        "dropout_rate": 0.1,
    }
    assert arguments(MultiDecoder) == {
        "n_input": REQUIRED,
        "n_output": REQUIRED,
        "n_hidden_conditioned": 32,
        "n_hidden_shared": 128,
        "n_layers_conditioned": 1,
        "n_layers_shared": 1,
        "n_cat_list": None,
        "dropout_rate": 0.2,
    }


# ---- encoder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder() -> MultiEncoder:
    return MultiEncoder(3, N_INPUT, L, n_hidden=8)


@pytest.mark.parametrize("head", range(3))
def test_each_data_set_has_a_head_of_its_own(encoder, head):
    encoder.eval()
    x = torch.rand(B, N_INPUT[head])
    mean, var, sample = encoder(x, head)
    q = encoder.posterior(x, head)
    assert mean.shape == var.shape == sample.shape == (B, L)
    h = encoder.encoder_shared(encoder.encoders[head](x), instance_id=head)
    assert_close(mean, encoder.mean_encoder(h), **FLOAT32)
    assert_close(var, torch.exp(encoder.var_encoder(h)), **FLOAT32)
    assert torch.equal(q.loc, mean)
    assert_close(q.scale**2, var, **FLOAT32)


def test_the_sample_is_one_of_the_posterior(encoder):
    n = 100_000
    encoder.eval()
    mean, var, sample = encoder(torch.rand(1, N_INPUT[1]).expand(n, -1), 1)
    standardised = (sample - mean) / torch.sqrt(var)
    assert (standardised.mean(0).abs() < N_STANDARD_ERRORS / n**0.5).all()
    assert ((standardised.var(0) - 1).abs() < N_STANDARD_ERRORS * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("head", range(3))
def test_only_the_head_and_what_is_shared_learn_from_a_data_set(encoder, head):
    encoder(torch.rand(B, N_INPUT[head]), head)[2].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if name.startswith("encoders."):
            expected = name.startswith(f"encoders.{head}.")
        else:
            expected = "batch_norm" not in name or f"batch_norm.{head}." in name
        assert (parameter.grad is not None) == expected, name


def test_statistics_of_one_data_set_are_not_those_of_another(encoder):
    norms = [layer.batch_norm for layer in encoder.encoder_shared.layers]
    assert [len(of_layer) for of_layer in norms] == [3, 3]
    before = [norm.running_mean.clone() for of_layer in norms for norm in of_layer]
    encoder(5 + torch.rand(B, N_INPUT[2]), 2)
    after = [norm.running_mean for of_layer in norms for norm in of_layer]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False] * 2


def test_a_huge_log_variance_stays_finite(encoder):
    with torch.no_grad():
        encoder.var_encoder.bias.fill_(1e6)
    assert encoder.eval().posterior(torch.rand(B, N_INPUT[0]), 0).scale.isfinite().all()


def test_there_is_one_number_of_genes_for_each_head():
    with pytest.raises(ValueError, match="n_input_list has 2 entries; one for each of 3 heads is needed"):
        MultiEncoder(3, (5, 4), L)


# ---- decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioned", [0, 1, 2])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_layers_and_maps(conditioned, shared):
    decoder = MultiDecoder(L, G, 6, 8, conditioned, shared, [3], n_heads=2).eval()
    z, library, batch = torch.randn(B, L), torch.full((B, 1), 2.0), torch.arange(B) % 3
    scale, r, rate, dropout = decoder(z, 1, library, "gene-cell", batch)
    for values in (scale, r, rate, dropout):
        assert values.shape == (B, G)
    assert_close(scale.sum(-1), torch.ones(B), **FLOAT32)
    assert_close(rate, torch.exp(library) * scale, **FLOAT32)
    assert decoder(z, 1, library, "gene", batch)[1] is None
    # The batch reaches the layers that are conditioned on it, and nothing else.
    elsewhere = decoder(z, 1, library, "gene", (batch + 1) % 3)[0]
    assert torch.equal(scale, elsewhere) == (conditioned == 0)
    with torch.no_grad():
        for layers in (decoder.px_decoder_conditioned, decoder.px_decoder_final):
            for layer in [] if layers is None else layers.layers:
                layer.batch_norm[0].bias.fill_(1.0)
    own, other = (decoder(z, head, library, "gene", batch)[0] for head in (1, 0))
    assert torch.equal(own, scale)
    assert torch.equal(other, scale) == (conditioned + shared == 0)


def test_without_layers_logits_are_linear():
    decoder = MultiDecoder(L, G, n_layers_conditioned=0, n_layers_shared=0)
    z = torch.randn(B, L)
    assert torch.equal(decoder.hidden(z, 0), z)
    logits, *_ = decoder.heads(z)
    assert_close(logits, z @ decoder.px_scale_decoder.weight.T + decoder.px_scale_decoder.bias, **FLOAT32)


def test_some_genes_are_a_part_of_all():
    decoder, genes = MultiDecoder(L, G, n_layers_conditioned=0, n_layers_shared=0), torch.tensor([5, 0, 3])
    z = torch.randn(2, B, L)
    for every, some in zip(decoder.heads(z), decoder.heads(z, genes), strict=True):
        assert_close(some, every[..., genes], **FLOAT32)


def test_maps_that_are_not_wanted_are_not_there():
    decoder = MultiDecoder(L, G, gene_cell=False, zero_inflation=False).eval()
    z = torch.randn(B, L)
    assert decoder.heads(decoder.hidden(z, 0))[1:] == (None, None)
    with pytest.raises(ValueError, match="dispersion='gene-cell' needs a decoder built with gene_cell=True"):
        decoder(z, 0, torch.ones(B, 1), "gene-cell")
    with pytest.raises(ValueError, match="dispersion='gene_cell' is not one of"):
        decoder(z, 0, torch.ones(B, 1), "gene_cell")
