"""What the benchmarks share: data, fits of both sides, and how a latent representation is judged."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.neighbors import NearestNeighbors

import scvi_ext as sx
from scvi_ext.data.sampler import split_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scvi
except ImportError:
    scvi = None

REFERENCE_CLASSES = {"scvi": "SCVI", "ldvae": "LinearSCVI"}
# LinearSCVI of scvi-tools has another likelihood and library than our LDVAE by default. Bounds can be compared between
# equal models only, so ours takes the reference's. Those of scVI agree.
SAME_MODEL = {"scvi": {}, "ldvae": {"reconstruction_loss": "nb", "library": "latent"}}
MAX_JUDGED = 20_000  # cells that are clustered, and held-out cells whose ELBO is taken; more would not change a digit
DIGITS = {
    "active units": 1,
    "batch size": 0,
    "cells per second": 0,
    "clusters": 1,
    "CPU seconds": 1,
    "density": 2,
    "epochs": 0,
    "GPU memory, MB": 0,
    "peak memory, MB": 0,
    "held-out ELBO": 2,
    "mapping, CPU s": 1,
    "mapping, s": 1,
    "memory, MB": 0,
    "normalisation, seconds": 3,
    "peak lr": 4,
    "ratio to scvi-tools": 2,
    "reference, CPU s": 1,
    "reference, s": 1,
    "seconds": 2,
    "seconds per million cells": 1,
    "times faster": 1,
    "times PCA + Harmony": 1,
}


@dataclass
class Data:
    """Counts, what to call them, and the column of their batches."""

    name: str
    adata: ad.AnnData
    batch_key: str | None

    @property
    def label(self) -> str:
        """Name and size, for a table."""
        return f"{self.name} ({self.adata.n_obs:,} x {self.adata.n_vars:,})"

    def shell(self) -> ad.AnnData:
        """An AnnData of its own around the same counts: a fit adds to it, and the counts are not held twice."""
        return ad.AnnData(self.adata.X, obs=self.adata.obs.copy(), var=self.adata.var.copy())


@dataclass
class Outcome:
    """One fit."""

    method: str
    seconds: float  # of the fit; NaN where it was not timed here
    elbo: float  # held-out, per cell
    latent: np.ndarray
    history: pd.DataFrame = field(default_factory=pd.DataFrame)  # of ours: elbo_validation and seconds of each epoch
    plan: dict[str, Any] = field(default_factory=dict)  # of ours
    status: dict[str, Any] = field(default_factory=dict)  # of ours
    latent_seconds: float = float("nan")


def make_parser(doc: str) -> ArgumentParser:
    """A parser whose help is the docstring of the script."""
    return ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)


def add_cache(parser: ArgumentParser) -> None:
    """The option that keeps fits of the reference, which take long."""
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep fits of scvi-tools in DIR/<data>_<model>_<seed>.npz and read those that are there (then their time, "
        "which belongs to another run, is shown as 'cached')",
    )


def add_fits(parser: ArgumentParser) -> None:
    """The option for further fits of ours."""
    parser.add_argument(
        "--fits",
        nargs="*",
        type=json.loads,
        default=[],
        metavar="JSON",
        help="options of further fits of ours, such as '{\"adversarial_mixing\": 3}'",
    )


def machine() -> str:
    """One line about where this runs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    reference = "not installed" if scvi is None else scvi.__version__
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {device}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, scvi_ext {sx.__version__}, scvi-tools {reference}"
    )


