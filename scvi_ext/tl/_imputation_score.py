from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import warn, whole_number
from scvi_ext.data.corruption import changed_entries, read_corruption, read_layer, read_pair
from scvi_ext.engine.device import resolve_seed
from scvi_ext.fitted import Fitted
from scvi_ext.functional.imputation import error_measures, group_medians
from scvi_ext.tl._baselines import baselines as without_a_model
from scvi_ext.tl._baselines import check_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import scipy.sparse as sp
    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.data.corruption import Entries
    from scvi_ext.engine.map_cells import Draws

_KEPT_ENTRIES = 100_000  # for pictures: a few megabytes, and more would not change a density


def imputation_score(
    adata: AnnData,
    *,
    corruption: str = "corrupted",
    key: str | None = None,
    n_samples: int = 1,
    indices: Sequence | None = None,
    baselines: bool = True,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """How well a fit recovers the counts that :func:`~scvi_ext.pp.corrupt` has changed.

    Encodes the corrupted counts of each cell, whichever layer the fit was trained on, and holds the decoded mean count
    (``rate``, before zero inflation) against the original count, at those entries where the two layers differ. Memory
    grows with the number of these entries, not with that of all.

    Parameters
    ----------
    adata
        Annotated data that holds the fit, a corrupted layer and the original counts.
    corruption
        The corrupted layer.
    key
        Which fit; the last one by default. For an honest score it was trained on the corrupted layer, or on other
        cells.
    n_samples
        Posterior samples of z whose rates are averaged.
    indices
        The cells: positions, mask or names. All by default.
    baselines
        Judge also what takes no model, and the same fit with the original counts as input.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples, of the principal components, and of the entries that are kept for pictures.
    key_added
        Slot to write, ``"<key>_imputation"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets ``adata.uns["<key>_imputation"]``, a dict with

    ``"scores"``
        DataFrame, one row per method (see Notes), float64: ``median`` and ``mean`` of abs(original - imputed) over all
        entries, and the means over cells and over genes of their medians, ``median_per_cell`` and ``median_per_gene``
        (of those that have changed entries). Lower is better.
    ``"genes"``
        DataFrame, genes with changed entries: their number ``n_entries`` and the median error of each method.
    ``"entries"``
        DataFrame of float32: ``original`` and what each method imputed, of at most 100,000 random entries.
    ``"params"``
        Fit and the layer it was trained on (``fit_layer``, ``"X"`` for ``X``), corruption, number of entries, samples
        and seed.

    Raises
    ------
    KeyError
        No such fit, no such corruption, or one of its layers is gone.
    ValueError
        Nothing was changed in these cells and genes, or the two layers cannot be original and corrupted counts any
        more, see :func:`~scvi_ext.metrics.imputation_error`.

    Warns
    -----
    ScviExtWarning
        The fit was trained on another layer than the corrupted one, so it may have seen the originals.

    Notes
    -----
    The methods are

    ``fit``
        The fit, given the corrupted counts.
    ``uncorrupted``
        The fit, given the original counts: what it would say had nothing been lost. Not a competitor.
    ``nearest cells``
        Counts of the 15 nearest cells pooled, scaled to the cell's own sum. Nearest by 50 principal components of the
        log-normalised corrupted counts, exactly.
    ``gene mean``
        Counts of all cells pooled, scaled to the cell's own sum.
    ``no imputation``
        The corrupted count itself.

    All see the genes of the fit and the corrupted counts only (but ``uncorrupted``), at the depth of the corrupted
    cell. Thinning at rate r makes every cell shallower by a known factor, so what they impute is divided by 1 - r
    there; size factors of a fit with ``library="size_factor"`` have to be those of the corrupted counts.

    After thinning, changed entries are mostly large counts that have lost a part. The corrupted count shares molecules
    with the original there, noise included, which no mean can foretell: compare the other methods with each other.

    scVI 0.5.0 counted cells without changed entries as errors of 0, and lost what it had collected at a minibatch
    without any; neither is so here.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.corrupt(adata)
    >>> sx.pp.setup_anndata(adata, layer="corrupted", batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.imputation_score(adata)
    >>> sx.get.imputation_df(adata).index.tolist()
    ['fit', 'uncorrupted', 'nearest cells', 'gene mean', 'no imputation']

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053; Batson, Royer and Webber (2019), bioRxiv 786269.
    """
    whole_number("n_samples", n_samples, 1)
    seed = resolve_seed(seed)
    record = read_corruption(adata, corruption)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices)
    slot = fitted.slot("uns", fitted.keys.imputation, key_added)
    original, corrupted = read_pair(adata, record, fitted.rows, fitted.columns)
    entries = changed_entries(original, corrupted, record)
    if baselines:
        everyone = corrupted if fitted.rows is None else read_layer(adata, corruption, None, fitted.columns)
        check_size(everyone)
    if fitted.registry.layer != corruption:
        trained = "adata.X" if fitted.registry.layer is None else f"adata.layers[{fitted.registry.layer!r}]"
        msg = (
            f"Fit {fitted.fit.key!r} was trained on {trained}, not on adata.layers[{corruption!r}]: unless that was "
            "with other cells, it may have seen the originals, and its score is too good."
        )
        warn(msg)

    start = logg.info(f"imputing {len(entries.cells)} entries by fit {fitted.fit.key!r}")
    options = {"n_samples": n_samples, "batch_size": batch_size, "seed": seed}
    depth = 1 / (1 - record.rate) if record.method == "thinning" else 1.0
    imputed = {"fit": depth * rates(fitted, corrupted, entries, **options)}
    if baselines:
        imputed["uncorrupted"] = rates(fitted, original, entries, **options)
        plain = without_a_model(everyone, fitted.rows, entries, seed)
        imputed |= {name: depth * values for name, values in plain.items()}

    params = {
        "key": fitted.fit.key,
        "fit_layer": "X" if fitted.registry.layer is None else fitted.registry.layer,
        "corruption": corruption,
        **record.to_uns(),
        "corruption_seed": record.seed,
        "n_entries": len(entries.cells),
        "n_samples": n_samples,
        "seed": seed,
    }
    results.write_uns(adata, slot, tables(entries, imputed, fitted.fit.var_names, seed) | {"params": params})
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, errors of imputed counts (adata.uns)")
    return adata if copy else None


