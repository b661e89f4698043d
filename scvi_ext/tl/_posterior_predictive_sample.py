from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import whole_number
from scvi_ext._keys import of_proteins
from scvi_ext.fitted import Fitted
from scvi_ext.functional.generate import draw_counts
from scvi_ext.functional.proteins import draw_protein_counts
from scvi_ext.tl._expressions import expressions
from scvi_ext.tl._proteins import log_imputed, panel_if_any, streams_of_proteins

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws


def posterior_predictive_sample(
    adata: AnnData,
    *,
    key: str | None = None,
    n_samples: int = 1,
    gene_list: Sequence[str] | None = None,
    protein_list: Sequence[str] | None = None,
    transform_batch: Any = None,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | list[sp.csr_matrix] | tuple[list[sp.csr_matrix], np.ndarray] | None:
    """Draw new counts for every cell, from the likelihood of the fit at posterior samples of z and the library.

    Each count is a draw from exactly the distribution that was fitted; for ``reconstruction_loss="bernoulli"`` it is 1
    for detected and 0 for not. Only Poisson rates beyond 1e8, which a latent library that is far off can lead to, are
    taken for 1e8, as in scVI 0.5.0.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    n_samples
        One is written; more are returned, in memory of the order of their non-zero counts.
    gene_list
        Names of genes. One sample of them is a table in ``obsm``.
    protein_list
        Names of proteins, for a model that has them; all by default, and none if it is empty.
    transform_batch
        Batch to decode in, as if all cells had been measured there; one only. None: each cell's own, and for a protein
        that it has not measured, one of those that have, at random.
    indices
        The cells: positions, mask or names. For a table or samples that are returned; a sparse layer has no NaN for the
        other cells.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples. Every cell has a stream of random numbers of its own.
    key_added
        Slot to write, ``"<key>_posterior_predictive"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.layers["<key>_posterior_predictive"]``
        Sparse (CSR), float32, cells x genes.
    ``adata.obsm["<key>_posterior_predictive"]``
        DataFrame, float32, cells x gene_list, NaN for cells that were not asked for; with ``gene_list`` only.
    ``adata.obsm["<key>_posterior_predictive_protein"]``
        The same of proteins, for a model that has them; with ``key_added``, ``"<key_added>_protein"``.

    With ``n_samples`` of 2 or more: a list of sparse matrices (CSR), float32, each the chosen cells x ``gene_list`` or
    the genes of the fit in its order, and nothing is written. With proteins, a pair: that list, and a float32 array,
    samples x cells x proteins.

    Raises
    ------
    KeyError
        No such fit, or unknown genes or proteins.
    ValueError
        Unknown batch, one that has not measured a protein, proteins of a model without, options that have no effect
        together, or cells or genes without a sample in a sparse layer.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.posterior_predictive_sample(adata)
    >>> adata.layers["scvi_posterior_predictive"].shape
    (700, 765)

    References
    ----------
    Gelman, Meng and Stern (1996), Statistica Sinica 6, 733.
    """
    whole_number("n_samples", n_samples, 1)
    if n_samples > 1 and (copy or key_added is not None):
        msg = f"n_samples={n_samples} returns matrices and writes nothing: leave out copy and key_added."
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices)
    place = "layers" if gene_list is None else "obsm"
    slot = fitted.slot(place, fitted.keys.posterior_predictive, key_added)
    module = fitted.module
    batch = fitted.batch_code(transform_batch)
    genes = fitted.gene_positions(gene_list)
    panel = panel_if_any(fitted, [batch], protein_list)
    slot_of_proteins = fitted.slot("obsm", of_proteins(slot), None)
    columns = slice(None) if genes is None else genes
    if n_samples == 1 and genes is None:
        _check_complete(adata, fitted)

    def samples(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        streams = draws.streams(len(cells.x))
        more_streams = [] if panel is None else streams_of_proteins(streams)
        drawn = []
        for px, z, noise in expressions(module, cells, draws, n_samples, batch):
            counts = draw_counts(module.reconstruction_loss, px, streams)[:, columns]
            if panel is not None:
                parts = panel.components(z, cells, noise, more_streams, counted=True)
                counts = np.concatenate([counts, draw_protein_counts(parts, more_streams)[:, panel.columns]], axis=1)
            drawn.append(counts.astype(np.float32))
        return (torch.from_numpy(np.stack(drawn)),)  # (S, B, genes and then proteins)

    start = logg.info(f"drawing counts from fit {fitted.fit.key!r}")
    log_imputed(panel)
    size = n_samples * max(module.n_noise, fitted.store.n_genes)
    n_genes = fitted.store.n_genes if genes is None else len(genes)
    parts, of_panel = [], []
    for _, (block,) in fitted.map(samples, batch_size=batch_size, seed=seed, floats_per_cell=size):
        parts.append([sp.csr_matrix(sample) for sample in block[..., :n_genes]])
        of_panel.append(block[..., n_genes:].copy())
    drawn = [sp.vstack(blocks, format="csr") for blocks in zip(*parts, strict=True)]
    proteins = np.concatenate(of_panel, axis=1)
    if n_samples > 1:
        logg.info("    finished", time=start)
        return drawn if panel is None else (drawn, proteins)
    if genes is None:
        results.write_sparse_layer(adata, slot, drawn[0], fitted.columns)
    else:
        names = [fitted.fit.var_names[i] for i in genes]
        results.write_obsm(adata, slot, drawn[0].toarray(), fitted.rows, names=names)
    added = f"{slot!r}, posterior predictive counts (adata.{place})"
    if panel is not None:
        results.write_proteins(adata, slot_of_proteins, proteins[0], fitted.rows, panel.names)
        added += f"\n    {slot_of_proteins!r}, the same of proteins (adata.obsm)"
    logg.info("    finished", time=start, deep=f"added\n    {added}")
    return adata if copy else None


def _check_complete(adata: AnnData, fitted: Fitted) -> None:
    """Raise a ValueError if a layer of all cells and genes would have to leave some out."""
    advice = "give gene_list for a table, take n_samples of 2 or more, or subset adata first."
    if fitted.rows is not None:
        msg = f"indices would leave cells without counts in a sparse layer, which has no NaN: {advice}"
        raise ValueError(msg)
    unknown = adata.n_vars - len(fitted.columns)
    if unknown:
        msg = (
            f"{unknown} of {adata.n_vars} genes of adata are not in fit {fitted.fit.key!r} and would have no counts in "
            f"a sparse layer, which has no NaN: {advice}"
        )
        raise ValueError(msg)
