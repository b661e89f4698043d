from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import number, one_of, whole_number
from scvi_ext.fitted import Fitted, in_batch
from scvi_ext.tl._iterate import check_iterate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, Literal

    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws


def get_normalized_expression(
    adata: AnnData,
    *,
    key: str | None = None,
    transform_batch: Any = None,
    gene_list: Sequence[str] | None = None,
    library_size: float | Literal["latent"] = 1e4,
    n_samples: int = 1,
    weights: Literal["importance"] | None = None,
    return_mean: bool = True,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    iterate: bool = False,
    copy: bool = False,
) -> AnnData | np.ndarray | Iterator[tuple[slice, np.ndarray]] | None:
    """Denoised, normalised expression: the decoder's profile of each cell at posterior samples, times a library size.

    Output is filled block by block; memory does not grow with ``n_samples``.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    transform_batch
        Batch to decode in, as if all cells had been measured there, or several, which are averaged. None: each cell's
        own.
    gene_list
        Names of genes; the result is then a table in ``obsm``.
    library_size
        Counts that each profile is scaled to, or ``"latent"`` for the cell's own (observed, inferred or given). The
        profiles of a fit with ``library="size_factor"`` are a softplus and do not sum to 1: there it is a factor, not
        the sum of a cell.
    n_samples
        Posterior samples of z to average.
    weights
        ``"importance"`` weighs the samples by p(x, z) / q(z | x), so that the average tends to the exact posterior's.
    return_mean
        False returns all samples instead of writing their mean.
    indices
        The cells: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples.
    key_added
        Slot to write, ``"<key>_normalized"`` by default.
    iterate
        Write nothing, and return the values of one stretch of cells after the other as they are computed.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.layers["<key>_normalized"]``
        float32, cells x genes; genes that the fit does not know are NaN.
    ``adata.obsm["<key>_normalized"]``
        DataFrame, cells x gene_list; with ``gene_list`` only.

    With ``return_mean=False``: float32 array, samples x cells x genes, and nothing is written. With ``iterate``: an
    iterator over pairs of a slice (of all cells, or of ``indices``) and the values of these cells, (cells, genes) or
    (samples, cells, genes). Samples have the genes of the fit, or of ``gene_list``; means have those of ``adata``, in
    its order, or of ``gene_list``.

    Raises
    ------
    KeyError
        No such fit, or unknown genes.
    ValueError
        Unknown batch, or options that have no effect together.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_normalized_expression(adata, transform_batch="1", gene_list=["CD3D", "CD79A"])
    >>> adata.obsm["scvi_normalized"].shape
    (700, 2)

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053; importance weights: Boyeau et al. (2023), PNAS 120, e2209124120.
    """
    whole_number("n_samples", n_samples, 1)
    if weights is not None:
        one_of("weights", weights, ["importance"])
    if weights is not None and (n_samples == 1 or not return_mean):
        msg = "weights='importance' has no effect: it weighs samples (n_samples > 1) of a mean (return_mean=True)."
        raise ValueError(msg)
    if not return_mean and (copy or key_added is not None):
        msg = "return_mean=False returns an array and writes nothing: leave out copy and key_added."
        raise ValueError(msg)
    check_iterate(iterate, copy=copy, key_added=key_added)
    latent_library = isinstance(library_size, str)
    if latent_library:
        one_of("library_size", library_size, ["latent"])
    elif not 0 < number("library_size", library_size) < np.inf:
        msg = f"library_size={library_size} must be positive, or 'latent'."
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices)
    place = "layers" if gene_list is None else "obsm"
    slot = fitted.slot(place, fitted.keys.normalized, key_added)
    module = fitted.module
    batches = fitted.batch_codes(transform_batch, of_profile=True)
    genes = fitted.gene_positions(gene_list)
    columns = slice(None) if genes is None else torch.from_numpy(genes)

    def profile(cells: Minibatch, posteriors: tuple, noise: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
        z, log_library = module.draw(cells, posteriors, noise)
        z = module.transform_z(z)
        size = torch.exp(log_library) if latent_library else library_size
        scales = (module.scale(z, in_batch(cells, batch))[:, columns] for batch in batches)
        return reduce(torch.Tensor.add_, scales).mul_(size * share / len(batches))

    def samples(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        noise = draws.normal(len(cells.x), n_samples, module.n_noise)
        posteriors = module.posteriors(cells)
        return (torch.stack([profile(cells, posteriors, noise[:, s], 1.0) for s in range(n_samples)]),)

    def mean(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        noise = draws.normal(len(cells.x), n_samples, module.n_noise)
        posteriors = module.posteriors(cells)
        shares = [1 / n_samples] * n_samples
        if weights == "importance":
            log_weights = [module.log_weight(cells, posteriors, noise[:, s]) for s in range(n_samples)]
            shares = torch.softmax(torch.stack(log_weights), 0).unsqueeze(-1)  # (S, B, 1)
        profiles = (profile(cells, posteriors, noise[:, s], shares[s]) for s in range(n_samples))
        return (reduce(torch.Tensor.add_, profiles),)

    start = logg.info(f"computing normalised expression from fit {fitted.fit.key!r}")
    options = {"batch_size": batch_size, "seed": seed, "floats_per_cell": n_samples * module.n_noise}
    if not return_mean and iterate:
        return ((cells, values) for cells, (values,) in fitted.map(samples, **options))
    if not return_mean:
        return np.concatenate([values for _, (values,) in fitted.map(samples, **options)], axis=1)
    blocks = fitted.map(mean, **options)
    if iterate:
        n_vars, places = (adata.n_vars, fitted.columns) if genes is None else (len(genes), np.arange(len(genes)))
        return ((cells, results.of_all_genes(values, places, n_vars)) for cells, (values,) in blocks)
    if genes is None:
        results.write_layers(adata, [slot], blocks, fitted.rows, fitted.columns)
    else:
        values = np.concatenate([block for _, (block,) in blocks])
        results.write_obsm(adata, slot, values, fitted.rows, names=[fitted.fit.var_names[i] for i in genes])
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, normalised expression (adata.{place})")
    return adata if copy else None
