"""totalVI beside TOTALVI of scvi-tools: held-out bounds of genes and proteins, cell types, and a panel that is missing.

    python benchmarks/citeseq.py cbmc_cite.h5ad eccite_pbmc_cite.h5ad --cache DIR
    python benchmarks/citeseq.py pbmc10k_5k_cite.h5ad:batch --hide has_protein --cache DIR

Each file has counts of genes in X, of proteins in obsm["protein_expression"], and cell types in obs["cell_type"]. Both
sides train on the same split with their defaults; the reference's fit is read by io.read_scvi_tools, and the same code
judges both, so that the bounds are of the same terms: further terms in the loss of scvi-tools do not count. Prints a
markdown table: the held-out ELBO per cell, its parts for genes and proteins, silhouette of the cell types, and how far
neighbours in the latent space are neighbours by proteins (fold enrichment of metrics.nn_overlap, centred log-ratios).

With --hide COLUMN, obs[COLUMN] says which cells have proteins. A third of them is made a batch of its own whose
proteins are zero, and a second table compares what is imputed there with what was measured: Spearman's correlation over
cells, and the mean of what is imputed as a multiple of what was measured, for each protein. A third one judges what is
imputed in batches that never had proteins by genes that mark the same cells: the area under the ROC curve.

scvi-tools takes half an hour; its fits are kept in the cache and read where it is not installed. CPU seconds are what
counts where other programs run, and are to be compared with one thread on both sides (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from _annotation import stopwatch, times_of
from _common import (
    Data,
    add_cache,
    batch_mixing,
    machine,
    make_parser,
    markdown,
    quiet_reference,
    read_data,
    say,
    scvi,
    silhouette,
)
from sklearn.metrics import roc_auc_score

import scvi_ext as sx
from scvi_ext.data.blocks import Block
from scvi_ext.data.sampler import split_cells
from scvi_ext.fitted import Fitted

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad

PROTEINS, HIDDEN = "protein_expression", "hidden"
# Protein -> a gene of the same cells, not always the one that makes it: those are rarely caught.
MARKERS = {
    "CD3": "CD3D",
    "CD4": "IL7R",
    "CD8a": "CD8A",
    "CD14": "S100A8",
    "CD16": "FCGR3A",
    "CD19": "CD79A",
    "CD56": "NKG7",
}
N_BOUNDS = 10  # draws of each held-out cell
N_IMPUTED = 25  # draws of each imputed cell


def main() -> None:
    """Fit, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="FILE.h5ad or FILE.h5ad:BATCH_COLUMN")
    parser.add_argument("--hide", metavar="COLUMN", help="of obs, true for cells with proteins; a third is hidden")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of split, weights and order")
    parser.add_argument("--reference-seeds", nargs="*", type=int, default=[0], help="scvi-tools takes long")
    parser.add_argument("--max-epochs", type=int, help="of both sides, for a trial; by default each one's own")
    add_cache(parser)
    arguments = parser.parse_args()

    rows, imputed, markers = [], [], []
    for file in arguments.files:
        data, truth = read_cells(file, arguments.hide)
        runs = [("scvi_ext", seed) for seed in arguments.seeds]
        runs += [("scvi-tools", seed) for seed in arguments.reference_seeds]
        for method, seed in runs:
            adata = cells_of(data)
            if method == "scvi_ext":
                with stopwatch() as times:
                    sx.tl.fit(adata, "totalvi", seed=seed, progress=False, max_epochs=arguments.max_epochs)
            else:
                times = read_reference(adata, data, seed, arguments.cache, arguments.max_epochs)
            if times is None:
                continue
            row = {"data": data.label, "method": method, "seed": seed, "CPU seconds": times.cpu_seconds}
            rows.append(row | judge(adata, data, seed))
            say(rows[-1])
            if truth is not None:
                imputed.append({"method": method, "seed": seed} | judge_imputed(adata, truth))
                say(imputed[-1])
                markers.append({"method": method, "seed": seed} | by_marker(adata, data))
    print(f"\n{machine()}\n\n{markdown(pd.DataFrame(rows))}")
    if imputed:
        for table in (imputed, markers):
            print(f"\n{markdown(pd.DataFrame(table).T.rename_axis('').reset_index())}")


