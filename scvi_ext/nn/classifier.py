"""From a cell, or what is known of it, to the probabilities of its labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from scvi_ext.nn.layers import FCLayers

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_ext.kernels.sparse import SparseRows


class Classifier(nn.Module):
    """A network whose output are the probabilities of labels.

    Parameters
    ----------
    n_input
        Size of the input.
    n_hidden, n_labels, n_layers, dropout_rate
        Of the network; without layers it is linear.
    logits
        Whether :meth:`forward` returns logits rather than probabilities.
    **layer_options
        Passed to :class:`~scvi_ext.nn.layers.FCLayers`.
    """

    def __init__(
        self,
        n_input: int,
        n_hidden: int = 128,
        n_labels: int = 5,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        logits: bool = False,
        **layer_options: bool,
    ):
        super().__init__()
        self.logits = logits
        self.hidden = None
        if n_layers > 0:
            self.hidden = FCLayers(
                n_input, n_hidden, None, n_layers, n_hidden, dropout_rate, **layer_options
            ).for_sparse_rows()
        self.output = nn.Linear(n_hidden if n_layers > 0 else n_input, n_labels)

    def scores(self, x: Tensor | SparseRows) -> Tensor:
        """Logits, shape (B, C)."""
        if self.hidden is not None:
            x = self.hidden(x)
        return self.output(x).to(self.output.weight.dtype)  # casts end here, as in an encoder

    def log_probabilities(self, x: Tensor | SparseRows) -> Tensor:
        """log q(y | x), shape (B, C)."""
        return torch.log_softmax(self.scores(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities, or logits where the module was built for them, shape (B, C)."""
        scores = self.scores(x)
        return scores if self.logits else torch.softmax(scores, dim=-1)
