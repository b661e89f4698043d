"""What was set up and what was fitted, as plain data read back from ``adata.uns["scvi_ext"]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_ext._contract import DataSummary, ProteinSummary, SavedFit
from scvi_ext._errors import listing, missing_key
from scvi_ext._keys import FORMAT, NONE, UNS

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOT_SLOTS = (
    "batch_categories",
    "labels_categories",
    "covariate_categories",
    "protein_names",
    "protein_names_uns_key",
    "missing_proteins",
    "audit",
)
_NESTED = ("covariate_categories", "missing_proteins")  # tuples of tuples of strings
_UNKNOWN = -2  # never leaves this module: -1 already means unlabelled


@dataclass(frozen=True)
class Registry:
    """What ``pp.setup_anndata`` wrote. Categories are the strings of the values, in the order of their codes."""

    layer: str | None = None
    batch_key: str | None = None
    labels_key: str | None = None
    unlabeled_category: str | None = None
    size_factor_key: str | None = None
    categorical_covariate_keys: tuple[str, ...] = ()
    continuous_covariate_keys: tuple[str, ...] = ()
    protein_obsm_key: str | None = None
    protein_names_uns_key: str | None = None  # of an array; None where a table has them, or there are none
    protein_names: tuple[str, ...] = ()
    batch_categories: tuple[str, ...] = ()  # () when batch_key is None
    labels_categories: tuple[str, ...] = ()  # without the unlabelled category
    covariate_categories: tuple[tuple[str, ...], ...] = ()  # one tuple per categorical covariate
    missing_proteins: tuple[tuple[str, ...], ...] = ()  # not measured, one tuple per batch; () where all are everywhere
    audit: str | None = None  # "clean" where the counts were raw counts when they were registered

    def to_uns(self) -> dict[str, Any]:
        """As a dict that h5ad and zarr can hold: strings and arrays of strings; what is absent is left out."""
        # Never empty: ad.concat drops empty dicts from uns.
        uns: dict[str, Any] = {"counts": "X" if self.layer is None else "layers"}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or value == ():
                continue
            if field.name in _NESTED:
                # By position: names of columns may contain "/", which h5ad does not allow in a key.
                uns[field.name] = {str(i): np.array(names, dtype=np.str_) for i, names in enumerate(value)}
            else:
                uns[field.name] = value if isinstance(value, str) else np.array(value)
        return uns

    @classmethod
    def from_uns(cls, mapping: Mapping[str, Any]) -> Registry:
        """From what :meth:`to_uns` gave, also after a round trip through h5ad or zarr."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in mapping:
                continue
            value = mapping[field.name]
            if field.name in _NESTED:
                values[field.name] = tuple(_strings(value[str(i)]) for i in range(len(value)))
            else:
                values[field.name] = str(value) if field.default is None else _strings(value)
        return cls(**values)

    def sizes(self, n_input: int) -> DataSummary:
        """Sizes of a module for ``n_input`` genes; the prior of the library is left at zero, to be filled in."""
        n_batch = max(1, len(self.batch_categories))
        return DataSummary(
            n_input=n_input,
            n_batch=n_batch,
            n_labels=len(self.labels_categories),
            n_cats_per_cov=tuple(len(categories) for categories in self.covariate_categories),
            n_continuous_cov=len(self.continuous_covariate_keys),
            library_log_means=(0.0,) * n_batch,
            library_log_vars=(0.0,) * n_batch,
            proteins=self._proteins(n_batch) if self.protein_obsm_key is not None else None,
        )

    def _proteins(self, n_batch: int) -> ProteinSummary:
        """The same of proteins: their background is left at zero."""
        missing = self.missing_proteins or ((),) * n_batch
        return ProteinSummary(
            n_proteins=len(self.protein_names),
            protein_batch_mask=tuple(tuple(name not in names for name in self.protein_names) for names in missing),
            background_means=((0.0,) * len(self.protein_names),) * n_batch,
            background_scales=((1.0,) * len(self.protein_names),) * n_batch,
        )

    def read_by(self, columns: frozenset[str]) -> Registry:
        """What a model that reads these optional columns sees of it: no labels or proteins that it does not read."""
        read = self
        if "labels" not in columns:
            read = replace(read, labels_key=None, unlabeled_category=None, labels_categories=())
        if "protein" not in columns:
            unread = {"protein_obsm_key": None, "protein_names_uns_key": None}
            read = replace(read, **unread, protein_names=(), missing_proteins=())
        return read


