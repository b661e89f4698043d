"""bfloat16 inputs of matrix products while training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scvi_ext as sx
from scvi_ext._contract import Minibatch
from scvi_ext.engine.device import _has_bf16, arithmetic, check_precision
from scvi_ext.functional import products
from scvi_ext.kernels import dense
from scvi_ext.models.scvi import VAE

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not _has_bf16(CPU), reason="needs a processor with bfloat16 instructions")


@pytest.fixture
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(dense, "_LARGE", 0)


def test_unknown_precision(registered):
    with pytest.raises(ValueError, match="precision='fp16' is not one of 'bf16', 'float32'"):
        sx.tl.fit(registered, max_epochs=1, precision="fp16")
    assert "fits" not in registered.uns["scvi_ext"]


@pytest.mark.parametrize(
    "lacking", [(torch.backends.mkldnn, "is_available"), (torch.cpu, "_is_avx512_bf16_supported")], ids=lambda x: x[1]
)
def test_a_processor_without_bfloat16_says_so(registered, monkeypatch, lacking):
    monkeypatch.setattr(*lacking, lambda: False)
    with pytest.raises(ValueError, match="cpu has no bfloat16 arithmetic: use precision='float32'"):
        sx.tl.fit(registered, max_epochs=1, precision="bf16")
    assert check_precision("float32", CPU) == "float32"


def test_the_setting_of_the_process_is_given_back(nothing_is_small):
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    exact = products.linear(x, weight)
    with arithmetic(CPU, "bf16"):
        assert not torch.equal(products.linear(x, weight), exact)
    with arithmetic(CPU, "float32"):
        assert torch.equal(products.linear(x, weight), exact)
    with pytest.raises(KeyboardInterrupt), arithmetic(CPU, "bf16"):
        raise KeyboardInterrupt
    assert torch.equal(products.linear(x, weight), exact)


def test_small_products_are_not_rounded():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with arithmetic(CPU, "bf16"):
        assert torch.equal(products.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("shape", [(7, 64), (3, 7, 64)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_factors_are_rounded_and_sums_are_not(shape, has_bias, nothing_is_small):
    """Each factor by at most 2^-8 of itself, and the result once more; against float64."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(50, 64, requires_grad=True)
    bias = torch.full((50,), 1000.0, requires_grad=True) if has_bias else None  # would drown all else in bfloat16
    d_y = torch.randn(*shape[:-1], 50)
    with arithmetic(CPU, "bf16"):
        y = products.linear(x, weight, bias)
    parameters = [x, weight] if bias is None else [x, weight, bias]
    gradients = torch.autograd.grad(y, parameters, d_y)
    assert {t.dtype for t in (y, *gradients)} == {torch.float32}
    x, weight, d_y = (t.detach().double() for t in (x, weight, d_y))
    flat, of_cells = x.flatten(0, -2), d_y.flatten(0, -2)
    for found, one, other in (
        (y if bias is None else y - bias, x, weight.t()),
        (gradients[0], d_y, weight),
        (gradients[1], of_cells.t(), flat),
    ):
        bound = 1.01 * (2**-7 * (one.abs() @ other.abs()) + 2**-8 * (one @ other).abs())
        slack = 0 if bias is None else 1e-3  # of 1000 + y in float32
        assert ((found - one @ other).abs() <= bound + slack).all()
        assert not torch.equal(found, (one @ other).float())
    if bias is not None:
        torch.testing.assert_close(gradients[2].double(), of_cells.sum(0), rtol=1e-5, atol=1e-5)


@needs_bf16
@pytest.mark.parametrize("model", ["ldvae", "vaec", "scanvi", "autozi"])
def test_no_model_takes_it_for_nothing(counts, model, nothing_is_small):
    sx.pp.setup_anndata(counts, batch_key="batch", labels_key="cell_type")
    for precision in ("float32", "bf16"):
        sx.tl.fit(counts, model, key_added=precision, max_epochs=2, n_hidden=16, n_latent=4, precision=precision)
    single, rounded = (sx.get.history(counts, key)["elbo_validation"].to_numpy() for key in ("float32", "bf16"))
    assert not np.array_equal(single, rounded)
    np.testing.assert_allclose(rounded, single, rtol=0.02)


@needs_bf16
def test_a_fit_in_bfloat16_learns_the_same(make_counts, nothing_is_small):
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
