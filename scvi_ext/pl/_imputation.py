from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from scvi_ext import get
from scvi_ext._errors import listing, one_of
from scvi_ext.pl._finish import finish

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

_MEASURES = {
    "median": "median error",
    "mean": "mean error",
    "median_per_cell": "median error of a cell, mean over cells",
    "median_per_gene": "median error of a gene, mean over genes",
}
_BINS = 60
_TICKS = np.array([0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 100_000, 1_000_000])


def imputation(
    adata: AnnData,
    key: str | None = None,
    *,
    methods: Sequence[str] = ("fit",),
    measure: Literal["median", "mean", "median_per_cell", "median_per_gene"] = "median",
    slot: str | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw imputed against original counts, and the errors of all methods side by side.

    The density of the entries, on axes of log(1 + count) and coloured on a log scale, with the diagonal (black, dashed)
    and the least-squares line of imputed on original counts (red), which the axes bend.

    Parameters
    ----------
    adata
        Annotated data that :func:`~scvi_ext.tl.imputation_score` has written to.
    key
        Which fit; the last one by default.
    methods
        Whose entries to draw, one panel each: ``"fit"``, ``"uncorrupted"``, ``"nearest cells"``, ``"gene mean"``,
        ``"no imputation"``.
    measure
        Error in the last panel, of every method that was judged: ``"median"``, ``"mean"``, ``"median_per_cell"`` or
        ``"median_per_gene"``.
    slot
        Entry of ``uns`` instead of ``"<key>_imputation"``, where ``key_added`` was given.
    show
        Show the figure; None asks ``scanpy.settings.autoshow``, and does not show what is saved.
    save
        File to write.

    Returns
    -------
    One Axes per method in ``methods`` and one for the errors, unless the figure was shown.

    Raises
    ------
    KeyError
        No such fit, or nothing has been imputed by it.
    ValueError
        A method was not judged, or ``measure`` is unknown.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.corrupt(adata)
    >>> sx.pp.setup_anndata(adata, layer="corrupted")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.imputation_score(adata)
    >>> len(sx.pl.imputation(adata, methods=["fit", "gene mean"], show=False))
    3
    """
    one_of("measure", measure, _MEASURES)
    scores = get.imputation_df(adata, key, slot=slot)
    entries = get.imputation_df(adata, key, table="entries", slot=slot)
    methods = [methods] if isinstance(methods, str) else list(methods)
    unknown = [method for method in methods if method not in scores.index]
    if unknown or not methods:
        msg = f"methods={methods} must be some of those that were judged: {listing(scores.index)}."
        raise ValueError(msg)
    figure, axes = plt.subplots(
        1, len(methods) + 1, figsize=(3.4 * len(methods) + 3.6, 3.4), squeeze=False, layout="constrained"
    )
    *panels, last = axes.flat
    for ax, method in zip(panels, methods, strict=True):
        _density(ax, entries["original"].to_numpy(float), entries[method].to_numpy(float))
        ax.set_title(method, fontsize=10)
    bars = last.barh(scores.index[::-1], scores[measure].iloc[::-1], color="tab:gray")
    for bar, method in zip(bars, scores.index[::-1], strict=True):
        bar.set_color("tab:blue" if method == "fit" else "lightsteelblue" if method == "uncorrupted" else "tab:gray")
    last.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    last.margins(x=0.15)
    last.set_xlabel(_MEASURES[measure])
    last.spines[["top", "right"]].set_visible(False)
    return None if finish(figure, show, save) else [*panels, last]


def _density(ax: Axes, original: np.ndarray, imputed: np.ndarray) -> None:
    """Entries in two dimensions; every column of bins holds at least one whole number, so that none stays empty."""
    low, top_x, top_y = original.min(), original.max(), max(imputed.max(), 1.0)
    whole = np.unique(np.rint(np.expm1(np.linspace(np.log1p(low), np.log1p(top_x), _BINS))))
    columns = np.append(whole - 0.5, top_x + 0.5)
    rows = np.expm1(np.linspace(0, np.log1p(top_y), _BINS))
    rows[-1] = top_y  # which rounding would leave out
    density, _, _ = np.histogram2d(original, imputed, bins=(columns, rows))
    ax.pcolormesh(columns, rows, np.where(density > 0, density, np.nan).T, norm=LogNorm(), cmap="viridis")
    ax.set_xscale("function", functions=(_log1p, np.expm1))
    ax.set_yscale("function", functions=(_log1p, np.expm1))
    for axis, bottom, top in ((ax.xaxis, low, top_x), (ax.yaxis, 0, top_y)):
        axis.set_ticks(_TICKS[(_TICKS >= bottom) & (_TICKS <= top)])
    ax.minorticks_off()
    x = np.linspace(low, top_x, 200)
    ax.plot(x, x, color="black", linestyle="--", linewidth=1, label="imputed = original")
    if low < top_x:
        slope, intercept = np.polyfit(original, imputed, 1)
        ax.plot(x, slope * x + intercept, color="tab:red", linewidth=1.2, label=f"slope {slope:.2f}")
    ax.set_ylim(0, top_y)
    ax.set_xlim(columns[0], columns[-1])
    ax.set_xlabel("original count")
    ax.set_ylabel("imputed")
    ax.legend(fontsize=7, loc="lower right")


def _log1p(values: np.ndarray) -> np.ndarray:
    return np.log1p(np.maximum(values, -0.9))  # the limits of an axis may be below 0
