"""gimVI beside GIMVI of scvi-tools and neighbours: genes imputed in cells whose panel lacks them.

    python benchmarks/spatial.py pbmc_multibatch_5.h5ad --seeds 0 1 2 --cache DIR --genes genes.csv

A stand-in for a spatial panel, of which the truth is known: two PBMC data sets of different studies (PAIRS; batches of
the file), one of which is reduced to 60 genes. These are among the 400 most variable ones of the other data set, and
were found in more than 5 % of the cells. In three folds, 20 of them are held out, each gene once, and imputed from the
other 40. Cells without a count in these are left out, since scvi-tools takes none.

Each held-out gene is compared with what was measured, over cells: "counts", Spearman's correlation of the mean count at
the cell's own depth with counts; "shares", of the share of all genes of the other data set with counts divided by the
cell's total; "found", the area under the ROC curve, how well the mean count tells cells in which the gene was found.
Ranks reward zeros that are imputed where most counts are zero, as by neighbours none of which has the gene; in the
area a tie counts half.

Prints markdown tables: means over genes in all folds and in each, and in how many genes ours is better than each other
method. With --genes every gene is written to a file, one row each. Of the common latent space: "mixing", the entropy of
the data sets among 50 neighbours as a share of that of all cells, and where cell types are known mixing within them and
their silhouette.

Baselines: the nearest cells of the other data set by the 40 genes (log-normalised; metrics.arrays
.proximity_imputation), and the depth alone, which is the same mean profile for all cells: its shares are constant, and
correlate with nothing.

scvi-tools takes five to eight minutes a fit, each in a process of its own; what it imputes is kept in the cache, as
DIR/<pair>_<fold>_<seed>.npz, and read where it is not installed. CPU seconds are what counts where other programs run,
and are to be compared with one thread on both sides (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from _annotation import stopwatch
from _common import (
    add_cache,
    batch_mixing,
    in_own_process,
    machine,
    make_parser,
    markdown,
    quiet_reference,
    same_threads,
    say,
    scvi,
    silhouette,
)
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

import scvi_ext as sx

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    import scipy.sparse as sp

# Name -> batches of the file: the one with all genes, and the one that is reduced to a panel.
PAIRS = {
    "pbmc10k_pbmc3k": ("pbmc10k_v3", "pbmc3k_10xv1"),
    "pbmc5k_donora": ("pbmc5k_v3", "frozen_pbmc_donor_a_10xv1"),
}
N_PANEL, N_FOLDS = 60, 3
N_NEIGHBORS = (4, 50)  # 4 is the number of Lopez et al. (2019)
MEASURES = ["counts", "shares", "found"]
N_MIXED = 50  # neighbours among which data sets are to mix


@dataclass
class Task:
    """Two data sets, and what was measured of the genes that one of them has to do without."""

    pair: str
    fold: int
    sequenced: ad.AnnData
    panel: ad.AnnData
    measured: np.ndarray  # counts of held-out genes in the cells of the panel
    genes: list[str]  # their names
    total: np.ndarray  # all counts of these cells
    kept: np.ndarray  # which cells of the data set have a count in the panel

    def datasets(self) -> dict[str, ad.AnnData]:
        """Registered AnnData of their own: a fit adds to them."""
        parts = {"sequenced": self.sequenced.copy(), "panel": self.panel.copy()}
        for part in parts.values():
            sx.pp.setup_anndata(part)
        return parts


@dataclass
class Imputed:
    """What a method says of the held-out genes."""

    counts: np.ndarray
    shares: np.ndarray
    latent: np.ndarray | None = None  # of the sequenced cells, then of those of the panel
    cpu_seconds: float = float("nan")


def main() -> None:
    """Impute, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("file", help="FILE.h5ad with obs['batch'], the batches of PAIRS, and obs['cell_type']")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(N_FOLDS)))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of our fits")
    parser.add_argument("--reference-seeds", nargs="*", type=int, default=[0], help="scvi-tools takes long")
    parser.add_argument("--max-epochs", type=int, help="of our fits, for a trial; by default the plan's own")
    parser.add_argument("--genes", type=Path, metavar="FILE", help="write the measures of every gene, as CSV")
    add_cache(parser)
    arguments = parser.parse_args()

    adata = ad.read_h5ad(arguments.file)
    adata.X = adata.X.astype(np.float32)
    runs, genes = [], []
    for pair in arguments.pairs:
        for fold in arguments.folds:
            task = make_task(adata, pair, fold)
            if not runs:
                fit_ours(task, 0, 1)  # so that imports and compilation do not count
            for method, seed, imputed in impute(task, arguments):
                run = {"pair": pair, "fold": fold, "method": method, "seed": seed}
                of_genes = judge(task, imputed)
                means = {name: pd.Series(values).mean() for name, values in of_genes.items()}
                runs.append(run | means | judge_latent(task, imputed.latent) | {"CPU seconds": imputed.cpu_seconds})
                genes.append(pd.DataFrame(run | {"gene": task.genes} | of_genes))
                say(runs[-1])
    genes = pd.concat(genes)
    if arguments.genes is not None:
        by_gene(genes).to_csv(arguments.genes, float_format="%.3f")
    print(f"\n{machine()}")
    for table in (summary(pd.DataFrame(runs)), by_fold(pd.DataFrame(runs)), best_of(genes)):
        print(f"\n{markdown(table)}")


