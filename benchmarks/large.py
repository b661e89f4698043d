"""Training from disk: memory, cells per second beside what the disk gives, and the bound beside training in memory.

    python benchmarks/large.py make atlas.h5ad --cells 1000000
    python benchmarks/large.py atlas.h5ad --memory-limit 0.5

``make`` writes synthetic counts with planted types and batches (h5ad or zarr, by the name of the file; CSR, or
--dense) some thousand cells at a time. The second command measures, each in a process of its own: reading the file from
beginning to end as bytes, with what the system remembers of it thrown away before (Linux only); one epoch of shuffled
blocks as training reads them, without training; training from disk and in memory, for equally many steps. Memory is the
highest resident memory of the whole process, set-up included. Prints one markdown table.
"""

from __future__ import annotations

import os
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from _common import in_own_process, machine, make_parser, markdown, peak_host, say
from _planted import planted_blocks
from anndata.io import sparse_dataset, write_elem

import scvi_ext as sx
from scvi_ext._contract import Stream
from scvi_ext.data.registry import read_setup
from scvi_ext.data.sampler import epoch_order, split_cells
from scvi_ext.data.store import CellStore
from scvi_ext.data.stream import cells_of_run, order_of

if TYPE_CHECKING:
    from argparse import Namespace

_READ = 2**23  # bytes at a time
_DENSE_ROWS = 5_000  # written at a time


def main() -> None:
    """Make a file, or measure with one."""
    parser = make_parser(__doc__)
    parser.add_argument("words", nargs="+", metavar="[make] FILE", help="what to do with which file (.h5ad or .zarr)")
    parser.add_argument("--cells", type=int, default=1_000_000, help="of make")
    parser.add_argument("--genes", type=int, default=2_000, help="of make")
    parser.add_argument("--density", type=float, default=0.08, help="of make: share of counts that are not zero")
    parser.add_argument("--dense", action="store_true", help="of make: every count is stored")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--memory-limit", type=float, default=0.5, help="gigabytes of counts in memory (of training)")
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED), help="what to measure")
    arguments = parser.parse_args()
    *make, file = arguments.words
    if make not in ([], ["make"]):
        parser.error(f"{' '.join(make)!r} is nothing that can be done: give a file, or make and a file")
    arguments.file = Path(file)
    if make:
        write(arguments)
        return
    rows = []
    for name in arguments.only:
        say(f"{name} ...")
        rows.append({"what": name} | in_own_process(MEASURED[name], arguments))
        say(rows[-1])
    print(machine())
    print(f"{arguments.file.name}: {n_bytes(arguments.file) / 1e9:.2f} GB\n")
    print(markdown(pd.DataFrame(rows)))


def write(arguments: Namespace) -> None:
    """A file of synthetic counts."""
    blocks, obs = planted_blocks(arguments.cells, arguments.genes, arguments.density)
    first = next(blocks)
    var = pd.DataFrame(index=[f"gene{i}" for i in range(arguments.genes)])
    empty = ad.AnnData(sp.csr_matrix((len(obs), arguments.genes), dtype=np.float32), obs=obs, var=var)
    zarr_file = arguments.file.suffix == ".zarr"
    (empty.write_zarr if zarr_file else empty.write_h5ad)(arguments.file)
    if zarr_file:
        import zarr

        group = zarr.open_group(arguments.file, mode="r+", use_consolidated=False)
    else:
        group = h5py.File(arguments.file, "r+")
    done = 0
    if arguments.dense:
        del group["X"]
        kind = {"shape": empty.shape, "dtype": np.float32, "chunks": (128, arguments.genes)}
        matrix = group.create_array("X", **kind) if zarr_file else group.create_dataset("X", **kind)
        matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for block in chain([first], blocks):
            matrix[done : done + block.shape[0]] = block.toarray()
            done = _told(done + block.shape[0], arguments.cells)
    else:
        write_elem(group, "X", first)
        for block in chain([None], blocks):
            if block is not None:
                sparse_dataset(group["X"]).append(block)
            done = _told(done + (first if block is None else block).shape[0], arguments.cells)
    if zarr_file:
        zarr.consolidate_metadata(group.store)
    else:
        group.close()
    say(f"{arguments.file}: {n_bytes(arguments.file) / 1e9:.2f} GB")