def _strings(values: Any) -> tuple[str, ...]:
    return tuple(str(v) for v in np.atleast_1d(np.asarray(values, dtype=object)))


def _plain(value: Any) -> Any:
    """Python's own types for the NumPy ones that h5ad, zarr and copies of ``uns`` hand back."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist()) if value.dtype == object else value.tolist()
    return value


def read_root(adata: AnnData) -> Mapping[str, Any]:
    """``adata.uns["scvi_ext"]``, or an empty mapping; a ValueError if a newer version wrote it, or something else."""
    if not isinstance(adata, AnnData):
        msg = f"adata is a {type(adata).__name__}; an AnnData is needed."
        if isinstance(adata, Mapping):
            msg += " Give one data set at a time: each carries the whole of a joint fit."
        raise TypeError(msg)
    root = adata.uns.get(UNS.root, {})
    if not isinstance(root, Mapping):
        msg = (
            f"adata.uns[{UNS.root!r}] is a {type(root).__name__}, which scvi_ext has not written: remove or rename it."
        )
        raise ValueError(msg)
    found = int(root.get(UNS.format, FORMAT))
    if found > FORMAT:
        msg = (
            f"adata.uns[{UNS.root!r}] has format {found}, and this version of scvi_ext reads formats up to {FORMAT}. "
            "It was written by a newer version: update scvi_ext."
        )
        raise ValueError(msg)
    return root


def read_setup(adata: AnnData) -> Registry:
    """What ``pp.setup_anndata`` has written into ``adata``."""
    root = read_root(adata)
    if UNS.setup not in root:
        msg = f"adata.uns[{UNS.root!r}] has no {UNS.setup!r}: call scvi_ext.pp.setup_anndata(adata) first."
        raise KeyError(msg)
    return Registry.from_uns(root[UNS.setup])


def read_fit(adata: AnnData, key: str | None = None) -> SavedFit:
    """The fit called ``key`` that travels in ``adata``; by default the last one."""
    root = read_root(adata)
    fits = root.get(UNS.fits, {})
    if len(fits) == 0:
        msg = f"adata.uns[{UNS.root!r}] has no fits: call scvi_ext.tl.fit(adata) first."
        raise KeyError(msg)
    if key is None:
        key = str(root.get(UNS.last_fit, ""))
        if key not in fits:  # it was deleted
            key = next(iter(fits)) if len(fits) == 1 else None
        if key is None:
            msg = f"The last fit was deleted; name one of the others, key=...: {listing(fits)}."
            raise KeyError(msg)
    if key not in fits:
        raise missing_key(f"adata.uns[{UNS.root!r}][{UNS.fits!r}]", key, fits)
    saved = fits[key]
    checkpoint = saved.get("checkpoint")
    return SavedFit(
        key=key,
        model=str(saved["model"]),
        config={k: None if v == NONE else v for k, v in _plain(saved.get("config", {})).items()},
        run=_plain(saved.get("run", {})),
        setup=Registry.from_uns(saved["setup"]).to_uns(),
        var_names=np.array(_strings(saved["var_names"])),
        state={name: np.asarray(value) for name, value in saved["state"].items()},
        history=saved["history"],
        status=_plain(saved.get("status", {})),
        checkpoint=None if checkpoint is None else {name: np.asarray(value) for name, value in checkpoint.items()},
        frozen=_plain(saved["frozen"]) if "frozen" in saved else None,
        joint=_plain(saved["joint"]) if "joint" in saved else None,
    )


def check_fit_matches_setup(fit: SavedFit, adata: AnnData) -> None:
    """Raise a ValueError if ``adata`` has since been set up with other slots than ``fit`` was trained on.

    Categories may differ: a subset has fewer of them. :func:`codes` refuses those that the fit does not know.
    """
    if UNS.setup not in read_root(adata):
        return
    trained, present = Registry.from_uns(fit.setup), read_setup(adata)
    for name in stale_slots(trained, present):
        msg = (
            f"The fit {fit.key!r} was trained with {name}={getattr(trained, name)!r}, and adata has since been set up "
            f"with {name}={getattr(present, name)!r}. Call scvi_ext.pp.setup_anndata with the former again to use this "
            "fit, or scvi_ext.tl.fit for a new one."
        )
        raise ValueError(msg)


def differing_slots(one: Registry, other: Registry) -> list[str]:
    """Names of the fields in which two registries read other slots; their categories may differ."""
    names = [field.name for field in fields(Registry) if field.name not in _NOT_SLOTS]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def stale_slots(trained: Registry, present: Registry) -> list[str]:
    """The same of a fit and what is registered now, but for labels and proteins that only one of them knows at all."""
    unread = set() if trained.labels_key and present.labels_key else {"labels_key", "unlabeled_category"}
    unread |= set() if trained.protein_obsm_key and present.protein_obsm_key else {"protein_obsm_key"}
    return [name for name in differing_slots(trained, present) if name not in unread]


def column(obs: pd.DataFrame, key: str) -> pd.Series:
    """``obs[key]``, or a KeyError with the columns there are."""
    if key not in obs:
        raise missing_key("adata.obs", key, obs.columns)
    if isinstance(obs[key], pd.DataFrame):
        msg = f"adata.obs has {obs[key].shape[1]} columns called {key!r}: rename or drop all but one."
        raise ValueError(msg)
    return obs[key]


def check_complete(obs: pd.DataFrame, key: str, advice: str = "") -> None:
    """Raise a ValueError if ``obs[key]`` has missing values."""
    missing = column(obs, key).isna().to_numpy()
    if missing.any():
        msg = (
            f"adata.obs[{key!r}] is missing in {missing.sum()} of {len(missing)} cells, first in "
            f"{listing(obs.index[missing], 3)}. Leave these cells out, or give them a category of their own: "
            f"adata.obs[{key!r}] = adata.obs[{key!r}].astype('string').fillna('unknown'){advice}."
        )
        raise ValueError(msg)


def _factorized(values: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Codes (-1 = missing) and the strings of the categories, in their own order or sorted."""
    categorical = pd.Categorical(values)
    names = [str(c) for c in categorical.categories]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        msg = (
            f"adata.obs[{values.name!r}] has different values that read the same: {listing(twice)} (numbers beside "
            "strings?). Convert the column to strings, or tell them apart."
        )
        raise ValueError(msg)
    return np.asarray(categorical.codes), names


