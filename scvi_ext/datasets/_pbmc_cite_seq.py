"""Counts of genes and surface proteins of blood cells, from two panels."""

from __future__ import annotations

import warnings
from functools import reduce

import anndata as ad
import pandas as pd
from scipy.sparse import csr_matrix

from ._download import download

_URL = (
    "https://github.com/scverse/scvi-tools/raw/93dc4fae21917406673206320c8a3002433c4a5d/tests/test_data/"
    "pbmc_{}_protein_v3.h5ad"
)
_SHA256 = {
    "10k": "512fe360bd1cc79821f67959cc47e19b92bb7edbbb9351da5d1e9d70b35102a2",
    "5k": "83f2c7d175600acf458d839920ce52448beeab66557a76d8b0312c91102a3326",
}


def pbmc_cite_seq() -> ad.AnnData:
    """Genes and surface proteins of 400 peripheral blood mononuclear cells, CITE-seq in two experiments (10x Genomics).

    200 cells each of the data sets ``pbmc_10k_protein_v3`` and ``pbmc_5k_protein_v3``, which were stained with 14 and
    with 29 antibodies, the 14 among them: small, and with a panel that is missing in one batch. 4 MB are downloaded
    once into ``sc.settings.datasetdir`` and checked.

    Returns
    -------
    AnnData of 400 cells and the genes of both files.

    ``X``
        Counts, CSR float32.
    ``obs["batch"]``
        ``"10k"`` or ``"5k"``.
    ``obsm["protein_expression"]``
        Counts of the 29 proteins, a table; zeros where one was not measured, which
        :func:`scvi_ext.pp.setup_anndata` finds out.

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
    >>> adata = sx.datasets.pbmc_cite_seq()  # doctest: +SKIP
    >>> adata.obsm["protein_expression"].shape  # doctest: +SKIP
    (400, 29)

    References
    ----------
    10x Genomics (2018, 2019), PBMCs from a healthy donor with TotalSeq-B antibodies, chemistry v3. Selected by Gayoso
    et al. (2021), Nature Methods 18, 272.
    """
    parts = {
        name: _read(download(_URL.format(name), f"pbmc_{name}_protein_v3_200_cells.h5ad", f"sha256:{sha256}"))
        for name, sha256 in _SHA256.items()
    }
    proteins = [part.obsm.pop("protein_expression") for part in parts.values()]
    names = reduce(pd.Index.union, (table.columns for table in proteins))
    adata = ad.concat(parts, label="batch", index_unique="-")
    tables = (table.reindex(columns=names, fill_value=0).to_numpy() for table in proteins)
    adata.obsm["protein_expression"] = pd.DataFrame(
        [row for table in tables for row in table], index=adata.obs_names, columns=names
    )
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    return adata


def _read(path: object) -> ad.AnnData:
    """One of the files, with its proteins as a table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files: what has changed in the format since
        read = ad.read_h5ad(path)
    adata = ad.AnnData(csr_matrix(read.X, dtype="float32"), obs=read.obs[[]], var=read.var[[]])
    names = [str(name).removesuffix("_TotalSeqB") for name in read.uns["protein_names"]]
    adata.obsm["protein_expression"] = pd.DataFrame(
        read.obsm["protein_expression"], index=adata.obs_names, columns=names
    )
    return adata
