"""What get_elbo, get_reconstruction_error and get_marginal_ll share: a number per cell, averaged or written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import whole_number
from scvi_ext.engine.device import resolve_device, resolve_seed
from scvi_ext.fitted import Fitted
from scvi_ext.functional.evidence import draws_of_shared

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from torch import Tensor, nn

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws


def per_cell(
    adata: AnnData,
    value: Callable[[nn.Module, Minibatch, Tensor, Sequence[Tensor | None]], Tensor],
    name: str,
    *,
    key: str | None,
    indices: Sequence | None,
    n_samples: int,
    return_mean: bool,
    batch_size: int | None,
    seed: int | None,
    key_added: str | None,
    copy: bool,
    mean_of_all: Callable[[Fitted, Sequence[Tensor], int | None, int | None], float] | None = None,
) -> float | AnnData | None:
    """Compute ``value(module, cells, noise, shared)`` for every cell.

    ``noise`` has the shape (B, S, n_noise), and ``shared`` are S draws of what all cells share, or S times None.

    ``mean_of_all(fitted, shared, batch_size, seed)`` is the mean where cells share something, if it is another then.

    ``name`` is the attribute of :class:`~scvi_ext._keys.FitKeys` that names the slot.
    """
    whole_number("The number of samples", n_samples, 1)
    if return_mean and (copy or key_added is not None):
        msg = "return_mean=True writes nothing: leave out copy and key_added, or ask for return_mean=False."
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices)
    slot = fitted.slot("obs", getattr(fitted.keys, name), key_added)
    module = fitted.module
    shared = draws_of_shared(module.to(resolve_device()), n_samples, resolve_seed(seed))

    def values_of(cells: Minibatch, draws: Draws) -> np.ndarray:
        noise = draws.normal(len(cells.x), n_samples, module.n_noise)
        return (value(module, cells, noise, shared).double(),)

    what = name.replace("_", " ")
    start = logg.info(f"computing the {what} of fit {fitted.fit.key!r}")
    if return_mean and mean_of_all is not None and shared[0] is not None:
        mean = mean_of_all(fitted, shared, batch_size, seed)
        logg.info("    finished", time=start)
        return mean
    parts = fitted.map(values_of, batch_size=batch_size, seed=seed, floats_per_cell=n_samples * module.n_noise)
    values = np.concatenate([part for _, (part,) in parts])
    if return_mean:
        logg.info("    finished", time=start)
        return float(values.mean())
    results.write_obs(adata, slot, values, fitted.rows)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, {what} in nats (adata.obs)")
    return adata if copy else None
