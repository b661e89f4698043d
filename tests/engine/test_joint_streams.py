"""Training on minibatches of several data sets: who comes how often, and one step or two of the optimiser."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import scvi_ext as sx
from scvi_ext._contract import ELBO, Stream
from scvi_ext.data.joint import JointStore
from scvi_ext.data.registry import Registry
from scvi_ext.data.sampler import split_cells
from scvi_ext.data.store import CellStore
from scvi_ext.data.stream import Resident
from scvi_ext.engine.fit import Epochs
from scvi_ext.engine.guard import find_culprits
from scvi_ext.engine.plan import make_plan
from scvi_ext.engine.step import TrainingStep

QUICK = {"dim_hidden_encoder": 8, "n_latent": 2}
GENES = (slice(5, 60), slice(19, None, -1))
N_CELLS = (201, 30)


@pytest.fixture
def pair(make_counts):
    """201 cells and 30, of which 15 genes are the same."""
    datasets = [
        make_counts(n_cells=n, seed=s)[:, g].copy() for s, (n, g) in enumerate(zip(N_CELLS, GENES, strict=True))
    ]
    for adata in datasets:
        sx.pp.setup_anndata(adata, batch_key="batch")
    return dict(zip(("rna", "spatial"), datasets, strict=True))


@pytest.fixture
def store(pair) -> JointStore:
    stores = [CellStore.from_adata(adata, Registry(), var_names=adata.var_names) for adata in pair.values()]
    return JointStore(tuple(pair), tuple(stores))


def plan(**options):
    options = {"batch_size": 50, "max_epochs": 2, "lr": None, "kl_warmup": None, "weight_decay": None} | options
    return make_plan("auto", n_cells=201, n_train=201, peak_lr=0.02, effort=7.0, **options)


@pytest.fixture
def epochs(store):
    return Epochs(plan(), store, store.streams, None, 0)


# ---- which cells ---------------------------------------------------------------------------------------------------


def test_every_data_set_has_a_stream_of_its_own_cells(store, epochs):
    assert store.streams == (Stream("rna", dataset=0), Stream("spatial", dataset=1))
    rows = epochs.rows(np.arange(231), 0)
    assert rows.shape == (2, 5, 50)
    assert set(rows[0].ravel()) == set(range(201))
    assert set(rows[1].ravel()) == set(range(201, 231))


def test_the_longest_makes_up_the_epoch_and_the_other_goes_round(epochs):
    rows = epochs.rows(np.arange(231), 0)
    largest, smaller = (np.unique(of_stream, return_counts=True)[1] for of_stream in rows)
    assert largest.min() == 1
    assert largest.max() == 2  # the last minibatch is filled up
    assert smaller.min() == 250 // 30  # 250 places for 30 cells: each comes as often as any other, or once more
    assert smaller.max() == 250 // 30 + 1
    assert not np.array_equal(rows, epochs.rows(np.arange(231), 1))
    np.testing.assert_array_equal(rows, epochs.rows(np.arange(231), 0))


def test_held_out_cells_of_smaller_data_sets_go_round_too(epochs):
    held_out = np.r_[0:21, 201:204]
    of_streams = epochs.held_out(held_out)
    np.testing.assert_array_equal(of_streams[0], np.arange(21))
    np.testing.assert_array_equal(of_streams[1], np.tile([201, 202, 203], 7))
    of_streams = epochs.held_out(np.arange(21))  # of a few cells, none may be held out
    assert [len(rows) for rows in of_streams] == [21, 0]


def test_a_history_weighs_data_sets_alike(pair):
    sx.tl.fit(pair, "gimvi", max_epochs=1, key_added="both", **QUICK)
    history = sx.get.history(pair["rna"]).iloc[0]
    elbo = {}
    for name, adata in pair.items():
        _, held_out = split_cells(adata.n_obs, 0.9, None, 0)
        elbo[name] = sx.tl.get_elbo(adata, n_samples=50, indices=held_out)
    # The history has one draw for each of 20 cells, whose ELBO is around 100 with a standard deviation of a few.
    assert abs(history["elbo_validation"] - np.mean(list(elbo.values()))) < 3


# ---- steps ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def training_step(store, pair):
    """``training_step(**options)``: a step of a fresh module, at the beginning of an epoch."""

    def make(**options) -> TrainingStep:
        sx.tl.fit(pair, "gimvi", max_epochs=1, **QUICK | options)
        module = sx.get.model(pair["rna"])
        module.train().requires_grad_(True)
        for dropout in (part for part in module.modules() if isinstance(part, torch.nn.Dropout)):
            dropout.p = 0.0
        registries = [Registry.from_uns(adata.uns["scvi_ext"]["setup"]) for adata in pair.values()]
        stores, first = [], 0
        for adata, registry in zip(pair.values(), registries, strict=True):
            own = CellStore.from_adata(adata, registry, var_names=adata.var_names)
            stores.append(replace(own, batch_index=own.batch_index + first))
            first += 3
        joint = JointStore(tuple(pair), tuple(stores))
        source = Resident(joint, torch.device("cpu"), joint.streams)
        make.store = joint
        step = TrainingStep(module, source.block, plan(), "float32", joint.streams)
        epochs = Epochs(plan(), joint, joint.streams, None, 0)
        step.begin_epoch(np.full((5, 2), (0.01, 0.3), np.float32), 0)
        step.lay_out(epochs.rows(np.arange(231), 0))
        return step

    return make


def test_minibatches_of_each_data_set_have_its_own_genes_and_batches(training_step, pair):
    step = training_step()
    cells = step.minibatches(step.rows[:, 0])
    assert [tuple(c.x.shape) for c in cells] == [(50, 55), (50, 20)]
    assert set(cells[0].batch_index.tolist()) == {0, 1, 2}
    assert set(cells[1].batch_index.tolist()) == {3, 4, 5}
    rows = step.rows[1, 0] - 201
    np.testing.assert_array_equal(cells[1].x.to_dense().numpy(), pair["spatial"].X[rows.numpy()].toarray())


def test_a_step_takes_one_step_of_the_optimiser(training_step):
    step = training_step()
    step()
    steps = {name: step.optimizer.state[p]["step"].item() for name, p in step.module.named_parameters()}
    assert set(steps.values()) == {1.0}
    assert step.parts == ELBO
    assert step.cursor.item() == 1


def test_fooling_the_critic_separately_takes_a_step_of_its_own(training_step):
    step = training_step(fool_step="separate")
    step()
    for name, parameter in step.module.named_parameters():
        taken = step.optimizer.state[parameter]["step"].item()
        # Only what makes the means wants both; the critic learns before, the decoder and variances after it.
        wants_both = name.startswith("encoder.") and not name.startswith("encoder.var_encoder.")
        assert taken == (2 if wants_both else 1), name
    step()
    assert step.optimizer.state[step.module.encoder.mean_encoder.weight]["step"].item() == 4
    assert step.cursor.item() == 2


def test_a_separate_step_is_two_steps_of_adam(training_step):
    """The critic is fooled first; the ELBO is that of the encoder after that."""
    step, other = training_step(fool_step="separate"), training_step(fool_step="separate")
    torch.manual_seed(3)
    step()
    torch.manual_seed(3)
    adam = torch.optim.Adam(
        other.parameters, lr=0.01, betas=(0.9, plan().beta2), eps=0.01, weight_decay=plan().weight_decay
    )
    cells = other.minibatches(other.rows[:, 0])
    elbo = None
    for loss in other.module.losses(*cells, kl_weight=0.3):
        adam.zero_grad(set_to_none=True)
        getattr(loss, "total", loss).backward()
        adam.step()
        elbo = loss
    for (name, one), two in zip(step.module.named_parameters(), other.module.parameters(), strict=True):
        # Both are float32, in another order of operations: a few roundings of numbers of order one.
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)
    sums = [part.sum().item() for part in (elbo.reconstruction, elbo.kl_z, elbo.kl_library)]
    np.testing.assert_allclose(step.sums, sums, rtol=1e-4)


def test_sums_are_over_the_cells_of_all_data_sets(training_step):
    step = training_step()
    before = {name: value.clone() for name, value in step.module.state_dict().items()}
    torch.manual_seed(3)
    step()
    step.module.load_state_dict(before)
    torch.manual_seed(3)
    loss = step.module.loss(*step.minibatches(step.rows[:, 0]), kl_weight=0.3)
    assert len(loss.reconstruction) == 100
    sums = [part.sum().item() for part in (loss.reconstruction, loss.kl_z, loss.kl_library)]
    np.testing.assert_allclose(step.sums, sums, rtol=1e-6)


# ---- the guard -----------------------------------------------------------------------------------------------------


def test_cells_with_the_largest_loss_are_suspected_whatever_data_set_they_are_of(training_step):
    step = training_step()
    origin = {name: value.detach().numpy().copy() for name, value in step.module.state_dict().items()}
    source = Resident(training_step.store, torch.device("cpu"), step.streams)
    event = find_culprits(step, source, [np.arange(201), np.arange(201, 231)], 0, origin)
    assert event.cells == ()
    assert len(set(event.suspects)) == 20
    few = find_culprits(step, source, [np.empty(0, dtype=int), np.arange(201, 206)], 0, origin)
    assert set(few.suspects) == set(range(201, 206))
    # Genes are named by their positions among those of all data sets: of the first, and what the second adds.
    names = step.block.parts[1].genes
    assert set(few.genes) <= set(names)
