"""Cells of the mouse cortex whose RNA was imaged by osmFISH."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._files import File, read_loom, to_anndata

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

_FILE = File(
    # A copy for the Human Cell Atlas, which has a known size; of http://linnarssonlab.org/osmFISH/.
    "https://d24h2xsgaj29mf.cloudfront.net/raw/osmfish_codeluppi_2018_nat-methods_somatosensory-cortex/"
    "osmFISH_SScortex_mouse_all_cells.loom",
    "osmFISH_SScortex_mouse_all_cells.loom",
    checksum=None,
    size=1_120_947,
    shape=(6471, 33),
)
_EXCLUDED = "Excluded"
# First word of the names of clusters -> what scVI 0.5 made of them. All other clusters are left out then.
_HIGH_LEVEL = {
    "astrocyte": "Astrocytes",
    "endothelial": "Endothelials",
    "inhibitory": "Inhibitory",
    "microglia": "Microglias",
    "perivascular": "Microglias",
    "oligodendrocyte": "Oligodendrocytes",
    "pyramidal": "Pyramidals",
    "hippocampus": "Pyramidals",
}


def smfish(*, use_high_level_cluster: bool = True) -> AnnData:
    """Cells of the mouse somatosensory cortex where they are in the tissue, with 33 genes, osmFISH.

    1.1 MB are downloaded once into ``sc.settings.datasetdir``; nobody has published a checksum, so the size of the file
    and its numbers of cells and genes are checked. No licence is stated.

    Parameters
    ----------
    use_high_level_cluster
        Sum clusters up to six types of cells, and keep those cells only, as scVI 0.5 does: 4,530. Otherwise the 31
        clusters of the paper, 4,839 cells. The 1,632 cells that the paper excludes are left out in any case.

    Returns
    -------
    AnnData of cells and 33 genes.

    ``X``
        Counts, CSR float32.
    ``obs["cell_type"]``
        ``"Astrocytes"``, ``"Endothelials"``, ``"Inhibitory"``, ``"Microglias"``, ``"Oligodendrocytes"``,
        ``"Pyramidals"``; or the same as ``cluster``.
    ``obs["cluster"]``
        Cluster of the paper.
    ``obs["region"]``
        Layer of the cortex, or other region.
    ``obsm["spatial"]``
        x and y of the cell, in pixels of the image, float64.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    OSError
        The file is not in ``sc.settings.datasetdir`` and cannot be downloaded.
    ValueError
        The file is not the one that it should be.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.smfish()  # doctest: +SKIP
    >>> adata.shape  # doctest: +SKIP
    (4530, 33)

    References
    ----------
    Codeluppi et al. (2018), Spatial organization of the somatosensory cortex revealed by osmFISH, Nature Methods 15,
    932, doi:10.1038/s41592-018-0175-z.
    """
    with _FILE.opened() as path:
        adata = _read(path, use_high_level_cluster)
    adata = adata[(adata.obs[["cell_type", "cluster"]] != _EXCLUDED).all(axis=1)].copy()
    adata.obs = adata.obs.astype("category")
    return adata


def _read(path: Path, use_high_level_cluster: bool) -> AnnData:
    """All cells, also those that are excluded."""
    counts, of_genes, of_cells, _ = read_loom(path)
    cluster = pd.Series(of_cells["ClusterName"], index=of_cells["CellID"].astype(str))
    obs = pd.DataFrame({"cell_type": cluster, "cluster": cluster, "region": of_cells["Region"]}, index=cluster.index)
    if use_high_level_cluster:
        obs["cell_type"] = cluster.str.lower().str.partition(" ")[0].map(_HIGH_LEVEL).fillna(_EXCLUDED)
    places = np.column_stack([of_cells["X"], of_cells["Y"]]).astype(float)
    return to_anndata(counts, obs, pd.Index(of_genes["Gene"]), _FILE, spatial=places)
