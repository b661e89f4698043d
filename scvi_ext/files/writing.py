"""Entries of an AnnData written into its file, h5ad or zarr: each is complete before it gets its name."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, write_elem

from scvi_ext._errors import first_line
from scvi_ext._torchrun import n_processes
from scvi_ext.data.backed import advice_on, is_zarr, path_of, zarr_library
from scvi_ext.files.spool import DTYPE, Spooled

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from scvi_ext.files.changes import Change

# While an entry is written it stands under this name: AnnData reads all that is in a file but what begins with "raw.".
_NEW = "raw.scvi_ext_new"
_OLD = "raw.scvi_ext_old"
_AT_ONCE = 2**22  # bytes: 4 MB
_PATIENCE = 10.0  # seconds: other processes of a run close the file when they have finished, too


def check_writable(path: str | os.PathLike) -> None:
    """Raise an OSError unless the file can be written to now."""
    found = path_of(path)
    places = [found, found / "uns", found / "obs"] if is_zarr(found) else [found]
    for place in places:
        if place.exists() and not os.access(place, os.W_OK):
            msg = (
                f"{str(place)!r} is read-only, and results are written into it. Work on a copy, or on what "
                "scvi_ext.io.read_backed returns: then they stay in memory."
            )
            raise PermissionError(msg)
    if is_zarr(found):
        return
    if found.stat().st_size == 0:
        msg = f"{str(found)!r} is empty: it is no h5ad file. Get it again."
        raise OSError(msg)
    try:
        h5py.File(found, "r+").close()
    except OSError as error:
        if_open = "It is open here or in another process: close it there, adata.file.close() or .close(), first."
        msg = f"{str(found)!r} cannot be opened for writing: {first_line(error)}. {advice_on(error, if_open)}"
        raise OSError(msg) from error


def check_names(path: Path, cells: pd.Index, genes: pd.Index) -> None:
    """Raise a ValueError if the file does not have these cells and genes: it is not the one that was read."""
    with _Zarr(path) if is_zarr(path) else _Hdf5(path) as file:
        for slot, names in (("obs", cells), ("var", genes)):
            table = file.store[slot]
            found = read_elem(table[table.attrs["_index"]])
            if not np.array_equal(np.asarray(found).astype(object), np.asarray(names).astype(object)):
                what = "cells" if slot == "obs" else "genes"
                msg = f"it has other {what} than when it was read, so that another file has taken its place meanwhile"
                raise ValueError(msg)


def write_changes(path: Path, changes: Sequence[Change]) -> None:
    """Write what has changed into a file; each entry that is written is whole, whenever the process ends."""
    with _Zarr(path) if is_zarr(path) else _Hdf5(path) as file:
        for change in changes:
            file.write(change)


def rescue(path: Path, cells: pd.Index, genes: pd.Index, changes: Sequence[Change]) -> Path:
    """Write what could not be written into a file into one beside it, or else into the folder of temporary files.

    What no file can hold is left out; an error is raised if that is everything.
    """
    failure = None
    for folder in (path.parent, Path(tempfile.gettempdir())):
        target, n_written = folder / f"{path.name}.scvi_ext_rescue.h5ad", 0
        try:
            AnnData(obs=pd.DataFrame(index=cells.rename(None)), var=pd.DataFrame(index=genes.rename(None))).write_h5ad(
                target
            )
        except OSError as error:
            failure = error
            target.unlink(missing_ok=True)
            continue
        for change in changes:
            try:
                write_changes(target, [change])
                n_written += 1
            except Exception as error:
                failure = error
        if n_written:
            return target
        target.unlink()
    raise failure


class _File(ABC):
    """An open file that entries are written into."""

    store: Any  # its root

    def write(self, change: Change) -> None:
        """Write one entry, or remove it."""
        *parents, name = change.place
        group, is_column = self._group(parents), change.place[0] in ("obs", "var")
        if is_column and name == group.attrs["_index"]:
            msg = f"{name!r} is what names are kept under in {parents[0]}: choose another name, key_added=..."
            raise ValueError(msg)
        if change.value is None:
            self._remove(group, name)
        else:
            self._write_new(change.value)
            self._put_in_place(group, name)
        if is_column:
            self._list_column(group, name, present=change.value is not None)
        self._flush()

    def _group(self, parents: Sequence[str]) -> Any:
        group = self.store
        for name in parents:
            if name not in group:
                write_elem(group, name, {})
            group = group[name]
        return group

    def _write_new(self, value: Any) -> None:
        if _NEW in self.store:  # of a process that was ended
            del self.store[_NEW]
        try:
            if isinstance(value, Spooled):
                self._write_spooled(value)
            else:
                if isinstance(value, pd.Series):
                    value = value.to_numpy() if isinstance(value.dtype, np.dtype) else value.array
                with warnings.catch_warnings():  # of anndata: it will write zarr in another way, one day
                    warnings.filterwarnings("ignore", "zarr v3 autosharding", UserWarning)
                    write_elem(self.store, _NEW, value)
        except BaseException:
            if _NEW in self.store:
                del self.store[_NEW]
            raise

    def _write_spooled(self, values: Spooled) -> None:
        step = max(1, _AT_ONCE // max(1, values.shape[1] * DTYPE.itemsize))
        array = self._new_array(values.shape, step)
        for first in range(0, values.shape[0], step):
            stop = min(first + step, values.shape[0])
            array[first:stop] = values.rows(first, stop)
        array.attrs["encoding-type"], array.attrs["encoding-version"] = "array", "0.2.0"

    def _list_column(self, group: Any, name: str, *, present: bool) -> None:
        columns = [str(column) for column in group.attrs["column-order"] if column != name or present]
        if present and name not in columns:
            columns.append(name)
        group.attrs["column-order"] = columns

    @abstractmethod
    def _new_array(self, shape: tuple[int, int], step: int) -> Any:
        """An array of float32, to be filled ``step`` rows at a time."""

    @abstractmethod
    def _put_in_place(self, group: Any, name: str) -> None:
        """Give what was written its name, instead of what has it now."""

    @abstractmethod
    def _remove(self, group: Any, name: str) -> None:
        """Delete an entry, if it is there."""

    @abstractmethod
    def _flush(self) -> None:
        """Have everything in the file."""


def _opened(path: Path) -> h5py.File:
    """An h5ad file to write into: one that another process of the run is about to close is waited for."""
    give_up = time.monotonic() + (_PATIENCE if n_processes() > 1 else 0)
    while True:
        try:
            return h5py.File(path, "r+")
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


class _Hdf5(_File):
    def __init__(self, path: Path):
        self.store = _opened(path)

    def __enter__(self) -> _Hdf5:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def _new_array(self, shape: tuple[int, int], step: int) -> Any:
        return self.store.create_dataset(_NEW, shape, DTYPE)

    def _put_in_place(self, group: Any, name: str) -> None:
        self._flush()  # the entry is in the file before anything refers to it
        self._remove(group, name)
        self.store.move(_NEW, f"{group.name}/{name}")

    def _remove(self, group: Any, name: str) -> None:
        if name in group:
            del group[name]

    def _flush(self) -> None:
        self.store.flush()


class _Zarr(_File):
    def __init__(self, path: Path):
        self.zarr, self.path = zarr_library(path), path
        self.is_3 = not self.zarr.__version__.startswith("2.")
        self.consolidated = self._is_consolidated()
        # Consolidated metadata would hide what is new, and are made again at the end.
        options = {"use_consolidated": False} if self.is_3 else {}
        self.store = self.zarr.open_group(str(path), mode="r+", **options)

    def __enter__(self) -> _Zarr:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path / _OLD, ignore_errors=True)
        if self.consolidated:
            with warnings.catch_warnings():  # of format 3: that they are no part of the specification yet
                warnings.simplefilter("ignore")
                self.zarr.consolidate_metadata(str(self.path))

    def _is_consolidated(self) -> bool:
        if (self.path / ".zmetadata").is_file():
            return True
        group = self.zarr.open_group(str(self.path), mode="r")
        return self.is_3 and group.metadata.consolidated_metadata is not None

    def _new_array(self, shape: tuple[int, int], step: int) -> Any:
        chunks = (max(1, min(step, shape[0])), max(1, shape[1]))
        create = self.store.create_array if self.is_3 else self.store.create_dataset
        return create(_NEW, shape=shape, dtype=DTYPE, chunks=chunks)

    def _put_in_place(self, group: Any, name: str) -> None:
        self._remove(group, name)
        (self.path / _NEW).rename(self._place(group, name))

    def _remove(self, group: Any, name: str) -> None:
        place = self._place(group, name)
        if place.exists():
            shutil.rmtree(self.path / _OLD, ignore_errors=True)
            place.rename(self.path / _OLD)
            shutil.rmtree(self.path / _OLD)

    def _place(self, group: Any, name: str) -> Path:
        return self.path.joinpath(*group.name.strip("/").split("/"), name)

    def _flush(self) -> None:
        pass
