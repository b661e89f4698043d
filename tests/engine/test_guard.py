from __future__ import annotations

import warnings

import numpy as np
import pytest

import scvi_ext as sx
from scvi_ext._errors import ScviExtWarning
from scvi_ext.engine.guard import MAX_ROLLBACKS
from scvi_ext.engine.plan import Plan

RUN = {"max_epochs": 4, "batch_size": 60, "n_hidden": 8, "n_latent": 2}  # 181 cells: 4 steps in an epoch, 16 in all


def to_nan(module, loss):
    return loss._replace(total=loss.total * np.nan)


def unchanged(module, loss):
    return loss


def assert_usable(adata):
    fit = adata.uns["scvi_ext"]["fits"]["scvi"]
    for name, values in fit["state"].items():
        assert np.isfinite(values).all(), name
    assert np.isfinite(fit["history"].to_numpy()).all()
    return fit["status"]


def planned(adata) -> Plan:
    return Plan(**adata.uns["scvi_ext"]["fits"]["scvi"]["run"]["plan"] | {"patience": 0})


def test_one_bad_step_costs_one_epoch_and_half_of_the_learning_rate(registered, at_training_step):
    at_training_step({6: to_nan})
    message = r"not finite 1 times.*last good state.*lowered the learning rate"
    with pytest.warns(ScviExtWarning, match=message) as caught:
        sx.tl.fit(registered, **RUN)
    status = assert_usable(registered)
    history = sx.get.history(registered)
    assert len(history) == 4
    assert status["stop_reason"] == "finished"
    assert status["non_finite_events"] == 1
    assert "non_finite_cells" not in status
    lr = np.array([planned(registered).lr_at(4 * epoch - 1) for epoch in (1, 2, 3, 4)])
    np.testing.assert_allclose(history["lr"], lr * [1, 0.5, 0.5, 0.5], rtol=1e-12)  # the same doubles
    # suspects are the cells with the largest loss, and cells and genes are named in status and warning
    assert set(status["non_finite_suspects"]) <= set(registered.obs_names)
    gene = status["non_finite_genes"][0]
    assert f"'{gene}'" in str(caught[0].message)
    assert any(f"{cell!r}" in str(caught[0].message) for cell in status["non_finite_suspects"])
    suspects = registered[status["non_finite_suspects"]].X.toarray()
    assert suspects[:, registered.var_names.get_loc(gene)].max() == suspects.max()


def test_a_rollback_returns_to_the_weights_before_the_epoch(registered, make_counts, at_training_step):
    # All steps but those of the first attempt have no gradient, so only the attempt could have changed the weights.
    other = make_counts()
    sx.pp.setup_anndata(other, batch_key="batch")
    run = RUN | {"max_epochs": 2, "dropout_rate": 0.0}
    at_training_step({4: to_nan, **{step: freeze for step in range(5, 40)}})
    with pytest.warns(ScviExtWarning, match="not finite 1 times"):
        sx.tl.fit(registered, weight_decay=0, **run)
    at_training_step({"always": freeze})
    sx.tl.fit(other, weight_decay=0, **run)
    rolled_back, untrained = (a.uns["scvi_ext"]["fits"]["scvi"]["state"] for a in (registered, other))
    for name, values in untrained.items():
        if "running" not in name:
            np.testing.assert_array_equal(rolled_back[name], values, err_msg=name)


def freeze(module, loss):
    return loss._replace(total=loss.total * 0)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("cell", [0, 17, 100], ids=str)
