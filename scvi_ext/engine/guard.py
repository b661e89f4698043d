"""What to do when a loss is no longer finite: who is to blame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext.engine.checkpoint import load_module, module_arrays
from scvi_ext.engine.step import per_cell

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scvi_ext.data.stream import Resident, Streamed
    from scvi_ext.engine.step import TrainingStep

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
    step: TrainingStep,
    source: Resident | Streamed,
    cells: Sequence[np.ndarray],
    epoch: int,
    origin: Mapping[str, np.ndarray],
) -> NonFiniteEvent:
    """Look at every cell of the source, those of each stream, with the module in its last good state.

    Data that cannot be modelled (infinite, NaN, absurdly large) shows as cells without a finite loss, now and with the
    weights that the run began with, ``origin``. Where there are none, the optimiser went too far, and the cells with
    the largest loss are the suspects.
    """
    module = step.module
    was_training = module.training
    module.eval()
    streams = [i for i, stream in enumerate(step.streams) if stream.parts == step.streams[0].parts]
    rows = np.concatenate([cells[i] for i in streams])
    losses = np.concatenate([_losses(step, source, i, cells[i]) for i in streams])
    bad = rows[~np.isfinite(losses)]
    if len(bad):
        now = module_arrays(module)
        load_module(module, origin)
        at_first = [_losses(step, source, i, np.intersect1d(bad, cells[i])) for i in streams]
        load_module(module, now)
        bad = np.concatenate([np.intersect1d(bad, cells[i]) for i in streams])[~np.isfinite(np.concatenate(at_first))]
    module.train(was_training)
    suspects = bad if len(bad) else rows[np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")[:_NAMED]]
    genes = next(
        _extreme_genes(step, source, i, found) for i in streams if len(found := suspects[np.isin(suspects, cells[i])])
    )
    return NonFiniteEvent(
        epoch, tuple(bad.tolist()), () if len(bad) else tuple(suspects.tolist()), tuple(genes.tolist())
    )


def _extreme_genes(step: TrainingStep, source: Resident | Streamed, i: int, cells: np.ndarray) -> np.ndarray:
    """Positions of the genes with the largest counts in the first of these cells; all that are not finite there."""
    (minibatches,) = source.minibatches(_passes(step, i, [cells[:_NAMED]]))
    x = minibatches[i].x.to_dense().cpu().numpy()
    extreme = np.where(np.isfinite(x), x, np.inf).max(0)
    genes = np.argsort(-extreme, kind="stable")[: max(1, min(_NAMED, int((~np.isfinite(extreme)).sum())))]
    return step.sources[i].genes[genes]


def _losses(step: TrainingStep, source: Resident | Streamed, i: int, cells: np.ndarray) -> np.ndarray:
    """The loss of each of these cells, which are of stream ``i``."""
    chunks = [cells[start : start + _CHUNK] for start in range(0, len(cells), _CHUNK)]
    passes = source.minibatches(_passes(step, i, chunks))
    return np.concatenate(
        [np.empty(0), *(per_cell(step.module.loss(*minibatches)).cpu().numpy() for minibatches in passes)]
    )


def _passes(step: TrainingStep, i: int, chunks: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Cells of stream ``i``, and none of the others."""
    none = np.empty(0, dtype=np.int64)
    return [[chunk if j == i else none for j in range(len(step.streams))] for chunk in chunks]
