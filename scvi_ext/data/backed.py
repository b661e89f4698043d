"""Cells of one or several files as an AnnData whose counts and layers stay on disk."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset

from scvi_ext._errors import first_line, listing, warn
from scvi_ext._keys import UNS
from scvi_ext.data.matrix import still_open
from scvi_ext.data.stacked import Stacked
from scvi_ext.data.store import check_unique_genes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

_SPARSE = ("csr_matrix", "csc_matrix", "csr", "csc")  # what anndata calls them, and has called them
_ZARR = "zarr>=2.18.7"
_TABLES = ("obs", "var", "obsm", "varm", "obsp", "varp")


@dataclass(frozen=True, eq=False)
class Source:
    """What some consecutive cells were read from."""

    name: str  # in messages
    path: Path | None  # None of an AnnData that was handed over
    first: int
    stop: int
    genes: np.ndarray | None  # columns of the source in the order of the whole; None = as they stand


class Backed(AnnData):
    """An AnnData whose ``X`` and layers stay in files, opened read-only; everything else is in memory.

    What is assigned stays in memory. A copy reads from the same files, which are closed when nothing that reads from
    them is left, or by :meth:`close` (for all copies), or at the end of ``with``.

    Parameters
    ----------
    stores
        Open files.
    sources
        What the cells were read from, in order.
    **slots
        Those of the AnnData.
    """

    written_back = False  # whether what is assigned goes into the files when the call that opened them is done
    spools = None  # where read-outs of all cells are put as they come, instead of into memory

    def __init__(self, stores: Sequence[Any], sources: Sequence[Source], **slots: Any):
        super().__init__(**slots)
        self.stores, self.sources = tuple(stores), tuple(sources)
        self.waiting: list[Callable[[], None]] = []

    def once_written(self, then: Callable[[], None]) -> None:
        """Have something done when what is assigned is in the files; now, if it stays in memory."""
        if self.written_back:
            self.waiting.append(then)
        else:
            then()

    def write_h5ad(self, filename: str | PathLike, **options: Any) -> None:
        """Write everything into a file, the counts as they are read; those of several files are not put together."""
        self._as_stored(filename).write_h5ad(filename, **options)

    write = write_h5ad

    def write_zarr(self, store: Any, **options: Any) -> None:
        """The same as a zarr folder."""
        self._as_stored(store).write_zarr(store, **options)

    def copy(self, filename: str | PathLike | None = None) -> Backed:
        """The same with slots of its own, of the same files."""
        if filename is not None:
            msg = "A copy reads from the same files. To write one: adata.write_h5ad(...)."
            raise ValueError(msg)
        tables = {slot: getattr(self, slot).copy() for slot in _TABLES}
        layers = {name: _copied(layer) for name, layer in self.layers.items()}
        return Backed(
            self.stores, self.sources, X=_copied(self.X), layers=layers, uns=deepcopy(dict(self.uns)), **tables
        )

    def to_memory(self, copy: bool = False) -> AnnData:
        """Everything read into memory."""
        tables = {slot: getattr(self, slot) for slot in _TABLES}
        tables = {name: table.copy() if copy else table for name, table in tables.items()}
        layers = {name: _read(layer) for name, layer in self.layers.items()}
        uns = dict(self.uns)
        return AnnData(_read(self.X), layers=layers, uns=deepcopy(uns) if copy else uns, **tables)

    def close(self) -> None:
        """Close the files: counts and layers of h5ad files cannot be read any more. Folders of zarr are never open."""
        for store in self.stores:
            if isinstance(store, h5py.File):
                store.close()

    def _as_stored(self, target: Any) -> AnnData:
        """The same as AnnData's own class, which is what it can write."""
        if is_path(target) and any(_is_same(Path(target), source.path) for source in self.sources):
            msg = (
                f"{str(target)!r} is where the counts are read from, and cannot be replaced meanwhile: write another "
                "file, or have results written into this one by giving its path to the functions, tl.fit(path)."
            )
            raise ValueError(msg)
        if any(isinstance(matrix, Stacked) for matrix in (self.X, *self.layers.values())):
            msg = (
                "The counts of several files cannot be written as those of one. Put the files together on disk, "
                "anndata.experimental.concat_on_disk([...], 'all.h5ad'), or in memory, "
                "adata.to_memory().write_h5ad(...)."
            )
            raise ValueError(msg)
        tables = {slot: getattr(self, slot) for slot in _TABLES}
        return AnnData(
            still_open(self.X), layers={k: still_open(v) for k, v in self.layers.items()}, uns=dict(self.uns), **tables
        )

    def __enter__(self) -> Backed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_written_back(adata: object) -> bool:
    """Whether what is assigned to it goes into the files that it was opened from."""
    return isinstance(adata, Backed) and adata.written_back


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and path.exists() and path.samefile(other)


