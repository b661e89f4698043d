from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scvi_ext._contract import Capability
from scvi_ext.fitted import load_module, require

if TYPE_CHECKING:
    from anndata import AnnData


def loadings_df(adata: AnnData, key: str | None = None) -> pd.DataFrame:
    """Loadings of a fit with a linear decoder as a table.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.

    Returns
    -------
    Genes x latent units ``Z_0``, ``Z_1``, ..., float32, as :func:`~scvi_ext.tl.get_loadings` writes them.

    Raises
    ------
    KeyError
        No such fit.
    ValueError
        The fitted model has no loadings.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, "ldvae", max_epochs=2)
    >>> sx.get.loadings_df(adata).shape
    (765, 10)
    """
    fit, _, _, module = load_module(adata, key)
    require(Capability.LOADINGS, fit)
    loadings = module.get_loadings().numpy()
    return pd.DataFrame(loadings, index=fit.var_names, columns=[f"Z_{i}" for i in range(loadings.shape[1])])
