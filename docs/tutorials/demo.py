"""From the counts of 700 real PBMCs to a scVI latent space, clusters beside those of PCA, markers, LDVAE loadings.

Run it with ``make demo``; it writes into the folder ``demo``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import scanpy as sc
from sklearn.metrics import adjusted_rand_score

import scvi_ext as sx

mpl.use("Agg")
OUT = Path("demo")
CELL_TYPES = "bulk_labels"


def save(name: str) -> None:
    """Write the current figure into the demo folder."""
    plt.savefig(OUT / name, dpi=150, bbox_inches="tight")
    plt.close("all")
    print(f"wrote {OUT / name}")


def cluster(adata: sc.AnnData, neighbors_key: str, key_added: str) -> None:
    """Cluster into as many groups as there are cell types, or nearly, and compare the two."""
    cell_types = adata.obs[CELL_TYPES]
    clusterings = {}
    for resolution in np.arange(0.1, 2.05, 0.1):
        sc.tl.leiden(
            adata,
            resolution=resolution,
            neighbors_key=neighbors_key,
            key_added=key_added,
            flavor="igraph",
            n_iterations=2,
            directed=False,
            random_state=0,
        )
        clusterings[resolution] = adata.obs[key_added]
    n_types = cell_types.nunique()
    resolution, clusters = min(clusterings.items(), key=lambda item: abs(item[1].nunique() - n_types))
    adata.obs[key_added] = clusters
    print(
        f"{neighbors_key:>6}: adjusted Rand index {adjusted_rand_score(cell_types, clusters):.3f}"
        f" ({clusters.nunique()} clusters at resolution {resolution:.1f}; {n_types} cell types)"
    )


def main() -> None:
    """Run the demo."""
    OUT.mkdir(exist_ok=True)
    sc.settings.verbosity = "info"
    adata = sx.datasets.pbmc68k_counts()

    sx.pp.setup_anndata(adata, batch_key="batch")
    sx.tl.fit(adata)
    sx.tl.get_latent(adata)
    sx.pl.history(adata, show=False)
    save("history.png")

    adata.layers["log1p"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4, layer="log1p")
    sc.pp.log1p(adata, layer="log1p")
    sc.pp.pca(adata, layer="log1p", random_state=0)
    sc.pp.neighbors(adata, use_rep="X_pca", key_added="pca", random_state=0)
    sc.pp.neighbors(adata, use_rep="X_scvi", key_added="scvi", random_state=0)

    sc.settings.verbosity = "warning"
    print("\nLeiden clusters against the published cell types")
    cluster(adata, "scvi", "leiden")
    cluster(adata, "pca", "leiden_pca")
    print()

    sc.settings.verbosity = "info"
    sc.tl.umap(adata, neighbors_key="scvi", random_state=0)
    sc.pl.umap(adata, color=[CELL_TYPES, "leiden"], wspace=0.6, show=False)
    save("umap.png")

    sx.tl.differential_expression(adata, CELL_TYPES)
    sc.pl.rank_genes_groups_dotplot(adata, key="scvi_de", n_genes=3, layer="log1p", dendrogram=False, show=False)
    save("markers.png")

    sx.tl.fit(adata, model="ldvae")
    sx.tl.get_loadings(adata)
    sx.pl.loadings(adata, show=False)
    save("loadings.png")

    adata.write_h5ad(OUT / "pbmc68k_fitted.h5ad")
    print(f"wrote {OUT / 'pbmc68k_fitted.h5ad'}: the data and both fitted models")


if __name__ == "__main__":
    main()
