"""Fits of several data sets: what they take, what they write, and that they go on."""

from __future__ import annotations

import re
import signal
from dataclasses import fields

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import scvi_ext as sx
from scvi_ext import models
from scvi_ext._contract import Capability
from scvi_ext.fitted import Fitted
from scvi_ext.models.gimvi import JVAE

JOINT = [name for name in models.names() if Capability.JOINT in models.get(name).capabilities]
QUICK = {"max_epochs": 2, "dim_hidden_encoder": 8, "n_latent": 2}
PARTS = ("elbo", "reconstruction_loss", "kl_z", "kl_library")
CHANGING = ["cells_per_second"]


@pytest.fixture
def make_pair(make_counts):
    """Draw 201 cells with 55 genes in three batches, and 90 with 20 genes in two; 15 genes are in both."""

    def make(**setup: object) -> dict[str, ad.AnnData]:
        rna, spatial = make_counts()[:, 5:].copy(), make_counts(n_cells=90, seed=5)[:, 19::-1].copy()
        spatial.obs_names = [f"spot{i}" for i in range(90)]
        sx.pp.setup_anndata(rna, batch_key="batch")
        sx.pp.setup_anndata(spatial, batch_key="sex", **setup)
        return {"rna": rna, "spatial": spatial}

    return make


@pytest.fixture
def pair(make_pair) -> dict[str, ad.AnnData]:
    return make_pair()


def fit(datasets: dict[str, ad.AnnData], **options) -> dict[str, ad.AnnData] | None:
    return sx.tl.fit(datasets, "gimvi", **QUICK | options)


def saved(adata: ad.AnnData, key: str = "gimvi") -> dict:
    return adata.uns["scvi_ext"]["fits"][key]