# Data


@same_threads()
def make_task(adata: ad.AnnData, pair: str, fold: int) -> Task:
    """A third of the panel is held out; the same genes each time."""
    sequenced, panel = (adata[adata.obs["batch"] == name].copy() for name in PAIRS[pair])
    normalized = sequenced.copy()
    sc.pp.normalize_total(normalized, target_sum=1e4)
    sc.pp.log1p(normalized)
    sc.pp.highly_variable_genes(normalized, n_top_genes=400)
    found = np.asarray((panel.X > 0).mean(0)).ravel() > 0.05
    eligible = found & normalized.var["highly_variable"].to_numpy()
    ranked = np.argsort(-normalized.var["dispersions_norm"].to_numpy() * eligible, kind="stable")[:N_PANEL]
    chosen = sequenced.var_names[np.random.default_rng(0).permutation(ranked)]
    held_out = list(np.array_split(chosen, N_FOLDS)[fold])
    seen = [gene for gene in chosen if gene not in held_out]
    kept = np.asarray(panel[:, seen].X.sum(1)).ravel() > 0
    panel = panel[kept].copy()
    total = np.asarray(panel.X.sum(1)).ravel()
    measured = panel[:, held_out].X.toarray()
    return Task(pair, fold, sequenced, panel[:, seen].copy(), measured, held_out, total, kept)


# Methods


def impute(task: Task, arguments: Namespace) -> Iterator[tuple[str, int, Imputed]]:
    """Each method and its seed, and what it imputes."""
    for seed in arguments.seeds:
        yield "scvi_ext", seed, fit_ours(task, seed, arguments.max_epochs)
    for seed in arguments.reference_seeds:
        imputed = read_reference(task, seed, arguments.cache)
        if imputed is not None:
            yield "scvi-tools", seed, imputed
    for n_neighbors in N_NEIGHBORS:
        yield f"{n_neighbors} nearest cells", 0, by_neighbors(task, n_neighbors)
    yield "depth alone", 0, by_depth(task)


def fit_ours(task: Task, seed: int, max_epochs: int | None = None) -> Imputed:
    """Our fit as a user would call it."""
    parts = task.datasets()
    with stopwatch() as times:
        sx.tl.fit(parts, "gimvi", seed=seed, progress=False, max_epochs=max_epochs)
    panel = parts["panel"]
    sx.tl.impute(panel, gene_list=task.genes, library_size="latent", key_added="counts")
    sx.tl.impute(panel, gene_list=task.genes, decode_mode="sequenced", library_size=1, key_added="shares")
    for part in parts.values():
        sx.tl.get_latent(part)
    latent = np.concatenate([part.obsm["X_gimvi"] for part in parts.values()])
    return Imputed(panel.obsm["counts"].to_numpy(), panel.obsm["shares"].to_numpy(), latent, times.cpu_seconds)


def read_reference(task: Task, seed: int, cache: Path | None) -> Imputed | None:
    """What the default GIMVI of scvi-tools imputes, from the cache where it is there; None where it cannot be had."""
    file = None if cache is None else cache / f"{task.pair}_{task.fold}_{seed}.npz"
    if file is not None and file.exists():
        kept = np.load(file)
        if list(kept["held"]) != task.genes or not np.array_equal(kept["keep"], task.kept):
            msg = f"{file} is of other genes or cells: remove it."
            raise ValueError(msg)
    else:
        if scvi is None:
            return None
        kept = in_own_process(fit_reference, task, seed)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, **kept)
    latent = np.concatenate([kept["z0"], kept["z1"]])
    return Imputed(kept["rate_own"], kept["scale_0"], latent, float(kept["seconds"]))


def fit_reference(task: Task, seed: int) -> dict[str, np.ndarray]:
    """GIMVI with its defaults: 200 epochs."""
    scvi.settings.seed = seed
    model_class = scvi.external.GIMVI
    with quiet_reference():
        for part in (task.sequenced, task.panel):
            model_class.setup_anndata(part)
        model = model_class(task.sequenced, task.panel)
        with stopwatch() as times:
            model.train(accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False)
        latents = model.get_latent_representation()
        columns = task.sequenced.var_names.get_indexer(task.genes)
        rate = model.get_imputed_values(normalized=False)[1][:, columns]
        share = model.get_imputed_values(normalized=True, decode_mode=0)[1][:, columns]
    return {
        "z0": latents[0],
        "z1": latents[1],
        "rate_own": rate,
        "scale_0": share,
        "seconds": np.array(times.cpu_seconds),
        "wall": np.array(times.seconds),
        "held": np.array(task.genes),
        "keep": task.kept,
    }


