from __future__ import annotations

from typing import TYPE_CHECKING

from scanpy import logging as logg

from scvi_ext.engine.device import resolve_seed
from scvi_ext.metrics import arrays
from scvi_ext.metrics._cells import FOR_PURITY, neighbors_of, obs_codes, obs_key

if TYPE_CHECKING:
    from anndata import AnnData


def knn_purity(
    adata: AnnData,
    labels_key: str | None = None,
    *,
    use_rep: str | None = None,
    neighbors_key: str | None = None,
    n_neighbors: int | None = None,
    seed: int | None = None,
) -> float:
    """How pure neighbourhoods are: share of a cell's nearest neighbours that have its label.

    Averaged over the cells of a label, then over labels, so that rare ones weigh as much as frequent ones. Cells
    without a label or without values in the representation take no part, neither as cells nor as neighbours, and the
    log says how many these are.

    Parameters
    ----------
    adata
        Annotated data.
    labels_key
        Column of ``obs``, the registered labels by default.
    use_rep
        Representation in ``obsm``, the latent space of the last fit by default. Neighbours are searched by Euclidean
        distance, exactly in up to 50,000 cells and by pynndescent in more; the log says which.
    neighbors_key
        Use the graph of :func:`scanpy.pp.neighbors` that is noted in ``uns[neighbors_key]`` (``"neighbors"`` where
        nothing else was asked for) instead of searching.
    n_neighbors
        Neighbours of a cell, itself not counted. 30 by default, or all other cells where these are fewer; of a graph
        that is there, all that it holds.
    seed
        Of the approximate search.

    Returns
    -------
    From 0 to 1: every cell among its own kind.

    Raises
    ------
    KeyError
        No such column, representation or graph, or no latent space to take by default.
    ValueError
        No labels are registered or they are missing everywhere, there are fewer other cells than neighbours,
        the graph holds fewer neighbours, or options that have no effect together.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, labels_key="bulk_labels")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_latent(adata)
    >>> 0 < sx.metrics.knn_purity(adata) < 1
    True

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053, of whose software it is a part.
    """
    seed = resolve_seed(seed)
    key = obs_key(adata, "labels_key", labels_key)
    labels = obs_codes(adata, key)
    start = logg.info(f"computing the purity of {key!r}")
    neighbors, rows = neighbors_of(
        adata,
        labels >= 0,
        key=key,
        use_rep=use_rep,
        neighbors_key=neighbors_key,
        n_neighbors=n_neighbors,
        default=FOR_PURITY,
        seed=seed,
    )
    value = arrays.knn_purity(neighbors, labels[rows])
    logg.info("    finished", time=start)
    return value
