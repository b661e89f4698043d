"""Modules with fused likelihoods and sparse minibatches are the same modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _small import OF_GENES, build, given, label, make_cells, noise, variants
from _tolerances import FIT_WITH_KERNEL, MODULE_WITH_KERNEL
from torch.testing import assert_close

import scvi_ext as sx
from scvi_ext._contract import Minibatch
from scvi_ext.functional import fused
from scvi_ext.kernels.sparse import SparseRows
from scvi_ext.models.scvi import VAE

KERNELS = ("zinb", "nb", "poisson")
LIKELIHOOD = {"reconstruction_loss", OF_GENES["reconstruction_loss"]}
WITH_KERNEL = [(name, options) for name, options in variants() if {options.get(o) for o in LIKELIHOOD} & {*KERNELS}]


def no_kernel(name, device, dtype):
    return None, "plain formula, for comparison"


def refuse(*inputs):
    raise AssertionError("a kernel was used")


def float32(cells: Minibatch) -> Minibatch:
    columns = (c.float() if c is not None and c.is_floating_point() else c for c in cells)
    return Minibatch(*columns)


def without_dropout(module):
    for dropout in (m for m in module.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    return module


def loss_and_gradients(module, cells):
    draws = noise(module).to(next(module.parameters()).dtype)
    module.zero_grad()
    loss = module.loss(cells, kl_weight=0.5, **given(module, draws))
    loss.total.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return loss.reconstruction.detach(), gradients


@pytest.mark.parametrize(("name", "options"), WITH_KERNEL, ids=label)
def test_a_training_step_is_that_of_the_plain_formula_in_float64(name, options):
    module = without_dropout(build(name, **options))
    cells = make_cells()
    exact, exact_gradients = loss_and_gradients(module, cells)
    cells, module = float32(cells), module.float()
    sparse = cells._replace(x=SparseRows.from_dense(cells.x))
    found, gradients = loss_and_gradients(module, sparse)
    assert found.dtype == torch.float32
    scale = max(float(g.abs().max()) for g in exact_gradients.values())
    assert_close(found.double(), exact, **MODULE_WITH_KERNEL)
    assert gradients.keys() == exact_gradients.keys()
    for key, g in gradients.items():
        assert_close(g.double(), exact_gradients[key], rtol=0, atol=MODULE_WITH_KERNEL["rtol"] * scale, msg=key)


@pytest.mark.parametrize(("name", "options"), WITH_KERNEL, ids=label)
def test_a_kernel_is_used_for_sparse_rows_in_float32_only(name, options, monkeypatch):
    module, cells = build(name, **options), make_cells()
    for likelihood in module.likelihoods:
        fused.choose(likelihood, "cpu", torch.float32)  # which uses it to look at the kernel for the first time
    used = []
    plain = fused.log_likelihood
    monkeypatch.setattr(fused, "log_likelihood", lambda *inputs: used.append(1) or plain(*inputs))
    module.loss(cells)  # dense, float64
    module.loss(cells._replace(x=SparseRows.from_dense(cells.x.float())))
    assert not used
    module, cells = module.float(), float32(cells)
    dense = module.loss(cells, **given(module, noise(module).float()))
    assert not used
    sparse = module.loss(cells._replace(x=SparseRows.from_dense(cells.x)), **given(module, noise(module).float()))
    assert used == [1]
    assert dense.total.isfinite()
    assert sparse.total.isfinite()


@pytest.mark.parametrize("loss", ["normal", "bernoulli"])
def test_likelihoods_without_kernel_take_sparse_rows_too(loss, monkeypatch):
    monkeypatch.setattr(fused, "log_likelihood", refuse)
    module, cells = without_dropout(build("scvi", reconstruction_loss=loss)).float(), float32(make_cells())
    draws = noise(module).float()
    dense = module.loss(cells, **given(module, draws))
    sparse = module.loss(cells._replace(x=SparseRows.from_dense(cells.x)), **given(module, draws))
    for a, b in zip(dense, sparse, strict=True):
        assert_close(a, b, **MODULE_WITH_KERNEL)


# ---- a fit with kernels and one without ----------------------------------------------------------------------------

RUN = {"max_epochs": 3, "batch_size": 60, "n_hidden": 16, "n_latent": 4, "dropout_rate": 0.0}


@pytest.fixture
def fit(make_counts, monkeypatch):
    """Fit the same counts: ``fit(kernels, **options)`` gives the AnnData and the losses of the training steps."""
    loss, losses = VAE.loss, []

    def watched(module, cells, **options):
        result = loss(module, cells, **options)
        if "kl_weight" in options:
            losses.append(result.total.item())
        return result

    monkeypatch.setattr(VAE, "loss", watched)
    monkeypatch.setattr(VAE, "loss_at_once", lambda module, n_cells: None)
    choose = fused.choose

    def run(kernels, **options):
        adata = make_counts()
        sx.pp.setup_anndata(adata, batch_key="batch", labels_key="cell_type", size_factor_key="size")
        monkeypatch.setattr(fused, "choose", choose if kernels else no_kernel)
        losses.clear()
        sx.tl.fit(adata, **RUN | options)
        return adata, list(losses)

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reconstruction_loss": "nb", "dispersion": "gene-batch"},
        {"reconstruction_loss": "poisson"},
        {"dispersion": "gene-cell", "library": "size_factor"},
        {"dispersion": "gene-label", "library": "latent"},
    ],
    ids=str,
)
def test_a_fit_with_kernels_is_a_fit_without(fit, options):
    (fused_fit, losses), (plain_fit, plain_losses) = fit(True, **options), fit(False, **options)
    assert len(losses) == len(plain_losses) == 12
    np.testing.assert_allclose(losses[0], plain_losses[0], **MODULE_WITH_KERNEL)
    elbo, plain_elbo = (sx.get.history(a)["elbo_validation"].iloc[-1] for a in (fused_fit, plain_fit))
    np.testing.assert_allclose(elbo, plain_elbo, **FIT_WITH_KERNEL)


def test_a_fit_says_why_it_has_no_kernel(fit, logged):
    fit(False)
    assert "plain formula, for comparison" in logged()
