from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import listing, missing_key, whole_number
from scvi_ext._keys import PROXIMITY, UNS, FitKeys, valid_key
from scvi_ext.data.corruption import read_layer
from scvi_ext.data.matrix import counts_matrix
from scvi_ext.data.registry import read_fit, read_root
from scvi_ext.data.store import check_unique_genes
from scvi_ext.metrics import arrays
from scvi_ext.metrics._cells import complete, leave_out, rep_key, rep_values

if TYPE_CHECKING:
    from collections.abc import Sequence


def proximity_imputation(
    adata: AnnData,
    reference: AnnData | Sequence[AnnData] | Mapping[str, AnnData],
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
        Another data set, or several of them: a list, or a mapping as :func:`~scvi_ext.tl.fit` takes it, without
        ``adata``.
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
    TypeError
        A reference is no AnnData.
    ValueError
        There is nothing to impute, a gene was measured in fewer than ``n_neighbors`` cells, ``adata`` is among the
        references, or data sets have no representation in common: widths differ, or it is that of different fits.

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
    named = _named(reference, adata)
    adata = adata.copy() if copy else adata
    slot = PROXIMITY if key_added is None else valid_key(key_added)
    use_rep = rep_key(adata, use_rep)
    if slot == use_rep:
        msg = f"adata.obsm[{slot!r}] is where neighbours are searched: choose another name, key_added=..."
        raise ValueError(msg)
    z = rep_values(adata, use_rep)
    for name, part in named.items():
        check_unique_genes(part, name)
        counts_matrix(part, layer, name=name)  # if there is one
        _check_representation(adata, part, name, use_rep, z.shape[1])
    references = list(named.values())
    genes = _genes(adata, references, gene_list)
    places = [_places(part, use_rep) for part in references]
    groups = _by_references(genes, references)
    _check_enough(genes, groups, places, n_neighbors, use_rep)
    rows = leave_out(complete(z), f"values of {use_rep!r} (adata.obsm)")

    start = logg.info(f"imputing {len(genes)} genes from {n_neighbors} neighbours in {use_rep!r} (adata.obsm)")
    values = np.full((adata.n_obs, len(genes)), np.nan, dtype=np.float32)
    for those, columns in groups.items():
        expression = [_expression(references[i], layer, places[i][0], [genes[j] for j in columns]) for i in those]
        known = np.concatenate([places[i][1] for i in those])
        imputed = arrays.proximity_imputation(known, np.concatenate(expression), z[rows], n_neighbors)
        values[np.ix_(rows, columns)] = imputed
    results.write_obsm(adata, slot, values, names=genes)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, imputed expression (adata.obsm)")
    return adata if copy else None


def _named(reference: object, adata: AnnData) -> dict[str, AnnData]:
    """References by what messages call them; a TypeError or ValueError if they are none, or ``adata`` is among them."""
    if isinstance(reference, AnnData):
        named = {"reference": reference}
    elif isinstance(reference, Mapping):
        named = {f"reference[{name!r}]": part for name, part in reference.items()}
    elif isinstance(reference, Iterable) and not isinstance(reference, str):
        named = {f"reference[{i}]": part for i, part in enumerate(reference)}
    else:
        msg = f"reference is a {type(reference).__name__}; an AnnData is needed, or several in a list or mapping."
        raise TypeError(msg)
    if not named:
        msg = "reference is empty: give a data set to take neighbours from, or several."
        raise ValueError(msg)
    for name, part in named.items():
        if not isinstance(part, AnnData):
            msg = f"{name} is a {type(part).__name__}; an AnnData is needed."
            raise TypeError(msg)
        if part is adata:
            msg = f"{name} is adata itself, where every cell is its own nearest neighbour: leave it out."
            raise ValueError(msg)
    return named


def _check_representation(adata: AnnData, reference: AnnData, name: str, use_rep: str, n_units: int) -> None:
    """Raise unless a reference has the representation, as wide as that of ``adata``, and not of another joint fit."""
    if use_rep not in reference.obsm:
        raise missing_key(f"{name}.obsm", use_rep, reference.obsm)
    found = reference.obsm[use_rep].shape[1]
    if found != n_units:
        msg = (
            f"{name}.obsm[{use_rep!r}] has {found} units and adata.obsm[{use_rep!r}] {n_units}: they are not the same "
            "space. Compute one of all data sets together, or name one that they share, use_rep=..."
        )
        raise ValueError(msg)
    known = [read_root(part).get(UNS.fits, {}) for part in (adata, reference)]
    for key in known[0]:
        if FitKeys(key).latent == use_rep and key in known[1]:
            own, other = read_fit(adata, key), read_fit(reference, key)
            joint = own.joint is not None or other.joint is not None
            if joint and own.status != other.status:
                msg = (
                    f"adata and {name} hold different fits called {key!r}, so that {use_rep!r} is not the same space: "
                    "call scvi_ext.tl.fit and scvi_ext.tl.get_latent of both again, or name another, use_rep=..."
                )
                raise ValueError(msg)


def _genes(adata: AnnData, references: list[AnnData], gene_list: Sequence[str] | None) -> list[str]:
    known = dict.fromkeys(gene for part in references for gene in part.var_names)
    if gene_list is None:
        genes = [gene for gene in known if gene not in adata.var_names]
        if not genes:
            msg = "There is nothing to impute: adata has all genes of the reference. Name some, gene_list=..."
            raise ValueError(msg)
        return genes
    genes = [gene_list] if isinstance(gene_list, str) else list(gene_list)
    repeated = [gene for gene, n in Counter(genes).items() if n > 1]
    if repeated or not genes:
        found = f"has genes more than once: {listing(repeated)}. Name each" if genes else "is empty: name at least"
        msg = f"gene_list {found} one gene, or None for all that adata has not."
        raise ValueError(msg)
    absent = [gene for gene in genes if gene not in known]
    if absent:
        msg = f"{len(absent)} of {len(genes)} genes in gene_list are in no reference: {listing(absent)}."
        raise KeyError(msg)
    return genes


def _check_enough(
    genes: list[str],
    groups: dict[tuple[int, ...], list[int]],
    places: list[tuple[np.ndarray, np.ndarray]],
    n_neighbors: int,
    use_rep: str,
) -> None:
    """Raise a ValueError if genes were measured in fewer cells than are to be averaged."""
    for those, columns in groups.items():
        n_cells = sum(len(places[i][0]) for i in those)
        if n_cells < n_neighbors:
            msg = (
                f"n_neighbors={n_neighbors}, but {len(columns)} genes ({listing([genes[j] for j in columns], 3)}) were "
                f"measured in {n_cells} cells only that have values of {use_rep!r}: ask for fewer neighbours, or leave "
                "these genes out, gene_list=..."
            )
            raise ValueError(msg)


def _places(reference: AnnData, use_rep: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the cells that have values in the representation, and these values."""
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
