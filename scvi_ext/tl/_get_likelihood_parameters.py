from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import whole_number
from scvi_ext.fitted import Fitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws


def get_likelihood_parameters(
    adata: AnnData,
    *,
    key: str | None = None,
    n_samples: int = 1,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Parameters of the count distribution of every cell and gene, averaged over posterior samples of z.

    For what a fit says of proteins, see :func:`~scvi_ext.tl.get_protein_expression`,
    :func:`~scvi_ext.tl.get_protein_background` and :func:`~scvi_ext.tl.get_protein_foreground`.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    n_samples
        Posterior samples to average.
    indices
        The cells: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets, as float32

    ``adata.layers["<key>_mean"]``
        Mean count before zero inflation, cells x genes.
    ``adata.layers["<key>_dropout"]``
        Probability of a technical zero, cells x genes; for ``reconstruction_loss="zinb"``.
    ``adata.var["<key>_dispersion"]`` or ``adata.layers["<key>_dispersion"]``
        Inverse dispersion theta (variance = mean + mean^2 / theta), one per gene, or cells x genes where the fit's
        ``dispersion`` (``gene_dispersion``) is not ``"gene"``; for zinb and nb. For ``"normal"`` it is the standard
        deviation.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_likelihood_parameters(adata)
    >>> sorted(adata.layers), adata.var["scvi_dispersion"].shape
    (['scvi_dropout', 'scvi_mean'], (765,))
    """
    whole_number("n_samples", n_samples, 1)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices)
    module = fitted.module
    per_gene = module.has_theta and module.dispersion is not None and module.dispersion.column is None
    has_dropout = module.heads["zero_inflation"]
    per_cell_theta = module.has_theta and not per_gene
    names = [fitted.keys.mean]
    names += [fitted.keys.dropout] if has_dropout else []
    names += [fitted.keys.dispersion] if per_cell_theta else []

    def parameters(cells: Minibatch, draws: Draws) -> tuple[np.ndarray, ...]:
        noise = draws.normal(len(cells.x), n_samples, module.n_noise)
        posteriors = module.posteriors(cells)
        sums = [0.0] * len(names)
        for s in range(n_samples):
            z, log_library = module.draw(cells, posteriors, noise[:, s])
            px = module.decode(module.transform_z(z), cells, log_library)
            values = [px.rate]
            values += [px.dropout_logits.sigmoid()] if has_dropout else []
            values += [px.theta] if per_cell_theta else []
            sums = [total + value for total, value in zip(sums, values, strict=True)]
        return tuple(total / n_samples for total in sums)

    start = logg.info(f"computing likelihood parameters of fit {fitted.fit.key!r}")
    blocks = fitted.map(parameters, batch_size=batch_size, seed=seed, floats_per_cell=n_samples * module.n_noise)
    results.write_layers(adata, names, blocks, fitted.rows, fitted.columns)
    added = f"{', '.join(map(repr, names))} (adata.layers)"
    if per_gene:
        log_theta = fitted.fit.state["dispersion.log_theta"]
        theta = np.exp(log_theta if module.genes is None else log_theta[module.genes.numpy(force=True)])
        results.write_var(adata, fitted.keys.dispersion, theta, fitted.columns)
        added += f"\n    {fitted.keys.dispersion!r} (adata.var)"
    logg.info("    finished", time=start, deep=f"added\n    {added}")
    return adata if copy else None
