from __future__ import annotations

import inspect
import random
import re
import threading
from dataclasses import fields

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch

import scvi_ext as sx
from scvi_ext import models
from scvi_ext._contract import Capability
from scvi_ext._errors import ScviExtWarning
from scvi_ext.data.sampler import split_cells
from scvi_ext.tl._train import OPTIONS

# Models of several data sets are fitted in test_fit_joint.
OF_ONE = [name for name in models.names() if Capability.JOINT not in models.get(name).capabilities]
GENERATIVE = [name for name in OF_ONE if Capability.COUNTS in models.get(name).capabilities]
QUICK = {"max_epochs": 2, "n_hidden": 8, "n_latent": 2}
PARTS = ("elbo", "reconstruction_loss", "kl_z", "kl_library")


def saved(adata: ad.AnnData, key: str = "scvi") -> dict:
    return adata.uns["scvi_ext"]["fits"][key]


def assert_same_fit(one: ad.AnnData, other: ad.AnnData) -> None:
    a, b = saved(one), saved(other)
    assert a["state"].keys() == b["state"].keys()
    for name in a["state"]:
        np.testing.assert_array_equal(a["state"][name], b["state"][name], err_msg=name)
    columns = ["cells_per_second"]
    pd.testing.assert_frame_equal(
        a["history"].drop(columns=columns), b["history"].drop(columns=columns), check_exact=True
    )


def with_proteins(counts: ad.AnnData) -> ad.AnnData:
    """The first genes, as if they were proteins too."""
    counts.obsm["protein"] = counts.X[:, :5].toarray()
    return counts


def differ(one: ad.AnnData, other: ad.AnnData) -> bool:
    a, b = saved(one)["state"], saved(other)["state"]
    shapes = [{name: values.shape for name, values in state.items()} for state in (a, b)]
    return shapes[0] != shapes[1] or any(not np.array_equal(a[name], b[name]) for name in a)


# ---- what decides the result, and what is left alone ---------------------------------------------------------------


def test_the_same_seed_gives_the_same_fit_and_another_one_another(registered):
    first = sx.tl.fit(registered, copy=True, seed=3, **QUICK)
    torch.randn(5), np.random.normal(size=5)  # what happens elsewhere does not matter
    assert_same_fit(first, sx.tl.fit(registered, copy=True, seed=3, **QUICK))
    assert differ(first, sx.tl.fit(registered, copy=True, seed=4, **QUICK))


def test_the_seed_of_the_settings_is_the_default(registered, monkeypatch):
    explicit = sx.tl.fit(registered, copy=True, seed=9, **QUICK)
    monkeypatch.setattr(sx.settings, "seed", 9)
    assert_same_fit(explicit, sx.tl.fit(registered, copy=True, **QUICK))
    assert saved(explicit)["status"]["seed"] == 9


def test_global_generators_are_neither_read_nor_changed(registered):
    def states():
        return [*np.random.get_state()[1], *torch.get_rng_state(), *random.getstate()[1]]

    torch.manual_seed(1)
    before = states()
    first = sx.tl.fit(registered, copy=True, **QUICK)
    assert states() == before
    torch.manual_seed(2)
    assert_same_fit(first, sx.tl.fit(registered, copy=True, **QUICK))


