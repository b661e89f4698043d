"""A fit under way as a file, from which it goes on when its process has come to an end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scanpy import logging as logg

from scvi_ext._errors import first_line, listing
from scvi_ext._keys import UNS, valid_key
from scvi_ext._torchrun import rank
from scvi_ext.data.backed import is_written_back
from scvi_ext.data.registry import read_fit, read_root
from scvi_ext.portable import FORMAT, encode, from_arrays, to_arrays

if TYPE_CHECKING:
    from typing import Any

    from anndata import AnnData

    from scvi_ext._contract import SavedFit
    from scvi_ext.engine.processes import Team
    from scvi_ext.engine.progress import Progress
    from scvi_ext.tl._train import Prepared

_EVERY = 60  # seconds: what is lost with a process is at most this and an epoch
_RENAMED = {"patience": "early_stopping"}  # of a run, what its option is called
_OF_PLAN = {
    "name": "plan",
    "n_epochs": "max_epochs",
    "batch_size": "batch_size",
    "lr": "lr",
    "weight_decay": "weight_decay",
    "kl_warmup_steps": "kl_warmup",
}
_FIT = "scvi_ext.fit"  # of the header of a safetensors file, which holds text


class CheckpointFile:
    """Where a run that is under way is kept, besides the memory of its process.

    Parameters
    ----------
    path
        One safetensors file, which has its name only when it is complete.
    asked
        Whether somebody asked for it; else it is removed when the run is over.
    """

    def __init__(self, path: str | os.PathLike, *, asked: bool = True):
        self.path, self.asked = Path(path).expanduser(), asked
        self.written = time.monotonic()
        if self.path.is_dir() or not self.path.absolute().parent.is_dir():
            msg = f"checkpoint={str(self.path)!r} cannot be a file: give a name in a folder that exists."
            raise ValueError(msg)
        if not os.access(self.path if self.path.exists() else self.path.absolute().parent, os.W_OK):
            msg = f"checkpoint={str(self.path)!r} cannot be written: the file or its folder is read-only."
            raise PermissionError(msg)

    def check_replaceable(self) -> None:
        """Raise a ValueError if there is something else than a checkpoint; say it if one gives way that can go on."""
        if not self.path.is_file():
            return
        document = _document(self.path)
        if document is None:
            msg = f"checkpoint={str(self.path)!r} exists and is no checkpoint: give another name, so that it stays."
            raise ValueError(msg)
        status = document.get("status", {})
        if status.get("stop_reason") == "interrupted":
            logg.warning(
                f"{str(self.path)!r} is of a run that was interrupted at step {status['steps']}, and is replaced by "
                "this one; give resume=True to go on with that."
            )

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self.written >= _EVERY

    def write(self, fitted: SavedFit) -> None:
        """Replace what is there, in one step."""
        arrays, document = to_arrays(fitted)
        content = save(arrays, metadata={_FIT: json.dumps(document, allow_nan=False)})
        # A name for each process of a run, so that one that was killed here leaves what the next one takes away.
        beside = self.path.with_name(f".{self.path.name}.{rank()}")
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a name without content could be what remains of a machine that fails
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)
            self.written = time.monotonic()

    def read(self) -> SavedFit | None:
        """The fit; None where there is no file."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="numpy") as file:
                text = (file.metadata() or {}).get(_FIT)
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            msg = (
                f"checkpoint={str(self.path)!r} cannot be read ({first_line(error)}): it is damaged, or no checkpoint. "
                "Remove it to begin anew."
            )
            raise ValueError(msg) from error
        document = None if text is None else json.loads(text)
        if document is None or document["format"] > FORMAT:
            msg = f"checkpoint={str(self.path)!r} is not a checkpoint that this version of scvi_ext has written."
            raise ValueError(msg)
        return from_arrays(arrays, document)

    def remove(self) -> None:
        """Remove the file if nobody asked for it."""
        if not self.asked:
            self.path.unlink(missing_ok=True)

    def is_left(self, adata: AnnData, done: Progress) -> bool:
        """Whether it stays when a run has ended like this: if asked for, or if it has what is nowhere else."""
        in_file = is_written_back(adata) and done.failure is None
        return self.asked or (done.stop_reason == "interrupted" and not in_file)


