"""Spots of two tissues from the first paper on spatial transcriptomics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scvi_ext._errors import listing

from ._files import File, read_table, to_anndata

if TYPE_CHECKING:
    from anndata import AnnData

_URL = "https://www.spatialresearch.org/wp-content/uploads/2016/07/"
_BREAST_CANCER = File(
    _URL + "Layer2_BC_count_matrix-1.tsv",
    "Layer2_BC_count_matrix-1.tsv",
    # As git LFS has it in https://github.com/Teichlab/SpatialDE at 77f9fa5.
    "sha256:fe19a57e382bd35009f5552eec4f94254fab9b6834e74ea7525f219cac559ae2",
    size=7_530_255,
)
_MOUSE_OB = File(
    _URL + "Rep11_MOB_count_matrix-1.tsv", "Rep11_MOB_count_matrix-1.tsv", checksum=None, shape=(262, 16218)
)


def breast_cancer() -> AnnData:
    """Genes of about 250 spots in a section of a human breast cancer, spatial transcriptomics (layer 2).

    A spot is 100 µm wide and has several cells. The table of the authors, 7.5 MB, is downloaded once into
    ``sc.settings.datasetdir`` and checked. No licence is stated.

    Returns
    -------
    AnnData of spots, named by their place on the array, and about 14,800 genes. Spots without any count are left out.

    ``X``
        Counts, CSR float32.
    ``obsm["spatial"]``
        x and y on the array, in distances of neighbouring spots (200 µm), float64.

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
    >>> adata = sx.datasets.breast_cancer()  # doctest: +SKIP
    >>> adata.obsm["spatial"].shape[1]  # doctest: +SKIP
    2

    References
    ----------
    Ståhl et al. (2016), Visualization and analysis of gene expression in tissue sections by spatial transcriptomics,
    Science 353, 78, doi:10.1126/science.aaf2403.
    """
    return _read(_BREAST_CANCER)


def mouse_ob() -> AnnData:
    """Genes of 262 spots in a section of a mouse olfactory bulb, spatial transcriptomics (replicate 11).

    A spot is 100 µm wide and has several cells. The table of the authors, about 9 MB, is downloaded once into
    ``sc.settings.datasetdir``; nobody has published a checksum, so its numbers of spots and genes are checked. No
    licence is stated.

    Returns
    -------
    AnnData of 262 spots, named by their place on the array, and 16,218 genes. Spots without any count are left out.

    ``X``
        Counts, CSR float32.
    ``obsm["spatial"]``
        x and y on the array, in distances of neighbouring spots (200 µm), float64.

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
    >>> adata = sx.datasets.mouse_ob()  # doctest: +SKIP
    >>> adata.obsm["spatial"].shape  # doctest: +SKIP
    (262, 2)

    References
    ----------
    Ståhl et al. (2016), Visualization and analysis of gene expression in tissue sections by spatial transcriptomics,
    Science 353, 78, doi:10.1126/science.aaf2403.
    """
    return _read(_MOUSE_OB)


def _read(file: File) -> AnnData:
    with file.opened() as path:
        counts, spots, genes = read_table(file, path, sep="\t")
        places = spots.str.extract(r"^([\d.]+)x([\d.]+)$").astype(float)
        if misnamed := spots[places.isna().any(axis=1)].tolist():
            raise file.is_wrong(f"has spots that are not named by x and y, like '16.92x9.015': {listing(misnamed, 3)}")
        return to_anndata(counts, pd.DataFrame(index=spots), genes, file, spatial=places.to_numpy())