def test_only_uns_is_written(counts):
    counts.layers["spliced"] = counts.X.copy()
    counts.obsm["X_pca"] = np.ones((counts.n_obs, 2))
    counts.uns["colors"] = ["red"]
    sx.pp.setup_anndata(counts, batch_key="batch", categorical_covariate_keys="sex", continuous_covariate_keys="age")
    before = counts.copy()
    setup = before.uns.pop("scvi_ext")["setup"]
    sx.tl.fit(counts, **QUICK)
    root = counts.uns.pop("scvi_ext")
    assert set(root) == {"format", "setup", "fits", "last_fit"}
    assert root["setup"].keys() == setup.keys()
    assert (counts.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(counts.obs, before.obs)
    pd.testing.assert_frame_equal(counts.var, before.var)
    assert set(counts.layers) == {"spliced"}
    assert set(counts.obsm) == {"X_pca"}
    assert counts.uns == {"colors": ["red"]}


def test_copy_leaves_the_original_alone(registered):
    copy = sx.tl.fit(registered, copy=True, **QUICK)
    assert "fits" not in registered.uns["scvi_ext"]
    assert list(copy.uns["scvi_ext"]["fits"]) == ["scvi"]
    assert sx.tl.fit(registered, **QUICK) is None
    assert_same_fit(copy, registered)


def test_fits_live_side_by_side_and_the_last_one_is_the_default(registered):
    sx.tl.fit(registered, **QUICK)
    sx.tl.fit(registered, key_added="wide", **QUICK | {"n_latent": 5})
    first = saved(registered)
    assert sx.get.fits(registered)["last"].to_dict() == {"scvi": False, "wide": True}
    sx.tl.get_latent(registered)
    assert registered.obsm["X_wide"].shape == (201, 5)
    sx.tl.get_latent(registered, key="scvi")
    assert registered.obsm["X_scvi"].shape == (201, 2)
    assert saved(registered) is first


def test_fitting_again_replaces_the_fit_of_the_same_name(registered):
    sx.tl.fit(registered, checkpoint=True, **QUICK)
    sx.tl.fit(registered, seed=5, **QUICK)
    assert list(registered.uns["scvi_ext"]["fits"]) == ["scvi"]
    assert saved(registered)["status"]["seed"] == 5
    assert "checkpoint" not in saved(registered)


def test_a_view_becomes_an_anndata_of_its_own(registered):
    view = registered[registered.obs["batch"] != "b1", 5:40]
    sx.tl.fit(view, **QUICK)
    assert not view.is_view
    assert "fits" not in registered.uns["scvi_ext"]
    assert registered.shape == (201, 60)
    assert_same_fit(view, sx.tl.fit(registered[registered.obs["batch"] != "b1", 5:40].copy(), copy=True, **QUICK))


# ---- how counts are stored does not matter -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        sp.csc_matrix,
        sp.csr_array,
        lambda x: x,
        lambda x: x.astype(np.int64),
        lambda x: sp.csr_matrix(x.astype(np.int32)),
        lambda x: x.astype(np.float64),
        np.asfortranarray,
    ],
    ids=["csc", "csr array", "dense", "integer", "sparse integer", "float64", "columns first"],
)
def test_counts_of_any_kind_give_the_same_fit_bit_for_bit(registered, make_counts, kind):
    sx.tl.fit(registered, **QUICK)
    other = make_counts(kind=kind)
    sx.pp.setup_anndata(other, batch_key="batch")
    sx.tl.fit(other, **QUICK)
    assert_same_fit(registered, other)
    assert saved(registered)["status"]["data"] == saved(other)["status"]["data"]


def test_a_layer_gives_the_same_fit(registered, make_counts):
    sx.tl.fit(registered, **QUICK)
    other = make_counts()
    other.layers["counts"] = other.X.copy()
    sc.pp.log1p(other)
    sx.pp.setup_anndata(other, layer="counts", batch_key="batch")
    sx.tl.fit(other, **QUICK)
    assert_same_fit(registered, other)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, lambda x: x], ids=["csr", "csc", "dense"])
def test_a_backed_file_gives_the_same_fit(registered, make_counts, tmp_path, kind):
    sx.tl.fit(registered, **QUICK)
    make_counts(kind=kind).write_h5ad(tmp_path / "counts.h5ad")
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    sx.pp.setup_anndata(backed, batch_key="batch")
    sx.tl.fit(backed, **QUICK)
    sx.tl.get_latent(backed)
    assert backed.isbacked
    backed.file.close()
    assert_same_fit(registered, backed)
    assert "X_scvi" in backed.obsm