def test_cells_that_cannot_be_modelled_are_named_and_left_out(counts, bad, cell):
    x = counts.X.toarray()
    x[cell, 21] = bad
    counts.X = x
    with pytest.warns(ScviExtWarning, match="adata.X: 1 entries"):
        sx.pp.setup_anndata(counts, batch_key="batch", check="warn")
    message = (
        rf"left out cells without a finite loss: 'cell{cell}'\. Genes with the most extreme counts there: 'gene21'\."
    )
    with pytest.warns(ScviExtWarning, match=message):
        sx.tl.fit(counts, **RUN)
    status = assert_usable(counts)
    assert status["non_finite_cells"] == [f"cell{cell}"]
    assert status["non_finite_genes"] == ["gene21"]
    assert status["non_finite_events"] == 1
    np.testing.assert_allclose(  # cells that are left out do not slow down the others
        sx.get.history(counts)["lr"], [planned(counts).lr_at(4 * epoch - 1) for epoch in (1, 2, 3, 4)], rtol=1e-12
    )
    sx.tl.get_latent(counts, indices=np.delete(np.arange(201), cell))
    assert np.isfinite(np.delete(counts.obsm["X_scvi"], cell, axis=0)).all()


def test_all_bad_cells_are_left_out_together(counts):
    x = counts.X.toarray()
    x[[3, 50, 77, 120], [1, 2, 1, 2]] = np.inf
    counts.X = x
    with pytest.warns(ScviExtWarning, match="are infinite"):
        sx.pp.setup_anndata(counts, batch_key="batch", check="warn")
    with pytest.warns(ScviExtWarning, match="not finite 1 times"):
        sx.tl.fit(counts, **RUN)
    status = assert_usable(counts)
    assert status["non_finite_cells"] == ["cell3", "cell50", "cell77", "cell120"]
    assert status["non_finite_genes"] == ["gene1", "gene2"]


@pytest.mark.parametrize("lr", [10.0, 1e3])
def test_a_learning_rate_that_is_too_large_never_leaves_weights_that_are_not_finite(registered, lr):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The loss was not finite", ScviExtWarning)
        sx.tl.fit(registered, lr=lr, **RUN)
    assert_usable(registered)


def test_a_hopeless_learning_rate_is_refused_with_what_was_tried(registered):
    message = rf"in any of {MAX_ROLLBACKS + 1} attempts at the first epoch, the last one at 0.00391 of the planned"
    with pytest.raises(FloatingPointError, match=message):
        sx.tl.fit(registered, lr=1e30, **RUN)
    assert "fits" not in registered.uns["scvi_ext"]


def test_a_loss_that_is_never_finite_is_refused_and_nothing_is_written(fitted, at_training_step):
    before = fitted.uns["scvi_ext"]["fits"]["scvi"]
    at_training_step({"always": to_nan})
    with pytest.raises(FloatingPointError, match="The loss was not finite in any of"):
        sx.tl.fit(fitted, **RUN)
    assert fitted.uns["scvi_ext"]["fits"]["scvi"] is before


def test_data_without_a_single_good_cell_is_refused(counts):
    counts.X = np.full(counts.shape, np.inf, np.float32)
    with pytest.warns(ScviExtWarning, match="are infinite"):
        sx.pp.setup_anndata(counts, check="warn")
    with pytest.raises(FloatingPointError, match=r"not finite for \(almost\) any cell.*Look at the counts"):
        sx.tl.fit(counts, **RUN)


def test_a_run_that_breaks_late_keeps_the_good_epochs(registered, at_training_step):
    at_training_step({**dict.fromkeys(range(1, 9), unchanged), "always": to_nan})
    with pytest.warns(ScviExtWarning, match=rf"not finite {MAX_ROLLBACKS + 1} times"):
        sx.tl.fit(registered, **RUN)
    status = assert_usable(registered)
    assert (status["stop_reason"], status["epochs"], status["steps"]) == ("non-finite loss", 2, 8)


@pytest.mark.filterwarnings("ignore:The loss was not finite:scvi_ext._errors.ScviExtWarning")
def test_good_cells_are_not_blamed_for_weights_that_went_too_far():
    adata = sx.datasets.pbmc68k_counts()
    sx.pp.setup_anndata(adata, batch_key="batch")
    sx.tl.fit(adata, reconstruction_loss="normal", dispersion="gene-cell", seed=0)
    status = adata.uns["scvi_ext"]["fits"]["scvi"]["status"]
    assert status["non_finite_events"] > 0  # the weights do go too far
    assert "non_finite_cells" not in status
