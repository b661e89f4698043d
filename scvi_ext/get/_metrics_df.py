from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext._errors import missing_key
from scvi_ext._keys import METRICS

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def metrics_df(adata: AnnData, key: str | None = None) -> pd.DataFrame:
    """Table of metrics that :func:`scvi_ext.metrics.table` has written.

    Parameters
    ----------
    adata
        Annotated data that holds the table.
    key
        Its slot in ``uns``, ``"scvi_ext_metrics"`` by default.

    Returns
    -------
    Representations x metrics, float64.

    Raises
    ------
    KeyError
        No such table.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_latent(adata)
    >>> sx.metrics.table(adata)
    >>> sx.get.metrics_df(adata).index.tolist()
    ['X_scvi']
    """
    key = METRICS if key is None else key
    if key not in adata.uns:
        if key == METRICS:
            msg = f"adata.uns has no {key!r}: call scvi_ext.metrics.table(adata) first."
            raise KeyError(msg)
        raise missing_key("adata.uns", key, adata.uns)
    if "table" not in adata.uns[key]:
        msg = f"adata.uns[{key!r}] has no table of metrics: scvi_ext.metrics.table has not written it."
        raise KeyError(msg)
    return adata.uns[key]["table"].copy()
