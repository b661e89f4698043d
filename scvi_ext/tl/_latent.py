"""The latent space of a fit: what tl.get_latent writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvi_ext.functional.sampling import sample_normal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws
    from scvi_ext.fitted import Fitted


def latent_of(fitted: Fitted) -> list[np.ndarray]:
    """Means of q(z | x), (N, L)."""
    parts = [values for _, values in latent_blocks(fitted)]
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def latent_blocks(
    fitted: Fitted,
    *,
    second: bool = False,
    give_mean: bool = True,
    mc_samples: int = 5000,
    return_dist: bool = False,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
    """Stretches of cells with means, or samples, of q(z | x), and with ``return_dist`` variances, each (b, L).

    ``second``: of z2.
    """
    module = fitted.module
    logistic = module.latent_distribution == "ln" and not second
    n_draws = mc_samples if logistic and give_mean and not return_dist else 1

    def represent(cells: Minibatch, draws: Draws) -> tuple[np.ndarray, ...]:
        qz = module.encode_z2(cells) if second else module.encode(cells)
        if return_dist:
            return qz.loc, qz.scale**2
        if not give_mean:
            z = sample_normal(qz, draws.normal(len(qz.loc), module.n_latent))
            return (module.transform_z(z) if logistic else z,)
        if second:
            return (qz.loc,)
        noise = draws.normal(len(qz.loc), mc_samples, module.n_latent) if logistic else None
        return (module.mean_z(qz, noise),)

    floats = n_draws * module.n_latent
    return fitted.map(represent, batch_size=batch_size, seed=seed, floats_per_cell=floats)
