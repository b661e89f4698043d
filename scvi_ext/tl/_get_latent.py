from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._contract import Capability
from scvi_ext._errors import one_of, whole_number
from scvi_ext.fitted import Fitted, require
from scvi_ext.tl._iterate import check_iterate
from scvi_ext.tl._latent import latent_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from anndata import AnnData


def get_latent(
    adata: AnnData,
    *,
    key: str | None = None,
    latent: Literal["z", "z2"] = "z",
    give_mean: bool = True,
    mc_samples: int = 5000,
    return_dist: bool = False,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    iterate: bool = False,
    copy: bool = False,
) -> AnnData | Iterator[tuple[slice, np.ndarray]] | None:
    """Latent representation of each cell, ready for ``sc.pp.neighbors(adata, use_rep="X_scvi")``.

    Genes are found by name, so new cells with the same genes in another order work too.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    latent
        ``"z"``: what counts are decoded from. ``"z2"``: of scANVI, what the label leaves unexplained of it, given the
        label of a cell, or the most probable one.
    give_mean
        The mean of q(z | x). False: one posterior sample.
    mc_samples
        Posterior samples for the mean of a logistic normal (``latent_distribution="ln"``), which has no closed form.
        Without effect on a normal one, whose mean is exact.
    return_dist
        Write location and variance of q(z | x) instead (of a logistic normal: before the softmax).
    indices
        The cells: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples.
    key_added
        Slot to write, ``"X_<key>"`` by default.
    iterate
        Write nothing, and return the values of one stretch of cells after the other as they are computed.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.obsm["X_<key>"]``
        float32, cells x n_latent.
    ``adata.obsm["X_<key>_z2"]``
        The same, in its place; with ``latent="z2"``.
    ``adata.obsm["X_<key>_var"]``
        float32, cells x n_latent; with ``return_dist`` only.

    With ``iterate``: an iterator over pairs of a slice (of all cells, or of ``indices``) and the values of these cells,
    float32, (cells, n_latent); with ``return_dist`` location and variance, each in an array.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        ``give_mean=False`` together with ``return_dist=True``, ``iterate`` together with ``key_added`` or ``copy``, or
        the model has no ``latent="z2"``.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_latent(adata)
    >>> adata.obsm["X_scvi"].shape
    (700, 10)
    """
    if return_dist and not give_mean:
        msg = "give_mean=False asks for a sample and return_dist=True for the distribution: choose one."
        raise ValueError(msg)
    check_iterate(iterate, copy=copy, key_added=key_added)
    whole_number("mc_samples", mc_samples, 1)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices, decodes=False)
    one_of("latent", latent, ("z", "z2"))
    second = latent == "z2"
    if second:
        require(Capability.Z2, fitted.fit)
    slot = fitted.slot("obsm", fitted.keys.z2 if second else fitted.keys.latent, key_added)
    start = logg.info(f"computing the latent representation of fit {fitted.fit.key!r}")
    blocks = latent_blocks(
        fitted,
        second=second,
        give_mean=give_mean,
        mc_samples=mc_samples,
        return_dist=return_dist,
        batch_size=batch_size,
        seed=seed,
    )
    if iterate:
        return ((cells, arrays if return_dist else arrays[0]) for cells, arrays in blocks)
    names = [slot, f"{slot}_var"] if return_dist else [slot]
    results.write_obsm_blocks(adata, names, blocks, fitted.rows)
    listed = ", ".join(map(repr, names))
    logg.info("    finished", time=start, deep=f"added\n    {listed}, latent representation (adata.obsm)")
    return adata if copy else None
