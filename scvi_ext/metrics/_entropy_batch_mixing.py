from __future__ import annotations

from typing import TYPE_CHECKING

from scanpy import logging as logg

from scvi_ext._errors import whole_number
from scvi_ext.engine.device import resolve_seed
from scvi_ext.metrics import arrays
from scvi_ext.metrics._cells import FOR_MIXING, neighbors_of, obs_codes, obs_key

if TYPE_CHECKING:
    from anndata import AnnData


def entropy_batch_mixing(
    adata: AnnData,
    batch_key: str | None = None,
    *,
    use_rep: str | None = None,
    neighbors_key: str | None = None,
    n_neighbors: int | None = None,
    n_pools: int | None = None,
    n_samples_per_pool: int | None = None,
    seed: int | None = None,
) -> float:
    """How well batches mix: entropy of the batches among the nearest neighbours of a cell, averaged over cells.

    Any number of batches. Mixing as such is no merit where batches hold different cells; see :func:`knn_purity` for
    what must not mix. Cells without a batch or without values in the representation take no part, neither as cells nor
    as neighbours, and the log says how many these are.

    Parameters
    ----------
    adata
        Annotated data.
    batch_key
        Column of ``obs``, the registered batch by default.
    use_rep
        Representation in ``obsm``, the latent space of the last fit by default. Neighbours are searched by Euclidean
        distance, exactly in up to 50,000 cells and by pynndescent in more; the log says which.
    neighbors_key
        Use the graph of :func:`scanpy.pp.neighbors` that is noted in ``uns[neighbors_key]`` (``"neighbors"`` where
        nothing else was asked for) instead of searching.
    n_neighbors
        Neighbours of a cell, itself not counted. 50 by default, or all other cells where these are fewer; of a graph
        that is there, all that it holds.
    n_pools
        Average over as many random pools of cells, as scVI 0.5 does with 50; None averages over all cells, which is
        what the pools estimate.
    n_samples_per_pool
        Cells in a pool, drawn with replacement; 100 by default.
    seed
        Of the pools and of the approximate search.

    Returns
    -------
    Nats: 0 where every cell lies among its own batch, and with perfect mixing the entropy of the batches' own shares,
    which is the logarithm of their number if they are of one size.

    Raises
    ------
    KeyError
        No such column, representation or graph, or no latent space to take by default.
    ValueError
        No batch is registered or it is missing everywhere, there are fewer other cells than neighbours,
        the graph holds fewer neighbours, or options that have no effect together.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_latent(adata)
    >>> sx.metrics.entropy_batch_mixing(adata) < sx.metrics.entropy_from_indices(adata, "batch")
    True

    References
    ----------
    Haghverdi et al. (2018), Nature Biotechnology 36, 421; pools as in Lopez et al. (2018), Nature Methods 15, 1053.
    """
    if n_pools is None and n_samples_per_pool is not None:
        msg = f"n_samples_per_pool={n_samples_per_pool} has no effect: there are no pools without n_pools."
        raise ValueError(msg)
    if n_pools is not None:
        whole_number("n_pools", n_pools, 1)
    n_samples_per_pool = (
        100 if n_samples_per_pool is None else whole_number("n_samples_per_pool", n_samples_per_pool, 1)
    )
    seed = resolve_seed(seed)
    key = obs_key(adata, "batch_key", batch_key)
    batches = obs_codes(adata, key)
    start = logg.info(f"computing the mixing of {key!r}")
    neighbors, rows = neighbors_of(
        adata,
        batches >= 0,
        key=key,
        use_rep=use_rep,
        neighbors_key=neighbors_key,
        n_neighbors=n_neighbors,
        default=FOR_MIXING,
        seed=seed,
    )
    value = arrays.entropy_batch_mixing(
        neighbors, batches[rows], n_pools=n_pools, n_samples_per_pool=n_samples_per_pool, seed=seed
    )
    logg.info("    finished", time=start)
    return value
