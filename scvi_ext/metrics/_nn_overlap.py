from __future__ import annotations

from typing import TYPE_CHECKING

from scanpy import logging as logg

from scvi_ext._errors import missing_key, one_of
from scvi_ext.engine.device import resolve_seed
from scvi_ext.metrics import arrays
from scvi_ext.metrics._cells import (
    FOR_OVERLAP,
    check_neighbors,
    complete,
    leave_out,
    registry_of,
    rep_key,
    rep_values,
    search,
)

if TYPE_CHECKING:
    from typing import Literal

    from anndata import AnnData


def nn_overlap(
    adata: AnnData,
    *,
    use_rep: str | None = None,
    other_rep: str | None = None,
    other_transform: Literal["clr"] | None = None,
    n_neighbors: int | None = None,
    seed: int | None = None,
) -> dict[str, float]:
    """How far the nearest neighbours of cells agree in two representations, such as a latent space and proteins.

    Cells without values in one of the representations are left out, and the log says how many.

    Parameters
    ----------
    adata
        Annotated data.
    use_rep
        Representation in ``obsm``, the latent space of the last fit by default.
    other_rep
        Another one, the registered protein counts by default.
    other_transform
        ``"clr"`` takes ``other_rep`` for counts and uses their centred log-ratios, see
        :func:`scvi_ext.metrics.arrays.clr`.
    n_neighbors
        Neighbours of a cell, itself not counted: 100 by default, or all other cells where these are fewer. Exact up to
        50,000 cells, by pynndescent above; the log says which.
    seed
        Of the approximate search.

    Returns
    -------
    ``spearman``
        Rank correlation of the two graphs over all pairs of cells: 1 for the same, around 0 for unrelated ones.
    ``fold_enrichment``
        Neighbours in common, of those expected of unrelated graphs.

    Raises
    ------
    KeyError
        No such representation, or none to take by default.
    ValueError
        Twice the same representation, negative counts, or fewer other cells than neighbours.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> for model in ("scvi", "ldvae"):
    ...     sx.tl.fit(adata, model, max_epochs=2)
    ...     sx.tl.get_latent(adata)
    >>> overlap = sx.metrics.nn_overlap(adata, use_rep="X_scvi", other_rep="X_ldvae")
    >>> overlap["fold_enrichment"] > 1
    True

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053.
    """
    if other_transform is not None:
        one_of("other_transform", other_transform, ["clr"])
    seed = resolve_seed(seed)
    names = (rep_key(adata, use_rep), _other(adata, other_rep))
    if names[0] == names[1]:
        msg = f"use_rep and other_rep are both {names[0]!r}: name two representations to compare."
        raise ValueError(msg)
    values = [rep_values(adata, name) for name in names]
    taking_part = complete(values[0]) & complete(values[1])
    n_neighbors = check_neighbors(adata, n_neighbors, taking_part.sum(), FOR_OVERLAP)
    start = logg.info(f"comparing neighbours in {names[0]!r} and {names[1]!r} (adata.obsm)")
    rows = leave_out(taking_part, "values in both")
    values = [array[rows] for array in values]
    if other_transform == "clr":
        values[1] = arrays.clr(values[1])
    graphs = [search(array, n_neighbors, seed, name) for array, name in zip(values, names, strict=True)]
    overlap = arrays.nn_overlap(*graphs)
    logg.info("    finished", time=start)
    return overlap


def _other(adata: AnnData, other_rep: str | None) -> str:
    other_rep = registry_of(adata).protein_obsm_key if other_rep is None else other_rep
    if other_rep is None:
        msg = "No proteins are registered: name the representation to compare with, other_rep=... (adata.obsm)."
        raise KeyError(msg)
    if other_rep not in adata.obsm:
        raise missing_key("adata.obsm", other_rep, adata.obsm)
    return other_rep
