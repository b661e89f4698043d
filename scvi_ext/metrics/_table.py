from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._keys import METRICS, UNS, FitKeys, valid_key
from scvi_ext.data.registry import read_root
from scvi_ext.engine.device import resolve_seed
from scvi_ext.metrics import arrays
from scvi_ext.metrics._cells import (
    FOR_MIXING,
    FOR_PURITY,
    check_neighbors,
    complete,
    leave_out,
    obs_codes,
    registry_of,
    rep_key,
    rep_values,
    search,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


def table(
    adata: AnnData,
    *,
    batch_key: str | None = None,
    labels_key: str | None = None,
    use_reps: Sequence[str] | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Compare representations: one row for each, one column per metric, all of the same cells.

    :func:`entropy_batch_mixing` if there is a batch, :func:`knn_purity` and :func:`clustering_scores` if there are
    labels, with their defaults. Cells without a batch, a label or values in one of the representations are left out of
    all rows, and the log says how many these are. :func:`scvi_ext.get.metrics_df` reads the table,
    :func:`scvi_ext.pl.metrics` draws it.

    Parameters
    ----------
    adata
        Annotated data.
    batch_key
        Column of ``obs``, the registered batch by default.
    labels_key
        Column of ``obs``, the registered labels by default.
    use_reps
        Representations in ``obsm``; by default ``X_pca`` and the latent spaces of all fits, where they are there.
    seed
        Of clusters, silhouettes and the approximate search.
    key_added
        Slot to write, ``"scvi_ext_metrics"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.uns["scvi_ext_metrics"]``
        ``"table"``, a DataFrame of float64, representations x metrics, and ``"params"`` with the columns and the number
        of cells.

    Raises
    ------
    KeyError
        No such column or representation.
    ValueError
        Neither batch nor labels, no representation, or one that is named twice; too few cells or labels.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch", labels_key="bulk_labels")
    >>> for model in ("scvi", "ldvae"):
    ...     sx.tl.fit(adata, model, max_epochs=2)
    ...     sx.tl.get_latent(adata)
    >>> sx.metrics.table(adata)
    >>> sx.get.metrics_df(adata).columns.tolist()
    ['entropy_batch_mixing', 'knn_purity', 'ASW', 'NMI', 'ARI', 'UCA']
    """
    adata = adata.copy() if copy else adata
    seed = resolve_seed(seed)
    slot = METRICS if key_added is None else valid_key(key_added)
    if slot == UNS.root:
        msg = f"adata.uns[{slot!r}] holds the fits themselves: choose another name, key_added=..."
        raise ValueError(msg)
    keys = _columns(adata, batch_key, labels_key)
    codes = {role: obs_codes(adata, key) for role, key in keys.items()}
    values = {rep: rep_values(adata, rep) for rep in _representations(adata, use_reps)}
    parts = [*(column >= 0 for column in codes.values()), *(complete(array) for array in values.values())]
    taking_part = np.logical_and.reduce(parts)
    n_neighbors = check_neighbors(adata, None, taking_part.sum(), max(FOR_MIXING, FOR_PURITY))
    start = logg.info(f"comparing {len(values)} representations")
    rows = leave_out(taking_part, "a batch, a label or a value")
    codes = {role: column[rows] for role, column in codes.items()}
    scores = {}
    for rep, array in values.items():
        array = array[rows]
        graph = search(array, n_neighbors, seed, rep)
        scores[rep] = {}
        if "batch_key" in codes:
            mixing = arrays.entropy_batch_mixing(arrays.nearest(graph, FOR_MIXING), codes["batch_key"])
            scores[rep]["entropy_batch_mixing"] = mixing
        if "labels_key" in codes:
            scores[rep]["knn_purity"] = arrays.knn_purity(arrays.nearest(graph, FOR_PURITY), codes["labels_key"])
            scores[rep] |= arrays.clustering_scores(array, codes["labels_key"], seed=seed)
    frame = pd.DataFrame.from_dict(scores, orient="index").rename_axis("representation")
    results.write_uns(adata, slot, {"table": frame, "params": {**keys, "n_cells": len(rows)}})
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, table of metrics (adata.uns)")
    return adata if copy else None


def _columns(adata: AnnData, batch_key: str | None, labels_key: str | None) -> dict[str, str]:
    """The columns that are asked for or registered, by what they are."""
    registry = registry_of(adata)
    keys = {"batch_key": batch_key or registry.batch_key, "labels_key": labels_key or registry.labels_key}
    keys = {role: key for role, key in keys.items() if key is not None}
    if not keys:
        msg = "Neither batch nor labels are registered: name batch_key, labels_key or both (adata.obs)."
        raise ValueError(msg)
    return keys


def _representations(adata: AnnData, use_reps: Sequence[str] | None) -> list[str]:
    if use_reps is None:
        known = ["X_pca", *(FitKeys(key).latent for key in sorted(read_root(adata).get(UNS.fits, {})))]
        use_reps = [rep for rep in known if rep in adata.obsm]
        if not use_reps:
            msg = "adata.obsm has neither 'X_pca' nor the latent space of a fit: name representations, use_reps=[...]."
            raise ValueError(msg)
    use_reps = [use_reps] if isinstance(use_reps, str) else list(use_reps)
    if not use_reps or len(set(use_reps)) < len(use_reps):
        msg = f"use_reps={use_reps} must name at least one representation, and each one once."
        raise ValueError(msg)
    return [rep_key(adata, rep) for rep in use_reps]
