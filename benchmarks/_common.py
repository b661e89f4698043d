"""What the benchmarks share: data, the reference, and how a latent representation is judged."""

from __future__ import annotations

import logging
import os
import platform
import time
import warnings
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

import scvi_ext as sx
from scvi_ext.data.sampler import split_cells

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scvi
except ImportError:
    scvi = None


@dataclass
class Outcome:
    """One fit, judged."""

    method: str
    seconds: float
    elbo: float  # held-out, per cell
    latent: np.ndarray
    history: pd.DataFrame  # elbo_validation and seconds after each epoch


def machine() -> str:
    """One line about where this runs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    reference = "not installed" if scvi is None else scvi.__version__
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {device}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, scvi_ext {sx.__version__}, scvi-tools {reference}"
    )


def read_counts(path: str, batch_key: str | None, n_genes: int = 2000) -> ad.AnnData:
    """Counts of an h5ad file, reduced to its most variable genes; cells without a count in those are left out."""
    adata = ad.read_h5ad(path)
    adata.X = adata.X.astype(np.float32)
    if adata.n_vars > n_genes:
        normalized = adata.copy()
        sc.pp.normalize_total(normalized, target_sum=1e4)
        sc.pp.log1p(normalized)
        sc.pp.highly_variable_genes(normalized, n_top_genes=n_genes, batch_key=batch_key)
        adata = adata[:, normalized.var["highly_variable"]].copy()
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


def fit_ours(adata: ad.AnnData, batch_key: str | None, seed: int, **options: object) -> Outcome:
    """Our default fit, as a user would call it."""
    adata = adata.copy()
    sx.pp.setup_anndata(adata, batch_key=batch_key)
    started = time.perf_counter()
    sx.tl.fit(adata, seed=seed, progress=False, **options)
    seconds = time.perf_counter() - started
    sx.tl.get_latent(adata)
    held_out = split_cells(adata.n_obs, 0.9, None, seed)[1]
    history = sx.get.history(adata)
    per_epoch = 0.9 * adata.n_obs / history["cells_per_second"]
    curve = pd.DataFrame({"elbo_validation": history["elbo_validation"], "seconds": per_epoch.cumsum()})
    elbo = sx.tl.get_elbo(adata, indices=held_out, n_samples=5)
    return Outcome("scvi_ext", seconds, elbo, adata.obsm["X_scvi"], curve)


def fit_reference(adata: ad.AnnData, batch_key: str | None, seed: int, max_epochs: int | None = None) -> Outcome:
    """scvi-tools' default fit on the same split."""
    adata = adata.copy()
    for name in ("scvi", "lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi.settings.seed = seed
        scvi.model.SCVI.setup_anndata(adata, batch_key=batch_key)
        model = scvi.model.SCVI(adata)
        train, held_out = split_cells(adata.n_obs, 0.9, None, seed)
        started = time.perf_counter()
        model.train(
            max_epochs=max_epochs,
            enable_progress_bar=False,
            logger=False,
            datasplitter_kwargs={"external_indexing": [train, held_out, np.array([], dtype=int)]},
        )
        seconds = time.perf_counter() - started
        elbo = float(np.mean([float(model.get_elbo(indices=held_out)) for _ in range(5)]))
        latent = model.get_latent_representation()
    return Outcome("scvi-tools", seconds, elbo, latent, pd.DataFrame())


def agreement(latent: np.ndarray, cell_types: pd.Series) -> dict[str, float]:
    """How well a latent representation agrees with known cell types; cells called Unknown do not count.

    k-means with as many clusters as there are types (mean over five starts), and Leiden over a sweep of resolutions: at
    the one whose number of clusters is nearest to that of the types, and at the best one.
    """
    known = (cell_types.astype(str) != "Unknown").to_numpy()
    latent, types = latent[known], cell_types[known].astype(str).to_numpy()
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
        "silhouette": silhouette_score(latent, types, sample_size=min(5000, len(latent)), random_state=0),
        "active units": int((latent.std(0) > 0.3).sum()),
    }


def leiden_sweep(latent: np.ndarray) -> list[np.ndarray]:
    """Leiden labels at 16 resolutions from 0.05 to 2."""
    cells = ad.AnnData(latent)
    sc.pp.neighbors(cells, use_rep="X", random_state=0)
    sweep = []
    for resolution in np.geomspace(0.05, 2, 16):
        sc.tl.leiden(cells, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=0)
        sweep.append(cells.obs["leiden"].to_numpy())
    return sweep


def markdown(table: pd.DataFrame) -> str:
    """A table as the documentation shows it."""
    rows = [list(map(str, table.columns)), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
