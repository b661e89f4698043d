"""Which cells, in which order: pure functions of a seed."""

from __future__ import annotations

import math

import numpy as np

from scvi_ext._errors import number

_SPLIT, _ORDER = 0, 1  # streams of one seed that must not coincide


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


def epoch_order(cells: np.ndarray, shape: tuple[int, int], seed: int, epoch: int) -> np.ndarray:
    """Every cell once in random order as (steps, batch size) positions; the last row is filled up from the beginning.

    So a run has one minibatch shape, and no minibatch is too small for batch normalisation.
    """
    return np.resize(np.random.default_rng([seed, _ORDER, epoch]).permutation(cells), shape)
