"""The counts behind scanpy's bundled subset of the 68k PBMCs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

_TARGET_SUM = 1e4  # counts per cell that the bundled file was scaled to
_ROUNDING = 5e-4 + 1e-6  # half of the third decimal it was rounded to, plus the noise of float32 below 8


def pbmc68k_counts() -> AnnData:
    r"""Recover the counts of 700 peripheral blood mononuclear cells of one healthy donor.

    scanpy ships :func:`scanpy.datasets.pbmc68k_reduced`, so nothing is downloaded. Its ``raw`` is
    :math:`y_{cg} = \log(1 + 10^4 x_{cg} / n_c)`, rounded to three decimals, and it keeps the total
    :math:`n_c` of every cell. That is inverted here,
    :math:`x_{cg} = \mathrm{round}(n_c (e^{y_{cg}} - 1) / 10^4)`, and the result is checked twice: every count has to
    give back its :math:`y_{cg}` to the last decimal, which for the counts in this file (at most 259) no other integer
    does; and in each cell the smallest count above zero has to be one, which fixes the scale without :math:`n_c`. So
    the recovery is exact, for the 765 genes that the file has: the other genes of a cell are only in its total.

    Returns
    -------
    AnnData of 700 cells and 765 genes.

    ``X``
        Counts, CSR float32.
    ``obs["bulk_labels"]``
        Cell type by similarity to sorted bulk populations, 10 categories.
    ``obs["batch"]``
        The 10x channel, ``"1"`` to ``"8"``: the number at the end of the barcode. The channels are technical
        replicates of the same sample with all cell types in each, so expect their effect to be small.
    ``obs["n_counts"]``, ``obs["n_genes"]``, ``obs["percent_mito"]``
        Total counts, genes seen and mitochondrial fraction **over all genes that were measured**. The 765 genes here
        hold 11 % to 28 % of the counts of a cell.
    ``obs["S_score"]``, ``obs["G2M_score"]``, ``obs["phase"]``, ``obs["louvain"]``
        Cell cycle and clusters as computed by the authors of the file.

    Raises
    ------
    RuntimeError
        The installed scanpy ships another file, from which counts cannot be recovered exactly.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> adata.shape, int(adata.X.max())
    ((700, 765), 259)

    References
    ----------
    Zheng et al. (2017), Massively parallel digital transcriptional profiling of single cells,
    Nature Communications 8, 14049.
    """
    import scanpy as sc

    reduced = sc.datasets.pbmc68k_reduced()
    obs = reduced.obs.copy()
    obs["batch"] = pd.Categorical(obs.index.str.rsplit("-", n=1).str[-1])
    counts = _recover_counts(reduced.raw.X, obs["n_counts"].to_numpy(np.float64))
    return AnnData(counts, obs=obs, var=reduced.raw.var.copy())


def _recover_counts(log_normalized: csr_matrix, totals: np.ndarray) -> csr_matrix:
    log_normalized = csr_matrix(log_normalized, dtype=np.float64, copy=True)
    log_normalized.sort_indices()
    cell = np.repeat(np.arange(len(totals)), np.diff(log_normalized.indptr))
    per_count = _TARGET_SUM / totals[cell]
    counts = np.rint(np.expm1(log_normalized.data) / per_count)

    error = np.abs(np.log1p(counts * per_count) - log_normalized.data).max()
    without_one = len(totals) - len(np.unique(cell[counts == 1]))
    if not (error <= _ROUNDING and without_one == 0 and counts.min() >= 1):  # so written that NaN is caught
        msg = (
            "The counts behind scanpy.datasets.pbmc68k_reduced() cannot be recovered exactly: they give back its `raw` "
            f"to within {error:.3g}, expected {_ROUNDING:.3g} (rounding), and {without_one} cells have no count of "
            "one, expected 0. The installed scanpy has another file than scanpy 1.11.5, for which this was written."
        )
        raise RuntimeError(msg)
    return csr_matrix((counts.astype(np.float32), log_normalized.indices, log_normalized.indptr), log_normalized.shape)
