from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext.functional.evidence import loss_at
from scvi_ext.tl._per_cell import per_cell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from torch import Tensor, nn

    from scvi_ext._contract import Minibatch


def get_reconstruction_error(
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
    """Negative log-likelihood -log p(x | z, l) of each cell at posterior samples. Lower is better.

    Its negative is the log-likelihood term of :func:`~scvi_ext.tl.get_elbo`. For a model with proteins it is that of
    genes and of the proteins that were measured.

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
        Slot to write with ``return_mean=False``, ``"<key>_reconstruction_error"`` by default.
    copy
        With ``return_mean=False``: return a copy instead of changing ``adata``.

    Returns
    -------
    The mean per cell, in nats. With ``return_mean=False``: ``None``, or the changed copy, and sets

    ``adata.obs["<key>_reconstruction_error"]``
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
    >>> sx.tl.get_reconstruction_error(adata) > 0
    True

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053.
    """
    return per_cell(
        adata,
        _reconstruction_error,
        "reconstruction_error",
        key=key,
        indices=indices,
        n_samples=n_samples,
        return_mean=return_mean,
        batch_size=batch_size,
        seed=seed,
        key_added=key_added,
        copy=copy,
    )


def _reconstruction_error(
    module: nn.Module, cells: Minibatch, noise: Tensor, shared: Sequence[Tensor | None]
) -> Tensor:
    """Mean over posterior samples, shape (B,)."""
    losses = (loss_at(module, cells, noise[:, s], draw) for s, draw in enumerate(shared))
    return sum(loss.reconstruction for loss in losses) / len(shared)