def assert_same_state(one: ad.AnnData, other: ad.AnnData, key: str = "gimvi") -> None:
    a, b = saved(one, key)["state"], saved(other, key)["state"]
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same_run(one: ad.AnnData, other: ad.AnnData, key: str = "gimvi") -> None:
    assert_same_state(one, other, key)
    histories = [sx.get.history(adata, key).drop(columns=CHANGING) for adata in (one, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    for name in ("steps", "epochs", "stop_reason", "kl_weight_final", "data"):
        assert saved(one, key)["status"][name] == saved(other, key)["status"][name]


def assert_unchanged(adata: ad.AnnData, before: ad.AnnData) -> None:
    assert (adata.X != before.X).nnz == 0
    assert adata.X.dtype == before.X.dtype
    assert adata.X.format == before.X.format
    pd.testing.assert_frame_equal(adata.obs, before.obs, check_exact=True)
    pd.testing.assert_frame_equal(adata.var, before.var, check_exact=True)
    assert repr(dict(adata.uns)) == repr(dict(before.uns))
    assert not any(len(getattr(adata, slot)) for slot in ("layers", "obsm", "varm", "obsp", "varp"))


def differ(one: ad.AnnData, other: ad.AnnData) -> bool:
    a, b = saved(one)["state"], saved(other)["state"]
    shapes = [{name: values.shape for name, values in state.items()} for state in (a, b)]
    return shapes[0] != shapes[1] or any(not np.array_equal(a[name], b[name]) for name in a)


# ---- what is refused -----------------------------------------------------------------------------------------------


def with_other_names(pair):
    pair["spatial"].var_names = [f"ENSG{i}" for i in range(pair["spatial"].n_vars)]
    return pair


def not_set_up(pair):
    del pair["spatial"].uns["scvi_ext"]
    return pair


REFUSED = {
    "one AnnData": (lambda p: p["rna"], {}, TypeError, r"'gimvi' joins several data sets: give a mapping from their"),
    "a list": (lambda p: list(p.values()), {}, TypeError, "'gimvi' joins several data sets: give a mapping from their"),
    "no data set": (lambda p: {}, {}, ValueError, "0 data sets were given; two or more are joined"),
    "one data set": (lambda p: {"rna": p["rna"]}, {}, ValueError, "1 data sets were given; two or more are joined"),
    "the same twice": (lambda p: p | {"b": p["rna"]}, {}, ValueError, "The same AnnData was given under two names"),
    "a name that is none": (lambda p: {0: p["rna"], "b": p["spatial"]}, {}, TypeError, "0 names a data set; a name"),
    "an empty name": (lambda p: {"": p["rna"], "b": p["spatial"]}, {}, TypeError, "'' names a data set; a name that"),
    "no AnnData": (lambda p: p | {"b": p["rna"].X}, {}, TypeError, "Data set 'b' is a csr_matrix; an AnnData is"),
    "no common genes": (
        with_other_names,
        {},
        ValueError,
        "The data sets 'spatial' have no gene in common with 'rna': they have",
    ),
    "not set up": (not_set_up, {}, KeyError, "call scvi_ext.pp.setup_anndata"),
    "an unknown option": (dict, {"n_hidden": 8}, TypeError, "tl.fit.model='gimvi'. has no keyword 'n_hidden'"),
    "a name of scvi-tools": (dict, {"use_gpu": True}, TypeError, "it is called device here"),
    "a fit to start from": (dict, {"init_from": "scvi"}, ValueError, "init_from has no effect on the model 'gimvi'"),
    "labels": (dict, {"n_samples_per_label": 3}, ValueError, "n_samples_per_label has no effect on the model 'gimvi'"),
    "a data set is missing": (
        dict,
        {"reconstruction_losses": {"rna": "nb"}},
        ValueError,
        "reconstruction_losses must name each of 'rna', 'spatial' once: 'spatial' missing, none unknown",
    ),
    "an unknown likelihood": (
        dict,
        {"reconstruction_losses": {"rna": "nb", "spatial": "normal"}},
        ValueError,
        "reconstruction_losses='normal' is not one of 'nb', 'poisson', 'zinb'",
    ),
    "one likelihood": (dict, {"reconstruction_losses": "nb"}, TypeError, "a mapping from 'rna', 'spatial' to values"),
    "a library that is neither": (dict, {"model_library_bools": ("y", "n")}, ValueError, "model_library_bools holds"),
    "too few cells": (lambda p: p | {"spatial": p["spatial"][:2].copy()}, {}, ValueError, "2 of 2 cells are left for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_before_anything_is_written(pair, case):
    change, options, error, message = REFUSED[case]
    datasets = change(pair)
    before = {name: adata.copy() for name, adata in pair.items()}
    with pytest.raises(error, match=message):
        fit(datasets, **options)
    for name, adata in pair.items():
        assert_unchanged(adata, before[name])


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_that_share_a_name_are_refused(pair):
    pair["spatial"].var_names = ["gene7", "gene7", *pair["spatial"].var_names[2:]]
    with pytest.raises(ValueError, match=r"has 1 names more than once: 'gene7'\. Genes are matched by name"):
        fit(pair)
    assert all("fits" not in adata.uns["scvi_ext"] for adata in pair.values())


@pytest.mark.parametrize(
    "setup",
    [
        {"size_factor_key": "size"},
        {"categorical_covariate_keys": ["cell_type"]},
        {"continuous_covariate_keys": ["age"]},
    ],
    ids=str,
)
def test_covariates_that_would_be_ignored_are_refused(make_pair, setup):
    ((slot, _),) = setup.items()
    with pytest.raises(ValueError, match=rf"Data set 'spatial' was set up with {slot}=.*knows batches only"):
        fit(make_pair(**setup))


def test_labels_are_not_read(make_pair):
    pair = make_pair(labels_key="cell_type")
    fit(pair)
    del pair["spatial"].obs["cell_type"]
    sx.tl.get_latent(pair["spatial"])


@pytest.mark.parametrize("model", [name for name in models.names() if name not in JOINT])
def test_other_models_take_one_data_set(pair, model):
    with pytest.raises(TypeError, match=rf"Model '{model}' takes one AnnData, and 2 data sets were given. Concatenate"):
        sx.tl.fit(pair, model)


def test_a_data_set_without_one_finite_loss_is_named(pair):
    bad = pair["spatial"][:5].copy()
    bad.X = np.full(bad.shape, np.nan, np.float32)
    with pytest.warns(sx.ScviExtWarning):
        sx.pp.setup_anndata(bad, check="warn")
    with pytest.raises(FloatingPointError, match=r"for any of the training cells called 'bad'.*Look at their counts"):
        fit(pair | {"bad": bad})
    assert all("fits" not in adata.uns["scvi_ext"] for adata in pair.values())


def test_single_cells_without_a_finite_loss_are_left_out_by_name(make_counts, pair):
    spatial = pair["spatial"]
    spatial.X = spatial.X.toarray()
    spatial.X[4, 3] = np.inf
    with pytest.warns(sx.ScviExtWarning):
        sx.pp.setup_anndata(spatial, check="warn")
    with pytest.warns(sx.ScviExtWarning, match="spot4"):
        fit(pair, train_size=1.0)
    status = saved(spatial)["status"]
    assert list(status["non_finite_cells"]) == ["spot4 (spatial)"]
    assert list(status["non_finite_genes"]) == [spatial.var_names[3]]


# ---- what decides the result, and what is left alone ---------------------------------------------------------------


def test_data_sets_are_not_changed_but_for_the_fit(pair):
    before = {name: adata.copy() for name, adata in pair.items()}
    assert fit(pair) is None
    for name, adata in pair.items():
        assert list(adata.uns["scvi_ext"]["fits"]) == ["gimvi"]
        assert adata.uns["scvi_ext"].pop("last_fit") == "gimvi"
        del adata.uns["scvi_ext"]["fits"]
        assert_unchanged(adata, before[name])


def test_copies_are_changed_in_the_place_of_the_data_sets(pair):
    before = {name: adata.copy() for name, adata in pair.items()}
    copies = fit(pair, copy=True)
    assert list(copies) == ["rna", "spatial"]
    fit(pair)
    for name, adata in copies.items():
        assert_same_run(adata, pair[name])
        assert "fits" not in before[name].uns["scvi_ext"]


def test_each_knows_all_data_sets_and_which_one_it_is(pair):
    fit(pair)
    rna, spatial = pair.values()
    assert_same_state(rna, spatial)
    genes = list(rna.var_names) + [f"gene{i}" for i in (4, 3, 2, 1, 0)]  # then what the other adds, in its order
    for name, adata in pair.items():
        joint = saved(adata)["joint"]
        assert joint["dataset"] == name
        assert list(joint["datasets"]) == ["rna", "spatial"]
        assert list(joint["genes"]) == genes
        for i, other in enumerate((rna, spatial)):
            assert [genes[g] for g in joint["positions"][str(i)]] == list(other.var_names)
        assert [int(joint["batches"][str(i)]) for i in (0, 1)] == [3, 2]
        assert list(saved(adata)["var_names"]) == list(adata.var_names)
        assert saved(adata)["setup"]["batch_key"] == {"rna": "batch", "spatial": "sex"}[name]
    assert sx.get.fits(spatial).loc["gimvi", "genes"] == 20


@pytest.mark.parametrize("n_genes", [20, 15], ids=["genes of its own", "all of them are in the other"])
def test_likelihood_and_library_are_the_same_in_all_data_sets_by_default(pair, n_genes):
    pair["spatial"] = pair["spatial"][:, :n_genes].copy()
    fit(pair)
    for adata in pair.values():
        assert list(saved(adata)["config"]["reconstruction_losses"]) == ["nb", "nb"]
        assert list(saved(adata)["config"]["model_library_bools"]) == [False, False]
    assert "decoder.px_dropout_decoder.weight" not in saved(pair["rna"])["state"]


def test_the_same_seed_gives_the_same_fit_and_another_one_another(pair):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = fit(pair, copy=True, seed=3)
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])
    torch.randn(5), np.random.normal(size=5)  # what happens elsewhere does not matter
    assert_same_run(first["rna"], fit(pair, copy=True, seed=3)["rna"])
    assert differ(first["rna"], fit(pair, copy=True, seed=4)["rna"])


def stored_as(kind: str, adata: ad.AnnData, tmp_path) -> ad.AnnData:
    adata = adata.copy()
    if kind == "view":
        wider = ad.concat([adata, adata[:7]], index_unique="-", merge="same", uns_merge="first")
        view = wider[: adata.n_obs]
        assert view.is_view
        return view
    if kind == "backed":
        adata.write_h5ad(tmp_path / "a.h5ad")
        return ad.read_h5ad(tmp_path / "a.h5ad", backed="r+")
    adata.X = {
        "csc": sp.csc_matrix,
        "dense": lambda x: x.toarray(),
        "integer": lambda x: x.astype(np.int64),
        "float64": lambda x: x.astype(np.float64),
    }[kind](adata.X)
    return adata


@pytest.mark.parametrize("kind", ["csc", "dense", "integer", "float64", "view", "backed"])
def test_how_counts_are_stored_does_not_matter(pair, tmp_path, kind):
    expected = fit(pair, copy=True)["rna"]
    stored = stored_as(kind, pair["spatial"], tmp_path)
    fit(pair | {"spatial": stored})
    assert_same_run(pair["rna"], expected)
    assert_same_run(stored, expected)
    if kind == "backed":
        stored.file.close()


def test_the_names_of_the_data_sets_do_not_matter(pair):
    expected = fit(pair, copy=True)
    renamed = {"a / b": pair["rna"], "spatial, 2": pair["spatial"]}
    fit(renamed)
    assert_same_run(pair["rna"], expected["rna"])
    assert saved(pair["spatial"])["joint"]["dataset"] == "spatial, 2"


OTHER_VALUES = {
    "reconstruction_losses": [{"spatial": "nb", "rna": "zinb"}, ("nb", "poisson")],
    "model_library_bools": [{"spatial": True, "rna": False}, (True, False)],
    "n_latent": [3],
    "n_layers_encoder_individual": [2],
    "n_layers_encoder_shared": [2],
    "dim_hidden_encoder": [9],
    "n_layers_decoder_individual": [1],
    "n_layers_decoder_shared": [0, 2],
    "dim_hidden_decoder_individual": [7],
    "dim_hidden_decoder_shared": [7],
    "dropout_rate_encoder": [0.0, 0.5],
    "dropout_rate_decoder": [0.0, 0.5],
    "dispersion": ["gene", "gene-cell"],
    "log_variational": [False],
    "kappa": [0.0, 2.0],
    "kappa_fades": [True],
    "fool_step": ["separate"],
}


@pytest.mark.parametrize("model", JOINT)
def test_every_option_of_a_model_changes_the_fit(pair, model):
    layers = {"n_layers_decoder_individual": 1, "n_layers_decoder_shared": 1}
    unchanged = {beside: fit(pair, copy=True, **(layers if beside else {}))["rna"] for beside in (False, True)}
    for field in fields(models.get(model).config):
        beside = (
            field.name.endswith(("decoder_individual", "decoder_shared", "rate_decoder")) and field.name not in layers
        )
        for value in OTHER_VALUES[field.name]:
            changed = fit(pair, copy=True, **(layers if beside else {}) | {field.name: value})["rna"]
            assert differ(unchanged[beside], changed), f"{field.name}={value!r} has no effect"


def test_history(pair):
    fit(pair, max_epochs=3, model_library_bools=(True, False))
    for adata in pair.values():
        history = sx.get.history(adata)
        assert list(history.columns) == [
            *(f"{part}_{which}" for which in ("train", "validation") for part in PARTS),
            *("kl_weight", "lr", "cells_per_second"),
        ]
        for which in ("train", "validation"):
            elbo, *costs = (history[f"{part}_{which}"] for part in PARTS)
            np.testing.assert_allclose(elbo, -sum(costs), rtol=1e-9)  # sums of the same float64
        assert history["kl_weight"].iloc[-1] == 1
        assert len(history) == 3


def test_training_raises_the_elbo_of_cells_that_were_not_trained_on(pair):
    fit(pair, max_epochs=60, n_latent=4, dim_hidden_encoder=32)
    history = sx.get.history(pair["rna"])
    # Three planted types: the gain is about 20 nats per cell.
    assert history["elbo_validation"].iloc[-1] > history["elbo_validation"].iloc[0] + 3
    assert history["elbo_train"].iloc[-1] > history["elbo_train"].iloc[0] + 3


def test_early_stopping_keeps_the_best_epoch(pair):
    fit(pair, max_epochs=60, early_stopping=2, lr=0.1)
    status, history = saved(pair["spatial"])["status"], sx.get.history(pair["spatial"])
    assert status["stop_reason"] == "early stopping"
    assert history["elbo_validation"].idxmax() == status["best_epoch"]
    assert status["epochs"] == status["best_epoch"] + 2
    assert_same_state(*pair.values())


@pytest.mark.parametrize("first", ["rna", "spatial"])
@pytest.mark.parametrize("train_size", [0.9, 1.0])
def test_a_few_cells_beside_many(pair, first, train_size):
    """Three cells go round; none of them is held out."""
    pair["spatial"] = pair["spatial"][:3].copy()
    datasets = dict(sorted(pair.items(), reverse=first == "spatial"))
    fit(datasets, train_size=train_size)
    history = sx.get.history(pair["spatial"])
    assert np.isfinite(history.to_numpy()).all()
    assert ("elbo_validation" in history) == (train_size < 1)
    sx.tl.get_latent(pair["spatial"])
    assert pair["spatial"].obsm["X_gimvi"].shape == (3, 2)


def test_three_data_sets_need_not_have_a_gene_that_all_have(make_counts):
    chain = {}
    for i, genes in enumerate([slice(0, 30), slice(20, 50), slice(40, 60)]):
        chain[f"d{i}"] = make_counts(n_cells=60 + i, seed=i)[:, genes].copy()
        sx.pp.setup_anndata(chain[f"d{i}"])
    fit(chain, fool_step="separate")
    for i, adata in enumerate(chain.values()):
        assert saved(adata)["joint"]["dataset"] == f"d{i}"
        assert len(saved(adata)["joint"]["genes"]) == 60
    apart = {name: chain[name] for name in ("d0", "d2")} | {"x": chain["d0"].copy(), "y": chain["d2"].copy()}
    with pytest.raises(ValueError, match="The data sets 'd2', 'y' have no gene in common with 'd0', 'x'"):
        fit(apart)


def test_few_genes_in_common_are_warned_of(make_counts):
    pair = {"rna": make_counts(n_cells=60)[:, :40].copy(), "spatial": make_counts(n_cells=50, seed=1)[:, 36:].copy()}
    for adata in pair.values():
        sx.pp.setup_anndata(adata)
    with pytest.warns(UserWarning, match="Data set '.*' has 4 of its (40|24) genes in common with others") as warned:
        fit(pair)
    assert len(warned) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda adata: adata.uns.clear(), "Data set 'spatial': .*call scvi_ext.pp.setup_anndata"),
        (lambda adata: adata.X.data.__imul__(0.5), "Data set 'spatial': adata.X holds"),
        (lambda adata: setattr(adata, "var_names", ["x"] * adata.n_vars), "Data set 'spatial': adata.var_names has"),
    ],
    ids=["not set up", "no counts", "one name for all"],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_what_is_wrong_with_a_data_set_names_it(pair, spoil, message):
    spoil(pair["spatial"])
    with pytest.raises((KeyError, ValueError), match=message):
        fit(pair)


