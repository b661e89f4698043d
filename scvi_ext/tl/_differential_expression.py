from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvi_ext._errors import listing, missing_key, whole_number
from scvi_ext.data.store import resolve_indices
from scvi_ext.tl._compare import Comparison, Options, carry_out, groups_of, restrict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Literal

    from anndata import AnnData


def differential_expression(
    adata: AnnData,
    groupby: str | None = None,
    *,
    key: str | None = None,
    groups: Literal["all"] | Sequence[str] = "all",
    reference: str = "rest",
    idx1: Sequence | None = None,
    idx2: Sequence | None = None,
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
    min_cells: int = 1,
    permuted: bool = False,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Genes, and proteins if there are any, that differ between groups of cells, with posterior probabilities.

    Reads the fit, its counts and ``adata.obs[groupby]``. Cells are drawn first and only those are decoded: one pool of
    ``n_samples`` profiles serves all groups, and every pair of a profile of one side with one of the other counts.

    Of genes, normalised expression is compared; of proteins, the mean count that is foreground. Only batches that have
    measured a protein say anything of it: where each cell is decoded in its own batch, cells of the others are left out
    (the table says how many remain); where cells are decoded in given batches, those that have measured it are taken
    and impute it in the other cells.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    groupby
        Column of ``adata.obs``. Cells without a value take no part.
    key
        Which fit; the last one by default.
    groups
        Groups to test; ``"all"`` tests those of ``min_cells`` cells and more.
    reference
        A group to compare with, or ``"rest"``: all other cells that have a value.
    idx1, idx2
        Instead of ``groupby``: cells of both sides, as positions, mask or names; ``idx2=None`` is all cells but
        ``idx1``.
    mode
        ``"change"``: how likely is a log2 fold change beyond ``delta``? ``"vanilla"``: how likely is the larger scale
        on the first side (no pseudocount, no delta; Lopez et al. 2018)?
    hypothesis
        ``"three"``: up, down, or neither; the probability of change is the larger one of up and down. ``"two"``:
        changed or not; it is their sum.
    delta
        Smallest log2 fold change that counts; None learns it from the fold changes of all genes (for proteins too).
    pseudocount
        Added to scales (which sum to 1, unless the fit has a size factor) before the logarithm. None takes what the
        decoder gives to genes that are hardly found (mean count below 0.01) in the cells of a side, of 100 or more, so
        that noise about nothing is no change.
    protein_pseudocount
        The same of proteins, in counts. None takes the mean background of each protein, on the side where there is more
        of it: what is small beside the background can hardly be told from it. (scvi-tools adds 0.1.)
    batch_correction
        Decode every drawn cell as if it came from each of all batches in turn. Pairs are made within a batch.
    transform_batch
        The same with one batch, or with several.
    weights
        ``"importance"`` takes 25 samples of each drawn cell, and weighs them by p(x, z) / q(z | x), so that they stand
        for the exact posterior.
    n_samples
        Cells to draw and decode, shared evenly by all groups (and batches to decode in). The columns ``proba_mcse`` and
        ``lfc_mcse`` say how much is left to chance at most; with dozens of groups take more.
    credible_interval
        Probability inside ``lfc_low`` to ``lfc_high``.
    fdr_target
        Expected share of false discoveries among genes that are called, and among proteins that are.
    min_fraction
        Genes and proteins that are found in a smaller share of the cells, on both sides, are not called.
    min_cells
        Smaller groups are left out by ``groups="all"``; they remain part of the rest. (Some of scanpy's pictures need a
        result for every group that cells have.)
    permuted
        Add ``proba_permuted``: the same probability for pairs drawn at random from both sides together.
    indices
        Restrict everything to these cells: positions, mask or names.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the draws.
    key_added
        Slot to write, ``"<key>_de"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.uns["<key>_de"]``
        In the layout of :func:`scanpy.tl.rank_genes_groups`, genes that go up first: ``names``, ``scores`` (log Bayes
        factor of going up), ``logfoldchanges`` (mean, log2), ``pvals`` (1 - probability of change: not p-values),
        ``pvals_adj`` (expected false discovery rate), ``params``. And ``table``, for :func:`scvi_ext.get.de_df`: with
        rows for genes and proteins.
    ``adata.uns["<key>_de_protein"]``
        The same of the proteins alone, where the model has any: their names may be names of genes, which scanpy would
        draw in their place. With ``key_added``, ``"<key_added>_protein"``.

    Raises
    ------
    KeyError
        No such fit, column or group.
    ValueError
        Fewer than two groups, overlapping or empty sides, options without effect, or too few draws for so many groups.

    Examples
    --------
    >>> import scanpy as sc
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.differential_expression(adata, "bulk_labels", n_samples=2000)
    >>> sc.get.rank_genes_groups_df(adata, group="CD19+ B", key="scvi_de").shape
    (765, 5)

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053 (vanilla); Boyeau et al. (2019), bioRxiv 794289, and Boyeau et al.
    (2023), PNAS 120, e2209124120 (change, importance weights, expected false discoveries); Gayoso et al. (2021), Nature
    Methods 18, 272 (proteins).
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
    if (groupby is None) == (idx1 is None):
        msg = "Give either groupby, a column of adata.obs, or idx1 (and idx2), the cells of both sides."
        raise ValueError(msg)
    if groupby is None and (groups, reference) != ("all", "rest"):
        msg = "groups and reference name groups of groupby: they have no effect with idx1."
        raise ValueError(msg)
    if groupby is not None and idx2 is not None:
        msg = "idx2 has no effect with groupby: name a reference, or give idx1 and idx2 alone."
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    if groupby is None:
        sets, comparisons = _of_indices(adata, idx1, idx2, indices)
    else:
        sets, comparisons = _of_groups(adata, groupby, groups, reference, min_cells, indices)
    described = {"groupby": "idx1" if groupby is None else groupby, "reference": comparisons[0].reference}
    carry_out(
        adata,
        sets,
        comparisons,
        options,
        "de",
        described,
        key=key,
        batch_correction=batch_correction,
        transform_batch=transform_batch,
        batch_size=batch_size,
        key_added=key_added,
    )
    return adata if copy else None


def _of_groups(
    adata: AnnData,
    groupby: str,
    groups: Literal["all"] | Sequence[str],
    reference: str,
    min_cells: int,
    indices: Sequence | None,
) -> tuple[np.ndarray, list[Comparison]]:
    """The set of every cell of ``adata``, -1 for none, and the comparisons of groups."""
    names, codes = groups_of(adata, groupby, indices)
    reference = str(reference)
    if "rest" in names:
        msg = f"adata.obs[{groupby!r}] has a group called 'rest', which stands for all other cells here: rename it."
        raise ValueError(msg)
    n_cells = dict(zip(names, np.bincount(codes[codes >= 0], minlength=len(names)), strict=True))
    present = [name for name in names if n_cells[name]]
    others = [] if reference == "rest" else [reference]
    if isinstance(groups, str) and groups == "all":
        tested = [name for name in present if n_cells[name] >= min_cells and name not in others]
    else:
        tested = [str(group) for group in (groups if np.iterable(groups) and not isinstance(groups, str) else [groups])]
    for name in [*tested, *others]:
        if name not in present:
            raise missing_key(f"adata.obs[{groupby!r}]", name, present)
    if len(set(tested)) < len(tested) or set(tested) & set(others) or not tested or len(present) < 2:
        msg = (
            f"There is nothing to compare: groups {listing(tested)} with reference {reference!r}. Name different "
            f"groups of adata.obs[{groupby!r}] (with cells: {listing(present)}); groups='all' needs {min_cells} cells."
        )
        raise ValueError(msg)
    left_out = [name for name in present if name not in tested]
    shown = [*tested, *(others or left_out)]  # a set each, but what is left out of the rest's groups is one set
    n_sets = len(tested) + bool(others or left_out)
    of_name = {name: min(i, n_sets - 1) for i, name in enumerate(shown)}
    sets = np.append([of_name.get(name, -1) for name in names], -1)[codes]
    is_set = np.eye(n_sets, dtype=bool)
    right = [is_set[-1] if others else ~is_set[i] for i in range(len(tested))]
    return sets, [Comparison(name, reference, is_set[i], right[i]) for i, name in enumerate(tested)]


def _of_indices(
    adata: AnnData, idx1: Sequence, idx2: Sequence | None, indices: Sequence | None
) -> tuple[np.ndarray, list[Comparison]]:
    """The same for two sides that are given by their cells."""
    sets = np.full(adata.n_obs, -1 if idx2 is not None else 1)
    sides = [resolve_indices(adata, idx) for idx in (idx1, idx2) if idx is not None]
    if len(sides) == 2 and np.intersect1d(*sides).size:
        msg = f"idx1 and idx2 share {np.intersect1d(*sides).size} cells: the sides must be apart."
        raise ValueError(msg)
    for number, side in enumerate(sides):
        sets[side] = number
    restrict(sets, adata, indices)
    for number in (0, 1):
        if not (sets == number).any():
            msg = f"There are no cells in idx{number + 1}" + (
                " (all cells but idx1)." if number and idx2 is None else "."
            )
            raise ValueError(msg)
    is_set = np.eye(2, dtype=bool)
    return sets, [Comparison("idx1", "rest" if idx2 is None else "idx2", *is_set)]
