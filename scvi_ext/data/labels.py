"""Columns of labels that are held against each other: true, known and predicted ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvi_ext.data.registry import codes, column, used_categories

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd


def read_labels(
    obs: pd.DataFrame, keys: Sequence[str], unlabeled: str | None = None
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Labels of several columns of ``obs`` under common codes.

    Parameters
    ----------
    obs
        Table of cells.
    keys
        Its columns. Values are compared as strings.
    unlabeled
        Category that stands for "no label" in each of them, beside missing values.

    Returns
    -------
    names
        Labels of the first column in their order, then those that only the next ones have.
    codes
        Of each column, int64, shape (n,): positions in ``names``, -1 where there is no label.
    """
    known = [~column(obs, key).isna().to_numpy() for key in keys]
    used = [used_categories(obs[rows], key) for key, rows in zip(keys, known, strict=True)]
    names = tuple(dict.fromkeys(name for of_column in used for name in of_column if name != unlabeled))
    found = []
    for key, rows in zip(keys, known, strict=True):
        found.append(np.full(len(obs), -1, dtype=np.int64))
        found[-1][rows] = codes(obs[rows], key, names, unlabeled)
    return names, found
