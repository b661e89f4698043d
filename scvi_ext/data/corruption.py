"""What ``pp.corrupt`` wrote, and where it changed counts.

The originals are in the layer they always were in, so the record names that layer and nothing else has to travel: what
was changed is where the two layers differ, in any subset and any order of cells and genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scvi_ext._errors import missing_key
from scvi_ext._keys import UNS
from scvi_ext.data.matrix import counts_matrix, read_all, read_rows
from scvi_ext.data.registry import read_root

if TYPE_CHECKING:
    from typing import Any

    import scipy.sparse as sp
    from anndata import AnnData


@dataclass(frozen=True)
class Corruption:
    """How a layer was made out of another."""

    name: str  # of the corrupted layer
    layer: str | None  # with the originals; None is X
    method: str
    rate: float
    seed: int

    def to_uns(self) -> dict[str, Any]:
        """As a dict that h5ad and zarr can hold; a layer that is X is left out."""
        saved = {"method": self.method, "rate": self.rate, "seed": self.seed}
        return saved if self.layer is None else saved | {"layer": self.layer}

    @property
    def source(self) -> str:
        """The originals as messages call them."""
        return "adata.X" if self.layer is None else f"adata.layers[{self.layer!r}]"


class Entries(NamedTuple):
    """Entries that a corruption changed, cell by cell."""

    cells: np.ndarray  # (m,) integers, ascending
    genes: np.ndarray  # (m,) integers
    original: np.ndarray  # (m,) float32
    corrupted: np.ndarray  # (m,) float32


def read_corruption(adata: AnnData, name: str) -> Corruption:
    """The record of the corrupted layer ``name``."""
    known = read_root(adata).get(UNS.corruptions, {})
    if len(known) == 0:
        msg = f"adata.uns[{UNS.root!r}] has no {UNS.corruptions}: call scvi_ext.pp.corrupt(adata) first."
        raise KeyError(msg)
    if name not in known:
        raise missing_key(f"adata.uns[{UNS.root!r}][{UNS.corruptions!r}]", name, known)
    saved = known[name]
    layer = saved.get("layer")
    return Corruption(
        name=name,
        layer=None if layer is None else str(layer),
        method=str(saved["method"]),
        rate=float(saved["rate"]),
        seed=int(saved["seed"]),
    )


def corruption_layers(adata: AnnData) -> frozenset[str]:
    """Names of all corrupted layers of ``adata``, and of those with the originals."""
    known = read_root(adata).get(UNS.corruptions, {})
    return frozenset(known) | {str(saved["layer"]) for saved in known.values() if "layer" in saved}


def read_layer(
    adata: AnnData,
    layer: str | None,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
    role: str = "",
) -> sp.csr_matrix:
    """Float32 values of ``X`` or a layer at these cells and genes, in this order; None is all. Not to be written to."""
    matrix = counts_matrix(adata, layer, role)
    values = read_all(matrix) if rows is None else read_rows(matrix, rows)
    if columns is not None and not np.array_equal(columns, np.arange(adata.n_vars)):
        values = values[:, columns]
    values.sort_indices()
    return values


def read_pair(
    adata: AnnData, record: Corruption, rows: np.ndarray | None = None, columns: np.ndarray | None = None
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Original and corrupted counts, see :func:`read_layer`."""
    original = read_layer(adata, record.layer, rows, columns, f"the originals of the corruption {record.name!r}")
    return original, read_layer(adata, record.name, rows, columns, "which pp.corrupt wrote")


def changed_entries(original: sp.csr_matrix, corrupted: sp.csr_matrix, record: Corruption) -> Entries:
    """Where the two differ; a ValueError if nowhere, or if the method cannot have made the one of the other."""
    slots = {record.source: original, f"adata.layers[{record.name!r}]": corrupted}
    odd = [slot for slot, values in slots.items() if not _whole_counts(values.data)]
    if odd:
        msg = (
            f"{' and '.join(odd)} held whole counts when pp.corrupt was called, but not now: normalised since? "
            f"Bring {record.source} back to raw counts, and corrupt again."
        )
        raise ValueError(msg)
    lost = (original - corrupted).tocoo()
    changed = lost.data != 0
    if not changed.any():
        msg = (
            f"adata.layers[{record.name!r}] and {record.source} agree in all {original.shape[0]} cells and "
            f"{original.shape[1]} genes that are asked for: there is nothing to impute. Take more cells, or corrupt "
            f"with a rate above {record.rate:g}."
        )
        raise ValueError(msg)
    cells, genes = lost.row[changed].astype(np.int64), lost.col[changed].astype(np.int64)
    values = np.asarray(original[cells, genes]).ravel()
    left = values - lost.data[changed]
    uniform = record.method == "uniform"
    if (left > values).any() or (uniform and left.any()):
        how = "setting counts to zero in" if uniform else "lowering counts of"
        msg = (
            f"adata.layers[{record.name!r}] was made by {how} {record.source}, which is not what the two say now: one "
            f"of them has been changed since. Bring {record.source} back to what it was, and corrupt again."
        )
        raise ValueError(msg)
    return Entries(cells, genes, values, left)


def _whole_counts(values: np.ndarray) -> bool:
    return bool(np.all((values >= 0) & (values == np.rint(values)) & np.isfinite(values)))
