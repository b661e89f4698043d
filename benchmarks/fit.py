"""Speed of a fit: time of an epoch, and time to the reference's held-out ELBO, ours and scvi-tools' in one run.

    python benchmarks/fit.py                                 # synthetic counts, and the 700 PBMCs that scanpy ships
    python benchmarks/fit.py --cells 100000 --epochs 3       # on a GPU
    python benchmarks/fit.py --file kang_ctrl_8donors.h5ad:batch

Runs on CUDA where torch sees it. Prints one markdown table for each part.
"""

from __future__ import annotations

import argparse
import time

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from _common import fit_ours, fit_reference, machine, markdown, read_counts, scvi

import scvi_ext as sx


def synthetic(n_cells: int, n_genes: int = 2000, density: float = 0.08, seed: int = 0) -> ad.AnnData:
    """Counts with the sparsity of real variable genes, in four batches."""
    rng = np.random.default_rng(seed)
    counts = sp.random(n_cells, n_genes, density, format="csr", dtype=np.float32, random_state=rng)
    counts.data = 1 + rng.poisson(0.8, counts.nnz).astype(np.float32)
    adata = ad.AnnData(counts)
    adata.obs["batch"] = pd.Categorical(rng.integers(0, 4, n_cells).astype(str))
    return adata


def epoch_seconds(adata: ad.AnnData, n_epochs: int) -> dict[str, float]:
    """Seconds of an epoch at batch size 128: a run of 1 + n epochs less a run of 1, so that start-up does not count."""
    ours = adata.copy()
    sx.pp.setup_anndata(ours, batch_key="batch")

    def run_ours(epochs: int) -> float:
        started = time.perf_counter()
        sx.tl.fit(ours, max_epochs=epochs, train_size=0.9, validation_size=0.0, progress=False)
        return time.perf_counter() - started

    runs = {"scvi_ext": run_ours}
    if scvi is not None:
        runs["scvi-tools"] = lambda epochs: fit_reference(adata, "batch", 0, max_epochs=epochs).seconds
    return {name: (run(1 + n_epochs) - run(1)) / n_epochs for name, run in runs.items()}


def to_reference_elbo(adata: ad.AnnData, batch_key: str | None) -> pd.DataFrame:
    """Our default fit, the reference's, and when ours had reached the held-out ELBO that the reference ends with."""
    ours = fit_ours(adata, batch_key, seed=0)
    rows = [{"method": ours.method, "fit, seconds": ours.seconds, "held-out ELBO": ours.elbo}]
    if scvi is not None:
        reference = fit_reference(adata, batch_key, seed=0)
        rows.append({"method": reference.method, "fit, seconds": reference.seconds, "held-out ELBO": reference.elbo})
        reached = ours.history["seconds"][ours.history["elbo_validation"] >= reference.elbo]
        rows[0]["seconds to the reference's ELBO"] = reached.iloc[0] if len(reached) else float("nan")
        rows[1]["seconds to the reference's ELBO"] = reference.seconds
    return pd.DataFrame(rows).round(2)


def main() -> None:
    """Run both parts and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000, help="synthetic cells for the time of an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="epochs timed")
    parser.add_argument("--file", help="FILE.h5ad or FILE.h5ad:BATCH_COLUMN for the time to the reference's ELBO")
    arguments = parser.parse_args()
    print(machine())

    adata = synthetic(arguments.cells)
    seconds = epoch_seconds(adata, arguments.epochs)
    table = pd.DataFrame({"method": list(seconds), "seconds per epoch": list(seconds.values())})
    table["cells per second"] = (0.9 * adata.n_obs / table["seconds per epoch"]).round(-2).astype(int)
    table["ratio to scvi-tools"] = (seconds.get("scvi-tools", np.nan) / table["seconds per epoch"]).round(2)
    print(f"\nEpoch of {int(0.9 * adata.n_obs):,} cells x {adata.n_vars:,} genes, 8 % non-zero, batch size 128\n")
    print(markdown(table.round(3)))

    if arguments.file:
        path, _, batch_key = arguments.file.partition(":")
        adata, name = read_counts(path, batch_key or None), path
    else:
        adata, batch_key, name = sx.datasets.pbmc68k_counts(), "batch", "pbmc68k_counts"
    print(f"\nDefault fits of {name}, {adata.n_obs:,} cells x {adata.n_vars:,} genes, same split\n")
    print(markdown(to_reference_elbo(adata, batch_key or None)))


if __name__ == "__main__":
    main()
