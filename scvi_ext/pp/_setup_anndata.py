"""Register the counts and covariates that models read."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from scvi_ext._errors import unknown_keyword
from scvi_ext.pp._register import register

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

# Keywords of scvi-tools that have another name here.
_ELSEWHERE = {"protein_expression_obsm_key": "protein_obsm_key", "panel_key": "protein_batch_mask"}


def setup_anndata(
    adata: AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    unlabeled_category: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    protein_obsm_key: str | None = None,
    protein_names_uns_key: str | None = None,
    protein_batch_mask: Mapping[str, Sequence] | Literal["auto"] | None = "auto",
    check: Literal["error", "warn"] = "error",
    copy: bool = False,
    **unknown: Any,
) -> AnnData | None:
    """Check the counts and register them with the covariates that models shall use.

    Every entry of the counts is looked at: they must be non-negative, finite integers, neither log-transformed nor
    scaled to constant row sums, and no cell may be empty. Genes that are zero in all cells are allowed, with a warning.
    Categories are registered as the strings of the values that occur, so that unused ones do not exist for the models;
    they must be complete. Calling it again replaces the registration; fits that no longer agree with it stay, and are
    refused by name when they are used.

    Parameters
    ----------
    adata
        Annotated data: cells x genes, with counts that are dense, CSR, CSC or backed, of any real dtype.
    layer
        Layer with the counts; by default they are in ``X``.
    batch_key
        Column of ``obs`` with the experimental batch (sample, donor, run).
    labels_key
        Column of ``obs`` with the cell types or other labels.
    unlabeled_category
        Value of ``labels_key`` that means "not known"; it becomes no class of its own.
    size_factor_key
        Column of ``obs`` with positive size factors, used in place of the sum of counts by models told to.
    categorical_covariate_keys
        Further columns of ``obs`` with categories whose effect is to be removed.
    continuous_covariate_keys
        Columns of ``obs`` with numbers whose effect is to be removed. They are used as they are: bring them to a
        standard deviation around 1.
    protein_obsm_key
        Entry of ``obsm`` with protein counts, cells x proteins: a table, an array or a sparse matrix. Cells without
        any protein count are allowed, with a warning where they are more than 5 % of a batch: cells whose proteins were
        not measured should be a batch of their own.
    protein_names_uns_key
        Entry of ``uns`` with the names of the proteins, for an array, whose columns are then found by name like those
        of a table. By default they are ``protein_0``, ``protein_1``, ... and found by position.
    protein_batch_mask
        Which proteins were measured in which batch. ``"auto"``: one without a count in any cell of a batch, but with
        counts elsewhere, was not measured there; models do not take its zeros for measurements, and impute it. None:
        all zeros are measurements. Or a mapping from batches to the names of the proteins that were measured there (an
        empty list: none), or to a mask of them; a Series of booleans is aligned by its index. Batches that are not
        named have measured all. A warning says where this ignores counts.
    check
        ``"error"`` refuses numbers that do not look like raw counts; ``"warn"`` only warns, for counts that are meant
        to be so: estimated (SoupX, CellBender) or downsampled to one depth. Proteins that are negative, infinite or NaN
        are refused all the same.
    copy
        Return a copy that is set up, and leave ``adata`` as it is.
    **unknown
        Not accepted; a keyword that scvi-tools spells otherwise is answered with its name here.

    Returns
    -------
    None, or the copy if ``copy=True``. Writes ``adata.uns["scvi_ext"]["setup"]``: a dict of strings and arrays of
    strings. ``obs``, ``X`` and the global random state are left untouched. Of a backed ``adata`` only the object in
    memory is written to.

    Raises
    ------
    KeyError
        A layer or key does not exist.
    TypeError
        ``adata`` is no AnnData, a keyword does not exist, or the counts or a continuous covariate are not numeric.
    ValueError
        The counts are no raw counts (as ``check`` has it), a column has missing or unusable values, or the
        arguments contradict each other. Nothing has been written then.

    Examples
    --------
    >>> import numpy as np, anndata as ad
    >>> import scvi_ext as sx
    >>> counts = np.random.default_rng(0).poisson(2.0, (100, 20))
    >>> adata = ad.AnnData(counts.astype("float32"))
    >>> adata.obs["donor"] = ["a", "b"] * 50
    >>> sx.pp.setup_anndata(adata, batch_key="donor")
    >>> sx.get.setup(adata)[["field", "key", "n_categories"]]
        field    key  n_categories
    0  counts      X          <NA>
    1   batch  donor             2
    """
    for name in unknown:
        raise unknown_keyword("setup_anndata", name, _valid_keywords(), renamed=_ELSEWHERE.get(name))
    return register(
        adata,
        layer=layer,
        batch_key=batch_key,
        labels_key=labels_key,
        unlabeled_category=unlabeled_category,
        size_factor_key=size_factor_key,
        categorical_covariate_keys=categorical_covariate_keys,
        continuous_covariate_keys=continuous_covariate_keys,
        protein_obsm_key=protein_obsm_key,
        protein_names_uns_key=protein_names_uns_key,
        protein_batch_mask=protein_batch_mask,
        check=check,
        copy=copy,
    )


def _valid_keywords() -> list[str]:
    return [p.name for p in signature(setup_anndata).parameters.values() if p.kind is p.KEYWORD_ONLY]
