"""Register genes and proteins that are two modalities of a MuData."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from scvi_ext._errors import unknown_keyword
from scvi_ext.modalities import Joined, Modalities, is_mudata
from scvi_ext.pp._register import register

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mudata import MuData

# Keywords of setup_anndata and of scvi-tools that have another name here.
_ELSEWHERE = {
    "layer": "rna_layer",
    "modalities": "rna=... and protein=..., the names of two modalities,",
    "protein_obsm_key": "protein, the name of a modality,",
}


def setup_mudata(
    mdata: MuData,
    *,
    rna: str = "rna",
    protein: str | None = "prot",
    rna_layer: str | None = None,
    protein_layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    unlabeled_category: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    protein_batch_mask: Mapping[str, Sequence] | Literal["auto"] | None = "auto",
    check: Literal["error", "warn"] = "error",
    copy: bool = False,
    **unknown: Any,
) -> MuData | None:
    """Check the counts of genes and proteins, and register them with the covariates that models shall use.

    What :func:`~scvi_ext.pp.setup_anndata` does, for a MuData. The functions of ``tl`` and ``get`` then take the MuData
    itself, as well as ``pl``, ``metrics``, ``pp.corrupt``, ``pp.restore`` and ``io.write_model``. Cells are counted in
    the order of the MuData, and what is written is found where it belongs:

    - latent representations, and tables of anything but proteins: ``mdata.obsm``;
    - a number or label per cell: ``mdata.obs``;
    - tables of cells x proteins: ``mdata["prot"].layers``, NaN for proteins that were not asked for;
    - of genes: ``layers``, ``var``, ``varm`` and ``varp`` of ``mdata["rna"]``;
    - fits, and other results such as those of differential expression: ``mdata.uns``.

    Columns of cells are looked for in ``mdata.obs``, ``"batch"`` and ``"rna:batch"`` alike, and then in
    ``mdata["rna"].obs``. The modalities may have their cells in any order, but they must be the same ones; other
    modalities are left alone.

    Parameters
    ----------
    mdata
        Multimodal data: raw counts of genes in one modality, of proteins in another.
    rna
        The modality with the genes.
    protein
        The modality with the proteins; None to register genes alone.
    rna_layer
        Layer of the genes with their counts; by default they are in ``X``.
    protein_layer
        Layer of the proteins with their counts; by default they are in ``X``.
    batch_key
        Column of cells with the experimental batch (sample, donor, run).
    labels_key
        Column of cells with the cell types or other labels.
    unlabeled_category
        Value of ``labels_key`` that means "not known"; it becomes no class of its own.
    size_factor_key
        Column of cells with positive size factors.
    categorical_covariate_keys
        Further columns of cells with categories whose effect is to be removed.
    continuous_covariate_keys
        Columns of cells with numbers whose effect is to be removed.
    protein_batch_mask
        Which proteins were measured in which batch, as in :func:`~scvi_ext.pp.setup_anndata`.
    check
        ``"error"`` refuses numbers that do not look like raw counts; ``"warn"`` only warns, but refuses proteins that
        are negative, infinite or NaN.
    copy
        Return a copy that is set up, and leave ``mdata`` as it is.
    **unknown
        Not accepted; a keyword with another name here is answered with that.

    Returns
    -------
    None, or the copy if ``copy=True``. Writes ``mdata.uns["scvi_ext"]``: ``"setup"``, a dict of strings and arrays of
    strings, and ``"modalities"``, a dict of strings.

    Raises
    ------
    KeyError
        A modality, layer or column does not exist.
    TypeError
        ``mdata`` is no MuData, or a keyword does not exist.
    ValueError
        The modalities have different cells, the counts are no raw counts (with ``check="error"``), a column has missing
        or unusable values, or the arguments contradict each other. Nothing has been written then.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_iid(n_proteins=5)
    >>> try:
    ...     sx.pp.setup_mudata(adata)
    ... except TypeError as error:
    ...     print(error)
    mdata is an AnnData; a MuData is needed. Call scvi_ext.pp.setup_anndata, with proteins in obsm.

    With ``mdata = mudata.MuData({"rna": genes, "prot": proteins})``::

        sx.pp.setup_mudata(mdata, batch_key="batch")
        sx.tl.fit(mdata, "totalvi")
        sx.tl.get_latent(mdata)  # mdata.obsm["X_totalvi"]
        sx.tl.get_protein_expression(mdata)  # mdata["prot"].layers["totalvi_protein"]

    References
    ----------
    Bredikhin et al. (2022), MUON: multimodal omics analysis framework, Genome Biology 23, 42.
    """
    for name in unknown:
        keywords = [p.name for p in signature(setup_mudata).parameters.values() if p.kind is p.KEYWORD_ONLY]
        raise unknown_keyword("setup_mudata", name, keywords, renamed=_ELSEWHERE.get(name))
    _check_mudata(mdata)
    if protein is None and protein_layer is not None:
        msg = f"protein_layer={protein_layer!r} has no effect with protein=None: leave out one of them."
        raise ValueError(msg)
    if protein == rna:
        msg = f"rna and protein are both {rna!r}: genes and proteins are two modalities."
        raise ValueError(msg)
    modalities = Modalities(rna, protein, protein_layer)
    adata = Joined(mdata, modalities)
    try:
        register(
            adata,
            layer=rna_layer,
            batch_key=batch_key,
            labels_key=labels_key,
            unlabeled_category=unlabeled_category,
            size_factor_key=size_factor_key,
            categorical_covariate_keys=categorical_covariate_keys,
            continuous_covariate_keys=continuous_covariate_keys,
            protein_obsm_key=modalities.protein_obsm_key,
            protein_batch_mask=protein_batch_mask,
            check=check,
            copy=False,
            modalities=modalities.to_uns(),
        )
    except (KeyError, TypeError, ValueError) as error:
        error.add_note(modalities.note)
        raise
    written = adata.write_back(mdata.copy() if copy else mdata)
    return written if copy else None


def _check_mudata(mdata: object) -> None:
    if not is_mudata(mdata):
        kind = type(mdata).__name__
        advice = " Call scvi_ext.pp.setup_anndata, with proteins in obsm." if kind == "AnnData" else ""
        msg = f"mdata is {'an' if kind[0] in 'AEIOU' else 'a'} {kind}; a MuData is needed.{advice}"
        raise TypeError(msg)
    if mdata.axis != 0:
        msg = f"mdata has axis={mdata.axis}; modalities that share their cells are needed, axis=0."
        raise ValueError(msg)
