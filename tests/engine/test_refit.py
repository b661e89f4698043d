from __future__ import annotations

import pytest
import torch

import scvi_ext as sx
from scvi_ext.data.registry import read_setup
from scvi_ext.data.store import CellStore
from scvi_ext.engine.plan import make_plan
from scvi_ext.engine.refit import refit_encoders


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"library": "latent", "n_layers": 2},
        {"encode_covariates": True, "batch_representation": "embedding"},
        {"latent_distribution": "ln", "use_layer_norm": "both", "reconstruction_loss": "nb"},
        {"reconstruction_loss": "normal", "dispersion": "gene-batch", "use_batch_norm": "none"},
        {"model": "ldvae", "reconstruction_loss": "bernoulli"},
    ],
    ids=lambda o: ",".join(map(str, o.values())) or "default",
)
def test_only_encoders_change(registered, options):
    sx.tl.fit(registered, n_hidden=8, n_latent=2, max_epochs=2, **options)
    module = sx.get.model(registered)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    store = CellStore.from_adata(registered, read_setup(registered))
    plan = make_plan(
        "auto",
        n_cells=201,
        n_train=201,
        batch_size=None,
        max_epochs=2,
        lr=1e-2,
        kl_warmup=0.0,
        weight_decay=0.0,
        peak_lr=1e-2,
        effort=0.0,
    )
    assert {plan.kl_weight_at(step) for step in range(plan.n_steps)} == {1.0}
    refit_encoders(module, store, plan, seed=0, device=torch.device("cpu"), show_progress=False)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    of_encoders = {
        name
        for name, _ in module.named_parameters()
        if name.startswith("z_encoder.") or name.startswith("library.encoder.")
    }
    assert changed == of_encoders
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not module.training
