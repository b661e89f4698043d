"""What ``setup_anndata`` and ``setup_mudata`` do: check everything, and write what models shall read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_ext import results
from scvi_ext._errors import listing, one_of, warn
from scvi_ext._keys import UNS, column_name
from scvi_ext.data.checks import audit_registered, complete_categories, report_audits
from scvi_ext.data.matrix import read_all
from scvi_ext.data.proteins import missing_proteins
from scvi_ext.data.registry import Registry, codes, read_root, stale_slots
from scvi_ext.data.store import (
    check_unique_genes,
    numeric_column,
    protein_matrix,
    protein_names,
    size_factors,
)
from scvi_ext.modalities import is_mudata

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

_MIN_CELLS = 3
_MAX_UNSTAINED = 0.05  # of the cells of a batch: stained ones have ambient antibody, hence rarely no count at all


def register(
    adata: AnnData,
    *,
    layer: str | None,
    batch_key: str | None,
    labels_key: str | None,
    unlabeled_category: str | None,
    size_factor_key: str | None,
    categorical_covariate_keys: Sequence[str] | None,
    continuous_covariate_keys: Sequence[str] | None,
    protein_obsm_key: str | None,
    protein_batch_mask: Mapping[str, Sequence] | Literal["auto"] | None,
    check: Literal["error", "warn"],
    copy: bool,
    protein_names_uns_key: str | None = None,
    modalities: Mapping[str, str] | None = None,
) -> AnnData | None:
    """Register counts and covariates; ``modalities`` of a MuData are written beside them."""
    one_of("check", check, ["error", "warn"])
    _check_adata(adata)
    categorical = _keys("categorical_covariate_keys", categorical_covariate_keys)
    continuous = _keys("continuous_covariate_keys", continuous_covariate_keys)
    _check_roles(
        batch_key=batch_key,
        labels_key=labels_key,
        size_factor_key=size_factor_key,
        categorical_covariate_keys=categorical,
        continuous_covariate_keys=continuous,
    )
    obs = adata.obs
    registry = Registry(
        layer=layer,
        batch_key=batch_key,
        labels_key=labels_key,
        unlabeled_category=None if unlabeled_category is None else str(unlabeled_category),
        size_factor_key=size_factor_key,
        categorical_covariate_keys=categorical,
        continuous_covariate_keys=continuous,
        protein_obsm_key=protein_obsm_key,
        protein_names_uns_key=protein_names_uns_key,
        protein_names=_protein_names(adata, protein_obsm_key, protein_names_uns_key),
        batch_categories=complete_categories(obs, batch_key) if batch_key is not None else (),
        labels_categories=_labels(obs, labels_key, unlabeled_category),
        covariate_categories=tuple(complete_categories(obs, key) for key in categorical),
    )
    if protein_obsm_key is None and not isinstance(protein_batch_mask, str):
        msg = "protein_batch_mask is given without protein_obsm_key; name the protein counts too."
        raise ValueError(msg)
    for key in continuous:
        numeric_column(obs, key)
    if size_factor_key is not None:
        size_factors(obs, size_factor_key)

    clean = report_audits(audit_registered(adata, registry), check)
    _warn_small_batches(obs, registry)
    if protein_obsm_key is not None:
        registry = _with_missing_proteins(adata, registry, protein_batch_mask)

    adata = adata.copy() if copy else adata
    results.write_setup(adata, replace(registry, audit="clean" if clean else None).to_uns(), modalities)
    _log(adata, registry)
    return adata if copy else None


def _check_adata(adata: AnnData) -> None:
    if not isinstance(adata, AnnData):
        kind = type(adata).__name__
        advice = " Call scvi_ext.pp.setup_mudata, for genes and proteins." if is_mudata(adata) else ""
        msg = f"adata is a {kind}; an AnnData is needed.{advice}"
        raise TypeError(msg)
    if adata.n_obs == 0 or adata.n_vars == 0:
        msg = f"adata has {adata.n_obs} cells and {adata.n_vars} genes; at least one of each is needed."
        raise ValueError(msg)
    check_unique_genes(adata)
    read_root(adata)


def _keys(name: str, keys: Sequence[str] | None) -> tuple[str, ...]:
    keys = (keys,) if isinstance(keys, str) else tuple(keys or ())
    for key in keys:
        if not isinstance(key, str):
            msg = f"{name} holds {key!r}, a {type(key).__name__}; names of columns of adata.obs are needed."
            raise TypeError(msg)
    return keys


def _check_roles(**roles: str | tuple[str, ...] | None) -> None:
    """Each column of ``obs`` has one role only."""
    taken: dict[str, str] = {}
    for role, keys in roles.items():
        if not isinstance(keys, str | tuple | None):
            msg = f"{role}={keys!r} is a {type(keys).__name__}; the name of one column of adata.obs is needed."
            raise TypeError(msg)
        for key in _keys(role, keys):
            if key in taken:
                twice = f"twice in {role}" if taken[key] == role else f"both in {taken[key]} and in {role}"
                msg = f"adata.obs[{key!r}] is given {twice}; name it once."
                raise ValueError(msg)
            taken[key] = role


def _labels(obs: pd.DataFrame, key: str | None, unlabeled: str | None) -> tuple[str, ...]:
    if key is None:
        if unlabeled is not None:
            msg = f"unlabeled_category={unlabeled!r} is given without labels_key; name the column it is found in."
            raise ValueError(msg)
        return ()
    categories = complete_categories(obs, key, " and pass unlabeled_category='unknown'")
    if unlabeled is None:
        return categories
    one_of("unlabeled_category", str(unlabeled), categories)
    labels = tuple(category for category in categories if category != str(unlabeled))
    if not labels:
        msg = f"All cells have the unlabeled_category {unlabeled!r} in adata.obs[{key!r}]; some labels are needed."
        raise ValueError(msg)
    return labels


def _protein_names(adata: AnnData, key: str | None, names_key: str | None) -> tuple[str, ...]:
    if key is None:
        if names_key is not None:
            msg = f"protein_names_uns_key={names_key!r} is given without protein_obsm_key; name the protein counts too."
            raise ValueError(msg)
        return ()
    names = protein_names(adata, key, names_key)
    proteins = adata.obsm[key]
    if names_key is not None and isinstance(proteins, pd.DataFrame):
        msg = f"adata.obsm[{key!r}] is a table with names of its own: leave out protein_names_uns_key."
        raise ValueError(msg)
    if proteins.shape[1] == 0:
        msg = f"adata.obsm[{key!r}] has no proteins; leave out protein_obsm_key."
        raise ValueError(msg)
    if names is None:
        return tuple(f"protein_{i}" for i in range(proteins.shape[1]))
    columns = [column_name(name) for name in names]
    alike = [name for name, column in zip(names, columns, strict=True) if columns.count(column) > 1]
    if alike:
        msg = (
            f"The proteins in adata.obsm[{key!r}] include {listing(alike)}, which are called the same in tables of "
            "results: h5ad and zarr take '/' for a path, so it becomes '|' there. Rename them."
        )
        raise ValueError(msg)
    return names


def _with_missing_proteins(adata: AnnData, registry: Registry, given: Any) -> Registry:
    counts = read_all(protein_matrix(adata, registry, registry.protein_names)).toarray()
    batch_index = np.zeros(adata.n_obs, dtype=np.int64)
    if registry.batch_key is not None:
        batch_index = codes(adata.obs, registry.batch_key, registry.batch_categories)
    missing = missing_proteins(counts, batch_index, registry.protein_names, registry.batch_categories, given)
    registry = replace(registry, missing_proteins=missing)
    _warn_unstained(counts, batch_index, registry)
    return registry


def _warn_unstained(counts: np.ndarray, batch_index: np.ndarray, registry: Registry) -> None:
    """Warn of batches with cells that look as if nobody had measured their proteins."""
    found = []
    for k, measured in enumerate(registry.sizes(1).proteins.protein_batch_mask):
        empty = (counts[batch_index == k][:, np.array(measured)] == 0).all(1)
        if any(measured) and empty.mean() > _MAX_UNSTAINED:
            where = f" of batch {registry.batch_categories[k]!r}" if registry.batch_key is not None else ""
            found.append(f"{empty.sum()} of {empty.size} cells{where}")
    if found:
        warn(
            f"Cells without a single protein count: {', '.join(found)}. If their proteins were not measured, make them "
            "a batch of their own (batch_key), so that their zeros are not taken for measurements."
        )


def _warn_small_batches(obs: pd.DataFrame, registry: Registry) -> None:
    if registry.batch_key is None:
        return
    sizes = np.bincount(codes(obs, registry.batch_key, registry.batch_categories))
    small = [name for name, size in zip(registry.batch_categories, sizes, strict=True) if size < _MIN_CELLS]
    if small:
        msg = (
            f"{len(small)} of {len(sizes)} batches in adata.obs[{registry.batch_key!r}] have fewer than {_MIN_CELLS} "
            f"cells: {listing(small)}. Their effect cannot be estimated; merge them or leave them out."
        )
        warn(msg)


def _log(adata: AnnData, registry: Registry) -> None:
    from scanpy import logging as logg

    counts = "X" if registry.layer is None else f"layer {registry.layer!r}"
    parts = [f"{adata.n_obs} cells x {adata.n_vars} genes from {counts}"]
    if registry.batch_key is not None:
        parts.append(f"{len(registry.batch_categories)} batches ({registry.batch_key!r})")
    if registry.labels_key is not None:
        parts.append(f"{len(registry.labels_categories)} labels ({registry.labels_key!r})")
    if registry.size_factor_key is not None:
        parts.append(f"size factors ({registry.size_factor_key!r})")
    covariates = registry.categorical_covariate_keys + registry.continuous_covariate_keys
    if covariates:
        parts.append(f"covariates ({listing(covariates)})")
    if registry.protein_obsm_key is not None:
        parts.append(f"{len(registry.protein_names)} proteins ({registry.protein_obsm_key!r})")
    for batch, names in zip(registry.batch_categories, registry.missing_proteins, strict=False):
        if names:
            logg.info(f"batch {batch!r} has not measured {len(names)} proteins: {listing(names)}")
    logg.info(f"registered {', '.join(parts)}", deep=f"added\n    {UNS.root!r}, what models read (adata.uns)")
    fits = read_root(adata).get(UNS.fits, {})
    stale = [key for key, fit in fits.items() if stale_slots(Registry.from_uns(fit["setup"]), registry)]
    if stale:
        logg.warning(
            f"fits that were trained on other slots than are registered now: {listing(stale)}. They are kept, and "
            "refused when used; fit again, or set up as before to use them."
        )
