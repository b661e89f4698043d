"""What a search gains, what giving up trials saves, and whether models trained side by side would give more trials.

    python benchmarks/tuning.py                             # the 700 PBMCs that scanpy ships
    python benchmarks/tuning.py FILE.h5ad:BATCH --trials 20 --seeds 0 1 2
    python benchmarks/tuning.py --stacked 1 2 4 8           # steps per second of K models in one batched step

The first prints, for each seed, the held-out ELBO of the default options, of the best of a search with all trials
carried out and of one with some given up (``prune=True``), and the seconds and epochs of both. The second times the
passes forward and backward through the layers of scVI and its fused likelihood (128 cells, 2,000 genes) for K models of
the same shape: one after the other, and all at once, as batched matrix products and one call of the kernel.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from _common import Data, machine, make_parser, markdown, read_data, say
from torch import nn

import scvi_ext as sx
from scvi_ext.functional import fused
from scvi_ext.kernels.sparse import SparseRows

if TYPE_CHECKING:
    from argparse import Namespace

N_CELLS, N_GENES, N_HIDDEN, N_LATENT = 128, 2000, 128, 10


def main() -> None:
    """Search or time, and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="*", help="FILE.h5ad or FILE.h5ad:BATCH_COLUMN; by default scanpy's 700 PBMCs")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    parser.add_argument("--stacked", nargs="*", type=int, metavar="K", help="time K models at once instead")
    arguments = parser.parse_args()
    if arguments.stacked:
        rows = [steps_per_second(n_models) for n_models in arguments.stacked]
    else:
        all_data = [read_data(file, arguments.subsample) for file in arguments.files]
        if not arguments.files:
            all_data = [Data("pbmc68k_counts", sx.datasets.pbmc68k_counts(), "batch")]
        rows = [searches(data, seed, arguments) for data in all_data for seed in arguments.seeds]
    print(f"{machine()}\n\n{markdown(pd.DataFrame(rows))}")


def searches(data: Data, seed: int, arguments: Namespace) -> dict:
    """One row: a seed of a data set."""
    adata = data.adata
    sx.pp.setup_anndata(adata, batch_key=data.batch_key)
    sx.tl.fit(adata, seed=seed, key_added="default", progress=False)
    row = {
        "data": data.name,
        "cells": adata.n_obs,
        "genes": adata.n_vars,
        "seed": seed,
        "default ELBO": sx.get.history(adata, "default")["elbo_validation"].iloc[-1],
    }
    for name, prune in (("all carried out", False), ("some given up", True)):
        say(f"{data.name}, seed {seed}: {arguments.trials} trials, {name}")
        began = time.perf_counter()
        options = {"n_trials": arguments.trials, "prune": prune, "refit": False, "progress": False}
        sx.tl.tune(adata, seed=seed, key_added="search", **options)
        seconds = time.perf_counter() - began
        carried_out = sx.get.tuning_df(adata, "search", table="progress").groupby("trial")["percent"].max()
        row |= {
            f"best ELBO, {name}": sx.get.tuning_params(adata, "search")["best_value"],
            f"seconds, {name}": seconds,
            f"epochs of the plans, {name}": f"{carried_out.sum() / arguments.trials:.0f} %",
        }
    return row


# ---- K models, one after the other or side by side -----------------------------------------------------------------


class Stacked(nn.Module):
    """What costs time in scVI, for K models at once: a hidden layer each in encoder and decoder, heads, likelihood."""

    def __init__(self, n_models: int):
        super().__init__()
        sizes = {
            "encoder": (N_GENES, N_HIDDEN),
            "z": (N_HIDDEN, N_LATENT),
            "decoder": (N_LATENT, N_HIDDEN),
            "scale": (N_HIDDEN, N_GENES),
            "dropout": (N_HIDDEN, N_GENES),
        }
        layers = {name: torch.randn(n_models, *size) / size[0] ** 0.5 for name, size in sizes.items()}
        self.layers = nn.ParameterDict(layers)
        self.log_theta = nn.Parameter(torch.randn(n_models, 1, N_GENES))

    def forward(self, x: torch.Tensor, counts: torch.Tensor | SparseRows, log_library: torch.Tensor) -> torch.Tensor:
        """The sum of the losses of K models, by the fused likelihood."""
        n_models = len(self.log_theta)
        hidden = (torch.log1p(x).expand(n_models, -1, -1) @ self.layers["encoder"]).relu()
        hidden = (hidden @ self.layers["z"] @ self.layers["decoder"]).relu()
        run, _ = fused.choose("zinb", x.device.type, x.dtype)
        heads = (hidden @ self.layers["scale"], hidden @ self.layers["dropout"])
        theta = self.log_theta.expand(n_models, *x.shape) if n_models > 1 else self.log_theta[0, 0]
        log_px = fused.log_likelihood(run, counts, True, heads[0], log_library, theta, heads[1])
        return -log_px.mean(1).sum()


def steps_per_second(n_models: int, n_steps: int = 40) -> dict:
    """One row: trained cells per second of all models together, both ways."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.poisson(torch.full((N_CELLS, N_GENES), 0.2)).to(device)
    counts = SparseRows.from_dense(x) if device.type == "cpu" else x
    log_library = x.sum(1, keepdim=True).log()
    ways = {
        "one after the other": [Stacked(1).to(device) for _ in range(n_models)],
        "side by side": [Stacked(n_models).to(device)],
    }
    times = {name: [] for name in ways}
    for i in range(n_steps + 5):  # in turn, so that whatever else the machine does slows down both
        for name, models in ways.items():
            began = time.perf_counter()
            for model in models:
                model(x, counts, log_library).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 5:
                times[name].append(time.perf_counter() - began)
    rates = {f"cells/s, {name}": n_models * N_CELLS / np.median(of) for name, of in times.items()}
    return {
        "models": n_models,
        **rates,
        "ratio": rates["cells/s, side by side"] / rates["cells/s, one after the other"],
    }


if __name__ == "__main__":
    main()
