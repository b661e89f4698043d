"""Blood cells with labels, as the authors of scVI used them."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from ._files import File, to_anndata
from ._pickled import read_frames
from ._tenx_files import read_sample, sample_file

_URL = "https://github.com/YosefLab/scVI-data/raw/9a647afc8893604fa11024ddcd5fc5bb22b8e50e/"
# Checksums are those of git, and of git LFS for the large one, at that commit.
_GENES = File(
    _URL + "gene_info.csv", "pbmc_gene_info.csv", "git:9d7466e39482f016d98876c5f28ccfc6d5e17363", size=908_183
)
_CELLS = File(
    _URL + "pbmc_metadata.pickle", "pbmc_metadata.pickle", "git:9d26bba486cce5e042643034e5974ef88c384454", 4_000_144
)
_PURIFIED = File(
    _URL + "PurifiedPBMCDataset.h5ad",
    "PurifiedPBMCDataset.h5ad",
    "sha256:a12d04b1c36d285a9f039cefe027788bc9c9db88c7858ef49579e2bf7f04381c",
    size=157_053_262,
)


def pbmc(*, all_genes: bool = False) -> ad.AnnData:
    """Genes of 12,039 peripheral blood mononuclear cells of one donor, in two runs, with cell types (10x Genomics).

    The samples ``pbmc4k`` and ``pbmc8k`` of :func:`scvi_ext.datasets.dataset_10x`, without cells of low quality, with
    the types and measures of quality of the authors of scVI. About 60 MB are downloaded once into
    ``sc.settings.datasetdir`` and checked. The table of cells is a pickle: it is read without executing anything in
    it. 10x Genomics shares its data under CC BY 4.0; for the tables no licence is stated.

    scVI 0.5 and scvi-tools have 11,990 cells: they look cells up by their barcode in both samples together. 49 cells
    of ``pbmc4k``, whose barcodes end in ``-11`` in the table because ``pbmc8k`` has cells with these barcodes too, are
    not found then, and the cells of ``pbmc8k`` get the counts of those of ``pbmc4k``. Here the sample, which the table
    has as well, tells them apart.

    Parameters
    ----------
    all_genes
        All 33,694 genes instead of those for which there is a comparison on microarrays.

    Returns
    -------
    AnnData of 12,039 cells and 3,346 genes.

    ``X``
        Counts, CSR float32.
    ``obs_names``, ``var_names``
        Barcode and sample (``"AAACCTGAGCTAGTGG-1-pbmc8k"``); gene symbols.
    ``obs["batch"]``
        ``"pbmc8k"`` (8,030 cells) or ``"pbmc4k"`` (4,009).
    ``obs["cell_type"]``
        Nine categories; ``"Other"`` is a cell of none of the types.
    ``obs["num_umi"]``, ``obs["num_reads"]``, ``obs["mean_reads_per_umi"]``, ...
        Nine measures of quality: also the standard deviation of reads per UMI, and the fractions of reads that were
        mapped, mapped to no gene, or not mapped, and whose UMI or barcode was corrected.
    ``obsm["normalized_qc"]``
        The same nine on the common scale that the authors gave them, a table.
    ``obsm["qc_pc"]``
        The first seven principal components of these, float64.
    ``var["gene_ids"]``
        Ensembl identifiers.
    ``var["CD_logFC"]``, ``var["BDC_logFC"]``, ``var["BDC2_logFC"]``, ...
        Log fold change, average expression, t, p-value, adjusted p-value and log odds (``B``), by limma on
        microarrays: CD4 against CD8 T cells (CD), and two comparisons of B with dendritic cells (BDC, BDC2). NaN of
        genes without one.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    OSError
        A file is not in ``sc.settings.datasetdir`` and cannot be downloaded.
    ValueError
        A file is not the one that it should be.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc()  # doctest: +SKIP
    >>> sx.pp.setup_anndata(adata, batch_key="batch", labels_key="cell_type")  # doctest: +SKIP

    References
    ----------
    Zheng et al. (2017), Massively parallel digital transcriptional profiling of single cells, Nature Communications 8,
    14049, doi:10.1038/ncomms14049. Tables: Lopez et al. (2018), Deep generative modeling for single-cell
    transcriptomics, Nature Methods 15, 1053, doi:10.1038/s41592-018-0229-2.
    """
    table = read_frames(_CELLS.path())
    arrays = pd.read_csv(_GENES.path(), index_col=0).set_index("ENSG").drop(columns="GS")
    parts = {}
    for sample in ("pbmc8k", "pbmc4k"):
        file = sample_file(sample)
        parts[sample] = read_sample(file, file.path())
    adata = ad.concat(parts, label="batch", index_unique="-", merge="same")

    quality = table["raw_qc"]
    batch = np.where(table["design"]["batchpbmc4k"] == 1, "pbmc4k", "pbmc8k")
    # R made the second of two equal names unique by a 1 at its end
    names = quality.index.str.replace(r"-11$", "-1", regex=True) + "-" + batch
    if missing := names[~names.isin(adata.obs_names)].to_list():
        raise _CELLS.is_wrong(f"has {len(missing)} cells that the samples lack, among them {missing[0]!r}")
    adata = adata[names].copy()
    adata.obs["batch"] = pd.Categorical(batch, categories=list(parts))
    adata.obs["cell_type"] = pd.Categorical.from_codes(table["clusters"], categories=list(table["list_clusters"]))
    adata.obs[list(quality.columns)] = quality.to_numpy()
    adata.obsm["normalized_qc"] = table["normalized_qc"].set_axis(names)
    adata.obsm["qc_pc"] = table["qc_pc"]

    place = pd.Index(adata.var["gene_ids"]).get_indexer(arrays.index)
    if (place < 0).any():
        raise _GENES.is_wrong(f"has {(place < 0).sum()} genes that the samples lack")
    adata.var = adata.var.join(arrays, on="gene_ids")
    return adata if all_genes else adata[:, place].copy()


def purified_pbmc() -> ad.AnnData:
    """Genes of 94,655 blood cells that were sorted into ten populations before they were sequenced (10x Genomics).

    Labels are what the cells were sorted by, so that they do not depend on the genes. ``cd4_t_helper`` holds the other
    CD4 populations too, and ``cytotoxic_t`` holds ``naive_cytotoxic``. 157 MB are downloaded once into
    ``sc.settings.datasetdir`` and checked. 10x Genomics shares its data under CC BY 4.0.

    The file of the authors of scVI was made from a list that names ``cd4_t_helper`` twice. A cell with the label and
    all counts of a former one is left out, which the log says.

    Returns
    -------
    AnnData of the cells and 32,738 genes.

    ``X``
        Counts, CSR float32.
    ``obs["cell_type"]``
        ``b_cells``, ``cd14_monocytes``, ``cd34``, ``cd4_t_helper``, ``cd56_nk``, ``cytotoxic_t``, ``memory_t``,
        ``naive_cytotoxic``, ``naive_t``, ``regulatory_t``. Each was a reaction of its own, so that there is no batch
        that could be told from the type.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    OSError
        The file is not in ``sc.settings.datasetdir`` and cannot be downloaded.
    ValueError
        The file is not the one that it should be.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.purified_pbmc()  # doctest: +SKIP
    >>> adata = adata[adata.obs["cell_type"].isin(["regulatory_t", "naive_t", "memory_t"])]  # doctest: +SKIP

    References
    ----------
    Zheng et al. (2017), Massively parallel digital transcriptional profiling of single cells, Nature Communications 8,
    14049, doi:10.1038/ncomms14049.
    """
    from scanpy import logging as logg

    path = _PURIFIED.path()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files: what has changed in the format since
        read = ad.read_h5ad(path)
    if "cell_types" not in read.obs:
        raise _PURIFIED.is_wrong("has no column 'cell_types' of cells")
    types = pd.Categorical(read.obs["cell_types"].astype(str))
    counts = csr_matrix(read.X)
    first = _first_of_equals(counts, types)
    if not first.all():
        logg.info(f"{(~first).sum()} cells in {_PURIFIED.name!r} are there twice: one of each is left out")
    obs = pd.DataFrame({"cell_type": types[first]}, index=read.obs_names[first])
    return to_anndata(counts[first], obs, read.var_names, _PURIFIED)


def _first_of_equals(counts: csr_matrix, types: pd.Categorical) -> np.ndarray:
    """Whether a cell is the first of its type with exactly these counts; two real cells never have the same."""
    counts.sort_indices()
    spans = zip(counts.indptr[:-1], counts.indptr[1:], strict=True)
    rows = [hash((counts.indices[i:j].tobytes(), counts.data[i:j].tobytes())) for i, j in spans]
    return ~pd.DataFrame({"type": types.codes, "row": rows}).duplicated().to_numpy()
