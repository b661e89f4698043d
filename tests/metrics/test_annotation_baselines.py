from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import scvi_ext as sx
from scvi_ext.functional.calibration import expected_calibration_error

SCORES = ["accuracy", "mean_recall", "worst_recall", "expected_calibration_error", "seconds"]


@pytest.fixture
def hidden(counts) -> ad.AnnData:
    """201 cells of three types, of which 81 have a label, with a representation."""
    counts.obs["known"] = counts.obs["cell_type"].astype(str).where(np.arange(201) < 81, "?")
    rng = np.random.default_rng(0)
    corners = np.eye(3)[counts.obs["cell_type"].cat.codes]
    counts.obsm["X_rep"] = 3 * corners + rng.normal(size=(201, 3))
    sx.pp.setup_anndata(counts, labels_key="known", unlabeled_category="?")
    return counts


def predicted_by(estimator, x, adata) -> tuple[np.ndarray, np.ndarray]:
    estimator.fit(x[:81], adata.obs["known"][:81])
    return estimator.predict(x[81:]), estimator.predict_proba(x[81:]).max(1)


def log_normalized(adata) -> np.ndarray:
    counts = np.asarray(adata.X.toarray(), dtype=np.float64)
    totals = counts.sum(1, keepdims=True)
    return np.log1p(counts / totals * np.median(totals)).astype(np.float32)


def test_scores_are_those_of_scikit_learn(hidden):
    hidden = hidden[:, :6].copy()  # from which types cannot all be told
    classifiers = {"logistic": LogisticRegression(), "forest": RandomForestClassifier(random_state=5)}
    assert sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep", classifiers=classifiers) is None
    scores, recall = sx.get.annotation_df(hidden), sx.get.annotation_df(hidden, table="recall")
    assert scores.columns.tolist() == SCORES
    assert scores.index.tolist() == recall.columns.tolist() == ["kNN", "logistic", "forest"]
    truth = hidden.obs["cell_type"].astype(str).to_numpy()[81:]
    x = log_normalized(hidden)
    for name, estimator, features in [
        ("kNN", KNeighborsClassifier(15), hidden.obsm["X_rep"]),
        ("logistic", LogisticRegression(), x),
        ("forest", RandomForestClassifier(random_state=5), sp.csr_matrix(x)),
    ]:
        guess, confidence = predicted_by(estimator, features, hidden)
        right = guess == truth
        by_label = [right[truth == label].mean() for label in ("t0", "t1", "t2")]
        # the solver of the logistic regression ends a little elsewhere on sparse input; no prediction changes by that
        expected = [right.mean(), np.mean(by_label), min(by_label), expected_calibration_error(confidence, right)]
        np.testing.assert_allclose(scores.loc[name, SCORES[:4]].to_numpy(float), expected, atol=1e-3)
        assert 0.5 < right.mean() < 1
        np.testing.assert_allclose(recall[name], by_label, rtol=1e-12)
    assert recall.index.tolist() == ["t0", "t1", "t2"]
    assert (scores["seconds"] > 0).all()


def test_what_is_there_by_default(hidden, logged):
    sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep", seed=3)
    first = sx.get.annotation_df(hidden)
    assert first.index.tolist() == ["kNN", "SVC", "random forest"]
    assert np.isnan(first.loc["SVC", "expected_calibration_error"])  # which has no probabilities
    assert (first["accuracy"] > 0.8).all()
    sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep", seed=3, key_added="again")
    second = sx.get.annotation_df(hidden, "again")
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), second.drop(columns="seconds"))
    assert "predicting 'cell_type' of 120 cells from 'known' of 81" in logged()
    assert "added\n    'scvi_ext_annotation', table of classifiers (adata.uns)" in logged()
    assert hidden.uns["scvi_ext_annotation"]["params"] == {
        "labels_key": "cell_type",
        "train_key": "known",
        "use_rep": "X_rep",
        "train_on": "counts",
        "n_neighbors": 15,
        "n_train": 81,
        "n_judged": 120,
    }


def test_global_generators_are_neither_read_nor_changed(hidden):
    pipeline = make_pipeline(StandardScaler(with_mean=False), RandomForestClassifier(n_estimators=5))
    options = {"use_rep": "X_rep", "classifiers": {"pipeline": pipeline}, "seed": 2**40}
    tables = []
    for seed in (0, 1):
        np.random.seed(seed)
        before = np.random.get_state()[1].copy()
        sx.metrics.annotation_baselines(hidden, "cell_type", **options)
        tables.append(sx.get.annotation_df(hidden).drop(columns="seconds"))
        np.testing.assert_array_equal(np.random.get_state()[1], before)
    pd.testing.assert_frame_equal(*tables)
    assert pipeline.steps[1][1].random_state is None  # it was copied


