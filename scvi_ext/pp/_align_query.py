from __future__ import annotations

import re
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from scvi_ext import results
from scvi_ext._errors import listing, number
from scvi_ext._keys import IN_QUERY, UNS
from scvi_ext.data.registry import read_root
from scvi_ext.data.store import check_unique_genes
from scvi_ext.reference import read_reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from typing import Any

    from scvi_ext._contract import SavedFit

_RENAME = " If these are the same genes by other names, rename them; if not, another reference is needed."
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?")  # with the version that some pipelines leave at the end
_GENOME = re.compile(r"(GRCh38|GRCm38|GRCm39|hg19|hg38|mm10)_+")  # what Cell Ranger puts before genes of two species


def align_query(
    adata: AnnData,
    reference: AnnData | SavedFit | str | PathLike,
    *,
    key: str | None = None,
    min_coverage: float = 0.8,
) -> AnnData:
    """A query with exactly the genes of a reference, in its order, for :func:`~scvi_ext.tl.map_query`.

    Genes are found by name. Those that the query lacks become columns of zeros, which a model cannot tell from genes
    that were measured and silent, so that cells move in its latent space: below ``min_coverage`` nothing is returned
    but an error, which says what may be wrong with the names. Genes that the reference does not know are left out.

    Parameters
    ----------
    adata
        The query.
    reference
        Annotated data with a fit or the path of its h5ad file or zarr folder, what :func:`~scvi_ext.io.read_model` or
        :func:`~scvi_ext.io.read_scvi_tools` returns, or the folder of a model, written by
        :func:`~scvi_ext.io.write_model` or by scvi-tools.
    key
        Which fit of an AnnData; the last one by default.
    min_coverage
        Smallest share of the genes of the reference that the query must have, from 0 to 1.

    Returns
    -------
    A new AnnData in memory, with ``X`` and ``layers`` as dense, sparse and typed as they were, ``obs``, ``obsm``,
    ``obsp``, ``uns`` and ``raw``. ``varm`` and ``varp`` are left out. In addition

    ``adata.var["in_query"]``
        bool, False for genes that zeros stand in for.
    ``adata.uns["scvi_ext"]["alignment"]``
        ``n_genes`` of the reference, ``n_found`` of them, ``coverage`` (their share), names of the ``missing`` and of
        the ``ignored``.

    Raises
    ------
    KeyError
        The reference has no such fit.
    TypeError
        ``adata`` or ``reference`` is of another kind.
    ValueError
        Too few genes are found, or ``adata`` has genes of the same name.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> reference = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(reference, batch_key="batch")
    >>> sx.tl.fit(reference, max_epochs=2)
    >>> query = sx.datasets.pbmc68k_counts()[:100, ::-1][:, 50:]
    >>> query = sx.pp.align_query(query, reference)
    >>> query.shape, int(query.var["in_query"].sum())
    ((100, 765), 715)
    """
    from scanpy import logging as logg

    if not isinstance(adata, AnnData):
        msg = f"adata is a {type(adata).__name__}; an AnnData is needed."
        raise TypeError(msg)
    if not 0 <= number("min_coverage", min_coverage) <= 1:
        msg = f"min_coverage={min_coverage!r} is a share of the genes: it must lie between 0 and 1."
        raise ValueError(msg)
    genes = pd.Index(read_reference(reference, key).var_names.astype(str))
    root = read_root(adata)
    check_unique_genes(adata)
    measured = adata.var_names
    if UNS.alignment in root and IN_QUERY in adata.var:  # zeros of an earlier alignment are no measurement either
        measured = measured[adata.var[IN_QUERY].to_numpy(bool)]
    found = genes.isin(measured)
    missing, ignored = genes[~found], measured[~measured.isin(genes)]
    coverage = found.mean()
    advice = "" if found.all() else _advice(adata, measured, genes)
    if coverage < min_coverage or not found.any():
        asked = f", and min_coverage={min_coverage:g} asks for more" if found.any() else ""
        msg = (
            f"{found.sum()} of the {len(genes)} genes of the reference are in adata.var_names ({coverage:.0%}){asked}. "
            f"Missing: {listing(missing, 5)}; the query has: {listing(ignored, 5)}.{advice or _RENAME}"
        )
        raise ValueError(msg)

    start = logg.info(f"aligning {adata.n_vars} genes with the {len(genes)} of the reference")
    adata = adata.to_memory() if adata.isbacked else adata.copy() if adata.is_view else adata
    aligned = _with_genes(adata, genes)
    report = {
        "n_genes": len(genes),
        "n_found": int(found.sum()),
        "coverage": float(coverage),
        "missing": missing.to_numpy(dtype=object),
        "ignored": ignored.to_numpy(dtype=object),
    }
    results.write_alignment(aligned, report, found)
    logg.info(
        f"    found {found.sum()} ({coverage:.1%}); ignored {len(ignored)} others: {listing(ignored)}",
        time=start,
        deep=f"added\n    {IN_QUERY!r}, whether a gene was measured (adata.var)\n    {UNS.alignment!r}, this report "
        f"(adata.uns[{UNS.root!r}])",
    )
    if len(missing):
        logg.warning(f"zeros stand in for {len(missing)} genes that the query lacks: {listing(missing)}.{advice}")
    return aligned


