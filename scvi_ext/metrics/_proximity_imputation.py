from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import listing, missing_key, whole_number
from scvi_ext._keys import PROXIMITY, valid_key
from scvi_ext.data.corruption import read_layer
from scvi_ext.data.store import check_unique_genes
from scvi_ext.metrics import arrays
from scvi_ext.metrics._cells import complete, leave_out, rep_key, rep_values

if TYPE_CHECKING:
    from collections.abc import Sequence


def proximity_imputation(
    adata: AnnData,
    reference: AnnData | Sequence[AnnData],
    *,
    use_rep: str | None = None,
    layer: str | None = None,
    gene_list: Sequence[str] | None = None,
    n_neighbors: int = 4,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Impute genes by the nearest cells of other data sets: what :func:`~scvi_ext.tl.impute` must beat.

    Neighbours are searched in a representation that all data sets share, and averaged with the inverse of their
    distances as weights. Each gene is taken from all of the other data sets that have it, together.

    Parameters
    ----------
    adata
        The cells to impute genes of.
    reference
        Another data set, or several of them.
    use_rep
        Representation in ``obsm`` of all data sets, the latent space of the last fit by default; ``"X_pca"`` of common
        genes takes no model.
    layer
        Layer of the reference whose values are averaged, as they are; ``X`` by default. Normalise counts before.
    gene_list
        Names of genes, by default all of the reference that ``adata`` has not. Their values are held in memory, zeros
        too.
    n_neighbors
        Cells that are averaged.
    key_added
        Slot to write, ``"proximity_imputed"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.obsm["proximity_imputed"]``
        DataFrame of float32, cells x genes; NaN for cells that have no place in the representation.

    Raises
    ------
    KeyError
        No such representation or layer, or genes that no reference has.
    ValueError
        There is nothing to impute, or a gene was measured in fewer than ``n_neighbors`` cells.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sc.pp.normalize_total(adata, target_sum=1e4)
    >>> sc.pp.pca(adata, mask_var=adata.var_names.isin(adata.var_names[:400]))
    >>> rna, spatial = adata[:500].copy(), adata[500:, :400].copy()
    >>> sx.metrics.proximity_imputation(spatial, rna, use_rep="X_pca")
    >>> spatial.obsm["proximity_imputed"].shape
    (200, 365)

    References
    ----------
    Lopez et al. (2019), ICML Workshop on Computational Biology, arXiv:1905.02269.
    """
    whole_number("n_neighbors", n_neighbors, 1)
    adata = adata.copy() if copy else adata
    slot = PROXIMITY if key_added is None else valid_key(key_added)
    references = [reference] if isinstance(reference, AnnData) else list(reference)
    use_rep = rep_key(adata, use_rep)
    if slot == use_rep:
        msg = f"adata.obsm[{slot!r}] is where neighbours are searched: choose another name, key_added=..."
        raise ValueError(msg)
    genes = _genes(adata, references, gene_list)
    places = [_places(part, use_rep) for part in references]
    rows = leave_out(complete(z := rep_values(adata, use_rep)), f"values of {use_rep!r} (adata.obsm)")

    start = logg.info(f"imputing {len(genes)} genes from {n_neighbors} neighbours in {use_rep!r} (adata.obsm)")
    values = np.full((adata.n_obs, len(genes)), np.nan, dtype=np.float32)
    for those, columns in _by_references(genes, references).items():
        expression = [_expression(references[i], layer, places[i][0], [genes[j] for j in columns]) for i in those]
        known = np.concatenate([places[i][1] for i in those])
        imputed = arrays.proximity_imputation(known, np.concatenate(expression), z[rows], n_neighbors)
        values[np.ix_(rows, columns)] = imputed
    results.write_obsm(adata, slot, values, names=genes)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, imputed expression (adata.obsm)")
    return adata if copy else None


def _genes(adata: AnnData, references: list[AnnData], gene_list: Sequence[str] | None) -> list[str]:
    for part in references:
        check_unique_genes(part)
    known = dict.fromkeys(gene for part in references for gene in part.var_names)
    if gene_list is None:
        genes = [gene for gene in known if gene not in adata.var_names]
    else:
        genes = list(dict.fromkeys([gene_list] if isinstance(gene_list, str) else gene_list))
        absent = [gene for gene in genes if gene not in known]
        if absent:
            msg = f"{len(absent)} of {len(genes)} genes in gene_list are in no reference: {listing(absent)}."
            raise KeyError(msg)
    if not genes:
        msg = "There is nothing to impute: adata has all genes of the reference. Name some all the same, gene_list=..."
        raise ValueError(msg)
    return genes


def _places(reference: AnnData, use_rep: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the cells that have values in the representation, and these values."""
    if use_rep not in reference.obsm:
        raise missing_key("reference.obsm", use_rep, reference.obsm)
    values = rep_values(reference, use_rep)
    rows = np.flatnonzero(complete(values))
    return rows, values[rows]


def _by_references(genes: list[str], references: list[AnnData]) -> dict[tuple[int, ...], list[int]]:
    """Positions of genes that the same references have."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for j, gene in enumerate(genes):
        groups.setdefault(tuple(i for i, part in enumerate(references) if gene in part.var_names), []).append(j)
    return groups


def _expression(reference: AnnData, layer: str | None, rows: np.ndarray, genes: list[str]) -> np.ndarray:
    return read_layer(reference, layer, rows, reference.var_names.get_indexer(genes)).toarray()