def test_no_label_of_a_judged_cell_is_learned(hidden):
    options = {"use_rep": "X_rep", "n_neighbors": 3}
    sx.metrics.annotation_baselines(hidden, "cell_type", **options)
    told = sx.get.annotation_df(hidden, table="recall")
    order = np.r_[np.arange(81), 81 + np.random.default_rng(0).permutation(120)]
    hidden.obs["cell_type"] = hidden.obs["cell_type"].to_numpy()[order]
    sx.metrics.annotation_baselines(hidden, "cell_type", **options)
    # of labels that were exchanged among the judged cells, a third is right by chance: 120 cells, five errors of 0.043
    assert (sx.get.annotation_df(hidden)["accuracy"] < 0.56).all()
    assert (told > 0.6).all(axis=None)


def test_other_classifiers_can_be_given_what_the_neighbours_are(hidden):
    options = {"use_rep": "X_rep", "classifiers": {"same": KNeighborsClassifier(7)}, "n_neighbors": 7}
    sx.metrics.annotation_baselines(hidden, "cell_type", train_on="rep", **options)
    scores = sx.get.annotation_df(hidden).drop(columns="seconds")
    assert scores.loc["same"].tolist() == scores.loc["kNN"].tolist()
    sx.metrics.annotation_baselines(hidden, "cell_type", train_on="counts", **options)
    other = sx.get.annotation_df(hidden).drop(columns="seconds")
    assert other.loc["same"].tolist() != other.loc["kNN"].tolist() == scores.loc["kNN"].tolist()


@pytest.mark.parametrize("kind", [sp.csc_matrix, sp.csr_array, np.asarray])
def test_counts_of_every_kind(hidden, kind):
    options = {"use_rep": "X_rep", "classifiers": {"SVC": SVC()}}
    sx.metrics.annotation_baselines(hidden, "cell_type", **options)
    expected = sx.get.annotation_df(hidden).drop(columns="seconds")
    hidden.X = kind(hidden.X.toarray().astype(np.float64))
    view = hidden[:]
    sx.metrics.annotation_baselines(view, "cell_type", **options)
    pd.testing.assert_frame_equal(sx.get.annotation_df(view).drop(columns="seconds"), expected)


def test_predictions_are_rows_too(hidden):
    sx.tl.fit(hidden, n_hidden=16, n_latent=4, max_epochs=1)
    sx.tl.get_latent(hidden)
    rng = np.random.default_rng(0)
    truth = hidden.obs["cell_type"].cat.codes.to_numpy()
    probabilities = rng.dirichlet([0.3] * 3, 201) * 0.7 + 0.3 * np.eye(3)[truth]
    hidden.obsm["scvi_probabilities"] = pd.DataFrame(probabilities, hidden.obs_names, ["t0", "t1", "t2"])
    guess = np.array(["t0", "t1", "t2"])[probabilities.argmax(1)]
    hidden.obs["scvi_prediction"] = np.where(np.arange(201) % 2, guess, "?")  # it abstains in half of the cells
    hidden.obs["tool_prediction"] = np.where(np.arange(201) % 4, guess, "?")
    hidden.obs["sure_prediction"], hidden.obs["sure_confidence"] = guess, 1.0
    options = {"classifiers": {}, "prediction_keys": ["scvi", "tool", "sure"]}
    sx.metrics.annotation_baselines(hidden, "cell_type", **options)
    scores = sx.get.annotation_df(hidden)
    assert scores.index.tolist() == ["kNN", "scvi", "tool", "sure"]
    right = (probabilities.argmax(1) == truth)[81:]
    assert scores.loc["scvi", "accuracy"] == scores.loc["sure", "accuracy"] == right.mean()
    assert scores.loc["tool", "accuracy"] == (right & (np.arange(81, 201) % 4 > 0)).mean()
    expected = expected_calibration_error(probabilities.max(1)[81:], right)
    assert scores.loc["scvi", "expected_calibration_error"] == pytest.approx(expected, rel=1e-12)
    assert scores.loc["sure", "expected_calibration_error"] == pytest.approx(1 - right.mean(), rel=1e-12)
    assert np.isnan(scores.loc["tool", "expected_calibration_error"])
    assert np.isnan(scores.loc[["scvi", "tool", "sure"], "seconds"]).all()
    # by default those of fits; columns of probabilities in another order and beside those of unknown labels
    hidden.obsm["scvi_probabilities"] = hidden.obsm["scvi_probabilities"].assign(t9=0.0)[["t2", "t9", "t0", "t1"]]
    sx.metrics.annotation_baselines(hidden, "cell_type", classifiers={})
    pd.testing.assert_series_equal(sx.get.annotation_df(hidden).loc["scvi"], scores.loc["scvi"])
    assert sx.get.annotation_df(hidden).index.tolist() == ["kNN", "scvi"]


