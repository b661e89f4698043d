"""Held-out ELBO and agreement with known cell types: our default fit beside scvi-tools' default fit on the same split.

    python benchmarks/quality.py pbmc3k.h5ad kang_ctrl_8donors.h5ad:batch --seeds 0 1 2

Each file has counts in X and cell types in obs["cell_type"]; a batch column follows the colon. Prints one markdown
table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from _common import agreement, fit_ours, fit_reference, machine, markdown, read_counts, scvi


def main() -> None:
    """Fit, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="FILE.h5ad or FILE.h5ad:BATCH_COLUMN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of split, weights and order")
    parser.add_argument("--reference-seeds", nargs="*", type=int, help="the same by default; the reference takes long")
    arguments = parser.parse_args()
    reference_seeds = arguments.seeds if arguments.reference_seeds is None else arguments.reference_seeds
    rows = []
    for file in arguments.files:
        path, _, batch_key = file.partition(":")
        adata = read_counts(path, batch_key or None)
        runs = [(fit_ours, seed) for seed in arguments.seeds]
        runs += [(fit_reference, seed) for seed in reference_seeds] if scvi is not None else []
        for fit, seed in runs:
            outcome = fit(adata, batch_key or None, seed)
            row = {
                "data": f"{Path(path).stem} ({adata.n_obs:,} x {adata.n_vars:,})",
                "method": outcome.method,
                "seed": seed,
                "seconds": outcome.seconds,
                "held-out ELBO": outcome.elbo,
                **agreement(outcome.latent, adata.obs["cell_type"]),
            }
            print(row, flush=True)
            rows.append(row)
    table = pd.DataFrame(rows)
    print(f"\n{machine()}\n")
    print(markdown(_rounded(table)))
    means = table.drop(columns="seed").groupby(["data", "method"], sort=False).mean().reset_index()
    print("\nMean over seeds\n")
    print(markdown(_rounded(means)))


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    digits = {"seconds": 1, "held-out ELBO": 2, "clusters": 1, "active units": 1}
    return table.round({name: digits.get(name, 3) for name in table.columns if table[name].dtype.kind == "f"})


if __name__ == "__main__":
    main()
