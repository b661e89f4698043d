from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, recall_score

import scvi_ext as sx


@pytest.fixture
def predicted(registered):
    """Cells with a fit that learned from the labels of 100 cells, and its predictions, some wrong and some missing."""
    rng = np.random.default_rng(0)
    truth = registered.obs["cell_type"].astype(str).to_numpy()
    registered.obs["known"] = np.where(np.arange(201) < 100, truth, "?")
    sx.pp.setup_anndata(registered, batch_key="batch", labels_key="known", unlabeled_category="?")
    sx.tl.fit(registered, n_hidden=16, n_latent=4, max_epochs=1)
    guess = np.where(rng.random(201) < 0.3, rng.permutation(truth), truth)
    guess[150:160] = "?"
    guess[160:165] = "t9"
    registered.obs["scvi_prediction"] = pd.Categorical(guess)
    return registered


def report(truth, guess) -> pd.DataFrame:
    table = classification_report(truth, guess, labels=["t0", "t1", "t2"], output_dict=True, zero_division=0)
    table = pd.DataFrame(table).T.drop(index="micro avg", errors="ignore")
    table = table.rename({"macro avg": "mean over labels", "weighted avg": "mean over cells"})
    return table.rename(columns={"f1-score": "f1"})[["recall", "precision", "f1", "support"]]


def test_scores_are_those_of_scikit_learn(predicted):
    table = sx.get.classification_df(predicted, "cell_type")
    hidden = predicted.obs.iloc[100:]
    expected = report(hidden["cell_type"], hidden["scvi_prediction"])
    pd.testing.assert_frame_equal(table, expected.astype({"support": np.int64}), rtol=1e-12)
    of_cells = table.loc["mean over cells", "recall"]
    assert of_cells == pytest.approx(accuracy_score(hidden["cell_type"], hidden["scvi_prediction"]), rel=1e-12)


def test_confusion_is_that_of_scikit_learn(predicted):
    table = sx.get.confusion_df(predicted, "cell_type")
    hidden = predicted.obs.iloc[100:]
    names = ["t0", "t1", "t2", "t9", "?"]
    expected = confusion_matrix(hidden["cell_type"], hidden["scvi_prediction"], labels=names)[:3]
    assert table.index.tolist() == ["t0", "t1", "t2"]
    assert table.columns.tolist() == ["t0", "t1", "t2", "t9", "abstained"]
    assert (table.index.name, table.columns.name) == ("cell_type", "scvi_prediction")
    np.testing.assert_array_equal(table, expected)
    assert (table.to_numpy().sum(), table["abstained"].sum()) == (101, 10)
    assert table.to_numpy().dtype == np.int64


def test_cells_are_those_that_the_fit_had_no_label_for(predicted, logged):
    assert sx.get.confusion_df(predicted, "cell_type").to_numpy().sum() == 101
    assert "comparing 'scvi_prediction' with 'cell_type' in 101 of 201 cells, without a label in 'known'" in logged()
    assert sx.get.confusion_df(predicted, "known").to_numpy().sum() == 100  # there are no others
    assert sx.get.confusion_df(predicted, "cell_type", indices=np.arange(150)).to_numpy().sum() == 150
    assert sx.get.confusion_df(predicted, "cell_type", indices=predicted.obs["known"] == "t1").index.tolist() == ["t1"]
    del predicted.obs["known"]  # as in a query, none of whose cells has taught the fit anything
    assert sx.get.confusion_df(predicted, "cell_type").to_numpy().sum() == 201
    assert "in 201 of 201 cells, with a label" not in logged()


def test_predictions_of_another_tool(counts):
    counts.obs["guess"] = counts.obs["cell_type"].astype(str).where(np.arange(201) >= 50, None)
    table = sx.get.classification_df(counts, "cell_type", prediction_key="guess")
    truth, guess = counts.obs["cell_type"].astype(str), counts.obs["guess"].fillna("none")
    expected = recall_score(truth, guess, labels=["t0", "t1", "t2"], average="macro")
    assert table.loc["mean over labels", "recall"] == pytest.approx(expected, rel=1e-12)
    assert (table["precision"] == 1).all()
    assert sx.get.confusion_df(counts, "cell_type", prediction_key="guess")["abstained"].sum() == 50
    counts.obs["cell_type"] = counts.obs["cell_type"].where(np.arange(201) >= 150)
    assert sx.get.classification_df(counts, "cell_type", prediction_key="guess")["support"].iloc[-1] == 51
    assert "abstained" not in sx.get.confusion_df(counts, "cell_type", prediction_key="guess")


