"""Labels that some cells have and others do not: codes of shape (B,), -1 where there is none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


def check_labels(model: str, n_labels: int, classification_ratio: float = 1.0) -> None:
    """Raise a ValueError unless there are labels to learn, and the weight of their cross-entropy is one."""
    if n_labels < 1:
        msg = f"Model {model!r} needs labels: register them with pp.setup_anndata(adata, labels_key=...)."
        raise ValueError(msg)
    if not 0 <= classification_ratio < math.inf:
        msg = f"classification_ratio={classification_ratio!r} is a weight: it must be 0 or more, and finite."
        raise ValueError(msg)


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

    What is given may be any positive numbers in proportion, such as numbers of cells.

    Raises
    ------
    ValueError
        They are not C positive numbers.
    """
    # Checked on the host, whatever device torch makes tensors on.
    prior = np.ones(n_labels) if y_prior is None else np.asarray(y_prior, dtype=np.float64).ravel()
    if len(prior) != n_labels or not ((prior > 0) & np.isfinite(prior)).all():
        listed = ", ".join(f"{value:g}" for value in prior)
        msg = f"y_prior has {len(prior)} values, {listed}; a positive number for each of {n_labels} labels is needed."
        raise ValueError(msg)
    return torch.as_tensor(np.log(prior / prior.sum()), dtype=torch.float32)
