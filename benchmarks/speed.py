"""Epoch throughput over cells, genes, density and batch size, and how cost grows with the number of cells.

    python benchmarks/speed.py                                               # the grid
    python benchmarks/speed.py --scaling 1000 10000 100000 1000000 --plot scaling.svg

The grid varies one size at a time around a centre, on synthetic counts. Every measurement has a process of its own. An
epoch is the difference between a long run and a run of one epoch, after a first run on 500 cells, so that no start
counts. Memory is the peak of the process, with interpreter, libraries and counts (1,000,000 cells x 2,000 genes at 8 %
hold 1.3 GB), and on a GPU what is allocated. Prints one markdown table. The time per million cells is constant where
cost is linear.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
    say,
    scvi,
    train_reference,
)
from _planted import planted

import scvi_ext as sx

if TYPE_CHECKING:
    from argparse import Namespace

SIDES = ["scvi_ext", "scvi-tools"]


@dataclass(frozen=True)
class Size:
    """What is measured."""

    cells: int = 10_000
    genes: int = 2000
    density: float = 0.08
    batch_size: int = 128


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--cells", nargs="*", type=int, default=[10_000, 100_000], help="the first is the centre's")
    parser.add_argument("--genes", nargs="*", type=int, default=[500, 2000, 8000], help="the centre has 2000")
    parser.add_argument("--density", nargs="*", type=float, default=[0.02, 0.08, 0.25], help="the centre has 0.08")
    parser.add_argument("--batch-size", nargs="*", type=int, default=[128, 512, 1024], help="the centre has 128")
    parser.add_argument("--scaling", nargs="+", type=int, metavar="N", help="numbers of cells, and no grid")
    parser.add_argument("--epochs", type=int, default=3, help="timed; 1 from 100,000 cells on")
    parser.add_argument("--only", choices=SIDES, help="one side")
    parser.add_argument("--reference-cells", type=int, default=1_000_000, help="largest size for scvi-tools")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="of the scaling")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.scaling:
        parser.error("--plot shows the scaling: give --scaling too")
    sizes = [Size(cells=n) for n in arguments.scaling] if arguments.scaling else grid(arguments)
    sides = [side for side in SIDES if arguments.only in (None, side) and (side == "scvi_ext" or scvi is not None)]

    if not sides:
        parser.error("scvi-tools is not installed")

    rows = []
    for size in sizes:
        for side in sides:
            if side == "scvi-tools" and size.cells > arguments.reference_cells:
                continue
            epochs = arguments.epochs if size.cells < 100_000 else 1
            rows.append(asdict(size) | {"method": side} | in_own_process(epoch, side, size, epochs))
            say(rows[-1])
    table = pd.DataFrame(rows).rename(columns={"batch_size": "batch size"})
    n_train = np.ceil(0.9 * table["cells"])
    table["cells per second"] = n_train / table["seconds per epoch"]
    table["seconds per million cells"] = 1e6 * table["seconds per epoch"] / n_train
    reference = table["seconds per epoch"].where(table["method"] == "scvi-tools")
    same = [table[name] for name in ("cells", "genes", "density", "batch size")]
    table["ratio to scvi-tools"] = reference.groupby(same).transform("max") / table["seconds per epoch"]
    print(f"{machine()}\n\n{markdown(table.dropna(axis=1, how='all'))}")
    if arguments.plot:
        plot(table, arguments.plot)


def grid(arguments: Namespace) -> list[Size]:
    """The centre, and one change at a time."""
    centre = Size(cells=arguments.cells[0])
    changes = {name: getattr(arguments, name) for name in ("cells", "genes", "density", "batch_size")}
    return list(dict.fromkeys([centre, *(replace(centre, **{n: v}) for n, values in changes.items() for v in values)]))


def epoch(side: str, size: Size, n_epochs: int) -> dict[str, float]:
    """Seconds of an epoch and memory of a run."""
    data = planted(size.cells, size.genes, size.density)
    few = Data("few", data.adata[random_cells(size.cells, 500)].copy(), data.batch_key)
    run = run_ours if side == "scvi_ext" else run_reference
    with quiet_reference():
        run(few, size.batch_size, 1)
        short = measure(lambda: run(data, size.batch_size, 1))
        long = measure(lambda: run(data, size.batch_size, 1 + n_epochs))
    return {
        "seconds per epoch": (long.seconds - short.seconds) / n_epochs,
        "peak memory, MB": long.peak,
        "GPU memory, MB": long.peak_gpu,
    }


def run_ours(data: Data, batch_size: int, n_epochs: int) -> None:
    """A fit without held-out cells, so that nothing but training is timed."""
    adata = data.shell()
    sx.pp.setup_anndata(adata, batch_key=data.batch_key)
    sx.tl.fit(adata, max_epochs=n_epochs, batch_size=batch_size, validation_size=0.0, seed=0, progress=False)


def run_reference(data: Data, batch_size: int, n_epochs: int) -> None:
    """The same by scvi-tools."""
    cells = np.arange(data.adata.n_obs)
    n_train = int(np.ceil(0.9 * len(cells)))
    train_reference(new_reference(data, 0), cells[:n_train], cells[n_train:], n_epochs, batch_size=batch_size)


def plot(table: pd.DataFrame, path: Path) -> None:
    """Seconds of an epoch over cells, both axes logarithmic, with a line of constant cost per cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    memory = "GPU memory, MB" if table["GPU memory, MB"].notna().any() else "peak memory, MB"
    for side, color in zip(SIDES, ("#1f77b4", "#888888"), strict=True):
        rows = table[table["method"] == side]
        if rows.empty:
            continue
        time_axes.plot(rows["cells"], rows["seconds per epoch"], "o-", color=color, label=side)
        memory_axes.plot(rows["cells"], rows[memory], "o-", color=color, label=side)
        last = rows.iloc[-1]
        linear = last["seconds per epoch"] * rows["cells"] / last["cells"]
        time_axes.plot(rows["cells"], linear, ":", color=color, label="linear" if side == "scvi_ext" else None)
    time_axes.set(xscale="log", yscale="log", xlabel="cells", ylabel="seconds per epoch")
    memory_axes.set(xscale="log", yscale="log", xlabel="cells", ylabel=memory.replace(", MB", " of a fit (MB)"))
    time_axes.legend(frameon=False)
    for axes in (time_axes, memory_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
