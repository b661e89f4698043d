"""Cells of the mouse cortex and hippocampus, from the table of its authors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scvi_ext._errors import listing, whole_number

from ._files import File, read_table, to_anndata

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

_FILE = File(
    "https://storage.googleapis.com/linnarsson-lab-www-blobs/blobs/cortex/expression_mRNA_17-Aug-2014.txt",
    "expression_mRNA_17-Aug-2014.txt",
    checksum=None,
    shape=(3005, 19972),
)
# The first lines of the file, one each, and what they hold.
_HEADER = {
    "tissue": "category",
    "group #": "category",
    "total mRNA mol": "number",
    "well": "number",
    "sex": "category",
    "age": "number",
    "diameter": "number",
    "cell_id": "name",
    "level1class": "category",
    "level2class": "category",
}


def cortex(*, n_genes: int | None = None) -> AnnData:
    """Genes of 3,005 cells of the mouse somatosensory cortex and hippocampus (CA1), with the cell types of the paper.

    Sequenced with unique molecular identifiers on the Fluidigm C1. The table of the authors, about 125 MB, is
    downloaded once into ``sc.settings.datasetdir``; nobody has published a checksum, so its numbers of cells and genes
    are checked. No licence is stated.

    Parameters
    ----------
    n_genes
        Keep the genes that vary most, by Pearson residuals of the counts
        (:func:`scanpy.experimental.pp.highly_variable_genes`), in the order of the file; by default all. scVI 0.5 kept
        the 558 of the largest standard deviation.

    Returns
    -------
    AnnData of 3,005 cells, named by ``cell_id``, and 19,972 genes.

    ``X``
        Counts, CSR float32.
    ``obs["level1class"]``, ``obs["level2class"]``
        Cell type, 7 categories, and subtype, ``"(none)"`` where there is none.
    ``obs["tissue"]``
        ``"sscortex"`` or ``"ca1hippocampus"``.
    ``obs["group"]``
        Number of the cluster of the first level, as text.
    ``obs["total_mRNA_mol"]``, ``obs["well"]``
        Molecules in the cell and well of the plate, int64.
    ``obs["sex"]``, ``obs["age"]``, ``obs["diameter"]``
        Of the animal, coded as in the file, text; in days, int64; and of the cell in µm, float64, 0 where unknown.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    OSError
        The file is not in ``sc.settings.datasetdir`` and cannot be downloaded.
    ValueError
        The file is not the one that it should be, or ``n_genes`` is not from 1 to the number of genes.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.cortex(n_genes=1000)  # doctest: +SKIP
    >>> adata.shape  # doctest: +SKIP
    (3005, 1000)

    References
    ----------
    Zeisel et al. (2015), Cell types in the mouse cortex and hippocampus revealed by single-cell RNA-seq, Science 347,
    1138, doi:10.1126/science.aaa1934.
    """
    if n_genes is not None:
        n_genes = whole_number("n_genes", n_genes, least=1)
        if n_genes > _FILE.shape[1]:
            raise ValueError(f"{n_genes=} is more than the {_FILE.shape[1]} that there are.")
    with _FILE.opened() as path:
        adata = _read(path)
    if n_genes is None:
        return adata
    import scanpy as sc

    chosen = sc.experimental.pp.highly_variable_genes(
        adata, n_top_genes=n_genes, flavor="pearson_residuals", inplace=False
    )
    return adata[:, chosen["highly_variable"].to_numpy()].copy()


def _read(path: Path) -> AnnData:
    # Lines begin with an empty field, then comes the name.
    header = pd.read_csv(path, sep="\t", header=None, nrows=len(_HEADER), na_filter=False, dtype=str)
    obs = header.iloc[:, 1:].set_index(1).T
    if missing := [name for name in _HEADER if name not in obs]:
        raise _FILE.is_wrong(f"lacks {listing(missing)} in its first {len(_HEADER)} lines")
    obs = obs[list(_HEADER)].set_index("cell_id").rename_axis(columns=None)
    for name in obs:
        obs[name] = pd.to_numeric(obs[name]) if _HEADER[name] == "number" else obs[name].astype("category")
    obs.columns = obs.columns.str.removesuffix(" #").str.replace(" ", "_")
    # An empty line follows; behind the name of a gene is the number of its cluster.
    counts, genes, _ = read_table(_FILE, path, sep="\t", header=None, skiprows=len(_HEADER) + 1)
    return to_anndata(counts[:, 1:].T, obs, genes, _FILE)