def by_neighbors(task: Task, n_neighbors: int) -> Imputed:
    """The mean of the nearest cells, by the logarithm of normalised counts of the genes that both have."""
    sequenced = task.sequenced
    with stopwatch() as times:
        places = [log_normalized(part[:, task.panel.var_names].X) for part in (sequenced, task.panel)]
        counts = sequenced[:, task.genes].X.toarray()
        shares = counts / np.asarray(sequenced.X.sum(1))
        imputed = [
            sx.metrics.arrays.proximity_imputation(places[0], values, places[1], n_neighbors)
            for values in (counts, shares)
        ]
    return Imputed(*imputed, cpu_seconds=times.cpu_seconds)


def log_normalized(counts: sp.csr_matrix) -> np.ndarray:
    """log(1 + counts), as if all cells had the median of counts."""
    counts = counts.toarray()
    total = counts.sum(1, keepdims=True)
    return np.log1p(counts / np.maximum(total, 1) * np.median(total))


def by_depth(task: Task) -> Imputed:
    """The mean profile for all cells: counts follow those of the panel, shares are constant."""
    profile = np.asarray(task.sequenced[:, task.genes].X.sum(0)).ravel() / task.sequenced.X.sum()
    depth = np.asarray(task.panel.X.sum(1))
    return Imputed(depth * profile, np.tile(profile, (len(depth), 1)))


# Judgement


def judge(task: Task, imputed: Imputed) -> dict[str, np.ndarray]:
    """Of every gene; NaN where nothing varies."""
    correlation = sx.metrics.arrays.imputation_correlation
    found = task.measured > 0
    varies = found.any(0) & ~found.all(0)
    return {
        "counts": correlation(imputed.counts, task.measured),
        "shares": correlation(imputed.shares, task.measured / task.total[:, None]),
        "found": np.array(
            [roc_auc_score(found[:, i], imputed.counts[:, i]) if varies[i] else np.nan for i in range(len(task.genes))]
        ),
    }


def judge_latent(task: Task, latent: np.ndarray | None) -> dict[str, float]:
    """How well both data sets mix, at all and within cell types, and how well these are apart; what can be known."""
    row = dict.fromkeys(("mixing", "batch mixing", "silhouette"), np.nan)
    if latent is None:
        return row
    parts = (task.sequenced, task.panel)
    types = pd.concat([part.obs["cell_type"].astype(str) for part in parts])
    dataset = pd.concat([part.obs["batch"].astype(str) for part in parts])
    with same_threads():
        graph = sx.metrics.arrays.nearest_neighbors(latent, N_MIXED)
    best = entropy(dataset.value_counts())
    row["mixing"] = sx.metrics.arrays.entropy_batch_mixing(graph, dataset) / best
    if (types != "Unknown").any():
        row |= {"batch mixing": batch_mixing(latent, dataset, types), "silhouette": silhouette(latent, types)}
    return row


# Tables


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over folds and seeds."""
    return runs.drop(columns=["fold", "seed"]).groupby(["pair", "method"], sort=False).mean().reset_index()


def by_fold(runs: pd.DataFrame) -> pd.DataFrame:
    """The measures of each fold, one after the other, means over seeds."""
    means = runs.groupby(["pair", "fold", "method"], sort=False)[MEASURES].mean()
    cells = means.apply(lambda row: ", ".join(f"{value:.3f}" for value in row.dropna()), axis=1)
    return cells.unstack("method")[list(runs["method"].unique())].reset_index()


def by_gene(genes: pd.DataFrame) -> pd.DataFrame:
    """Genes x measures by method, means over seeds."""
    table = genes.groupby(["pair", "fold", "gene", "method"], sort=False)[MEASURES].mean().unstack("method")
    table.columns = [f"{method}, {measure}" for measure, method in table.columns]
    return table


def best_of(genes: pd.DataFrame) -> pd.DataFrame:
    """In how many genes ours is better than each other method, means over seeds."""
    tables = []
    for measure in MEASURES:
        table = genes.groupby(["pair", "gene", "method"], sort=False)[measure].mean().unstack("method")
        table = table.dropna(axis=1, how="all").dropna()  # the shares of depth alone; a gene that every cell has
        ours = table.pop("scvi_ext")
        by_pair = table.lt(ours, axis=0).groupby(level="pair", sort=False)
        better = by_pair.sum().astype(str)
        better.insert(0, "measure", measure)
        better.insert(1, "genes", by_pair.size())
        tables.append(better.reset_index())
    return pd.concat(tables).fillna("")


if __name__ == "__main__":
    main()
