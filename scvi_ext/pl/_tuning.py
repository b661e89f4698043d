from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator
from pandas.api.types import is_numeric_dtype

from scvi_ext import get
from scvi_ext._errors import one_of
from scvi_ext.pl._finish import finish

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_NO_OPTIONS = ("state", "value", "seconds", "note")
_LOG = 10.0  # values that are further apart than this factor are drawn on a log scale
_FAR = 4.0  # trials further from the best than so many times the middle one are left out of the picture


def tuning(
    adata: AnnData,
    key: str | None = None,
    *,
    option: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw the trials of a search: each with its value, one after the other, or against one of the options.

    Filled points were carried out, the best of them is circled; hollow ones were given up on the way, and stand where
    they were then, by their held-out ELBO. Trials far worse than the others are out of the picture, and counted.

    Parameters
    ----------
    adata
        Annotated data that holds the search.
    key
        Which search, by the name of its fit; the last fit by default.
    option
        What to draw along x: an option that was searched. None takes the order of the trials, with a line for the best
        so far.
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
        There is no such search.
    ValueError
        ``option`` was not searched.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.tune(adata, space={"n_latent": [5, 10]}, n_trials=2, max_epochs=1)
    >>> sx.pl.tuning(adata, show=False).get_xlabel()
    'trial'
    """
    trials = get.tuning_df(adata, key)
    if option is not None:
        one_of("option", option, [name for name in trials if name not in _NO_OPTIONS])
    params = get.tuning_params(adata, key)
    rising = params["direction"] == "maximize"
    last = get.tuning_df(adata, key, table="progress").groupby("trial")["elbo"].last()
    trials["reached"] = trials["value"].where(trials["state"] == "complete", last.reindex(trials.index))
    trials = trials[trials["state"].isin(["complete", "pruned"])].dropna(subset="reached")
    complete, pruned = (trials[trials["state"] == state] for state in ("complete", "pruned"))
    best = trials.loc[[int(params["best_trial"])]]

    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
    along = _along(trials, option, ax)
    ax.scatter(along[complete.index], complete["reached"], s=24, color="C0", label="carried out", zorder=3)
    if len(pruned):
        ax.scatter(along[pruned.index], pruned["reached"], s=24, facecolor="none", edgecolor="0.6", label="given up")
    ax.scatter(along[best.index], best["reached"], s=110, facecolor="none", edgecolor="C3", label="best", zorder=4)
    if option is None:
        so_far = complete["reached"].cummax() if rising else complete["reached"].cummin()
        ax.step(along[complete.index], so_far, where="post", color="C0", linewidth=1, alpha=0.6)
        ax.xaxis.get_major_locator().set_params(integer=True)
    _look_at_the_good(ax, trials["reached"], rising)
    ax.set_xlabel("trial" if option is None else option)
    ax.set_ylabel("held-out ELBO per cell" if params["metric"] == "elbo" else params["metric"])
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1)
    return None if finish(ax.figure, show, save) else ax


def _along(trials: pd.DataFrame, option: str | None, ax: Axes) -> pd.Series:
    """Where each trial stands along x: its number, or the value of the option, on the axis that suits that."""
    if option is None:
        return trials.index.to_series()
    values = trials[option]
    if not is_numeric_dtype(values):
        names = sorted(values.unique())
        ax.set_xticks(range(len(names)), names)
        ax.set_xlim(-0.5, len(names) - 0.5)
        return values.map(names.index)
    if values.min() > 0 and values.max() > _LOG * values.min():
        ax.set_xscale("log")
        few = values.max() < 50 * values.min()  # then powers of ten alone would be too few
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    return values


def _look_at_the_good(ax: Axes, values: pd.Series, rising: bool) -> None:
    """Leave the worst out of the picture where they would press the others into a line, and say how many they are."""
    good, middle = values.max() if rising else values.min(), values.median()
    edge = good - _FAR * (good - middle)
    outside = values < edge if rising else values > edge
    if not outside.any() or good == middle:
        return
    margin = 0.08 * abs(good - edge)
    ax.set_ylim(*((edge, good + margin) if rising else (good - margin, edge)))
    text = f"{outside.sum()} {'below' if rising else 'above'}"
    ax.text(0.01, 0.02 if rising else 0.98, text, transform=ax.transAxes, va="bottom" if rising else "top", color="0.4")