def test_values_without_an_order_are_refused(pair):
    with pytest.raises(TypeError, match=r"reconstruction_losses=.* is a set; a mapping from 'rna', 'spatial'"):
        fit(pair, reconstruction_losses={"zinb", "nb"})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("generative_distributions", "reconstruction_losses"),
        ("gene_likelihood", "reconstruction_losses"),
        ("model_library_size", "model_library_bools"),
        ("n_hidden", "dim_hidden_encoder"),
    ],
)
def test_options_of_scvi_tools_are_answered_with_ours(pair, theirs, ours):
    with pytest.raises(TypeError, match=f"has no keyword '{theirs}': it is called {ours} here"):
        fit(pair, **{theirs: 1})


def test_a_fit_is_logged(pair, logged):
    fit(pair)
    text = logged()
    assert "fitting gimvi on 262 cells x 60 genes of the data sets 'rna', 'spatial', 29 held out" in text
    assert "'gimvi', the fitted model (adata.uns['scvi_ext']['fits'] of each of the data sets 'rna', 'spatial')" in text


# ---- interrupted and resumed ---------------------------------------------------------------------------------------

RUN = {"max_epochs": 4, "batch_size": 60}  # 181 cells of the larger one: 4 steps in an epoch, 16 in all


@pytest.fixture(autouse=True)
def python_s_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupt_at(monkeypatch):
    """``interrupt_at(step)``: Ctrl-C is pressed in this training step; None lets runs be."""
    original = JVAE.losses

    def interfere(step: int | None) -> None:
        done = 0

        def losses(module, *cells, **options):
            nonlocal done
            done += 1
            if done == step:
                signal.raise_signal(signal.SIGINT)
            return original(module, *cells, **options)

        monkeypatch.setattr(JVAE, "losses", losses)

    return interfere


