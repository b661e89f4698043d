from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._contract import N_TRAIN
from scvi_ext._errors import whole_number
from scvi_ext._keys import UNS
from scvi_ext.data.registry import read_root
from scvi_ext.engine.device import resolve_seed
from scvi_ext.fitted import Fitted
from scvi_ext.metrics import arrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from anndata import AnnData

    from scvi_ext._contract import Minibatch, SavedFit
    from scvi_ext.engine.map_cells import Draws

_FAR_OUT = 0.05  # share of the reference cells that lie as far out, for the log


def get_drift(
    adata: AnnData,
    reference: AnnData,
    *,
    key: str | None = None,
    reference_key: str | None = None,
    n_neighbors: int = 50,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """How far each cell of a mapped query lies from the reference: 1 is as usual there, 2 is twice as far.

    A model says something about every cell, also about one of a kind that it has never seen. Here the distance of a
    cell to its 50th nearest reference cell, in the latent space, is compared with the same distances among the
    reference cells. Cells of a type that the reference lacks lie further out; so do cells of a type of which it has
    fewer than ``n_neighbors``, and cells moved by a batch effect that the model did not remove.

    Parameters
    ----------
    adata
        The query, mapped by :func:`~scvi_ext.tl.map_query`.
    reference
        Annotated data with the cells of the reference and the fit that was mapped.
    key
        Which fit of the query; the last one by default.
    reference_key
        Which fit of the reference; by default the one of the name that was mapped, or the last one.
    n_neighbors
        Which neighbour the distance is measured to. With few, a handful of stray cells in the reference makes a cell
        type look known. The reference must have more cells.
    indices
        The cells of the query: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the 10,000 reference cells whose distances are taken for those of all, where there are more.
    key_added
        Slot to write, ``"<key>_drift"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.obs["<key>_drift"]``
        float64, distance of the cell over the median distance of reference cells.
    ``adata.obs["<key>_drift_share"]``
        float64, above 0 to 1: the share of reference cells that lie as far out. Below 0.05: further than 95 % of them.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        The two fits are not the same model, or the reference has too few cells.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> is_new = adata.obs["batch"] == "1"
    >>> reference, query = adata[~is_new].copy(), adata[is_new].copy()
    >>> sx.pp.setup_anndata(reference, batch_key="batch")
    >>> sx.tl.fit(reference, max_epochs=2)
    >>> sx.tl.map_query(query, reference)
    >>> sx.tl.get_drift(query, reference)
    >>> bool(query.obs["scvi_drift"].min() > 0)
    True

    References
    ----------
    Ramaswamy, Rastogi and Shim (2000), SIGMOD, 427 (outliers by the distance to the k-th neighbour).
    """
    seed = resolve_seed(seed)
    whole_number("n_neighbors", n_neighbors, 1)
    adata = adata.copy() if copy else adata
    query = Fitted.open(adata, key, indices, decodes=False)
    mapped_from = query.fit.status.get("mapped_from")
    if reference_key is None and mapped_from in read_root(reference).get(UNS.fits, {}):
        reference_key = mapped_from
    known = Fitted.open(reference, reference_key, decodes=False)
    _check_same_model(query.fit, known.fit)
    slot = query.slot("obs", query.keys.drift, key_added)
    share_slot = query.slot("obs", query.keys.drift_share if key_added is None else f"{key_added}_share", None)

    start = logg.info(f"comparing {query.store.n_cells} cells with {known.store.n_cells} of the reference")
    latents = (_latent(cells, batch_size) for cells in (query, known))
    ratio, share = arrays.drift(*latents, n_neighbors, seed=seed)
    results.write_obs(adata, slot, ratio, query.rows)
    results.write_obs(adata, share_slot, share, query.rows)
    n_far = int((share < _FAR_OUT).sum())
    logg.info(
        f"    {n_far} of them ({n_far / len(share):.1%}) lie further out than {1 - _FAR_OUT:.0%} of the reference",
        time=start,
        deep=f"added\n    {slot!r}, distance from the reference, 1 is usual there (adata.obs)\n    {share_slot!r}, "
        "share of reference cells that lie as far out (adata.obs)",
    )
    return adata if copy else None


def _check_same_model(query: SavedFit, reference: SavedFit) -> None:
    """Raise a ValueError unless both fits have the same latent space: the same genes and weights, but for new ones."""
    same = list(query.var_names) == list(reference.var_names) and query.state.keys() == reference.state.keys()
    if same:
        pairs = ((array, reference.state[name]) for name, array in query.state.items() if name != N_TRAIN)
        same = all(np.array_equal(one, other) for one, other in pairs if one.shape == other.shape)
    if not same:
        msg = (
            f"Fit {query.key!r} of the query does not have the weights of fit {reference.key!r} of the reference, so "
            "that their latent spaces cannot be compared: map the query onto it, tl.map_query(adata, reference), and "
            "with freeze=True, or name other fits, key=... and reference_key=..."
        )
        raise ValueError(msg)


def _latent(fitted: Fitted, batch_size: int | None) -> np.ndarray:
    """The location of q(z | x), of a logistic normal its softmax."""
    module = fitted.module

    def locate(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        return (module.transform_z(module.encode(cells).loc),)

    return np.concatenate([loc for _, (loc,) in fitted.map(locate, batch_size=batch_size, seed=0)])
