"""The loss of scVI as one node of autograd: the same numbers as part by part, and as in float64 throughout."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from _tolerances import FLOAT32, MODULE_WITH_KERNEL
from torch.testing import assert_close

from scvi_ext._contract import Minibatch
from scvi_ext.functional import products
from scvi_ext.functional.ranks import Ranks, training_as
from scvi_ext.kernels import dense
from scvi_ext.kernels.sparse import SparseRows
from scvi_ext.models.scvi import VAE
from scvi_ext.nn import at_once

CASES = {
    "defaults": {},
    "nb": {"reconstruction_loss": "nb"},
    "poisson": {"reconstruction_loss": "poisson"},
    "one batch": {"n_batch": 1},
    "gene-batch": {"dispersion": "gene-batch"},
    "gene-label": {"dispersion": "gene-label", "n_labels": 3},
    "categorical covariates": {"n_cats_per_cov": [4, 1, 2]},
    "size factor": {"library": "size_factor"},
    "counts as they are": {"log_variational": False},
    "mixing": {"adversarial_mixing": 3.0},
    "one unit, no dropout": {"n_latent": 1, "n_hidden": 5, "dropout_rate": 0.0},
}


def module(**options):
    torch.manual_seed(0)
    defaults = {"n_input": 61, "n_batch": 3, "dropout_rate": 0.2, "library": "observed"}
    return VAE(**(defaults | options)).train()


def minibatch(n_cells=37, n_genes=61, n_batch=3, n_cats_per_cov=(4, 1, 2)):
    generator = torch.Generator().manual_seed(1)
    x = torch.poisson(3 * torch.rand(n_cells, n_genes, generator=generator) ** 2, generator=generator)
    codes = [torch.randint(n, (n_cells,), generator=generator) for n in (n_batch, 3, *n_cats_per_cov)]
    size_factor = torch.rand(n_cells, generator=generator) + 0.5
    return Minibatch(SparseRows.from_dense(x), codes[0], codes[1], size_factor, torch.stack(codes[2:], dim=1))


def outcome(vae, cells, kl_weight=0.7, scale=1.0):
    """Loss, parts, gradients, running statistics and the state of the generator afterwards."""
    vae = copy.deepcopy(vae)
    torch.manual_seed(2)
    loss = vae.loss(cells, kl_weight=kl_weight)
    (scale * loss.total).backward()
    parts = {"total": loss.total.detach(), "reconstruction": loss.reconstruction.detach(), "kl_z": loss.kl_z.detach()}
    gradients = {name: p.grad for name, p in vae.named_parameters()}
    return parts | dict(vae.named_buffers()) | gradients | {"generator": torch.get_rng_state()}


def part_by_part(vae):
    vae = copy.deepcopy(vae)
    vae.goes_at_once = False
    return vae


def assert_same(found, expected):
    largest = max(
        float(t.abs().max()) for name, t in expected.items() if name.endswith(("weight", "bias", "log_theta"))
    )
    for name, b in expected.items():
        limit = MODULE_WITH_KERNEL["atol"] * largest + MODULE_WITH_KERNEL["rtol"] * b.double().abs()
        assert ((found[name].double() - b.double()).abs() <= limit).all(), name


@pytest.fixture
def asked(monkeypatch):
    """How often the loss was made at once."""
    times, whole = [], at_once.negative_elbo
    monkeypatch.setattr(at_once, "negative_elbo", lambda *args: times.append(1) or whole(*args))
    return times


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_parts_are(asked, case):
    vae = module(**CASES[case])
    found, expected = outcome(vae, minibatch()), outcome(part_by_part(vae), minibatch())
    assert len(asked) == 1
    assert found.keys() == expected.keys()
    assert_same(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_formulas_are_in_float64(asked, case):
    vae = module(**(CASES[case] | {"dropout_rate": 0.0}))
    cells = minibatch()
    exact = copy.deepcopy(vae).double()
    noise = torch.zeros(len(cells.x), vae.n_noise, dtype=torch.float64)
    torch.manual_seed(2)
    noise[:, : vae.n_latent] = torch.randn(len(cells.x), vae.n_latent)  # the draws of the module itself
    there = cells._replace(x=cells.x.to_dense().double(), size_factor=cells.size_factor.double())
    loss = exact.loss(there, kl_weight=0.7, noise=noise)
    loss.total.backward()
    expected = {"total": loss.total.detach(), "reconstruction": loss.reconstruction.detach()}
    expected |= {name: p.grad for name, p in exact.named_parameters()}
    found = outcome(vae, cells)
    assert len(asked) == 1
    assert_same({name: found[name] for name in expected}, expected)


def test_gradients_of_a_multiple_of_the_loss(asked):
    vae = module(adversarial_mixing=3.0)
    found, expected = outcome(vae, minibatch(), scale=-2.5), outcome(part_by_part(vae), minibatch(), scale=-2.5)
    assert len(asked) == 1
    assert_same(found, expected)


@pytest.mark.parametrize("case", ["defaults", "counts as they are"])
def test_rows_that_are_multiplied_as_dense_ones(asked, case):
    vae, cells = module(**CASES[case]), minibatch()
    cells = cells._replace(x=replace(cells.x, multiply_sparse=False))
    found, expected = outcome(vae, cells), outcome(part_by_part(vae), cells)
    assert len(asked) == 1
    assert_same(found, expected)
    assert_same(found, outcome(vae, minibatch()))


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, torch.tensor(0.3)])
def test_any_weight_of_the_divergence(kl_weight):
    vae = module()
    assert_same(outcome(vae, minibatch(), kl_weight), outcome(part_by_part(vae), minibatch(), kl_weight))


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_large_products_are_those_of_layers(asked, monkeypatch, in_bfloat16):
    monkeypatch.setattr(dense, "_LARGE", 1)
    vae = module()
    found = []
    for each in (vae, part_by_part(vae)):
        if in_bfloat16:
            with products.in_bfloat16():
                found.append(outcome(each, minibatch()))
        else:
            found.append(outcome(each, minibatch()))
    assert len(asked) == 1
    if in_bfloat16:  # the first layer's product is over sparse rows in both, and all others are rounded by layers only
        assert_close(found[0]["reconstruction"], found[1]["reconstruction"], rtol=2.0**-7, atol=0)
    else:
        assert_same(*found)


@pytest.mark.parametrize(
    "options",
    [
        {"n_layers": 2},
        {"use_batch_norm": "encoder"},
        {"use_batch_norm": "none"},
        {"use_layer_norm": "decoder"},
        {"dispersion": "gene-cell"},
        {"latent_distribution": "ln"},
        {"library": "latent", "library_log_means": [1.0] * 3, "library_log_vars": [1.0] * 3},
        {"encode_covariates": True},
        {"batch_representation": "embedding"},
        {"n_continuous_cov": 2},
        {"reconstruction_loss": "normal"},
        {"reconstruction_loss": "bernoulli"},
    ],
    ids=str,
)
def test_what_it_does_not_cover_goes_part_by_part(asked, options):
    cells = minibatch()._replace(continuous=torch.randn(37, 2) if "n_continuous_cov" in options else None)
    loss = module(**options).loss(cells)
    loss.total.backward()
    assert loss.total.isfinite()
    assert not asked


def test_it_is_for_training_only(asked):
    vae, cells = module(), minibatch()
    with torch.no_grad():
        vae.loss(cells)
    vae.loss(cells, noise=torch.zeros(37, vae.n_noise))
    vae.loss(cells._replace(x=cells.x.to_dense()))
    copy.deepcopy(vae).double().loss(cells._replace(x=cells.x.to_dense().double()))
    vae.decoder.px_decoder.layers[0].batch_norm.eval()
    vae.loss(cells)
    vae.eval().loss(cells)
    assert not asked
    vae.train().loss(cells)
    assert len(asked) == 1


def test_one_of_several_processes_goes_part_by_part(asked):
    vae = module(dropout_rate=0.0, use_batch_norm="both")
    with training_as(Ranks(0, 2)), pytest.raises(ValueError, match="process group"):
        vae.loss(minibatch())  # which would ask the other one
    assert not asked


def test_a_cell_that_is_not_finite_shows_in_the_loss():
    cells = minibatch()
    cells.x.values[3] = torch.nan
    loss = module().loss(cells)
    assert loss.total.isnan()
    assert loss.reconstruction.isnan().any()


@pytest.mark.parametrize("multiply_sparse", [True, False])
@pytest.mark.parametrize("n_genes", [60, 62])
def test_counts_of_other_genes_are_refused(n_genes, multiply_sparse):
    x = replace(minibatch(n_genes=n_genes).x, multiply_sparse=multiply_sparse)
    with pytest.raises(ValueError, match=f"Counts of {n_genes} genes were given to a layer for 61"):
        module().loss(minibatch()._replace(x=x))


def test_a_code_that_is_no_batch_is_refused():
    cells = minibatch()
    with pytest.raises(IndexError, match="from 0 to 2"):
        module().loss(cells._replace(batch_index=cells.batch_index + 1))


def test_hooks_and_frozen_parameters_are_respected():
    vae = module()
    expected = outcome(vae, minibatch())
    vae.z_encoder.requires_grad_(False)
    vae.decoder.px_scale_decoder.weight.register_hook(lambda gradient: 2 * gradient)
    torch.manual_seed(2)
    vae.loss(minibatch(), kl_weight=0.7).total.backward()
    assert all(p.grad is None for p in vae.z_encoder.parameters())
    name = "decoder.px_scale_decoder.weight"
    assert torch.equal(vae.get_parameter(name).grad, 2 * expected[name])


def test_nothing_of_a_step_is_left_behind():
    vae = module(n_batch=1)
    gc.collect()
    gc.disable()
    try:
        loss = vae.loss(minibatch())
        loss.total.backward()
        node = weakref.ref(loss.total.grad_fn)
        del loss
        assert node() is None  # a node that held on to its own results would wait for the collector
    finally:
        gc.enable()


def test_gradients_do_not_flow_through_the_parts():
    loss = module().loss(minibatch())
    assert loss.total.requires_grad
    assert not loss.reconstruction.requires_grad
    assert not loss.kl_z.requires_grad
    assert_close(loss.total, (loss.reconstruction + loss.kl_z).mean(), **FLOAT32)
