"""The evidence for the default plan: it, and variations of it, on real and on synthetic data.

    python benchmarks/plan.py pbmc3k.h5ad kang_ctrl_8donors.h5ad:batch --epochs-factor .5 2 4 --lr .5 2 --seeds 0 1
    python benchmarks/plan.py --synthetic 1000 10000 100000 1000000

Varies epochs and peak learning rate by factors, one at a time (--grid: all combinations), or sets batch size and KL
warm-up. Synthetic data has planted cell types and batches. Fits of scvi-tools are shown where --cache has them. Prints
one markdown table: bound, agreement with cell types, batch mixing, active units, what the guard met, time.
"""

from __future__ import annotations

import time
from itertools import product
from typing import TYPE_CHECKING, Any

import pandas as pd
from _common import (
    Data,
    add_cache,
    cached_reference,
    fit_ours,
    judge,
    machine,
    make_parser,
    markdown,
    read_data,
    say,
    warm_up,
)
from _planted import planted

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator


def main() -> None:
    """Fit all plans, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="*", help="FILE.h5ad or FILE.h5ad:BATCH_COLUMN")
    parser.add_argument("--synthetic", nargs="*", type=int, default=[], metavar="N", help="numbers of synthetic cells")
    parser.add_argument("--model", nargs="+", default=["scvi"], choices=["scvi", "ldvae"])
    parser.add_argument("--epochs-factor", nargs="*", type=float, default=[], help="times the default number of epochs")
    parser.add_argument("--lr", nargs="*", type=float, default=[], help="times the default peak learning rate")
    parser.add_argument("--batch-size", nargs="*", type=int, default=[])
    parser.add_argument("--kl-warmup", nargs="*", type=float, default=[], help="shares of the steps")
    parser.add_argument("--grid", action="store_true", help="all combinations, not one change at a time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max-epochs", type=int, help="of the plan that is varied, for a trial; by default its own")
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    add_cache(parser)
    arguments = parser.parse_args()
    if not arguments.files and not arguments.synthetic:
        parser.error("give files, or --synthetic N")

    rows = []
    for data in all_data(arguments):
        warm_up(data)
        for model, seed in product(arguments.model, arguments.seeds):
            run = {"data": data.label, "model": model, "seed": seed}
            default, plan = attempt(data, seed, model, max_epochs=arguments.max_epochs)
            rows.append(run | {"plan": "default"} | default)
            say(rows[-1])
            for options in variations(arguments, plan) if plan else []:
                name = ", ".join(f"{option} {value:.3g}" for option, value in options.items())
                # A batch size of its own has its own number of epochs.
                own = {} if "batch_size" in options else {"max_epochs": arguments.max_epochs}
                rows.append(run | {"plan": name} | attempt(data, seed, model, **own | options)[0])
                say(rows[-1])
            reference = cached_reference(data, seed, model, arguments.cache)
            if reference is not None:
                rows.append(run | {"plan": "scvi-tools", "seconds": reference.seconds} | judge(data, reference))
    table = pd.DataFrame(rows).fillna({"non-finite": ""})
    means = table.drop(columns=["seed", "non-finite"]).groupby(["data", "model", "plan"], sort=False)
    print(f"{machine()}\n\n{markdown(table)}\n")
    if len(arguments.seeds) > 1:
        print(f"Mean over seeds\n\n{markdown(means.mean().reset_index())}\n")


def all_data(arguments: Namespace) -> Iterator[Data]:
    """One at a time, since the largest fill the memory."""
    yield from (read_data(file, arguments.subsample) for file in arguments.files)
    yield from map(planted, arguments.synthetic)


def variations(arguments: Namespace, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Options of ``tl.fit`` that change the plan."""
    choices = {
        "max_epochs": [max(1, round(factor * plan["n_epochs"])) for factor in arguments.epochs_factor],
        "lr": [factor * plan["lr"] for factor in arguments.lr],
        "batch_size": arguments.batch_size,
        "kl_warmup": arguments.kl_warmup,
    }
    default = {"max_epochs": plan["n_epochs"], "lr": plan["lr"], "batch_size": plan["batch_size"], "kl_warmup": None}
    if not arguments.grid:
        return [{name: v} for name, values in choices.items() for v in values if v != default[name]]
    varied = {name: values for name, values in choices.items() if values}
    combined = [dict(zip(varied, values, strict=True)) for values in product(*varied.values())]
    return [o for o in combined if any(v != default[name] for name, v in o.items())]


def attempt(data: Data, seed: int, model: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of a fit, what the guard met, and its plan; no plan if the fit gave up."""
    started = time.perf_counter()
    try:
        outcome = fit_ours(data, seed, model, **options)
    except FloatingPointError:
        return {"seconds": time.perf_counter() - started, "non-finite": "gave up"}, {}
    plan, events = outcome.plan, outcome.status["non_finite_events"]
    row = {
        "epochs": len(outcome.history),
        "peak lr": plan["lr"],
        "batch size": plan["batch_size"],
        "seconds": outcome.seconds,
        **judge(data, outcome),
        "non-finite": f"{events}, {outcome.status['stop_reason']}" if events else "none",
    }
    return row, plan


if __name__ == "__main__":
    main()
