r"""AutoZI beside AUTOZI of scvi-tools: whether zero-inflated genes are found, and only those.

    python benchmarks/zero_inflation.py ercc_zheng_gemcode.h5ad zeisel_ercc_3types.h5ad:ercc_counts \
        --seeds 0 1 2 --reference-seeds 0 1 2 --cache DIR

First on counts with the truth (datasets.synthetic_zero_inflated, PLANTED; the seed is that of data and fit), of which
half of the genes are inflated: the area under the ROC curve of P(delta < 0.5), and the share of genes that are called
among the inflated and among the others. Then on spike-ins, FILE.h5ad (counts in X) or FILE.h5ad:OBSM (counts there):
molecules of a known number that were added to each cell, so that no zero is biological; the share of genes called, and
the mean of P(delta < 0.5). On both the held-out ELBO per cell, divergence of delta included.

Ours trains with its defaults, scvi-tools as in its tutorial: a learning rate of 0.01 over 200 epochs. Both have the
same split; the reference's fit is read by io.read_scvi_tools, and the same code judges both. Prints markdown tables.

Each fit of scvi-tools has a process of its own, and is kept in the cache and read where scvi-tools is not installed.
CPU seconds are what counts where other programs run, and are to be compared with one thread on both sides
(OMP_NUM_THREADS=1).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from _annotation import stopwatch, times_of
from _common import (
    add_cache,
    in_own_process,
    machine,
    make_parser,
    markdown,
    quiet_reference,
    say,
    scvi,
    train_reference,
)
from sklearn.metrics import roc_auc_score

import scvi_ext as sx
from scvi_ext.data.sampler import split_cells

if TYPE_CHECKING:
    from types import SimpleNamespace

# Name -> arguments of datasets.synthetic_zero_inflated. With by_batch every batch has inflated genes of its own.
PLANTED = {
    "planted-1000": {"n_cells_batch": 1000},
    "planted-4000": {"n_cells_batch": 4000},
    "planted-by-batch": {"n_cells_batch": 1500, "n_genes": 100, "n_batches": 2, "by_batch": True},
}
REFERENCE_PLAN = {"max_epochs": 200, "plan_kwargs": {"lr": 1e-2}}
N_BOUNDS = 10  # draws of each held-out cell


def main() -> None:
    """Fit, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="*", help="spike-ins: FILE.h5ad or FILE.h5ad:OBSM")
    parser.add_argument("--planted", nargs="*", default=list(PLANTED), choices=list(PLANTED))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of planted data, split and our fits")
    parser.add_argument("--reference-seeds", nargs="*", type=int, default=[0], help="scvi-tools takes long")
    parser.add_argument("--max-epochs", type=int, help="of our fits, for a trial; by default the plan's own")
    add_cache(parser)
    arguments = parser.parse_args()

    fit(
        sx.datasets.synthetic_zero_inflated(n_cells_batch=300, n_genes=50), 0, 1
    )  # imports and compilation do not count
    tables = []
    for files in (arguments.planted, arguments.files):
        rows = []
        for file in files:
            runs = [("scvi_ext", seed) for seed in arguments.seeds]
            runs += [("scvi-tools", seed) for seed in arguments.reference_seeds]
            for method, seed in runs:
                name, adata = read(file, seed)
                if method == "scvi_ext":
                    times = fit(adata, seed, arguments.max_epochs)
                else:
                    times = read_reference(adata, name, seed, arguments.cache)
                if times is None:
                    continue
                row = {"data": f"{name} ({adata.n_obs:,} x {adata.n_vars})", "method": method, "seed": seed}
                rows.append(row | {"CPU seconds": times.cpu_seconds} | judge(adata, seed))
                say(rows[-1])
        tables.append(pd.DataFrame(rows))
    print(f"\n{machine()}")
    for table in tables:
        if len(table):
            print(f"\n{markdown(table)}")


def read(file: str, seed: int) -> tuple[str, ad.AnnData]:
    """A name, and cells and genes with counts."""
    if file in PLANTED:
        return file, sx.datasets.synthetic_zero_inflated(**PLANTED[file], seed=seed)
    path, _, obsm = file.partition(":")
    adata = ad.read_h5ad(path)
    if obsm:
        adata = ad.AnnData(np.asarray(adata.obsm[obsm]))
    adata = ad.AnnData(adata.X.astype(np.float32))
    sc.pp.filter_cells(adata, min_counts=1)
    sc.pp.filter_genes(adata, min_counts=1)
    return Path(path).stem, adata


def zero_inflation(adata: ad.AnnData) -> str:
    """Genes are inflated by batch where there are batches that differ."""
    return "gene-batch" if len(set(adata.obs.get("batch", ()))) > 1 else "gene"


def register(adata: ad.AnnData) -> None:
    """Batches where they count."""
    sx.pp.setup_anndata(adata, batch_key="batch" if zero_inflation(adata) == "gene-batch" else None)


def fit(adata: ad.AnnData, seed: int, max_epochs: int | None = None) -> SimpleNamespace:
    """Our fit as a user would call it, and how long it took."""
    register(adata)
    with stopwatch() as times:
        sx.tl.fit(
            adata, "autozi", zero_inflation=zero_inflation(adata), seed=seed, progress=False, max_epochs=max_epochs
        )
    return times


def read_reference(adata: ad.AnnData, name: str, seed: int, cache: Path | None) -> SimpleNamespace | None:
    """Put AUTOZI of scvi-tools into ``adata``; how long it trained, or None if it cannot be had."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary if cache is None else cache) / f"{name}_autozi_{seed}"
        kept = folder / "times.npy"
        if not kept.exists():
            if scvi is None:
                return None
            in_own_process(fit_reference, adata, seed, folder)
        register(adata)
        sx.io.read_scvi_tools(folder, adata)
        return times_of(*np.load(kept))


def fit_reference(adata: ad.AnnData, seed: int, folder: Path) -> None:
    """Fit, and save the model with its times."""
    scvi.settings.seed = seed
    kind = zero_inflation(adata)
    train, held_out = split_cells(adata.n_obs, 0.9, None, seed)
    model_class = scvi.model.AUTOZI
    with quiet_reference():
        model_class.setup_anndata(adata, batch_key="batch" if kind == "gene-batch" else None)
        model = model_class(adata, zero_inflation=kind)
        with stopwatch() as times:
            train_reference(model, train, held_out, accelerator="cpu", enable_checkpointing=False, **REFERENCE_PLAN)
        model.save(folder, overwrite=True)
    np.save(folder / "times.npy", [times.seconds, times.cpu_seconds])


def judge(adata: ad.AnnData, seed: int) -> dict[str, Any]:
    """All measures of the fit in ``adata``."""
    held_out = split_cells(adata.n_obs, 0.9, None, seed)[1]
    row = {"held-out ELBO": sx.tl.get_elbo(adata, indices=held_out, n_samples=N_BOUNDS)}
    sx.tl.get_zero_inflation(adata)
    by_batch = zero_inflation(adata) == "gene-batch"
    columns = adata.varm if by_batch else adata.var
    probability, called = (
        np.asarray(columns[f"autozi_zero_inflation_{what}"]).ravel() for what in ("probability", "called")
    )
    if "dropout" not in adata.varm:
        return row | {"mean probability": probability.mean(), "called": called.mean()}
    dropout = adata.varm["dropout"].to_numpy()
    inflated = (dropout if by_batch else dropout[:, 0]).ravel() > 0
    return row | {
        "area": roc_auc_score(inflated, probability),
        "called among inflated": called[inflated].mean(),
        "called among others": called[~inflated].mean(),
    }


if __name__ == "__main__":
    main()
