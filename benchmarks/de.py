"""Differential expression: planted truth, agreement with scvi-tools on the same weights, and speed.

    python benchmarks/de.py --planted 20 --reference-seeds 0 1
    python benchmarks/de.py --agreement pbmc10k_5k_cite.h5ad:batch
    python benchmarks/de.py --speed kang_ctrl_8donors.h5ad:batch

--planted N: synthetic counts of two groups of cells, N seeds, genes with planted fold changes: how many of the called
genes are false, and which share of the changed ones is found, beside Wilcoxon's test (scanpy, Benjamini-Hochberg) and
scvi-tools. --agreement: a model of scvi-tools is trained, read by io.read_scvi_tools, and both sides compare every cell
type with the rest, with one pseudocount and batch correction; differences of probabilities are given in Monte-Carlo
standard errors. --speed: all cell types against the rest, both sides with their defaults. Prints markdown tables.
"""

from __future__ import annotations

import tempfile
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from _common import (
    Data,
    machine,
    make_parser,
    markdown,
    new_reference,
    quiet_reference,
    random_cells,
    read_data,
    same_threads,
    say,
    scvi,
    train_reference,
)

import scvi_ext as sx

if TYPE_CHECKING:
    from argparse import ArgumentParser

SIZES = (0.5, 1.0, 2.0)  # planted log2 fold changes
GROUPBY = "cell_type"


