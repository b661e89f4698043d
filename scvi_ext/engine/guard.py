"""What to do when a loss is no longer finite: who is to blame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext.engine.checkpoint import load_module, module_arrays
from scvi_ext.engine.step import per_cell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from scvi_ext.data.blocks import Block

MAX_ROLLBACKS = 8  # halvings of the learning rate: by a factor of 256 in all
_CHUNK = 1024
_NAMED = 20  # cells and genes kept per event; the first are enough to find the cause


@dataclass(frozen=True)
class NonFiniteEvent:
    """A loss or a parameter that was not finite, and what was suspicious at the last good state."""

    epoch: int
    cells: tuple[int, ...]  # positions whose own loss is not finite: they are left out from then on
    suspects: tuple[int, ...]  # or else, the positions with the largest loss
    genes: tuple[int, ...]  # positions of the genes with the most extreme counts in those cells


@torch.no_grad()
def find_culprits(
    module: nn.Module, block: Block, rows: np.ndarray, epoch: int, origin: Mapping[str, np.ndarray]
) -> NonFiniteEvent:
    """Look at every cell with the module in its last good state.

    Data that cannot be modelled (infinite, NaN, absurdly large) shows as cells without a finite loss, now and with the
    weights that the run began with, ``origin``. Where there are none, the optimiser went too far, and the cells with
    the largest loss are the suspects.
    """
    was_training = module.training
    module.eval()
    losses = np.concatenate([_losses(module, block, rows[i : i + _CHUNK]) for i in range(0, len(rows), _CHUNK)])
    bad = rows[~np.isfinite(losses)]
    if len(bad):
        now = module_arrays(module)
        load_module(module, origin)
        at_first = [_losses(module, block, bad[i : i + _CHUNK]) for i in range(0, len(bad), _CHUNK)]
        load_module(module, now)
        bad = bad[~np.isfinite(np.concatenate(at_first))]
    module.train(was_training)
    suspects = bad if len(bad) else rows[np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")[:_NAMED]]
    x = block.minibatch(block.rows(suspects[:_NAMED])).x.to_dense().cpu().numpy()
    extreme = np.where(np.isfinite(x), x, np.inf).max(0)
    genes = np.argsort(-extreme, kind="stable")[: max(1, min(_NAMED, int((~np.isfinite(extreme)).sum())))]
    return NonFiniteEvent(
        epoch, tuple(bad.tolist()), () if len(bad) else tuple(suspects.tolist()), tuple(genes.tolist())
    )


def _losses(module: nn.Module, block: Block, rows: np.ndarray) -> np.ndarray:
    return per_cell(module.loss(block.minibatch(block.rows(rows)))).cpu().numpy()