def _copied(matrix: Any) -> Any:
    return matrix.copy() if isinstance(matrix, np.ndarray) or sp.issparse(matrix) else matrix


def _read(matrix: Any) -> Any:
    if matrix is None or isinstance(matrix, np.ndarray) or sp.issparse(still_open(matrix)):
        return matrix
    reads = getattr(matrix, "to_memory", None)
    return matrix[...] if reads is None else reads()


def is_path(value: object) -> bool:
    """Whether it names a file."""
    return isinstance(value, str | PathLike)


def open_backed(
    paths: str | PathLike | AnnData | Iterable[str | PathLike | AnnData], label: str | None = None
) -> Backed:
    """Open one or several files, see :func:`scvi_ext.io.read_backed`."""
    several = not (is_path(paths) or isinstance(paths, AnnData))
    given = list(paths) if several else [paths]
    if not given:
        msg = "There are no files to read: give at least one path."
        raise ValueError(msg)
    opened: list[_Opened] = []
    try:
        for position, one in enumerate(given):
            opened.append(_of_path(one) if is_path(one) else _of_anndata(one, position))
        return _one_below_the_other(opened, label)
    except BaseException:
        _close(opened)
        raise


@dataclass(frozen=True, eq=False)
class _Opened:
    """One file, or one AnnData: its slots."""

    name: str
    path: Path | None
    store: Any
    slots: dict[str, Any]


def _close(opened: Iterable[_Opened]) -> None:
    for one in opened:
        if one.path is not None and isinstance(one.store, h5py.File):
            one.store.close()


# ---- one file ------------------------------------------------------------------------------------------------------


def is_zarr(path: Path) -> bool:
    """Whether a path that exists is to be opened by zarr: a folder."""
    return path.is_dir()


def zarr_library(path: Path) -> Any:
    """The module, or an ImportError that says how to install it."""
    try:
        import zarr
    except ImportError as error:
        msg = f"{str(path)!r} is read by zarr, which is not installed: pip install '{_ZARR}'."
        raise ImportError(msg) from error
    return zarr


def path_of(path: str | PathLike) -> Path:
    """A path that exists and may hold an AnnData; else an error that says what is there."""
    text = fspath(path)
    found = Path(text).expanduser()
    if "://" in text:
        msg = f"{text!r} is an address: download the file, or copy it to a disk, and give its path."
        raise ValueError(msg)
    if not found.exists():
        msg = f"{text!r} does not exist" + ("." if found.is_absolute() else f" (looked for from {str(Path.cwd())!r}).")
        raise FileNotFoundError(msg)
    if found.suffix == ".h5mu":
        msg = f"{text!r} holds a MuData: read it with mudata.read, and pass that."
        raise ValueError(msg)
    if found.is_dir() and not any((found / name).is_file() for name in (".zgroup", "zarr.json")):
        msg = f"{text!r} is a folder, and no zarr group: there is neither .zgroup nor zarr.json in it."
        raise ValueError(msg)
    return found


def _of_path(path: str | PathLike) -> _Opened:
    found = path_of(path)
    name = str(found)
    store = _open_zarr(found) if is_zarr(found) else _open_hdf5(found)
    try:
        return _Opened(name, found, store, _slots(store, name))
    except BaseException:
        if isinstance(store, h5py.File):
            store.close()
        raise


def _open_zarr(path: Path) -> Any:
    zarr = zarr_library(path)
    try:
        return zarr.open_group(str(path), mode="r")
    except Exception as error:
        msg = f"{str(path)!r} cannot be read as a zarr group: {first_line(error)}."
        raise OSError(msg) from error


def _open_hdf5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        advice = advice_on(error, "It is open elsewhere for writing: close it there first.")
        msg = f"{str(path)!r} cannot be opened: {first_line(error)}. {advice}"
        raise OSError(msg) from error


def advice_on(error: OSError, if_open: str) -> str:
    """What to do about a file that HDF5 does not open; ``if_open``: where somebody else has it open."""
    if any(words in str(error) for words in ("to lock", "already open")):
        return if_open
    return "It is no h5ad file, or only a part of one (a download or a write that ended early): get it again."