@pytest.fixture
def interrupted(interrupt_at):
    def run(datasets, step=6, **options):
        interrupt_at(step)
        with pytest.raises(KeyboardInterrupt):
            fit(datasets, **RUN | options)
        interrupt_at(None)
        return datasets

    return run


def resume(datasets: dict[str, ad.AnnData], **options) -> None:
    sx.tl.fit(datasets, "gimvi", resume=True, **options)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (1, {}),
        (6, {}),
        (8, {}),
        (6, {"fool_step": "separate"}),
        (6, {"kappa_fades": True, "kl_warmup": 0.9}),
        (6, {"early_stopping": 3}),
        (6, {"model_library_bools": (True, True), "n_layers_decoder_individual": 1}),
    ],
    ids=str,
)
def test_interrupted_and_resumed_is_to_the_last_bit_as_if_uninterrupted(make_pair, pair, interrupted, step, options):
    interrupted(pair, step, **options)
    assert {saved(adata)["status"]["stop_reason"] for adata in pair.values()} == {"interrupted"}
    resume(pair)
    expected = make_pair()
    fit(expected, **RUN | options)
    for name, adata in pair.items():
        assert_same_run(adata, expected[name])
        assert "checkpoint" not in saved(adata)


def test_it_goes_on_after_files_in_any_order_of_the_data_sets(make_pair, pair, interrupted, tmp_path):
    interrupted(pair, fool_step="separate")
    pair["spatial"].write_zarr(tmp_path / "spatial.zarr")
    pair["rna"].write_h5ad(tmp_path / "rna.h5ad")
    read = {"spatial": ad.read_zarr(tmp_path / "spatial.zarr"), "rna": ad.read_h5ad(tmp_path / "rna.h5ad")}
    resume(read)
    expected = make_pair()
    fit(expected, **RUN, fool_step="separate")
    assert_same_run(read["rna"], expected["rna"])
    assert_same_state(read["rna"], read["spatial"])


