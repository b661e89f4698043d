"""Draws of the normalised profile for sets of cells, kept as histograms: what all comparisons have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext import models
from scvi_ext._contract import Capability
from scvi_ext.fitted import in_batch
from scvi_ext.kernels import changes
from scvi_ext.kernels.compiler import in_parallel
from scvi_ext.tl._pool_proteins import ProteinPool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws
    from scvi_ext.fitted import Fitted

LOWEST = -24  # log2 of a scale of 6e-8: what is smaller counts as that
_HIGHEST = {"softmax": 0, "softplus": 12}  # log2 of the largest scale; a softplus is relative to the size factor
_HISTOGRAM_BYTES = 2**30  # at once; more genes or proteins than fit are decoded in several rounds
_CELLS_AT_ONCE = 2**14  # drawn cells that are held with their counts
LEAST_DRAWS = 25  # of a set of cells in a decode batch


class Pool:
    """Draws of the scale, cells first: only those drawn are decoded, once for all comparisons.

    From every set of cells as many are drawn in every decode batch, and every cell of a set as often as any other, or
    once more. A drawn cell has one sample, or several with importance weights. ``proteins`` are drawn in the same pass,
    if the model has any.
    """

    def __init__(
        self,
        fitted: Fitted,
        sets: np.ndarray,
        n_cells: np.ndarray,
        batches: Sequence[int | None],
        *,
        n_samples: int,
        per_cell: int,
        seed: int,
        batch_size: int | None,
    ):
        n_sets = len(n_cells)
        n_draws = n_samples // (n_sets * len(batches))
        if n_draws < LEAST_DRAWS:
            where = f" in {len(batches)} batches" if len(batches) > 1 else ""
            msg = (
                f"n_samples={n_samples} leaves {n_draws} draws for each of {n_sets} sets of cells{where}: take "
                f"{LEAST_DRAWS * n_sets * len(batches)} or more."
            )
            raise ValueError(msg)
        self.fitted, self.batches, self.batch_size, self.per_cell = fitted, batches, batch_size, per_cell
        rng = np.random.default_rng(seed)
        members = [np.flatnonzero(sets == s) for s in range(n_sets)]
        # Each set of the cells, shuffled, is gone through again and again until there are enough.
        self.rows = [np.concatenate([np.resize(rng.permutation(m), n_draws) for m in members]) for _ in batches]
        self.seed = int(rng.integers(2**63))
        self.sets, self.n_sets = sets, n_sets
        # Samples of one cell are no draws of cells, so the standard errors count the latter only.
        self.n_effective = np.full((len(batches), n_sets), float(n_draws))
        highest = _HIGHEST[fitted.module.heads["scale_activation"]]
        self.n_bins = (highest - LOWEST) * changes.PER_DOUBLING + 1
        self.genes_at_once = max(1, _HISTOGRAM_BYTES // (4 * self.n_bins * len(batches) * n_sets))
        self.totals = np.empty_like(self.n_effective)  # of the weights of the draws
        self.n_decoded = 0
        has_proteins = Capability.PROTEIN in models.get(fitted.fit.model).capabilities
        self.proteins = ProteinPool(fitted, sets, n_sets, batches, per_cell) if has_proteins else None

    def rounds(self) -> Iterator[tuple[slice, slice]]:
        """The genes and the proteins to decode in each round, as few rounds as memory allows."""
        n_genes, n_proteins = self.fitted.store.n_genes, 0
        n_rounds = -(-n_genes // self.genes_at_once)
        if self.proteins is not None:
            n_proteins = self.proteins.n_proteins
            n_rounds = max(n_rounds, -(-n_proteins // max(1, _HISTOGRAM_BYTES // self.proteins.bytes_each)))
        for i in range(n_rounds):
            yield tuple(slice(i * n // n_rounds, (i + 1) * n // n_rounds) for n in (n_genes, n_proteins))

    def decode(self, genes: slice, proteins: slice) -> tuple[np.ndarray, np.ndarray]:
        """Histograms (D, S, genes, K) of the log2 scale, and the mean scale of all genes, (S, G).

        What is known of the proteins then is in ``self.proteins``.
        """
        n_genes = self.fitted.store.n_genes
        if self.proteins is not None:
            self.proteins.start(proteins)
        shape = (len(self.batches), self.n_sets, len(range(n_genes)[genes]), self.n_bins)
        histograms, mean_scale = np.zeros(shape, np.float32), np.zeros((self.n_sets, n_genes))
        for d, batch in enumerate(self.batches):
            total, sums = np.zeros(self.n_sets), np.zeros_like(mean_scale)
            for cells, scale, weights, *of_proteins in self._draws(d, batch):
                of_draw = self.sets[cells]
                in_parallel(changes.locate, scale, sums, of_draw, weights, LOWEST, self.n_bins)
                in_parallel(changes.add, histograms[d], scale[:, genes], of_draw, weights)
                total += np.bincount(of_draw, weights, self.n_sets)
                if of_proteins:
                    self.proteins.add(d, cells, weights, *of_proteins)
            self.totals[d] = total
            mean_scale += sums / total[:, None] / len(self.batches)
        return histograms, mean_scale

    def _draws(self, d: int, batch: int | None) -> Iterator[tuple[np.ndarray, ...]]:
        """Cells, scales and weights of all draws in a decode batch, the same ones every time, and proteins if any."""
        module, n_genes = self.fitted.module, self.fitted.store.n_genes
        for first in range(0, len(self.rows[d]), _CELLS_AT_ONCE):
            rows = self.rows[d][first : first + _CELLS_AT_ONCE]
            drawn = replace(self.fitted, store=self.fitted.store.take(rows)).map(
                lambda cells, draws: self._draw(cells, draws, batch),
                batch_size=self.batch_size,
                seed=int(np.random.default_rng([self.seed, d, first]).integers(2**63)),
                floats_per_cell=self.per_cell * max(n_genes, module.n_noise),
            )
            for stretch, (scale, weights, *of_proteins) in drawn:
                self.n_decoded += len(weights)
                yield np.repeat(rows[stretch], self.per_cell), scale, weights, *of_proteins

    def _draw(self, cells: Minibatch, draws: Draws, batch: int | None) -> tuple[torch.Tensor, ...]:
        """Scales, (B * S, G), weights, (B * S,), and what is asked of proteins; the S draws of a cell come together."""
        module = self.fitted.module
        noise = draws.normal(len(cells.x), self.per_cell, module.n_noise)
        posteriors = module.posteriors(cells)
        decoded_in = in_batch(cells, batch)
        values, log_weights = [], []
        for s in range(self.per_cell):
            z = module.transform_z(module.draw(cells, posteriors, noise[:, s])[0])
            of_proteins = () if self.proteins is None else self.proteins.draw(z, decoded_in, noise[:, s])
            values.append((module.scale(z, decoded_in), *of_proteins))
            if self.per_cell > 1:
                log_weights.append(module.log_weight(cells, posteriors, noise[:, s]))
        if self.per_cell == 1:
            (scale, *of_proteins), weights = values[0], torch.ones_like(noise[:, 0, 0])
        else:
            scale, *of_proteins = (torch.stack(of_one, 1).flatten(0, 1) for of_one in zip(*values, strict=True))
            weights = (torch.softmax(torch.stack(log_weights, 1), 1) * self.per_cell).flatten()
        return scale, weights, *of_proteins
