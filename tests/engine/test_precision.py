"""bfloat16 inputs of matrix products while training."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import scvi_ext as sx
from scvi_ext._contract import Minibatch
from scvi_ext.engine.device import _has_bf16, arithmetic, check_precision
from scvi_ext.models.scvi import VAE

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not _has_bf16(CPU), reason="needs a processor with bfloat16 instructions")


def test_unknown_precision(registered):
    with pytest.raises(ValueError, match="precision='fp16' is not one of 'bf16', 'float32'"):
        sx.tl.fit(registered, max_epochs=1, precision="fp16")
    assert "fits" not in registered.uns["scvi_ext"]


def test_a_processor_without_bfloat16_says_so(registered, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cpu has no bfloat16 arithmetic: use precision='float32'"):
        sx.tl.fit(registered, max_epochs=1, precision="bf16")
    assert check_precision("float32", CPU) == "float32"


def test_a_processor_whose_products_stay_as_they_are_has_no_bfloat16(monkeypatch):
    """Or the option would be accepted and have no effect."""
    monkeypatch.setattr("scvi_ext.engine.device.arithmetic", lambda device, precision: nullcontext())
    assert not _has_bf16(CPU)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=needs_bf16)])
def test_the_setting_of_the_process_is_given_back(precision):
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyboardInterrupt), arithmetic(CPU, precision):
        raise KeyboardInterrupt
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@needs_bf16
def test_products_are_rounded_inside_and_not_outside():
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    exact = a @ b
    with arithmetic(CPU, "float32"):
        assert torch.equal(a @ b, exact)
    with arithmetic(CPU, "bf16"):
        rounded = a @ b
    assert not torch.equal(rounded, exact)
    # Both factors of each product are rounded by at most 2^-9; sums are float32.
    assert ((rounded - exact).abs() <= 1.01 * 2**-8 * (a.abs() @ b.abs())).all()
    assert torch.equal(a @ b, exact)


@needs_bf16
def test_a_fit_in_bfloat16_learns_the_same(make_counts):
    elbos = {}
    for precision in ("float32", "bf16"):
        adata = make_counts()
        sx.pp.setup_anndata(adata, batch_key="batch")
        sx.tl.fit(adata, max_epochs=10, precision=precision)
        assert adata.uns["scvi_ext"]["fits"]["scvi"]["run"]["precision"] == precision
        elbos[precision] = sx.get.history(adata)["elbo_validation"].to_numpy()
    assert not np.array_equal(elbos["bf16"], elbos["float32"])
    np.testing.assert_allclose(elbos["bf16"], elbos["float32"], rtol=0.02)  # another seed makes more of a difference


@needs_bf16
def test_a_resumed_run_keeps_its_precision(registered):
    sx.tl.fit(registered, max_epochs=2, precision="bf16", checkpoint=True)
    with pytest.raises(ValueError, match="leave out 'precision'"):
        sx.tl.fit(registered, resume=True, precision="bf16")
    sx.tl.fit(registered, resume=True)
    assert registered.uns["scvi_ext"]["fits"]["scvi"]["run"]["precision"] == "bf16"


def test_under_casts_the_posterior_has_the_precision_of_the_parameters():
    module = VAE(50, 2, library="latent", library_log_means=[4.0, 4.0], library_log_vars=[1.0, 1.0])
    cells = Minibatch(torch.ones(8, 50), torch.zeros(8, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        qz, ql = module.posteriors(cells)
        z, log_library = module.draw(cells, (qz, ql))
        logits, _, _ = module._heads(z, cells)
    assert {t.dtype for t in (*qz, *ql, z, log_library)} == {torch.float32}  # or else no kernel would be chosen
    assert logits.dtype == torch.bfloat16


def test_a_processor_without_onednn_is_asked_nothing(monkeypatch):
    monkeypatch.setattr(torch.backends, "mkldnn", None)
    assert check_precision("float32", CPU) == "float32"
    with arithmetic(CPU, "float32"):
        pass
