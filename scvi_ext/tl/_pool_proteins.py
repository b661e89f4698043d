"""Draws of the foreground of proteins, kept as histograms beside those of the genes of the same cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp

from scvi_ext.functional.proteins import background_mean, denoised, foreground_probability
from scvi_ext.kernels import changes
from scvi_ext.kernels.compiler import in_parallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scvi_ext._contract import Minibatch
    from scvi_ext.fitted import Fitted

LOWEST, HIGHEST = -10, 20  # log2 of the smallest and the largest mean count that are told apart: 0.001 and a million
N_BINS = (HIGHEST - LOWEST) * changes.PER_DOUBLING + 1


class ProteinDraws(NamedTuple):
    """Draws of one protein, from the D decode batches and S sets of cells that can say something of it."""

    histograms: np.ndarray  # (D, S, 1, K) of the log2 of the foreground's mean count
    totals: np.ndarray  # (D, S) of the weights of the draws
    n_drawn: np.ndarray  # (D, S) cells
    foreground: np.ndarray  # (S,) mean count; zero of a set without draws
    background: np.ndarray  # (S,) the same
    n_cells: np.ndarray  # (S,) cells that could be drawn


class ProteinPool:
    """Draws of the mean count of proteins that is foreground, (1 - pi) alpha beta, in batches that have measured them.

    A decoder was never trained for a protein in a batch without it. Where cells are decoded in their own batch, draws
    are therefore kept apart by what was measured there, their panel, and those of panels without a protein are left
    out. Where they are decoded in given batches, those that have measured it count.
    """

    def __init__(self, fitted: Fitted, sets: np.ndarray, n_sets: int, batches: Sequence[int | None], per_cell: int):
        mask = fitted.module.protein_batch_mask.cpu().numpy()  # (K, P)
        self.module, self.n_sets, self.n_proteins, self.per_cell = fitted.module, n_sets, mask.shape[1], per_cell
        if batches == [None]:
            panels, of_batch = np.unique(mask, axis=0, return_inverse=True)
            self.measured = panels[None]  # (D, M, P)
            panel = of_batch.ravel()[fitted.store.batch_index]
        else:
            self.measured = mask[batches][:, None]
            panel = 0
        self.n_panels = self.measured.shape[1]
        self.parts = sets * self.n_panels + panel  # of each cell: its set and panel
        self.n_cells = np.bincount(self.parts, minlength=n_sets * self.n_panels).reshape(n_sets, self.n_panels)

    @property
    def bytes_each(self) -> int:
        """Size of the histograms of one protein."""
        return 4 * N_BINS * len(self.measured) * self.n_cells.size

    def start(self, proteins: slice) -> None:
        """Forget all draws, and collect those of these proteins."""
        self.proteins = proteins
        shape = len(self.measured), self.n_cells.size, len(range(self.n_proteins)[proteins])  # (D, S * M, p)
        self.histograms = np.zeros((*shape, N_BINS), np.float32)
        self.foreground, self.background = np.zeros(shape), np.zeros(shape)
        self.totals, self.n_drawn = np.zeros(shape[:2]), np.zeros(shape[:2])

    def draw(self, z: Tensor, decoded_in: Minibatch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Foreground at a drawn background, and the mean of the background: (B, p) each. ``z`` is transformed."""
        py = self.module.decode_protein(z, decoded_in)
        drawn = background_mean(py, noise[:, self.module.n_latent : -1])
        foreground = denoised(py, drawn, foreground_probability(py), include_background=False)
        return foreground[:, self.proteins].contiguous(), background_mean(py)[:, self.proteins]

    def add(
        self, d: int, cells: np.ndarray, weights: np.ndarray, foreground: np.ndarray, background: np.ndarray
    ) -> None:
        """Take in draws of a decode batch; those of one cell come together."""
        parts = self.parts[cells]
        in_parallel(changes.locate, foreground, self.foreground[d], parts, weights, LOWEST, N_BINS)
        in_parallel(changes.add, self.histograms[d], foreground, parts, weights)
        n = self.n_cells.size
        self.background[d] += sp.csr_matrix((weights, (parts, np.arange(len(parts)))), (n, len(parts))) @ background
        self.totals[d] += np.bincount(parts, weights, n)
        self.n_drawn[d] += np.bincount(parts[:: self.per_cell], minlength=n)

    def of(self, i: int) -> ProteinDraws | None:
        """What was drawn of a protein, of those that were asked for; None where no batch has measured it."""
        measured = self.measured[:, :, self.proteins][:, :, i]  # (D, M)
        used = np.flatnonzero(measured.any(1))
        if not len(used):
            return None
        panels = measured[used[0]]  # one of D and M is 1

        def of_sets(values: np.ndarray) -> np.ndarray:
            """Of (D, S * M, ...): the decode batches and panels that count, (D, S, ...)."""
            by_panel = values[used].reshape(len(used), self.n_sets, self.n_panels, *values.shape[2:])
            return by_panel[:, :, panels].sum(2)

        totals = of_sets(self.totals)
        some = np.maximum(totals, np.finfo(float).tiny)
        return ProteinDraws(
            np.ascontiguousarray(of_sets(self.histograms[:, :, i])[:, :, None]),
            np.where(totals > 0, totals, 1),
            of_sets(self.n_drawn),
            (of_sets(self.foreground[:, :, i]) / some).mean(0),
            (of_sets(self.background[:, :, i]) / some).mean(0),
            self.n_cells[:, panels].sum(1),
        )
