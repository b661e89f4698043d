"""What a critic of batches and what it watches want of each other on the processor (numba), as gradients.

The formulas are those of :func:`scvi_ext.functional.adversary.mixing_loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext.kernels.compiler import arrays, kernel, widest_vectors

if TYPE_CHECKING:
    from torch import Tensor

f4 = np.float32


def pulls(logits: Tensor, classes: Tensor, weight: float) -> Tensor:
    """Gradients by the logits (B, C), (2 B, C): of the critic's own loss, and behind them of ``weight`` times mixing.

    ``classes`` are codes, (B,) int64.
    """
    d_logits = torch.empty(2 * len(logits), logits.shape[1])
    _pulls(*arrays(logits, classes), f4(weight), *arrays(d_logits))
    return d_logits


def through_relu(hidden: Tensor, d_hidden: Tensor) -> None:
    """Take from gradients by hidden units (B, n), (2 B, n), what a ReLU does not let through."""
    _through_relu(*arrays(hidden, d_hidden))


# ---- kernels ------------------------------------------------------------------------------------------------------


@kernel
def _pulls(logits, classes, weight, d_logits):
    n, n_classes = logits.shape
    shares, dependence = np.zeros(n_classes), 0.0
    for i in range(n):
        shares[classes[i]] += 1.0 / n
    for i in range(n):
        dependence += logits[i, classes[i]]
        for c in range(n_classes):
            dependence -= shares[c] * logits[i, c]
    pull = weight / n if dependence >= 0 else 0.0  # a critic that lags behind may find less than nothing
    for i in range(n):
        top, total = logits[i].max(), 0.0
        for c in range(n_classes):
            total += np.exp(logits[i, c] - top)
        for c in range(n_classes):
            own = 1.0 if c == classes[i] else 0.0
            d_logits[i, c] = (np.exp(logits[i, c] - top) / total - own) / n
            d_logits[n + i, c] = pull * (own - shares[c])


@kernel
def _through_relu(hidden, d_hidden):
    widest_vectors()
    n = len(hidden)
    for i in range(len(d_hidden)):
        unit, to = hidden[i % n], d_hidden[i]
        for j in range(to.size):
            to[j] = to[j] if unit[j] > f4(0) else f4(0)
