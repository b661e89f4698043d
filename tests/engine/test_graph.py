"""How steps are run. With a stand-in for CUDA graphs, a captured run is the run step by step; see test_cuda too."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import scvi_ext as sx
from scvi_ext.engine import checkpoint, graph, step


class Recorded:
    """Takes the place of a CUDA graph: a capture notes the step as often as it is called, a replay carries it out."""

    capturing: Recorded | None = None

    def __init__(self):
        self.steps = []

    def pool(self):
        return None

    def replay(self):
        for carry_out in self.steps:
            carry_out()


class capture:
    def __init__(self, recorded, pool=None):
        self.recorded = recorded

    def __enter__(self):
        Recorded.capturing = self.recorded

    def __exit__(self, *error):
        Recorded.capturing = None


class FakeDevice:
    """The processor under the name of CUDA, for the eyes of make_runner."""

    type = "cuda"


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA as far as ``graph.py`` needs it."""
    call = step.TrainingStep.__call__

    def noted(self):
        if Recorded.capturing is None:
            call(self)
        else:
            Recorded.capturing.steps.append(lambda: call(self))

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(step.TrainingStep, "__call__", noted)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    cpu = torch.device("cpu")
    for name in ("generator_arrays", "load_generators"):
        original = getattr(checkpoint, name)
        monkeypatch.setattr(graph, name, lambda device, *args, original=original: original(cpu, *args))
    original = graph.make_runner

    def make_runner(training_step):
        seen, training_step.block.device = training_step.block.device, FakeDevice()
        try:
            return original(training_step)
        finally:
            training_step.block.device = seen

    return make_runner


def fitted_jointly(make_counts, **options):
    datasets = {"rna": make_counts()[:, 5:].copy(), "spatial": make_counts(n_cells=30, seed=5)[:, :20].copy()}
    for adata in datasets.values():
        sx.pp.setup_anndata(adata, batch_key="batch")
    options = {"max_epochs": 3, "dim_hidden_encoder": 8, "n_latent": 2, "batch_size": 16} | options
    sx.tl.fit(datasets, "gimvi", **options)
    return datasets["spatial"].uns["scvi_ext"]["fits"]["gimvi"]


def fitted(make_counts, model="scvi", **options):
    adata = make_counts()
    proteins = np.random.default_rng(0).poisson(9.0, (adata.n_obs, 5))
    proteins[adata.obs["batch"] == "b0", 0] = 0  # not measured: a critic learns too
    adata.obsm["protein"] = proteins
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein")
    # 181 cells: 12 steps an epoch
    sx.tl.fit(adata, model, max_epochs=3, n_hidden=8, n_latent=2, batch_size=16, **options)
    return adata.uns["scvi_ext"]["fits"][model]


@pytest.mark.parametrize(
    ("fit", "options"),
    [
        (fitted, {}),
        (fitted, {"early_stopping": 2}),
        (fitted, {"library": "latent"}),
        (fitted, {"adversarial_mixing": 3.0}),
        (fitted, {"model": "totalvi"}),
        (fitted_jointly, {}),
        (fitted_jointly, {"fool_step": "separate", "model_library_bools": (True, False)}),
        (fitted_jointly, {"kappa_fades": True, "early_stopping": 2}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_a_captured_run_is_the_run_step_by_step(make_counts, monkeypatch, fake_cuda, fit, options):
    one_by_one = fit(make_counts, **options)
    monkeypatch.setattr("scvi_ext.engine.fit.make_runner", fake_cuda)
    captured = fit(make_counts, **options)
    for name, values in one_by_one["state"].items():
        np.testing.assert_array_equal(captured["state"][name], values, err_msg=name)
    costs = [c for c in one_by_one["history"] if c != "cells_per_second"]
    assert captured["history"][costs].equals(one_by_one["history"][costs])


def test_several_steps_at_a_time_then_one_by_one(registered, monkeypatch, fake_cuda):
    done = []

    def watched(training_step):
        run, how, seconds = fake_cuda(training_step)
        assert how == "8 steps per CUDA graph"
        assert seconds > 0

        def noted(left):
            done.append(run(left))
            return done[-1]

        return noted, how, seconds

    monkeypatch.setattr("scvi_ext.engine.fit.make_runner", watched)
    sx.tl.fit(registered, max_epochs=2, n_hidden=8, batch_size=16)
    assert done == [8, 1, 1, 1, 1] * 2


def test_a_step_that_cannot_be_captured_is_run_one_by_one(make_counts, monkeypatch, fake_cuda):
    expected = fitted(make_counts)

    def refuse(training_step):
        training_step()  # what a failed capture leaves behind must not count
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    hows = []

    def noted(training_step):
        run, how, seconds = fake_cuda(training_step)
        hows.append(how)
        return run, how, seconds

    monkeypatch.setattr(graph, "_captured", refuse)
    monkeypatch.setattr("scvi_ext.engine.fit.make_runner", noted)
    found = fitted(make_counts)
    reason = "operation not permitted when stream is capturing"
    assert hows == [f"step by step, because a step cannot be captured: {reason}"]
    for name, values in expected["state"].items():
        np.testing.assert_array_equal(found["state"][name], values, err_msg=name)


def test_nothing_is_rehearsed_on_the_module_itself(registered, monkeypatch):
    seen = []

    def watched(training_step):
        before = [t.clone() for t in training_step.module.state_dict().values()], torch.get_rng_state()
        result = graph.make_runner(training_step)
        after = training_step.module.state_dict().values()
        seen.append(all(torch.equal(a, b) for a, b in zip(before[0], after, strict=True)))
        seen.append(torch.equal(before[1], torch.get_rng_state()))
        return result

    monkeypatch.setattr("scvi_ext.engine.fit.make_runner", watched)
    sx.tl.fit(registered, max_epochs=1, n_hidden=8)
    assert seen == [True, True]
