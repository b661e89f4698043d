"""Data sets that the authors of scVI keep as loom files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ._files import File, as_text, categories, numbered, read_loom, to_anndata

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData

_URL = "https://github.com/YosefLab/scVI-data/raw/9a647afc8893604fa11024ddcd5fc5bb22b8e50e/"
# Checksums are those of git, and of git LFS for the large one, at that commit.
_RETINA = File(_URL + "retina.loom", "retina.loom", "git:8713e77d98902f5feb3e2c83f3cf68bc18c5ae68")
_STARMAP = File(
    _URL + "mpfc-starmap.loom", "mpfc-starmap.loom", "git:ab2d157309dd6054cfc49545dcea8f039d4ffede", size=529_817
)
_DROPSEQ = File(
    _URL + "fc-dropseq.loom",
    "fc-dropseq.loom",
    "sha256:462d1ec16acc9134cc0e8f8cd5e10134429d4b210496a106bb30d776a9f52fae",
    size=251_569_704,
)
# Names of the clusters 0, 1, ..., as scVI 0.5 has them; the file has the numbers only.
_RETINA_TYPES = "RBC MG BC5A BC7 BC6 BC5C BC1A BC3B BC1B BC2 BC5D BC3A BC5B BC4 BC8_9".split()


def retina() -> AnnData:
    """Genes of 27,499 bipolar cells of the mouse retina in two batches, Drop-seq, with the 15 types of the paper.

    Cells and genes are those that the authors of the paper kept. Less than 100 MB are downloaded once into
    ``sc.settings.datasetdir`` and checked. No licence is stated.

    Returns
    -------
    AnnData of 27,499 cells and 13,166 genes.

    ``X``
        Counts, CSR float32.
    ``obs["batch"]``
        The experiment, two categories.
    ``obs["cell_type"]``
        ``"RBC"`` (rod bipolar cells), ``"MG"`` (Müller glia), ``"BC1A"`` to ``"BC8_9"`` (cone bipolar cells).

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
    >>> adata = sx.datasets.retina()  # doctest: +SKIP
    >>> sx.pp.setup_anndata(adata, batch_key="batch", labels_key="cell_type")  # doctest: +SKIP

    References
    ----------
    Shekhar et al. (2016), Comprehensive classification of retinal bipolar neurons by single-cell transcriptomics, Cell
    166, 1308, doi:10.1016/j.cell.2016.07.054.
    """
    counts, of_genes, of_cells, _ = read_loom(_RETINA.path())
    obs = _obs(of_cells["BatchID"], categories(of_cells["ClusterID"], _RETINA_TYPES, _RETINA))
    return to_anndata(counts, obs, pd.Index(of_genes["Gene"]), _RETINA)


def prefrontal_cortex_starmap() -> AnnData:
    """Cells of the mouse prefrontal cortex where they are in the tissue, 3,704 with 158 genes, STARmap.

    0.5 MB are downloaded once into ``sc.settings.datasetdir`` and checked. No licence is stated.

    Returns
    -------
    AnnData of 3,704 cells and 158 genes, whose names are written small.

    ``X``
        Counts, CSR float32.
    ``obs["batch"]``
        The section, as text.
    ``obs["cell_type"]``
        16 categories; ``"NA"`` is a cell without one (``unlabeled_category="NA"``).
    ``obsm["spatial"]``
        x and y, in pixels of the image, float64.

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
    >>> adata = sx.datasets.prefrontal_cortex_starmap()  # doctest: +SKIP
    >>> adata.shape  # doctest: +SKIP
    (3704, 158)

    References
    ----------
    Wang et al. (2018), Three-dimensional intact-tissue sequencing of single-cell transcriptional states, Science 361,
    eaat5691, doi:10.1126/science.aat5691.
    """
    counts, of_genes, of_cells, _ = read_loom(_STARMAP.path())
    obs = _obs(of_cells["BatchID"], pd.Categorical(of_cells["Clusters"]))
    return to_anndata(
        counts, obs, pd.Index(of_genes["Gene"]), _STARMAP, spatial=of_cells["Spatial_coordinates"].astype(float)
    )


def frontal_cortex_dropseq() -> AnnData:
    """Genes of 71,639 cells of the mouse frontal cortex, Drop-seq, a part of the atlas of the adult mouse brain.

    252 MB are downloaded once into ``sc.settings.datasetdir`` and checked. No licence is stated.

    Returns
    -------
    AnnData of 71,639 cells and the 7,611 genes that scVI's authors kept.

    ``X``
        Counts, CSR float32.
    ``obs["batch"]``
        The batch, as text.
    ``obs["cell_type"]``
        Cluster of the paper. scvi-tools takes these for batches.

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
    >>> adata = sx.datasets.frontal_cortex_dropseq()  # doctest: +SKIP
    >>> adata.obs["cell_type"].cat.categories  # doctest: +SKIP

    References
    ----------
    Saunders et al. (2018), Molecular diversity and specializations among the cells of the adult mouse brain, Cell 174,
    1015, doi:10.1016/j.cell.2018.07.028.
    """
    counts, of_genes, of_cells, of_file = read_loom(_DROPSEQ.path())
    clusters = of_cells["Clusters"]
    if clusters.dtype.kind == "U":
        cell_type = pd.Categorical(clusters)
    else:
        cell_type = categories(clusters, of_file["CellTypes"], _DROPSEQ)
    return to_anndata(counts, _obs(of_cells["BatchID"], cell_type), pd.Index(of_genes["Gene"]), _DROPSEQ)


def _obs(batch: np.ndarray, cell_type: pd.Categorical) -> pd.DataFrame:
    return pd.DataFrame({"batch": as_text(batch), "cell_type": cell_type}, index=numbered(len(batch)))
