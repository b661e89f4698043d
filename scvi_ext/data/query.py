"""The cells of a query as a model of other cells reads them: its genes, its columns, its categories and new ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_ext._errors import listing, missing_key, no_cells
from scvi_ext.data.checks import audit_registered, complete_categories, report_audits
from scvi_ext.data.proteins import missing_in_query
from scvi_ext.data.registry import Registry, codes, column, known_codes, used_categories
from scvi_ext.data.store import CellStore, check_unique_genes, known_proteins, protein_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


@dataclass(frozen=True)
class Query:
    """What is asked of a model about cells that it does not know."""

    registry: Registry  # the reference's, with the columns of the query, new categories behind the known ones
    own: Registry  # the same columns, with the categories that occur in the query
    store: CellStore
    batch_column: pd.Categorical | None  # to be written into obs, where the query has none
    new_batches: tuple[str, ...]
    new_categories: tuple[str, ...]  # of covariates, as "column=category"
    unknown_labels: tuple[str, ...]
    missing_proteins: tuple[str, ...]  # not measured in any of its batches
    absent_proteins: tuple[str, ...]  # that the query does not have, though it has proteins
    unknown_proteins: tuple[str, ...]


def read_query(
    adata: AnnData,
    trained: Registry,
    var_names: Sequence[str],
    *,
    needed: frozenset[str],
    infers_labels: bool,
    layer: str | None,
    batch_key: str | None,
    batch_name: str | None,
    labels_key: str | None,
    protein_obsm_key: str | None,
    protein_names_uns_key: str | None,
    check: str,
) -> Query:
    """Read the cells of ``adata`` for a model of other cells, and check them as ``pp.setup_anndata`` does.

    Parameters
    ----------
    adata
        The query; it is not written to.
    trained
        What the model was trained on.
    var_names
        Genes of the model.
    needed
        Columns of a minibatch that the model reads.
    infers_labels
        Whether the model does without the labels of cells.
    layer, batch_key, labels_key, protein_obsm_key, protein_names_uns_key
        Names in the query where they are others than in the reference.
    batch_name
        Of the one batch that all cells belong to, in place of a column.
    check
        ``"error"`` or ``"warn"``, for counts that are no raw counts.

    Raises
    ------
    KeyError
        A gene, layer or column is missing.
    ValueError
        The counts are no raw counts, values are missing, a cell has no counts of these genes, or the arguments
        contradict each other, or proteins are lacking in a known batch that has measured them.
    """
    if adata.n_obs == 0:
        raise no_cells()
    _check_genes(adata, var_names)
    layer = trained.layer if layer is None else layer
    if layer is not None and layer not in adata.layers:
        missing = missing_key("adata.layers", layer, adata.layers, "which the reference reads").args[0]
        msg = (
            f"{missing} Name another one, layer=..., or if the counts of the query are in X: adata.layers[{layer!r}] = "
            "adata.X.copy()."
        )
        raise KeyError(msg)
    batch_key, batch_codes, batches = _batches(adata, trained, batch_key, batch_name)
    labels_key, labels, unknown = _labels(adata.obs, trained, labels_key, "labels" in needed, infers_labels)
    covariates = {
        key: _extended(adata.obs, key, known)
        for key, known in zip(trained.categorical_covariate_keys, trained.covariate_categories, strict=True)
    }
    protein_obsm_key = _protein_key(adata, trained, protein_obsm_key, protein_names_uns_key, "protein" in needed)
    registry = replace(
        trained,
        layer=layer,
        batch_key=batch_key,
        labels_key=labels_key,
        unlabeled_category=None if labels_key is None else trained.unlabeled_category,
        size_factor_key=trained.size_factor_key if "size_factor" in needed else None,
        protein_obsm_key=protein_obsm_key,
        protein_names_uns_key=protein_names_uns_key or trained.protein_names_uns_key,
        protein_names=trained.protein_names if "protein" in needed else (),
        missing_proteins=(),
        batch_categories=batches,
        covariate_categories=tuple(covariates.values()),
        audit=None,
    )
    present, strange = _panel(adata, registry)
    # Read here, where the columns may not be there yet
    elsewhere = replace(registry, batch_key=None, labels_key=None, missing_proteins=(registry.protein_names,))
    clean = report_audits(audit_registered(adata, elsewhere), check, remarks=False)
    store = CellStore.from_adata(adata, elsewhere, var_names=var_names, columns=needed)
    _check_filled(store)
    if store.protein is not None:
        known = trained.missing_proteins or ((),) * max(1, len(trained.batch_categories))
        absent = [name for name in registry.protein_names if name not in present]
        missing = missing_in_query(store.protein, batch_codes, registry.protein_names, batches, known, absent)
        registry = replace(registry, missing_proteins=missing)
    registry = replace(registry, audit="clean" if clean else None)
    return Query(
        registry=registry,
        own=_of_query(registry, adata.obs, batch_name, present),
        store=replace(store, batch_index=batch_codes, labels=labels),
        batch_column=None if batch_name is None else pd.Categorical([batch_name] * adata.n_obs),
        new_batches=batches[len(trained.batch_categories) :],
        new_categories=tuple(
            f"{key}={name}"
            for (key, names), known in zip(covariates.items(), trained.covariate_categories, strict=True)
            for name in names[len(known) :]
        ),
        unknown_labels=unknown,
        missing_proteins=_missing_everywhere(registry, batch_codes),
        absent_proteins=tuple(name for name in registry.protein_names if name not in present) if present else (),
        unknown_proteins=strange,
    )


def _check_genes(adata: AnnData, var_names: Sequence[str]) -> None:
    check_unique_genes(adata)
    absent = pd.Index(var_names).difference(adata.var_names, sort=False)
    if len(absent):
        msg = (
            f"{len(absent)} of the {len(var_names)} genes of the reference are not in adata.var_names: "
            f"{listing(absent, 5)}. Call adata = scvi_ext.pp.align_query(adata, reference), which finds genes by name, "
            "says what is missing and stands zeros in for it."
        )
        raise KeyError(msg)


def _check_filled(store: CellStore) -> None:
    empty = store.totals == 0
    if empty.any():
        msg = (
            f"{empty.sum()} of {store.n_cells} cells have no counts of the {store.n_genes} genes of the reference, "
            f"first {listing(store.obs_names[empty], 3)}: nothing can be said of them. Leave them out."
        )
        raise ValueError(msg)


def _batches(
    adata: AnnData, trained: Registry, batch_key: str | None, batch_name: str | None
) -> tuple[str | None, np.ndarray, tuple[str, ...]]:
    """The column of the batch, codes of the cells, and all categories."""
    obs, known = adata.obs, trained.batch_categories
    if trained.batch_key is None:
        if batch_key is not None or batch_name is not None:
            msg = (
                "The reference was fitted without batches, so its model has no place for the effect of one: leave out "
                "batch_key and batch_name, or fit the reference with a batch_key, be it a column with one value."
            )
            raise ValueError(msg)
        return None, np.zeros(adata.n_obs, dtype=np.int64), ()
    if batch_name is not None:
        if not isinstance(batch_name, str):
            msg = f"batch_name={batch_name!r} is a {type(batch_name).__name__}; a name is needed."
            raise TypeError(msg)
        found = batch_key or trained.batch_key
        if batch_key is not None or (found in obs and used_categories(obs, found) != (batch_name,)):
            msg = (
                f"batch_name={batch_name!r} is for cells without a column of batches, and adata.obs[{found!r}] is one: "
                "leave out one of them."
            )
            raise ValueError(msg)
        batches = known if batch_name in known else (*known, batch_name)
        return trained.batch_key, np.full(adata.n_obs, batches.index(batch_name)), batches
    key = batch_key or trained.batch_key
    if key not in obs:
        msg = (
            f"{missing_key('adata.obs', key, obs.columns).args[0]} The model has to know the batch of each cell: name "
            "the column, batch_key=..., or if there is none, the one batch that all cells are of, batch_name=..."
        )
        raise KeyError(msg)
    batches = _extended(obs, key, known)
    return key, codes(obs, key, batches), batches


def _extended(obs: pd.DataFrame, key: str, known: Sequence[str]) -> tuple[str, ...]:
    """The known categories, and behind them those that are new in ``obs[key]``."""
    return (*known, *(name for name in complete_categories(obs, key) if name not in known))


def _labels(
    obs: pd.DataFrame, trained: Registry, key: str | None, needed: bool, infers: bool
) -> tuple[str | None, np.ndarray | None, tuple[str, ...]]:
    """The column of labels, codes of the cells (None where the model reads no labels), and labels it does not know."""
    if key is not None:
        column(obs, key)
    key = trained.labels_key if key is None else key
    if not needed:
        return key if key in obs else None, None, ()
    if not infers:
        return key, codes(obs, key, trained.labels_categories, trained.unlabeled_category), ()
    known = {*trained.labels_categories, trained.unlabeled_category}
    unknown = tuple(name for name in used_categories(obs, key) if name not in known) if key in obs else ()
    return key, known_codes(obs, key, trained.labels_categories), unknown


def _protein_key(adata: AnnData, trained: Registry, key: str | None, names_key: str | None, needed: bool) -> str | None:
    """Where the query has its proteins, if it has any."""
    if not needed:
        for name, value in {"protein_obsm_key": key, "protein_names_uns_key": names_key}.items():
            if value is not None:
                msg = f"{name}={value!r} has no effect: the model of the reference reads no proteins."
                raise ValueError(msg)
        return None
    if key is not None and key not in adata.obsm:
        raise missing_key("adata.obsm", key, adata.obsm)
    key = trained.protein_obsm_key if key is None else key
    if names_key is not None and key not in adata.obsm:
        msg = (
            f"protein_names_uns_key={names_key!r} is given, and there is no adata.obsm[{key!r}]: name protein_obsm_key."
        )
        raise ValueError(msg)
    if names_key is not None and isinstance(adata.obsm[key], pd.DataFrame):
        msg = f"adata.obsm[{key!r}] is a table with names of its own: leave out protein_names_uns_key."
        raise ValueError(msg)
    return key


def _panel(adata: AnnData, registry: Registry) -> tuple[list[str], tuple[str, ...]]:
    """The proteins of the reference that the query has, and those that the reference does not know."""
    key, names = registry.protein_obsm_key, registry.protein_names
    if key not in adata.obsm:
        return [], ()
    present, own = known_proteins(adata, registry), protein_names(adata, key, registry.protein_names_uns_key)
    if not present:
        msg = (
            f"adata.obsm[{key!r}] has no protein of the reference: its {len(own)} are called {listing(own, 3)}, those "
            f"of the reference {listing(names, 3)}. Rename them; if they are in another entry, protein_obsm_key=...; "
            f"to have all proteins imputed, drop this one: del adata.obsm[{key!r}]."
        )
        raise KeyError(msg)
    return present, tuple(name for name in own or () if name not in names)


def _missing_everywhere(registry: Registry, batch_codes: np.ndarray) -> tuple[str, ...]:
    if not registry.missing_proteins:
        return ()
    of_batches = [set(registry.missing_proteins[k]) for k in np.unique(batch_codes)]
    return tuple(name for name in registry.protein_names if all(name in missing for missing in of_batches))


def _of_query(registry: Registry, obs: pd.DataFrame, batch_name: str | None, proteins: Sequence[str]) -> Registry:
    """What ``pp.setup_anndata`` would have registered; ``proteins``: those of the query."""

    def used(key: str | None) -> tuple[str, ...]:
        return used_categories(obs, key) if key in obs else ()

    batches = used(registry.batch_key) if batch_name is None else (batch_name,)
    missing = dict(zip(registry.batch_categories, registry.missing_proteins, strict=False))
    unmeasured = tuple(tuple(name for name in proteins if name in missing.get(batch, ())) for batch in batches)
    return replace(
        registry,
        protein_obsm_key=registry.protein_obsm_key if proteins else None,
        protein_names_uns_key=registry.protein_names_uns_key if proteins else None,
        protein_names=tuple(proteins),
        missing_proteins=unmeasured if any(unmeasured) else (),
        batch_categories=batches,
        labels_categories=tuple(name for name in used(registry.labels_key) if name != registry.unlabeled_category),
        covariate_categories=tuple(used(key) for key in registry.categorical_covariate_keys),
    )
