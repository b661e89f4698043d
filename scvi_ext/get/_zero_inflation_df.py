from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_ext._contract import Capability
from scvi_ext._keys import FitKeys, column_name, zero_inflation_slots
from scvi_ext.data.matrix import counts_matrix, row_chunks
from scvi_ext.data.registry import Registry, codes, read_fit
from scvi_ext.data.store import check_still_raw
from scvi_ext.fitted import require

if TYPE_CHECKING:
    from anndata import AnnData


def zero_inflation_df(adata: AnnData, key: str | None = None, *, slot: str | None = None) -> pd.DataFrame:
    """Zero inflation of genes as a table, beside what was counted.

    Parameters
    ----------
    adata
        Annotated data that :func:`~scvi_ext.tl.get_zero_inflation` has written to.
    key
        Which fit; the last one by default.
    slot
        What the slots start with instead of ``"<key>_zero_inflation"``, where ``key_added`` was given.

    Returns
    -------
    One row for each gene of the fit, or for each gene and batch or label that has a delta of its own.

    ``gene``
        In the order of ``adata.var_names``.
    ``batch`` or ``label``
        Of fits with ``zero_inflation="gene-batch"`` or ``"gene-label"`` only.
    ``alpha``, ``beta``, ``probability``, ``called``, ``share``
        Posterior of delta, P(delta < 0.5), whether that is more than 0.5, and the expected share of technical zeros, as
        :func:`~scvi_ext.tl.get_zero_inflation` describes them.
    ``mean_count``, ``zeros``
        Mean count and share of zeros in the cells of ``adata``, or of the batch or label: float64, NaN without cells.

    Raises
    ------
    KeyError
        No such fit, or nothing was read out of it.
    ValueError
        The fitted model has no zero inflation of its own, or the counts that it was fitted to are no longer raw.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_zero_inflated(n_cells_batch=150, n_genes=50, n_batches=2)
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, "autozi", max_epochs=2, zero_inflation="gene-batch")
    >>> sx.tl.get_zero_inflation(adata)
    >>> sx.get.zero_inflation_df(adata).columns.tolist()
    ['gene', 'batch', 'alpha', 'beta', 'probability', 'called', 'share', 'mean_count', 'zeros']
    """
    fit = read_fit(adata, key)
    require(Capability.ZERO_INFLATION, fit)
    slots = zero_inflation_slots(FitKeys(fit.key).zero_inflation if slot is None else slot)
    by = {"gene-batch": "batch", "gene-label": "label"}.get(fit.config["zero_inflation"])
    place = "var" if by is None else "varm"
    missing = [name for name in slots.values() if name not in getattr(adata, place)]
    if missing:
        msg = f"adata.{place} has no {missing[0]!r}: call scvi_ext.tl.get_zero_inflation(adata) first."
        raise KeyError(msg)
    genes = np.flatnonzero(adata.var_names.isin(fit.var_names))
    columns = {what: np.asarray(getattr(adata, place)[name])[genes] for what, name in slots.items()}  # (G,) or (G, K)
    registry = Registry.from_uns(fit.setup)
    groups, names = _groups(adata, registry, by)
    means, zeros = (of[:, genes] for of in _counted(adata, registry, groups, len(names)))
    n_groups = len(names)
    table = pd.DataFrame({"gene": np.tile(adata.var_names[genes], n_groups)})
    if by is not None:
        table[by] = np.repeat(names, len(genes))
    for what, values in columns.items():
        table[what] = values.T.ravel()
    return table.assign(mean_count=means.ravel(), zeros=zeros.ravel())


def _groups(adata: AnnData, registry: Registry, by: str | None) -> tuple[np.ndarray, list[str]]:
    """The code of each cell's batch or label, if there is one for each; and their names, as the tables have them."""
    key, categories = registry.batch_key, registry.batch_categories
    if by == "label":
        key, categories = registry.labels_key, registry.labels_categories
    if by is None or key is None:
        return np.zeros(adata.n_obs, dtype=np.int64), ["all"]
    return codes(adata.obs, key, categories), [column_name(name) for name in categories]


def _counted(adata: AnnData, registry: Registry, groups: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean count and share of zeros of each gene in each group of cells, shape (groups, genes)."""
    total, positive = np.zeros((2, n_groups, adata.n_vars))
    for start, counts in row_chunks(counts_matrix(adata, registry.layer, "the layer that the fit reads")):
        check_still_raw(sp.csr_matrix(counts), registry, adata.obs_names[start:], adata.var_names)
        of_group = np.equal.outer(np.arange(n_groups), groups[start : start + counts.shape[0]]).astype(np.float64)
        total += of_group @ counts
        positive += of_group @ (counts > 0)
    n_cells = np.bincount(groups, minlength=n_groups)[:, None]
    mean = np.divide(total, n_cells, out=np.full_like(total, np.nan), where=n_cells > 0)
    return mean, 1 - np.divide(positive, n_cells, out=np.full_like(total, np.nan), where=n_cells > 0)
