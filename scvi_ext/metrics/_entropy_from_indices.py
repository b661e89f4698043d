from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext.metrics import arrays
from scvi_ext.metrics._cells import leave_out, obs_codes, obs_key

if TYPE_CHECKING:
    from anndata import AnnData


def entropy_from_indices(adata: AnnData, labels_key: str | None = None) -> float:
    """Entropy of the shares of the categories of a column: how evenly cells are spread over them.

    Of the batch, it is what :func:`entropy_batch_mixing` tends to with perfect mixing. Cells without a value are left
    out, and the log says how many.

    Parameters
    ----------
    adata
        Annotated data.
    labels_key
        Column of ``obs``, the registered labels by default.

    Returns
    -------
    Nats, from 0 (one category) to the logarithm of the number of categories (all of one size).

    Raises
    ------
    KeyError
        No such column.
    ValueError
        No labels are registered, or they are missing everywhere.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> round(sx.metrics.entropy_from_indices(adata, "batch"), 2)
    2.08
    """
    key = obs_key(adata, "labels_key", labels_key)
    codes = obs_codes(adata, key)
    return arrays.entropy_from_indices(codes[leave_out(codes >= 0, f"a value of {key!r} (adata.obs)")])