def test_what_was_finished_is_not_given_up_for_what_is_interrupted(pair, interrupted):
    fit(pair)
    before = {name: saved(adata)["state"] for name, adata in pair.items()}
    interrupted(pair)
    for name, adata in pair.items():
        assert list(adata.uns["scvi_ext"]["fits"]) == ["gimvi", "gimvi_interrupted"]
        assert saved(adata)["state"] is before[name]
    resume(pair, key_added="gimvi_interrupted")
    assert saved(pair["rna"], "gimvi_interrupted")["status"]["stop_reason"] == "finished"
    assert_same_state(*pair.values(), "gimvi_interrupted")


def test_a_finished_fit_of_one_of_them_is_not_given_up_either(pair, interrupted):
    fit(pair)
    del pair["spatial"].uns["scvi_ext"]["fits"]
    interrupted(pair)
    assert "gimvi_interrupted" in pair["rna"].uns["scvi_ext"]["fits"]
    assert list(pair["spatial"].uns["scvi_ext"]["fits"]) == ["gimvi_interrupted"]


def test_a_checkpoint_is_kept_on_request(pair):
    fit(pair, checkpoint=True)
    before = saved(pair["rna"])["state"]
    resume(pair)  # there is nothing left to do
    for name, values in before.items():
        np.testing.assert_array_equal(saved(pair["rna"])["state"][name], values)
    assert sx.get.fits(pair["spatial"]).loc["gimvi", "resumable"]


