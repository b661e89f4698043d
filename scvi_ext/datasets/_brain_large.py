"""A million cells, read in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.utils import make_index_unique
from scipy.sparse import csr_matrix, vstack

from scvi_ext._errors import whole_number

from ._tenx_files import sample_file

if TYPE_CHECKING:
    from collections.abc import Iterator

_SAMPLE = 10_000  # cells that scVI 0.5 looked at to choose genes
_ENTRIES = 2**24  # of the file that are read at once: 400 MB until the genes are chosen


def brain_large(*, n_cells: int | None = None, n_genes: int | None = 720) -> AnnData:
    """Genes of 1.3 million cells from cortex, hippocampus and ventricular zone of embryonic mice (10x Genomics).

    4.2 GB are downloaded once into ``sc.settings.datasetdir``, where an interrupted download goes on, and checked. The
    file is then read in pieces, which takes some minutes: beside the result, and once more the result while its pieces
    are put together, memory holds 400 MB. 10x Genomics shares its data under CC BY 4.0.

    Parameters
    ----------
    n_cells
        So many of the first cells; None takes all 1,306,127.
    n_genes
        So many genes, those of largest variance of counts in the first 10,000 cells (or in the ``n_cells`` first, if
        these are fewer), as in scVI 0.5; 720 of them make 1.3 million cells about 1 GB. None takes all 27,998, which
        are 21 GB for all cells.

    Returns
    -------
    AnnData of ``n_cells`` cells and ``n_genes`` genes.

    ``X``
        Counts, CSR float32. A cell may have none of these genes.
    ``obs_names``, ``var_names``
        Barcodes; gene symbols in the order of the file, of which the second of the same name gets ``"-1"`` at its end.
    ``obs["batch"]``
        The reaction that the cell was in, ``"1"`` to ``"133"``, as far as there are cells of it.
    ``var["gene_ids"]``
        Ensembl identifiers.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    OSError
        The file is not in ``sc.settings.datasetdir`` and cannot be downloaded.
    ValueError
        There are fewer cells or genes, or the file is not the one that it should be.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.brain_large(n_cells=100_000)  # doctest: +SKIP
    >>> adata.shape  # doctest: +SKIP
    (100000, 720)

    References
    ----------
    10x Genomics (2017), 1.3 million brain cells from E18 mice.
    """
    sample = sample_file("1M_neurons")
    all_cells, all_genes = sample.shape
    n_cells, n_genes = _at_most("n_cells", n_cells, all_cells), _at_most("n_genes", n_genes, all_genes)
    with h5py.File(sample.path()) as file:
        (matrix,) = file.values()  # one group, called after the genome
        starts = matrix["indptr"][: n_cells + 1].astype(np.int64)
        genes = _most_variable(matrix, starts[: _SAMPLE + 1], all_genes, n_genes)
        counts = vstack([piece[:, genes] for piece in _pieces(matrix, starts, all_genes)], format="csr")
        barcodes = pd.Index(matrix["barcodes"].asstr()[:n_cells])
        symbols, ids = (matrix[key].asstr()[()][genes] for key in ("gene_names", "genes"))
    well = pd.Series(barcodes).str.rpartition("-")[2]
    obs = pd.DataFrame({"batch": pd.Categorical(well, sorted(well.unique(), key=int))}, index=barcodes)
    var = pd.DataFrame({"gene_ids": ids}, index=make_index_unique(pd.Index(symbols)))
    return AnnData(counts, obs=obs, var=var)


def _at_most(name: str, wanted: int | None, there: int) -> int:
    if wanted is None:
        return there
    wanted = whole_number(name, wanted, least=1)
    if wanted > there:
        msg = f"{name}={wanted} is more than the {there} that there are."
        raise ValueError(msg)
    return wanted


def _pieces(matrix: h5py.Group, starts: np.ndarray, n_genes: int) -> Iterator[csr_matrix]:
    """Cells x all genes, float32, as many cells at a time as have at most ``_ENTRIES`` entries, but one at least."""
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _ENTRIES, side="right")) - 1)
        span = slice(starts[first], starts[last])
        data, indices = matrix["data"][span].astype(np.float32), matrix["indices"][span].astype(np.int32)
        piece = csr_matrix((data, indices, starts[first : last + 1] - starts[first]), shape=(last - first, n_genes))
        piece.sort_indices()
        yield piece
        first = last


def _most_variable(matrix: h5py.Group, starts: np.ndarray, all_genes: int, n_genes: int) -> np.ndarray:
    """Their places, in the order of the file; of equals the first."""
    if n_genes == all_genes:
        return np.arange(all_genes)
    total, squares = np.zeros(all_genes), np.zeros(all_genes)
    for piece in _pieces(matrix, starts, all_genes):
        total += np.bincount(piece.indices, piece.data.astype(np.float64), minlength=all_genes)
        squares += np.bincount(piece.indices, np.square(piece.data, dtype=np.float64), minlength=all_genes)
    n = len(starts) - 1
    variance = squares / n - np.square(total / n)
    return np.sort(np.argsort(-variance, kind="stable")[:n_genes])
