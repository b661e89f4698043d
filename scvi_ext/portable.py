"""A fit in the types that files can hold: numeric arrays by name, and a document in the types of JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_ext._contract import SavedFit
from scvi_ext.data.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1  # raised when a reader of this version could misread it
_GROUPS = ("state", "checkpoint")  # prefixes of the names of arrays
_NON_FINITE = "__float__"  # JSON has no NaN and no infinity: {"__float__": "nan"}


def to_arrays(fit: SavedFit) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Numeric arrays by name, and a document that JSON can hold."""
    groups = zip(_GROUPS, (fit.state, fit.checkpoint or {}), strict=True)
    # safetensors takes memory as it lies: in the order of C, or the numbers would change places.
    named = {f"{group}.{name}": np.asarray(a, order="C") for group, arrays in groups for name, a in arrays.items()}
    # It holds no text, which comes as NumPy's text, objects or variable-length strings, depending on what read it.
    text = {name: array for name, array in named.items() if array.dtype.kind not in "biuf"}
    document = {
        "format": FORMAT,
        "key": fit.key,
        "model": fit.model,
        "config": dict(fit.config),
        "run": dict(fit.run),
        "setup": dict(fit.setup),
        "var_names": [str(gene) for gene in fit.var_names],
        "status": dict(fit.status),
        "history": {
            "epochs": fit.history.index.tolist(),
            "columns": {
                str(name): {"dtype": str(column.dtype), "values": column.tolist()}
                for name, column in fit.history.items()
            },
        },
        "text": {name: array.tolist() for name, array in text.items()},
        "has_checkpoint": fit.checkpoint is not None,
        "frozen": None if fit.frozen is None else dict(fit.frozen),
        "joint": None if fit.joint is None else dict(fit.joint),
    }
    return {name: array for name, array in named.items() if name not in text}, encode(document)


def from_arrays(arrays: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> SavedFit:
    """The inverse of :func:`to_arrays`."""
    named = {**arrays, **{name: np.array(text) for name, text in document["text"].items()}}
    state, checkpoint = (
        {name.removeprefix(f"{group}."): array for name, array in named.items() if name.startswith(f"{group}.")}
        for group in _GROUPS
    )
    history = decode(document["history"])
    epochs = pd.Index(history["epochs"], name="epoch")
    columns = {
        name: pd.Series(column["values"], epochs, dtype=column["dtype"]) for name, column in history["columns"].items()
    }
    return SavedFit(
        key=document["key"],
        model=document["model"],
        config=decode(document["config"]),
        run=decode(document["run"]),
        setup=Registry.from_uns(document["setup"]).to_uns(),
        var_names=np.array(document["var_names"]),
        state=state,
        history=pd.DataFrame(columns, index=epochs),
        status=decode(document["status"]),
        checkpoint=checkpoint if document["has_checkpoint"] else None,
        frozen=decode(document.get("frozen")),
        joint=decode(document.get("joint")),
    )


def encode(value: Any) -> Any:
    """``value`` in the types of JSON."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_NON_FINITE: str(value)}
    return value


def decode(value: Any) -> Any:
    """The inverse of :func:`encode`, in plain Python."""
    if isinstance(value, dict):
        if value.keys() == {_NON_FINITE}:
            return float(value[_NON_FINITE])
        return {k: decode(v) for k, v in value.items()}
    return [decode(v) for v in value] if isinstance(value, list) else value
