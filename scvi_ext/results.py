"""The only file that assigns into an AnnData."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_ext._keys import FORMAT, IN_QUERY, NONE, UNS, column_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from anndata import AnnData
    from mudata import MuData

    from scvi_ext._contract import SavedFit


_FEATURE = "scvi_ext_feature"  # attribute of a table: what its columns are


def _own(adata: AnnData | MuData) -> None:
    """A view becomes an AnnData of its own before it is written to, as in scanpy."""
    if adata.is_view:
        adata._init_as_actual(adata.copy())


def _root(adata: AnnData) -> dict:
    """``adata.uns["scvi_ext"]``, made where missing."""
    _own(adata)
    root = adata.uns.setdefault(UNS.root, {})
    root[UNS.format] = FORMAT
    return root


def write_setup(adata: AnnData, setup: Mapping, modalities: Mapping | None = None) -> None:
    """``uns["scvi_ext"]["setup"]``, replacing an earlier one, and of a MuData where it has what."""
    _root(adata)[UNS.setup] = dict(setup)
    if modalities is not None:
        _root(adata)[UNS.modalities] = dict(modalities)


def write_fit(adata: AnnData, fit: SavedFit) -> None:
    """``uns["scvi_ext"]["fits"][fit.key]``, replacing an earlier one, and the note that it is the last fit."""
    saved = {
        "model": fit.model,
        "config": _without_none({name: NONE if value is None else value for name, value in fit.config.items()}),
        "run": _without_none(fit.run),
        "setup": dict(fit.setup),
        "var_names": np.asarray(fit.var_names, dtype=object),
        "state": dict(fit.state),
        "history": fit.history.copy(),
        "status": _without_none(fit.status),
    }
    if fit.frozen is not None:
        saved["frozen"] = _without_none(fit.frozen)
    if fit.joint is not None:
        saved["joint"] = dict(fit.joint)
    if fit.checkpoint is not None:
        saved["checkpoint"] = dict(fit.checkpoint)
    root = _root(adata)
    root.setdefault(UNS.fits, {})[fit.key] = saved
    root[UNS.last_fit] = fit.key


def write_corruption(adata: AnnData, name: str, values: Any, record: Mapping) -> None:
    """``layers[name]``, corrupted counts, and how they were made: ``uns["scvi_ext"]["corruptions"][name]``."""
    root = _root(adata)
    adata.layers[name] = values
    root.setdefault(UNS.corruptions, {})[name] = dict(record)


def remove_corruption(adata: AnnData, name: str) -> None:
    """Undo :func:`write_corruption`; what it alone had made in ``uns`` goes too."""
    root = _root(adata)
    adata.layers.pop(name, None)
    del root[UNS.corruptions][name]
    if not root[UNS.corruptions]:
        del root[UNS.corruptions]
    if set(root) == {UNS.format}:
        del adata.uns[UNS.root]


def write_alignment(adata: AnnData, report: Mapping, in_query: np.ndarray) -> None:
    """``uns["scvi_ext"]["alignment"]``, and which genes were measured: ``var["in_query"]``."""
    _root(adata)[UNS.alignment] = dict(report)
    adata.var[IN_QUERY] = in_query


def _without_none(values: Mapping) -> dict:
    """Older versions of the file formats have no None: what is absent is left out. Nor do they have tuples."""

    def storable(value: Any) -> Any:
        if isinstance(value, dict):
            return _without_none(value)
        return np.array(value) if isinstance(value, tuple) else value

    return {k: storable(v) for k, v in values.items() if v is not None}


def write_obs(adata: AnnData, name: str, values: np.ndarray, rows: np.ndarray | None = None) -> None:
    """``obs[name]``; cells other than ``rows`` are NaN."""
    _own(adata)
    adata.obs[name] = _spread(values, adata.n_obs, rows)


def write_obs_categories(
    adata: AnnData, name: str, codes: np.ndarray, categories: Sequence[str], rows: np.ndarray | None = None
) -> None:
    """``obs[name]``, categorical; cells other than ``rows`` have none."""
    _own(adata)
    spread = codes if rows is None else np.full(adata.n_obs, -1)
    if rows is not None:
        spread[rows] = codes
    adata.obs[name] = pd.Categorical.from_codes(spread, categories)


def write_var(adata: AnnData, name: str, values: np.ndarray, columns: np.ndarray) -> None:
    """``var[name]`` of the genes at ``columns``; others are NaN, or False."""
    _own(adata)
    adata.var[name] = _spread(values, adata.n_vars, columns)


def write_obsm(
    adata: AnnData, name: str, values: np.ndarray, rows: np.ndarray | None = None, names: Sequence[str] | None = None
) -> None:
    """``obsm[name]``, as a table where its columns have ``names``; cells other than ``rows`` are NaN."""
    _own(adata)
    values = _spread(values, adata.n_obs, rows)
    adata.obsm[name] = values if names is None else _table(values, adata.obs_names, names)


def write_proteins(
    adata: AnnData, name: str, values: np.ndarray, rows: np.ndarray | None, names: Sequence[str]
) -> None:
    """``obsm[name]``, a table of cells x proteins that says so: in a MuData, they are a modality of their own."""
    write_obsm(adata, name, values, rows, names)
    adata.obsm[name].attrs[_FEATURE] = "protein"


def is_of_proteins(value: Any) -> bool:
    """Whether it is what :func:`write_proteins` wrote, and no file has been in between."""
    return isinstance(value, pd.DataFrame) and value.attrs.get(_FEATURE) == "protein"


def write_varm(
    adata: AnnData, name: str, values: np.ndarray, columns: np.ndarray, names: Sequence[str] | None = None
) -> None:
    """``varm[name]`` of the genes at ``columns``, as a table where its columns have ``names``; others NaN, or False."""
    _own(adata)
    values = _spread(values, adata.n_vars, columns)
    adata.varm[name] = values if names is None else _table(values, adata.var_names, names)


def write_layers(
    adata: AnnData,
    names: Sequence[str],
    blocks: Iterable[tuple[slice, tuple[np.ndarray, ...]]],
    rows: np.ndarray | None,
    columns: np.ndarray,
) -> None:
    """``layers[name]``, float32, filled stretch by stretch as ``blocks`` come in, and assigned when they are complete.

    Each block is a stretch of ``rows`` with one array for each name, its columns the genes at ``columns``. The rest is
    NaN.
    """
    _own(adata)
    if (spools := _spools(adata)) is not None:
        spools.fill("layers", names, blocks, rows, columns)
        return
    for name, layer in zip(names, _filled(adata, blocks, rows, columns, np.float32), strict=True):
        adata.layers[name] = layer


def write_obsm_blocks(
    adata: AnnData,
    names: Sequence[str],
    blocks: Iterable[tuple[slice, tuple[np.ndarray, ...]]],
    rows: np.ndarray | None,
) -> None:
    """``obsm[name]``, in the same way, with all columns that come."""
    _own(adata)
    if (spools := _spools(adata)) is not None:
        spools.fill("obsm", names, blocks, rows, None)
        return
    for name, values in zip(names, _filled(adata, blocks, rows), strict=True):
        adata.obsm[name] = values


def _spools(adata: AnnData) -> Any:
    """What takes in read-outs of all cells as they come, where ``adata`` was opened from files; else None."""
    return getattr(adata, "spools", None)


def _filled(
    adata: AnnData,
    blocks: Iterable[tuple[slice, tuple[np.ndarray, ...]]],
    rows: np.ndarray | None,
    columns: np.ndarray | None = None,
    dtype: Any = None,
) -> list[np.ndarray]:
    """Arrays of all cells, NaN where there is nothing; no ``columns``: those that come."""
    whole = rows is None and (columns is None or np.array_equal(columns, np.arange(adata.n_vars)))
    filled: list[np.ndarray] = []
    for stretch, arrays in blocks:
        if not filled:
            widths = [array.shape[1] if columns is None else adata.n_vars for array in arrays]
            kinds = [array.dtype if dtype is None else dtype for array in arrays]
            make = np.empty if whole else partial(np.full, fill_value=np.nan)
            filled = [make((adata.n_obs, n), dtype=kind) for n, kind in zip(widths, kinds, strict=True)]
        cells = stretch if rows is None else rows[stretch]
        if columns is not None and not whole:
            cells = np.ix_(np.arange(adata.n_obs)[stretch] if rows is None else cells, columns)
        for target, array in zip(filled, arrays, strict=True):
            target[cells] = array
    return filled


def of_all_genes(values: np.ndarray, columns: np.ndarray, n_vars: int) -> np.ndarray:
    """``values`` at the positions ``columns`` of as many columns as there are genes, NaN elsewhere."""
    if np.array_equal(columns, np.arange(n_vars)):
        return values
    whole = np.full((*values.shape[:-1], n_vars), np.nan, dtype=values.dtype)
    whole[..., columns] = values
    return whole


def write_sparse_layer(adata: AnnData, name: str, values: sp.csr_matrix, columns: np.ndarray) -> None:
    """``layers[name]`` of all cells, sparse; its columns are the genes at ``columns``, which are all of them."""
    _own(adata)
    if not np.array_equal(columns, np.arange(adata.n_vars)):
        values = values[:, np.argsort(columns)]
        values.sort_indices()
    adata.layers[name] = values


def write_varp(adata: AnnData, name: str, values: np.ndarray, columns: np.ndarray) -> None:
    """``varp[name]`` of the pairs of genes at ``columns``; others are NaN."""
    _own(adata)
    pairs = np.full((adata.n_vars, adata.n_vars), np.nan, dtype=values.dtype)
    pairs[np.ix_(columns, columns)] = values
    adata.varp[name] = pairs


def write_sparse_varp(adata: AnnData, name: str, values: np.ndarray, columns: np.ndarray) -> None:
    """``varp[name]``, sparse, with an entry for every pair of the genes at ``columns``, also where it is 0 or NaN."""
    _own(adata)
    rows, others = (places.ravel() for places in np.meshgrid(columns, columns, indexing="ij"))
    adata.varp[name] = sp.csr_matrix((values.ravel(), (rows, others)), shape=(adata.n_vars, adata.n_vars))


def write_uns(adata: AnnData, name: str, value: Mapping) -> None:
    """``uns[name]``, replacing an earlier one."""
    _own(adata)
    adata.uns[name] = dict(value)


def write_modalities(mdata: MuData, changes: Iterable[tuple[str | None, str, str, Any]]) -> None:
    """``slot[key]`` of the named modality of a MuData, or for None of itself; a value that is None is removed."""
    for modality, slot, key, value in changes:
        _own(mdata)
        owner = mdata if modality is None else mdata.mod[modality]
        _own(owner)
        if value is None:
            getattr(owner, slot).pop(key, None)
        else:
            getattr(owner, slot)[key] = value


def write_uns_table(
    adata: AnnData, name: str, values: np.ndarray, names: Sequence[str], rows: Sequence[str] | None = None
) -> None:
    """``uns[name]``, a table of ``rows`` x ``names``, by default of the pairs of names, replacing an earlier one."""
    _own(adata)
    rows = names if rows is None else rows
    adata.uns[name] = _table(values, pd.Index([column_name(row) for row in rows]), names)


def _table(values: np.ndarray, index: pd.Index, names: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(values, index=index, columns=[column_name(name) for name in names])


def _spread(values: np.ndarray, n: int, where: np.ndarray | None) -> np.ndarray:
    """``values`` at the positions ``where`` of an array of length ``n`` that is NaN (of booleans: False) elsewhere."""
    if where is None:
        return values
    spread = np.full((n, *values.shape[1:]), False if values.dtype == bool else np.nan, dtype=values.dtype)
    spread[where] = values
    return spread
