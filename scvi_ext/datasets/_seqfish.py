"""Cells of the mouse brain whose RNA was imaged by seqFISH and seqFISH+."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal
from zipfile import ZipFile

import numpy as np
import pandas as pd

from scvi_ext._errors import one_of

from ._files import File, as_text, numbered, to_anndata

if TYPE_CHECKING:
    from anndata import AnnData

_SEQFISH = File(
    "https://ars.els-cdn.com/content/image/1-s2.0-S0896627316307024-mmc6.xlsx",
    "seqfish_mmc6.xlsx",
    # As git LFS has it in https://github.com/Teichlab/SpatialDE at 77f9fa5.
    "sha256:90db449fb3eb792e1b103105cd9147d4c3a7daf82891bf57376d86bd4e527f1a",
    size=3_907_928,
)
_SEQFISH_PLUS = File(
    "https://github.com/CaiGroup/seqFISH-PLUS/raw/ee6c416006fe09262526eb364c6f66edd35adc88/sourcedata.zip",
    "seqfish_plus_sourcedata.zip",
    "git:ca02b7a49f9d8539b8cec511e4bf6da5d6838d9b",
)
_REGIONS = {"subventricular cortex": "cortex_svz", "olfactory bulb": "ob"}  # as the files are called


def seqfish() -> AnnData:
    """Cells of the mouse hippocampus where they are in the tissue, 3,585 with 249 genes, seqFISH.

    Table S6 of the paper, an Excel file of 3.9 MB, is downloaded once into ``sc.settings.datasetdir`` and checked.

    Returns
    -------
    AnnData of 3,585 cells and 249 genes.

    ``X``
        Counts, CSR float32.
    ``obs["field"]``
        Field of view, ``"33"`` to ``"53"``.
    ``obsm["spatial"]``
        x, y and z of the middle of the cell within its field, in pixels of the image, float64.

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
    >>> adata = sx.datasets.seqfish()  # doctest: +SKIP
    >>> adata.shape  # doctest: +SKIP
    (3585, 249)

    References
    ----------
    Shah et al. (2016), In situ transcription profiling of single cells reveals spatial organization of cells in the
    mouse hippocampus, Neuron 92, 342, doi:10.1016/j.neuron.2016.10.001.
    """
    path = _SEQFISH.path()
    try:
        counts, fields, places = pd.read_excel(path, sheet_name=[0, 1, 2], header=None).values()
    except ImportError as error:
        msg = f"{path.name!r} is read by openpyxl, which is not installed: pip install 'scvi-ext[data]'."
        raise ImportError(msg) from error
    genes = pd.Index(counts[0].astype(str)).str.strip("'")
    obs = pd.DataFrame({"field": as_text(fields.to_numpy().ravel())}, index=numbered(counts.shape[1] - 1))
    return to_anndata(counts.iloc[:, 1:].to_numpy().T, obs, genes, _SEQFISH, spatial=places.to_numpy(float))


def seqfish_plus(
    tissue_region: Literal["subventricular cortex", "olfactory bulb"] = "subventricular cortex",
) -> AnnData:
    """Cells of the mouse brain where they are in the tissue, with 10,000 genes, seqFISH+.

    An archive of less than 100 MB with both regions is downloaded once into ``sc.settings.datasetdir`` and checked. Its
    authors allow academic and other non-commercial use.

    Parameters
    ----------
    tissue_region
        ``"subventricular cortex"``: 913 cells of the cortex and the subventricular zone. ``"olfactory bulb"``: 2,050
        cells.

    Returns
    -------
    AnnData of cells and 10,000 genes.

    ``X``
        Counts, CSR float32.
    ``obs["field_of_view"]``, ``obs["cell_id"]``
        Field of the image, as text, and number of the cell in it, int64.
    ``obs["region"]``
        Of ``"subventricular cortex"``: the part of the brain.
    ``obsm["spatial"]``
        x and y of the middle of the cell within its field of view, in pixels of 0.103 µm, float64.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    OSError
        The file is not in ``sc.settings.datasetdir`` and cannot be downloaded.
    ValueError
        ``tissue_region`` is no such region, or the file is not the one that it should be.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.seqfish_plus("olfactory bulb")  # doctest: +SKIP
    >>> adata.n_vars  # doctest: +SKIP
    10000

    References
    ----------
    Eng et al. (2019), Transcriptome-scale super-resolved imaging in tissues by RNA seqFISH+, Nature 568, 235,
    doi:10.1038/s41586-019-1049-y.
    """
    one_of("tissue_region", tissue_region, _REGIONS)
    with ZipFile(_SEQFISH_PLUS.path()) as archive:
        counts, cells = (_member(archive, f"{_REGIONS[tissue_region]}_{what}") for what in ("counts", "cellcentroids"))
    obs = pd.DataFrame(
        {"field_of_view": as_text(cells["Field of View"].to_numpy()), "cell_id": cells["Cell ID"].to_numpy()},
        index=numbered(len(cells)),
    )
    if "Region" in cells:
        obs["region"] = pd.Categorical(cells["Region"])
    return to_anndata(counts, obs, counts.columns, _SEQFISH_PLUS, spatial=cells[["X", "Y"]].to_numpy(np.float64))


def _member(archive: ZipFile, name: str) -> pd.DataFrame:
    with archive.open(f"sourcedata/{name}.csv") as file:
        table = pd.read_csv(file)
    return table.loc[:, ~table.columns.str.startswith("Unnamed:")]  # numbers of the rows
