"""The inverse dispersion theta, shared by all cells or by the cells of a batch or label."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_ext._contract import Minibatch


class Dispersion(nn.Module):
    """theta = exp(log_theta), one value per gene (or protein), per gene and batch, or per gene and label.

    Parameters
    ----------
    kind
        ``"gene"``, ``"gene-batch"`` or ``"gene-label"``, or the same of ``"protein"``. (``"gene-cell"`` is a head of
        the decoder.)
    n_features, n_batch, n_labels
        Sizes.
    """

    def __init__(self, kind: str, n_features: int, n_batch: int, n_labels: int):
        super().__init__()
        self.kind, by = kind, kind.partition("-")[2]
        rows = {"": (), "batch": (max(n_batch, 1),), "label": (n_labels,)}[by]
        self.column = {"": None, "batch": "batch_index", "label": "labels"}[by]
        # All at 1. The reference starts at random, and a gene that starts far off does not arrive in a short fit.
        self.log_theta = nn.Parameter(torch.zeros(*rows, n_features))

    def forward(self, cells: Minibatch) -> Tensor:
        """log(theta), shape (n_features,) or (B, n_features)."""
        return self.log_theta if self.column is None else self.log_theta[self._codes(cells)]

    def take_gradient(self, of_cells: Tensor, cells: Minibatch) -> None:
        """Give the parameter its gradient from those by the log(theta) of each cell, (B, n_features).

        Where all cells have the same, any number of rows that add up to it.
        """
        if self.column is None:
            self.log_theta.grad = of_cells.sum(0)
        else:
            self.log_theta.grad = torch.zeros_like(self.log_theta).index_add_(0, self._codes(cells), of_cells)

    def _codes(self, cells: Minibatch) -> Tensor:
        codes = getattr(cells, self.column)
        if codes is None:
            msg = f"dispersion={self.kind!r} needs the label of each cell, and no labels were given."
            raise ValueError(msg)
        return codes
