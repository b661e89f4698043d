"""What read-outs of several data sets share: one AnnData, or a mapping of them, with the same joint fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._contract import Capability
from scvi_ext._errors import listing
from scvi_ext.data.joint import trained_together
from scvi_ext.data.registry import read_fit
from scvi_ext.fitted import Fitted

if TYPE_CHECKING:
    from collections.abc import Callable


def table_of_datasets(
    adata: AnnData | Mapping[str, AnnData],
    key: str | None,
    name: str,
    row: Callable[[Fitted], dict[str, float]],
    *,
    key_added: str | None,
    copy: bool,
) -> AnnData | dict[str, AnnData] | None:
    """Write a table of float64, with a row for each data set that was given, into ``uns`` of each of them.

    ``row`` makes a row by the names of columns, which are the same for all.
    ``name`` is the attribute of :class:`~scvi_ext._keys.FitKeys` that names the slot.
    """
    several = isinstance(adata, Mapping)
    if copy:
        adata = {dataset: part.copy() for dataset, part in adata.items()} if several else adata.copy()
    parts = list(adata.values()) if several else [adata]
    opened = _open(adata if several else None, parts, key)
    first = opened[0]
    slot = first.slot("uns", getattr(first.keys, name), key_added)
    what = name.replace("_", " ")
    start = logg.info(f"computing the {what} of fit {first.fit.key!r}")
    rows = {fitted.fit.joint["dataset"]: row(fitted) for fitted in opened}
    values = np.array([list(of_one.values()) for of_one in rows.values()], dtype=np.float64)
    for part in parts:
        results.write_uns_table(part, slot, values, list(next(iter(rows.values()))), list(rows))
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, {what} (adata.uns)")
    return adata if copy else None


def check_critic(fitted: Fitted) -> None:
    """Raise a ValueError unless the fit has a critic."""
    if fitted.module.critic is None:
        msg = (
            f"Fit {fitted.fit.key!r} has no critic: it was made with kappa=0, or by scvi-tools, which keeps none. "
            "Name another fit, key=..., or look at metrics.entropy_batch_mixing."
        )
        raise ValueError(msg)


def _open(datasets: Mapping[str, AnnData] | None, parts: list[AnnData], key: str | None) -> list[Fitted]:
    """The fit in each AnnData, which must be the same in all of them, and of the data sets by these names."""
    if datasets is not None:
        _check(datasets, key)
    return [Fitted.open(part, key, capability=Capability.JOINT) for part in parts]


def _check(datasets: Mapping[str, AnnData], key: str | None) -> None:
    if not datasets:
        msg = "There are no data sets: give those of a fit by their names, {'rna': adata, 'spatial': other}."
        raise ValueError(msg)
    fits = {}
    for name, adata in datasets.items():
        if not isinstance(adata, AnnData):
            msg = f"Data set {name!r} is a {type(adata).__name__}; an AnnData is needed."
            raise TypeError(msg)
        fit = fits[name] = read_fit(adata, key)
        if fit.joint is None or fit.joint["dataset"] != name:
            is_what = "no fit of several data sets" if fit.joint is None else f"that of {fit.joint['dataset']!r}"
            msg = (
                f"The fit {fit.key!r} of data set {name!r} is {is_what}. Give data sets the names under which they "
                "were fitted, or name another fit, key=..."
            )
            raise ValueError(msg)
    first = next(iter(fits.values()))
    for name, fit in fits.items():
        if not trained_together(fit, first):
            msg = (
                f"Data set {name!r} holds another fit than {first.joint['dataset']!r}: {fit.key!r} and {first.key!r} "
                f"were not trained together. Name one that all of {listing(datasets)} share, key=..., or fit anew."
            )
            raise ValueError(msg)
