from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext._errors import listing, missing_key
from scvi_ext._keys import FitKeys
from scvi_ext.data.registry import read_fit

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_TABLES = ("genes", "cells", "calibration")


def posterior_predictive(adata: AnnData, key: str | None = None) -> dict[str, pd.DataFrame]:
    """Tables of a posterior predictive check.

    Parameters
    ----------
    adata
        Annotated data on which :func:`~scvi_ext.tl.posterior_predictive_check` was called.
    key
        Which fit, or the ``key_added`` of the check; the last fit by default.

    Returns
    -------
    Copies of ``"genes"``, ``"cells"`` and ``"calibration"``.

    Raises
    ------
    KeyError
        No such fit or check, or something else has that name.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.posterior_predictive_check(adata, n_samples=2)
    >>> sx.get.posterior_predictive(adata)["genes"].shape
    (765, 12)
    """
    slot = FitKeys(read_fit(adata).key if key is None else key).posterior_predictive
    slot = key if slot not in adata.uns and key in adata.uns else slot
    checks = [name for name, value in adata.uns.items() if isinstance(value, dict) and value.keys() >= set(_TABLES)]
    if slot in adata.uns and slot not in checks:
        msg = f"adata.uns[{slot!r}] is no posterior predictive check; adata.uns has these: {listing(checks)}."
        raise KeyError(msg)
    if slot not in checks:
        raise missing_key("adata.uns (call tl.posterior_predictive_check first)", slot, checks)
    return {name: adata.uns[slot][name].copy() for name in _TABLES}
