"""The inverse dispersion theta, shared by all cells or by the cells of a batch or label."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_ext._contract import Minibatch


class Dispersion(nn.Module):
    """theta = exp(log_theta), one value per gene, per gene and batch, or per gene and label.

    Parameters
    ----------
    kind
        ``"gene"``, ``"gene-batch"`` or ``"gene-label"``. (``"gene-cell"`` is a head of the decoder.)
    n_genes, n_batch, n_labels
        Sizes.
    """

    def __init__(self, kind: str, n_genes: int, n_batch: int, n_labels: int):
        super().__init__()
        rows = {"gene": (), "gene-batch": (max(n_batch, 1),), "gene-label": (n_labels,)}[kind]
        self.column = {"gene": None, "gene-batch": "batch_index", "gene-label": "labels"}[kind]
        # All at 1. The reference starts at random, and a gene that starts far off does not arrive in a short fit.
        self.log_theta = nn.Parameter(torch.zeros(*rows, n_genes))

    def forward(self, cells: Minibatch) -> Tensor:
        """log(theta), shape (G,) or (B, G)."""
        if self.column is None:
            return self.log_theta
        codes = getattr(cells, self.column)
        if codes is None:
            msg = "dispersion='gene-label' needs the label of each cell, and no labels were given."
            raise ValueError(msg)
        return self.log_theta[codes]
