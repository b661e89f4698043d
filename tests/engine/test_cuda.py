"""What the processor computes, a CUDA device computes too."""

import io

import numpy as np
import pytest
import scanpy as sc
import torch

import scvi_ext as sx
from scvi_ext.data.blocks import Block
from scvi_ext.data.registry import read_setup
from scvi_ext.data.store import CellStore
from scvi_ext.engine import graph

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def adata():
    adata = sx.datasets.synthetic_iid(n_cells_batch=150, n_genes=80, n_proteins=0)
    sx.pp.setup_anndata(adata, batch_key="batch")
    return adata


def test_rows_are_gathered_exactly(adata):
    store = CellStore.from_adata(adata, read_setup(adata))
    rows = np.array([5, 0, 299, 5, 17])
    block = Block(store, torch.device("cuda"))
    np.testing.assert_array_equal(block.minibatch(block.rows(rows)).x.cpu().numpy(), store.counts[rows].toarray())


def test_read_outs_agree_with_the_processor(adata, monkeypatch):
    sx.tl.fit(adata, max_epochs=3, device="cpu")
    monkeypatch.setattr(sx.settings, "device", "cpu")
    sx.tl.get_latent(adata, key_added="cpu")
    elbo = sx.tl.get_elbo(adata)
    monkeypatch.setattr(sx.settings, "device", "cuda")
    sx.tl.get_latent(adata, key_added="cuda")
    # float32 matrix products in another order: about 1e-6 each, through three layers
    np.testing.assert_allclose(adata.obsm["cuda"], adata.obsm["cpu"], atol=1e-4)
    np.testing.assert_allclose(sx.tl.get_elbo(adata), elbo, rtol=1e-4)


def test_a_fit_with_proteins_agrees_with_the_processor(monkeypatch):
    adata = sx.datasets.synthetic_cite(n_cells_batch=150, n_genes=80, n_missing=3, seed=0)
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein_expression")
    sx.tl.fit(adata, "totalvi", max_epochs=3, device="cpu")
    elbo = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(sx.settings, "device", device)
        elbo[device] = sx.tl.get_elbo(adata)
    np.testing.assert_allclose(elbo["cuda"], elbo["cpu"], rtol=1e-4)


def test_a_fit_learns_and_goes_on_exactly(adata):
    sx.tl.fit(adata, max_epochs=6, device="cuda", checkpoint=True)
    history = sx.get.history(adata)
    assert history["elbo_train"].iloc[-1] > history["elbo_train"].iloc[0]
    assert adata.uns["scvi_ext"]["fits"]["scvi"]["status"]["device"].startswith("cuda")
    before = adata.uns["scvi_ext"]["fits"]["scvi"]["state"]
    sx.tl.fit(adata, device="cuda", resume=True)  # nothing is left to do
    after = adata.uns["scvi_ext"]["fits"]["scvi"]["state"]
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("scvi", {}),
        ("scvi", {"library": "latent", "n_layers": 2, "reconstruction_loss": "nb"}),
        ("scanvi", {}),
        ("scanvi", {"dispersion": "gene-label", "training": "alternate", "n_samples_per_label": 10}),
        ("vaec", {"library": "latent"}),
        ("classifier", {}),
        ("totalvi", {}),
        ("totalvi", {"library": "latent", "latent_distribution": "ln", "reconstruction_loss_gene": "zinb"}),
        ("totalvi", {"protein_dispersion": "protein-batch", "protein_efficiency": True}),
    ],
    ids=str,
)
def test_a_captured_step_is_the_step_to_the_last_bit(model, options, monkeypatch):
    def state_of(adata):
        adata.obs["known"] = adata.obs["labels"].astype(str).where(np.arange(adata.n_obs) % 2 == 0, "?")
        adata.obsm["protein_expression"].loc[adata.obs["batch"] == "batch_1", "protein_0"] = 0  # not measured there
        roles = {"batch_key": "batch", "labels_key": "known", "unlabeled_category": "?"}
        sx.pp.setup_anndata(adata, protein_obsm_key="protein_expression", **roles)
        sx.tl.fit(adata, model, max_epochs=7, batch_size=32, device="cuda", seed=3, **options)  # 9 steps: 8 and 1
        return adata.uns["scvi_ext"]["fits"][model]["state"]

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    data = {"n_cells_batch": 155, "n_genes": 80, "n_proteins": 9}
    captured = state_of(sx.datasets.synthetic_iid(**data))
    monkeypatch.setattr(graph, "_captured", refuse)
    one_by_one = state_of(sx.datasets.synthetic_iid(**data))
    for name, values in one_by_one.items():
        np.testing.assert_array_equal(captured[name], values, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"fool_step": "separate", "model_library_bools": (True, False)}], ids=str)
def test_a_captured_step_of_several_data_sets_is_the_step_to_the_last_bit(options, monkeypatch):
    def state():
        datasets = [sx.datasets.synthetic_iid(n_cells_batch=n, n_genes=80, n_proteins=0, seed=n) for n in (155, 30)]
        datasets = {"rna": datasets[0][:, 10:].copy(), "spatial": datasets[1][:, :40].copy()}
        for adata in datasets.values():
            sx.pp.setup_anndata(adata, batch_key="batch")
        sx.tl.fit(datasets, "gimvi", max_epochs=7, batch_size=32, device="cuda", seed=3, **options)
        return datasets["spatial"].uns["scvi_ext"]["fits"]["gimvi"]["state"]

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    captured = state()
    monkeypatch.setattr(graph, "_captured", refuse)
    for name, values in state().items():
        np.testing.assert_array_equal(captured[name], values, err_msg=name)


def test_a_step_that_cannot_be_captured_is_run_and_the_reason_logged(adata, monkeypatch):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "_captured", refuse)
    with monkeypatch.context() as patched:
        patched.setattr(sc.settings, "verbosity", 3)
        patched.setattr(sc.settings, "logfile", (said := io.StringIO()))
        sx.tl.fit(adata, max_epochs=2, device="cuda")
    assert "cannot be captured: operation not permitted when stream is capturing" in said.getvalue()


def test_bfloat16_learns_the_same(adata):
    sx.tl.fit(adata, max_epochs=10, device="cuda", key_added="float32")
    sx.tl.fit(adata, max_epochs=10, device="cuda", key_added="bf16", precision="bf16")
    a, b = (sx.get.history(adata, key)["elbo_validation"].iloc[-1] for key in ("float32", "bf16"))
    np.testing.assert_allclose(b, a, rtol=0.02)  # two seeds differ by about as much
