"""What denoised_samples and feature_correlation share: denoised draws, minibatch by minibatch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._errors import number
from scvi_ext.functional.generate import draw_rates
from scvi_ext.functional.proteins import draw_protein_rates
from scvi_ext.tl._expressions import expressions
from scvi_ext.tl._proteins import streams_of_proteins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws
    from scvi_ext.fitted import Fitted
    from scvi_ext.tl._proteins import Panel


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
    panel: Panel | None,
    batch_size: int | None,
    seed: int | None,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Stretches of cells with their draws, shape (S, cells, genes and then proteins), float32.

    Those of a gene or protein do not depend on which others are drawn.
    """
    module = fitted.module
    columns = slice(None) if genes is None else genes

    def samples(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        streams = draws.streams(len(cells.x))
        of_proteins = [] if panel is None else streams_of_proteins(streams)
        drawn = []
        for px, z, noise in expressions(module, cells, draws, n_samples, batch):
            rates = draw_rates(module.reconstruction_loss, library_size * px.scale, px, streams)[:, columns]
            if panel is not None:
                parts = panel.components(z, cells, noise, of_proteins, counted=False)
                rates = np.concatenate([rates, draw_protein_rates(parts, of_proteins)[:, panel.columns]], axis=1)
            drawn.append(rates.astype(np.float32))
        return (torch.from_numpy(np.stack(drawn)),)

    size = n_samples * max(module.n_noise, fitted.store.n_genes)
    for stretch, (block,) in fitted.map(samples, batch_size=batch_size, seed=seed, floats_per_cell=size):
        yield stretch, block
