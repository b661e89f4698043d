from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from scvi_ext import get
from scvi_ext._errors import whole_number
from scvi_ext.pl._finish import finish

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_COLUMNS = 4  # panels in a row
_NAME_HEIGHT = 0.06  # of an axis


def zero_inflation(
    adata: AnnData,
    key: str | None = None,
    *,
    n_names: int = 5,
    slot: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw the zeros of each gene against its mean count, coloured by how surely it is zero-inflated.

    Genes of the same mean differ in their share of zeros because they vary more or less from cell to cell, or because
    some of their zeros are technical. The colour is P(delta < 0.5): what is called inflated (above 0.5) is red.
    Those that are called most surely are named. The line is the share of zeros of a Poisson law.

    Parameters
    ----------
    adata
        Annotated data that :func:`~scvi_ext.tl.get_zero_inflation` has written to.
    key
        Which fit; the last one by default.
    n_names
        Genes to name in each panel, of those that are called.
    slot
        What the slots start with instead of ``"<key>_zero_inflation"``, where ``key_added`` was given.
    show
        Show the figure; None asks ``scanpy.settings.autoshow``, and does not show what is saved.
    save
        File to write.

    Returns
    -------
    One Axes, or one for each batch or label that has a delta of its own, unless the figure was shown.

    Raises
    ------
    KeyError
        No such fit, or nothing was read out of it.
    ValueError
        The fitted model has no zero inflation of its own, or ``n_names`` is negative.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_zero_inflated(n_cells_batch=300, n_genes=50)
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, "autozi", max_epochs=2)
    >>> sx.tl.get_zero_inflation(adata)
    >>> len(sx.pl.zero_inflation(adata, show=False))
    1
    """
    whole_number("n_names", n_names, 0)
    table = get.zero_inflation_df(adata, key, slot=slot)
    by = next((name for name in ("batch", "label") if name in table), None)
    parts = {"": table} if by is None else dict(list(table.groupby(by, sort=False)))
    n_columns = min(len(parts), _COLUMNS)
    n_rows = math.ceil(len(parts) / n_columns)
    figure, grid = plt.subplots(
        n_rows,
        n_columns,
        figsize=(3.6 * n_columns + 1.2, 3.4 * n_rows),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    axes = list(grid.flat)
    for ax, (name, part) in zip(axes, parts.items(), strict=False):
        points = _panel(ax, part, n_names)
        ax.set_title(f"{name}\n{part['called'].sum()} of {len(part)} genes called".strip(), fontsize=9)
    for ax in axes[len(parts) :]:
        ax.remove()
    axes = axes[: len(parts)]
    bar = figure.colorbar(points, ax=axes)
    bar.set_label("P(δ < 0.5)")
    return None if finish(figure, show, save) else axes


def _panel(ax: Axes, table: pd.DataFrame, n_names: int) -> object:
    counted = table[table["mean_count"] > 0]
    rest = counted.sort_values("probability")  # what is called lies on top
    points = ax.scatter(
        rest["mean_count"],
        rest["zeros"],
        c=rest["probability"],
        vmin=0,
        vmax=1,
        cmap="coolwarm",
        s=18,
        linewidths=0.3,
        edgecolors="black",
    )
    ax.set_xscale("log")
    ax.set_ylim(-0.03, 1.03)
    if len(counted):
        means = np.geomspace(counted["mean_count"].min(), counted["mean_count"].max(), 200)
        ax.plot(means, np.exp(-means), color="gray", linewidth=1, linestyle="--", zorder=0)
    height = 1.0  # names stay below the title
    surest = counted[counted["called"]].nlargest(n_names, ["probability", "share"])
    for gene in surest.sort_values("zeros")[::-1].itertuples():
        height = min(gene.zeros + _NAME_HEIGHT, height - _NAME_HEIGHT)  # names do not lie on each other
        ax.annotate(
            gene.gene,
            (gene.mean_count, gene.zeros),
            (1.25 * gene.mean_count, height),
            fontsize=7,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "gray", "shrinkA": 0, "shrinkB": 2},
        )
    ax.set_xlabel("mean count")
    ax.set_ylabel("share of zeros")
    ax.label_outer()
    ax.spines[["top", "right"]].set_visible(False)
    return points
