"""Pickles as pandas 0.2x and NumPy before 2 wrote them, byte for byte the same operations."""

from __future__ import annotations

import io
import pickle

import numpy as np


class DataFrame:
    def __init__(self, state):
        self.state = state

    def __getstate__(self):
        return self.state


class BlockManager(DataFrame):
    pass


class Index:
    def __init__(self, values, name=None):
        self.values, self.name = values, name

    def __reduce_ex__(self, protocol):
        return _new_Index, (type(self), {"data": self.values, "name": self.name})


class Int64Index(Index):
    pass


class _new_Index:
    pass


NAMES = {
    np.zeros(0).__reduce__()[0]: ("numpy.core.multiarray", "_reconstruct"),
    DataFrame: ("pandas.core.frame", "DataFrame"),
    BlockManager: ("pandas.core.internals", "BlockManager"),
    Index: ("pandas.core.indexes.base", "Index"),
    Int64Index: ("pandas.core.indexes.numeric", "Int64Index"),
    _new_Index: ("pandas.core.indexes.base", "_new_Index"),
}


class _Pickler(pickle._Pickler):
    def save_global(self, obj, name=None):
        if obj in NAMES:
            self.write(pickle.GLOBAL + "{}\n{}\n".format(*NAMES[obj]).encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def _frame(columns, rows, name):
    """Blocks by type, as pandas has them; those of one type stand next to each other here."""
    names = list(columns)
    index = (Index if isinstance(rows[0], str) else Int64Index)(np.array(rows, dtype=object), name)
    axes = [Index(np.array(names, dtype=object)), index]
    blocks = []
    for kind in dict.fromkeys(values.dtype for values in columns.values()):
        places = [i for i, key in enumerate(names) if columns[key].dtype == kind]
        block = np.array([columns[names[i]] for i in places])
        blocks.append({"values": block, "mgr_locs": slice(places[0], places[-1] + 1, 1)})
    layout = {"0.14.1": {"axes": axes, "blocks": blocks}}
    manager = BlockManager((axes, [b["values"] for b in blocks], [axes[0]] * len(blocks), layout))
    return DataFrame({"_data": manager, "_typ": "dataframe", "_metadata": []})


def pickled(content):
    """A dict of which tuples (columns, rows, name of the rows) are tables."""
    content = {key: _frame(*value) if isinstance(value, tuple) else value for key, value in content.items()}
    out = io.BytesIO()
    _Pickler(out, 3).dump(content)
    return out.getvalue()
