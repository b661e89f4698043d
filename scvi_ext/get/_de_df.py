from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext._errors import missing_key
from scvi_ext._keys import FitKeys
from scvi_ext.data.registry import read_fit

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def de_df(
    adata: AnnData, group: str | None = None, *, key: str | None = None, only_called: bool = False
) -> pd.DataFrame:
    """The whole table of a differential expression.

    Parameters
    ----------
    adata
        Annotated data with the result.
    group
        Rows of this group only.
    key
        Slot of ``adata.uns`` that :func:`~scvi_ext.tl.differential_expression` or
        :func:`~scvi_ext.tl.within_group_de` has written; that of the last fit by default. ``"<key>_de_protein"`` has
        the proteins alone.
    only_called
        Rows of genes and proteins that are called differentially expressed only.

    Returns
    -------
    One row for each gene (and protein, where the model has any) and comparison, the most probable changes of a group
    first.

    ``group``, ``reference``, ``gene``
        What is compared; 1 stands for the group and 2 for the reference below.
    ``feature_type``
        With proteins only: ``"gene"`` or ``"protein"``. A protein may have the name of a gene: both columns together
        say which row it is.
    ``proba_de``, ``proba_up``, ``proba_down``, ``bayes_factor``, ``proba_mcse``
        Posterior probability of a change, of its directions, its log Bayes factor, and its Monte-Carlo standard error.
    ``fdr``, ``is_de``, ``reason``
        Expected false discovery rate of this gene and all more probable ones (of proteins, among proteins), whether it
        is called, and why it is not even judged. Of a protein that was measured in hardly any cell of a side, or in
        none of the batches to decode in, nothing is known: ``"not measured"``, NaN.
    ``lfc_mean``, ``lfc_median``, ``lfc_sd``, ``lfc_low``, ``lfc_high``, ``lfc_mcse``
        Posterior of the log2 fold change that is tested (with the pseudocount): mean, median, standard deviation,
        credible interval, Monte-Carlo standard error of the mean.
    ``scale1``, ``scale2``
        Mean normalised expression (a cell's sums to 1). Of a protein, the mean count that is foreground.
    ``raw_mean1``, ``raw_mean2``, ``raw_normalized_mean1``, ..., ``fraction1``, ...
        Of the counts: mean, mean per 10,000 of a cell, share of cells with the gene. Of a protein, in the cells that
        have measured it, and per 10,000 counts of proteins.
    ``pseudocount``, ``delta``
        Of the comparison, and of each protein by itself.
    ``n_measured1``, ``n_measured2``
        With proteins only: cells on either side that have measured it.
    ``proba_permuted``
        With ``permuted=True`` only.

    Raises
    ------
    KeyError
        No such slot or group.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.differential_expression(adata, "bulk_labels", groups=["CD19+ B"], n_samples=1000)
    >>> sx.get.de_df(adata, "CD19+ B").shape
    (765, 27)
    """
    slot = FitKeys(read_fit(adata).key).de if key is None else key
    if slot not in adata.uns:
        raise missing_key("adata.uns", slot, adata.uns)
    found = adata.uns[slot]
    if "table" not in found:
        msg = f"adata.uns[{slot!r}] has no table: scvi_ext.tl.differential_expression has not written it."
        raise KeyError(msg)
    table = found["table"]
    if group is not None:
        if group not in set(table["group"]):
            raise missing_key(f"the groups of adata.uns[{slot!r}]", group, table["group"].unique())
        table = table[table["group"] == group]
    if only_called:
        table = table[table["is_de"]]
    order = {name: i for i, name in enumerate(table["group"].unique())}
    table = table.assign(order=table["group"].map(order).astype(int))
    table = table.sort_values(["order", "proba_de"], ascending=[True, False], kind="stable")
    return table.drop(columns="order").reset_index(drop=True)
