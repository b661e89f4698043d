from __future__ import annotations

from typing import TYPE_CHECKING

from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._contract import Capability
from scvi_ext._keys import FitKeys, valid_key
from scvi_ext.fitted import load_module, require

if TYPE_CHECKING:
    from anndata import AnnData


def get_loadings(
    adata: AnnData, *, key: str | None = None, key_added: str | None = None, copy: bool = False
) -> AnnData | None:
    """Weight of each latent unit on each gene, from a fit with a linear decoder.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    key_added
        Slot to write, ``"<key>_loadings"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.varm["<key>_loadings"]``
        float32, genes x n_latent, on the scale of the logits of the profile and corrected for batch normalisation;
        genes that the fit does not know are NaN.

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
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, "ldvae", max_epochs=2)
    >>> sx.tl.get_loadings(adata)
    >>> adata.varm["ldvae_loadings"].shape
    (765, 10)

    References
    ----------
    Svensson et al. (2020), Bioinformatics 36, 3418.
    """
    adata = adata.copy() if copy else adata
    fit, _, _, module = load_module(adata, key)
    require(Capability.LOADINGS, fit)
    slot = FitKeys(fit.key).loadings if key_added is None else valid_key(key_added)
    columns = adata.var_names.get_indexer(fit.var_names)
    present = columns >= 0
    results.write_varm(adata, slot, module.get_loadings().numpy()[present], columns[present])
    logg.info(f"read loadings of fit {fit.key!r}", deep=f"added\n    {slot!r}, loadings (adata.varm)")
    return adata if copy else None