def _slots(store: Any, name: str) -> dict[str, Any]:
    """The slots of an AnnData in an open file."""
    absent = [slot for slot in ("obs", "var") if slot not in store]
    if absent:
        msg = f"{name!r} holds no AnnData: it has no {' and no '.join(absent)}, but {listing(sorted(store))}."
        raise ValueError(msg)
    if any(getattr(store[slot], "shape", None) is not None for slot in ("obs", "var")):  # arrays, and no groups
        msg = (
            f"{name!r} is in the format of anndata before 0.7, which is not read from disk: write it anew, "
            "anndata.read_h5ad(...).write_h5ad(...)."
        )
        raise ValueError(msg)
    slots = {slot: read_elem(store[slot]) for slot in ("obs", "var")}
    for slot in ("obsm", "varm", "obsp", "varp", "uns"):
        slots[slot] = dict(read_elem(store[slot])) if slot in store else {}
    slots["X"] = _matrix(store["X"]) if "X" in store else None
    layers = store["layers"] if "layers" in store else {}
    slots["layers"] = {key: _matrix(layers[key]) for key in layers}
    if slots["X"] is None and not slots["layers"]:
        msg = f"{name!r} has no X and no layers, so there are no counts in it."
        raise ValueError(msg)
    return slots


def _matrix(node: Any) -> Any:
    """A matrix that stays on disk; what is no matrix of numbers is read."""
    kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format"))
    if kind in _SPARSE:
        return sparse_dataset(node)
    dense = kind in ("array", None) and getattr(node, "shape", None) is not None  # and no group
    return node if dense else read_elem(node)


def _of_anndata(adata: AnnData, position: int) -> _Opened:
    name = f"adatas[{position}]"
    if not isinstance(adata, AnnData):
        msg = f"{name} is a {type(adata).__name__}; the path of a file or an AnnData is needed."
        raise TypeError(msg)
    slots = {slot: getattr(adata, slot) for slot in ("X", "var")}
    for slot in ("obsm", "varm", "obsp", "varp", "layers"):
        slots[slot] = dict(getattr(adata, slot))
    slots |= {"obs": adata.obs.copy(), "uns": deepcopy(dict(adata.uns))}  # what is written stays here
    return _Opened(name, None, adata, slots)


# ---- several -------------------------------------------------------------------------------------------------------


def _one_below_the_other(opened: list[_Opened], label: str | None) -> Backed:
    genes = _genes(opened)
    stops = np.cumsum([len(one.slots["obs"]) for one in opened]).tolist()
    sources = [
        Source(one.name, one.path, stop - len(one.slots["obs"]), stop, order)
        for one, stop, order in zip(opened, stops, genes, strict=True)
    ]
    slots = dict(opened[0].slots)
    if len(opened) > 1:
        _check_different(opened)
        _check_unique_cells(opened)
        everywhere = [key for key in slots["layers"] if all(key in one.slots["layers"] for one in opened)]
        slots |= {
            "X": _stacked([one.slots["X"] for one in opened], genes, [one.name for one in opened]),
            "layers": {key: Stacked([one.slots["layers"][key] for one in opened], genes) for key in everywhere},
            "obsm": _tables_of_cells([one.slots["obsm"] for one in opened]),
            "obsp": {},
            "uns": _shared_uns(opened),
        }
    slots["obs"] = _all_obs(opened, label)
    return Backed([one.store for one in opened], sources, **slots)


def _genes(opened: list[_Opened]) -> list[np.ndarray | None]:
    """For each file its genes in the order of the first one; None where they are in order."""
    first, orders = opened[0].slots["var"].index, []
    for one in opened:
        own = one.slots["var"].index
        if own.equals(first):
            orders.append(None)
            continue
        for names, owner in ((first, opened[0].name), (own, one.name)):
            check_unique_genes(AnnData(var=pd.DataFrame(index=names)), repr(owner))
        lacking, further = first.difference(own, sort=False), own.difference(first, sort=False)
        differences = [
            f"{len(which)} of {len(names)} are in {owner!r} only ({listing(which, 3)})"
            for which, names, owner in ((lacking, first, opened[0].name), (further, own, one.name))
            if len(which)
        ]
        if differences:
            msg = (
                f"{opened[0].name!r} and {one.name!r} have different genes: {', '.join(differences)}. Write files with "
                "the genes that all of them have, in any order: adata[:, genes].write_h5ad(...)."
            )
            raise KeyError(msg)
        orders.append(own.get_indexer(first))
    return orders


def _check_different(opened: list[_Opened]) -> None:
    paths = [one.path.resolve() for one in opened if one.path is not None]
    again = [str(path) for position, path in enumerate(paths) if path in paths[:position]]
    if again:
        msg = f"{listing(again, 3)} was given more than once: name each file once."
        raise ValueError(msg)


def _check_unique_cells(opened: list[_Opened]) -> None:
    cells = pd.Index(np.concatenate([one.slots["obs"].index for one in opened]))
    if not cells.is_unique:
        repeated = cells[cells.duplicated()].unique()
        owners = [one.name for one in opened if repeated[0] in one.slots["obs"].index]
        msg = (
            f"{len(repeated)} names of cells are there more than once: {listing(repeated, 3)}, the first in "
            f"{listing(owners, 3)}. Give the cells of each file names of their own, adata.obs_names = 'a_' + "
            "adata.obs_names, and write it."
        )
        raise ValueError(msg)


