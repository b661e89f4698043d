from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext.data.registry import read_fit

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def history(adata: AnnData, key: str | None = None) -> pd.DataFrame:
    """How a fit went, epoch by epoch.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.

    Returns
    -------
    One row per epoch. ``elbo``, ``reconstruction_loss``, ``kl_z`` and ``kl_library`` per cell in nats, each for
    ``_train``
    (running average over the epoch) and ``_validation`` (held-out cells after the epoch); higher ELBO is better.
    ``kl_weight`` and ``lr`` at the last step of the epoch, ``cells_per_second``.

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
    >>> list(sx.get.history(adata).columns[:2])
    ['elbo_train', 'reconstruction_loss_train']
    """
    return read_fit(adata, key).history.copy()
