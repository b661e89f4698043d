"""What the metrics share: what is known of each cell, where it lies, and who its neighbours are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scanpy import logging as logg
from scipy.sparse import issparse

from scvi_ext._errors import listing, missing_key, whole_number
from scvi_ext._keys import UNS, FitKeys
from scvi_ext.data.registry import Registry, column, read_fit, read_root, read_setup
from scvi_ext.metrics import arrays

if TYPE_CHECKING:
    from typing import Literal

    from anndata import AnnData
    from scipy.sparse import csr_matrix

# Neighbours of a cell where nothing else is asked for: the numbers of scVI 0.5.
FOR_MIXING, FOR_PURITY, FOR_OVERLAP = 50, 30, 100


def registry_of(adata: AnnData) -> Registry:
    """What is registered; nothing if ``adata`` has not been set up."""
    return read_setup(adata) if UNS.setup in read_root(adata) else Registry()


def obs_key(adata: AnnData, role: Literal["batch_key", "labels_key"], key: str | None) -> str:
    """``key``, or the registered column, of ``obs``; else a ValueError."""
    registry = registry_of(adata)
    key = getattr(registry, role) if key is None else key
    if key is None:
        msg = f"No {role} is registered: name a column of adata.obs, which has {listing(adata.obs.columns)}."
        raise ValueError(msg)
    return key


def obs_codes(adata: AnnData, key: str) -> np.ndarray:
    """An integer for each value of ``obs[key]``; -1 where it is missing or stands for "no label"."""
    values = column(adata.obs, key)
    registry = registry_of(adata)
    if key == registry.labels_key and registry.unlabeled_category is not None:
        values = values.mask(values.astype(str) == registry.unlabeled_category)
    codes = pd.factorize(values)[0]
    if (codes < 0).all():
        msg = f"adata.obs[{key!r}] has no value in any of {adata.n_obs} cells."
        raise ValueError(msg)
    return codes


def rep_key(adata: AnnData, use_rep: str | None) -> str:
    """``use_rep``, or the latent space of the last fit, if it is in ``obsm``; else a KeyError."""
    if use_rep is not None:
        if use_rep not in adata.obsm:
            raise missing_key("adata.obsm", use_rep, adata.obsm)
        return use_rep
    if not read_root(adata).get(UNS.fits):
        msg = f"There is no fit whose latent space could be used: name one, use_rep=...: {listing(adata.obsm)}."
        raise KeyError(msg)
    fit = read_fit(adata)
    if "n_latent" not in fit.config:  # a classifier has no latent space: that of the one other fit is meant
        others = [key for key in read_root(adata)[UNS.fits] if "n_latent" in read_fit(adata, key).config]
        if len(others) != 1:
            msg = f"The last fit, {fit.key!r}, has no latent space: name one, use_rep=...: {listing(adata.obsm)}."
            raise KeyError(msg)
        fit = read_fit(adata, others[0])
    use_rep = FitKeys(fit.key).latent
    if use_rep not in adata.obsm:
        msg = (
            f"The latent space of the last fit, {use_rep!r}, is not in adata.obsm: call scvi_ext.tl.get_latent(adata), "
            f"or name another, use_rep=...: {listing(adata.obsm)}."
        )
        raise KeyError(msg)
    return use_rep


def rep_values(adata: AnnData, use_rep: str) -> np.ndarray:
    """``obsm[use_rep]`` as an array of floats, cells x units."""
    values = adata.obsm[use_rep]
    values = np.asarray(values.toarray() if issparse(values) else values)
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def complete(values: np.ndarray) -> np.ndarray:
    """Which cells have all values; the read-outs leave NaN where they were not asked for a cell."""
    return ~np.isnan(values).any(axis=1)


def leave_out(taking_part: np.ndarray, reason: str) -> np.ndarray:
    """Positions of the cells that take part; the log says how many do not."""
    n_left = len(taking_part) - taking_part.sum()
    if n_left == len(taking_part):
        msg = f"None of {len(taking_part)} cells can be used: all are left out, as cells without {reason}."
        raise ValueError(msg)
    if n_left:
        logg.info(f"    left out {n_left} of {len(taking_part)} cells, without {reason}")
    return np.flatnonzero(taking_part)


def check_neighbors(adata: AnnData, n_neighbors: int | None, n_cells: int, default: int) -> int:
    """How many neighbours to search among ``n_cells``; None takes the default, or all others if there are fewer."""
    if n_cells < 2:
        msg = f"{n_cells} of {adata.n_obs} cells can be used: a single cell has no neighbours."
        raise ValueError(msg)
    if n_neighbors is None:
        return min(default, n_cells - 1)
    if whole_number("n_neighbors", n_neighbors, 1) >= n_cells:
        msg = f"n_neighbors={n_neighbors} must be below the number of cells that can be used, which is {n_cells}."
        raise ValueError(msg)
    return n_neighbors


def search(values: np.ndarray, n_neighbors: int, seed: int, name: str) -> csr_matrix:
    """The graph of neighbours in a representation; the log says how it was found."""
    way = "exact search" if len(values) <= arrays.EXACT_UP_TO else "approximate search by pynndescent"
    logg.info(f"    {n_neighbors} neighbours of each of {len(values)} cells in {name!r} (adata.obsm), {way}")
    return arrays.nearest_neighbors(values, n_neighbors, seed=seed)


def neighbors_of(
    adata: AnnData,
    known: np.ndarray,
    *,
    key: str,
    use_rep: str | None,
    neighbors_key: str | None,
    n_neighbors: int | None,
    default: int,
    seed: int,
) -> tuple[csr_matrix, np.ndarray]:
    """The graph of neighbours among cells of which ``obs[key]`` is ``known``, and the positions of these cells."""
    reason = f"a value of {key!r} (adata.obs)"
    if neighbors_key is not None:
        if use_rep is not None:
            msg = f"use_rep={use_rep!r} has no effect beside neighbors_key={neighbors_key!r}: leave out one of them."
            raise ValueError(msg)
        graph = _stored_graph(adata, neighbors_key, n_neighbors)
        rows = leave_out(known, reason)
        return graph[rows][:, rows], rows
    use_rep = rep_key(adata, use_rep)
    values = rep_values(adata, use_rep)
    taking_part = known & complete(values)
    n_neighbors = check_neighbors(adata, n_neighbors, taking_part.sum(), default)
    rows = leave_out(taking_part, f"{reason} or of {use_rep!r} (adata.obsm)")
    return search(values[rows], n_neighbors, seed, use_rep), rows


def _stored_graph(adata: AnnData, neighbors_key: str, n_neighbors: int | None) -> csr_matrix:
    """The distances that ``scanpy.pp.neighbors`` has stored, of the ``n_neighbors`` nearest; None: of all there are."""
    if neighbors_key not in adata.uns:
        raise missing_key("adata.uns", neighbors_key, adata.uns)
    entry = adata.uns[neighbors_key]
    if not isinstance(entry, Mapping) or "distances_key" not in entry:
        msg = f"adata.uns[{neighbors_key!r}] has no 'distances_key': it is not what scanpy.pp.neighbors writes."
        raise ValueError(msg)
    distances_key = str(entry["distances_key"])
    if distances_key not in adata.obsp:
        raise missing_key("adata.obsp", distances_key, adata.obsp)
    graph = arrays.without_self(adata.obsp[distances_key])
    held = np.diff(graph.indptr)
    slot = f"{distances_key!r} (adata.obsp)"
    span = f"{held.min()}" if held.min() == held.max() else f"{held.min()} to {held.max()}"
    if n_neighbors is None:
        logg.info(f"    {span} neighbours of each of {len(held)} cells, from {slot}")
        return graph
    if whole_number("n_neighbors", n_neighbors, 1) > held.min():
        msg = (
            f"n_neighbors={n_neighbors}, but {slot} holds {span} neighbours of a cell, itself not counted: leave out "
            f"n_neighbors to use them, or call scanpy.pp.neighbors with n_neighbors={n_neighbors + 1} or more."
        )
        raise ValueError(msg)
    logg.info(f"    {n_neighbors} neighbours of each of {len(held)} cells, from {slot}")
    return arrays.nearest(graph, n_neighbors)
