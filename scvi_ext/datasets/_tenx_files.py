"""Where 10x Genomics keeps its data sets, and how the files of Cell Ranger become an AnnData."""

from __future__ import annotations

import warnings
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import h5py
import numpy as np
import pandas as pd

from scvi_ext._errors import listing, one_of

from ._download import extract
from ._files import DataError, File, to_anndata

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData

_URL = "https://cf.10xgenomics.com/samples/cell-exp/{version}/{name}/{file}"
_MEX, _H5 = "gene_bc_matrices.tar.gz", "gene_bc_matrices_h5.h5"
_FEATURE_MEX, _FEATURE_H5 = "feature_bc_matrix.tar.gz", "feature_bc_matrix.h5"
_PROTEIN = "Antibody Capture"


class _Sample(NamedTuple):
    """Version of Cell Ranger, end of the file name, and what was published of the filtered matrix."""

    version: str
    kind: str
    checksum: str | None = None
    shape: tuple[int, int] | None = None


# Of the two formats that most samples come in, the one with a published checksum. Checksums are md5 sums as
# [B] Bioconductor has them (TENxPBMCData, TENxBrainData: inst/scripts/make-metadata.R, SourceVersion), those of pbmc3k,
# pbmc4k and pbmc8k found in other projects too, or [S] scvi-tools (tutorial on preprocessing, handed to pooch).
# Without one: cells of [Z] Zheng et al. (2017), whose ten sorted populations are 94,655 cells, or [M] of the table of
# quality that YosefLab/scVI-data has; genes of Cell Ranger's reference, which are those of the other files with it.
SAMPLES = {
    # GemCode, Zheng et al. (2017)
    "frozen_pbmc_donor_a": _Sample("1.1.0", _MEX, "md5:9d0a60d7d51d45e16e7c04cdb509879f"),  # [B]
    "frozen_pbmc_donor_b": _Sample("1.1.0", _MEX, "md5:96bd95909d0409cce922800890805b6b"),  # [B]
    "frozen_pbmc_donor_c": _Sample("1.1.0", _MEX, "md5:14654894a9f20704cef5db6301a0d793"),  # [B]
    "fresh_68k_pbmc_donor_a": _Sample("1.1.0", _MEX, "md5:0c8c546cbadc8ea8eb45be6cfe040852"),  # [B]
    "cd14_monocytes": _Sample("1.1.0", _MEX, shape=(2612, 32738)),  # [Z], and so are the next nine
    "b_cells": _Sample("1.1.0", _MEX, shape=(10085, 32738)),
    "cd34": _Sample("1.1.0", _MEX, shape=(9232, 32738)),
    "cd56_nk": _Sample("1.1.0", _MEX, shape=(8385, 32738)),
    "cd4_t_helper": _Sample("1.1.0", _MEX, shape=(11213, 32738)),
    "regulatory_t": _Sample("1.1.0", _MEX, shape=(10263, 32738)),
    "naive_t": _Sample("1.1.0", _MEX, shape=(10479, 32738)),
    "memory_t": _Sample("1.1.0", _MEX, shape=(10224, 32738)),
    "cytotoxic_t": _Sample("1.1.0", _MEX, shape=(10209, 32738)),
    "naive_cytotoxic": _Sample("1.1.0", _MEX, shape=(11953, 32738)),
    # Chromium, chemistry v1
    "pbmc3k": _Sample("1.1.0", _MEX, "md5:f76d73bf7a582aaf32b798bcae9574d3"),  # [B]
    "pbmc6k": _Sample("1.1.0", _MEX, "md5:4c9a44cd9386234b3168016945b5b072"),  # [B]
    "pbmc33k": _Sample("1.1.0", _MEX, "md5:fef79ae6064f704888df538aba3f1d5c"),  # [B]
    # Chemistry v2
    "1M_neurons": _Sample("1.3.0", _H5, "md5:f97b8c67e57a534816b9b2bccf31476b", (1_306_127, 27_998)),  # [B]
    "pbmc8k": _Sample("2.1.0", _MEX, "md5:cbb3a7553ece7eaddeb8a56df781ccb0"),  # [B]
    "pbmc4k": _Sample("2.1.0", _MEX, "md5:f61f4deca423ef0fa82d63fdfa0497f7"),  # [B]
    "t_3k": _Sample("2.1.0", _MEX),
    "t_4k": _Sample("2.1.0", _MEX),
    "neuron_9k": _Sample("2.1.0", _MEX, shape=(9128, 27998)),  # [M]
    "pbmc_1k_v2": _Sample("3.0.0", _FEATURE_H5),
    "hgmm_1k_v2": _Sample("3.0.0", _FEATURE_H5),
    "neuron_1k_v2": _Sample("3.0.0", _FEATURE_H5),
    "heart_1k_v2": _Sample("3.0.0", _FEATURE_H5),
    # Chemistry v3
    "pbmc_1k_v3": _Sample("3.0.0", _FEATURE_H5),
    "pbmc_10k_v3": _Sample("3.0.0", _FEATURE_H5),
    "hgmm_1k_v3": _Sample("3.0.0", _FEATURE_H5),
    "hgmm_5k_v3": _Sample("3.0.0", _FEATURE_H5),
    "hgmm_10k_v3": _Sample("3.0.0", _FEATURE_H5),
    "neuron_1k_v3": _Sample("3.0.0", _FEATURE_H5),
    "neuron_10k_v3": _Sample("3.0.0", _FEATURE_H5),
    "heart_1k_v3": _Sample("3.0.0", _FEATURE_H5),
    "heart_10k_v3": _Sample("3.0.0", _FEATURE_H5),
    # with surface proteins
    "pbmc_1k_protein_v3": _Sample("3.0.0", _FEATURE_H5),
    "pbmc_10k_protein_v3": _Sample("3.0.0", _FEATURE_MEX, "md5:26d53ffe08b5f7d3b28df61b592d51fb"),  # [S]
    "malt_10k_protein_v3": _Sample("3.0.0", _FEATURE_H5),
    "5k_pbmc_protein_v3": _Sample("3.1.0", _FEATURE_MEX, "md5:9be3d672b0445b944ca06a507c3d780b"),  # [S]
    "5k_pbmc_protein_v3_nextgem": _Sample("3.1.0", _FEATURE_H5),
}