def test_all_rows_are_of_the_same_cells(hidden, logged):
    probabilities = np.tile([0.5, 0.3, 0.2], (201, 1))
    probabilities[100:110] = np.nan  # not asked about
    hidden.obsm["mine_probabilities"] = pd.DataFrame(probabilities, hidden.obs_names, ["t0", "t1", "t2"])
    hidden.obs["mine_prediction"] = "t0"
    hidden.obsm["X_rep"][[3, 105, 111]] = np.nan
    hidden.obs["cell_type"] = hidden.obs["cell_type"].where(np.arange(201) < 190)
    hidden.obs["known"] = hidden.obs["known"].replace("t2", "?")  # a label that nobody teaches
    sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep", prediction_keys="mine", classifiers={})
    rows = np.setdiff1d(np.arange(81, 190), [*range(100, 110), 111])
    rows = rows[hidden.obs["cell_type"].astype(str).to_numpy()[rows] != "t2"]
    params = hidden.uns["scvi_ext_annotation"]["params"]
    assert params["n_judged"] == len(rows)
    assert params["n_train"] == (hidden.obs["known"] != "?").sum() - (hidden.obs["known"].iloc[3] != "?")
    n_hidden = (hidden.obs["known"] == "?")[:190].sum()
    assert f"left out {n_hidden - len(rows)} of {n_hidden} cells" in logged()
    assert sx.get.annotation_df(hidden, table="recall").index.tolist() == ["t0", "t1"]
    accuracy = (hidden.obs["cell_type"].iloc[rows] == "t0").mean()
    assert sx.get.annotation_df(hidden).loc["mine", "accuracy"] == pytest.approx(accuracy, rel=1e-12)


def test_few_cells_with_labels(hidden):
    hidden.obs["known"] = hidden.obs["cell_type"].astype(str).where(np.arange(201) < 3, "?")
    hidden.obs.loc["cell0", "known"], hidden.obs.loc["cell1", "known"] = "t0", "t1"
    sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep")
    assert sx.get.annotation_df(hidden)["accuracy"].between(0, 1).all()


def test_without_a_registry_the_labels_are_named_and_counts_must_be_registered(counts):
    counts.obs["some"] = counts.obs["cell_type"].where(np.arange(201) < 81)  # missing values
    counts.obsm["X_rep"] = np.eye(3)[counts.obs["cell_type"].cat.codes]
    with pytest.raises(ValueError, match="No labels_key is registered"):
        sx.metrics.annotation_baselines(counts, "cell_type", use_rep="X_rep")
    with pytest.raises(KeyError, match=r"call scvi_ext.pp.setup_anndata"):
        sx.metrics.annotation_baselines(counts, "cell_type", train_key="some", use_rep="X_rep")
    sx.metrics.annotation_baselines(counts, "cell_type", train_key="some", use_rep="X_rep", train_on="rep")
    assert (sx.get.annotation_df(counts)["accuracy"] == 1).all()


def test_counts_that_are_none_any_more_are_refused(hidden):
    hidden.X = hidden.X * 0.5
    with pytest.raises(ValueError, match="has it been normalised"):
        sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep")
    assert "scvi_ext_annotation" not in hidden.uns


def test_an_empty_cell_is_no_obstacle(hidden):
    hidden.X = sp.csr_matrix(hidden.X.toarray() * ~np.isin(np.arange(201), [0, 100])[:, None])
    sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep")
    assert sx.get.annotation_df(hidden)["accuracy"].notna().all()


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_the_table_travels(hidden, tmp_path, suffix):
    names = {"t0": "T/NK", "t1": "B", "t2": "Mono."}
    for column in ("cell_type", "known"):
        hidden.obs[column] = hidden.obs[column].astype(str).replace(names)
    sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep")
    path = tmp_path / f"cells.{suffix}"
    hidden.write_h5ad(path) if suffix == "h5ad" else hidden.write_zarr(path)
    back = ad.read_h5ad(path) if suffix == "h5ad" else ad.read_zarr(path)
    for table in ("scores", "recall"):
        found, expected = (sx.get.annotation_df(adata, table=table) for adata in (back, hidden))
        pd.testing.assert_frame_equal(found, expected)


def test_copies_and_backed_data(hidden, tmp_path):
    copied = sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep", key_added="mine", copy=True)
    assert "mine" not in hidden.uns
    hidden.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    sx.metrics.annotation_baselines(backed, "cell_type", use_rep="X_rep")
    found, expected = sx.get.annotation_df(backed), sx.get.annotation_df(copied, "mine")
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"))


