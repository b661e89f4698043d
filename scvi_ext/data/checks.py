"""What an AnnData must be before a model reads it: raw counts, and complete columns of categories."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from scvi_ext._errors import warn
from scvi_ext.data.audit import CountAudit, audit_counts
from scvi_ext.data.disk import check_chunks
from scvi_ext.data.matrix import counts_matrix
from scvi_ext.data.registry import check_complete, codes, column, used_categories
from scvi_ext.data.store import known_proteins, protein_matrix

if TYPE_CHECKING:
    from anndata import AnnData

    from scvi_ext.data.registry import Registry

_MAX_FLOAT_CATEGORIES = 100  # a column of floats with more values is a measurement, not a category


def complete_categories(obs: pd.DataFrame, key: str, advice: str = "") -> tuple[str, ...]:
    """The categories that occur in ``obs[key]``; a ValueError where values are missing or are measurements."""
    values = column(obs, key)
    check_complete(obs, key, advice)
    categories = used_categories(obs, key)
    if pd.api.types.is_float_dtype(values.dtype) and len(categories) > _MAX_FLOAT_CATEGORIES:
        msg = (
            f"adata.obs[{key!r}] has dtype {values.dtype} and {len(categories)} different values: it looks continuous, "
            "and categories are needed. Pass it in continuous_covariate_keys, or convert it to strings if each value "
            "is a category."
        )
        raise ValueError(msg)
    return categories


def audit_registered(adata: AnnData, registry: Registry) -> dict[str, CountAudit]:
    """One audit per matrix of counts, under the name of its slot."""
    batch = None
    if registry.batch_key is not None:
        batch_index = codes(adata.obs, registry.batch_key, registry.batch_categories)
        batch = pd.Categorical.from_codes(batch_index, categories=registry.batch_categories)
    slot = "adata.X" if registry.layer is None else f"adata.layers[{registry.layer!r}]"
    matrix = counts_matrix(adata, registry.layer)
    check_chunks(matrix)
    audits = {slot: audit_counts(matrix, adata.var_names, adata.obs_names, batch)}
    present = known_proteins(adata, registry)
    if present:
        proteins = protein_matrix(adata, registry, present)
        audit = audit_counts(proteins, present, adata.obs_names, batch, feature="protein")
        audits[f"adata.obsm[{registry.protein_obsm_key!r}]"] = audit
    return audits


def report_audits(audits: dict[str, CountAudit], check: str, *, remarks: bool = True) -> bool:
    """Raise or warn about what is wrong, and say whether nothing is; ``remarks``: also warn of what is of no use."""
    problems = [f"{slot}: {problem}" for slot, audit in audits.items() for problem in audit.problems()]
    if problems and check == "error":
        raise ValueError("These are not raw counts.\n- " + "\n- ".join(problems))
    unusable = [f"{slot}: {problem}" for slot, audit in audits.items() for problem in _unusable(audit)]
    if unusable:
        raise ValueError("These are no counts, and check='warn' does not make them so.\n- " + "\n- ".join(unusable))
    remarked = [f"{slot}: {remark}" for slot, audit in audits.items() for remark in audit.remarks()] if remarks else []
    for message in problems + remarked:
        warn(message)
    return not problems


def _unusable(audit: CountAudit) -> list[str]:
    """What no estimate of proteins is either: of genes, a fit leaves out the cells that have it, and says so."""
    if audit.feature != "protein":
        return []
    kinds = {"missing", "infinite", "negative"}
    return replace(audit, offences=tuple(o for o in audit.offences if o.kind in kinds)).impossible_entries()