def _document(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None if it is something else, or cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get(_FIT, "null"))
    except (OSError, SafetensorError):
        return None


def checkpoint_file(
    checkpoint: bool | str | os.PathLike, adata: AnnData | Mapping[str, AnnData], key: str, team: Team
) -> CheckpointFile | None:
    """Where a run is kept while it is under way, if not in memory only."""
    if not isinstance(checkpoint, bool | str | os.PathLike):
        msg = (
            f"checkpoint={checkpoint!r} is a {type(checkpoint).__name__}; True, False or the path of a file is needed."
        )
        raise TypeError(msg)
    several = isinstance(adata, Mapping)
    if isinstance(checkpoint, bool):
        return None if several else _unasked(adata, key, team)
    if several:
        msg = f"checkpoint={str(checkpoint)!r} has no effect: a fit to several data sets is kept inside them only."
        raise ValueError(msg)
    return CheckpointFile(checkpoint)


def _unasked(adata: AnnData, key: str, team: Team) -> CheckpointFile | None:
    """Of a fit that goes into files: beside the first one. Of several processes: in the working directory else."""
    valid_key(key)
    if is_written_back(adata):
        data = adata.sources[0].path
        if os.access(data.parent, os.W_OK):
            return CheckpointFile(data.with_name(f"{data.name}.{key}.checkpoint"), asked=False)
    return CheckpointFile(f"{key}.checkpoint", asked=False) if team.n > 1 else None


def fit_inside(adata: AnnData, start: Prepared) -> SavedFit | None:
    """The fit of this name that was interrupted and can go on, or was finished just as it is wanted now."""
    key = start.fits[0].key
    if key not in read_root(adata).get(UNS.fits, {}):
        return None
    fitted = usable(start, read_fit(adata, key))
    return None if fitted is None or (fitted.checkpoint is None and not is_finished(fitted)) else fitted


def usable(start: Prepared, found: SavedFit) -> SavedFit | None:
    """A fit, unless it is finished and another one is wanted now."""
    return None if is_finished(found) and _differences(start, found) else found


def is_finished(fitted: SavedFit) -> bool:
    """Whether its run came to an end by itself."""
    return fitted.status.get("stop_reason") != "interrupted"


def go_on(start: Prepared, found: SavedFit) -> Prepared:
    """``start``, from where the fit ``found`` stands; a ValueError unless it is the same fit of the same cells."""
    if found.key != start.fits[0].key:
        msg = (
            f"The checkpoint is of the fit {found.key!r}, not {start.fits[0].key!r}: go on with it under that name, "
            "key_added=..., or give resume=False to begin anew."
        )
        raise ValueError(msg)
    differences = _differences(start, found)
    if differences:
        msg = (
            f"The fit {found.key!r} to go on with {differences}. Go on with the same ones, or give resume=False to "
            "begin anew."
        )
        raise ValueError(msg)
    return replace(start, fits=[found], checkpoint=found.checkpoint)


def _differences(start: Prepared, found: SavedFit) -> str:
    """In what another fit is not the one that is wanted; empty if it is."""
    new = start.fits[0]
    if list(found.var_names) != list(new.var_names) or found.status["data"] != start.store.fingerprint():
        return "is of other data: cells, counts or covariates have changed since, or their order has"
    one, other = _options(found), _options(new)
    options = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    if options & {"batch_size", "max_epochs", "train_size"}:
        options.discard("kl_warmup")  # which is told in steps
    if options or found.model != new.model or _plain(found.frozen) != _plain(new.frozen):
        return f"was given other options: {listing(sorted(options) or ['model'])}"
    return ""


def _options(fitted: SavedFit) -> dict[str, Any]:
    """What a fit was given, under the names of the arguments of ``tl.fit``."""
    run, plan = _plain(fitted.run), _plain(fitted.run["plan"])
    own = {_RENAMED.get(name, name): value for name, value in run.items() if name != "plan"}
    return {**_plain(fitted.config), **own, **{theirs: plan.get(ours) for ours, theirs in _OF_PLAN.items()}}


def _plain(value: object) -> Any:
    """As it comes out of a file: no tuples, no None."""
    value = encode(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    return value
