"""Counts of genes and surface proteins of blood cells, from the first paper on CITE-seq."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scvi_ext._errors import listing, one_of

from ._files import File, read_table, to_anndata

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

_URL = "https://ftp.ncbi.nlm.nih.gov/geo/series/GSE100nnn/GSE100866/suppl/"
_STEMS = {"cbmc": "CBMC_8K_13AB_10X", "pbmc": "PBMC_vs_flow_10X", "cd8": "CD8_merged"}
_ENDS = {"rna": "RNA_umi", "protein": "ADT_umi", "clr": "ADT_clr-transformed"}
# Of the files as they were downloaded from GEO by others; GEO itself publishes none.
_MD5 = {
    "cbmc": {
        "rna": "b8d8332e5b56f689427d8c0580b0fc38",
        "protein": "d90fed7d120317281e63826931a0e070",
        "clr": "5e53cab00dd0b073028098d52e51e565",
    },
    "pbmc": {
        "rna": "5ce36806a4b17fc8385ae612eef4f8e8",
        "protein": "515146739962eaa7e114b5838cfeeecf",
        "clr": "b371af3d9e06a0a33e7bc52941220343",
    },
    "cd8": {
        "rna": "bb055e35f989a19f6d0f3fbc803e65d7",
        "protein": "81f47f6a8fdede82ed338199df2c792b",
        "clr": "a9c084f4c13760fc364087e76cfee16e",
    },
}


def cite_seq(name: Literal["cbmc", "pbmc", "cd8"], *, clr: bool = False) -> AnnData:
    """Genes and surface proteins of blood cells from the paper that introduced CITE-seq.

    Tables of GEO, in all up to about 20 MB, are downloaded once into ``sc.settings.datasetdir`` and checked. GEO places
    no restrictions on their use.

    Parameters
    ----------
    name
        ``"cbmc"``: 8,617 cord blood mononuclear cells, 13 antibodies. ``"pbmc"``: peripheral blood mononuclear cells,
        beside which flow cytometry was done. ``"cd8"``: 1,774 T cells, sorted by how much CD8 they have.
    clr
        Also download the proteins as the authors normalised them.

    Returns
    -------
    AnnData of cells and human genes. A few mouse cells were mixed into ``"cbmc"`` and ``"pbmc"``; as in scVI 0.5, mouse
    genes are left out, and so is the prefix ``HUMAN_`` of the others.

    ``X``
        Counts, CSR float32.
    ``obsm["protein_expression"]``
        Counts of the proteins, a table of int64.
    ``obsm["protein_clr"]``
        Centred log ratios of the authors, a table of float64, if ``clr``.
    ``obs["human_share"]``
        Of ``"cbmc"`` and ``"pbmc"``: share of human genes in the counts of both species, float64; below 0.1 in mouse
        cells.
    ``obs["gate"]``
        Of ``"cd8"``: how the cell was sorted, as its name has it behind the barcode.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    OSError
        A file is not in ``sc.settings.datasetdir`` and cannot be downloaded.
    ValueError
        ``name`` is no such data set, or a file is not the one that it should be.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.cite_seq("cbmc")  # doctest: +SKIP
    >>> adata.obsm["protein_expression"].shape  # doctest: +SKIP
    (8617, 13)

    References
    ----------
    Stoeckius et al. (2017), Simultaneous epitope and transcriptome measurement in single cells, Nature Methods 14, 865,
    doi:10.1038/nmeth.4380. GEO: GSE100866.
    """
    one_of("name", name, _STEMS)
    files = {kind: _file(name, kind) for kind in ("rna", "protein", *(["clr"] if clr else []))}
    paths = {kind: file.path() for kind, file in files.items()}
    counts, genes, cells = read_table(files["rna"], paths["rna"])
    counts = counts.T.tocsr()
    obs = pd.DataFrame(index=cells)
    is_human = genes.str.startswith("HUMAN_")
    if is_human.any():
        total, human = (np.asarray(c.sum(axis=1)).ravel() for c in (counts, counts[:, is_human]))
        obs["human_share"] = human / np.maximum(total, 1)
        counts, genes = counts[:, is_human], genes[is_human].str.removeprefix("HUMAN_")
    if name == "cd8":
        obs["gate"] = pd.Categorical(cells.str.partition("_").get_level_values(2))
    obsm = {"protein_expression": _proteins(files["protein"], paths["protein"], cells)}
    if clr:
        obsm["protein_clr"] = _proteins(files["clr"], paths["clr"], cells)
    return to_anndata(counts, obs, genes, files["rna"], **obsm)


def _file(name: str, kind: str) -> File:
    file_name = f"GSE100866_{_STEMS[name]}-{_ENDS[kind]}.csv.gz"
    return File(_URL + file_name, file_name, f"md5:{_MD5[name][kind]}")


def _proteins(file: File, path: Path, cells: pd.Index) -> pd.DataFrame:
    """Cells x proteins, the cells in the order of the genes' table."""
    values, proteins, found = read_table(file, path)
    if odd := found.symmetric_difference(cells).tolist():
        raise file.is_wrong(f"has other cells than the table of genes: {listing(odd, 3)} in one of them only")
    return pd.DataFrame(values.T.toarray(), index=found, columns=proteins).loc[cells]