@contextmanager
def same_threads() -> Iterator[None]:
    """Leave torch's number of threads as it was: numba, behind some functions of scanpy, sets it to all cores."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def say(text: object) -> None:
    """Progress goes to stderr; stdout holds the tables."""
    print(text, file=sys.stderr, flush=True)


# Data


def read_data(file: str, subsample: int | None = None) -> Data:
    """``FILE`` or ``FILE:BATCH_COLUMN`` of the command line, reduced to so many random cells."""
    path, _, batch_key = file.partition(":")
    name = Path(path).stem if subsample is None else f"{Path(path).stem}-{subsample}"
    return Data(name, read_counts(path, batch_key or None, subsample=subsample), batch_key or None)


@same_threads()
def read_counts(path: str, batch_key: str | None, n_genes: int = 2000, subsample: int | None = None) -> ad.AnnData:
    """Counts of an h5ad file, reduced to its most variable genes; cells without a count in those are left out."""
    adata = ad.read_h5ad(path)
    adata.X = adata.X.astype(np.float32)
    if subsample is not None and subsample < adata.n_obs:
        adata = adata[random_cells(adata.n_obs, subsample)].copy()
    if adata.n_vars > n_genes:
        normalized = adata.copy()
        sc.pp.normalize_total(normalized, target_sum=1e4)
        sc.pp.log1p(normalized)
        sc.pp.highly_variable_genes(normalized, n_top_genes=n_genes, batch_key=batch_key)
        adata = adata[:, normalized.var["highly_variable"]].copy()
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


def random_cells(n_cells: int, n: int) -> np.ndarray:
    """Sorted positions of ``n`` random cells, or of all if there are no more; the same ones each time."""
    return np.sort(np.random.default_rng(0).permutation(n_cells)[:n])


# Fits


def fit_ours(data: Data, seed: int, model: str = "scvi", **options: Any) -> Outcome:
    """Our fit as a user would call it; ``options`` are those of ``tl.fit``."""
    adata = data.shell()
    sx.pp.setup_anndata(adata, batch_key=data.batch_key)
    started = time.perf_counter()
    sx.tl.fit(adata, model=model, seed=seed, progress=False, **SAME_MODEL[model] | options)
    fitted = time.perf_counter()
    sx.tl.get_latent(adata)
    done = time.perf_counter()
    train, held_out = split_cells(adata.n_obs, 0.9, None, seed)
    history = sx.get.history(adata)
    seconds = (len(train) / history["cells_per_second"]).cumsum()
    fit = adata.uns["scvi_ext"]["fits"][model]
    return Outcome(
        "scvi_ext",
        fitted - started,
        sx.tl.get_elbo(adata, indices=_judged(held_out), n_samples=5),
        adata.obsm[f"X_{model}"],
        pd.DataFrame({"elbo_validation": history["elbo_validation"], "seconds": seconds}),
        fit["run"]["plan"],
        fit["status"],
        done - fitted,
    )


def title(options: dict[str, Any]) -> str:
    """What a fit of ours with these options is called in a table."""
    return ", ".join(["scvi_ext", *(f"{name}={value}" for name, value in options.items())])


def cached_reference(data: Data, seed: int, model: str = "scvi", cache: Path | None = None) -> Outcome | None:
    """scvi-tools' default fit if the cache has it; nothing is fitted."""
    known = cache is not None and (cache / f"{data.name}_{model}_{seed}.npz").exists()
    return fit_reference(data, seed, model, cache=cache) if known else None


def fit_reference(
    data: Data, seed: int, model: str = "scvi", *, max_epochs: int | None = None, cache: Path | None = None
) -> Outcome | None:
    """scvi-tools' default fit on the same split, from the cache where it is there; None where it cannot be had."""
    file = None if cache is None or max_epochs is not None else cache / f"{data.name}_{model}_{seed}.npz"
    if file is not None and file.exists():
        kept = np.load(file)
        if len(kept["latent"]) != data.adata.n_obs:
            msg = f"{file} has {len(kept['latent'])} cells, and {data.name} has {data.adata.n_obs}: remove it."
            raise ValueError(msg)
        return Outcome("scvi-tools", float("nan"), float(kept["elbo"]), kept["latent"])
    if scvi is None:
        return None
    with quiet_reference():
        fitted = new_reference(data, seed, model)
        train, held_out = split_cells(data.adata.n_obs, 0.9, None, seed)
        started = time.perf_counter()
        train_reference(fitted, train, held_out, max_epochs)
        done = time.perf_counter()
        latent = fitted.get_latent_representation()
        latent_seconds = time.perf_counter() - done
        held_out = _judged(held_out)
        elbo = float(np.mean([float(fitted.get_elbo(indices=held_out)) for _ in range(5)]))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, elbo=elbo, seconds=done - started, latent=latent)
    return Outcome("scvi-tools", done - started, elbo, latent, latent_seconds=latent_seconds)