def used_categories(obs: pd.DataFrame, key: str) -> tuple[str, ...]:
    """Strings of the categories that occur in ``obs[key]``: in the order of a categorical column, otherwise sorted."""
    values, names = _factorized(column(obs, key))
    used = np.bincount(values[values >= 0], minlength=len(names)) > 0
    return tuple(dict.fromkeys(name for name, occurs in zip(names, used, strict=True) if occurs))


def codes(obs: pd.DataFrame, key: str, categories: Sequence[str], unlabeled: str | None = None) -> np.ndarray:
    """Position of each cell's category in ``categories``.

    Parameters
    ----------
    obs
        Table of cells.
    key
        Column of ``obs``. Its values are compared as strings.
    categories
        Known categories, in the order of their codes.
    unlabeled
        Category that stands for "no label".

    Returns
    -------
    int64 codes, shape (n,); -1 where the category is ``unlabeled``.

    Raises
    ------
    KeyError
        The column does not exist.
    ValueError
        A value is missing, or is none of ``categories``.
    """
    check_complete(obs, key)
    values, names = _factorized(obs[key])
    known = {name: code for code, name in enumerate(categories)}
    if unlabeled is not None:
        known[unlabeled] = -1
    result = np.array([known.get(name, _UNKNOWN) for name in names], dtype=np.int64)[values]
    unknown = result == _UNKNOWN
    if unknown.any():
        found = [name for name in used_categories(obs, key) if name not in known]
        msg = (
            f"adata.obs[{key!r}] has {len(found)} unknown categories in {unknown.sum()} of {len(unknown)} cells: "
            f"{listing(found)}. Known ones: {listing(known)}. Rename them or leave these cells out; to learn them, "
            "call scvi_ext.pp.setup_anndata and scvi_ext.tl.fit again."
        )
        raise ValueError(msg)
    return result


def known_codes(obs: pd.DataFrame, key: str, categories: Sequence[str]) -> np.ndarray:
    """The same where a category need not be known: -1 where it is not, is missing, or where there is no such column."""
    if key not in obs:
        return np.full(len(obs), -1, dtype=np.int64)
    values, names = _factorized(column(obs, key))
    known = {name: code for code, name in enumerate(categories)}
    return np.array([*(known.get(name, -1) for name in names), -1], dtype=np.int64)[values]
