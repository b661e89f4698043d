"""Read what ``torch.save`` wrote without running anything that the file names.

A pickle is a program: it names functions and calls them. Here no name is ever looked up. Each one becomes a passive
record that keeps its arguments, and the records of a few known containers, arrays and tensors are then spelled out as
plain Python and NumPy. So the file decides what it contains, and never what is done.

``torch.load(weights_only=True)`` follows a similar idea. It is not used, because models trained with the defaults of
scvi-tools hold tables of pandas, whose inner names change between versions and would each have to be allowed; because
an allowed ``numpy.ndarray`` restores itself from state that it trusts; and because before torch 2.6 a file in an older
format could still make it run code.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = b"PK\x03\x04"  # of a zip file: what torch.save has written since 1.6
_STORAGES = {
    "torch.DoubleStorage": "f8",
    "torch.FloatStorage": "f4",
    "torch.HalfStorage": "f2",
    "torch.LongStorage": "i8",
    "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
_DICTS = {"builtins.dict", "collections.OrderedDict", "collections.defaultdict"}
_NAMES = {
    *_STORAGES,
    *_DICTS,
    "_codecs.encode",
    "builtins.bytes",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "torch._utils._rebuild_tensor_v2",
}
# What tables of pandas are made of; pyarrow holds the text in those of pandas 3. They stay records.
_TABLES = ("pandas.", "pyarrow.", "builtins.slice")
_NUMBERS = re.compile(r"b1|[iu][1248]|f[248]|U[1-9]\d*")  # and text of fixed length


class Record:
    """What the file calls an object: a name, and what was handed to it. Nothing of that name has been looked up."""

    name = ""

    def __new__(cls, *args: Any) -> Record:
        record = super().__new__(cls)
        record.args = args
        record.entries = {}
        record.state = None
        return record

    def __init__(self, *args: Any):
        """Arguments of any number are kept by ``__new__``."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value


class _RefusedError(ValueError):
    """The file refers to something that is not read."""


class _PassiveUnpickler(pickle.Unpickler):
    """An unpickler for which every name is a fresh class of records, so that calling it can only make a record."""

    def __init__(self, data: bytes, path: Path):
        super().__init__(BytesIO(data))
        self.path = path

    def find_class(self, module: str, name: str) -> type[Record]:
        full = f"{module}.{name}"
        # Names of Python 2, and of NumPy before 2.
        full = re.sub(r"^__builtin__\.", "builtins.", full)
        full = re.sub(r"^numpy\.core\.", "numpy._core.", full)
        if full not in _NAMES and not full.startswith(_TABLES):
            msg = (
                f"{str(self.path)!r} refers to {module + '.' + name!r}. Only containers, NumPy arrays and tensors are "
                "read, so the file is refused; nothing in it was executed. Unless you know where it comes from and why "
                "it needs this, do not open it with torch.load or scvi-tools either."
            )
            raise _RefusedError(msg)
        return type("Record", (Record,), {"name": full})

    def persistent_load(self, pid: Any) -> Record:
        storage = type("Record", (Record,), {"name": "storage"})
        return storage(*pid)


def read_torch_archive(path: Path) -> Any:
    """The object that ``torch.save`` wrote, as dicts, lists, strings, numbers and NumPy arrays.

    Parameters
    ----------
    path
        A file in the zip format of torch 1.6 and newer.

    Returns
    -------
    Plain Python and NumPy. An object of pandas stays a :class:`Record` with plain content.

    Raises
    ------
    ValueError
        The file is not of this kind, is damaged, or refers to anything but containers, arrays and tensors.
    """
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        msg = (
            f"{str(path)!r} does not begin like a zip file, which torch.save writes since torch 1.6. Older formats are "
            "not read; nothing in the file was executed. Save the model again with a current scvi-tools."
        )
        raise ValueError(msg)
    try:
        with zipfile.ZipFile(path) as archive:
            content = _Archive(archive)
            return content.plain(_PassiveUnpickler(content.read("data.pkl"), path).load())
    except _RefusedError:
        raise
    except Exception as error:  # a crafted or cut-off file can end in any of them
        msg = (
            f"{str(path)!r} cannot be read as a file of torch.save ({type(error).__name__}: {error}). It may be cut "
            "off or damaged: copy it again. Nothing in it was executed."
        )
        raise ValueError(msg) from error


class _Archive:
    """The files in the archive, and the plain values that its records stand for."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.root = archive.namelist()[0].partition("/")[0]
        self.big_endian = f"{self.root}/byteorder" in archive.namelist() and self.read("byteorder") == b"big"

    def read(self, name: str) -> bytes:
        return self.archive.read(f"{self.root}/{name}")

    def plain(self, value: Any) -> Any:
        """``value`` with all records inside it spelled out; those of tables stay, their content is spelled out."""
        if isinstance(value, dict):
            return {self.plain(k): self.plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.plain(v) for v in value)
        if not isinstance(value, Record):
            return value
        if value.name.startswith(_TABLES):
            value.args, value.state = self.plain(value.args), self.plain(value.state)
            return value
        if value.name in _DICTS:
            return self.plain(value.entries)
        if value.name == "torch._utils._rebuild_tensor_v2":
            return self._tensor(*value.args[:4])
        if value.name == "numpy._core.multiarray._reconstruct":
            return self._array(value)
        if value.name == "numpy._core.multiarray.scalar":
            dtype, data = value.args
            return _numbers(dtype, self.plain(data))[0]
        if value.name == "_codecs.encode":
            text, encoding = value.args
            _require(encoding == "latin1", f"bytes in the encoding {encoding!r}")
            return text.encode("latin1")
        if value.name == "builtins.bytes":
            _require(not value.args, "bytes made from something")
            return b""
        msg = f"{value.name} stands where a value is expected"
        raise pickle.UnpicklingError(msg)

    def _tensor(self, storage: Record, offset: int, shape: tuple, stride: tuple) -> np.ndarray:
        _, kind, key, _, _ = storage.args
        dtype = np.dtype(_STORAGES[kind.name]).newbyteorder(">" if self.big_endian else "<")
        flat = np.frombuffer(self.read(f"data/{key}"), dtype)
        _require(all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)), "a tensor of negative size")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        # Also refuses what is spread out from few numbers by strides of 0: no parameter is stored like that.
        _require(math.prod(shape) <= len(flat) and (0 in shape or last < len(flat)), "a tensor larger than its storage")
        steps = [step * dtype.itemsize for step in stride]
        strided = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
        return strided.astype(dtype.newbyteorder("="), order="C")

    def _array(self, record: Record) -> np.ndarray:
        _, shape, dtype, fortran, data = record.state
        data = self.plain(data)
        flat = _objects(data) if dtype.args[0] == "O8" else _numbers(dtype, data)
        return flat.reshape(shape, order="F" if fortran else "C")


def _objects(data: list) -> np.ndarray:
    array = np.empty(len(data), dtype=object)
    for i, value in enumerate(data):
        array[i] = value
    return array


def _numbers(dtype: Record, data: bytes) -> np.ndarray:
    code = dtype.args[0]
    _require(_NUMBERS.fullmatch(code), f"an array of dtype {code!r}")
    native = np.dtype(code)
    return np.frombuffer(data, native.newbyteorder(dtype.state[1])).astype(native)


def _require(condition: Any, found: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(found)