# ---- history and status --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["observed", "latent"])
def test_history_holds_the_parts_of_the_elbo_per_cell(registered, library):
    sx.tl.fit(registered, library=library, **QUICK | {"max_epochs": 5})
    history = sx.get.history(registered)
    measured = [f"{part}_{which}" for which in ("train", "validation") for part in PARTS]
    assert list(history.columns) == [*measured, "kl_weight", "lr", "cells_per_second"]
    assert history.index.tolist() == [1, 2, 3, 4, 5]
    assert (history.dtypes == np.float64).all()
    for which in ("train", "validation"):
        elbo, *costs = (history[f"{part}_{which}"] for part in PARTS)
        np.testing.assert_allclose(elbo, -sum(costs), rtol=1e-9)  # sums of the same float64
        assert (elbo < 0).all()
        assert (costs[0] > 0).all()
        assert (costs[1] > 0).all()
        assert ((costs[2] > 0) if library == "latent" else (costs[2] == 0)).all()
    assert history["kl_weight"].iloc[-1] == 1
    assert (history["cells_per_second"] > 0).all()


@pytest.mark.parametrize("model", GENERATIVE)
def test_training_raises_the_elbo_of_cells_that_were_not_trained_on(counts, model):
    registered = with_proteins(counts)
    sx.pp.setup_anndata(registered, batch_key="batch", labels_key="cell_type", protein_obsm_key="protein")
    sx.tl.fit(registered, model, n_hidden=32, max_epochs=60)
    history = sx.get.history(registered)
    # 201 cells with three planted types: the gain is about 20 nats per cell
    assert history["elbo_validation"].iloc[-1] > history["elbo_validation"].iloc[0] + 5
    assert history["elbo_train"].iloc[-1] > history["elbo_train"].iloc[0] + 5


def test_without_held_out_cells_there_is_no_validation(registered):
    sx.tl.fit(registered, train_size=1.0, **QUICK)
    assert list(sx.get.history(registered).columns) == [
        *(f"{part}_train" for part in PARTS),
        "kl_weight",
        "lr",
        "cells_per_second",
    ]
    assert np.isnan(sx.get.fits(registered).loc["scvi", "elbo_validation"])


def test_validation_changes_nothing_but_the_validation(registered):
    some = sx.tl.fit(registered, copy=True, train_size=0.5, validation_size=0.1, **QUICK)
    more = sx.tl.fit(registered, copy=True, train_size=0.5, validation_size=0.5, **QUICK)
    assert not differ(some, more)
    histories = [sx.get.history(adata) for adata in (some, more)]
    np.testing.assert_array_equal(histories[0]["elbo_train"], histories[1]["elbo_train"])
    assert (histories[0]["elbo_validation"] != histories[1]["elbo_validation"]).all()


def test_status_says_how_the_run_went(registered):
    sx.tl.fit(registered, batch_size=60, **QUICK)
    status = saved(registered)["status"]
    assert status["steps"] == 8
    assert status["epochs"] == 2
    assert status["stop_reason"] == "finished"
    assert status["kl_weight_final"] == 1
    assert status["non_finite_events"] == 0
    assert status["device"] == "cpu"
    assert status["seed"] == 0
    assert len(status["data"]) == 64
    assert status["versions"]["torch"] == torch.__version__


def test_the_plan_and_the_slot_are_logged(registered, logged):
    sx.tl.fit(registered, **QUICK)
    log = logged()
    assert "fitting scvi on 181 cells x 60 genes, 20 held out" in log
    assert "2 epochs of 2 steps of 128 cells" in log
    plan = r"final KL weight 1\n    counts \(0\.\d+ MB\) in host memory\n    about 1 s on cpu, fused kernel of zinb"
    assert re.search(plan, log)
    assert "finished after 2 epochs" in log
    assert "added\n    'scvi', the fitted model (adata.uns['scvi_ext']['fits'])" in log


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_bar_is_shown_where_asked_for(registered, capsys, progress):
    sx.tl.fit(registered, progress=progress, **QUICK)
    shown = "step/s" in capsys.readouterr().err
    assert shown is (progress is True)  # under pytest there is no terminal