def sample_file(name: str, *, filtered: bool = True) -> File:
    """The file with the matrix of a sample of 10x Genomics."""
    one_of("name", name, SAMPLES)
    sample = SAMPLES[name]
    file = f"{name}_{'filtered' if filtered else 'raw'}_{sample.kind}"
    url = _URL.format(version=sample.version, name=name, file=file)
    return File(url, file, sample.checksum, shape=sample.shape) if filtered else File(url, file, None)


def read_sample(file: File, path: Path, *, genome: str | None = None) -> AnnData:
    """Counts of genes in X, of proteins in obsm; without empty cells."""
    from scanpy import logging as logg

    with warnings.catch_warnings():
        # Gene symbols are no unique names; they are made so below
        warnings.filterwarnings("ignore", message="Variable names are not unique", category=UserWarning)
        read = _read(file, path, genome)
    types = read.var.get("feature_types", pd.Series("Gene Expression", read.var_names))
    is_gene, is_protein = (types == "Gene Expression").to_numpy(), (types == _PROTEIN).to_numpy()
    if not (is_gene | is_protein).all():
        others = types[~(is_gene | is_protein)]
        logg.warning(f"left out of {file.name!r}: {len(others)} features of type {listing(others.unique())}")
    counts, var = read.X.tocsr(), read.var[is_gene]
    obsm = {}
    if is_protein.any():
        proteins = counts[:, is_protein].toarray().astype(np.int64)
        obsm["protein_expression"] = pd.DataFrame(proteins, read.obs_names, _protein_names(read.var_names[is_protein]))
    well = read.obs_names.to_series().str.extract(r"-(\d+)$", expand=False).fillna("1")
    obs = pd.DataFrame({"batch": pd.Categorical(well, sorted(well.unique(), key=int))}, index=read.obs_names)
    adata = to_anndata(counts[:, is_gene], obs, var.index, file, **obsm)
    kinds = {"gene_ids": str, "genome": "category"}  # what else there may be is of proteins, and empty for genes
    kinds = {name: kind for name, kind in kinds.items() if name in var}
    adata.var = var[list(kinds)].astype(kinds).set_axis(adata.var_names)
    return adata


def _read(file: File, path: Path, genome: str | None) -> AnnData:
    """All features, by scanpy."""
    import scanpy as sc

    if path.suffix.lower() == ".h5":
        with h5py.File(path) as opened:
            there = {name for name, group in opened.items() if isinstance(group, h5py.Group) and "barcodes" in group}
            if genome is not None and "matrix" in there:  # since version 3 there is one for all genomes
                there = set(opened["matrix/features/genome"].asstr()[()])
        _check_genome(file, genome, there)
        return sc.read_10x_h5(path, genome=genome, gex_only=False)

    there = {}

    def wanted(member: str) -> bool:
        place = PurePosixPath(member)
        if place.name.removesuffix(".gz") not in ("matrix.mtx", "genes.tsv", "features.tsv", "barcodes.tsv"):
            return False
        there[place.parent.name] = True
        return place.parent.name == (next(iter(there)) if genome is None else genome)

    with TemporaryDirectory() as folder:
        found = extract(path, wanted, Path(folder))
        _check_genome(file, genome, there)
        if len(found) < 3:
            raise file.is_wrong(f"has of counts, genes and barcodes only {listing(found)}")
        return sc.read_10x_mtx(folder, make_unique=False, gex_only=False)


def _check_genome(file: File, genome: str | None, there: Iterable[str]) -> None:
    there = sorted(there)
    if not there:
        raise file.is_wrong("has no counts as Cell Ranger writes them")
    if genome is not None and genome not in there:
        msg = f"genome={genome!r} is not in {file.name!r}, which has {listing(there)}."
        raise DataError(msg)
    if genome is None and len(there) > 1:
        msg = f"{file.name!r} has several genomes, {listing(there)}: choose one, genome='...'."
        raise DataError(msg)


def _protein_names(names: pd.Index) -> pd.Index:
    """Without the product that the antibodies are of, unless they are only told apart by it."""
    short = names.str.replace(r"_TotalSeq[ABC]$", "", regex=True)
    return short if short.is_unique else names