def rates(
    fitted: Fitted, counts: sp.csr_matrix, entries: Entries, *, n_samples: int, batch_size: int | None, seed: int
) -> np.ndarray:
    """Decoded mean counts of the entries, given ``counts``, averaged over posterior samples, float64, shape (m,)."""
    module = fitted.module

    def rate(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        noise = draws.normal(len(cells.x), n_samples, module.n_noise)
        posteriors = module.posteriors(cells)

        def sample(s: int) -> torch.Tensor:
            z, log_library = module.draw(cells, posteriors, noise[:, s])
            return module.scale(module.transform_z(z), cells) * torch.exp(log_library)

        return (reduce(torch.Tensor.add_, map(sample, range(n_samples))) / n_samples,)

    given = replace(fitted, store=replace(fitted.store, counts=counts))
    found = np.empty(len(entries.cells))
    floats = n_samples * module.n_noise
    for stretch, (values,) in given.map(rate, batch_size=batch_size, seed=seed, floats_per_cell=floats):
        here = slice(*np.searchsorted(entries.cells, [stretch.start, stretch.stop]))
        found[here] = values[entries.cells[here] - stretch.start, entries.genes[here]]
    return found


def tables(
    entries: Entries, imputed: dict[str, np.ndarray], var_names: np.ndarray, seed: int
) -> dict[str, pd.DataFrame]:
    """Scores, errors of genes, and a sample of the entries."""
    measures = {
        name: error_measures(entries.original, values, entries.cells, entries.genes) for name, values in imputed.items()
    }
    present, n_entries = np.unique(entries.genes, return_counts=True)
    by_gene = {
        name: group_medians(np.abs(entries.original - values), entries.genes, present)
        for name, values in imputed.items()
    }
    n = len(entries.cells)
    kept = np.random.default_rng(seed).permutation(n)[:_KEPT_ENTRIES]
    sample = {name: values[kept].astype(np.float32) for name, values in imputed.items()}
    return {
        "scores": pd.DataFrame.from_dict(measures, orient="index"),
        "genes": pd.DataFrame({"n_entries": n_entries} | by_gene, index=pd.Index(var_names[present].astype(str))),
        "entries": pd.DataFrame({"original": entries.original[kept]} | sample, index=kept.astype(str)),
    }
