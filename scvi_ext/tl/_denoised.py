"""What denoised_samples and feature_correlation share: denoised draws, minibatch by minibatch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._errors import number
from scvi_ext.functional.generate import draw_rates
from scvi_ext.tl._expressions import expressions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws
    from scvi_ext.fitted import Fitted


def positive_size(library_size: object) -> float:
    """``library_size``, if it is a positive number; else a TypeError or ValueError."""
    if not 0 < number("library_size", library_size) < np.inf:
        msg = f"library_size={library_size} must be positive and finite."
        raise ValueError(msg)
    return float(library_size)


def denoised_blocks(
    fitted: Fitted,
    *,
    n_samples: int,
    library_size: float,
    batch: int | None,
    genes: np.ndarray | None,
    batch_size: int | None,
    seed: int | None,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Stretches of cells with their draws, shape (S, cells, genes), float32; a gene's do not depend on ``genes``."""
    module = fitted.module
    columns = slice(None) if genes is None else genes

    def samples(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        streams = draws.streams(len(cells.x))
        drawn = [
            draw_rates(module.reconstruction_loss, library_size * px.scale, px, streams)[:, columns].astype(np.float32)
            for px in expressions(module, cells, draws, n_samples, batch)
        ]
        return (torch.from_numpy(np.stack(drawn)),)

    size = n_samples * max(module.n_noise, fitted.store.n_genes)
    for stretch, (block,) in fitted.map(samples, batch_size=batch_size, seed=seed, floats_per_cell=size):
        yield stretch, block
