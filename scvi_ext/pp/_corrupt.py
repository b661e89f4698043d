from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset

from scvi_ext import results
from scvi_ext._errors import listing, number, one_of, warn
from scvi_ext._keys import UNS, valid_key
from scvi_ext.data.audit import audit_counts
from scvi_ext.data.corruption import Corruption, read_layer
from scvi_ext.data.matrix import counts_matrix
from scvi_ext.data.registry import Registry, read_root
from scvi_ext.engine.device import resolve_seed
from scvi_ext.functional.corruption import CORRUPTIONS

if TYPE_CHECKING:
    from typing import Any

    from anndata import AnnData


def corrupt(
    adata: AnnData,
    *,
    rate: float = 0.1,
    method: Literal["uniform", "binomial", "thinning"] = "uniform",
    layer: str | None = None,
    key_added: str | None = None,
    seed: int | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Write a corrupted copy of the counts, to see how well a model recovers what was there.

    Reads ``X`` or ``layer``, which stays as it is, bit for bit. Fit on the corrupted layer
    (``pp.setup_anndata(adata, layer="corrupted")``) and ask :func:`~scvi_ext.tl.imputation_score` how far the fit is
    from the originals. Memory grows with the number of non-zero counts.

    Parameters
    ----------
    adata
        Annotated data: cells x genes, with raw counts that are dense, CSR, CSC or backed.
    rate
        Share of the entries to choose, above 0 and up to 1; for ``"thinning"`` the share of molecules to lose, below 1.
    method
        ``"uniform"``: of the non-zero entries, the share ``rate`` is chosen, and each becomes 0 with probability 0.1.
        ``"binomial"``: of all entries, the share ``rate`` is chosen, and each x is replaced by Binomial(x, 0.2).
        ``"thinning"``: every count x is replaced by Binomial(x, 1 - rate), as if fewer molecules had been sequenced.
        The first two are those of scVI 0.5.0.
    layer
        Layer with the counts; by default they are in ``X``.
    key_added
        Layer to write, ``"corrupted"`` by default. A corrupted layer of that name is replaced, any other is not.
    seed
        Of the draws. The result does not depend on how the counts are stored.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.layers["corrupted"]``
        Corrupted counts, cells x genes, in the format and dtype of the originals.
    ``adata.uns["scvi_ext"]["corruptions"]["corrupted"]``
        Method, rate, seed, and the layer of the originals unless that is ``X``. Which entries were changed is where the
        two differ, so it stays known when cells or genes are left out or reordered.

    Raises
    ------
    KeyError
        No such layer.
    ValueError
        The numbers are no counts, the rate changes none of them, another layer has the name, or a backed ``adata``
        cannot be copied. Nothing has been written then.

    Warns
    -----
    ScviExtWarning
        Cells have lost all of their counts, and a model cannot be fitted with them; or fits were trained on an earlier
        layer of that name.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.corrupt(adata, rate=0.5, method="thinning")
    >>> bool(0.49 < adata.layers["corrupted"].sum() / adata.X.sum() < 0.51)
    True

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053; thinning: Batson, Royer and Webber (2019), Molecular cross-validation
    for single-cell RNA-seq, bioRxiv 786269.
    """
    from scanpy import logging as logg

    one_of("method", method, CORRUPTIONS)
    largest = "below 1" if method == "thinning" else "at most 1"
    if not (0 < number("rate", rate) < 1 or (rate == 1 and method != "thinning")):
        msg = f"rate={rate!r} must be above 0 and {largest} for method={method!r}."
        raise ValueError(msg)
    seed = resolve_seed(seed)
    known = read_root(adata).get(UNS.corruptions, {})
    name = "corrupted" if key_added is None else valid_key(key_added)
    record = Corruption(name, layer, method, float(rate), seed)
    if name == layer or (name in adata.layers and name not in known):
        whose = "holds the counts to corrupt" if name == layer else "exists and was not written by pp.corrupt"
        msg = f"adata.layers[{name!r}] {whose}: choose another name, key_added=..."
        raise ValueError(msg)
    source = counts_matrix(adata, layer)
    problems = audit_counts(source, adata.var_names, adata.obs_names).impossible_entries()
    if problems:
        raise ValueError(f"{record.source} has no raw counts.\n- " + "\n- ".join(problems))

    start = logg.info(f"corrupting counts of {record.source} by method={method!r}")
    counts = read_layer(adata, layer).copy()
    counts.eliminate_zeros()
    before, non_zeros = counts.data.astype(np.int64), counts.nnz
    if non_zeros == 0:
        msg = f"{record.source} has no counts above zero: there is nothing to corrupt."
        raise ValueError(msg)
    after = CORRUPTIONS[method](before, adata.n_obs * adata.n_vars, rate, np.random.default_rng(seed))
    n_changed = np.count_nonzero(after != before)
    if n_changed == 0:
        msg = f"rate={rate} changes none of the {non_zeros} counts of {record.source} that are not zero: raise it."
        raise ValueError(msg)
    full = np.count_nonzero(counts.getnnz(axis=1))
    counts.data = after
    counts.eliminate_zeros()
    emptied = full - np.count_nonzero(counts.getnnz(axis=1))
    if emptied:
        msg = (
            f"{emptied} of {adata.n_obs} cells have no counts left in adata.layers[{name!r}]. Before a fit on it, "
            f"leave them out: adata = adata[adata.layers[{name!r}].sum(axis=1) > 0].copy()."
        )
        warn(msg)
    stale = _fits_to(adata, name)
    if stale and (name not in adata.layers or (read_layer(adata, name) != counts).nnz):
        msg = (
            f"Fits were trained on an earlier adata.layers[{name!r}], and may have seen what is changed now: "
            f"{listing(stale)}. Fit again before tl.imputation_score."
        )
        warn(msg)
    adata = adata.copy() if copy else adata
    results.write_corruption(adata, name, _stored_like(source, counts), record.to_uns())
    logg.info(
        "    finished",
        time=start,
        deep=f"changed {n_changed} of {non_zeros} counts; added\n    {name!r}, corrupted counts (adata.layers)\n"
        f"    {UNS.root!r}, how they were made (adata.uns)",
    )
    return adata if copy else None


def _fits_to(adata: AnnData, layer: str) -> list[str]:
    """Keys of the fits that were trained on ``layer``."""
    fits = read_root(adata).get(UNS.fits, {})
    return [key for key, fit in fits.items() if Registry.from_uns(fit["setup"]).layer == layer]


def _stored_like(source: Any, counts: sp.csr_matrix) -> Any:
    """``counts`` in the format and dtype of ``source``, in memory."""
    if not (sp.issparse(source) or isinstance(source, CSRDataset | CSCDataset)):
        return counts.toarray().astype(source.dtype)
    counts = counts.astype(source.dtype).asformat(source.format)
    if isinstance(source, sp.sparray):
        return sp.csr_array(counts) if source.format == "csr" else sp.csc_array(counts)
    return counts
