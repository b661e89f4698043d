"""Time to quality: how soon our fit has the held-out ELBO that scvi-tools' default fit ends with.

    python benchmarks/fit.py                                 # the 700 PBMCs that scanpy ships
    python benchmarks/fit.py pbmc3k.h5ad kang_ctrl_8donors.h5ad:batch --epochs 4 6 8 12

Three answers: our default fit and its time; the epoch of it after which the bound was reached for the first time; and
the shortest plan whose end reaches it, of those in --epochs, tried from the shortest on. Both sides run on 500 cells
first, so that imports and compilation do not count. Runs on CUDA where torch sees it. Prints one markdown table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from _common import (
    Data,
    Outcome,
    add_cache,
    fit_ours,
    fit_reference,
    machine,
    make_parser,
    markdown,
    read_data,
    say,
    warm_up,
)

import scvi_ext as sx

if TYPE_CHECKING:
    from argparse import Namespace


def main() -> None:
    """Fit and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="*", help="FILE.h5ad or FILE.h5ad:BATCH_COLUMN; by default scanpy's 700 PBMCs")
    parser.add_argument("--model", default="scvi", choices=["scvi", "ldvae"])
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order")
    parser.add_argument("--epochs", nargs="*", type=int, default=[4, 6, 8, 12], help="of the shortened plans")
    parser.add_argument("--reference-epochs", type=int, help="of scvi-tools, for a trial; by default its own")
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    add_cache(parser)
    arguments = parser.parse_args()
    all_data = (read_data(file, arguments.subsample) for file in arguments.files)
    if not arguments.files:
        all_data = [Data("pbmc68k_counts", sx.datasets.pbmc68k_counts(), "batch")]
    rows = [row for data in all_data for row in to_reference_elbo(data, arguments)]
    print(f"{machine()}\n\n{markdown(pd.DataFrame(rows))}")


def to_reference_elbo(data: Data, arguments: Namespace) -> list[dict]:
    """Rows of one data set."""
    model, seed = arguments.model, arguments.seed
    warm_up(data, model, reference=True)
    reference = fit_reference(data, seed, model, max_epochs=arguments.reference_epochs, cache=arguments.cache)
    default = fit_ours(data, seed, model)
    outcomes = [("scvi_ext, default", default, len(default.history))]
    if reference is not None:
        reached = default.history.index[default.history["elbo_validation"] >= reference.elbo]
        if len(reached):
            first = default.history.loc[reached[0]]
            on_the_way = Outcome("", first["seconds"], first["elbo_validation"], default.latent)
            outcomes.append(("scvi_ext, default, on the way", on_the_way, reached[0]))
        for epochs in sorted(arguments.epochs):
            short = fit_ours(data, seed, model, max_epochs=epochs)
            outcomes.append(("scvi_ext, shortened", short, epochs))
            if short.elbo >= reference.elbo:
                break
        outcomes.append(("scvi-tools, default", reference, float("nan")))
    rows = []
    for name, outcome, epochs in outcomes:
        row = {"data": data.label, "model": model, "fit": name, "epochs": epochs, "seconds": outcome.seconds}
        row["held-out ELBO"] = outcome.elbo
        if reference is not None:
            row["reaches the reference"] = "yes" if outcome.elbo >= reference.elbo else "no"
            row["times faster"] = reference.seconds / outcome.seconds
        say(row)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