# ---- sizes at the edge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_cells", "options"),
    [
        (3, {"train_size": 1.0}),
        (4, {}),
        (10, {}),
        (10, {"batch_size": 3}),
        (50, {"batch_size": 1000}),
        (130, {"train_size": 1.0}),
    ],
    ids=["three cells", "four", "ten", "ten in threes", "fewer than a batch", "two more than a batch"],
)
@pytest.mark.parametrize("library", ["observed", "latent"])
def test_few_cells_are_enough(make_counts, n_cells, options, library):
    adata = make_counts(n_cells, 20)
    sc.pp.filter_genes(adata, min_counts=1)
    sx.pp.setup_anndata(adata)
    sx.tl.fit(adata, library=library, **QUICK | options)
    sx.tl.get_latent(adata)
    assert np.isfinite(adata.obsm["X_scvi"]).all()
    assert np.isfinite(sx.get.history(adata)).all(axis=None)


@pytest.mark.parametrize("options", [{}, {"library": "latent"}, {"dispersion": "gene-batch"}], ids=str)
def test_a_batch_of_three_cells_is_enough(counts, options):
    counts.obs["batch"] = ["small"] * 3 + ["large"] * 198
    sx.pp.setup_anndata(counts, batch_key="batch")
    sx.tl.fit(counts, **QUICK | options)
    assert np.isfinite(sx.get.history(counts)).all(axis=None)


def test_a_batch_that_is_held_out_entirely_is_fitted_all_the_same(counts):
    held_out = split_cells(201, 0.9, None, 0)[1]
    counts.obs["batch"] = np.where(np.isin(np.arange(201), held_out), "held out", "trained")
    sx.pp.setup_anndata(counts, batch_key="batch")
    sx.tl.fit(counts, library="latent", **QUICK)
    assert np.isfinite(sx.get.history(counts)).all(axis=None)


def test_one_gene_is_enough(make_counts):
    adata = make_counts(50, 1)
    sx.pp.setup_anndata(adata)
    sx.tl.fit(adata, **QUICK)
    assert np.isfinite(sx.get.history(adata)).all(axis=None)


# ---- options have an effect, or are refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 50},
        {"train_size": 0.5},
        {"lr": 1e-3},
        {"plan": "scvi-tools", "kl_warmup": 0.5},
        {"kl_warmup": 1.0},
        {"weight_decay": 0.1},
        {"max_epochs": 3},
        {"seed": 1},
    ],
    ids=str,
)
def test_options_of_the_run_change_the_fit(registered, options):
    assert differ(
        sx.tl.fit(registered, copy=True, **QUICK | {"max_epochs": 2}),
        sx.tl.fit(registered, copy=True, **QUICK | options),
    )


OTHER_VALUES = {
    "n_hidden": [9],
    "n_latent": [3],
    "n_layers": [2],
    "dropout_rate": [0.0, 0.5],
    "dispersion": ["gene-batch", "gene-label", "gene-cell"],
    "log_variational": [False],
    "reconstruction_loss": ["nb", "poisson", "normal", "bernoulli"],
    "latent_distribution": ["ln"],
    "library": ["latent", "size_factor"],
    "encode_covariates": [True, False],
    "deeply_inject_covariates": [False],
    "batch_representation": ["embedding"],
    "use_batch_norm": ["encoder", "decoder", "none"],
    "use_layer_norm": ["encoder", "decoder", "both"],
    "bias": [True],
    "classification_ratio": [1.0],
    "training": ["alternate"],
    "linear_classifier": [True],
    "y_prior": [{"t0": 0.5, "t1": 0.3, "t2": 0.2}],
    "labels_groups": [{"t0": "a", "t1": "b", "t2": "a"}],
    "classifies": ["z", "z_library"],
    "n_layers_encoder": [2],
    "dropout_rate_decoder": [0.0, 0.5],
    "dropout_rate_encoder": [0.0, 0.5],
    "gene_dispersion": ["gene-batch", "gene-label"],
    "protein_dispersion": ["protein-batch", "protein-label"],
    "reconstruction_loss_gene": ["zinb"],
    "protein_background": ["learned"],
    "protein_efficiency": [True],
    "protein_weight": [2.0],
    "adversarial_classifier": ["on"],
    "adversarial_mixing": [2.0],
    "zero_inflation": ["gene-batch", "gene-label", "gene-cell"],
    "alpha_prior": [0.3],
    "beta_prior": [0.8],
    "minimal_dropout": [0.2],
}