def new_reference(data: Data, seed: int, model: str = "scvi") -> Any:
    """A model of scvi-tools with its defaults."""
    scvi.settings.seed = seed
    adata = data.shell()
    kind = getattr(scvi.model, REFERENCE_CLASSES[model])
    kind.setup_anndata(adata, batch_key=data.batch_key)
    return kind(adata)


def train_reference(
    fitted: Any, train: np.ndarray, held_out: np.ndarray, max_epochs: int | None = None, **options: Any
) -> None:
    """Train a model of scvi-tools on these cells, without bars and logs."""
    fitted.train(
        max_epochs=max_epochs,
        enable_progress_bar=False,
        logger=False,
        datasplitter_kwargs={"external_indexing": [train, held_out, np.array([], dtype=int)]},
        **options,
    )


@contextmanager
def quiet_reference() -> Iterator[None]:
    """Without the messages of scvi-tools and Lightning."""
    for name in ("scvi", "lightning", "lightning.pytorch", "lightning.fabric", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def warm_up(data: Data, model: str = "scvi", *, reference: bool = False) -> None:
    """One epoch on 500 cells, so that imports, compilation and the start of the device do not count afterwards."""
    adata = data.adata[random_cells(data.adata.n_obs, 500)].copy()
    few = Data(data.name, adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy(), data.batch_key)
    fit_ours(few, 0, model, max_epochs=1)
    if reference and scvi is not None:
        fit_reference(few, 0, model, max_epochs=1)


def _judged(held_out: np.ndarray) -> np.ndarray:
    return held_out[random_cells(len(held_out), MAX_JUDGED)]


# Judgement


@same_threads()
def judge(data: Data, outcome: Outcome) -> dict[str, float]:
    """All measures of one fit; those that need cell types or batches only where there are some."""
    obs = data.adata.obs
    row = {"held-out ELBO": outcome.elbo, "active units": int((outcome.latent.std(0) > 0.3).sum())}
    if "cell_type" in obs:
        row |= agreement(outcome.latent, obs["cell_type"])
        if data.batch_key is not None:
            row["batch mixing"] = batch_mixing(outcome.latent, obs[data.batch_key], obs["cell_type"])
    return row


def agreement(latent: np.ndarray, cell_types: pd.Series) -> dict[str, float]:
    """How well a latent representation agrees with known cell types; cells called Unknown do not count.

    k-means with as many clusters as there are types (mean over five starts), and Leiden over a sweep of resolutions: at
    the one whose number of clusters is nearest to that of the types, and at the best one.
    """
    latent, types = _of_known_type(latent, cell_types)
    n_types = len(set(types))
    clusterings = [KMeans(n_types, n_init=3, random_state=s).fit_predict(latent) for s in range(5)]
    sweep = leiden_sweep(latent)
    matched = min(sweep, key=lambda labels: abs(len(set(labels)) - n_types))
    return {
        "k-means ARI": np.mean([adjusted_rand_score(types, c) for c in clusterings]),
        "k-means NMI": np.mean([normalized_mutual_info_score(types, c) for c in clusterings]),
        "Leiden ARI": adjusted_rand_score(types, matched),
        "Leiden NMI": normalized_mutual_info_score(types, matched),
        "clusters": len(set(matched)),
        "best Leiden ARI": max(adjusted_rand_score(types, labels) for labels in sweep),
        "best Leiden NMI": max(normalized_mutual_info_score(types, labels) for labels in sweep),
        "silhouette": silhouette(latent, types),
    }


def silhouette(latent: np.ndarray, cell_types: np.ndarray | pd.Series) -> float:
    """Mean silhouette width of the cell types, of 5,000 cells at most; cells called Unknown do not count."""
    latent, types = _of_known_type(latent, pd.Series(cell_types))
    return silhouette_score(latent, types, sample_size=min(5000, len(latent)), random_state=0)


def _of_known_type(latent: np.ndarray, cell_types: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    known = np.flatnonzero(cell_types.astype(str) != "Unknown")
    known = known[random_cells(len(known), MAX_JUDGED)]
    return latent[known], cell_types.iloc[known].astype(str).to_numpy()


def leiden_sweep(latent: np.ndarray) -> list[np.ndarray]:
    """Leiden labels at 16 resolutions from 0.05 to 2."""
    cells = ad.AnnData(latent)
    sc.pp.neighbors(cells, use_rep="X", random_state=0)
    sweep = []
    for resolution in np.geomspace(0.05, 2, 16):
        sc.tl.leiden(cells, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=0)
        sweep.append(cells.obs["leiden"].to_numpy())
    return sweep


def batch_mixing(latent: np.ndarray, batch: pd.Series, cell_types: pd.Series, n_neighbors: int = 30) -> float:
    """How well batches mix among cells of one type: integration LISI within cell types, rescaled.

    A cell's LISI is the inverse Simpson index of the batches of its nearest neighbours of the same type: their
    effective number (Korsunsky et al. 2019; within types: Andreatta et al. 2024). 0: every cell has neighbours of one
    batch only. 1: as many batches as after a random exchange of the batches within each type, which is perfect mixing,
    also where batches differ in size and in composition. A little above 1 is chance. Types of fewer than 100 cells, or
    of one batch, and cells called Unknown do not count; NaN if none is left.
    """
    types, batch = cell_types.astype(str).to_numpy(), batch.astype(str).to_numpy()
    chosen = random_cells(len(types), MAX_JUDGED)
    rng = np.random.default_rng(0)
    observed = expected = 0.0
    for name in sorted(set(types) - {"Unknown"}):
        cells = chosen[types[chosen] == name]
        if len(cells) < 100 or len(set(batch[cells])) == 1:
            continue
        neighbors = NearestNeighbors(n_neighbors=n_neighbors).fit(latent[cells]).kneighbors(return_distance=False)
        codes = np.unique(batch[cells], return_inverse=True)[1]
        observed += (inverse_simpson(codes[neighbors]) - 1).sum()
        expected += (inverse_simpson(rng.permutation(codes)[neighbors]) - 1).sum()
    return observed / expected if expected else float("nan")


def inverse_simpson(codes: np.ndarray) -> np.ndarray:
    """1 / sum of squared shares of each row's codes: their effective number."""
    shares = np.stack([(codes == code).mean(1) for code in range(codes.max() + 1)])
    return 1 / (shares**2).sum(0)


# Time and memory


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """Result of a function of a script in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@dataclass
class Cost:
    """What a call took."""

    seconds: float
    peak: float  # of the resident memory of the process during the call, in MB
    rise: float  # of that peak above what the process held before
    peak_gpu: float  # of the memory that torch allocated there, in MB; NaN without one


def measure(function: Callable[[], Any]) -> Cost:
    """Time and memory of a call. Linux can forget an earlier, higher peak of the process; elsewhere that one counts."""
    clear, gpu = Path("/proc/self/clear_refs"), torch.cuda.is_available()
    if clear.exists():
        clear.write_text("5")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = peak_host()
    started = time.perf_counter()
    function()
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak, peak_gpu = peak_host(), torch.cuda.max_memory_allocated() / 1024**2 if gpu else float("nan")
    return Cost(seconds, peak, peak - before, peak_gpu)


def peak_host() -> float:
    """Highest resident memory of this process, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024**2 if sys.platform == "darwin" else peak / 1024


# Tables


def markdown(table: pd.DataFrame) -> str:
    """A table as the documentation shows it. Numbers that do not exist are left out; a time that does not is cached."""
    columns = [[str(name), "---", *(_cell(name, value) for value in table[name])] for name in table.columns]
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns, strict=True))


def _cell(column: str, value: Any) -> str:
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return "cached" if column == "seconds" else ""
        return f"{value:,.{DIGITS.get(column, 3)}f}"
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value)
