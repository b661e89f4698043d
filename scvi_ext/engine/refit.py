"""Training a part of a module: its encoders, for cells that they may not have been trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from scvi_ext.engine.device import seeded
from scvi_ext.engine.fit import fit

if TYPE_CHECKING:
    import torch

    from scvi_ext._contract import Loss
    from scvi_ext.data.store import CellStore
    from scvi_ext.engine.plan import Plan
    from scvi_ext.engine.progress import Progress


class Encoders(nn.Module):
    """What the training loop is shown of a module: the encoders as the only parameters, and the loss of the whole.

    It stays in evaluation mode, so that what is trained is the bound that is reported: without dropout, with the
    statistics of batch normalisation as they are, and for any number of cells. Other parameters receive no gradient.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.parts = module.encoders
        self.whole = [module]  # in a list, so that its other parts are not registered
        module.requires_grad_(False)
        self.parts.requires_grad_(True)

    def train(self, mode: bool = True) -> Encoders:
        """Stay in evaluation mode."""
        self.whole[0].eval()
        return super().train(False)

    def loss(self, *cells: object, **options: object) -> Loss:
        """The negative ELBO of the whole module."""
        return self.whole[0].loss(*cells, **options)


def refit_encoders(
    module: nn.Module, store: CellStore, plan: Plan, *, seed: int, device: torch.device, show_progress: bool | None
) -> Progress:
    """Train the encoders of ``module`` in place, on all cells of a store; nothing else of it changes.

    Global random generators are neither read nor changed.
    """
    with seeded(seed, device):
        progress, _ = fit(
            Encoders(module.to(device)),
            store,
            plan,
            train=np.arange(store.n_cells),
            validation=np.empty(0, dtype=np.int64),
            seed=seed,
            device=device,
            show_progress=show_progress,
        )
    module.requires_grad_(True)
    return progress