def test_unused_categories_are_neither_rows_nor_columns(counts):
    counts.obs["cell_type"] = counts.obs["cell_type"].cat.add_categories(["never"])
    counts.obs["guess"] = pd.Categorical(counts.obs["cell_type"].astype(str), categories=["t2", "t1", "t0", "never"])
    table = sx.get.confusion_df(counts, "cell_type", prediction_key="guess")
    assert table.index.tolist() == table.columns.tolist() == ["t0", "t1", "t2"]
    counts.obs["always"] = "t1"
    rest = counts[counts.obs["cell_type"] != "t1"]
    table = sx.get.confusion_df(rest, "cell_type", prediction_key="always")
    assert table.index.tolist() == ["t0", "t2"]
    assert table.columns.tolist() == ["t0", "t2", "t1"]
    assert table.to_numpy()[:, :2].sum() == 0
    scores = sx.get.classification_df(rest, "cell_type", prediction_key="always")
    assert rest.is_view
    assert (scores[["recall", "precision", "f1"]] == 0).all(axis=None)


def test_abstention_without_a_registered_category(counts):
    sx.pp.setup_anndata(counts, labels_key="cell_type")
    sx.tl.fit(counts, n_hidden=16, n_latent=4, max_epochs=1)
    counts.obs["scvi_prediction"] = counts.obs["cell_type"].astype(str).where(np.arange(201) >= 7, "Unknown")
    assert sx.get.confusion_df(counts, "cell_type")["abstained"].sum() == 7


def test_what_is_wrong_is_said(predicted):
    with pytest.raises(KeyError, match=r"'nope' is not in adata.obs"):
        sx.get.classification_df(predicted, "nope")
    with pytest.raises(KeyError, match=r"'gues' is not in adata.obs"):
        sx.get.confusion_df(predicted, "cell_type", prediction_key="gues")
    with pytest.raises(ValueError, match="key='scvi' has no effect beside prediction_key='known'"):
        sx.get.confusion_df(predicted, "cell_type", key="scvi", prediction_key="known")
    predicted.obs["none"] = "?"
    with pytest.raises(ValueError, match=r"None of the cells has a label in adata.obs\['none'\]"):
        sx.get.classification_df(predicted, "none")
    with pytest.raises(ValueError, match="None of the cells has a label"):
        sx.get.classification_df(predicted, "known", indices=np.arange(100, 201))
    del predicted.obs["scvi_prediction"]
    with pytest.raises(KeyError, match=r"adata.obs has no 'scvi_prediction': call scvi_ext.tl.classify"):
        sx.get.classification_df(predicted, "cell_type")


def test_what_classify_writes_is_understood(registered):
    truth = registered.obs["cell_type"].astype(str).to_numpy()
    registered.obs["known"] = np.where(np.arange(201) < 150, truth, "?")
    sx.pp.setup_anndata(registered, batch_key="batch", labels_key="known", unlabeled_category="?")
    sx.tl.fit(registered, "classifier", max_epochs=2)
    sx.tl.classify(registered)
    confidence = registered.obs["classifier_confidence"].to_numpy()[150:]
    border = np.float64(np.median(confidence))
    sx.tl.classify(registered, min_confidence=border)
    table = sx.get.confusion_df(registered, "cell_type")
    assert table.to_numpy().sum() == 51
    assert table["abstained"].sum() == (confidence < border).sum() == 25
    registered.obsm["X_rep"] = np.eye(3)[registered.obs["cell_type"].cat.codes]
    sx.metrics.annotation_baselines(registered, "cell_type", use_rep="X_rep", classifiers={})
    likely = registered.obsm["classifier_probabilities"].idxmax(axis=1).to_numpy()
    found = sx.get.annotation_df(registered).loc["classifier", "accuracy"]
    assert found == pytest.approx((likely == truth)[150:].mean(), rel=1e-12)
