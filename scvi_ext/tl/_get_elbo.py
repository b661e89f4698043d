from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext.functional.evidence import elbo_of_cells
from scvi_ext.tl._per_cell import per_cell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


def get_elbo(
    adata: AnnData,
    *,
    key: str | None = None,
    indices: Sequence | None = None,
    n_samples: int = 1,
    return_mean: bool = True,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> float | AnnData | None:
    """Evidence lower bound of each cell: log p(x | z, l) - KL(q(z) || p(z)) - KL(q(l) || p(l)). Higher is better.

    It never exceeds the marginal log-likelihood (:func:`~scvi_ext.tl.get_marginal_ll`) on average. For a model
    with proteins x are genes and the proteins that were measured, and the divergence of their background is taken off
    too. For a model with latent variables that all cells share (delta of AutoZI) so is their divergence, divided by the
    number of cells that were trained on.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    indices
        The cells: positions, mask or names.
    n_samples
        Posterior samples per cell.
    return_mean
        Return the mean over cells, each of them weighing the same. False: write one value per cell instead.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples.
    key_added
        Slot to write with ``return_mean=False``, ``"<key>_elbo"`` by default.
    copy
        With ``return_mean=False``: return a copy instead of changing ``adata``.

    Returns
    -------
    The mean per cell, in nats. With ``return_mean=False``: ``None``, or the changed copy, and sets

    ``adata.obs["<key>_elbo"]``
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
    >>> elbo = sx.tl.get_elbo(adata)
    >>> elbo < sx.tl.get_marginal_ll(adata, n_mc_samples=50)
    True

    References
    ----------
    Kingma and Welling (2014), Auto-encoding variational Bayes, ICLR, eq. 3.
    """
    return per_cell(
        adata,
        elbo_of_cells,
        "elbo",
        key=key,
        indices=indices,
        n_samples=n_samples,
        return_mean=return_mean,
        batch_size=batch_size,
        seed=seed,
        key_added=key_added,
        copy=copy,
    )
