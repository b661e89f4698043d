"""What a function has changed in an AnnData that was opened from files, and what of it belongs into which file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_ext._keys import UNS
from scvi_ext.files.spool import Spooled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from scvi_ext.data.backed import Backed, Source

_TABLES = ("obs", "var")
_ENTRIES = ("obsm", "varm", "varp", "layers")
_OF_CELLS = {"obs": 0, "obsm": 0, "layers": 0}  # axis
_OF_GENES = {"var": (0,), "varm": (0,), "varp": (0, 1), "layers": (1,)}  # axes


@dataclass(frozen=True, eq=False)
class Change:
    """An entry that is new or another: where, ``("uns", "scvi_ext", "setup")``, and its value; None: it is gone."""

    place: tuple[str, ...]
    value: Any

    def of(self, source: Source) -> Change:
        """The cells of one source, with its genes in its order; ``uns`` is everybody's."""
        value, slot = self.value, self.place[0]
        if value is None or slot == "uns":
            return self
        genes = None if source.genes is None or slot not in _OF_GENES else np.argsort(source.genes)
        if isinstance(value, Spooled):
            return Change(self.place, value.part(source.first, source.stop, genes))
        if slot in _OF_CELLS:
            value = _taken(value, slice(source.first, source.stop), 0)
        for axis in _OF_GENES.get(slot, ()) if genes is not None else ():
            value = _taken(value, genes, axis)
        return Change(self.place, value)


def _taken(value: Any, positions: slice | np.ndarray, axis: int) -> Any:
    index = (slice(None),) * axis + (positions,)
    return value.iloc[index] if isinstance(value, pd.DataFrame | pd.Series) else value[index]


class Snapshot:
    """What an AnnData held when it was taken, by identity: nothing is copied."""

    def __init__(self, adata: Backed):
        self.adata = adata
        self.tables = {slot: getattr(adata, slot).copy(deep=False) for slot in _TABLES}
        self.entries = {slot: dict(getattr(adata, slot)) for slot in _ENTRIES}
        self.uns = _containers(adata.uns)
        # Of files that differ in it nothing was used: what is new is put beside what each of them has.
        self.uns.setdefault(UNS.root, {}).setdefault(UNS.fits, {})

    def changes(self) -> Iterator[Change]:
        """What is new, another or gone; counts in ``X`` never are."""
        for slot, before in self.tables.items():
            now = getattr(self.adata, slot)
            for key in now:
                if key not in before or not now[key].equals(before[key]):
                    yield Change((slot, key), now[key])
            yield from (Change((slot, key), None) for key in before if key not in now)
        for slot, before in self.entries.items():
            now = getattr(self.adata, slot)
            for key, value in now.items():
                if value is not before.get(key):
                    yield Change((slot, key), value)
            yield from (Change((slot, key), None) for key in before.keys() - now.keys())
        if self.adata.spools is not None:
            for place, spooled in self.adata.spools.complete.items():
                yield Change(place, spooled)
        of_uns = list(_of_mappings(("uns",), self.adata.uns, self.uns))
        yield from of_uns
        # A process may have ended when some of several files had a new fit, and only some the note that it is the last.
        places, note = {change.place[:3] for change in of_uns}, ("uns", UNS.root, UNS.last_fit)
        last = self.adata.uns.get(UNS.root, {}).get(UNS.last_fit)
        if ("uns", UNS.root, UNS.fits) in places and note not in places and last is not None:
            yield Change(note, last)


def _of_mappings(place: tuple[str, ...], now: Mapping, before: Mapping) -> Iterator[Change]:
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            yield from _of_mappings((*place, key), value, old)
        elif not _same(value, old):
            yield Change((*place, key), value)
    # The places for setup and fits may never have been there.
    yield from (Change((*place, key), None) for key, old in before.items() if key not in now and not _is_empty(old))


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_empty, value.values()))


def _containers(value: Any) -> Any:
    """The same with dictionaries of its own, so that what is put into them shows."""
    return {key: _containers(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) or isinstance(one, np.ndarray | pd.DataFrame) or sp.issparse(one):
        return one is other
    return one is other or (np.isscalar(one) and np.isscalar(other) and bool(one == other))
