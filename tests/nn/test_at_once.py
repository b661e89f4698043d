"""The loss of scVI made at once with its gradients: the same numbers as part by part, and as in float64 throughout."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from _tolerances import FIT_WITH_KERNEL, FLOAT32, MODULE_WITH_KERNEL
from torch.testing import assert_close

import scvi_ext as sx
from scvi_ext._contract import Minibatch
from scvi_ext.functional import products
from scvi_ext.functional.adversary import mixing_loss
from scvi_ext.kernels import dense
from scvi_ext.kernels.sparse import SparseRows
from scvi_ext.models.base import batch_critic
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


def outcome(vae, cells, kl_weight=0.7):
    """Parts of the loss, gradients, running statistics and the state of the generator afterwards."""
    vae = copy.deepcopy(vae)
    torch.manual_seed(2)
    loss = vae.loss(cells, kl_weight=kl_weight)
    loss.total.backward()
    return found(vae, loss)


def outcome_at_once(vae, cells, kl_weight=0.7):
    """The same where the loss is made with all its gradients."""
    vae = copy.deepcopy(vae)
    loss_at_once = vae.loss_at_once(len(cells.x))
    torch.manual_seed(2)
    loss = loss_at_once(cells, kl_weight=kl_weight)
    assert loss.total is None
    return found(vae, loss)


def found(vae, loss):
    parts = {name: getattr(loss, name).detach().clone() for name in ("reconstruction", "kl_z", "kl_library")}
    gradients = {name: p.grad.clone() for name, p in vae.named_parameters()}
    return parts | dict(vae.named_buffers()) | gradients | {"generator": torch.get_rng_state()}


def assert_same(found, expected):
    largest = max(
        float(t.abs().max()) for name, t in expected.items() if name.endswith(("weight", "bias", "log_theta"))
    )
    for name, b in expected.items():
        limit = MODULE_WITH_KERNEL["atol"] * largest + MODULE_WITH_KERNEL["rtol"] * b.double().abs()
        assert ((found[name].double() - b.double()).abs() <= limit).all(), name


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_parts_are(case):
    vae = module(**CASES[case])
    expected = outcome(vae, minibatch())
    here = outcome_at_once(vae, minibatch())
    assert here.keys() == expected.keys()
    assert_same(here, expected)


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_formulas_are_in_float64(case):
    vae = module(**(CASES[case] | {"dropout_rate": 0.0}))
    cells = minibatch()
    exact = copy.deepcopy(vae).double()
    noise = torch.zeros(len(cells.x), vae.n_noise, dtype=torch.float64)
    torch.manual_seed(2)
    noise[:, : vae.n_latent] = torch.randn(len(cells.x), vae.n_latent)  # the draws of the module itself
    there = cells._replace(x=cells.x.to_dense().double(), size_factor=cells.size_factor.double())
    loss = exact.loss(there, kl_weight=0.7, noise=noise)
    loss.total.backward()
    expected = {"reconstruction": loss.reconstruction.detach(), "kl_z": loss.kl_z.detach()}
    expected |= {name: p.grad for name, p in exact.named_parameters()}
    here = outcome_at_once(vae, cells)
    assert_same({name: here[name] for name in expected}, expected)


@pytest.mark.parametrize("case", ["defaults", "counts as they are"])
def test_rows_that_are_multiplied_as_dense_ones(case):
    vae, cells = module(**CASES[case]), minibatch()
    cells = cells._replace(x=replace(cells.x, multiply_sparse=False))
    here = outcome_at_once(vae, cells)
    assert_same(here, outcome(vae, cells))
    assert_same(here, outcome_at_once(vae, minibatch()))


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, torch.tensor(0.3)])
def test_any_weight_of_the_divergence(kl_weight):
    vae = module()
    assert_same(outcome_at_once(vae, minibatch(), kl_weight), outcome(vae, minibatch(), kl_weight))


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_large_products_are_those_of_layers(monkeypatch, in_bfloat16):
    monkeypatch.setattr(dense, "_LARGE", 1)
    vae = module()
    with products.in_bfloat16() if in_bfloat16 else nullcontext():
        here, expected = outcome_at_once(vae, minibatch()), outcome(vae, minibatch())
    if in_bfloat16:  # the first layer's product is over sparse rows in both, and all others are rounded by layers only
        assert_close(here["reconstruction"], expected["reconstruction"], rtol=2.0**-7, atol=0)
    else:
        assert_same(here, expected)


def test_one_minibatch_after_the_other():
    """Nothing of a minibatch is left in what lies in the same place for the next one."""
    vae, other = module(adversarial_mixing=3.0, n_cats_per_cov=[4, 1, 2]), minibatch()
    other = other._replace(x=other.x.rows(torch.randperm(37)), batch_index=other.batch_index.flip(0))
    expected = outcome_at_once(vae, minibatch())
    vae = copy.deepcopy(vae)
    loss_at_once = vae.loss_at_once(37)
    statistics = copy.deepcopy(dict(vae.named_buffers()))
    loss_at_once(other, 0.3)
    with torch.no_grad():
        for name, buffer in vae.named_buffers():
            buffer.copy_(statistics[name])
    torch.manual_seed(2)
    again = found(vae, loss_at_once(minibatch(), 0.7))
    for name, value in expected.items():
        assert torch.equal(again[name], value), name


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
def test_what_it_does_not_cover(options):
    assert module(**options).loss_at_once(37) is None


def test_it_is_for_training_of_all_parameters_in_float32_on_the_processor():
    assert module().loss_at_once(37) is not None
    assert module().eval().loss_at_once(37) is None
    assert module().double().loss_at_once(37) is None
    assert module().to("meta").loss_at_once(37) is None
    assert module().loss_at_once(1) is None  # one cell has no variance
    assert module(n_hidden=256).loss_at_once(2**13) is None  # more than one thread likes
    vae = module()
    vae.decoder.px_decoder.layers[0].batch_norm.eval()
    assert vae.loss_at_once(37) is None
    vae = module()
    vae.z_encoder.mean_encoder.weight.requires_grad_(False)
    assert vae.loss_at_once(37) is None
    vae = module()
    vae.decoder.px_scale_decoder.weight.register_hook(lambda gradient: 2 * gradient)
    assert vae.loss_at_once(37) is None
    vae = module()
    vae.dispersion.log_theta.requires_grad_(False)
    assert vae.loss_at_once(37) is None


def test_a_cell_that_is_not_finite_shows_in_the_loss():
    vae, cells = module(), minibatch()
    cells.x.values[3] = torch.nan
    loss = vae.loss_at_once(37)(cells)
    assert loss.reconstruction.isnan().any()
    assert vae.dispersion.log_theta.grad.isnan().all()


@pytest.mark.parametrize("multiply_sparse", [True, False])
@pytest.mark.parametrize("n_genes", [60, 62])
def test_counts_of_other_genes_are_refused(n_genes, multiply_sparse):
    x = replace(minibatch(n_genes=n_genes).x, multiply_sparse=multiply_sparse)
    for loss in (module().loss, module().loss_at_once(37)):
        with pytest.raises(ValueError, match=f"Counts of {n_genes} genes were given to a layer for 61"):
            loss(minibatch()._replace(x=x))


@pytest.mark.parametrize("n_cells", [36, 38])
def test_minibatches_of_another_size_are_refused(n_cells):
    with pytest.raises(ValueError, match=f"made for minibatches of 37 cells, and this one has {n_cells}"):
        module().loss_at_once(37)(minibatch(n_cells=n_cells))


@pytest.mark.parametrize("code", [-1, 3])
def test_a_code_that_is_no_batch_is_refused(code):
    cells = minibatch()
    cells.batch_index[5] = code
    with pytest.raises(IndexError, match="Codes of 3 categories are from 0 to 2"):
        module().loss_at_once(37)(cells)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n_batch", [2, 5])
def test_gradients_of_mixing(n_batch, sign):
    """One of the signs makes a critic that finds less than nothing, and then nothing is pulled."""
    torch.manual_seed(n_batch)
    critic = batch_critic(3.0, 4, n_batch)
    with torch.no_grad():
        for parameter in critic.output.parameters():
            parameter *= sign
    z, classes = torch.randn(23, 4), torch.randint(n_batch, (23,))
    exact, there = copy.deepcopy(critic).double(), z.double().requires_grad_()
    own = torch.nn.functional.one_hot(classes, n_batch)
    pulled = ((own - own.double().mean(0)) * exact(there)).sum(-1).mean() > 0
    mixing_loss(exact, there, classes, 0.7).backward()
    with torch.no_grad():
        d_z = at_once.Mixing(critic).gradient(classes, 0.7, z)
    assert_close(d_z.double(), there.grad, **FLOAT32)
    assert bool((d_z != 0).any()) == bool(pulled)
    for a, b in zip(critic.parameters(), exact.parameters(), strict=True):
        assert_close(a.grad.double(), b.grad, **FLOAT32)


# ---- fits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adversarial_mixing": 2.0}, {"dispersion": "gene-batch"}], ids=str)
def test_a_fit_is_the_same_as_part_by_part(make_counts, monkeypatch, options):
    made, fits = [], []
    loss_at_once = VAE.loss_at_once
    for make in (loss_at_once, lambda module, n_cells: None):
        monkeypatch.setattr(VAE, "loss_at_once", lambda *args, make=make: made.append(make(*args)) or made[-1])
        adata = make_counts()
        sx.pp.setup_anndata(adata, batch_key="batch")
        sx.tl.fit(adata, max_epochs=3, batch_size=60, n_hidden=16, n_latent=4, **options)
        sx.tl.get_latent(adata)
        fits.append(adata)
    assert [m is not None for m in made] == [True, True, False, False]  # of the rehearsal, and of the fit
    whole, parts = (sx.get.history(adata).drop(columns="cells_per_second") for adata in fits)
    np.testing.assert_allclose(whole, parts, **FIT_WITH_KERNEL)
