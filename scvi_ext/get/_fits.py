from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scvi_ext._keys import UNS
from scvi_ext.data.registry import read_fit, read_root

if TYPE_CHECKING:
    from anndata import AnnData


def fits(adata: AnnData) -> pd.DataFrame:
    """What is fitted: one row per fit.

    Parameters
    ----------
    adata
        Annotated data.

    Returns
    -------
    Indexed by key, with the columns ``model``, ``genes``, ``parameters`` (numbers of them), ``epochs``,
    ``stop_reason``,
    ``elbo_validation`` (per cell, after the last epoch; NaN without held-out cells), ``resumable`` and ``last``
    (whether it is the one that read-outs take by default). Empty if nothing is fitted.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.get.fits(adata)["model"].to_dict()
    {'scvi': 'scvi'}
    """
    root = read_root(adata)
    rows = {}
    for key in sorted(root.get(UNS.fits, {})):
        fit = read_fit(adata, key)
        elbo = fit.history.get("elbo_validation")
        rows[key] = {
            "model": fit.model,
            "genes": len(fit.var_names),
            "parameters": sum(array.size for array in fit.state.values()),
            "epochs": len(fit.history),
            "stop_reason": fit.status.get("stop_reason", ""),
            "elbo_validation": float("nan") if elbo is None or elbo.empty else float(elbo.iloc[-1]),
            "resumable": fit.checkpoint is not None,
            "last": key == str(root.get(UNS.last_fit)),
        }
    columns = ["model", "genes", "parameters", "epochs", "stop_reason", "elbo_validation", "resumable", "last"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.rename_axis("key")
