from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext.fitted import load_module

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import nn


def model(adata: AnnData, key: str | None = None) -> nn.Module:
    """The torch module of a fit, in evaluation mode on the host: a copy, changing it does not change the fit.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.

    Returns
    -------
    One of the classes in :mod:`scvi_ext.models`.

    Raises
    ------
    KeyError
        No such fit.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> type(sx.get.model(adata)).__name__
    'VAE'
    """
    return load_module(adata, key)[3]
