"""Models that learn labels, as they are called: what is read, what is refused, what is written."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

import scvi_ext as sx
from scvi_ext import models
from scvi_ext._contract import Capability
from scvi_ext.data.sampler import split_cells
from scvi_ext.fitted import Fitted

LABELLING = [name for name in models.names() if Capability.LABELS in models.get(name).capabilities]
WITH_Z = [name for name in LABELLING if Capability.COUNTS in models.get(name).capabilities]
SHORT = {"max_epochs": 3, "n_hidden": 16}


@pytest.fixture
def partly(counts) -> ad.AnnData:
    """Half of the cells have a label; two batches, three planted types."""
    hidden = np.arange(counts.n_obs) % 2 == 1
    counts.obs["known"] = pd.Categorical(counts.obs["cell_type"].astype(str).where(~hidden, "?"))
    sx.pp.setup_anndata(counts, batch_key="batch", labels_key="known", unlabeled_category="?")
    return counts


def fitted_labels(adata: ad.AnnData, key: str) -> np.ndarray:
    return adata.obs[f"{key}_prediction"].astype(str).to_numpy()


# ---- predictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", LABELLING)
def test_planted_types_are_found_in_cells_without_a_label(partly, model):
    sx.tl.fit(partly, model, n_hidden=32, max_epochs=40)
    sx.tl.classify(partly)
    hidden = (partly.obs["known"] == "?").to_numpy()
    truth = partly.obs["cell_type"].astype(str).to_numpy()
    right = fitted_labels(partly, model) == truth
    # One of three types by chance: a third of 100 cells, and 60 is six standard deviations above it.
    assert right[hidden].sum() > 60
    assert right[~hidden].mean() > 0.6
    probabilities = partly.obsm[f"{model}_probabilities"]
    assert list(probabilities.columns) == ["t0", "t1", "t2"]
    assert list(partly.obs[f"{model}_prediction"].cat.categories) == ["t0", "t1", "t2"]
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probabilities.max(1), partly.obs[f"{model}_confidence"])
    np.testing.assert_array_equal(probabilities.idxmax(1), fitted_labels(partly, model))


@pytest.mark.parametrize("model", LABELLING)
def test_the_labels_of_the_cells_are_not_read(partly, model):
    """A prediction is made from counts: other labels, unknown ones, missing ones and no column change nothing."""
    sx.tl.fit(partly, model, **SHORT)
    expected = sx.tl.classify(partly, copy=True).obsm[f"{model}_probabilities"]
    others = [
        partly.obs["cell_type"].astype(str).to_numpy()[::-1],
        np.full(partly.n_obs, "never seen"),
        np.where(np.arange(partly.n_obs) % 3, None, "t0"),
    ]
    for labels in others:
        partly.obs["known"] = labels
        pd.testing.assert_frame_equal(sx.tl.classify(partly, copy=True).obsm[f"{model}_probabilities"], expected)
    del partly.obs["known"]
    pd.testing.assert_frame_equal(sx.tl.classify(partly, copy=True).obsm[f"{model}_probabilities"], expected)


@pytest.mark.parametrize("model", LABELLING)
def test_what_is_hidden_is_not_learned(partly, model):
    """The same fit, to the last bit, whatever the truth of the cells without a label is."""
    first = sx.tl.fit(partly, model, copy=True, **SHORT)
    partly.obs["cell_type"] = partly.obs["cell_type"].to_numpy()[::-1]
    second = sx.tl.fit(partly, model, copy=True, **SHORT)
    states = [adata.uns["scvi_ext"]["fits"][model]["state"] for adata in (first, second)]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    store = Fitted.open(first, model, None, decodes=False, capability=Capability.LABELS).store
    np.testing.assert_array_equal(store.labels < 0, partly.obs["known"] == "?")


def test_the_temperature_is_that_of_held_out_cells(partly):
    sx.tl.fit(partly, "classifier", n_hidden=32, max_epochs=40, train_size=0.6)
    status = partly.uns["scvi_ext"]["fits"]["classifier"]["status"]
    _, held_out = split_cells(partly.n_obs, 0.6, None, 0)
    labelled = held_out[(partly.obs["known"] != "?").to_numpy()[held_out]]
    assert status["n_calibration"] == len(labelled)
    raw = sx.tl.classify(partly, calibrated=False, copy=True).obsm["classifier_probabilities"]
    calibrated = sx.tl.classify(partly, copy=True).obsm["classifier_probabilities"]
    expected = softmax(np.log(raw.to_numpy(np.float64)) / status["temperature"], axis=1)
    np.testing.assert_allclose(calibrated, expected, rtol=2e-3, atol=1e-6)  # of float32 probabilities
    codes = calibrated.columns.get_indexer(partly.obs["known"].astype(str))[labelled]

    def cost(table: pd.DataFrame) -> float:
        return -np.log(table.to_numpy()[labelled, codes]).mean()

    assert cost(calibrated) < cost(raw)


def test_without_held_out_labels_the_temperature_is_one(partly):
    sx.tl.fit(partly, "scanvi", train_size=1.0, **SHORT)
    status = partly.uns["scvi_ext"]["fits"]["scanvi"]["status"]
    assert (status["temperature"], status["n_calibration"]) == (1.0, 0)
    assert "classification_loss_validation" not in sx.get.history(partly)


def test_cells_that_nobody_is_sure_of_are_left_without_a_label(partly):
    sx.tl.fit(partly, "scanvi", **SHORT)
    sx.tl.classify(partly)
    confidence = partly.obs["scanvi_confidence"].to_numpy()
    # Between two cells: on some processors products differ in the last bit from call to call.
    threshold = float(np.sort(confidence)[len(confidence) // 2 :][:2].mean(dtype=np.float64))
    sx.tl.classify(partly, min_confidence=threshold, key_added="sure")
    unsure = fitted_labels(partly, "sure") == "?"
    np.testing.assert_array_equal(unsure, confidence < threshold)
    np.testing.assert_array_equal(fitted_labels(partly, "sure")[~unsure], fitted_labels(partly, "scanvi")[~unsure])
    np.testing.assert_allclose(partly.obs["sure_confidence"], confidence, rtol=1e-6)


def test_only_the_chosen_cells_are_classified(partly):
    sx.tl.fit(partly, "classifier", **SHORT)
    whole = sx.tl.classify(partly, copy=True)
    sx.tl.classify(partly, indices=[5, 2, 9], batch_size=2)
    chosen = np.isin(np.arange(partly.n_obs), [5, 2, 9])
    assert partly.obs["classifier_prediction"].isna().to_numpy().tolist() == (~chosen).tolist()
    found, expected = (a.obsm["classifier_probabilities"].to_numpy() for a in (partly, whole))
    np.testing.assert_allclose(found[chosen], expected[chosen], rtol=1e-5)
    assert np.isnan(found[~chosen]).all()


def test_a_label_with_a_slash_can_be_written_to_a_file(counts, tmp_path):
    """h5ad takes "/" for a path. Warnings are errors here, and anndata warns of such a column."""
    counts.obs["cell_type"] = counts.obs["cell_type"].cat.rename_categories({"t1": "T/NK"})
    counts.obs["known"] = counts.obs["cell_type"].astype(str).where(np.arange(counts.n_obs) % 2 == 0, "?")
    sx.pp.setup_anndata(counts, labels_key="known", unlabeled_category="?")
    sx.tl.fit(counts, "classifier", **SHORT)
    sx.tl.classify(counts)
    assert list(counts.obsm["classifier_probabilities"].columns) == ["T|NK", "t0", "t2"]
    assert list(counts.obs["classifier_prediction"].cat.categories) == ["T/NK", "t0", "t2"]
    counts.obsm["X_rep"] = np.eye(3)[counts.obs["cell_type"].cat.codes]
    sx.metrics.annotation_baselines(counts, "cell_type", use_rep="X_rep", classifiers={})
    right = (counts.obs["classifier_prediction"].astype(str) == counts.obs["cell_type"].astype(str)).to_numpy()
    found = sx.get.annotation_df(counts).loc["classifier", "accuracy"]
    assert found == pytest.approx(right[(counts.obs["known"] == "?").to_numpy()].mean())
    counts.write_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(
        ad.read_h5ad(tmp_path / "a.h5ad").obsm["classifier_probabilities"], counts.obsm["classifier_probabilities"]
    )


def test_unused_categories_never_become_predictions(counts):
    kinds = [*counts.obs["cell_type"].cat.categories, "phantom"]
    counts.obs["cell_type"] = counts.obs["cell_type"].cat.set_categories(kinds)
    sx.pp.setup_anndata(counts, labels_key="cell_type")
    sx.tl.fit(counts, "scanvi", **SHORT)
    sx.tl.classify(counts)
    assert list(counts.obsm["scanvi_probabilities"].columns) == ["t0", "t1", "t2"]


# ---- fits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", LABELLING)
def test_it_travels_and_goes_on(partly, model, tmp_path):
    known = {
        "y_prior": {"t0": 0.5, "t2": 0.2, "t1": 0.3},
        "labels_groups": {"t0": "a", "t1": "b", "t2": "a"},
    }
    options = {name: value for name, value in known.items() if name in models.get(model).config.__dataclass_fields__}
    whole = sx.tl.fit(partly, model, copy=True, **SHORT | options)
    sx.tl.classify(whole)
    whole.write_h5ad(tmp_path / "a.h5ad")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    expected = whole.obsm[f"{model}_probabilities"]
    np.testing.assert_array_equal(sx.tl.classify(read, copy=True).obsm[f"{model}_probabilities"], expected)
    sx.io.write_model(read, tmp_path / "model")
    new = ad.AnnData(partly.X[:, ::-1], obs=partly.obs[["batch"]].copy(), var=partly.var.iloc[::-1])
    sx.io.read_model(tmp_path / "model", new)
    np.testing.assert_allclose(sx.tl.classify(new, copy=True).obsm[f"{model}_probabilities"], expected, rtol=1e-4)


@pytest.mark.parametrize("model", LABELLING)
def test_an_interrupted_run_goes_on_exactly(partly, model, monkeypatch):
    from scvi_ext.engine import fit as engine

    options = SHORT | {"max_epochs": 4, "n_samples_per_label": 9}
    whole = sx.tl.fit(partly, model, copy=True, checkpoint=True, **options)
    real = engine._Loop._evaluate

    def interrupt(loop, epoch):
        if epoch == 1:
            import _thread

            _thread.interrupt_main()
        return real(loop, epoch)

    monkeypatch.setattr(engine._Loop, "_evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.fit(partly, model, **options)
    monkeypatch.undo()
    assert partly.uns["scvi_ext"]["fits"][model]["status"]["stop_reason"] == "interrupted"
    sx.tl.fit(partly, model, resume=True)
    for adata in (whole, partly):
        sx.tl.classify(adata)
    np.testing.assert_array_equal(*(a.obsm[f"{model}_probabilities"] for a in (whole, partly)))


@pytest.mark.parametrize("model", LABELLING)
def test_early_stopping_restores_the_best_state(partly, model):
    sx.tl.fit(partly, model, max_epochs=60, n_hidden=16, early_stopping=2)
    history, status = sx.get.history(partly), partly.uns["scvi_ext"]["fits"][model]["status"]
    watched = history["elbo_validation"] if model in WITH_Z else -history["classification_loss_validation"]
    assert status["best_epoch"] == watched.idxmax()


def test_early_stopping_needs_a_held_out_cell_with_a_label(counts):
    known = np.full(counts.n_obs, "?", dtype=object)
    train, _ = split_cells(counts.n_obs, 0.9, None, 0)
    known[train[:30]] = counts.obs["cell_type"].astype(str).iloc[train[:30]]
    counts.obs["known"] = known
    sx.pp.setup_anndata(counts, labels_key="known", unlabeled_category="?")
    with pytest.raises(ValueError, match="early_stopping watches held-out cells, and there are none"):
        sx.tl.fit(counts, "classifier", early_stopping=True)


def test_a_fit_can_start_from_one_without_labels(counts):
    sx.pp.setup_anndata(counts, batch_key="batch")
    sx.tl.fit(counts, "scvi", max_epochs=20, n_latent=4, n_hidden=16)
    sx.pp.setup_anndata(counts, batch_key="batch", labels_key="cell_type")
    sx.tl.fit(counts, "scanvi", init_from="scvi", max_epochs=1, lr=1e-9)
    fits = counts.uns["scvi_ext"]["fits"]
    assert fits["scanvi"]["config"]["n_latent"] == 4
    for name, array in fits["scvi"]["state"].items():
        if "running" not in name and "tracked" not in name:
            np.testing.assert_allclose(fits["scanvi"]["state"][name], array, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("classifies", ["z", "z_library"])
@pytest.mark.parametrize("library", ["observed", "latent", "size_factor"])
def test_a_classifier_around_a_fit_leaves_it_as_it_is(counts, classifies, library):
    sx.pp.setup_anndata(counts, batch_key="batch", labels_key="cell_type", size_factor_key="size")
    sx.tl.fit(counts, "scvi", library=library, **SHORT)
    sx.tl.fit(counts, "classifier", init_from="scvi", classifies=classifies, **SHORT)
    fits = counts.uns["scvi_ext"]["fits"]
    for name, array in fits["scvi"]["state"].items():
        np.testing.assert_array_equal(fits["classifier"]["state"][f"frozen.{name}"], array)
    sx.tl.classify(counts)
    with pytest.raises(ValueError, match="not possible with a 'classifier' fit, which has no 'decode'"):
        sx.tl.get_latent(counts, key="classifier")


def test_labels_that_are_drawn_evenly(partly):
    even = sx.tl.fit(partly, "scanvi", n_samples_per_label=5, copy=True, **SHORT)
    assert even.uns["scvi_ext"]["fits"]["scanvi"]["run"]["n_samples_per_label"] == 5
    all_of_them = sx.tl.fit(partly, "scanvi", copy=True, **SHORT)
    states = [a.uns["scvi_ext"]["fits"]["scanvi"]["state"]["classifier.output.bias"] for a in (even, all_of_them)]
    assert not np.array_equal(*states)


def test_z2_is_read_out_beside_z(partly):
    sx.tl.fit(partly, "scanvi", n_latent=4, **SHORT)
    sx.tl.get_latent(partly)
    sx.tl.get_latent(partly, latent="z2")
    sx.tl.get_latent(partly, latent="z2", return_dist=True, key_added="both")
    assert partly.obsm["X_scanvi"].shape == partly.obsm["X_scanvi_z2"].shape == (partly.n_obs, 4)
    np.testing.assert_array_equal(partly.obsm["X_scanvi_z2"], partly.obsm["both"])
    assert (partly.obsm["both_var"] > 0).all()
    assert not np.allclose(partly.obsm["X_scanvi"], partly.obsm["X_scanvi_z2"])


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
@pytest.mark.parametrize("model", WITH_Z)
def test_every_read_out_works_with_every_dispersion_and_without_labels(partly, model, dispersion, readout, read):
    sx.tl.fit(partly, model, dispersion=dispersion, key_added="scvi", max_epochs=1, n_hidden=8, n_latent=2)
    if readout == "get_likelihood_parameters" and dispersion != "gene":
        sx.tl.get_likelihood_parameters(partly)
        assert np.isfinite(np.asarray(partly.layers["scvi_dispersion"])).all()
        return
    assert np.isfinite(read(readout, partly)).all()


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("scanvi", {"labels_groups": {"t0": "a", "t1": "b"}}, "labels_groups must name each of .* once: 't2' missing"),
        ("scanvi", {"y_prior": {"t0": 1, "x": 1}}, "y_prior must name each of .* once: .*'x' unknown"),
        (
            "scanvi",
            {"y_prior": [0.5, 0.5]},
            "a positive number for each of 3 labels is needed",
        ),
        ("scanvi", {"n_samples_per_label": 0}, "n_samples_per_label=0 must be 1 or more"),
        ("scvi", {"n_samples_per_label": 5}, "n_samples_per_label has no effect: the model 'scvi' does not learn"),
        ("scanvi", {"classification_ratio": -1.0}, "classification_ratio=-1.0 is a weight"),
        ("classifier", {"classifies": "z"}, "there is no fitted model to make that of"),
        ("classifier", {"n_latent": 5}, "has no keyword 'n_latent'"),
        ("classifier", {"kl_warmup": 0.5}, "kl_warmup has no effect: the model 'classifier' has no KL divergence"),
        ("scanvi", {"unlabeled_category": "?"}, "it is called an argument of pp.setup_anndata here"),
    ],
)
def test_what_is_wrong_is_said(partly, model, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sx.tl.fit(partly, model, **options)
    assert "fits" not in partly.uns["scvi_ext"]


@pytest.mark.parametrize("model", LABELLING)
def test_labels_are_needed(counts, model):
    sx.pp.setup_anndata(counts, batch_key="batch")
    with pytest.raises(ValueError, match="needs labels_key, which is not registered"):
        sx.tl.fit(counts, model)
    counts.obs["known"] = "?"
    train, held_out = split_cells(counts.n_obs, 0.5, None, 0)
    known = counts.obs.columns.get_loc("known")
    counts.obs.iloc[:, known] = "?"
    counts.obs.iloc[held_out[:2], known] = "t0"
    sx.pp.setup_anndata(counts, labels_key="known", unlabeled_category="?")
    with pytest.raises(ValueError, match=r"0 of the 101 training cells have a label \(2 of all 201 cells have one\)"):
        sx.tl.fit(counts, model, train_size=0.5)
    counts.obs.iloc[train[:3], known] = "t0"  # one label, three cells: little, and enough to run
    sx.pp.setup_anndata(counts, labels_key="known", unlabeled_category="?")
    sx.tl.fit(counts, model, train_size=0.5, **SHORT)
    sx.tl.classify(counts)
    assert (counts.obs[f"{model}_confidence"] == 1).all()


def test_values_for_labels_may_come_in_a_series(partly):
    """A Series is a mapping from its index, whatever its order."""
    series = pd.Series({"t2": 20, "t0": 50, "t1": 30})
    fits = [sx.tl.fit(partly, "scanvi", y_prior=p, copy=True, **SHORT) for p in (series, [0.5, 0.3, 0.2])]
    states = [a.uns["scvi_ext"]["fits"]["scanvi"]["state"] for a in fits]
    np.testing.assert_allclose(np.exp(states[0]["log_y_prior"]), [0.5, 0.3, 0.2], rtol=1e-6)
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_labels_that_cannot_be_columns_are_refused_by_classify(counts):
    for names in ({"t0": "T/NK", "t1": "T|NK"}, {"t0": "."}):
        adata = counts.copy()
        adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories(names)
        sx.pp.setup_anndata(adata, labels_key="cell_type")
        sx.tl.fit(adata, "classifier", **SHORT)
        with pytest.raises(ValueError, match="These labels cannot be names of columns"):
            sx.tl.classify(adata)
        assert "classifier_prediction" not in adata.obs


def test_few_cells_to_calibrate_on_are_said(partly, logged):
    sx.tl.fit(partly, "classifier", **SHORT)
    sx.tl.classify(partly)
    n = partly.uns["scvi_ext"]["fits"]["classifier"]["status"]["n_calibration"]
    assert f"calibrated on {n} held-out cells with a label, which is too few" in logged()


def test_a_fit_of_labels_is_used_where_none_are_registered(partly):
    sx.tl.fit(partly, "scanvi", **SHORT)
    expected = sx.tl.classify(partly, copy=True).obsm["scanvi_probabilities"]
    del partly.obs["known"]
    sx.pp.setup_anndata(partly, batch_key="batch")
    pd.testing.assert_frame_equal(sx.tl.classify(partly, copy=True).obsm["scanvi_probabilities"], expected)


def test_a_start_must_fit(partly):
    with pytest.raises(KeyError, match="no fits"):
        sx.tl.fit(partly, "scanvi", init_from="scvi")
    sx.tl.fit(partly, "scvi", **SHORT)
    with pytest.raises(ValueError, match=r"init_from='scvi' takes over the options of that fit, n_hidden=16: leave"):
        sx.tl.fit(partly, "scanvi", init_from="scvi", n_hidden=32)
    with pytest.raises(ValueError, match="the model 'scvi' of that fit, with its labels, is no part of 'ldvae'"):
        sx.tl.fit(partly, "ldvae", init_from="scvi")
    with pytest.raises(ValueError, match="'counts', and a fitted model has no effect"):
        sx.tl.fit(partly, "classifier", init_from="scvi")
    partly.obs["batch"] = "one"
    sx.pp.setup_anndata(partly, batch_key="batch", labels_key="known", unlabeled_category="?")
    with pytest.raises(ValueError, match="that fit was trained with batch_categories="):
        sx.tl.fit(partly, "scanvi", init_from="scvi")
    sx.pp.setup_anndata(partly, labels_key="cell_type")
    sx.tl.fit(partly, "scvi", dispersion="gene-label", **SHORT)
    sx.pp.setup_anndata(partly, labels_key="known", unlabeled_category="?")
    with pytest.raises(ValueError, match="that fit was trained with labels_key='cell_type', and 'known' is"):
        sx.tl.fit(partly, "scanvi", init_from="scvi")


@pytest.mark.parametrize(("value", "error"), [(1.5, ValueError), (-0.1, ValueError), ("high", TypeError)])
def test_a_threshold_is_a_probability(partly, value, error):
    sx.tl.fit(partly, "classifier", **SHORT)
    with pytest.raises(error, match="min_confidence"):
        sx.tl.classify(partly, min_confidence=value)


def test_models_without_labels_are_refused(partly):
    sx.tl.fit(partly, "scvi", **SHORT)
    with pytest.raises(ValueError, match="which has no 'encode_label'; models that have it: 'classifier', 'scanvi'"):
        sx.tl.classify(partly)
    with pytest.raises(ValueError, match="which has no 'encode_z2'; models that have it: 'scanvi'"):
        sx.tl.get_latent(partly, latent="z2")
    with pytest.raises(ValueError, match="latent='z1' is not one of 'z', 'z2'"):
        sx.tl.get_latent(partly, latent="z1")