def main() -> None:
    """Do what was asked for, and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--planted", type=int, metavar="N", help="seeds of the planted truth")
    parser.add_argument("--cells", type=int, default=2000, help="planted cells")
    parser.add_argument("--genes", type=int, default=1000, help="planted genes")
    parser.add_argument("--reference-seeds", nargs="*", type=int, default=[], help="of these, with scvi-tools too")
    parser.add_argument("--agreement", metavar="FILE.h5ad:BATCH_COLUMN")
    parser.add_argument("--reference-epochs", type=int, help="of scvi-tools' training, for a trial")
    parser.add_argument("--speed", metavar="FILE.h5ad:BATCH_COLUMN")
    arguments = parser.parse_args()
    if not (arguments.planted or arguments.agreement or arguments.speed):
        parser.error("ask for --planted, --agreement or --speed")
    print(f"{machine()}\n")
    if arguments.planted:
        rows = []
        for seed in range(arguments.planted):
            with_reference = seed in arguments.reference_seeds
            rows += on_planted(seed, arguments.cells, arguments.genes, arguments.reference_epochs, with_reference)
            say(pd.DataFrame(rows).tail(4).to_string())
        print(markdown(summary(pd.DataFrame(rows))), end="\n\n")
    if arguments.agreement:
        print(markdown(agreement(with_types(parser, arguments.agreement), arguments.reference_epochs)), end="\n\n")
    if arguments.speed:
        print(markdown(speed(with_types(parser, arguments.speed))), end="\n\n")


def with_types(parser: ArgumentParser, file: str) -> Data:
    """The data of a file, if it has batches and cell types."""
    data = read_data(file)
    if data.batch_key is None or GROUPBY not in data.adata.obs:
        parser.error(f"{file} needs a batch column and obs[{GROUPBY!r}]")
    return data


# Planted truth


def planted_groups(n_cells: int, n_genes: int, seed: int) -> ad.AnnData:
    """Gamma-Poisson counts of groups a and b, which share programmes that vary from cell to cell.

    A tenth of the genes is changed in b by a fold change of ``SIZES``, up or down such that the changes cancel: all
    other genes have the same share of the counts in both. Log-means of genes are normal with standard deviation 1.5,
    library sizes log-normal around 2,500 counts, inverse dispersions log-normal around 2.
    """
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 1.5, n_genes)
    change = np.zeros(n_genes)
    changed = rng.choice(n_genes, n_genes // 10, replace=False)
    balance = 0.0
    for gene in changed[np.argsort(-base[changed])]:
        size = rng.choice(SIZES)
        up, down = (base[gene] * (np.exp2(sign * size) - 1) for sign in (1, -1))
        goes_up = abs(balance + up) < abs(balance + down)
        change[gene], balance = (size, balance + up) if goes_up else (-size, balance + down)
    group = rng.integers(0, 2, n_cells)
    programmes = rng.normal(0, 1, (n_cells, 3)) @ rng.normal(0, 0.15, (3, n_genes))
    profile = base * np.exp2(change * group[:, None]) * np.exp(programmes)
    rate = profile / profile.sum(1, keepdims=True) * rng.lognormal(np.log(2500), 0.4, (n_cells, 1))
    theta = rng.lognormal(np.log(2), 0.5, n_genes)
    counts = rng.poisson(rng.gamma(theta, 1 / theta, rate.shape) * rate).astype(np.float32)
    adata = ad.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame({GROUPBY: np.array(["a", "b"])[group]}))
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    adata.var_names = [f"gene{i}" for i in range(n_genes)]
    adata.var["change"] = change
    return adata


def on_planted(
    seed: int, n_cells: int, n_genes: int, reference_epochs: int | None, with_reference: bool
) -> list[dict[str, object]]:
    """What each method calls on one data set, at a false discovery rate of 0.05."""
    adata = planted_groups(n_cells, n_genes, seed)
    found = np.asarray(adata.X.sum(0)).ravel() > 0
    change = adata.var["change"].to_numpy()
    fitted = adata[:, found].copy()
    sx.pp.setup_anndata(fitted)
    sx.tl.fit(fitted, seed=seed, progress=False)
    called = {}
    for delta in (0.25, 0.1):
        sx.tl.differential_expression(fitted, GROUPBY, groups=["b"], reference="a", delta=delta, seed=seed)
        called[f"scvi_ext, delta {delta}"] = list(sx.get.de_df(fitted, only_called=True)["gene"])
    normalized = adata.copy()
    sc.pp.normalize_total(normalized, target_sum=1e4)
    sc.pp.log1p(normalized)
    sc.tl.rank_genes_groups(normalized, GROUPBY, groups=["b"], reference="a", method="wilcoxon")
    called["Wilcoxon"] = list(sc.get.rank_genes_groups_df(normalized, "b", pval_cutoff=0.05)["names"])
    if with_reference and scvi is not None:
        with quiet_reference():
            data = Data("planted", fitted, None)
            model = new_reference(data, seed)
            cells = np.random.default_rng(seed).permutation(n_cells)
            train_reference(model, cells[n_cells // 10 :], cells[: n_cells // 10], reference_epochs)
            table = model.differential_expression(
                groupby=GROUPBY, group1="b", group2="a", mode="change", delta=0.25, silent=True
            )
            called["scvi-tools, delta 0.25"] = list(table.index[table["is_de_fdr_0.05"]])
    rows = []
    for method, genes in called.items():
        is_called = adata.var_names.isin(genes)
        row = {"method": method, "seed": seed, "called": is_called.sum(), "false": (is_called & (change == 0)).sum()}
        for size in SIZES:
            row[f"found of {size:g}"] = is_called[np.abs(change) == size].mean()
        row["unexpressed, called"] = (is_called & ~found).sum()
        rows.append(row)
    return rows


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Sums and means over seeds; the bound is what an FDR of 0.05 stays below in 95 % of experiments."""
    from scipy.stats import binom

    table = rows.groupby("method", sort=False).agg(
        seeds=("seed", "size"),
        called=("called", "sum"),
        false=("false", "sum"),
        **{f"found of {size:g}": (f"found of {size:g}", "mean") for size in SIZES},
        **{"unexpressed, called": ("unexpressed, called", "sum")},
    )
    table.insert(3, "false, share", table["false"] / table["called"])
    table.insert(4, "bound", binom.ppf(0.95, table["called"], 0.05) / table["called"])
    return table.reset_index()


# Agreement


