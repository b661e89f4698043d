"""Mixing of batches at equal separation of cell types.

    python benchmarks/separation.py pbmc_multibatch_5.h5ad:batch --fits '{"max_epochs": 40}' --plot separation.svg

Batch mixing is measured among nearest neighbours, so whatever blurs an embedding raises it, and lowers the silhouette
of the cell types. To compare embeddings of unequal separation, normal noise is added to each, more and more, until its
silhouette has come down to the lowest one in the comparison. Compares PCA, Harmony (where harmonypy is installed), our
default fit, one sample of its posterior instead of the mean, further fits of ours, and the fit of scvi-tools that
--cache has. Prints one markdown table.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from _common import (
    Data,
    Outcome,
    add_cache,
    add_fits,
    batch_mixing,
    cached_reference,
    fit_ours,
    machine,
    make_parser,
    markdown,
    read_data,
    same_threads,
    say,
    silhouette,
    title,
)
from harmony import pca_and_harmony

import scvi_ext as sx

NOISE = np.arange(0, 1.01, 0.1)  # standard deviations, in units of that of the embedding's axes (root mean square)


def main() -> None:
    """Embed, blur, judge, print and draw."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="FILE.h5ad:BATCH_COLUMN, with cell types in obs['cell_type']")
    add_fits(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="the curves")
    add_cache(parser)
    arguments = parser.parse_args()
    tables = []
    for file in arguments.files:
        data = read_data(file, arguments.subsample)
        if data.batch_key is None:
            parser.error(f"{file} needs a batch column: FILE.h5ad:BATCH_COLUMN")
        curves = []
        for outcome in embeddings(data, arguments.seed, arguments.fits, arguments.cache):
            curves.append(blurred(data, outcome, arguments.seed))
            say(curves[-1].iloc[0].to_dict())
        tables.append(pd.concat(curves))
    table = pd.concat(tables)
    print(f"{machine()}\n\n{markdown(at_equal_separation(table))}")
    if arguments.plot:
        plot(table, arguments.plot)


def embeddings(data: Data, seed: int, further: list[dict[str, float]], cache: Path | None) -> list[Outcome]:
    """Everything that is compared; ``further`` are the options of further fits of ours."""
    outcomes = pca_and_harmony(data.adata, data.batch_key, seed)[1]
    adata = data.shell()
    sx.pp.setup_anndata(adata, batch_key=data.batch_key)
    sx.tl.fit(adata, seed=seed, progress=False)
    n_epochs = len(sx.get.history(adata))
    sx.tl.get_latent(adata, key_added="mean")
    sx.tl.get_latent(adata, give_mean=False, seed=seed, key_added="sample")
    for kind, name in (("mean", f"scvi_ext, {n_epochs} epochs (default)"), ("sample", "the same, a posterior sample")):
        outcomes.append(Outcome(name, float("nan"), float("nan"), adata.obsm[kind]))
    for options in further:
        outcome = fit_ours(data, seed, **options)
        outcome.method = title(options)
        outcomes.append(outcome)
    reference = cached_reference(data, seed, cache=cache)
    return outcomes if reference is None else [*outcomes, reference]


@same_threads()
def blurred(data: Data, outcome: Outcome, seed: int) -> pd.DataFrame:
    """Silhouette and batch mixing at every noise level."""
    latent, obs = np.asarray(outcome.latent), data.adata.obs
    normal = np.random.default_rng(seed).standard_normal(latent.shape) * np.sqrt(latent.var(0).mean())
    rows = []
    for noise in NOISE:
        z = latent + noise * normal
        rows.append({"noise": noise, "silhouette": silhouette(z, obs["cell_type"])})
        rows[-1]["batch mixing"] = batch_mixing(z, obs[data.batch_key], obs["cell_type"])
    return pd.DataFrame(rows).assign(data=data.label, method=outcome.method)


def at_equal_separation(table: pd.DataFrame) -> pd.DataFrame:
    """Each embedding as it is, and how well it mixes at the lowest silhouette of its data set."""
    rows = []
    for data, curves in table.groupby("data", sort=False):
        lowest = curves.loc[curves["noise"] == 0, "silhouette"].min()
        for method, curve in curves.groupby("method", sort=False):
            start, blur = curve.iloc[0], np.maximum.accumulate(-curve["silhouette"])
            row = {"data": data, "method": method, "silhouette": start["silhouette"]}
            row |= {"batch mixing": start["batch mixing"], "at silhouette": lowest}
            rows.append(row | {"batch mixing there": np.interp(-lowest, blur, curve["batch mixing"])})
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame, path: Path) -> None:
    """One curve per embedding, from as it is (a dot) to ever more noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(table.groupby("data", sort=False))
    figure, axes = plt.subplots(1, len(sets), figsize=(4.6 * len(sets), 4.4), layout="constrained", squeeze=False)
    for ax, (data, curves) in zip(axes[0], sets, strict=True):
        lowest = curves.loc[curves["noise"] == 0, "silhouette"].min()
        for method, curve in curves.groupby("method", sort=False):
            ours = method.startswith(("scvi_ext", "the same"))
            (line,) = ax.plot(curve["silhouette"], curve["batch mixing"], "-" if ours else "--", lw=1.5, label=method)
            ax.plot(curve["silhouette"].iloc[:1], curve["batch mixing"].iloc[:1], "o", color=line.get_color())
        ax.axvline(lowest, color="0.8", lw=1, zorder=0)
        ax.set(xlabel="silhouette of cell types", ylabel="batch mixing", title=data)
        ax.set_xlim(left=max(0, lowest - 0.1))
        ax.legend(frameon=False, fontsize="x-small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
