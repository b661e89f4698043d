"""What a network sees besides counts and z: batch, categorical and continuous covariates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scvi_ext._contract import Minibatch

_EMBEDDING_DIM = 5  # of a batch, as in scvi-tools


class Covariates(nn.Module):
    """Splits the covariates of a minibatch into dense columns (first layer) and one-hot codes (every layer).

    Parameters
    ----------
    n_batch
        Number of batches.
    n_cats_per_cov
        Number of categories of each categorical covariate.
    n_continuous_cov
        Number of continuous covariates.
    batch_representation
        ``"one-hot"``, or ``"embedding"``: five learned numbers per batch, for data with very many batches.
    """

    def __init__(self, n_batch: int, n_cats_per_cov: Sequence[int], n_continuous_cov: int, batch_representation: str):
        super().__init__()
        embedded = batch_representation == "embedding"
        self.batch_embedding = nn.Embedding(n_batch, _EMBEDDING_DIM) if embedded else None
        self.n_dense = n_continuous_cov + (_EMBEDDING_DIM if embedded else 0)
        self.n_cat_list = [*([] if embedded else [n_batch]), *n_cats_per_cov]
        self.n_batch = n_batch
        self.n_categorical = len(n_cats_per_cov)
        self.n_continuous = n_continuous_cov

    def dense(self, cells: Minibatch) -> Tensor | None:
        """The dense covariates side by side, (B, n_dense), or None if there are none."""
        columns = [] if cells.continuous is None else [cells.continuous]
        if self.batch_embedding is not None:
            columns.append(self.batch_embedding(cells.batch_index))
        return torch.cat(columns, dim=-1) if columns else None

    def append(self, z: Tensor, cells: Minibatch) -> Tensor:
        """``z`` (B, L) or (S, B, L) with the dense covariates as further columns."""
        dense = self.dense(cells)
        return z if dense is None else torch.cat([z, dense.expand(*z.shape[:-1], -1)], dim=-1)

    def codes(self, cells: Minibatch) -> list[Tensor]:
        """Integer codes (B,), one tensor for each entry of ``n_cat_list``."""
        batch = [] if self.batch_embedding is not None else [cells.batch_index]
        return batch + [cells.categorical[:, i] for i in range(self.n_categorical)]
