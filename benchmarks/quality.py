"""Held-out ELBO, cell types and batches: our default fit beside scvi-tools' default fit on the same split.

    python benchmarks/quality.py pbmc3k.h5ad kang_ctrl_8donors.h5ad:batch --model scvi ldvae --seeds 0 1 2

Each file has counts in X and, if known, cell types in obs["cell_type"]; a batch column follows the colon. Prints three
tables: all fits, their means, and ours less the reference's (above 0: ours is better; the last column says where it is
not). LDVAE takes the likelihood and the library of the reference's LinearSCVI, since bounds of different models say
nothing about each other. The ELBO depends on which cells are held out, so its difference is over the seeds that both
sides have; that of the other measures is over all.
"""

from __future__ import annotations

import pandas as pd
from _common import add_cache, fit_ours, fit_reference, judge, machine, make_parser, markdown, read_data, say

WITHOUT_A_BETTER = {"seconds", "clusters"}


def main() -> None:
    """Fit, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="FILE.h5ad or FILE.h5ad:BATCH_COLUMN")
    parser.add_argument("--model", nargs="+", default=["scvi"], choices=["scvi", "ldvae"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of split, weights and order")
    parser.add_argument("--reference-seeds", nargs="*", type=int, help="the same by default; the reference takes long")
    parser.add_argument("--max-epochs", type=int, help="of both sides, for a trial; by default each one's own")
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    add_cache(parser)
    arguments = parser.parse_args()
    reference_seeds = arguments.seeds if arguments.reference_seeds is None else arguments.reference_seeds

    rows = []
    for file in arguments.files:
        data = read_data(file, arguments.subsample)
        for model in arguments.model:
            sides = {"max_epochs": arguments.max_epochs}
            runs = [(seed, fit_ours(data, seed, model, **sides)) for seed in arguments.seeds]
            runs += [(s, fit_reference(data, s, model, cache=arguments.cache, **sides)) for s in reference_seeds]
            for seed, outcome in runs:
                if outcome is not None:
                    row = {"data": data.label, "model": model, "method": outcome.method, "seed": seed}
                    rows.append(row | {"seconds": outcome.seconds} | judge(data, outcome))
                    say(rows[-1])
    table = pd.DataFrame(rows)
    means = table.drop(columns="seed").groupby(["data", "model", "method"], sort=False).mean().reset_index()
    print(f"{machine()}\n\n{markdown(table)}\n\nMean over seeds\n\n{markdown(means)}")
    if table["method"].nunique() == 2:
        print(f"\nOurs less the reference's\n\n{markdown(differences(table))}")


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Means of ours less means of the reference, and the measures in which ours is lower."""
    rows = []
    for (data, model), both in table.groupby(["data", "model"], sort=False):
        seeds = both.groupby("seed")["method"].nunique()
        paired = both[both["seed"].isin(seeds.index[seeds == 2])]
        row = {"data": data, "model": model}
        for measure in table.columns[table.columns.get_loc("seconds") :].difference(WITHOUT_A_BETTER, sort=False):
            of = (paired if measure == "held-out ELBO" else both).groupby("method")[measure].mean()
            row[measure] = of.get("scvi_ext", float("nan")) - of.get("scvi-tools", float("nan"))
        lower = [name for name, value in row.items() if isinstance(value, float) and value < 0]
        rows.append(row | {"lower": ", ".join(lower) or "nowhere"})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