@pytest.mark.parametrize("model", OF_ONE)
def test_every_option_of_a_model_changes_the_fit_or_is_refused(counts, model):
    labels = {"labels_key": "cell_type"}
    if Capability.LABELS in models.get(model).capabilities:
        counts.obs["known"] = counts.obs["cell_type"].astype(str).where(np.arange(counts.n_obs) % 2 == 0, "?")
        labels = {"labels_key": "known", "unlabeled_category": "?"}
    sx.pp.setup_anndata(with_proteins(counts), batch_key="batch", protein_obsm_key="protein", **labels)
    defaults = {field.name: field.default for field in fields(models.get(model).config)}
    quick = {name: value for name, value in QUICK.items() if name in (*defaults, "max_epochs")}
    unchanged = sx.tl.fit(counts, model, key_added="scvi", copy=True, **quick)
    for name, default in defaults.items():
        for value in OTHER_VALUES[name]:
            if value == default:
                continue
            try:
                changed = sx.tl.fit(counts, model, key_added="scvi", copy=True, **quick | {name: value})
            except ValueError as error:
                assert re.search(f"{name}={value!r}|needs {value}_key", str(error))  # noqa: PT017
            else:
                assert differ(unchanged, changed), f"{name}={value!r} has no effect"


def test_registered_size_factors_are_used_by_default_and_on_request(counts):
    sx.pp.setup_anndata(counts, size_factor_key="size")
    default = sx.tl.fit(counts, copy=True, **QUICK)
    assert saved(default)["config"]["library"] == "size_factor"
    assert_same_fit(default, sx.tl.fit(counts, copy=True, library="size_factor", **QUICK))
    assert differ(default, sx.tl.fit(counts, copy=True, library="observed", **QUICK))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gene_likelihood", "it is called reconstruction_loss here"),
        ("gene_dispersion", "it is called dispersion here"),
        ("n_epochs", "it is called max_epochs here"),
        ("use_gpu", "it is called device here"),
        ("accelerator", "it is called device here"),
        ("plan_kwargs", "it is called lr, kl_warmup and weight_decay here"),
        ("n_epochs_kl_warmup", r"it is called kl_warmup \(a share of the steps\) here"),
        ("n_steps_kl_warmup", r"it is called kl_warmup \(a share of the steps\) here"),
        ("override_missing_proteins", "it is called protein_batch_mask=None, an argument of pp.setup_anndata here"),
        ("use_labels_groups", "it is called labels_groups here"),
        ("early_stopping_patience", "it is called early_stopping=<number of epochs> here"),
        ("use_observed_lib_size", "it is called library='observed' or library='latent' here"),
        ("use_size_factor_key", "it is called library='size_factor' here"),
        ("batch_key", r"it is called an argument of pp\.setup_anndata here"),
        ("layer", r"it is called an argument of pp\.setup_anndata here"),
        ("n_latnet", r"Did you mean 'n_latent'\? Valid ones: .*batch_size.*n_latent.*use_batch_norm"),
        ("max_epoch", r"Did you mean 'max_epochs'\?"),
        ("nonsense", r"Valid ones: adversarial_mixing, .*, weight_decay\."),
    ],
)
def test_unknown_keywords_are_answered_with_the_right_ones(registered, name, answer):
    with pytest.raises(TypeError, match=rf"tl\.fit\(model='scvi'\) has no keyword '{name}'.*{answer}"):
        sx.tl.fit(registered, **{name: 1})
    assert "fits" not in registered.uns["scvi_ext"]


