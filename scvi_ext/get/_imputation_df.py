from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from scvi_ext._errors import one_of
from scvi_ext._keys import FitKeys
from scvi_ext.data.registry import read_fit

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_TABLES = ("scores", "genes", "entries")


def imputation_df(
    adata: AnnData,
    key: str | None = None,
    *,
    table: Literal["scores", "genes", "entries"] = "scores",
    slot: str | None = None,
) -> pd.DataFrame:
    """Errors of imputed counts as a table.

    Parameters
    ----------
    adata
        Annotated data that :func:`~scvi_ext.tl.imputation_score` has written to.
    key
        Which fit; the last one by default.
    table
        ``"scores"`` of each method, median errors of ``"genes"``, or the ``"entries"`` themselves.
    slot
        Entry of ``uns`` instead of ``"<key>_imputation"``, where ``key_added`` was given.

    Returns
    -------
    The table, a copy, with columns as :func:`~scvi_ext.tl.imputation_score` describes them.

    Raises
    ------
    KeyError
        No such fit, or nothing has been imputed by it.
    ValueError
        ``key`` has no effect beside ``slot``.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.corrupt(adata)
    >>> sx.pp.setup_anndata(adata, layer="corrupted")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.imputation_score(adata, baselines=False)
    >>> sx.get.imputation_df(adata).columns.tolist()
    ['median', 'mean', 'median_per_cell', 'median_per_gene']
    """
    one_of("table", table, _TABLES)
    if slot is not None and key is not None:
        msg = f"key={key!r} has no effect beside slot={slot!r}: leave one of them out."
        raise ValueError(msg)
    if slot is None:
        slot = FitKeys(read_fit(adata, key).key).imputation
    if slot not in adata.uns:
        msg = f"adata.uns has no {slot!r}: call scvi_ext.tl.imputation_score(adata) first."
        raise KeyError(msg)
    if not isinstance(adata.uns[slot], Mapping) or not adata.uns[slot].keys() >= set(_TABLES):
        msg = f"adata.uns[{slot!r}] has no errors of imputed counts: scvi_ext.tl.imputation_score has not written it."
        raise KeyError(msg)
    return adata.uns[slot][table].copy()
