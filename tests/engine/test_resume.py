from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scvi_ext as sx

RUN = {"max_epochs": 4, "batch_size": 60, "n_hidden": 8, "n_latent": 2}  # 181 cells: 4 steps in an epoch, 16 in all


def press_ctrl_c(module, loss):
    signal.raise_signal(signal.SIGINT)
    return loss


@pytest.fixture(autouse=True)
def python_s_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupted(registered, at_training_step):
    """A fit that was interrupted in step 6, in the middle of its second epoch."""

    def fit(step=6, **options):
        at_training_step({step: press_ctrl_c})
        with pytest.raises(KeyboardInterrupt):
            sx.tl.fit(registered, **RUN | options)
        return registered

    return fit


@pytest.fixture
def uninterrupted(make_counts):
    def fit(**options):
        adata = make_counts()
        sx.pp.setup_anndata(adata, batch_key="batch")
        sx.tl.fit(adata, **RUN | options)
        return adata

    return fit


def assert_same_run(one: ad.AnnData, other: ad.AnnData, key: str = "scvi") -> None:
    a, b = (adata.uns["scvi_ext"]["fits"][key] for adata in (one, other))
    assert a["state"].keys() == b["state"].keys()
    for name in a["state"]:
        np.testing.assert_array_equal(a["state"][name], b["state"][name], err_msg=name)
    histories = [sx.get.history(adata, key).drop(columns="cells_per_second") for adata in (one, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    for name in ("steps", "epochs", "stop_reason", "kl_weight_final", "data"):
        assert a["status"][name] == b["status"][name]


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (1, {}),
        (6, {}),
        (8, {}),
        (15, {}),
        (6, {"plan": "scvi-tools", "kl_warmup": 0.5}),
        (6, {"early_stopping": 3}),
        (6, {"train_size": 1.0}),
        (6, {"seed": 5}),
        (6, {"library": "latent", "latent_distribution": "ln", "n_layers": 2, "dropout_rate": 0.5}),
        (6, {"use_batch_norm": "none"}),
    ],
    ids=str,
)
def test_interrupted_and_resumed_is_to_the_last_bit_as_if_uninterrupted(interrupted, uninterrupted, step, options):
    adata = interrupted(step, **options)
    sx.tl.fit(adata, resume=True)
    assert_same_run(adata, uninterrupted(**options))


def test_a_run_can_be_interrupted_and_resumed_many_times(interrupted, uninterrupted, at_training_step):
    adata = interrupted(2)
    for _ in range(3):
        at_training_step({3: press_ctrl_c})
        with pytest.raises(KeyboardInterrupt):
            sx.tl.fit(adata, resume=True)
        adata = adata.copy()
    assert adata.uns["scvi_ext"]["fits"]["scvi"]["status"]["steps"] == 11
    sx.tl.fit(adata, resume=True)
    assert_same_run(adata, uninterrupted())


def test_another_model_under_another_name_is_resumed(registered, monkeypatch):
    from scvi_ext.models.ldvae import LDVAE

    plain = LDVAE.loss
    calls = []

    def loss(module, *cells, **options):
        calls.append(options)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        return plain(module, *cells, **options)

    sx.tl.fit(registered, "ldvae", **RUN)
    monkeypatch.setattr(LDVAE, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(registered, "ldvae", key_added="linear", **RUN)
    monkeypatch.setattr(LDVAE, "loss", plain)
    with pytest.raises(ValueError, match="Fit 'linear' is of the model 'ldvae', not 'scvi'"):
        sx.tl.fit(registered, key_added="linear", resume=True)
    sx.tl.fit(registered, "ldvae", key_added="linear", resume=True)
    fits = registered.uns["scvi_ext"]["fits"]
    for name, values in fits["ldvae"]["state"].items():
        np.testing.assert_array_equal(fits["linear"]["state"][name], values, err_msg=name)


def test_a_rolled_back_run_resumes_exactly(registered, make_counts, at_training_step):
    def diverge(module, loss):
        return loss._replace(total=loss.total * np.nan)

    other = make_counts()
    sx.pp.setup_anndata(other, batch_key="batch")
    at_training_step({6: diverge})
    with pytest.warns(sx.ScviExtWarning, match="not finite 1 times"):
        sx.tl.fit(other, **RUN)
    at_training_step({6: diverge, 14: press_ctrl_c})
    with pytest.warns(sx.ScviExtWarning, match="not finite 1 times"), pytest.raises(KeyboardInterrupt):
        sx.tl.fit(registered, **RUN)
    at_training_step({})
    with pytest.warns(sx.ScviExtWarning, match="not finite 1 times"):
        sx.tl.fit(registered, resume=True)
    assert_same_run(registered, other)
    assert registered.uns["scvi_ext"]["fits"]["scvi"]["status"]["non_finite_events"] == 1


def test_checkpoint_true_keeps_what_resuming_needs_through_resumed_runs(registered, interrupted):
    adata = interrupted(checkpoint=True)
    sx.tl.fit(adata, resume=True)
    assert sx.get.fits(adata).loc["scvi", "resumable"]
    before = adata.uns["scvi_ext"]["fits"]["scvi"]["state"]
    sx.tl.fit(adata, resume=True)  # there is nothing left to do
    after = adata.uns["scvi_ext"]["fits"]["scvi"]
    assert after["status"]["stop_reason"] == "finished"
    for name in before:
        np.testing.assert_array_equal(after["state"][name], before[name])


def test_without_checkpoint_a_finished_fit_is_smaller_and_cannot_be_resumed(fitted):
    assert "checkpoint" not in fitted.uns["scvi_ext"]["fits"]["scvi"]
    before = fitted.uns["scvi_ext"]["fits"]["scvi"]
    with pytest.raises(ValueError, match=r"'scvi' was kept without a checkpoint.*Fit again with checkpoint=True"):
        sx.tl.fit(fitted, resume=True)
    assert fitted.uns["scvi_ext"]["fits"]["scvi"] is before


def test_a_resumed_run_without_checkpoint_drops_it_when_finished(interrupted):
    adata = interrupted()
    sx.tl.fit(adata, resume=True)
    assert not sx.get.fits(adata).loc["scvi", "resumable"]


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 10},
        {"batch_size": 64},
        {"lr": 1e-3},
        {"seed": 0},
        {"n_latent": 5},
        {"plan": "scvi-tools"},
        {"train_size": 0.8},
        {"early_stopping": True},
    ],
    ids=str,
)
def test_other_options_are_refused(interrupted, options):
    adata = interrupted()
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"resume=True goes on with the options of the run.*leave out '{name}'"):
        sx.tl.fit(adata, resume=True, **options)
    assert sx.get.fits(adata)["stop_reason"].tolist() == ["interrupted"]


