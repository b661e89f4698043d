from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scanpy import logging as logg

from scvi_ext._errors import listing, missing_key, whole_number
from scvi_ext.tl._compare import Comparison, Options, carry_out, groups_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Literal

    from anndata import AnnData


def within_group_de(
    adata: AnnData,
    groupby: str,
    *,
    condition: str,
    reference: str | None = None,
    tested: str | None = None,
    key: str | None = None,
    mode: Literal["change", "vanilla"] = "change",
    hypothesis: Literal["three", "two"] = "three",
    delta: float | None = 0.25,
    pseudocount: float | None = None,
    protein_pseudocount: float | None = None,
    batch_correction: bool = False,
    transform_batch: Any = None,
    weights: Literal["importance"] | None = None,
    n_samples: int = 5000,
    credible_interval: float = 0.95,
    fdr_target: float = 0.05,
    min_fraction: float = 0.0,
    min_cells: int = 10,
    permuted: bool = False,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Genes, and proteins if there are any, that differ between two conditions, in every group of cells by itself.

    As :func:`~scvi_ext.tl.differential_expression`, with one comparison for each group: its cells in one condition
    against its cells in the other. One pool of draws serves all groups.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    groupby
        Column of ``adata.obs`` with the groups, cell types or clusters.
    condition
        Column of ``adata.obs`` with the conditions.
    reference, tested
        The condition to compare with, and the one that is compared. Where the column has two values, the first one is
        the reference by default.
    key
        Which fit; the last one by default.
    mode, hypothesis, delta, pseudocount, protein_pseudocount, batch_correction, transform_batch, weights, n_samples
        See :func:`~scvi_ext.tl.differential_expression`.
    credible_interval, fdr_target, min_fraction
        The same.
    min_cells
        Groups with fewer cells than this in one of the conditions are left out.
    permuted, indices, batch_size, seed
        See :func:`~scvi_ext.tl.differential_expression`.
    key_added
        Slot to write, ``"<key>_within_group_de"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.uns["<key>_within_group_de"]``
        As :func:`~scvi_ext.tl.differential_expression` does, by the names of the groups.
    ``adata.uns["<key>_within_group_de_protein"]``
        The same of proteins.

    Raises
    ------
    KeyError
        No such fit, column or condition.
    ValueError
        No group has enough cells in both conditions, or it is not clear which conditions are meant.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.within_group_de(adata, "bulk_labels", condition="phase", reference="G1", tested="S", n_samples=2000)
    >>> sx.get.de_df(adata, "Dendritic", key="scvi_within_group_de").shape
    (765, 27)

    References
    ----------
    Boyeau et al. (2019), bioRxiv 794289.
    """
    options = Options.checked(
        seed,
        mode=mode,
        hypothesis=hypothesis,
        delta=delta,
        pseudocount=pseudocount,
        protein_pseudocount=protein_pseudocount,
        credible_interval=credible_interval,
        fdr_target=fdr_target,
        min_fraction=min_fraction,
        permuted=permuted,
        weights=weights,
        n_samples=n_samples,
    )
    whole_number("min_cells", min_cells, 1)
    adata = adata.copy() if copy else adata
    names, codes = groups_of(adata, groupby, indices)
    levels, level_codes = groups_of(adata, condition, indices)
    reference, tested = _conditions(levels, level_codes, condition, reference, tested)
    sides = [(level_codes == levels.index(level)) & (codes >= 0) for level in (tested, reference)]
    n_cells = [np.bincount(codes[side], minlength=len(names)) for side in sides]
    enough = np.flatnonzero(np.minimum(*n_cells) >= min_cells)
    if not len(enough):
        msg = (
            f"No group of adata.obs[{groupby!r}] has {min_cells} cells with {condition} = {tested!r} and as many with "
            f"{reference!r}: lower min_cells, or choose other conditions."
        )
        raise ValueError(msg)
    left_out = [name for i, name in enumerate(names) if i not in enough and any(n[i] for n in n_cells)]
    if left_out:
        logg.info(f"{len(left_out)} groups have fewer than {min_cells} cells in a condition: {listing(left_out)}")
    sets = np.full(adata.n_obs, -1)
    for number, side in enumerate(sides):
        for position, group in enumerate(enough):
            sets[side & (codes == group)] = 2 * position + number
    is_set = np.eye(2 * len(enough), dtype=bool)
    comparisons = [
        Comparison(names[group], f"{condition} = {reference}", is_set[2 * i], is_set[2 * i + 1])
        for i, group in enumerate(enough)
    ]
    carry_out(
        adata,
        sets,
        comparisons,
        options,
        "within_group_de",
        {"groupby": groupby, "condition": condition, "tested": tested, "reference": reference},
        key=key,
        batch_correction=batch_correction,
        transform_batch=transform_batch,
        batch_size=batch_size,
        key_added=key_added,
    )
    return adata if copy else None


def _conditions(
    levels: list[str], codes: np.ndarray, condition: str, reference: str | None, tested: str | None
) -> tuple[str, str]:
    present = [level for i, level in enumerate(levels) if (codes == i).any()]
    for given in (reference, tested):
        if given is not None and str(given) not in present:
            raise missing_key(f"adata.obs[{condition!r}]", str(given), present)
    given = [None if level is None else str(level) for level in (reference, tested)]
    if len(present) == 2:
        others = [level for level in present if level not in given]
        given = [others.pop(0) if level is None else level for level in given]
    if None in given or given[0] == given[1]:
        msg = (
            f"adata.obs[{condition!r}] has the conditions {listing(present)}: name two different ones, "
            "reference=... and tested=..."
        )
        raise ValueError(msg)
    return given[0], given[1]
