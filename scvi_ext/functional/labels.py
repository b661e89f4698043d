"""Labels that some cells have and others do not: codes of shape (B,), -1 where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


def label_weights(labels: Tensor, log_qy: Tensor) -> Tensor:
    """The label of a cell as an indicator, or q(y | x) where there is none, shape (B, C).

    A sum over labels with these weights is the term of the label that was seen, or the expectation over q.
    """
    seen = torch.nn.functional.one_hot(labels.clamp(min=0), log_qy.shape[-1]).to(log_qy.dtype)
    return torch.where((labels >= 0).unsqueeze(-1), seen, torch.exp(log_qy))


def fill_in(labels: Tensor | None, log_qy: Tensor) -> Tensor:
    """The labels, and the most probable one where there is none, shape (B,)."""
    likely = log_qy.argmax(-1)
    return likely if labels is None else torch.where(labels >= 0, labels, likely)


def cross_entropy(log_qy: Tensor, labels: Tensor) -> Tensor:
    """-log q(y | x) of the labels that were seen, shape (B,)."""
    return -log_qy.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def log_prior(y_prior: object, n_labels: int) -> Tensor:
    """Logarithm of the probabilities of the labels, shape (C,), each 1 / C by default.

    Raises
    ------
    ValueError
        They are not C positive numbers that sum to 1.
    """
    # Checked on the host, whatever device torch makes tensors on.
    prior = np.full(n_labels, 1 / n_labels) if y_prior is None else np.asarray(y_prior, dtype=np.float64).ravel()
    if len(prior) != n_labels or not (prior > 0).all() or abs(prior.sum() - 1) > 1e-4:
        msg = (
            f"y_prior={y_prior!r} must be {n_labels} positive probabilities that sum to 1, one for each label in the "
            "order of the codes."
        )
        raise ValueError(msg)
    return torch.as_tensor(np.log(prior), dtype=torch.float32)