def agreement(data: Data, reference_epochs: int | None) -> pd.DataFrame:
    """Probabilities of both sides from the same weights, a row for every cell type."""
    with quiet_reference(), tempfile.TemporaryDirectory() as folder:
        model = new_reference(data, 0)
        cells = np.random.default_rng(0).permutation(data.adata.n_obs)
        held_out = data.adata.n_obs // 10
        train_reference(model, cells[held_out:], cells[:held_out], reference_epochs)
        model.save(str(Path(folder) / "model"))
        adata = data.shell()
        sx.io.read_scvi_tools(Path(folder) / "model", adata)
        sx.tl.differential_expression(adata, GROUPBY, batch_correction=True, n_samples=100_000)
        rows = []
        for group in adata.uns["scvi_de"]["names"].dtype.names:
            ours = sx.get.de_df(adata, group).set_index("gene").loc[adata.var_names]
            n_samples = 5000
            theirs = model.differential_expression(
                groupby=GROUPBY,
                group1=group,
                mode="change",
                delta=0.25,
                batch_correction=True,
                pseudocounts=float(ours["pseudocount"].iloc[0]),
                n_samples_overall=n_samples,
                silent=True,
            ).loc[adata.var_names]
            rows.append({"group": group, **compared(ours, theirs, n_samples)})
            say(rows[-1])
    return pd.DataFrame(rows)


def compared(ours: pd.DataFrame, theirs: pd.DataFrame, n_samples: int) -> dict[str, float]:
    """How far apart two sets of probabilities are, in their standard errors."""
    p, q = ours["proba_de"].to_numpy(), theirs["proba_de"].to_numpy()
    # A probability that no pair of so many contradicts is still uncertain by a pair or so.
    standard_error = np.sqrt(ours["proba_mcse"] ** 2 + (q * (1 - q) + 1 / n_samples) / n_samples)
    z = np.abs(p - q) / standard_error
    return {
        "genes": len(p),
        "correlation": np.corrcoef(p, q)[0, 1],
        "mean difference": np.abs(p - q).mean(),
        "largest difference": np.abs(p - q).max(),
        "root mean square, standard errors": np.sqrt((z**2).mean()),
        "share beyond 3": (z > 3).mean(),
        "called by both": (ours["is_de"] & theirs["is_de_fdr_0.05"]).sum(),
        "by ours alone": (ours["is_de"] & ~theirs["is_de_fdr_0.05"]).sum(),
        "by scvi-tools alone": (~ours["is_de"] & theirs["is_de_fdr_0.05"]).sum(),
    }


# Speed


@same_threads()
def speed(data: Data) -> pd.DataFrame:
    """Seconds of all groups against the rest with the defaults of both sides, and profiles decoded.

    The median of three calls, or of as many as two seconds hold.
    """
    adata = data.shell()
    sx.pp.setup_anndata(adata, batch_key=data.batch_key)
    sx.tl.fit(adata, max_epochs=1, seed=0, progress=False)
    few = adata[random_cells(adata.n_obs, 500)].copy()
    sx.tl.differential_expression(few, GROUPBY, n_samples=1000)  # compiles

    def ours(batch_correction: bool) -> int:
        sx.tl.differential_expression(adata, GROUPBY, batch_correction=batch_correction)
        return adata.uns["scvi_de"]["params"]["n_decoded"]

    sides = {"scvi_ext": ours}
    if scvi is not None:
        with quiet_reference():
            model = new_reference(data, 0)
            cells = np.arange(data.adata.n_obs)
            train_reference(model, cells[: len(cells) // 10 * 9], cells[len(cells) // 10 * 9 :], 1)
        decoded = []
        model.module.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[1])))

        def theirs(batch_correction: bool) -> int:
            decoded.clear()
            with quiet_reference():
                model.differential_expression(
                    groupby=GROUPBY, mode="change", batch_correction=batch_correction, silent=True
                )
            return sum(decoded)

        sides["scvi-tools"] = theirs
    rows = []
    for batch_correction, (method, call) in product((False, True), sides.items()):
        seconds = []
        while len(seconds) < 3 or sum(seconds) < 2:
            started = time.perf_counter()
            n_decoded = call(batch_correction)
            seconds.append(time.perf_counter() - started)
        row = {"batch correction": "yes" if batch_correction else "no", "cells": f"{adata.n_obs:,}"}
        row |= {"groups": adata.obs[GROUPBY].nunique(), "method": method, "seconds": np.median(seconds)}
        rows.append(row | {"decoded": n_decoded})
        say(rows[-1])
    table = pd.DataFrame(rows)
    reference = table["seconds"].where(table["method"] == "scvi-tools")
    table["times faster"] = reference.groupby(table["batch correction"]).transform("max") / table["seconds"]
    return table.drop(columns="times faster") if scvi is None else table


if __name__ == "__main__":
    main()