def read_cells(file: str, hide: str | None) -> tuple[Data, pd.DataFrame | None]:
    """The cells, and where proteins are hidden, what was measured there."""
    data = read_data(file)
    if hide is None:
        return data, None
    proteins, obs = data.adata.obsm[PROTEINS].copy(), data.adata.obs
    measured = np.flatnonzero(obs[hide].to_numpy(bool))
    hidden = np.random.default_rng(0).permutation(measured)[: len(measured) // 3]
    truth = proteins.iloc[hidden].copy()
    proteins.iloc[hidden] = 0
    batch = obs[data.batch_key].astype(str).to_numpy().copy()
    batch[hidden] = HIDDEN
    data.adata.obsm[PROTEINS] = proteins
    data.adata.obs[data.batch_key] = pd.Categorical(batch)
    return Data(f"{data.name}_{HIDDEN}", data.adata, data.batch_key), truth


def cells_of(data: Data) -> ad.AnnData:
    """A registered AnnData of its own."""
    adata = data.shell()
    adata.obsm[PROTEINS] = data.adata.obsm[PROTEINS]
    sx.pp.setup_anndata(adata, batch_key=data.batch_key, protein_obsm_key=PROTEINS)
    return adata


def read_reference(adata: ad.AnnData, data: Data, seed: int, cache: Path | None, max_epochs: int | None) -> Any:
    """Put the default TOTALVI of scvi-tools into ``adata``; how long it trained, or None if it cannot be had."""
    if cache is None:
        return None
    folder = cache / f"{data.name}_totalvi_{seed}"
    kept = folder / "times.npy"
    if not kept.exists():
        if scvi is None:
            return None
        scvi.settings.seed = seed
        theirs = data.shell()
        theirs.obsm[PROTEINS] = data.adata.obsm[PROTEINS]
        train, held_out = split_cells(adata.n_obs, 0.9, None, seed)
        with quiet_reference():
            scvi.model.TOTALVI.setup_anndata(theirs, protein_expression_obsm_key=PROTEINS, batch_key=data.batch_key)
            model = scvi.model.TOTALVI(theirs)
            with stopwatch() as times:
                model.train(
                    max_epochs=max_epochs,
                    enable_progress_bar=False,
                    external_indexing=[train, held_out, np.array([], dtype=int)],
                )
            model.save(folder, overwrite=True)
        np.save(kept, [times.seconds, times.cpu_seconds])
    sx.io.read_scvi_tools(folder, adata)
    return times_of(*np.load(kept)[:2])


def judge(adata: ad.AnnData, data: Data, seed: int) -> dict[str, float]:
    """All measures of the fit in ``adata``."""
    row = bounds(adata, split_cells(adata.n_obs, 0.9, None, seed)[1])
    sx.tl.get_latent(adata)
    latent = adata.obsm["X_totalvi"]
    row["silhouette"] = silhouette(latent, data.adata.obs["cell_type"])
    if data.batch_key is None:
        overlap = sx.metrics.nn_overlap(adata, use_rep="X_totalvi", other_rep=PROTEINS, other_transform="clr")
        return row | {"neighbours by proteins": overlap["fold_enrichment"]}
    return row | {"batch mixing": batch_mixing(latent, adata.obs[data.batch_key], data.adata.obs["cell_type"])}


@torch.no_grad()
def bounds(adata: ad.AnnData, held_out: np.ndarray) -> dict[str, float]:
    """The ELBO of held-out cells and its parts, per cell."""
    fitted = Fitted.open(adata, None, held_out)
    module = fitted.module
    cells = Block(fitted.store, torch.device("cpu")).minibatch(np.arange(fitted.store.n_cells))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(N_BOUNDS):
        noise = torch.randn(len(held_out), module.n_noise, generator=generator)
        z, log_library = module.draw(cells, module.posteriors(cells), noise)
        loss = module.loss(cells, noise=noise)
        of_genes = module.log_px(module.transform_z(z), cells, log_library)
        parts.append([-loss.reconstruction - loss.kl_z - loss.kl_library, of_genes, -loss.reconstruction - of_genes])
    elbo, genes, proteins = np.mean([[part.mean().item() for part in draw] for draw in parts], axis=0)
    return {"held-out ELBO": elbo, "genes": genes, "proteins": proteins, "minus KL": elbo - genes - proteins}


def judge_imputed(adata: ad.AnnData, truth: pd.DataFrame) -> dict[str, str | float]:
    """Imputed counts beside those that were measured."""
    sx.tl.get_protein_expression(
        adata, indices=truth.index, include_background=True, n_samples=N_IMPUTED, key_added=HIDDEN
    )
    imputed = adata.obsm[HIDDEN].loc[truth.index]
    spearman = imputed.corrwith(truth, method="spearman")
    ratio = imputed.mean() / truth.mean()
    cells = {name: f"{spearman[name]:.2f}, {ratio[name]:.2f}" for name in truth.columns}
    return cells | {"mean": f"{spearman.mean():.3f}, {ratio.mean():.2f}"}


def by_marker(adata: ad.AnnData, data: Data) -> dict[str, float]:
    """Of cells in batches that never had proteins: how well what is imputed tells those in which a gene was found."""
    without = ~data.adata.obsm[PROTEINS].to_numpy().any(1) & (adata.obs[data.batch_key] != HIDDEN).to_numpy()
    sx.tl.get_protein_expression(adata, indices=without, n_samples=N_IMPUTED, key_added="imputed")
    imputed = adata.obsm["imputed"][without]
    row = {}
    for protein, gene in MARKERS.items():
        if protein in imputed and gene in adata.var_names:
            found = (adata[without, gene].X.toarray() > 0).ravel()
            row[f"{protein} by {gene}"] = roc_auc_score(found, imputed[protein])
    return row


if __name__ == "__main__":
    main()
