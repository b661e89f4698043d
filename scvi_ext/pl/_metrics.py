from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from scvi_ext import get
from scvi_ext.pl._finish import finish

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes


def metrics(
    adata: AnnData,
    key: str | None = None,
    *,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw the table of metrics of several representations, each column shaded from its lowest to its highest value.

    Parameters
    ----------
    adata
        Annotated data that holds a table of :func:`scvi_ext.metrics.table`.
    key
        Its slot in ``uns``, ``"scvi_ext_metrics"`` by default.
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
        No such table.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch", labels_key="bulk_labels")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_latent(adata)
    >>> sx.metrics.table(adata)
    >>> ax = sx.pl.metrics(adata, show=False)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['X_scvi']
    """
    table = get.metrics_df(adata, key)
    spread = table.max() - table.min()
    # Where all are equal, as in a table of one row, none stands out.
    shades = ((table - table.min()) / spread.where(spread > 0)).fillna(0.0).to_numpy()
    n_rows, n_columns = table.shape
    if ax is None:
        _, ax = plt.subplots(figsize=(1.5 + 0.95 * n_columns, 0.9 + 0.38 * n_rows), layout="constrained")
    # Blues up to the tone on which black would no longer be read easily.
    ax.imshow(shades, cmap="Blues", vmin=0, vmax=2, aspect="auto")
    for row, values in enumerate(table.to_numpy()):
        for column, value in enumerate(values):
            weight = "bold" if shades[row, column] == 1 else "normal"
            ax.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=9, fontweight=weight)
    ax.set_xticks(
        range(n_columns), [name.replace("_", "\n", 1).replace("_", " ") for name in table.columns], fontsize=9
    )
    ax.set_yticks(range(n_rows), table.index, fontsize=9)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    # White lines between the cells.
    ax.set_xticks([i - 0.5 for i in range(1, n_columns)], minor=True)
    ax.set_yticks([i - 0.5 for i in range(1, n_rows)], minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.tick_params(which="minor", length=0)
    return None if finish(ax.figure, show, save) else ax
