"""A table of what is registered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scvi_ext.data.registry import read_setup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_SHOWN = 5


def setup(adata: AnnData) -> pd.DataFrame:
    """Show what :func:`scvi_ext.pp.setup_anndata` has registered.

    Parameters
    ----------
    adata
        Annotated data that has been set up.

    Returns
    -------
    A table with one row per registered entry: ``field`` (what it is), ``slot`` (where it is), ``key`` (what it is
    called there), ``n_categories`` (Int64; for proteins their number) and ``categories`` (the first five names, a
    string). Nothing is written.

    Raises
    ------
    KeyError
        ``adata`` has not been set up.

    Examples
    --------
    >>> import numpy as np, anndata as ad
    >>> import scvi_ext as sx
    >>> adata = ad.AnnData(np.random.default_rng(0).poisson(2.0, (100, 20)).astype("float32"))
    >>> sx.pp.setup_anndata(adata)
    >>> sx.get.setup(adata)[["field", "slot", "key"]]
        field slot key
    0  counts    X   X
    """
    registry = read_setup(adata)
    unlabeled = () if registry.unlabeled_category is None else (registry.unlabeled_category,)
    entries: list[tuple[str, str, str | None, tuple[str, ...] | None]] = [
        ("counts", "X" if registry.layer is None else "layers", registry.layer or "X", None),
        ("batch", "obs", registry.batch_key, registry.batch_categories),
        ("labels", "obs", registry.labels_key, registry.labels_categories),
        ("unlabeled category", "obs", registry.labels_key if unlabeled else None, unlabeled),
        ("size factor", "obs", registry.size_factor_key, None),
        *(
            ("categorical covariate", "obs", key, categories)
            for key, categories in zip(registry.categorical_covariate_keys, registry.covariate_categories, strict=True)
        ),
        *(("continuous covariate", "obs", key, None) for key in registry.continuous_covariate_keys),
        ("protein", "obsm", registry.protein_obsm_key, registry.protein_names),
    ]
    rows = [
        (field, slot, key, None if names is None else len(names), _short(names or ()))
        for field, slot, key, names in entries
        if key is not None
    ]
    table = pd.DataFrame(rows, columns=["field", "slot", "key", "n_categories", "categories"])
    return table.astype({"n_categories": "Int64"})


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
