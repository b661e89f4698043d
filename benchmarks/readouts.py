"""Read-outs of a fitted model: ours and scvi-tools', with the same weights.

    python benchmarks/readouts.py --cells 100000
    python benchmarks/readouts.py kang_ctrl_8donors.h5ad:batch

A model is trained by scvi-tools for one epoch, saved, and read by both sides (without scvi-tools, ours is trained).
Every measurement has a process of its own, in which the read-out runs on a few cells first. Memory is what the read-out
takes above the data and the model on the host, its own output included, and on a GPU all that is allocated. The
marginal likelihood is that of --marginal-cells cells. Prints one markdown table.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from _common import (
    Data,
    in_own_process,
    machine,
    make_parser,
    markdown,
    measure,
    new_reference,
    quiet_reference,
    random_cells,
    read_data,
    say,
    scvi,
    train_reference,
)
from _planted import planted

import scvi_ext as sx

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

READ_OUTS = {
    "get_latent": {},
    "get_normalized_expression": {"n_samples": 1},
    "get_normalized_expression, 10 samples": {"n_samples": 10},
    "get_marginal_ll": {},
}


def main() -> None:
    """Train, measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("file", nargs="?", help="FILE.h5ad or FILE.h5ad:BATCH_COLUMN; by default synthetic counts")
    parser.add_argument("--cells", type=int, default=20_000, help="synthetic cells")
    parser.add_argument("--marginal-cells", type=int, default=500, help="cells for the marginal likelihood")
    parser.add_argument("--marginal-samples", type=int, default=100, help="posterior samples per cell for it")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "model"
        if scvi is not None:
            in_own_process(save_reference, arguments, saved)
        for name in READ_OUTS:
            for side in ["scvi_ext"] if scvi is None else ["scvi_ext", "scvi-tools"]:
                row = {"read-out": name, "method": side}
                rows.append(row | in_own_process(read_out, side, name, arguments, saved if scvi else None))
                say(rows[-1])
    table = pd.DataFrame(rows)
    reference = table["cells per second"].where(table["method"] == "scvi-tools")
    table["ratio to scvi-tools"] = table["cells per second"] / reference.groupby(table["read-out"]).transform("max")
    name = Path(arguments.file.partition(":")[0]).stem if arguments.file else "synthetic counts"
    data = f"{name}, {arguments.marginal_samples} samples for the marginal likelihood"
    print(f"{machine()}\n\n{data}\n\n{markdown(table.dropna(axis=1, how='all'))}")


def get_data(arguments: Namespace) -> Data:
    """The cells, the same ones in every process."""
    return read_data(arguments.file) if arguments.file else planted(arguments.cells)


def save_reference(arguments: Namespace, saved: Path) -> None:
    """Train scvi-tools' model for one epoch."""
    with quiet_reference():
        data = get_data(arguments)
        fitted = new_reference(data, 0)
        cells = np.arange(data.adata.n_obs)
        train_reference(fitted, cells[: int(0.9 * len(cells))], cells[int(0.9 * len(cells)) :], 1)
        fitted.save(str(saved))


def read_out(side: str, name: str, arguments: Namespace, saved: Path | None) -> dict[str, float]:
    """Cells, time and memory of one read-out."""
    data = get_data(arguments)
    n_cells = data.adata.n_obs
    cells = random_cells(n_cells, arguments.marginal_cells) if name == "get_marginal_ll" else None
    with quiet_reference():
        prepare = prepare_ours if side == "scvi_ext" else prepare_reference
        call = prepare(data, name, saved, arguments.marginal_samples)
        call(random_cells(n_cells, 50 if name == "get_marginal_ll" else 500))
        cost = measure(lambda: call(cells))
    n_done = n_cells if cells is None else len(cells)
    return {
        "cells": n_done,
        "seconds": cost.seconds,
        "cells per second": n_done / cost.seconds,
        "memory, MB": cost.rise,
        "GPU memory, MB": cost.peak_gpu,
    }


def prepare_ours(data: Data, name: str, saved: Path | None, n_mc_samples: int) -> Callable[[np.ndarray | None], None]:
    """A call that does our read-out for some cells, or all."""
    adata = data.shell()
    sx.pp.setup_anndata(adata, batch_key=data.batch_key)
    if saved is None:
        sx.tl.fit(adata, max_epochs=1, seed=0, progress=False)
    else:
        sx.io.read_scvi_tools(saved, adata)
    if name == "get_latent":
        return lambda cells: sx.tl.get_latent(adata, indices=cells)
    if name == "get_marginal_ll":
        return lambda cells: sx.tl.get_marginal_ll(adata, indices=cells, n_mc_samples=n_mc_samples)

    def expression(cells: np.ndarray | None) -> None:
        # A layer has all cells of its AnnData. A few cells get an AnnData of their own, so that it is not there yet.
        sx.tl.get_normalized_expression(adata if cells is None else adata[cells].copy(), **READ_OUTS[name])

    return expression


def prepare_reference(data: Data, name: str, saved: Path, n_mc_samples: int) -> Callable[[np.ndarray | None], None]:
    """The same of scvi-tools."""
    fitted = scvi.model.SCVI.load(str(saved), data.shell())
    if name == "get_latent":
        return lambda cells: fitted.get_latent_representation(indices=cells)
    if name == "get_marginal_ll":
        return lambda cells: fitted.get_marginal_ll(indices=cells, n_mc_samples=n_mc_samples)
    return lambda cells: fitted.get_normalized_expression(
        indices=cells, library_size=1e4, return_numpy=True, **READ_OUTS[name]
    )


if __name__ == "__main__":
    main()
