from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext.fitted import Fitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws


def get_library_size(
    adata: AnnData,
    *,
    key: str | None = None,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """The number that multiplies each cell's profile: observed total, posterior mean of a latent one, or size factor.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    indices
        The cells: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    key_added
        Slot to write, ``"<key>_library_size"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.obs["<key>_library_size"]``
        float32, in counts. Of a latent library the mean of exp(l), l ~ N(m, s^2), which is exp(m + s^2 / 2).

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2, library="latent")
    >>> sx.tl.get_library_size(adata)
    >>> bool((adata.obs["scvi_library_size"] > 0).all())
    True
    """
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices, decodes=False)
    slot = fitted.slot("obs", fitted.keys.library_size, key_added)
    module = fitted.module

    def library_size(cells: Minibatch, draws: Draws) -> np.ndarray:
        ql = module.encode_library(cells)
        log_mean = module.library.point(cells) if ql is None else ql.loc + 0.5 * ql.scale**2
        return (torch.exp(log_mean).squeeze(-1),)

    start = logg.info(f"computing library sizes from fit {fitted.fit.key!r}")
    values = np.concatenate([part for _, (part,) in fitted.map(library_size, batch_size=batch_size, seed=0)])
    results.write_obs(adata, slot, values, fitted.rows)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, library size (adata.obs)")
    return adata if copy else None