def _advice(adata: AnnData, measured: pd.Index, genes: pd.Index) -> str:
    """What would find more genes, or an empty string."""
    n_found = genes.isin(measured).sum()

    def finds_more(names: Sequence[str]) -> int:
        """How many genes these names would find, if that is more."""
        n = int(genes.isin(pd.Index(names).astype(str)).sum())
        return n if n > n_found else 0

    columns = {str(name): finds_more(values.dropna()) for name, values in adata.var.items()}
    best = max(columns, key=columns.get, default=None)
    if best is not None and columns[best]:
        return (
            f" adata.var[{best!r}] has {columns[best]} of them: adata.var_names = adata.var[{best!r}].astype(str), and "
            "if they are not unique adata.var_names_make_unique()."
        )
    if adata.raw is not None and (n := finds_more(adata.raw.var_names)):
        return f" adata.raw has {n} of them: if it holds raw counts, pass adata.raw.to_adata()."
    theirs, ours = (_share(_ENSEMBL, names) for names in (genes, measured))
    if max(theirs, ours) > 0.5 > min(theirs, ours):
        ids, symbols = ("reference", "query") if theirs > ours else ("query", "reference")
        return f" The {ids} names its genes by Ensembl ids, and the {symbols} does not: translate one into the other."
    for rule, change in _SPELLINGS.items():
        n = int(genes.map(change).isin(measured.map(change)).sum())
        if n > n_found:
            return f" With another spelling {n} would be found: {rule}."
    return ""


def _share(pattern: re.Pattern, names: pd.Index) -> float:
    return float(np.mean([pattern.fullmatch(str(name)) is not None for name in names])) if len(names) else 0.0


def _without_version(name: str) -> str:
    return name.partition(".")[0] if _ENSEMBL.fullmatch(name) else name


_SPELLINGS = {
    "Ensembl ids differ in their versions (what follows the dot), so leave them out of both": _without_version,
    "names differ in the genome that stands before them, so leave it out of both": lambda name: _GENOME.sub("", name),
    "names differ in upper and lower case. If the species differ (Cd3e of the mouse, CD3E of man), translate genes to "
    "their homologues": str.lower,
    "names differ in blanks around them": str.strip,
}


def _with_genes(adata: AnnData, genes: pd.Index) -> AnnData:
    """The same cells with these genes, zeros for those that are not there."""
    positions = adata.var_names.get_indexer(genes)
    raw = adata.raw
    return AnnData(
        X=None if adata.X is None else _columns(adata.X, positions, "X"),
        obs=adata.obs.copy(),
        var=_var(adata.var, genes),
        uns=deepcopy(dict(adata.uns)),
        obsm={name: values.copy() for name, values in adata.obsm.items()},
        obsp={name: values.copy() for name, values in adata.obsp.items()},
        layers={name: _columns(values, positions, f"layers[{name!r}]") for name, values in adata.layers.items()},
        raw=None if raw is None else {"X": raw.X.copy(), "var": raw.var.copy(), "varm": dict(raw.varm)},
    )


def _columns(matrix: Any, positions: np.ndarray, slot: str) -> Any:
    """The columns at these positions, zeros for -1, in the format and type of ``matrix``."""
    if sp.issparse(matrix):
        zeros = sp.csr_matrix((matrix.shape[0], 1), dtype=matrix.dtype)
        return sp.hstack([matrix, zeros], format=matrix.format, dtype=matrix.dtype)[:, positions]
    if not isinstance(matrix, np.ndarray):
        msg = f"adata.{slot} is a {type(matrix).__name__}; a NumPy array or a SciPy sparse matrix is needed."
        raise TypeError(msg)
    columns = np.zeros((matrix.shape[0], len(positions)), dtype=matrix.dtype)
    columns[:, positions >= 0] = matrix[:, positions[positions >= 0]]
    return columns


def _var(var: pd.DataFrame, genes: pd.Index) -> pd.DataFrame:
    """The rows of these genes, in types that files can hold: flags are False where there is no such gene, others NA."""
    rows = var.reindex(genes)
    flags = [name for name, dtype in var.dtypes.items() if dtype.kind == "b" and isinstance(dtype, np.dtype)]
    rows[flags] = var[flags].reindex(genes, fill_value=False)
    nullable = {"i": "Int64", "u": "UInt64"}
    changed = {
        name: nullable[dtype.kind]
        for name, dtype in var.dtypes.items()
        if dtype.kind in nullable and rows[name].dtype != dtype
    }
    return rows.astype(changed)