def _told(done: int, of: int) -> int:
    if done % 100_000 < 5_000:
        say(f"{done:,} of {of:,} cells")
    return done


def files_of(path: Path) -> list[Path]:
    """The files that hold it."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def n_bytes(path: Path) -> int:
    """Its size on disk."""
    return sum(file.stat().st_size for file in files_of(path))


def forget(path: Path) -> None:
    """Ask the system to throw away what it remembers of the file."""
    for file in files_of(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw(arguments: Namespace) -> dict[str, float]:
    """All bytes, in order."""
    forget(arguments.file)
    buffer, started = bytearray(_READ), time.perf_counter()
    for file in files_of(arguments.file):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return _row(arguments, time.perf_counter() - started, 1)


def opened(arguments: Namespace, limit: float | None) -> ad.AnnData:
    """The file, set up."""
    torch.set_num_threads(os.cpu_count())
    sx.settings.memory_limit = limit
    adata = sx.io.read_backed(arguments.file)
    sx.pp.setup_anndata(adata, batch_key="batch")
    return adata


def reading(arguments: Namespace) -> dict[str, float]:
    """One epoch of blocks as training gets them."""
    adata, cpu = opened(arguments, 0.0), torch.device("cpu")
    store = CellStore.from_adata(adata, read_setup(adata))
    blocks = order_of(store, cpu)
    train, _ = split_cells(store.n_cells, 0.9, None, 0)
    shape = (-(-len(train) // 256), 256)
    source = cells_of_run(store, cpu, (Stream("cells"),), shape, blocks)
    rows = epoch_order(train, shape, 0, 0, blocks=blocks)[None]
    forget(arguments.file)
    started = time.perf_counter()
    for _ in source.pieces(rows, 0):
        pass
    seconds = time.perf_counter() - started
    source.close()
    return _row(arguments, seconds, 0.9, len(train))


def from_disk(arguments: Namespace) -> dict[str, float]:
    """Fit with counts on disk."""
    return _fitted(arguments, arguments.memory_limit)


def in_memory(arguments: Namespace) -> dict[str, float]:
    """Fit with counts in memory, in random order of all cells."""
    adata = (ad.read_zarr if arguments.file.is_dir() else ad.read_h5ad)(arguments.file)
    if not sp.issparse(adata.X):
        adata.X = sp.csr_matrix(adata.X)
    torch.set_num_threads(os.cpu_count())
    sx.pp.setup_anndata(adata, batch_key="batch")
    return _trained(arguments, adata)


def _fitted(arguments: Namespace, limit: float | None) -> dict[str, float]:
    adata = opened(arguments, limit)
    forget(arguments.file)
    return _trained(arguments, adata)


def _trained(arguments: Namespace, adata: ad.AnnData) -> dict[str, float]:
    sx.set_verbosity("info")
    started = time.perf_counter()
    sx.tl.fit(adata, max_epochs=arguments.epochs)
    seconds, history = time.perf_counter() - started, sx.get.history(adata)
    epoch = np.ceil(0.9 * adata.n_obs) / history["cells_per_second"].iloc[-1]
    elbo = history["elbo_validation"].iloc[-1]
    return _row(arguments, epoch, 0.9, int(0.9 * adata.n_obs)) | {"fit, seconds": seconds, "held-out ELBO": elbo}


def _row(arguments: Namespace, seconds: float, share: float, n_cells: int | None = None) -> dict[str, float]:
    row = {"seconds per epoch": seconds, "file, MB/s": share * n_bytes(arguments.file) / seconds / 1e6}
    if n_cells is not None:
        row |= {"cells per second": n_cells / seconds}
    return row | {"peak memory, MB": peak_host()}


MEASURED = {
    "bytes, in order": raw,
    "blocks, without training": reading,
    "training from disk": from_disk,
    "training in memory": in_memory,
}

if __name__ == "__main__":
    main()
