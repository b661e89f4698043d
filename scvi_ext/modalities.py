"""A MuData as the functions of an AnnData see it, and back: what they write goes to the modality that it is of.

Only a MuData that comes in is ever looked at: ``mudata`` itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import wraps
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from scvi_ext import results
from scvi_ext._errors import listing, missing_key
from scvi_ext._keys import UNS, column_name
from scvi_ext.data.store import check_unique_genes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from mudata import MuData

_OF_CELLS = ("obsm", "obsp")
_OF_GENES = ("layers", "varm", "varp")


@dataclass(frozen=True)
class Modalities:
    """Where a MuData has its genes and its proteins."""

    rna: str
    protein: str | None = None
    protein_layer: str | None = None

    @property
    def protein_obsm_key(self) -> str | None:
        """What the table of proteins is called among the slots of cells; the name of a modality is free there."""
        if self.protein is None or self.protein_layer is None:
            return self.protein
        return f"{self.protein}:{self.protein_layer}"

    @property
    def note(self) -> str:
        """What an error that speaks of ``adata`` means."""
        layer = ".X" if self.protein_layer is None else f".layers[{self.protein_layer!r}]"
        of_proteins = "" if self.protein is None else f", adata.obsm[{self.protein_obsm_key!r}] {self.protein!r}{layer}"
        return (
            f"Of this MuData, adata.X, layers and var are those of the modality {self.rna!r}{of_proteins}; obs, obsm "
            f"and uns are its own, and obs and obsm of {self.rna!r} where it has no such entry."
        )

    def to_uns(self) -> dict[str, str]:
        """As strings; what is absent is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, mdata: MuData) -> Modalities:
        """What ``pp.setup_mudata`` wrote."""
        root = mdata.uns.get(UNS.root, {})
        if UNS.modalities not in root:
            msg = f"mdata.uns[{UNS.root!r}] has no {UNS.modalities!r}: call scvi_ext.pp.setup_mudata(mdata) first."
            raise KeyError(msg)
        return cls(**{name: str(value) for name, value in root[UNS.modalities].items()})


def is_mudata(value: object) -> bool:
    """Whether it is a MuData."""
    return any(base.__name__ == "MuData" for base in type(value).__mro__)


def takes_mudata(function: Callable, namespace: str) -> Callable:
    """The same function of a namespace for an AnnData, and for a MuData that ``pp.setup_mudata`` has registered."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(map(is_mudata, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        return _on_mudata(function, args, kwargs)

    call.__module__ = namespace  # where it is found, by users and by pickle
    return call


def _on_mudata(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    joined = {id(value): Joined(value) for value in (*args, *kwargs.values()) if is_mudata(value)}
    try:
        result = function(
            *(joined.get(id(value), value) for value in args),
            **{name: joined.get(id(value), value) for name, value in kwargs.items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        error.add_note(next(iter(joined.values())).modalities.note)
        raise
    finally:  # a fit that Ctrl-C ends is written all the same
        for adata in joined.values():
            adata.write_back()
    return result.write_back() if isinstance(result, Joined) else result


class Joined(AnnData):
    """The genes of a MuData, its cells in its order, and its proteins as a table in ``obsm``; no counts are copied.

    Where the modality of the genes has its cells in another order, or the MuData is a view, its counts are copied.

    Parameters
    ----------
    mdata
        Of which it is made; nothing is written to it until :meth:`write_back`.
    modalities
        Where it has genes and proteins; by default as they were registered.
    """

    def __init__(self, mdata: MuData, modalities: Modalities | None = None):
        modalities = Modalities.of(mdata) if modalities is None else modalities
        _check_cells(mdata, modalities)
        source = mdata.copy() if mdata.is_view else mdata
        rna = _in_order(source, modalities.rna)
        check_unique_genes(rna)
        obs, obsm, obsp = source.obs, dict(source.obsm), dict(source.obsp)
        for of_modality in source.mod:  # which of its cells a modality has
            obsm.pop(of_modality, None)
            obsp.pop(of_modality, None)
        own = rna.obs[[name for name in rna.obs if name not in obs]]
        if modalities.protein is not None:
            obsm[modalities.protein_obsm_key] = _protein_table(source, modalities)
        super().__init__(
            rna.X,
            obs=pd.concat([obs, own], axis=1),
            var=rna.var,
            uns=_containers(source.uns),
            obsm={**rna.obsm, **obsm},
            obsp={**rna.obsp, **obsp},
            varm=dict(rna.varm),
            varp=dict(rna.varp),
            layers=dict(rna.layers),
        )
        self.mdata, self.modalities = mdata, modalities
        self._remember()

    def copy(self) -> Joined:
        """The same of a copy of the MuData."""
        return Joined(self.mdata.copy(), self.modalities)

    def write_back(self, mdata: MuData | None = None) -> MuData:
        """Write what has changed since into the MuData, or into a copy of it, and return that."""
        mdata = self.mdata if mdata is None else mdata
        changes = list(self._changes(mdata))
        for slot, key in {(slot, key) for owner, slot, key, _ in changes if owner is None}:
            if slot in _OF_CELLS and key in mdata.mod:
                msg = f"mdata.{slot}[{key!r}] is kept for the modality of this name: choose another one, key_added=..."
                raise ValueError(msg)
        results.write_modalities(mdata, changes)
        _log(changes)
        self._remember()
        return mdata

    def _remember(self) -> None:
        self._before = {slot: dict(getattr(self, slot)) for slot in (*_OF_CELLS, *_OF_GENES)}
        self._before |= {"obs": self.obs.copy(), "var": self.var.copy(), "uns": _containers(self.uns)}

    def _changes(self, mdata: MuData) -> Iterator[tuple[str | None, str, str, Any]]:
        """Modality (None: the MuData itself), slot, key and value (None: it is gone) of what is new or another."""
        names, before = self.modalities, self._before
        to_rna, _ = _positions(mdata, names.rna)
        for slot in (*_OF_CELLS, *_OF_GENES):
            now, owner = getattr(self, slot), names.rna if slot in _OF_GENES else None
            yield from ((owner, slot, key, None) for key in before[slot].keys() - now.keys())
            for key, value in now.items():
                if value is before[slot].get(key):
                    continue
                if slot == "layers":
                    yield names.rna, slot, key, value if to_rna is None else value[to_rna]
                elif (layer := self._as_layer(value, mdata)) is not None:
                    yield names.protein, "layers", key, layer
                else:
                    yield owner, slot, key, value
        for slot, owner in (("obs", None), ("var", names.rna)):
            table, old = getattr(self, slot), before[slot]
            for key in table:
                if key not in old or not table[key].equals(old[key]):
                    yield owner, slot, key, table[key]
        for key, value in self.uns.items():
            if not _same(value, before["uns"].get(key)):
                yield None, "uns", key, value
        yield from ((None, "uns", key, None) for key in before["uns"].keys() - self.uns.keys())

    def _as_layer(self, value: Any, mdata: MuData) -> np.ndarray | None:
        """A table of proteins as a layer of their modality, NaN for those it lacks; None for what is none of them."""
        if self.modalities.protein is None or not results.is_of_proteins(value):
            return None
        proteins = mdata.mod[self.modalities.protein]
        columns = proteins.var_names.astype(str).map(column_name).get_indexer(value.columns)
        if (columns < 0).any():  # of a reference that has proteins which this modality has not
            return None
        to_proteins, _ = _positions(mdata, self.modalities.protein)
        values = value.to_numpy() if to_proteins is None else value.to_numpy()[to_proteins]
        if np.array_equal(columns, np.arange(proteins.n_vars)):
            return values
        layer = np.full(proteins.shape, np.nan, dtype=np.result_type(values.dtype, np.float32))
        layer[:, columns] = values
        return layer


def _positions(mdata: MuData, name: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The cells of a modality among those of the MuData, and the other way round; None where they are in one order."""
    own = mdata.mod[name].obs_names
    if own.equals(mdata.obs_names):
        return None, None
    return mdata.obs_names.get_indexer(own), own.get_indexer(mdata.obs_names)