def test_nothing_is_written_where_something_is_wrong(hidden):
    hidden.obs["mine_prediction"] = "t0"
    wrong = [
        (KeyError, r"'nope' is not in adata.obs", {"labels_key": "nope"}),
        (KeyError, r"'nope' is not in adata.obs", {"train_key": "nope"}),
        (KeyError, r"'X_c' is not in adata.obsm", {"use_rep": "X_c"}),
        (KeyError, r"'your_prediction' is not in adata.obs.* Did you mean", {"prediction_keys": ["your"]}),
        (ValueError, "train_on='X' is not one of", {"train_on": "X"}),
        (ValueError, "train_on='rep' has no effect without classifiers", {"train_on": "rep", "classifiers": {}}),
        (ValueError, "n_neighbors=0 must be 1 or more", {"n_neighbors": 0}),
        (ValueError, "There is nothing to judge by", {"labels_key": "known"}),
        (ValueError, "There is nothing to judge by", {"train_key": "cell_type"}),
        (ValueError, "each classifier and prediction needs a name of its own", {"classifiers": {"kNN": SVC()}}),
        (ValueError, "each classifier and .* of its own", {"classifiers": {}, "prediction_keys": ["mine", "mine"]}),
        (ValueError, "'a/b' must be a name", {"classifiers": {"a/b": DummyClassifier()}}),
        (ValueError, "key_added='a/b' must be a name", {"key_added": "a/b"}),
        (ValueError, "holds the fits themselves", {"key_added": "scvi_ext"}),
    ]
    for error, match, options in wrong:
        with pytest.raises(error, match=match):
            sx.metrics.annotation_baselines(hidden, **({"labels_key": "cell_type", "use_rep": "X_rep"} | options))
    hidden.obs["known"] = hidden.obs["known"].replace({"t1": "?", "t2": "?"})
    with pytest.raises(ValueError, match=r"cells have 1 labels in adata.obs\['known'\]"):
        sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep")
    assert "scvi_ext_annotation" not in hidden.uns


def test_a_fit_that_has_seen_other_labels_is_no_competitor(hidden):
    sx.pp.setup_anndata(hidden, labels_key="cell_type")
    sx.tl.fit(hidden, "classifier", key_added="scvi", n_hidden=16, max_epochs=1)
    hidden.obs["scvi_prediction"] = hidden.obs["cell_type"]
    sx.pp.setup_anndata(hidden, labels_key="known", unlabeled_category="?")
    with pytest.raises(ValueError, match=r"The fit 'scvi' learned from 'cell_type' .* learn from 'known'"):
        sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep", prediction_keys=["scvi"])
    sx.metrics.annotation_baselines(hidden, "cell_type", use_rep="X_rep", classifiers={})
    assert sx.get.annotation_df(hidden).index.tolist() == ["kNN"]


def test_a_table_that_is_not_there(counts):
    with pytest.raises(KeyError, match=r"has no 'scvi_ext_annotation': call scvi_ext.metrics.annotation_baselines"):
        sx.get.annotation_df(counts)
    with pytest.raises(KeyError, match=r"'mine' is not in adata.uns"):
        sx.get.annotation_df(counts, "mine")
    counts.uns["other"] = {"scores": 1}
    with pytest.raises(KeyError, match="has no table of classifiers"):
        sx.get.annotation_df(counts, "other")
    with pytest.raises(ValueError, match="table='all' is not one of 'recall', 'scores'"):
        sx.get.annotation_df(counts, table="all")


def test_a_classifier_after_a_latent_space_and_what_is_given_wrongly(hidden):
    sx.pp.setup_anndata(hidden, labels_key="known", unlabeled_category="?")
    sx.tl.fit(hidden, n_hidden=16, n_latent=4, max_epochs=1)
    sx.tl.get_latent(hidden)
    sx.tl.fit(hidden, "classifier", n_hidden=16, max_epochs=1)
    sx.tl.classify(hidden)
    sx.metrics.annotation_baselines(hidden, "cell_type", classifiers={})  # the latent space of the fit that has one
    assert sx.get.annotation_df(hidden).index.tolist() == ["kNN", "classifier"]
    with pytest.raises(KeyError, match=r"names the column 'classifier_prediction'; .* is needed: 'classifier'"):
        sx.metrics.annotation_baselines(hidden, "cell_type", prediction_keys=["classifier_prediction"])
    for given in ([LogisticRegression()], {"logistic": LogisticRegression}):
        with pytest.raises(TypeError, match="classifiers is a mapping from names to classifiers"):
            sx.metrics.annotation_baselines(hidden, "cell_type", classifiers=given)
    sx.tl.fit(hidden, key_added="other", n_hidden=16, n_latent=4, max_epochs=1)
    sx.tl.fit(hidden, "classifier", n_hidden=16, max_epochs=1)
    with pytest.raises(KeyError, match="The last fit, 'classifier', has no latent space: name one"):
        sx.metrics.annotation_baselines(hidden, "cell_type")
