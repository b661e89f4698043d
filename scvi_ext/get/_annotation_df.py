from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from scvi_ext._errors import missing_key, one_of
from scvi_ext._keys import ANNOTATION

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_TABLES = ("scores", "recall")


def annotation_df(
    adata: AnnData, key: str | None = None, *, table: Literal["scores", "recall"] = "scores"
) -> pd.DataFrame:
    """Table of classifiers that :func:`scvi_ext.metrics.annotation_baselines` has written.

    Parameters
    ----------
    adata
        Annotated data that holds the table.
    key
        Its slot in ``uns``, ``"scvi_ext_annotation"`` by default.
    table
        ``"scores"``, methods x scores, or ``"recall"``, labels x methods.

    Returns
    -------
    The table, a copy, float64.

    Raises
    ------
    KeyError
        No such table.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> adata.obs["known"] = adata.obs["bulk_labels"].astype(str).where(adata.obs["batch"] != "1", "unknown")
    >>> sx.pp.setup_anndata(adata, labels_key="known", unlabeled_category="unknown")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_latent(adata)
    >>> sx.metrics.annotation_baselines(adata, "bulk_labels", classifiers={})
    >>> sx.get.annotation_df(adata).columns.tolist()
    ['accuracy', 'mean_recall', 'worst_recall', 'expected_calibration_error', 'seconds']
    """
    one_of("table", table, _TABLES)
    key = ANNOTATION if key is None else key
    if key not in adata.uns:
        if key == ANNOTATION:
            msg = f"adata.uns has no {key!r}: call scvi_ext.metrics.annotation_baselines(adata, ...) first."
            raise KeyError(msg)
        raise missing_key("adata.uns", key, adata.uns)
    if not isinstance(adata.uns[key], Mapping) or not adata.uns[key].keys() >= set(_TABLES):
        msg = (
            f"adata.uns[{key!r}] has no table of classifiers: scvi_ext.metrics.annotation_baselines has not written it."
        )
        raise KeyError(msg)
    return adata.uns[key][table].copy()
