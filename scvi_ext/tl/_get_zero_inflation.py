from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scanpy import logging as logg
from scipy.special import betainc

from scvi_ext import results
from scvi_ext._contract import Capability
from scvi_ext._keys import zero_inflation_slots
from scvi_ext.fitted import Fitted

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws


def get_zero_inflation(
    adata: AnnData,
    *,
    key: str | None = None,
    batch_size: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    r"""Which genes are zero-inflated, how surely, and how much, from a fit of AutoZI.

    A gene has no technical zeros in a share delta of its counts. The posterior of delta is a Beta distribution, and a
    gene is called inflated where P(delta < 0.5) > 0.5. That says whether a gene is inflated, not how much: the other
    counts have a technical zero with probability pi, which differs between cells and may be small. The share of
    technical zeros is the mean of (1 - E[delta]) pi over the cells of ``adata``, at the mean of their q(z \| x).

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    batch_size
        Cells per forward pass; results do not depend on it.
    key_added
        What the slots start with, ``"<key>_zero_inflation"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.var["<key>_zero_inflation_alpha"]``, ``adata.var["<key>_zero_inflation_beta"]``
        float32, parameters of the Beta distribution of delta.
    ``adata.var["<key>_zero_inflation_probability"]``
        float64, P(delta < 0.5).
    ``adata.var["<key>_zero_inflation_called"]``
        bool, whether that is more than 0.5.
    ``adata.var["<key>_zero_inflation_share"]``
        float64, expected share of technical zeros among the counts.

    For fits with ``zero_inflation="gene-batch"`` or ``"gene-label"`` these are tables in ``adata.varm`` instead, genes
    x batches or labels, under the same names; of a batch or label without cells the share is NaN. Genes that the fit
    does not know are NaN, and not called. :func:`~scvi_ext.get.zero_inflation_df` reads all of it as one table,
    :func:`~scvi_ext.pl.zero_inflation` draws it.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        The fitted model has no zero inflation of its own, or it is one of each count (``zero_inflation="gene-cell"``).

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_zero_inflated(n_cells_batch=300, n_genes=50)
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, "autozi", max_epochs=2)
    >>> sx.tl.get_zero_inflation(adata)
    >>> adata.var["autozi_zero_inflation_called"].shape
    (50,)

    References
    ----------
    Clivio et al. (2019), Detecting zero-inflated genes in single-cell transcriptomics data, bioRxiv 794875.
    """
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, capability=Capability.ZERO_INFLATION)
    stem = fitted.slot("var", fitted.keys.zero_inflation, key_added)
    slots = zero_inflation_slots(stem)
    module = fitted.module
    if module.draw_shared(np.random.default_rng(0)) is None:
        msg = (
            f"In fit {fitted.fit.key!r} (zero_inflation='gene-cell') no gene has a delta of its own: what its counts "
            "say of theirs tells scvi_ext.tl.get_technical_zeros(adata)."
        )
        raise ValueError(msg)
    codes, names = _groups(fitted)

    start = logg.info(f"reading the zero inflation of fit {fitted.fit.key!r}")
    alpha, beta = (v.detach().cpu().numpy().reshape(-1, len(fitted.columns)) for v in module.zero_inflation_posterior())
    probability = betainc(alpha.astype(np.float64), beta.astype(np.float64), 0.5)
    share = _mean_inflation(fitted, codes, len(alpha), batch_size)
    values = dict(zip(slots, (alpha, beta, probability, probability > 0.5, share), strict=True))
    for what, slot in slots.items():
        if names is None:
            results.write_var(adata, slot, values[what][0], fitted.columns)
        else:
            results.write_varm(adata, slot, values[what].T, fitted.columns, names)
    place = "var" if names is None else "varm"
    logg.info(
        "    finished", time=start, deep=f"added\n    {', '.join(map(repr, slots.values()))}, by gene (adata.{place})"
    )
    return adata if copy else None


def _groups(fitted: Fitted) -> tuple[np.ndarray, list[str] | None]:
    """What the cells have in common that have one delta of a gene: its code of each cell, and names; None of all."""
    if fitted.module.column == "batch_index":
        return fitted.store.batch_index, list(fitted.registry.batch_categories) or ["all"]
    if fitted.module.column == "labels":
        return fitted.store.labels, list(fitted.registry.labels_categories)
    return np.zeros(fitted.store.n_cells, dtype=np.int64), None


def _mean_inflation(fitted: Fitted, codes: np.ndarray, n_groups: int, batch_size: int | None) -> np.ndarray:
    """(1 - E[delta]) pi of each gene, averaged over the cells of each group, shape (groups, G)."""
    module = fitted.module

    def inflation(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        z = module.transform_z(module.encode(cells).loc)
        return (module.decode(z, cells).dropout_logits.double().sigmoid(),)

    total = np.zeros((n_groups, len(fitted.columns)))
    for stretch, (shares,) in fitted.map(inflation, batch_size=batch_size, seed=0):
        total += np.equal.outer(np.arange(n_groups), codes[stretch]).astype(np.float64) @ shares
    n_cells = np.bincount(codes, minlength=n_groups)[:, None]
    return np.divide(total, n_cells, out=np.full_like(total, np.nan), where=n_cells > 0)
