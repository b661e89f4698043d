from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_ext._errors import listing, no_cells
from scvi_ext.data.corruption import changed_entries, read_corruption, read_layer, read_pair
from scvi_ext.data.store import resolve_indices
from scvi_ext.functional.imputation import error_measures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


def imputation_error(
    adata: AnnData,
    layer: str | None = None,
    *,
    corruption: str = "corrupted",
    indices: Sequence | None = None,
) -> pd.Series:
    """How far imputed counts, of any origin, are from those that :func:`~scvi_ext.pp.corrupt` has changed.

    Holds a layer against the original counts at the entries where the corrupted layer differs from them: the measures
    of :func:`~scvi_ext.tl.imputation_score`, so that any other method can be judged alike. Values are taken as they
    are: bring them to counts at the depth of the originals first.

    Parameters
    ----------
    adata
        Annotated data that :func:`~scvi_ext.pp.corrupt` has written to.
    layer
        Layer with the imputed counts, cells x genes; ``X`` by default.
    corruption
        The corrupted layer.
    indices
        The cells: positions, mask or names. All by default.

    Returns
    -------
    ``median`` and ``mean`` of abs(original - imputed) over all entries, and the means over cells and over genes of
    their medians, ``median_per_cell`` and ``median_per_gene``. Lower is better.

    Raises
    ------
    KeyError
        No such corruption or layer.
    ValueError
        There are no cells, values are missing at these entries, nothing was changed in these cells, or the two layers
        cannot be original and corrupted counts any more: one of them is not whole counts, a count has risen, or, after
        ``"uniform"``, has fallen without becoming 0. Other changes of the originals are not noticed.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.corrupt(adata, method="binomial")
    >>> float(sx.metrics.imputation_error(adata, "corrupted")["median"])
    1.0
    """
    record = read_corruption(adata, corruption)
    rows = resolve_indices(adata, indices)
    original, corrupted = read_pair(adata, record, rows)
    imputed = read_layer(adata, layer, rows)
    if original.shape[0] == 0:
        raise no_cells()
    entries = changed_entries(original, corrupted, record)
    values = np.asarray(imputed[entries.cells, entries.genes]).ravel()
    missing = ~np.isfinite(values)
    if missing.any():
        slot = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        genes = adata.var_names[np.unique(entries.genes[missing])]
        msg = (
            f"{slot} is NaN or infinite at {missing.sum()} of {len(values)} entries that were corrupted, in "
            f"{len(np.unique(entries.cells[missing]))} cells and in genes {listing(genes, 3)}. Choose cells that were "
            "imputed, indices=..., and leave out genes that were not."
        )
        raise ValueError(msg)
    return pd.Series(error_measures(entries.original, values, entries.cells, entries.genes))
