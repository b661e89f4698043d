"""What the training loop shows the model, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scvi_ext as sx
from scvi_ext.data.sampler import split_cells
from scvi_ext.engine import fit as engine
from scvi_ext.engine.plan import Plan
from scvi_ext.kernels.adam import Adam
from scvi_ext.models.scvi import VAE

RUN = {"max_epochs": 5, "batch_size": 50, "n_hidden": 8, "n_latent": 2}  # 181 cells: 4 steps in an epoch, 20 in all
STEPS = 4


@pytest.fixture
def watched(registered, monkeypatch):
    """A fit, with what the loss was given and gave: a list of the training steps and one of the evaluations."""
    training, evaluation, rates = [], [], []
    loss, step = VAE.loss, Adam.step

    def watched_loss(module, cells, **options):
        result = loss(module, cells, **options)
        parts = torch.stack([result.reconstruction, result.kl_z, result.kl_library]).detach().double().sum(0)
        seen = {"x": cells.x.to_dense().numpy(), "cost": parts.numpy(), "training": module.training}
        if "kl_weight" in options:
            weighted = result.reconstruction + options["kl_weight"] * result.kl_z + result.kl_library
            torch.testing.assert_close(result.total, weighted.mean())
            training.append(seen | {"kl_weight": options["kl_weight"].item()})
        elif not module.training:  # a rehearsal is neither
            evaluation.append(seen | {"gradients": torch.is_grad_enabled()})
        return result

    def watched_step(optimizer, *args):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        return step(optimizer, *args)

    monkeypatch.setattr(VAE, "loss", watched_loss)
    monkeypatch.setattr(VAE, "loss_at_once", lambda module, n_cells: None)
    monkeypatch.setattr(Adam, "step", watched_step)
    sx.tl.fit(registered, **RUN)
    return registered, training, evaluation, rates


def cells_of(adata, x):
    """Positions of rows of counts, which are all different."""
    rows = {row.tobytes(): i for i, row in enumerate(adata.X.toarray())}
    assert len(rows) == adata.n_obs
    return [rows[row.tobytes()] for row in x]


def test_every_training_cell_is_seen_in_every_epoch_and_no_held_out_one_ever(watched):
    adata, training, evaluation, _ = watched
    train, validation = split_cells(adata.n_obs, 0.9, None, seed=0)
    assert len(training) == STEPS * 5
    epochs = [np.concatenate([s["x"] for s in training[i : i + STEPS]]) for i in range(0, len(training), STEPS)]
    orders = [cells_of(adata, x) for x in epochs]
    for order in orders:
        assert set(order) == set(train)
        assert len(set(order[: len(train)])) == len(train)  # once each, then the last minibatch is filled up
    assert len({tuple(order) for order in orders}) == 5
    for seen in evaluation:
        assert cells_of(adata, seen["x"]) == validation.tolist()


def test_minibatches_have_one_shape(watched):
    _, training, _, _ = watched
    assert {seen["x"].shape for seen in training} == {(50, 60)}


def test_held_out_cells_are_evaluated_once_an_epoch_as_in_use(watched):
    _, training, evaluation, _ = watched
    assert len(evaluation) == 5
    assert all(seen["training"] for seen in training)
    assert not any(seen["training"] or seen["gradients"] for seen in evaluation)


def test_learning_rate_and_kl_weight_follow_the_plan(watched):
    adata, training, _, rates = watched
    plan = Plan(**adata.uns["scvi_ext"]["fits"]["scvi"]["run"]["plan"])
    # float32 on the device
    np.testing.assert_allclose(rates, [plan.lr_at(step) for step in range(20)], rtol=1e-6)
    np.testing.assert_allclose(
        [seen["kl_weight"] for seen in training], [plan.kl_weight_at(step) for step in range(20)], rtol=1e-6
    )
    history = sx.get.history(adata)
    np.testing.assert_allclose(history["lr"], [plan.lr_at(step) for step in range(3, 20, 4)], rtol=1e-12)
    np.testing.assert_allclose(history["kl_weight"], [plan.kl_weight_at(step) for step in range(3, 20, 4)], rtol=1e-12)


def test_history_is_the_mean_over_the_cells_of_its_epoch(watched):
    adata, training, evaluation, _ = watched
    history = sx.get.history(adata)
    train = [np.mean([s["cost"] for s in training[i : i + STEPS]]) for i in range(0, len(training), STEPS)]
    np.testing.assert_allclose(
        history["elbo_train"], np.negative(train), rtol=1e-9
    )  # sums in float64 of the same numbers
    held_out = [-seen["cost"].mean() for seen in evaluation]
    np.testing.assert_allclose(history["elbo_validation"], held_out, rtol=1e-9)


def test_a_long_evaluation_goes_in_parts_and_weighs_every_cell_the_same(registered, monkeypatch):
    whole = sx.tl.fit(registered, copy=True, train_size=0.5, **RUN)
    monkeypatch.setitem(engine._VALIDATION_CELLS, "cpu", 33)  # 100 cells: the last part has one
    parts = sx.tl.fit(registered, copy=True, train_size=0.5, **RUN)
    columns = ["kl_z_validation", "kl_library_validation"]  # which have no random part
    np.testing.assert_allclose(sx.get.history(parts)[columns], sx.get.history(whole)[columns], rtol=1e-5)
    # other draws of z: the mean over 100 cells moves by a few nats at most
    np.testing.assert_allclose(
        sx.get.history(parts)["elbo_validation"], sx.get.history(whole)["elbo_validation"], rtol=0.05
    )
