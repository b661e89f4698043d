from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_fscore_support

from scvi_ext.get._predictions import judged_cells

if TYPE_CHECKING:
    from anndata import AnnData


def classification_df(
    adata: AnnData,
    labels_key: str,
    *,
    key: str | None = None,
    prediction_key: str | None = None,
    indices: object = None,
) -> pd.DataFrame:
    """How well each label is predicted: recall, precision and F1.

    Reads the prediction of :func:`~scvi_ext.tl.classify`, or that of any other tool, and compares it with true labels.
    By default in the cells without a label in the column that the fit learned from (of other predictions: that is
    registered), or, if none of these has a true label, in all. A cell without a prediction, where ``classify``
    abstained, counts as not found.

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
    One row per true label and the rows ``"mean over labels"``, in which rare ones weigh as much as frequent ones, and
    ``"mean over cells"``, whose recall is the accuracy. Columns ``recall``, ``precision`` (0 where a label is never
    predicted) and ``f1``, float64, and ``support``, the number of cells.

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
    >>> table = sx.get.classification_df(adata, "bulk_labels", prediction_key="guess")
    >>> table.loc[["CD34+", "Dendritic", "mean over cells"]].round(2)
                     recall  precision    f1  support
    CD34+              0.00       0.00  0.00       13
    Dendritic          1.00       0.95  0.97      240
    mean over cells    0.98       0.96  0.97      700
    """
    cells = judged_cells(adata, labels_key, key, prediction_key, indices)
    present, support = np.unique(cells.truth, return_counts=True)
    scores = precision_recall_fscore_support(cells.truth, cells.predicted, labels=present, zero_division=0)
    precision, recall, f1, _ = scores
    table = pd.DataFrame({"recall": recall, "precision": precision, "f1": f1}, [cells.names[code] for code in present])
    means = [table.mean(), (table.T * support).sum(axis=1) / support.sum()]
    table = pd.concat([table, pd.DataFrame(means, ["mean over labels", "mean over cells"])])
    table["support"] = np.r_[support, support.sum(), support.sum()]
    return table