def _check_cells(mdata: MuData, modalities: Modalities) -> None:
    """Raise unless the modalities exist and have the cells of the MuData."""
    names = [name for name in (modalities.rna, modalities.protein) if name is not None]
    for name in names:
        if name not in mdata.mod:
            raise missing_key("mdata.mod", name, mdata.mod, "which is to be read")
        if not isinstance(mdata.mod[name], AnnData):
            msg = f"mdata[{name!r}] is a {type(mdata.mod[name]).__name__}; an AnnData is needed."
            raise TypeError(msg)
    cells = {f"mdata[{name!r}]": mdata.mod[name].obs_names for name in names}
    if all(own.equals(mdata.obs_names) for own in cells.values()):
        return
    for owner, own in {"mdata": mdata.obs_names, **cells}.items():
        if not own.is_unique:
            msg = (
                f"{owner}.obs_names has duplicates, and cells are found by name: call {owner}.obs_names_make_unique()."
            )
            raise ValueError(msg)
    lacking = [(mdata.obs_names.difference(own, sort=False), f"not in {owner}") for owner, own in cells.items()]
    lacking += [(own.difference(mdata.obs_names, sort=False), f"in {owner} only") for owner, own in cells.items()]
    found = [f"{len(which)} cells are {where} ({listing(which, 2)})" for which, where in lacking if len(which)]
    if found:
        msg = (
            f"The {mdata.n_obs} cells of mdata are not those of {' and '.join(cells)}: {', '.join(found)}. Keep the "
            "cells that are in all modalities, muon.pp.intersect_obs(mdata); after changing one, call mdata.update()."
        )
        raise ValueError(msg)


def _in_order(mdata: MuData, name: str) -> AnnData:
    """A modality with the cells in the order of the MuData; no view."""
    adata, (_, order) = mdata.mod[name], _positions(mdata, name)
    adata = adata if order is None else adata[order]
    if not adata.is_view:
        return adata
    return adata.to_memory() if adata.isbacked else adata.copy()


def _protein_table(mdata: MuData, modalities: Modalities) -> pd.DataFrame:
    proteins, layer = _in_order(mdata, modalities.protein), modalities.protein_layer
    if layer is not None and layer not in proteins.layers:
        raise missing_key(f"mdata[{modalities.protein!r}].layers", layer, proteins.layers)
    matrix = proteins.X if layer is None else proteins.layers[layer]
    if matrix is None:
        known = listing(proteins.layers)
        msg = f"mdata[{modalities.protein!r}].X is None. Name the layer, protein_layer=..., out of: {known}."
        raise TypeError(msg)
    matrix = matrix[:]  # of a file: what is in it
    values = matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)
    return pd.DataFrame(values, index=mdata.obs_names, columns=proteins.var_names)


def _containers(value: Any) -> Any:
    """The same with dictionaries of its own, so that what is put into them shows."""
    return {key: _containers(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return one is other
    return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())


def _log(changes: Iterable[tuple[str | None, str, str, Any]]) -> None:
    from scanpy import logging as logg

    places: dict[str, list[str]] = {}
    for owner, slot, key, value in changes:
        if value is not None:
            places.setdefault(f"mdata.{slot}" if owner is None else f"mdata[{owner!r}].{slot}", []).append(key)
    if places:
        logg.hint("of the MuData: " + "; ".join(f"{listing(keys)} ({place})" for place, keys in places.items()))
