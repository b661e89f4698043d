"""Files as the functions of an AnnData see them, and what they write in the files: ``tl.fit("atlas.h5ad")``."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING

from anndata import AnnData

from scvi_ext._errors import first_line, listing
from scvi_ext._torchrun import n_processes
from scvi_ext.data.backed import Backed, is_path, open_backed
from scvi_ext.engine.interrupt import TO_STOP, deferred_interrupt
from scvi_ext.files.changes import Snapshot
from scvi_ext.files.spool import Spools
from scvi_ext.files.writing import check_names, check_writable, rescue, write_changes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

    from scvi_ext.data.backed import Source
    from scvi_ext.engine.processes import Team
    from scvi_ext.files.changes import Change


def takes_files(function: Callable, namespace: str, *, together: bool = False) -> Callable:
    """The same function of a namespace for an AnnData, in memory or backed, and for the path of a file or several.

    What it writes goes into the files when it is done, or was interrupted. Of several processes the first writes, and
    calls the function for all of them unless they do so ``together``.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("adata")
        if not _names_files(given):
            if _writes(function, kwargs):
                _check_copied(given, copy=kwargs.get("copy", False))
            return function(*args, **kwargs)
        if args:
            return _on_files(function, given, args[1:], kwargs, together)
        others = {name: value for name, value in kwargs.items() if name != "adata"}
        return _on_files(function, given, (), others, together)

    call.__module__ = namespace  # where it is found, by users and by pickle
    return call


def _names_files(given: Any) -> bool:
    """Whether it is a path, several paths, or a mapping with some."""
    if isinstance(given, Mapping):
        return any(map(_names_files, given.values()))
    if not isinstance(given, list | tuple):
        return is_path(given)
    found = [is_path(one) for one in given]
    if any(found) and not all(found):
        msg = (
            "adata is a list of paths and other things: give paths only, or open them together, "
            "adata = scvi_ext.io.read_backed([...])."
        )
        raise TypeError(msg)
    return all(found)


def _check_copied(given: Any, *, copy: bool) -> None:
    """Raise a ValueError if writing takes a copy of an AnnData that is backed."""
    for adata in given.values() if isinstance(given, Mapping) else (given,):
        if isinstance(adata, AnnData) and adata.isbacked and (adata.is_view or copy):
            found = "a view of a backed AnnData" if adata.is_view else "backed, with copy=True"
            msg = f"adata is {found}, which cannot be copied in memory as it is: call adata = adata.to_memory() first."
            raise ValueError(msg)


def _on_files(function: Callable, given: Any, args: tuple, kwargs: dict[str, Any], together: bool) -> Any:
    if kwargs.get("copy"):
        msg = "copy=True has no effect on files: leave it out, or read them, scvi_ext.io.read_backed(...)."
        raise ValueError(msg)
    writes = _writes(function, kwargs)
    parts = given if isinstance(given, Mapping) else {"": given}
    team = _team() if writes else None
    first = team is None or team.is_first
    for paths in parts.values() if writes and first else ():
        if _names_files(paths):
            for path in [paths] if is_path(paths) else paths:
                check_writable(path)
    if team is not None:
        team.wait()  # nobody opens a file that another is about to write to
        if not (first or together):
            team.wait()
            return team.wait()
    opened: dict[str, Any] = {}
    try:
        for name, paths in parts.items():
            opened[name] = open_backed(paths) if _names_files(paths) else paths
        files = [adata for name, adata in opened.items() if _names_files(parts[name])]
        for one in files:
            one.written_back = writes
        adata = opened if isinstance(given, Mapping) else opened[""]
        if first:
            result = _call(function, adata, files, args, kwargs, writes, team)
        else:
            result = function(adata, *args, **kwargs)
    except BaseException:
        _close(opened.values())
        raise
    if isinstance(result, Iterator):
        return _then_close(result, opened)
    _close(opened.values())
    if team is not None:
        if not first:
            team.wait()  # all have closed what the first is about to write to
        team.wait()
    return result


def _team() -> Team | None:
    """The processes that ``torchrun`` has started; None where this one is alone."""
    if n_processes() == 1:
        return None
    from scvi_ext.engine.device import resolve_device
    from scvi_ext.engine.processes import device_of_rank, join

    team = join(device_of_rank(resolve_device()))
    return team if team.n > 1 else None


