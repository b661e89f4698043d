"""What the functions that draw from the likelihood share: a decoder's outputs at one posterior sample after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext.fitted import in_batch
from scvi_ext.functional.generate import on_host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from scvi_ext._contract import Expression, Minibatch
    from scvi_ext.engine.map_cells import Draws


def expressions(
    module: nn.Module, cells: Minibatch, draws: Draws, n_samples: int, batch: int | None = None
) -> Iterator[tuple[Expression, Tensor, Tensor]]:
    """What the decoder says in ``batch`` (None: each cell's own) at ``n_samples`` posterior samples, in host memory.

    With it come the sample of z, transformed, and the noise that it was made of.
    """
    noise = draws.normal(len(cells.x), n_samples, module.n_noise)
    posteriors = module.posteriors(cells)
    decoded_in = in_batch(cells, batch)
    for s in range(n_samples):
        z, log_library = module.draw(cells, posteriors, noise[:, s])
        z = module.transform_z(z)
        yield on_host(module.decode(z, decoded_in, log_library)), z, noise[:, s]
