from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from scvi_ext._errors import listing, one_of
from scvi_ext._keys import UNS, FitKeys
from scvi_ext.data.registry import read_root

if TYPE_CHECKING:
    from typing import Any

    import pandas as pd
    from anndata import AnnData

_TABLES = ("trials", "progress")


def tuning_df(
    adata: AnnData, key: str | None = None, *, table: Literal["trials", "progress"] = "trials"
) -> pd.DataFrame:
    """What a search for options has tried, as a table.

    Parameters
    ----------
    adata
        Annotated data that :func:`~scvi_ext.tl.tune` has written to.
    key
        Which search, by the name of its fit; that of the last fit, or the only one, by default.
    table
        The ``"trials"``, or their ``"progress"`` from percent to percent of their plan.

    Returns
    -------
    The table, a copy, with columns as :func:`~scvi_ext.tl.tune` describes them.

    Raises
    ------
    KeyError
        There is no such search.
    ValueError
        Unknown table.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.tune(adata, space={"n_latent": [5, 10]}, n_trials=2, max_epochs=1, seed=1)
    >>> sx.get.tuning_df(adata)["state"].tolist()
    ['complete', 'complete']
    """
    one_of("table", table, _TABLES)
    return _read_search(adata, key)[table].copy()


def tuning_params(adata: AnnData, key: str | None = None) -> dict[str, Any]:
    """What a search for options was about, and which trial was best.

    Parameters
    ----------
    adata
        Annotated data that :func:`~scvi_ext.tl.tune` has written to.
    key
        Which search, by the name of its fit; that of the last fit, or the only one, by default.

    Returns
    -------
    A dictionary: ``model``, ``metric``, ``direction``, ``space``, ``options`` (those that all trials had in common and
    that are not the defaults), ``data`` (what tells the cells from others), ``seed``, ``n_trials``, ``prune``,
    ``study_name``, ``best_trial`` and its ``best_value``.

    Raises
    ------
    KeyError
        There is no such search.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.tune(adata, space={"n_latent": [5, 10]}, n_trials=2, max_epochs=1)
    >>> sx.get.tuning_params(adata)["metric"]
    'elbo'
    """
    return dict(_read_search(adata, key)["params"])


def _read_search(adata: AnnData, key: str | None) -> Mapping[str, Any]:
    end = FitKeys("").tuning
    searches = {name.removesuffix(end): of for name, of in adata.uns.items() if name.endswith(end) and _is_search(of)}
    if key is None:
        key = read_root(adata).get(UNS.last_fit)
        if key not in searches and len(searches) == 1:
            (key,) = searches
    if key not in searches:
        found = f"there are those called {listing(searches)}: key=..." if searches else "call scvi_ext.tl.tune first"
        msg = f"adata.uns has no search for the fit {key!r}; {found}."
        raise KeyError(msg)
    return searches[key]


def _is_search(value: object) -> bool:
    return isinstance(value, Mapping) and value.keys() >= {*_TABLES, "params"}
