from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_ext.get._predictions import judged_cells

if TYPE_CHECKING:
    from anndata import AnnData


def confusion_df(
    adata: AnnData,
    labels_key: str,
    *,
    key: str | None = None,
    prediction_key: str | None = None,
    indices: object = None,
) -> pd.DataFrame:
    """Number of cells of each true label with each predicted one.

    The cells are those of :func:`~scvi_ext.get.classification_df`; :func:`scvi_ext.pl.confusion` draws the table.

    Parameters
    ----------
    adata
        Annotated data.
    labels_key
        Column of ``obs`` with the true labels. Cells without one, or with the registered unlabelled category, are left
        out.
    key
        Which fit; the last one by default.
    prediction_key
        Column of ``obs`` with predictions, instead of those of a fit.
    indices
        Cells to compare: positions, mask, names or a slice.

    Returns
    -------
    True labels x predicted labels, int64, both in the order of ``labels_key``; then labels that are predicted only, and
    ``"abstained"`` for cells without a prediction, if there are any.

    Raises
    ------
    KeyError
        No such fit or column, or nothing was predicted.
    ValueError
        No cell has a true label, or ``key`` beside ``prediction_key``.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> adata.obs["guess"] = adata.obs["bulk_labels"].astype(str).replace("CD34+", "Dendritic")
    >>> sx.get.confusion_df(adata, "bulk_labels", prediction_key="guess").loc["CD34+", ["CD34+", "Dendritic"]].tolist()
    [0, 13]
    """
    cells = judged_cells(adata, labels_key, key, prediction_key, indices)
    n_names = len(cells.names)
    # -1 is the last column.
    counts = np.zeros((n_names, n_names + 1), dtype=np.int64)
    np.add.at(counts, (cells.truth, cells.predicted), 1)
    table = pd.DataFrame(counts, index=cells.names, columns=[*cells.names, "abstained"])
    table = table.rename_axis(index=labels_key, columns=cells.prediction_key)
    present = counts.sum(axis=1) > 0
    return table.loc[present, np.append(present, False) | (counts.sum(axis=0) > 0)]