def drop_one(pair):
    del pair["spatial"]
    pair["other"] = pair["rna"].copy()


def rename(pair):
    pair["visium"] = pair.pop("spatial")


def swap(pair):
    pair["rna"], pair["spatial"] = pair["spatial"], pair["rna"]


def change_a_count(pair):
    pair["spatial"].X = pair["spatial"].X.toarray()
    pair["spatial"].X[5, 7] += 1


def fit_one_again(pair):
    fit({"rna": pair["rna"], "spatial": pair["spatial"].copy()}, checkpoint=True, seed=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop_one,
            "Fit 'gimvi' was made of the data sets 'rna', 'spatial': give these, under the same names, to resume",
        ),
        (rename, "Fit 'gimvi' was made of the data sets 'rna', 'spatial': give these, under the same names, to resume"),
        (swap, "Fit 'gimvi' was made of the data sets 'rna', 'spatial': give these, under the same names, to resume"),
        (change_a_count, "Fit 'gimvi' was trained on other data: cells or counts of a data set have changed since"),
        (fit_one_again, "The data sets hold different fits called 'gimvi', which were not trained together"),
    ],
)
def test_what_is_no_longer_the_same_is_not_resumed(pair, change, message):
    fit(pair, checkpoint=True)
    change(pair)
    with pytest.raises(ValueError, match=message):
        resume(pair)


