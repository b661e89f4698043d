from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext.tl._marginal_ll import marginal_ll

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


def get_marginal_ll(
    adata: AnnData,
    *,
    key: str | None = None,
    indices: Sequence | None = None,
    n_mc_samples: int = 1000,
    return_mean: bool = True,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> float | AnnData | None:
    """Marginal log-likelihood log p(x) of each cell, by importance sampling from q. Higher is better.

    log p(x) is estimated by log 1/S sum_s p(x, z_s, l_s) / q(z_s, l_s | x). The estimate is too low on average, by
    less the more samples are taken. For a model with proteins x are genes and the proteins that were measured.

    Of a model with latent variables that all cells share (delta of AutoZI), cells are not independent: their mean is
    log p(x) of all of them together, divided by their number, with one draw of delta for all cells in every sample.
    Hundreds of cells in one weight leave it to few samples, so that the estimate is not far above the ELBO: compare
    fits on the same cells with as many samples. The values of single cells, ``return_mean=False``, are log p(x) of a
    cell given the posterior of delta. A count depends on one delta only, and linearly, so that they are exact at its
    mean; their sum is not what all cells have together.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    indices
        The cells: positions, mask or names.
    n_mc_samples
        Posterior samples per cell.
    return_mean
        Return the mean over cells, each of them weighing the same. False: write one value per cell instead.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples.
    key_added
        Slot to write with ``return_mean=False``, ``"<key>_marginal_ll"`` by default.
    copy
        With ``return_mean=False``: return a copy instead of changing ``adata``.

    Returns
    -------
    The mean per cell, in nats. With ``return_mean=False``: ``None``, or the changed copy, and sets

    ``adata.obs["<key>_marginal_ll"]``
        float64, one value per cell, NaN for cells that were not asked for.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        ``key_added`` or ``copy`` together with ``return_mean=True``.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_marginal_ll(adata, n_mc_samples=50) < 0
    True

    References
    ----------
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR, eq. 8.
    """
    return marginal_ll(
        adata,
        key=key,
        indices=indices,
        n_mc_samples=n_mc_samples,
        return_mean=return_mean,
        batch_size=batch_size,
        seed=seed,
        key_added=key_added,
        copy=copy,
    )
