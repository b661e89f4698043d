"""Training what a module has no experience with, and nothing else: the parameters of new categories."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from scvi_ext.engine.device import seeded
from scvi_ext.engine.fit import fit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from scvi_ext._contract import Loss, Stream
    from scvi_ext.data.store import CellStore
    from scvi_ext.engine.plan import Plan
    from scvi_ext.engine.progress import Progress


class NewEntries(nn.Module):
    """What the training loop is shown of a module that has grown: what has new entries, and the loss of the whole.

    Known entries receive no gradient, so that without weight decay they stay as they are, bit for bit. The module stays
    in evaluation mode: without dropout, and with the statistics of batch normalisation as they are.

    Parameters
    ----------
    module
        Already on the device where it is trained.
    masks
        By the name of a parameter, True at its new entries.
    """

    def __init__(self, module: nn.Module, masks: Mapping[str, torch.Tensor]):
        super().__init__()
        self.whole = [module]  # in a list, so that its other parts are not registered
        module.requires_grad_(False)
        self.grown = nn.ParameterList(module.get_parameter(name).requires_grad_(True) for name in masks)
        for parameter, mask in zip(self.grown, masks.values(), strict=True):
            parameter.register_hook(mask.to(parameter).mul)

    def train(self, mode: bool = True) -> NewEntries:
        """Stay in evaluation mode."""
        self.whole[0].eval()
        return super().train(False)

    def loss(self, *cells: object, **options: object) -> Loss:
        """The loss of the whole module."""
        return self.whole[0].loss(*cells, **options)


def train_on_query(
    module: nn.Module,
    masks: Mapping[str, torch.Tensor] | None,
    store: CellStore,
    plan: Plan,
    streams: Sequence[Stream],
    *,
    seed: int,
    device: torch.device,
    show_progress: bool | None,
    announce: Callable[[float, str], None],
) -> Progress:
    """Train ``module`` in place on all cells of a store: the new entries of ``masks``, or without masks all of it.

    Global random generators are neither read nor changed.
    """
    module.to(device)
    with seeded(seed, device):
        progress, _ = fit(
            module if masks is None else NewEntries(module, masks),
            store,
            plan,
            train=np.arange(store.n_cells),
            validation=np.empty(0, dtype=np.int64),
            seed=seed,
            device=device,
            streams=streams,
            show_progress=show_progress,
            announce=announce,
        )
    return progress
