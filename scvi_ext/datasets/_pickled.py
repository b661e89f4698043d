"""Tables in a pickle, read without executing anything that it names.

A pickle is a program that calls what it names. Here four names are looked up, those that arrays of NumPy are restored
with; all that is called pandas becomes a passive record, whose parts are put together here; any other name is refused.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from pathlib import Path

_ARRAYS = {
    # Under the name that NumPy had for it before 2.0
    "numpy.core.multiarray._reconstruct": np.zeros(0).__reduce__()[0],
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "builtins.slice": slice,
}


class _Record:
    """What was handed to a class or function of pandas."""

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __init__(self, *args: Any):
        """Arguments of any number are kept by ``__new__``."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PassiveUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if found := _ARRAYS.get(f"{module}.{name}"):
            return found
        if module.startswith("pandas."):
            return type(name, (_Record,), {})
        msg = f"it refers to {module + '.' + name!r}"
        raise pickle.UnpicklingError(msg)


def read_frames(path: Path) -> dict[str, Any]:
    """The dict that is in a file, with its tables as DataFrames; they are those of pandas 0.20 to 0.25.

    Raises
    ------
    ValueError
        The file has anything else in it.
    """
    try:
        with path.open("rb") as file:
            content = _PassiveUnpickler(file).load()
        return {key: _frame(value) if isinstance(value, _Record) else value for key, value in content.items()}
    except Exception as error:  # a crafted or cut-off file can end in any of them
        msg = f"{str(path)!r} cannot be read as tables ({error}). Nothing in it was executed."
        raise ValueError(msg) from error


def _frame(table: _Record) -> pd.DataFrame:
    content = table.state["_data"].state[3]["0.14.1"]  # the version that this layout is of
    names, rows = (pd.Index(index.args[1]["data"], name=index.args[1]["name"]) for index in content["axes"])
    columns = {
        name: values
        for block in content["blocks"]
        for name, values in zip(names[block["mgr_locs"]], block["values"], strict=True)
    }
    return pd.DataFrame(columns, index=rows)[list(names)]
