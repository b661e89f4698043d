from __future__ import annotations

from functools import reduce
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._contract import Capability
from scvi_ext._errors import listing, number, one_of, whole_number
from scvi_ext.data.joint import batches_of
from scvi_ext.fitted import Fitted, in_batch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws


def impute(
    adata: AnnData,
    *,
    key: str | None = None,
    gene_list: Sequence[str] | None = None,
    decode_mode: str | None = None,
    library_size: float | Literal["latent"] = 1e4,
    n_samples: int = 0,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Expression of genes that were not measured in these cells, but in other data sets of a joint fit.

    Needs nothing but ``adata``, in which the fit has what it learned from all data sets. Values are filled in block by
    block; memory does not grow with ``n_samples``.

    Parameters
    ----------
    adata
        Annotated data that holds a fit of several data sets, such as ``tl.fit({"rna": a, "spatial": b}, "gimvi")``.
    key
        Which fit; the last one by default.
    gene_list
        Names of genes that any data set has measured, those of ``adata`` too. By default all that it has not measured.
    decode_mode
        The data set that cells are decoded as: the profile sums to 1 over the genes that were measured there. By
        default that of ``adata``. Layers of the decoder normalise as they do for cells of that data set; where they see
        the batch, another one's batches are averaged.
    library_size
        Counts that the profile is scaled to, over the genes of ``decode_mode``; 1 for the profile itself. Or
        ``"latent"`` for the cell's own (observed or inferred): mean counts, before zero inflation, at its own depth.
    n_samples
        Posterior samples of z, and of a latent library, to average. 0 decodes their means.
    indices
        The cells: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples; without effect where none are drawn (``n_samples=0``).
    key_added
        Slot to write, ``"<key>_imputed"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.obsm["<key>_imputed"]``
        DataFrame of float32, cells x genes.

    Raises
    ------
    KeyError
        No such fit, or genes that no data set has.
    ValueError
        The fit is of one data set, no data set is called ``decode_mode``, or all genes were measured.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> rna = sx.datasets.pbmc68k_counts()
    >>> spatial = rna[:, :60].copy()
    >>> for part in (rna, spatial):
    ...     sx.pp.setup_anndata(part)
    >>> sx.tl.fit({"rna": rna, "spatial": spatial}, "gimvi", max_epochs=2)
    >>> sx.tl.impute(spatial)
    >>> spatial.obsm["gimvi_imputed"].shape
    (700, 705)

    References
    ----------
    Lopez et al. (2019), ICML Workshop on Computational Biology, arXiv:1905.02269.
    """
    whole_number("n_samples", n_samples, 0)
    latent_library = isinstance(library_size, str)
    if latent_library:
        one_of("library_size", library_size, ["latent"])
    elif not 0 < number("library_size", library_size) < np.inf:
        msg = f"library_size={library_size} must be positive, or 'latent'."
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices, capability=Capability.JOINT)
    slot = fitted.slot("obsm", fitted.keys.imputed, key_added)
    genes = _positions(fitted, gene_list)
    mode, batches = _decoded_as(fitted, decode_mode)
    module, columns = fitted.module, torch.from_numpy(genes)
    n_draws = max(n_samples, 1)

    def mean(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        shape = (len(cells.x), n_draws, module.n_noise)
        noise = draws.normal(*shape) if n_samples else torch.zeros(shape, device=draws.device)
        posteriors = module.posteriors(cells)
        terms = (decoded(cells, posteriors, noise[:, s], batch) for s, batch in product(range(n_draws), batches))
        return (reduce(torch.Tensor.add_, terms).div_(n_draws * len(batches)),)

    def decoded(cells: Minibatch, posteriors: tuple, noise: torch.Tensor, batch: int | None) -> torch.Tensor:
        z, log_library = module.draw(cells, posteriors, noise)
        px = module.decode_joint(z, in_batch(cells, batch), mode, log_library)
        return px.rate[:, columns] if latent_library else px.scale[:, columns] * library_size

    start = logg.info(f"imputing {len(genes)} genes from fit {fitted.fit.key!r}")
    size = max(module.total_genes, n_draws * module.n_noise)
    values = np.empty((fitted.store.n_cells, len(genes)), np.float32)
    for rows, (block,) in fitted.map(mean, batch_size=batch_size, seed=seed, floats_per_cell=size):
        values[rows] = block
    results.write_obsm(adata, slot, values, fitted.rows, names=[fitted.fit.joint["genes"][i] for i in genes])
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, imputed expression (adata.obsm)")
    return adata if copy else None


def _positions(fitted: Fitted, gene_list: Sequence[str] | None) -> np.ndarray:
    """Positions of the genes among those of all data sets."""
    if gene_list is not None:
        return fitted.joint_gene_positions(gene_list)
    genes = np.flatnonzero(~np.isin(fitted.fit.joint["genes"], fitted.fit.var_names))
    if len(genes) == 0:
        msg = (
            f"There is nothing to impute: the data set {fitted.fit.joint['dataset']!r} has measured all genes of fit "
            f"{fitted.fit.key!r}. Name those that you want all the same, gene_list=..."
        )
        raise ValueError(msg)
    return genes


def _decoded_as(fitted: Fitted, decode_mode: str | None) -> tuple[int, list[int | None]]:
    """The data set whose profile it is to be, and in which of its batches; ``[None]`` is each cell's own."""
    own, names = fitted.fit.joint["dataset"], list(fitted.fit.joint["datasets"])
    if decode_mode is not None and decode_mode not in names:
        msg = f"decode_mode={decode_mode!r} is not a data set of fit {fitted.fit.key!r}, which has {listing(names)}."
        raise ValueError(msg)
    mode = names.index(own if decode_mode is None else decode_mode)
    # A batch has only ever been decoded as the data set that it is of.
    other = names[mode] != own and fitted.module.decoder.px_decoder_conditioned is not None
    return mode, list(batches_of(fitted.fit, mode)) if other else [None]
