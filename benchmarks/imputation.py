"""How well corrupted counts are restored: fits to the corrupted counts beside what takes no model.

    python benchmarks/imputation.py pbmc3k.h5ad --rate 0.1 0.5 --corruption uniform binomial thinning --seeds 0 1 2

Counts are corrupted (pp.corrupt), models are fitted to what is left, and the decoded mean counts are held against the
originals at the entries that were changed (tl.imputation_score). Baselines are the pooled counts of the nearest cells,
those of all cells, and the corrupted count itself. "uncorrupted" is a fit that is given the original counts. The seed
is that of the corruption and of the fit. Prints markdown tables: all errors, and each of them with the methods side by
side.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _common import REFERENCE_CLASSES, Data, machine, make_parser, markdown, read_data, same_threads, say

import scvi_ext as sx

if TYPE_CHECKING:
    from collections.abc import Iterator

MEASURES = ["median", "mean", "median_per_cell", "median_per_gene"]
BASELINES = ["nearest cells", "gene mean", "no imputation"]


def main() -> None:
    """Corrupt, fit, score and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="FILE.h5ad or FILE.h5ad:BATCH_COLUMN")
    parser.add_argument("--rate", nargs="+", type=float, default=[0.1, 0.5])
    parser.add_argument("--corruption", nargs="+", default=["uniform", "binomial"])
    parser.add_argument("--model", nargs="+", default=["scvi", "ldvae"], choices=list(REFERENCE_CLASSES))
    parser.add_argument("--n-samples", type=int, default=25, help="posterior samples whose rates are averaged")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max-epochs", type=int, help="for a trial; by default the plan's own")
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    arguments = parser.parse_args()
    rows = []
    for file in arguments.files:
        data = read_data(file, arguments.subsample)
        for method, rate, seed in product(arguments.corruption, arguments.rate, arguments.seeds):
            options = {"n_samples": arguments.n_samples, "max_epochs": arguments.max_epochs}
            for row in scores(data, method, rate, seed, arguments.model, **options):
                rows.append(row)
                say(row)
    table = pd.DataFrame(rows)
    run = ["data", "corruption", "rate"]
    means = table.drop(columns="seed").groupby([*run, "method"], sort=False).mean().reset_index()
    means["entries"] = means["entries"].round().astype(int)
    print(f"{machine()}, means over {len(arguments.seeds)} seeds\n\n{markdown(means)}\n")
    for measure in MEASURES:
        wide = means.pivot_table(measure, run, "method", sort=False).reset_index()
        print(f"{measure.replace('_', ' ').capitalize()} error\n\n{markdown(wide)}\n")


@same_threads()
def scores(
    data: Data, method: str, rate: float, seed: int, models: list[str], *, n_samples: int, max_epochs: int | None
) -> Iterator[dict[str, Any]]:
    """A row for each model, given corrupted and original counts, and for each baseline."""
    adata = data.shell()
    sx.pp.corrupt(adata, rate=rate, method=method, seed=seed)
    adata = adata[np.asarray(adata.layers["corrupted"].sum(axis=1)).ravel() > 0].copy()
    sx.pp.setup_anndata(adata, layer="corrupted", batch_key=data.batch_key)
    tables = []
    for model in models:
        sx.tl.fit(adata, model, seed=seed, progress=False, max_epochs=max_epochs)
        sx.tl.imputation_score(adata, n_samples=n_samples, seed=seed)
        tables.append(sx.get.imputation_df(adata).rename({"fit": model, "uncorrupted": f"{model}, uncorrupted"}))
    table = pd.concat(tables)
    table = table[~table.index.duplicated()]  # baselines are the same for all models
    run = {"data": data.label, "corruption": method, "rate": rate, "seed": seed}
    run["entries"] = adata.uns[f"{model}_imputation"]["params"]["n_entries"]
    for name in [*models, *(f"{model}, uncorrupted" for model in models), *BASELINES]:
        yield run | {"method": name} | table.loc[name].to_dict()


if __name__ == "__main__":
    main()