def _stacked(matrices: list[Any], genes: list[np.ndarray | None], names: list[str]) -> Stacked | None:
    lacking = [name for matrix, name in zip(matrices, names, strict=True) if matrix is None]
    if len(lacking) == len(matrices):
        return None
    if lacking:
        msg = f"{len(lacking)} of {len(names)} files have no X, and the others have one: {listing(lacking, 3)}."
        raise ValueError(msg)
    return Stacked(matrices, genes)


def _all_obs(opened: list[_Opened], label: str | None) -> pd.DataFrame:
    """Columns of all files; what some lack is missing in their cells, and categories are united."""
    tables = [one.slots["obs"] for one in opened]
    if label is not None and any(label in table for table in tables):
        msg = f"label={label!r} is a column of obs already: choose another name."
        raise ValueError(msg)
    if len(tables) > 1:
        tables = [ad.concat([AnnData(obs=table) for table in tables], join="outer").obs]
    if label is None:
        return tables[0]
    names = [one.name if one.path is None else one.path.name for one in opened]
    if len(set(names)) < len(names):
        names = [one.name for one in opened]
    codes = np.repeat(np.arange(len(opened)), [len(one.slots["obs"]) for one in opened])
    return tables[0].assign(**{label: pd.Categorical.from_codes(codes, pd.Index(names, dtype=object))})


def _tables_of_cells(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all have, of one kind and with the same columns."""
    together = {}
    for key, first in tables[0].items():
        values = [table.get(key) for table in tables]
        if any(type(value) is not type(first) or value.shape[1:] != first.shape[1:] for value in values):
            continue
        if isinstance(first, pd.DataFrame):
            if all(value.columns.equals(first.columns) for value in values):
                together[key] = pd.concat(values)
        elif sp.issparse(first):
            together[key] = sp.vstack(values, format="csr")
        elif isinstance(first, np.ndarray):
            together[key] = np.concatenate(values)
    return together


def _shared_uns(opened: list[_Opened]) -> dict[str, Any]:
    """The entries that are the same in all; a warning says of this package's what is not, and is not used."""
    first, *others = [one.slots["uns"] for one in opened]
    shared = {key: value for key, value in first.items() if all(_equal(value, uns.get(key)) for uns in others)}
    if UNS.root not in shared and any(UNS.root in one.slots["uns"] for one in opened):
        roots = [_flat(one.slots["uns"].get(UNS.root, {})) for one in opened]
        places = dict.fromkeys(place for root in roots for place in root)
        same = {place for place in places if all(_equal(root.get(place), roots[0].get(place)) for root in roots)}
        if UNS.setup in same:
            shared[UNS.root] = _shared_root(first[UNS.root], same)
        differing = [place for place in places if place not in same | {UNS.last_fit}]
        left_out = "which is left out" if UNS.setup in same else "and all of it is left out"
        if differing:
            warn(
                f"adata.uns[{UNS.root!r}] is not the same in these files, {left_out}: they differ in "
                f"{listing(differing, 3)}. Call pp.setup_anndata and tl.fit on all of them together, or read them one "
                "by one."
            )
    return shared


def _shared_root(root: Mapping, same: set[str]) -> dict[str, Any]:
    """Of the root of one file what is the same in all: its fits, the last of which counts as the last one."""
    fits = {key: fit for key, fit in root.get(UNS.fits, {}).items() if f"{UNS.fits}/{key}" in same}
    shared = {key: value for key, value in root.items() if key in same}
    if fits:
        shared |= {UNS.fits: fits, UNS.last_fit: shared.get(UNS.last_fit, list(fits)[-1])}
    return shared


def _flat(root: Mapping) -> dict[str, Any]:
    """Setup, each fit, and what else there is, by name."""
    flat = {key: value for key, value in root.items() if key != UNS.fits}
    return flat | {f"{UNS.fits}/{key}": fit for key, fit in root.get(UNS.fits, {}).items()}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(_equal(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, pd.DataFrame | pd.Series | pd.Index):
        return type(one) is type(other) and one.equals(other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and _equal_arrays(one, other)
    if sp.issparse(one):
        return sp.issparse(other) and one.shape == other.shape and (one != other).nnz == 0
    return bool(np.all(one == other)) or bool(np.all(one != one) and np.all(other != other))


def _equal_arrays(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether they hold the same; h5ad and zarr give text in different types."""
    if one.dtype.names != other.dtype.names or one.shape != other.shape:
        return False
    if one.dtype.names:
        return all(_equal_arrays(one[name], other[name]) for name in one.dtype.names)
    if one.dtype.kind in "fc" and other.dtype.kind in "fc":
        return np.array_equal(one, other, equal_nan=True)
    return one.tolist() == other.tolist()
