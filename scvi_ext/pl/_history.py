from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from scvi_ext import get
from scvi_ext._errors import listing, one_of
from scvi_ext.pl._finish import finish

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

_LABELS = {
    "elbo": "ELBO per cell (higher is better)",
    "reconstruction_loss": "reconstruction loss per cell",
    "kl_z": "KL of z per cell",
    "kl_library": "KL of the library per cell",
    "classification_loss": "cross-entropy per labelled cell",
}


def history(
    adata: AnnData,
    key: str | None = None,
    *,
    metric: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw how a fit went, epoch by epoch, for training and held-out cells.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    metric
        ``"elbo"``, ``"reconstruction_loss"``, ``"kl_z"``, ``"kl_library"`` or, of labelled cells,
        ``"classification_loss"``, in nats per cell; or ``"kl_weight"``, ``"lr"`` or ``"cells_per_second"``. None takes
        the ELBO, or the classification loss of a model that has none.
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
        No such fit.
    ValueError
        Unknown metric, or a fit that was interrupted before its first epoch was complete.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.pl.history(adata, show=False).get_xlabel()
    'epoch'
    """
    table = get.history(adata, key)
    if metric is None:
        metric = "elbo" if "elbo_train" in table or "classification_loss_train" not in table else "classification_loss"
    one_of("metric", metric, [*_LABELS, "kl_weight", "lr", "cells_per_second"])
    if table.empty:
        msg = "There is no epoch to draw: the fit was interrupted in its first one, or its weights were read or mapped."
        raise ValueError(msg)
    if not any(name in table for name in (metric, f"{metric}_train", f"{metric}_validation")):
        msg = f"The history of this fit has no {metric!r}; it has: {listing(table.columns, 20)}."
        raise ValueError(msg)
    curves = {name: table[f"{metric}_{name}"] for name in ("train", "validation") if f"{metric}_{name}" in table} or {
        None: table[metric]
    }
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for name, values in curves.items():
        ax.plot(table.index, values, label=name, marker="o" if len(table) < 30 else None, markersize=3)
    if len(curves) > 1:
        ax.legend(frameon=False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("epoch")
    ax.set_ylabel(_LABELS.get(metric, metric.replace("_", " ")))
    ax.spines[["top", "right"]].set_visible(False)
    return None if finish(ax.figure, show, save) else ax
