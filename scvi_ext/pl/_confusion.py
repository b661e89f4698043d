from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from scvi_ext import get
from scvi_ext.pl._finish import finish

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes


def confusion(
    adata: AnnData,
    labels_key: str,
    *,
    key: str | None = None,
    prediction_key: str | None = None,
    indices: object = None,
    normalize: bool = True,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw which labels are taken for which: true labels in rows, predicted ones in columns.

    The cells are those of :func:`scvi_ext.get.classification_df`. Numbers behind the true labels are those of cells;
    where there are none in a field it stays empty. Cells without a prediction have a column of their own.

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
    normalize
        Write the share of each true label; False writes numbers of cells. Shades are always shares.
    ax
        Axes to draw into; new ones by default.
    show
        Show the figure; None asks ``scanpy.settings.autoshow``, and does not show what is saved.
    save
        File to write.

    Returns
    -------
    The axes, unless the figure was shown.

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
    >>> ax = sx.pl.confusion(adata, "bulk_labels", prediction_key="guess", show=False)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('predicted (guess)', 'true (bulk_labels)')
    """
    table = get.confusion_df(adata, labels_key, key=key, prediction_key=prediction_key, indices=indices)
    counts = table.to_numpy()
    support = counts.sum(axis=1, keepdims=True)
    shares = counts / support
    n_rows, n_columns = table.shape
    if ax is None:
        _, ax = plt.subplots(figsize=(2.6 + 0.5 * n_columns, 1.8 + 0.36 * n_rows), layout="constrained")
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(counts > 0):
        share = shares[row, column]
        ax.text(
            column,
            row,
            f"{share:.2f}" if normalize else f"{counts[row, column]}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if share > 0.6 else "black",
        )
    rows = [f"{label} ({n})" for label, n in zip(table.index, support[:, 0], strict=True)]
    ax.set_yticks(range(n_rows), rows, fontsize=9)
    ax.set_xticks(range(n_columns), table.columns, fontsize=9, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_ylabel(f"true ({table.index.name})")
    ax.set_xlabel(f"predicted ({table.columns.name})")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    # White lines between the fields.
    ax.set_xticks([i - 0.5 for i in range(1, n_columns)], minor=True)
    ax.set_yticks([i - 0.5 for i in range(1, n_rows)], minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.tick_params(which="minor", length=0)
    return None if finish(ax.figure, show, save) else ax
