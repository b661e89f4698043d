"""Which predictions are held against which labels, and in which cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scanpy import logging as logg

from scvi_ext._errors import missing_key
from scvi_ext._keys import ABSTAINED, UNS, FitKeys
from scvi_ext.data.labels import read_labels
from scvi_ext.data.registry import Registry, read_fit, read_root
from scvi_ext.data.store import resolve_indices

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Judged:
    """True and predicted labels of the cells that can be judged, as positions in ``names``."""

    prediction_key: str
    names: tuple[str, ...]  # of the true labels first
    truth: np.ndarray  # (n,)
    predicted: np.ndarray  # (n,), -1 where there is no prediction


def judged_cells(
    adata: AnnData, labels_key: str, key: str | None, prediction_key: str | None, indices: object
) -> Judged:
    """Predictions of the fit ``key``, or in the column ``prediction_key``, beside ``obs[labels_key]``.

    Without ``indices``, cells whose label could be learned from are left out, unless there are no others.
    """
    if key is not None and prediction_key is not None:
        msg = f"key={key!r} has no effect beside prediction_key={prediction_key!r}: leave one of them out."
        raise ValueError(msg)
    if prediction_key is None:
        prediction_key = FitKeys(read_fit(adata, key).key).prediction
        if prediction_key not in adata.obs:
            msg = f"adata.obs has no {prediction_key!r}: call scvi_ext.tl.classify(adata) first."
            raise KeyError(msg)
    elif prediction_key not in adata.obs:
        raise missing_key("adata.obs", prediction_key, adata.obs.columns)
    registry = _registry_behind(adata, prediction_key)
    abstained = None if ABSTAINED in registry.labels_categories else ABSTAINED
    unlabeled = registry.unlabeled_category or abstained
    names, (truth, predicted) = read_labels(adata.obs, [labels_key, prediction_key], unlabeled)
    chosen = truth >= 0
    if indices is not None:
        rows = resolve_indices(adata, indices)
        rows = rows[chosen[rows]]
    else:
        hidden = chosen & ~_was_given(adata, registry)
        rows = np.flatnonzero(hidden if hidden.any() else chosen)
        which = (
            f"without a label in {registry.labels_key!r}" if hidden.any() and registry.labels_key else "with a label"
        )
        logg.info(f"comparing {prediction_key!r} with {labels_key!r} in {len(rows)} of {adata.n_obs} cells, {which}")
    if len(rows) == 0:
        msg = f"None of the cells has a label in adata.obs[{labels_key!r}]: there is nothing to compare with."
        raise ValueError(msg)
    return Judged(prediction_key, names, truth[rows], predicted[rows])


def _registry_behind(adata: AnnData, prediction_key: str) -> Registry:
    """What the fit that has made a prediction reads; of other predictions, what is registered."""
    root = read_root(adata)
    for key in root.get(UNS.fits, {}):
        registry = Registry.from_uns(read_fit(adata, key).setup)
        if FitKeys(key).prediction == prediction_key and registry.labels_key is not None:
            return registry
    return Registry.from_uns(root.get(UNS.setup, {}))


def _was_given(adata: AnnData, registry: Registry) -> np.ndarray:
    """Which cells have a label that a fit with this registry learns from."""
    if registry.labels_key is None or registry.labels_key not in adata.obs:
        return np.zeros(adata.n_obs, dtype=bool)
    _, (given,) = read_labels(adata.obs, [registry.labels_key], registry.unlabeled_category)
    return given >= 0
