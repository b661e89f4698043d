"""Which cells, in which order: pure functions of a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scvi_ext._errors import number

_SPLIT, _ORDER, _LABELLED = 0, 1, 2  # streams of one seed that must not coincide
_LANES = (8, 4, 2, 1)  # shares of a minibatch that are read apart from each other: as many processes can have their own


@dataclass(frozen=True)
class Blocks:
    """An order for cells that are read from disk block by block."""

    n_blocks: int  # of an epoch
    chunk: int  # cells that lie together on disk and are read together

    def steps(self, n_steps: int) -> np.ndarray:
        """Step with which each block begins, and the number of steps, (n_blocks + 1,)."""
        return np.linspace(0, n_steps, min(self.n_blocks, n_steps) + 1).astype(np.int64)

    def bounds(self, n_steps: int, first: int) -> list[tuple[int, int]]:
        """Steps from and to of each block that is not over before step ``first``."""
        return [(a, z) for a, z in pairwise(self.steps(n_steps).tolist()) if z > first]


def split_cells(
    n_cells: int, train_size: float, validation_size: float | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of training and validation cells.

    Parameters
    ----------
    n_cells
        How many there are.
    train_size, validation_size
        Shares of the cells; ``validation_size=None`` is what training leaves over. The sum may be below 1.
    seed
        Decides who is where.

    Raises
    ------
    ValueError
        If the shares are impossible, or leave fewer than three training cells.
    """
    if not 0 < number("train_size", train_size) <= 1:
        msg = f"train_size={train_size} is a share of the cells: it must be above 0 and at most 1."
        raise ValueError(msg)
    rest = 1 - train_size
    if validation_size is not None and not 0 <= number("validation_size", validation_size) <= rest + 1e-9:
        msg = f"validation_size={validation_size} does not fit: train_size={train_size} leaves {rest:.3g} of the cells."
        raise ValueError(msg)
    n_train = math.ceil(round(train_size * n_cells, 6))
    n_validation = n_cells - n_train
    if validation_size is not None:
        n_validation = min(n_validation, math.floor(round(validation_size * n_cells, 6)))
    if n_train < 3:
        msg = (
            f"{n_train} of {n_cells} cells are left for training (train_size={train_size}); at least 3 are needed. "
            "Use more cells or a larger train_size."
        )
        raise ValueError(msg)
    order = np.random.default_rng([seed, _SPLIT]).permutation(n_cells)
    return np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_validation])


def epoch_order(
    cells: np.ndarray, shape: tuple[int, int], seed: int, epoch: int, stream: int = 0, blocks: Blocks | None = None
) -> np.ndarray:
    """Every cell once in random order as (steps, batch size) positions; the last row is filled up from the beginning.

    So a run has one minibatch shape, and no minibatch is too small for batch normalisation. Where there are fewer cells
    than fill it, as in a ``stream`` that goes round, each comes as often as any other, or once more.

    With ``blocks`` the order is that of chunks of neighbouring cells, and of the cells within a block of chunks: the
    steps of a block need no others. Each of several lanes of a minibatch keeps to chunks of its own.
    """
    rng = np.random.default_rng([seed, _ORDER, epoch, *([stream] if stream else [])])
    goes_round = stream or math.prod(shape) >= len(cells) + shape[1]
    rounds = -(-math.prod(shape) // len(cells)) if goes_round else 1
    if blocks is None:
        return np.resize(np.concatenate([rng.permutation(cells) for _ in range(rounds)]), shape)
    order = np.resize(np.concatenate([_permuted_chunks(cells, blocks.chunk, rng) for _ in range(rounds)]), shape)
    n_lanes = next(n for n in _LANES if shape[1] % n == 0)
    for first, stop in pairwise(blocks.steps(shape[0])):
        lanes = rng.permuted(order[first:stop].reshape(n_lanes, -1), axis=1)
        order[first:stop] = lanes.reshape(n_lanes, stop - first, -1).swapaxes(0, 1).reshape(stop - first, -1)
    return order


def _permuted_chunks(cells: np.ndarray, chunk: int, rng: np.random.Generator) -> np.ndarray:
    """The sorted positions ``cells``, chunk by chunk in random order."""
    chunks, of_cell = np.unique(cells // chunk, return_inverse=True)
    return cells[np.argsort(rng.permutation(len(chunks))[of_cell], kind="stable")]


def some_of_each_label(cells: np.ndarray, labels: np.ndarray, n: int | None, seed: int, epoch: int) -> np.ndarray:
    """Of ``cells``, ``n`` of each label drawn anew for the epoch, or all where a label has no more; None takes all.

    ``labels`` are codes of all cells, and the positions in ``cells`` point into them.
    """
    if n is None:
        return cells
    shuffled = np.random.default_rng([seed, _LABELLED, epoch]).permutation(cells)
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, sizes = np.unique(labels[by_label], return_index=True, return_counts=True)
    rank = np.arange(len(by_label)) - np.repeat(first, sizes)
    return np.sort(by_label[rank < n])
