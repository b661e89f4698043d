from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from scvi_ext import get
from scvi_ext.pl._finish import finish

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_PANELS = [  # table, statistic, title, logarithmic axes
    ("genes", "cv", "coefficient of variation of genes", True),
    ("genes", "zero_fraction", "share of zeros of genes", False),
    ("cells", "cv", "coefficient of variation of cells", True),
    ("cells", "zero_fraction", "share of zeros of cells", False),
]


def posterior_predictive(
    adata: AnnData,
    key: str | None = None,
    *,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw a posterior predictive check: what was observed against what the model would have counted itself.

    A point for each gene and for each cell; on the diagonal the model is right, beside it the bars of two standard
    deviations of the replicates tell whether that is chance. The last panel is calibration: the share of counts within
    their central predictive intervals, against the share that there should be. Above the diagonal predictions are too
    wide, below it too narrow.

    Parameters
    ----------
    adata
        Annotated data on which :func:`~scvi_ext.tl.posterior_predictive_check` was called.
    key
        Which fit, or the ``key_added`` of the check; the last fit by default.
    show
        Show the figure; None asks ``scanpy.settings.autoshow``, and does not show what is saved.
    save
        File to write.

    Returns
    -------
    Five Axes, unless the figure was shown.

    Raises
    ------
    KeyError
        No such fit or check.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.posterior_predictive_check(adata, n_samples=2)
    >>> len(sx.pl.posterior_predictive(adata, show=False))
    5

    References
    ----------
    Czado, Gneiting and Held (2009), Biometrics 65, 1254.
    """
    check = get.posterior_predictive(adata, key)
    figure = plt.figure(figsize=(10.5, 6.2), layout="constrained")
    places = figure.add_gridspec(4, 3)
    slots = [places[:2, 0], places[:2, 1], places[2:, 0], places[2:, 1]]
    axes = [figure.add_subplot(slot) for slot in (*slots, places[1:3, 2])]
    for ax, (table, statistic, title, logarithmic) in zip(axes, _PANELS, strict=False):
        _points(ax, check[table], statistic, logarithmic)
        ax.set_title(title, fontsize=9)
    _calibration(axes[-1], check["calibration"])
    for ax in axes:
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return None if finish(figure, show, save) else axes


def _points(ax: Axes, table: pd.DataFrame, statistic: str, logarithmic: bool) -> None:
    observed, predicted, sd = (table[f"{statistic}_{which}"] for which in ("observed", "predicted", "sd"))
    drawn = np.concatenate([observed, predicted])
    drawn = drawn[np.isfinite(drawn) & ((drawn > 0) | (not logarithmic))]
    ax.set_xlabel("observed", fontsize=8)
    ax.set_ylabel("predicted", fontsize=8)
    if not len(drawn):
        return
    low, high = drawn.min(), drawn.max()
    margin = 0.03 * (high - low) or 0.03
    ends = (low / 1.1, high * 1.1) if logarithmic else (low - margin, high + margin)
    if logarithmic:
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    # on a logarithmic axis a bar cannot reach zero
    bars = np.stack([np.minimum(2 * sd, 0.99 * predicted), 2 * sd])
    ax.errorbar(observed, predicted, bars, fmt="none", ecolor="0.8", elinewidth=0.5, zorder=1, rasterized=True)
    ax.scatter(observed, predicted, s=4, color="tab:blue", linewidths=0, zorder=2, rasterized=True)
    ax.plot(ends, ends, color="black", linewidth=0.8, zorder=3)
    ax.set(xlim=ends, ylim=ends)


def _calibration(ax: Axes, table: pd.DataFrame) -> None:
    ax.axline((0, 0), (1, 1), color="black", linewidth=0.8)
    ax.plot(table["level"], table["coverage"], marker="o", markersize=3, label="all counts")
    ax.plot(table["level"], table["coverage_expressed"], marker="o", markersize=3, label="predicted rate 1 or more")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_xlabel("central predictive interval", fontsize=8)
    ax.set_ylabel("share of counts inside", fontsize=8)
    ax.set_title("calibration", fontsize=9)
    ax.legend(frameon=False, fontsize=7, loc="upper left")