def change_a_count(adata):
    adata.X = adata.X.toarray()
    adata.X[5, 7] += 1


def change_a_batch(adata):
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    adata.obs.loc["cell0", "batch"] = "b1"


def leave_out_a_cell(adata):
    adata._inplace_subset_obs(np.arange(1, adata.n_obs))


def reverse_the_cells(adata):
    adata._inplace_subset_obs(np.arange(adata.n_obs)[::-1])


@pytest.mark.parametrize("change", [change_a_count, change_a_batch, leave_out_a_cell, reverse_the_cells])
def test_other_data_is_refused(interrupted, change):
    adata = interrupted()
    change(adata)
    with pytest.raises(
        ValueError, match=r"'scvi' was trained on other data: cells, counts or covariates .* have changed"
    ):
        sx.tl.fit(adata, resume=True)
    assert sx.get.fits(adata)["stop_reason"].tolist() == ["interrupted"]


def test_other_order_of_genes_is_the_same_data(interrupted, uninterrupted):
    adata = interrupted()
    adata._inplace_subset_var(np.random.default_rng(0).permutation(adata.n_vars))
    sx.tl.fit(adata, resume=True)
    assert_same_run(adata, uninterrupted())


def test_nothing_to_resume_is_named(registered, fitted):
    with pytest.raises(KeyError, match="has no fits: call"):
        sx.tl.fit(registered, resume=True)
    with pytest.raises(KeyError, match=r"'other' is not in .*which has: 'ldvae', 'scvi'"):
        sx.tl.fit(fitted, key_added="other", resume=True)


# ---- real processes: the first one gets a real SIGINT, an h5ad file goes to the second -----------------------------

FIRST = """
    import signal, sys, time
    import anndata as ad, torch
    import scvi_ext as sx
    from scvi_ext.engine.step import TrainingStep

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    plain, steps = TrainingStep.__call__, []

    def step(self):
        steps.append(self)
        if len(steps) == 7:
            waiting = signal.getsignal(signal.SIGINT)
            print("training", flush=True)
            while signal.getsignal(signal.SIGINT) is waiting:  # the first Ctrl-C gives way to Python's own handler
                time.sleep(0.01)
        plain(self)

    TrainingStep.__call__ = step
    adata = ad.read_h5ad(sys.argv[1])
    sx.pp.setup_anndata(adata, batch_key="batch")
    try:
        sx.tl.fit(adata, max_epochs=4, batch_size=60, n_hidden=8, n_latent=2)
    except KeyboardInterrupt:
        adata.write_h5ad(sys.argv[2])
        sys.exit(42)
"""

SECOND = """
    import sys
    import anndata as ad, torch
    import scvi_ext as sx

    torch.set_num_threads(1)
    adata = ad.read_h5ad(sys.argv[1])
    sx.tl.fit(adata, resume=True)
    adata.write_h5ad(sys.argv[2])
"""


def test_across_two_processes_and_a_file(counts, uninterrupted, tmp_path):
    paths = [str(tmp_path / f"{name}.h5ad") for name in ("counts", "interrupted", "resumed")]
    counts.write_h5ad(paths[0])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    command = [sys.executable, "-c", textwrap.dedent(FIRST), *paths[:2]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as first:
        assert first.stdout.readline() == "training\n", first.stderr.read()
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=120)
    assert first.returncode == 42, errors
    assert "interrupted at step 7; what was trained is kept as 'scvi'" in errors

    command = [sys.executable, "-c", textwrap.dedent(SECOND), *paths[1:]]
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert second.returncode == 0, second.stderr
    assert_same_run(ad.read_h5ad(paths[2]), uninterrupted())
