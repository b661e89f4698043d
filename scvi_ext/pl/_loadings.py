from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from scvi_ext import get
from scvi_ext.pl._finish import finish

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

_COLUMNS = 5  # panels in a row


def loadings(
    adata: AnnData,
    key: str | None = None,
    *,
    components: Sequence[int] | None = None,
    n_genes: int = 10,
    show: bool | None = None,
    save: str | Path | None = None,
) -> list[Axes] | None:
    """Draw the genes with the largest loadings, of either sign, on each latent unit.

    Parameters
    ----------
    adata
        Annotated data that holds a fit with a linear decoder.
    key
        Which fit; the last one by default.
    components
        Latent units, counted from 0; all by default.
    n_genes
        Genes per unit: half of them with the highest, half with the lowest loadings.
    show
        Show the figure; None asks ``scanpy.settings.autoshow``, and does not show what is saved.
    save
        File to write.

    Returns
    -------
    One Axes per unit, unless the figure was shown.

    Raises
    ------
    KeyError
        No such fit.
    ValueError
        The fitted model has no loadings, there is no such component, or ``n_genes`` is below 2.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, "ldvae", max_epochs=2)
    >>> len(sx.pl.loadings(adata, components=[0, 1], show=False))
    2
    """
    table = get.loadings_df(adata, key)
    components = list(range(table.shape[1]) if components is None else components)
    unknown = [c for c in components if not 0 <= c < table.shape[1]]
    if unknown or not components:
        msg = f"components={components} must be latent units from 0 to {table.shape[1] - 1}, at least one."
        raise ValueError(msg)
    if n_genes < 2:
        msg = f"n_genes={n_genes} must be 2 or more: genes at both ends are drawn."
        raise ValueError(msg)
    half = min(n_genes, len(table)) // 2
    n_rows = math.ceil(len(components) / _COLUMNS)
    n_columns = min(len(components), _COLUMNS)
    figure, grid = plt.subplots(
        n_rows,
        n_columns,
        figsize=(2.4 * n_columns, (0.6 + 0.2 * 2 * half) * n_rows),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    axes = list(grid.flat)
    for ax, component in zip(axes, components, strict=False):
        ranked = table.iloc[:, component].sort_values()
        ends = np.r_[0:half, len(ranked) - half : len(ranked)]
        shown = ranked.iloc[ends]
        ax.barh(np.arange(len(shown)), shown, color=np.where(shown < 0, "tab:blue", "tab:red"))
        ax.set_yticks(np.arange(len(shown)), shown.index, fontsize=7)
        ax.set_title(shown.name, fontsize=9)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.tick_params(axis="x", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(components) :]:
        ax.remove()
    figure.supxlabel("loading", fontsize=9)
    return None if finish(figure, show, save) else axes[: len(components)]
