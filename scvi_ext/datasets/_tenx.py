"""Data sets of 10x Genomics by their name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ._files import File
from ._pickled import read_frames
from ._tenx_files import read_sample, sample_file

if TYPE_CHECKING:
    from anndata import AnnData

# Checksum of git at that commit.
_BRAIN_SMALL = File(
    "https://github.com/YosefLab/scVI-data/raw/9a647afc8893604fa11024ddcd5fc5bb22b8e50e/brain_small_metadata.pickle",
    "brain_small_metadata.pickle",
    "git:ff089f83fa6c895db9a44fbcc291436ec76bc6ea",
    size=1_242_713,
)


def dataset_10x(name: str, *, filtered: bool = True) -> AnnData:
    """Genes, and surface proteins where they were measured, of one of 41 samples of 10x Genomics.

    ================================================= ========================================================
    fresh and frozen PBMCs (GemCode, 2016)            fresh_68k_pbmc_donor_a, frozen_pbmc_donor_a, _b, _c
    sorted cells of blood (GemCode, 2016)             b_cells, cd14_monocytes, cd34, cd4_t_helper, cd56_nk,
                                                      cytotoxic_t, memory_t, naive_cytotoxic, naive_t,
                                                      regulatory_t
    PBMCs (v1, v2, v3 chemistry)                      pbmc3k, pbmc6k, pbmc33k; pbmc4k, pbmc8k, pbmc_1k_v2;
                                                      pbmc_1k_v3, pbmc_10k_v3
    T cells (v2)                                      t_3k, t_4k
    brain of embryonic mice (v2, v3)                  neuron_9k, 1M_neurons, neuron_1k_v2; neuron_1k_v3,
                                                      neuron_10k_v3
    heart of embryonic mice (v2, v3)                  heart_1k_v2; heart_1k_v3, heart_10k_v3
    human and mouse cell lines, mixed (v2, v3)        hgmm_1k_v2; hgmm_1k_v3, hgmm_5k_v3, hgmm_10k_v3
    genes and proteins (v3)                           pbmc_1k_protein_v3, pbmc_10k_protein_v3,
                                                      5k_pbmc_protein_v3, 5k_pbmc_protein_v3_nextgem,
                                                      malt_10k_protein_v3
    ================================================= ========================================================

    The file, 2 MB to some 150 MB if filtered (``1M_neurons``, which :func:`scvi_ext.datasets.brain_large` reads in
    pieces: 4.2 GB), is downloaded once into ``sc.settings.datasetdir``. Genes are not filtered. For 12 samples somebody
    has published a checksum, which is verified; otherwise the one of the first file that could be read holds from then
    on, and the number of cells is checked where it is known. 10x Genomics shares its data under CC BY 4.0.

    Parameters
    ----------
    name
        As 10x Genomics calls the sample.
    filtered
        Barcodes that Cell Ranger took for cells; False gives all barcodes with a count, most of them empty droplets,
        from a file that is several times as large.

    Returns
    -------
    AnnData of cells x genes.

    ``X``
        Counts, CSR float32. Cells without any are left out, which the log says.
    ``obs_names``, ``var_names``
        Barcodes; gene symbols, of which the second of the same name gets ``"-1"`` at its end, and so on.
    ``obs["batch"]``
        The reaction that the cell was in, which is the number at the end of the barcode.
    ``var["gene_ids"]``
        Ensembl identifiers, which are unique.
    ``var["genome"]``
        The reference, e.g. to tell human from mouse; only of samples of 3.0.0 and later that come as HDF5.
    ``obsm["protein_expression"]``
        Counts of proteins, a table, for :func:`scvi_ext.pp.setup_anndata`; only where they were measured. Names are
        those of 10x without ``"_TotalSeqB"``; controls are among them.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    OSError
        The file is not in ``sc.settings.datasetdir`` and cannot be downloaded.
    ValueError
        There is no sample of this name, or the file is not the one that it should be.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.dataset_10x("pbmc_10k_protein_v3")  # doctest: +SKIP
    >>> sx.pp.setup_anndata(adata, protein_obsm_key="protein_expression")  # doctest: +SKIP

    References
    ----------
    10x Genomics, https://www.10xgenomics.com/datasets. Those of 2016: Zheng et al. (2017), Massively parallel digital
    transcriptional profiling of single cells, Nature Communications 8, 14049, doi:10.1038/ncomms14049.
    """
    file = sample_file(name, filtered=filtered)
    with file.opened() as path:
        return read_sample(file, path)


def brain_small() -> AnnData:
    """Genes of 9,128 cells from cortex, hippocampus and subventricular zone of an embryonic mouse (10x Genomics).

    The sample ``neuron_9k`` of :func:`scvi_ext.datasets.dataset_10x` with clusters and measures of quality that the
    authors of scVI computed. Some 100 MB are downloaded once into ``sc.settings.datasetdir``. Nobody has published a
    checksum of the counts; that their barcodes are those of the table, which has one, is checked. The table is a
    pickle: it is read without executing anything in it. 10x Genomics shares its data under CC BY 4.0; for the table
    no licence is stated.

    Returns
    -------
    AnnData of 9,128 cells and 27,998 genes.

    ``X``
        Counts, CSR float32.
    ``obs["batch"]``
        ``"1"``: all cells are of one reaction.
    ``obs["cluster"]``
        Clusters by Cell Ranger, ``"1"`` (3,464 cells) to ``"10"`` (46).
    ``obs["num_umi"]``, ``obs["num_reads"]``, ``obs["mean_reads_per_umi"]``, ...
        Nine measures of quality: also the standard deviation of reads per UMI, and the fractions of reads that were
        mapped, mapped to no gene, or not mapped, and whose UMI or barcode was corrected.
    ``var["gene_ids"]``
        Ensembl identifiers.

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
    >>> adata = sx.datasets.brain_small()  # doctest: +SKIP
    >>> adata.shape  # doctest: +SKIP
    (9128, 27998)

    References
    ----------
    10x Genomics (2017), 9k brain cells from an E18 mouse. Table: Lopez et al. (2018), Deep generative modeling for
    single-cell transcriptomics, Nature Methods 15, 1053, doi:10.1038/s41592-018-0229-2.
    """
    table = read_frames(_BRAIN_SMALL.path())
    file = sample_file("neuron_9k")
    quality = table["raw_qc"]
    with file.opened() as path:
        adata = read_sample(file, path)
        if set(quality.index) != set(adata.obs_names):
            raise file.is_wrong("has other barcodes than the table of its quality")
    cluster = table["clusters"]["Cluster"].loc[adata.obs_names]
    names = [str(i) for i in sorted(cluster.unique())]
    adata.obs["cluster"] = pd.Categorical(cluster.astype(str), categories=names)
    adata.obs[list(quality.columns)] = quality.loc[adata.obs_names]
    return adata