def _writes(function: Callable, kwargs: Mapping) -> bool:
    """Whether it writes into an AnnData: all that do can also copy, and some can return something instead."""
    signature = inspect.signature(function)
    if "copy" not in signature.parameters or kwargs.get("iterate", False):
        return False
    if "return_mean" not in signature.parameters:
        return True
    of_cells = "float" in str(
        signature.return_annotation
    )  # their mean is returned, and else the mean of samples written
    return bool(kwargs.get("return_mean", True)) != of_cells


def _call(
    function: Callable,
    adata: Any,
    files: Sequence[Backed],
    args: tuple,
    kwargs: Mapping,
    writes: bool,
    team: Team | None,
) -> Any:
    if not writes:
        returns = str(inspect.signature(function).return_annotation)
        if returns == "AnnData":  # one of its own
            adata = adata.to_memory()
        return function(adata, *args, **kwargs)
    snapshots = [Snapshot(one) for one in files]
    for one in files:
        one.spools = Spools(one.n_obs, one.n_vars, one.sources)
    try:
        try:
            result = function(adata, *args, **kwargs)
            if team is not None:
                team.wait()
        except BaseException as error:  # a fit that Ctrl-C ends is written all the same
            try:
                _write_back(snapshots, team)
            except OSError as second:
                error.add_note(str(second))
            raise
        _write_back(snapshots, team)
    finally:
        for one in files:
            one.spools.close()
    return result


def _then_close(blocks: Iterator, opened: Mapping[str, Any]) -> Iterator:
    try:
        yield from blocks
    finally:
        _close(opened.values())


def _close(opened: Sequence[Any]) -> None:
    for adata in opened:
        if isinstance(adata, Backed):
            adata.close()


def _write_back(snapshots: Sequence[Snapshot], team: Team | None) -> None:
    """Write what has changed into the files; who asks to stop meanwhile waits."""
    with deferred_interrupt(TO_STOP, patient=team is not None) as late:
        for snapshot in snapshots:
            _write(snapshot.adata, list(snapshot.changes()))
            for then in snapshot.adata.waiting:
                then()
    if late.terminated:
        raise SystemExit(128 + signal.SIGTERM)
    if late.requested:
        raise KeyboardInterrupt


def _write(adata: Backed, changes: Sequence[Change]) -> None:
    """Write into the files of ``adata``: the only place where files of users are written to."""
    if not changes:
        return
    adata.close()  # HDF5 lets nobody write while somebody reads
    cells, genes, written, failures = adata.obs_names, adata.var_names, [], []
    for source in adata.sources:
        own = [change.of(source) for change in changes]
        rows = cells[source.first : source.stop]
        names = genes if source.genes is None else genes[source.genes.argsort()]
        try:
            check_names(source.path, rows, names)
            write_changes(source.path, own)
            written.append(source.path)
        except Exception as error:
            failures.append((_rescued(source, rows, names, own, error), error))
    _log(written, changes)
    if failures:
        again = " Or, when they can be written to, give resume='auto': the fit is in its checkpoint as well."
        messages = " ".join(message for message, _ in failures)
        raise OSError(messages + (again if adata.waiting else "")) from failures[0][1]


def _rescued(source: Source, cells: Any, genes: Any, changes: Sequence[Change], error: Exception) -> str:
    what = f"{str(source.path)!r} could not be written to: {first_line(error)}."
    try:
        target = rescue(source.path, cells, genes, changes)
    except Exception as second:
        return f"{what} Nor could the results be written elsewhere: {first_line(second)}. They are lost."
    names = listing(_named(changes), 5)
    return (
        f"{what} The results ({names}) are in {str(target)!r}, an AnnData with the same cells and genes in the same "
        "order: read it with anndata.read_h5ad, take them from there, and remove it."
    )


def _named(changes: Sequence[Change]) -> list[str]:
    return ["/".join(change.place) for change in changes if change.value is not None]


def _log(paths: Sequence[Path], changes: Sequence[Change]) -> None:
    from scanpy import logging as logg

    if paths:
        logg.hint(f"written into {listing(paths, 3)}: {listing(_named(changes))}")
