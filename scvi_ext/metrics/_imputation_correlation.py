from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_ext._errors import listing, missing_key, no_cells
from scvi_ext._keys import FitKeys, column_name
from scvi_ext.data.corruption import read_layer
from scvi_ext.data.matrix import counts_matrix
from scvi_ext.data.registry import read_fit
from scvi_ext.data.store import check_unique_genes
from scvi_ext.metrics import arrays
from scvi_ext.metrics._cells import complete

if TYPE_CHECKING:
    from anndata import AnnData


def imputation_correlation(
    adata: AnnData, measured: AnnData, *, imputed_key: str | None = None, layer: str | None = None
) -> pd.Series:
    """How well imputed genes follow what was measured in the same cells: Spearman's correlation of each gene.

    For genes that were held out to find out how far an imputation can be trusted.

    Parameters
    ----------
    adata
        Cells with imputed genes.
    measured
        The same cells with genes as they were measured. Cells and genes are found by name.
    imputed_key
        Table in ``obsm`` of ``adata``, cells x genes, of any origin; by default what :func:`~scvi_ext.tl.impute` has
        written for the last fit.
    layer
        Layer of ``measured``; ``X`` by default. Profiles are best compared with normalised values, rates with counts.

    Returns
    -------
    float64, one value for each gene of the table that was measured, in the order of the table. Higher is better; NaN
    where all values are the same. Cells that were not imputed are left out.

    Raises
    ------
    KeyError
        No such table or layer, or cells that were not measured.
    ValueError
        No gene of the table was measured, or no cell was imputed.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sc.pp.normalize_total(adata, target_sum=1e4)
    >>> sc.pp.pca(adata, mask_var=adata.var_names.isin(adata.var_names[:400]))
    >>> rna, spatial = adata[:500].copy(), adata[500:, :400].copy()
    >>> sx.metrics.proximity_imputation(spatial, rna, use_rep="X_pca", gene_list=["CST3", "NKG7"])
    >>> found = sx.metrics.imputation_correlation(spatial, adata, imputed_key="proximity_imputed")
    >>> bool((found > 0.5).all())
    True
    """
    key = FitKeys(read_fit(adata).key).imputed if imputed_key is None else imputed_key
    if key not in adata.obsm:
        raise missing_key("adata.obsm", key, adata.obsm)
    table = adata.obsm[key]
    if not isinstance(table, pd.DataFrame):
        msg = f"adata.obsm[{key!r}] is a {type(table).__name__}; a table is needed, whose columns are genes."
        raise TypeError(msg)
    check_unique_genes(measured, "measured")
    counts_matrix(measured, layer, name="measured")  # if there is one
    columns = pd.Index(map(column_name, measured.var_names)).get_indexer(table.columns)
    if (columns < 0).all():
        msg = (
            f"No gene of adata.obsm[{key!r}] was measured: it has {listing(table.columns, 3)}, and there are "
            f"{listing(measured.var_names, 3)}."
        )
        raise ValueError(msg)
    imputed = table.loc[:, columns >= 0]
    cells = complete(imputed.to_numpy())
    if not cells.any():
        raise no_cells()
    rows = measured.obs_names.get_indexer(adata.obs_names[cells]) if measured.obs_names.is_unique else None
    if rows is None or (rows < 0).any():
        what = "names of cells that are not unique" if rows is None else f"{(rows < 0).sum()} of the cells not at all"
        msg = f"Cells are found by name, and measured has {what}. Give the same cells, under the same names."
        raise KeyError(msg)
    truth = read_layer(measured, layer, rows, columns[columns >= 0]).toarray()
    values = arrays.imputation_correlation(imputed.to_numpy()[cells], truth)
    return pd.Series(values, index=imputed.columns, name="spearman", dtype=np.float64)
