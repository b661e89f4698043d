from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scanpy import logging as logg
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from scvi_ext import results
from scvi_ext._errors import listing, missing_key, one_of, whole_number
from scvi_ext._keys import ANNOTATION, UNS, FitKeys, column_name, valid_key
from scvi_ext.data.labels import read_labels
from scvi_ext.data.registry import Registry, column, read_fit, read_root, read_setup
from scvi_ext.data.store import CellStore
from scvi_ext.engine.device import resolve_seed
from scvi_ext.functional.calibration import expected_calibration_error
from scvi_ext.metrics._cells import complete, obs_key, registry_of, rep_key, rep_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from sklearn.base import ClassifierMixin

KNN = "kNN"


def annotation_baselines(
    adata: AnnData,
    labels_key: str,
    *,
    train_key: str | None = None,
    prediction_keys: Sequence[str] | None = None,
    use_rep: str | None = None,
    train_on: Literal["counts", "rep"] = "counts",
    classifiers: Mapping[str, ClassifierMixin] | None = None,
    n_neighbors: int = 15,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Compare predicted labels with what takes no deep model: nearest neighbours, a support-vector machine, a forest.

    All learn from the cells that have a label in ``train_key`` and are judged by cells that have none there, but a true
    one in ``labels_key``. Cells of a label that no training cell has cannot be told by any of them and are left out;
    the log says how many. Where :func:`~scvi_ext.tl.classify` abstained, its most probable label is taken, as the
    others do not abstain. :func:`scvi_ext.get.annotation_df` reads the table.

    Parameters
    ----------
    adata
        Annotated data. Counts are read from where they were registered, and log-normalised.
    labels_key
        Column of ``obs`` with the true labels.
    train_key
        Column of ``obs`` with the labels to learn from, the registered one by default. Missing values, and the
        registered unlabelled category, stand for no label.
    prediction_keys
        Predictions to judge: keys of fits, or any ``name`` with labels in ``obs["name_prediction"]`` and, if there
        are, probabilities in ``obsm["name_probabilities"]`` or confidences in ``obs["name_confidence"]``. By default
        those of all fits that learned from ``train_key``, where they are there.
    use_rep
        Representation in ``obsm`` for the neighbours, the latent space of the last fit by default.
    train_on
        What the other classifiers are given: ``"counts"``, log-normalised, or ``"rep"``, what the neighbours are.
    classifiers
        Classifiers of scikit-learn by name, instead of ``SVC()``, whose time grows with the square of the labelled
        cells, and ``RandomForestClassifier()``. They are copied, not fitted themselves.
    n_neighbors
        Neighbours that vote, each with the same weight; all training cells if there are fewer.
    seed
        Of the forest, and of ``classifiers`` whose ``random_state`` is None.
    key_added
        Slot to write, ``"scvi_ext_annotation"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.uns["scvi_ext_annotation"]``
        ``"scores"``, a DataFrame of float64, methods x scores: ``accuracy``, ``mean_recall`` and ``worst_recall`` (over
        labels), ``expected_calibration_error`` (NaN where there are no probabilities) and ``seconds`` of training and
        prediction (NaN where that was before). ``"recall"``, labels x methods, and ``"params"`` with the columns and
        the numbers of cells.

    Raises
    ------
    KeyError
        No such column, representation or prediction.
    ValueError
        No cell to learn from or to judge by, a single label, a fit that learned from another column, or a classifier
        called as another row.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> adata.obs["known"] = adata.obs["bulk_labels"].astype(str).where(adata.obs["batch"] != "1", "unknown")
    >>> sx.pp.setup_anndata(adata, labels_key="known", unlabeled_category="unknown")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_latent(adata)
    >>> sx.metrics.annotation_baselines(adata, "bulk_labels")
    >>> sx.get.annotation_df(adata).index.tolist()
    ['kNN', 'SVC', 'random forest']

    References
    ----------
    Abdelaal et al. (2019), Genome Biology 20, 194 (classifiers of cells); Guo et al. (2017), ICML, 1321 (calibration).
    """
    one_of("train_on", train_on, ["counts", "rep"])
    whole_number("n_neighbors", n_neighbors, 1)
    if train_on == "rep" and classifiers is not None and not classifiers:
        msg = "train_on='rep' has no effect without classifiers: leave out one of them."
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    slot = ANNOTATION if key_added is None else valid_key(key_added)
    if slot == UNS.root:
        msg = f"adata.uns[{slot!r}] holds the fits themselves: choose another name, key_added=..."
        raise ValueError(msg)
    train_key, use_rep = obs_key(adata, "labels_key", train_key), rep_key(adata, use_rep)
    prediction_keys = _prediction_keys(adata, prediction_keys, train_key)
    estimators = _estimators(classifiers, resolve_seed(seed))
    _check_names([KNN, *estimators, *prediction_keys])

    columns = [labels_key, train_key, *(FitKeys(key).prediction for key in prediction_keys)]
    unlabeled = registry_of(adata).unlabeled_category
    names, (truth, known, *predicted) = read_labels(adata.obs, columns, unlabeled)
    predictions = {
        key: _read_prediction(adata, FitKeys(key), names, codes)
        for key, codes in zip(prediction_keys, predicted, strict=True)
    }
    values = rep_values(adata, use_rep)
    taught = np.flatnonzero((known >= 0) & complete(values))
    asked = [complete(values), *(there for _, _, there in predictions.values())]
    judged = _judged(truth, known, taught, np.logical_and.reduce(asked), labels_key, train_key)
    rows = np.r_[taught, judged]
    learned, values = np.arange(len(rows)) < len(taught), values[rows]
    features = _log_normalized(adata, rows) if train_on == "counts" and estimators else values

    start = logg.info(f"predicting {labels_key!r} of {len(judged)} cells from {train_key!r} of {len(taught)}")
    knn = KNeighborsClassifier(min(n_neighbors, len(taught)))
    outcomes = {}
    for name, estimator, x in [(KNN, knn, values), *((name, e, features) for name, e in estimators.items())]:
        began = time.perf_counter()
        estimator.fit(x[learned], known[taught])
        outcome = _predict(estimator, x[~learned])
        outcomes[name] = (*outcome, time.perf_counter() - began)
    for key, (codes, confidence, _) in predictions.items():
        outcomes[key] = (codes[judged], confidence[judged], np.nan)

    scores, recall = _tables(truth[judged], outcomes, names)
    table = {
        "scores": scores,
        "recall": recall,
        "params": {
            "labels_key": labels_key,
            "train_key": train_key,
            "use_rep": use_rep,
            "train_on": train_on,
            "n_neighbors": n_neighbors,
            "n_train": len(taught),
            "n_judged": len(judged),
        },
    }
    results.write_uns(adata, slot, table)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, table of classifiers (adata.uns)")
    return adata if copy else None


def _prediction_keys(adata: AnnData, keys: Sequence[str] | None, train_key: str) -> list[str]:
    """Whose predictions are there; a ValueError for a fit that has seen other labels than the baselines will."""
    fits = read_root(adata).get(UNS.fits, {})
    learned_from = {key: Registry.from_uns(read_fit(adata, key).setup).labels_key for key in fits}
    if keys is None:
        alike = [key for key, labels in learned_from.items() if labels in (None, train_key)]
        return [key for key in alike if FitKeys(key).prediction in adata.obs]
    keys = [keys] if isinstance(keys, str) else list(keys)
    for key in keys:
        if FitKeys(key).prediction not in adata.obs:
            fit = key.removesuffix(FitKeys("").prediction)
            if fit != key and key in adata.obs:
                msg = f"prediction_keys names the column {key!r}; the name before that ending is needed: {fit!r}."
                raise KeyError(msg)
            raise missing_key("adata.obs", FitKeys(key).prediction, adata.obs.columns)
        if learned_from.get(key) not in (None, train_key):
            msg = (
                f"The fit {key!r} learned from {learned_from[key]!r} (adata.obs), and the baselines are to learn from "
                f"{train_key!r}: give all of them the same labels, train_key=..."
            )
            raise ValueError(msg)
    return keys


def _estimators(classifiers: Mapping[str, ClassifierMixin] | None, seed: int) -> dict[str, ClassifierMixin]:
    """Unfitted copies, that draw from no global generator."""
    if classifiers is None:
        classifiers = {"SVC": SVC(), "random forest": RandomForestClassifier()}
    if not isinstance(classifiers, Mapping) or any(isinstance(c, type) for c in classifiers.values()):
        msg = 'classifiers is a mapping from names to classifiers, such as {"logistic": LogisticRegression()}.'
        raise TypeError(msg)
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])  # scikit-learn takes seeds of 32 bits
    copies = {name: clone(classifier) for name, classifier in classifiers.items()}
    for estimator in copies.values():
        unseeded = [name for name, value in estimator.get_params().items() if value is None]
        estimator.set_params(**{name: state for name in unseeded if name.split("__")[-1] == "random_state"})
    return copies


def _check_names(names: list[str]) -> None:
    """Every row has a name of its own, which is that of a column too."""
    if len(set(names)) < len(names):
        msg = f"The rows would be called {listing(names)}: each classifier and prediction needs a name of its own."
        raise ValueError(msg)
    for name in names:
        valid_key(name)


def _read_prediction(
    adata: AnnData, keys: FitKeys, names: Sequence[str], codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted labels, how sure they are (NaN: not known), and which cells the classifier was asked about."""
    table = adata.obsm.get(keys.probabilities)
    if isinstance(table, pd.DataFrame):
        probabilities = table.to_numpy(np.float64)
        of_column = pd.Index(map(column_name, names)).get_indexer(table.columns.astype(str))
        return of_column[probabilities.argmax(axis=1)], probabilities.max(axis=1), complete(probabilities)
    if keys.confidence in adata.obs:
        confidence = column(adata.obs, keys.confidence).to_numpy(np.float64)
        return codes, confidence, np.ones(adata.n_obs, dtype=bool)
    return codes, np.full(adata.n_obs, np.nan), np.ones(adata.n_obs, dtype=bool)


def _judged(
    truth: np.ndarray, known: np.ndarray, taught: np.ndarray, asked: np.ndarray, labels_key: str, train_key: str
) -> np.ndarray:
    """Positions of the cells whose true label is known to the judge only, and could be told."""
    n_labels = len(np.unique(known[taught]))
    if n_labels < 2:
        msg = f"{len(taught)} cells have {n_labels} labels in adata.obs[{train_key!r}]; two or more are needed."
        raise ValueError(msg)
    hidden = (truth >= 0) & (known < 0)
    judged = hidden & asked & np.isin(truth, known[taught])
    if not judged.any():
        msg = (
            f"There is nothing to judge by: no cell without a label in adata.obs[{train_key!r}] has one in "
            f"adata.obs[{labels_key!r}] that could be told. Hide some labels, and name the column that has all of them."
        )
        raise ValueError(msg)
    n_left = (hidden & ~judged).sum()
    if n_left:
        logg.info(f"    left out {n_left} of {hidden.sum()} cells, without values or of a label that no cell teaches")
    return np.flatnonzero(judged)


def _log_normalized(adata: AnnData, rows: np.ndarray) -> sp.csr_matrix:
    """Log-normalised counts of the cells at ``rows``, float32: scaled to their median total, then log(1 + x)."""
    registry = read_setup(adata)
    counts = CellStore.from_adata(adata, Registry(layer=registry.layer, audit=registry.audit), indices=rows).counts
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    filled = totals > 0
    scale = np.median(totals[filled]) / np.where(filled, totals, 1)
    return sp.csr_matrix(sp.diags_array(scale) @ counts, dtype=np.float32).log1p()


def _predict(estimator: ClassifierMixin, x: np.ndarray | sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Predicted labels and their probabilities, NaN of a classifier that gives none."""
    predict_proba = getattr(estimator, "predict_proba", None)
    if predict_proba is None:
        return estimator.predict(x), np.full(x.shape[0], np.nan)
    probabilities = predict_proba(x)
    return estimator.classes_[probabilities.argmax(axis=1)], probabilities.max(axis=1)


def _tables(
    truth: np.ndarray, outcomes: Mapping[str, tuple[np.ndarray, np.ndarray, float]], names: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of each method, and its recall of each label, from predicted labels, confidences and seconds."""
    present = np.unique(truth)
    scores, recall = {}, {}
    for name, (predicted, confidence, seconds) in outcomes.items():
        recall[name] = recall_score(truth, predicted, labels=present, average=None)
        scores[name] = {
            "accuracy": (predicted == truth).mean(),
            "mean_recall": recall[name].mean(),
            "worst_recall": recall[name].min(),
            "expected_calibration_error": _calibration_error(confidence, predicted == truth),
            "seconds": seconds,
        }
    return (
        pd.DataFrame.from_dict(scores, orient="index").astype(np.float64).rename_axis("method"),
        pd.DataFrame(recall, index=[names[code] for code in present]).rename_axis("label"),
    )


def _calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    sure = ~np.isnan(confidence)
    return expected_calibration_error(confidence[sure], correct[sure])
