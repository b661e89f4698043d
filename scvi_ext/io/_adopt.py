"""Check a fit that was read from a file, and hand it to an AnnData."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scanpy import logging as logg

from scvi_ext import models, results
from scvi_ext._contract import Capability
from scvi_ext._errors import listing
from scvi_ext._keys import UNS, valid_key
from scvi_ext.data.checks import audit_registered, report_audits
from scvi_ext.data.joint import sizes_of
from scvi_ext.data.matrix import counts_matrix
from scvi_ext.data.registry import Registry, check_fit_matches_setup, codes, column, read_root
from scvi_ext.data.store import check_proteins, check_unique_genes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_ext._contract import SavedFit


def adopt(fit: SavedFit, adata: AnnData | None) -> SavedFit | None:
    """Return ``fit``, or write it into ``adata`` with its setup if there is none. All checks come first."""
    if adata is None:
        check_fit(fit)
        return fit
    adopt_all([(fit, adata)])
    return None


def adopt_all(pairs: Sequence[tuple[SavedFit, AnnData]]) -> None:
    """Write fits into an AnnData each, with their setups where there are none. All checks of all come first."""
    setups = [_check(fit, adata) for fit, adata in pairs]
    for (fit, adata), setup in zip(pairs, setups, strict=True):
        slots = f"\n    {fit.key!r}, the fitted model (adata.uns[{UNS.root!r}][{UNS.fits!r}])"
        if setup is not None:
            results.write_setup(adata, setup.to_uns())
            slots += f"\n    {UNS.setup!r}, what the model reads (adata.uns[{UNS.root!r}])"
        results.write_fit(adata, fit)
        logg.info(f"read a {fit.model!r} fit of {len(fit.var_names)} genes", deep=f"added{slots}")


def check_fit(fit: SavedFit) -> None:
    """Raise unless it has a name that files can hold, and is that of a module that can be built here."""
    valid_key(fit.key)
    _check_state(fit)


def _check(fit: SavedFit, adata: AnnData) -> Registry | None:
    """Raise unless ``adata`` can hold the fit; the setup to be written, where it has none."""
    registry = Registry.from_uns(fit.setup)
    check_fit(fit)
    if fit.key in read_root(adata).get(UNS.fits, {}):
        msg = f"adata already has a fit {fit.key!r}: read this one under another name, key_added=..."
        raise ValueError(msg)
    check_fit_matches_setup(fit, adata)
    _check_genes(fit, adata)
    infers_labels = Capability.LABELS in models.get(fit.model).capabilities
    _check_slots(replace(registry, labels_key=None) if infers_labels else registry, adata)
    if UNS.setup in read_root(adata):
        return None
    audits = audit_registered(adata, replace(registry, batch_key=None, labels_key=None))
    clean = report_audits(audits, "error", remarks=False)
    return replace(registry, audit="clean" if clean else None)


def _check_state(fit: SavedFit) -> None:
    """Raise a ValueError unless options and weights are those of a module that can be built here."""
    spec = models.get(fit.model)
    unknown = fit.config.keys() - {field.name for field in fields(spec.config)}
    if unknown:
        msg = (
            f"The fit {fit.key!r} has options that {fit.model!r} does not have in this version of scvi_ext: "
            f"{listing(sorted(unknown))}. If it was written by a newer version, update scvi_ext."
        )
        raise ValueError(msg)
    summary = sizes_of(fit)
    with torch.device("meta"):  # shapes only: no memory, and no draw from the global generator
        module = models.build(spec, spec.config(**fit.config), summary, fit.frozen)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: array.shape for name, array in fit.state.items()}
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": {n for n in wanted.keys() & found.keys() if wanted[n] != found[n]},
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {listing(sorted(names))}" for kind, names in problems.items() if names)
        msg = (
            f"The weights of the fit {fit.key!r} are not those of a {fit.model!r} model with its options, "
            f"{summary.n_input} genes and {summary.n_batch} batches. {listed}."
        )
        raise ValueError(msg)


def _check_genes(fit: SavedFit, adata: AnnData) -> None:
    check_unique_genes(adata)
    absent = [gene for gene in fit.var_names if gene not in adata.var_names]
    if absent:
        msg = (
            f"{len(absent)} of the {len(fit.var_names)} genes of the model are not in adata.var_names: "
            f"{listing(absent, 5)}. All of them are needed, in any order, under the same names."
        )
        raise KeyError(msg)


def _check_slots(registry: Registry, adata: AnnData) -> None:
    """Raise a KeyError for a slot that ``adata`` does not have, and a ValueError for categories new to the model.

    Labels may be others: only some models read them.
    """
    counts_matrix(adata, registry.layer, "the layer that the model reads")
    for key in (registry.labels_key, registry.size_factor_key, *registry.continuous_covariate_keys):
        if key is not None:
            column(adata.obs, key)
    for key, categories in zip(registry.categorical_covariate_keys, registry.covariate_categories, strict=True):
        codes(adata.obs, key, categories)
    batches = np.zeros(1, dtype=np.int64)
    if registry.batch_key is not None:
        batches = codes(adata.obs, registry.batch_key, registry.batch_categories)
    if registry.protein_obsm_key is not None:
        check_proteins(adata, registry, batches)