def test_what_cannot_go_on_is_refused(pair, interrupted):
    with pytest.raises(KeyError, match="has no fits"):
        resume(pair)
    fit(pair)
    with pytest.raises(ValueError, match="'gimvi' was kept without a checkpoint, so it cannot go on"):
        resume(pair)
    interrupted(pair, key_added="again")
    for options in ({"max_epochs": 10}, {"n_latent": 2}, {"seed": 0}, {"kappa": 1.0}):
        (name,) = options
        with pytest.raises(ValueError, match=f"resume=True goes on with the options of the run.*leave out '{name}'"):
            resume(pair, key_added="again", **options)
    for adata in pair.values():
        sx.tl.fit(adata, max_epochs=1, checkpoint=True)
    with pytest.raises(ValueError, match="Fit 'scvi' is of the model 'scvi', not 'gimvi': resume it as that"):
        resume(pair, key_added="scvi")
    with pytest.raises(ValueError, match="Fit 'again' is of the model 'gimvi', not 'scvi': resume it as that"):
        sx.tl.fit(pair["rna"], key_added="again", resume=True)
    with pytest.raises(TypeError, match="joins several data sets: give a mapping"):
        sx.tl.fit(pair["rna"], "gimvi", key_added="again", resume=True)


# ---- planted structure ---------------------------------------------------------------------------------------------

PANELS = {"a": [*range(40)], "b": [*range(20, 60)], "c": [*range(10, 31), *range(45, 52)]}


def planted() -> tuple[dict[str, ad.AnnData], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Data sets of the same four types of cells, with panels of their own; profiles over all genes, and types."""
    rng = np.random.default_rng(2)
    profiles = rng.gamma(0.5, 1.0, (4, 60)) + 0.05
    datasets, means, types = {}, {}, {}
    for (name, panel), n_cells, depth in zip(PANELS.items(), (400, 300, 300), (300, 300, 150), strict=True):
        genes, kinds = rng.permutation(panel), rng.integers(4, size=n_cells)
        mean = profiles[kinds][:, genes]
        mean = mean / mean.sum(1, keepdims=True) * rng.lognormal(np.log(depth), 0.3, (n_cells, 1))
        datasets[name] = ad.AnnData(
            sp.csr_matrix(rng.poisson(mean).astype(np.float32)),
            obs=pd.DataFrame(index=[f"{name}{i}" for i in range(n_cells)]),
            var=pd.DataFrame(index=[f"gene{g}" for g in genes]),
        )
        sx.pp.setup_anndata(datasets[name])
        means[name], types[name] = profiles[kinds], kinds
    return datasets, means, types


def test_planted_profiles_of_genes_that_were_not_measured_are_found():
    datasets, profiles, types = planted()
    sx.tl.fit(datasets, "gimvi", n_latent=4, dim_hidden_encoder=32)
    for name, adata in datasets.items():
        fitted = Fitted.open(adata, None)
        genes = list(fitted.fit.joint["genes"])
        for mode, other in enumerate(PANELS):
            held_out = sorted({*PANELS[other]} - {*PANELS[name]})
            if not held_out:
                continue

            def scale(cells, draws, module=fitted.module, mode=mode):
                return (module.decode_joint(module.encode(cells).loc, cells, mode).scale,)

            parts = [scale for _, (scale,) in fitted.map(scale, batch_size=None, seed=0)]
            found = np.concatenate(parts)[:, [genes.index(f"gene{g}") for g in held_out]]
            expected = profiles[name] / profiles[name][:, PANELS[other]].sum(1, keepdims=True)
            expected = expected[:, held_out]
            left = ((found - expected) ** 2).sum() / ((expected - expected.mean(0)) ** 2).sum()
            # Of the squares around the mean of each gene; 0.25 and less where the test was written.
            assert left < 0.5, (name, other)
            correlations = [np.corrcoef(found[:, i], expected[:, i])[0, 1] for i in range(len(held_out))]
            assert np.median(correlations) > 0.9, (name, other)
        sx.tl.get_latent(adata)
    for one, other in [("a", "b"), ("a", "c"), ("c", "b")]:
        here, there = datasets[one].obsm["X_gimvi"], datasets[other].obsm["X_gimvi"]
        nearest = ((here[:, None] - there) ** 2).sum(-1).argmin(1)
        assert (types[other][nearest] == types[one]).mean() > 0.9, (one, other)


def test_the_error_of_a_bad_option_names_it(pair):
    with pytest.raises(ValueError, match=re.escape("dispersion='gene-label' needs labels, and data sets need not")):
        fit(pair, dispersion="gene-label")
