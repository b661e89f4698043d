from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scanpy import logging as logg

from scvi_ext._errors import whole_number
from scvi_ext.fitted import Fitted
from scvi_ext.tl._denoised import denoised_blocks, positive_size
from scvi_ext.tl._proteins import log_imputed, panel_if_any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from anndata import AnnData


def denoised_samples(
    adata: AnnData,
    *,
    key: str | None = None,
    n_samples: int = 25,
    library_size: float = 1000.0,
    transform_batch: Any = None,
    gene_list: Sequence[str] | None = None,
    protein_list: Sequence[str] | None = None,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Draws of expression without technical noise: the rates that counts are Poisson counts of, at one library size.

    A (zero-inflated) negative binomial count is a Poisson count whose rate follows a Gamma distribution with mean
    ``library_size`` times the profile and inverse dispersion theta. That rate is drawn, without the Poisson noise and
    the technical zeros that come on top, so what varies between cells is z and the overdispersion. Other likelihoods
    have no such layer: their draws are ``library_size`` times the profile at posterior samples of z.

    Of proteins, the rate of the foreground is drawn, and is zero where a draw says that the count is background.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    n_samples
        Draws per cell.
    library_size
        Counts that each profile is scaled to. The profiles of a fit with ``library="size_factor"`` are a softplus and
        do not sum to 1: there it is a factor, not the sum of a cell.
    transform_batch
        Batch to decode in, as if all cells had been measured there; one only. None: each cell's own, and for a protein
        that it has not measured, one of those that have, at random.
    gene_list
        Names of genes; their draws are the same as among all genes.
    protein_list
        Names of proteins, for a model that has them; all by default, and none if it is empty.
    indices
        The cells: positions, mask or names.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples. Every cell has a stream of random numbers of its own.

    Returns
    -------
    float32 array, samples x cells x ``gene_list`` or the genes of the fit in its order. With proteins, a pair: that of
    genes and that of proteins. Nothing is written.

    Raises
    ------
    KeyError
        No such fit, or unknown genes or proteins.
    ValueError
        Unknown batch or several of them, one that has not measured a protein, proteins of a model without, or an
        impossible number.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.denoised_samples(adata, n_samples=3, gene_list=["CD3D", "CD79A"]).shape
    (3, 700, 2)

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053.
    """
    whole_number("n_samples", n_samples, 1)
    library_size = positive_size(library_size)
    fitted = Fitted.open(adata, key, indices)
    batch = fitted.batch_code(transform_batch)
    genes = fitted.gene_positions(gene_list)
    panel = panel_if_any(fitted, [batch], protein_list)
    start = logg.info(f"drawing denoised samples from fit {fitted.fit.key!r}")
    log_imputed(panel)
    n_genes = fitted.store.n_genes if genes is None else len(genes)
    n_proteins = 0 if panel is None else len(panel.names)
    drawn = np.empty((n_samples, fitted.store.n_cells, n_genes), np.float32)
    of_proteins = np.empty((n_samples, fitted.store.n_cells, n_proteins), np.float32)
    blocks = denoised_blocks(
        fitted,
        n_samples=n_samples,
        library_size=library_size,
        batch=batch,
        genes=genes,
        panel=panel,
        batch_size=batch_size,
        seed=seed,
    )
    for stretch, block in blocks:
        drawn[:, stretch], of_proteins[:, stretch] = np.split(block, [n_genes], axis=2)
    logg.info("    finished", time=start)
    return drawn if panel is None else (drawn, of_proteins)
