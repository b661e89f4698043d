"""What can be imputed without a model: the counts of all cells pooled, or those of the nearest cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scanpy as sc
import scipy.sparse as sp
from sklearn.neighbors import kneighbors_graph

from scvi_ext.functional.imputation import pooled_rates

if TYPE_CHECKING:
    from scvi_ext.data.corruption import Entries

N_NEIGHBORS = 15  # scanpy's default for neighbour graphs
N_COMPONENTS = 50  # scanpy's default for PCA
_MIN_CELLS, _MIN_GENES = 3, 2  # with fewer there is no principal component


def check_size(counts: sp.csr_matrix) -> None:
    """Raise a ValueError if there are too few cells or genes for baselines."""
    if counts.shape[0] < _MIN_CELLS or counts.shape[1] < _MIN_GENES:
        msg = (
            f"Baselines take {_MIN_CELLS} cells and {_MIN_GENES} genes at least, and there are {counts.shape[0]} and "
            f"{counts.shape[1]}: pass baselines=False."
        )
        raise ValueError(msg)


def baselines(counts: sp.csr_matrix, rows: np.ndarray | None, entries: Entries, seed: int) -> dict[str, np.ndarray]:
    """Imputed values of the entries by the name of the baseline, shape (m,) each.

    Parameters
    ----------
    counts
        Corrupted counts of all cells, shape (n, G).
    rows
        The cells that ``entries`` count from 0; None is all.
    entries
        What is to be imputed.
    seed
        Of the principal components.
    """
    nearest = nearest_cells(counts, seed)
    libraries = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    if rows is not None:
        nearest, libraries = nearest[rows], libraries[rows]
    everyone = sp.csr_matrix(np.ones((1, counts.shape[0])))
    where = (entries.cells, entries.genes)
    return {
        "nearest cells": pooled_rates(counts, nearest, libraries, *where),
        "gene mean": pooled_rates(counts, everyone, libraries, *where),
        "no imputation": entries.corrupted.astype(np.float64),
    }


def nearest_cells(counts: sp.csr_matrix, seed: int) -> sp.csr_matrix:
    """Row c marks the cells nearest to cell c, itself left out, by principal components of log-normalised counts."""
    libraries = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    filled = libraries > 0
    scale = np.median(libraries[filled]) / np.where(filled, libraries, 1)
    normalized = sp.csr_matrix(sp.diags_array(scale) @ counts, dtype=np.float32).log1p()
    n_components = min(N_COMPONENTS, min(counts.shape) - 1)
    components = sc.pp.pca(normalized, n_comps=n_components, random_state=seed)
    return kneighbors_graph(components, min(N_NEIGHBORS, counts.shape[0] - 1))
