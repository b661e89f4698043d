from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from scvi_ext import get
from scvi_ext._errors import listing, whole_number
from scvi_ext.pl._finish import finish

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes


def volcano(
    adata: AnnData,
    group: str | None = None,
    *,
    key: str | None = None,
    n_names: int = 10,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | None:
    """Draw the probability of a change against the log2 fold change of every gene, called ones in colour.

    Proteins are triangles; ``key="<key>_de_protein"`` draws them alone. What was not measured is left out.

    Parameters
    ----------
    adata
        Annotated data with the result.
    group
        Which group; needed where there are several.
    key
        Slot of ``adata.uns``; by default what :func:`~scvi_ext.tl.differential_expression` wrote for the last fit.
    n_names
        Called genes and proteins to name on either side, those with the largest fold changes.
    ax
        Axes to draw into.
    show
        Show the figure; None asks ``scanpy.settings.autoshow``, and does not show what is saved.
    save
        File to write.

    Returns
    -------
    The Axes, unless the figure was shown.

    Raises
    ------
    KeyError
        No such slot or group.
    ValueError
        There are several groups and none is named.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.differential_expression(adata, "bulk_labels", n_samples=2000)
    >>> ax = sx.pl.volcano(adata, "CD19+ B", show=False)
    """
    whole_number("n_names", n_names, 0)
    table = get.de_df(adata, group, key=key)
    groups = table["group"].unique()
    if len(groups) > 1:
        msg = f"There are {len(groups)} groups, and a volcano shows one: group=... of {listing(groups)}."
        raise ValueError(msg)
    reference, delta = table["reference"].iloc[0], table["delta"].iloc[0]
    table = table[table["reason"] != "not measured"]
    kinds = table["feature_type"] if "feature_type" in table else np.full(len(table), "gene")
    is_protein = np.asarray(kinds == "protein")
    if not is_protein.all():  # a protein may have the name of a gene
        table = table.assign(gene=table["gene"] + np.where(is_protein, " (protein)", ""))
    figure = plt.subplots(figsize=(5, 4.2), layout="constrained")[0] if ax is None else ax.figure
    ax = figure.axes[0] if ax is None else ax
    probability, change, called = table["proba_de"], table["lfc_mean"], table["is_de"].to_numpy(bool)
    for drawn, marker, size in ((~is_protein, "o", 8), (is_protein, "^", 24)):
        for chosen, colour in (
            (~called, "0.75"),
            (called & (change > 0), "tab:red"),
            (called & (change <= 0), "tab:blue"),
        ):
            x, y = change[drawn & chosen], probability[drawn & chosen]
            ax.scatter(x, y, s=size, marker=marker, color=colour, linewidths=0, rasterized=True)
    ends = table[called].sort_values("lfc_mean")
    for named, x, align in (
        (ends[ends["lfc_mean"] <= 0], 0.02, "left"),
        (ends[ends["lfc_mean"] > 0][::-1], 0.98, "right"),
    ):
        for i, gene in enumerate(named.head(n_names).sort_values("proba_de", ascending=False).itertuples()):
            # In a column beside the points: most of them have a probability near 1, where names would cover each other.
            ax.annotate(
                gene.gene,
                (gene.lfc_mean, gene.proba_de),
                (x, 0.97 - 0.05 * i),
                textcoords="axes fraction",
                fontsize=7,
                ha=align,
                va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "0.6", "shrinkA": 0, "shrinkB": 2},
            )
    ax.margins(x=0.35)
    for border in {-delta, delta}:
        ax.axvline(border, color="0.6", linewidth=0.6, linestyle="--")
    ax.set(xlabel="log2 fold change (posterior mean)", ylabel="posterior probability of a change")
    ax.set_title(f"{groups[0]} against {reference}", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    return None if finish(figure, show, save) else ax