def test_a_keyword_of_one_model_is_unknown_to_another(registered):
    with pytest.raises(TypeError, match=r"tl\.fit\(model='scvi'\) has no keyword 'bias'"):
        sx.tl.fit(registered, bias=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"model": "SCVI"},
            ValueError,
            r"model='SCVI' is not one of 'autozi', 'classifier', 'gimvi', 'ldvae', 'scanvi', 'scvi', 'totalvi', 'vaec'",
        ),
        (
            {"model": "linear_scvi"},
            ValueError,
            r"model='linear_scvi' is not one of 'autozi', 'classifier', 'gimvi', 'ldvae', .*, 'vaec'\.",
        ),
        ({"key_added": "a/b"}, ValueError, r"key_added='a/b' must be a name, not"),
        ({"key_added": ""}, ValueError, r"key_added='' must be a name"),
        ({"key_added": 3}, ValueError, r"key_added=3 must be a name"),
        ({"seed": -1}, ValueError, r"seed=-1 must be 0 or more"),
        ({"seed": 1.5}, TypeError, r"seed=1\.5 is a float; a whole number is needed"),
        ({"seed": True}, TypeError, r"seed=True is a bool; a whole number is needed"),
        ({"train_size": 0}, ValueError, r"train_size=0 is a share of the cells"),
        ({"train_size": 90}, ValueError, r"train_size=90 is a share of the cells"),
        ({"train_size": 0.005}, ValueError, r"2 of 201 cells are left for training"),
        ({"validation_size": 0.5}, ValueError, r"validation_size=0\.5 does not fit: train_size=0\.9 leaves 0\.1"),
        ({"batch_size": 1}, ValueError, r"batch_size=1 must be 3 or more: batch normalisation"),
        ({"max_epochs": 0}, ValueError, r"max_epochs=0 must be 1 or more"),
        ({"lr": -1.0}, ValueError, r"lr=-1\.0 must be positive"),
        ({"plan": "fast"}, ValueError, r"plan='fast' is not one of 'auto', 'scvi-tools'"),
        ({"kl_warmup": 2}, ValueError, r"kl_warmup=2 must be a share of the steps"),
        ({"weight_decay": -1e-6}, ValueError, r"weight_decay=-1e-06 must be 0 or more"),
        ({"early_stopping": 0}, ValueError, r"early_stopping=0 must be True, False or a number of epochs"),
        ({"early_stopping": "yes"}, ValueError, r"early_stopping='yes' must be True, False or a number of epochs"),
        ({"device": "tpu"}, ValueError, r"device='tpu' is not supported"),
        ({"n_latent": 0}, ValueError, r"n_latent=0 must be 1 or more"),
        ({"dropout_rate": 1.0}, ValueError, r"dropout_rate=1\.0 must be at least 0 and below 1"),
        ({"reconstruction_loss": "mse"}, ValueError, r"reconstruction_loss='mse' is not one of 'bernoulli', 'nb'"),
        (
            {"dispersion": "gene_batch"},
            ValueError,
            r"dispersion='gene_batch' is not one of .*Did you mean 'gene-batch'",
        ),
        (
            {"dispersion": "gene-label"},
            ValueError,
            r"needs labels_key, which is not registered: call pp\.setup_anndata",
        ),
        ({"library": "size_factor"}, ValueError, r"needs size_factor_key, which is not registered"),
        ({"reconstruction_loss": "poisson", "dispersion": "gene-batch"}, ValueError, r"has no effect: .*no dispersion"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_and_nothing_is_written(registered, options, error, message):
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        sx.tl.fit(registered, **QUICK | options)
    assert set(registered.uns["scvi_ext"]) == {"format", "setup"}
    assert torch.equal(torch.get_rng_state(), state)


def test_data_must_be_set_up_first(counts):
    with pytest.raises(KeyError, match=r"has no 'setup': call scvi_ext\.pp\.setup_anndata\(adata\) first"):
        sx.tl.fit(counts)
    assert "scvi_ext" not in counts.uns


def test_genes_that_share_a_name_are_refused(registered):
    registered.var_names = ["gene1", *registered.var_names[1:]]
    with pytest.raises(ValueError, match=r"1 names more than once: 'gene1'.*call adata\.var_names_make_unique\(\)"):
        sx.tl.fit(registered, **QUICK)
    assert "fits" not in registered.uns["scvi_ext"]


def test_it_works_beside_the_main_thread(registered, make_counts):
    """Where there are no signals, as in servers and schedulers."""
    sx.tl.fit(registered, **QUICK)
    other = make_counts()
    sx.pp.setup_anndata(other, batch_key="batch")
    thread = threading.Thread(target=sx.tl.fit, args=(other,), kwargs=QUICK)
    thread.start()
    thread.join()
    assert_same_fit(registered, other)


def test_every_cell_needs_a_label_for_a_dispersion_per_label(counts):
    counts.obs["cell_type"] = counts.obs["cell_type"].cat.add_categories("unknown")
    counts.obs.iloc[:7, counts.obs.columns.get_loc("cell_type")] = "unknown"
    sx.pp.setup_anndata(counts, labels_key="cell_type", unlabeled_category="unknown")
    with pytest.raises(ValueError, match=r"7 of 201 cells have no label, and an option by label"):
        sx.tl.fit(counts, dispersion="gene-label", **QUICK)
    assert "fits" not in counts.uns["scvi_ext"]
    sx.tl.fit(counts, **QUICK)  # labels are not needed otherwise


def test_what_changed_since_the_setup_is_noticed(registered):
    registered.obs["batch"] = "new"
    with pytest.raises(ValueError, match=r"adata\.obs\['batch'\] has 1 unknown categories in 201 of 201 cells: 'new'"):
        sx.tl.fit(registered, **QUICK)
    del registered.obs["batch"]
    with pytest.raises(KeyError, match=r"'batch' is not in adata\.obs, which has: 'cell_type'"):
        sx.tl.fit(registered, **QUICK)


def test_warnings_have_one_category():
    assert issubclass(ScviExtWarning, UserWarning)
    assert sx.ScviExtWarning is ScviExtWarning


def test_a_plan_of_one_step_ends_at_weight_one(registered):
    sx.tl.fit(registered, max_epochs=1, batch_size=10**6)
    assert registered.uns["scvi_ext"]["fits"]["scvi"]["status"]["kl_weight_final"] == 1


@pytest.mark.parametrize("adata", [5, None], ids=str)
def test_something_else_than_an_anndata_is_refused(adata):
    for function in (sx.tl.fit, sx.tl.get_latent, sx.get.fits):
        with pytest.raises(TypeError, match="an AnnData is needed"):
            function(adata)


def test_fits_in_threads_are_those_without_threads(registered):
    from concurrent.futures import ThreadPoolExecutor

    def fit(adata):
        sx.tl.fit(adata, max_epochs=2, progress=False)
        return adata.uns["scvi_ext"]["fits"]["scvi"]["state"]

    alone = fit(registered.copy())
    with ThreadPoolExecutor(3) as pool:
        for state in pool.map(fit, [registered.copy() for _ in range(3)]):
            for name, array in alone.items():
                np.testing.assert_array_equal(state[name], array)


def test_what_prepares_a_fit_has_the_defaults_of_its_signature():
    arguments = inspect.signature(sx.tl.fit).parameters
    assert {name: arguments[name].default for name in OPTIONS} == OPTIONS
    assert set(arguments) - set(OPTIONS) == {"adata", "model", "resume", "progress", "copy", "model_params"}
