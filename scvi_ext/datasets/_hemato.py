"""Cells on their way from stem cells to those of the blood."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from ._download import extract
from ._files import File, to_anndata

if TYPE_CHECKING:
    from anndata import AnnData

_COUNTS = File(
    "https://ftp.ncbi.nlm.nih.gov/geo/samples/GSM2388nnn/GSM2388072/suppl/"
    "GSM2388072_basal_bone_marrow.raw_umifm_counts.csv.gz",
    "GSM2388072_basal_bone_marrow.raw_umifm_counts.csv.gz",
    None,  # GEO publishes none
    shape=(4016, 7397),  # of what is kept: romain-lopez/scVI-reproducibility, HEMATO.ipynb
)
# Checksum of git at that commit.
_TABLES = File(
    "https://github.com/romain-lopez/scVI-reproducibility/raw/8f6fdbc4621e0106fc812799ddb1b43485994151/additional/data.zip",
    "scvi_reproducibility_data.zip",
    "git:66a97af75222cd3b23cae83c89ae364523ce43ee",
)
_FATES, _GENES = "bBM.spring_and_pba.csv", "bBM.filtered_gene_list.paper.txt"
_OF_CELLS = ["cell_id", "barcode", "library_id", "seq_run_id", "pass_filter"]
_POOR = "basal_bm1"  # the library that the authors of the data advise against
_ROWS = 500  # of the table that are dense at once: 110 MB


def hemato() -> AnnData:
    """Genes of 4,016 progenitors of blood cells from the bone marrow of mice, along which fates part continuously.

    Cells of the libraries ``basal_bm2`` and later for which the authors of the data have a fate; those of
    ``basal_bm1``, of poor quality, are left out as in scVI 0.5. Two files, each of less than 100 MB, are downloaded
    once into ``sc.settings.datasetdir``. Nobody has published a checksum of the counts; numbers of cells and genes are
    checked. No licence is stated.

    Returns
    -------
    AnnData of 4,016 cells and the 7,397 genes of the paper.

    ``X``
        Counts, CSR float32.
    ``obs["batch"]``
        The library.
    ``obs["Potential"]``
        How far a cell is from the stem cells, by population balance analysis; float64.
    ``obs["Pr_Er"]``, ``obs["Pr_Gr"]``, ``obs["Pr_Ly"]``, ``obs["Pr_DC"]``, ``obs["Pr_Mk"]``, ``obs["Pr_Mo"]``, \
``obs["Pr_Ba"]``
        Probabilities that it becomes an erythrocyte, a granulocyte, a lymphocyte, a dendritic cell, a megakaryocyte,
        a monocyte or a basophil; float64.
    ``obs["barcode"]``, ``obs["seq_run_id"]``
        Where the cell is from.
    ``obsm["X_spring"]``
        The layout of the paper, for ``sc.pl.embedding(adata, "spring")``; float64.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    OSError
        A file is not in ``sc.settings.datasetdir`` and cannot be downloaded.
    ValueError
        A file is not the one that it should be.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.hemato()  # doctest: +SKIP
    >>> sc.pl.embedding(adata, "spring", color=["Potential", "Pr_Er"])  # doctest: +SKIP

    References
    ----------
    Tusi et al. (2018), Population snapshots predict early haematopoietic and erythroid hierarchies, Nature 555, 54,
    doi:10.1038/nature25741 (GEO: GSM2388072). Tables: Lopez et al. (2018), Deep generative modeling for single-cell
    transcriptomics, Nature Methods 15, 1053, doi:10.1038/s41592-018-0229-2.
    """
    with TemporaryDirectory() as folder:
        found = extract(_TABLES.path(), lambda path: Path(path).name in (_FATES, _GENES), Path(folder))
        if set(found) != {_FATES, _GENES}:
            raise _TABLES.is_wrong(f"lacks {_FATES!r} or {_GENES!r}")
        fates, genes = pd.read_csv(found[_FATES]), found[_GENES].read_text().split()
    with _COUNTS.opened() as path:
        return _with_fates(*_read(path, genes), genes, fates)


def _with_fates(counts: csr_matrix, cells: pd.DataFrame, genes: list[str], fates: pd.DataFrame) -> AnnData:
    """The cells whose fates are known, but those of the poor library."""
    cells["row"] = np.arange(len(cells))
    cells = cells[cells["library_id"] != _POOR].merge(fates, how="inner")  # by all columns that both have
    rows = cells.pop("row").to_numpy()
    obs = cells.set_index("cell_id").rename(columns={"library_id": "batch"}).drop(columns="pass_filter")
    spring = obs[["x_spring", "y_spring"]].to_numpy(np.float64)
    obs = obs.drop(columns=["x_spring", "y_spring"]).astype({"batch": "category", "seq_run_id": "category"})
    return to_anndata(counts[rows], obs, pd.Index(genes), _COUNTS, X_spring=spring)


def _read(path: Path, genes: list[str]) -> tuple[csr_matrix, pd.DataFrame]:
    """Counts of these genes, and what the table says of the cells."""
    header = pd.read_csv(path, nrows=0).columns
    if missing := {*genes, *_OF_CELLS} - set(header):
        raise _COUNTS.is_wrong(f"lacks {len(missing)} columns, among them {min(missing)!r}")
    blocks, cells = [], []
    with pd.read_csv(path, usecols=[*_OF_CELLS, *genes], chunksize=_ROWS) as pieces:
        for piece in pieces:
            cells.append(piece[_OF_CELLS])
            blocks.append(csr_matrix(piece[genes].to_numpy(np.float64)))
    return vstack(blocks, format="csr"), pd.concat(cells, ignore_index=True)
