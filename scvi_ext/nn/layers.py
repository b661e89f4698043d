"""Fully connected layers that see covariates."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from scvi_ext.functional import ranks
from scvi_ext.functional.products import linear
from scvi_ext.functional.tensors import one_hot
from scvi_ext.kernels import hidden
from scvi_ext.kernels.sparse import SparseRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Momentum and epsilon of batch normalisation are those of the original TensorFlow implementation of scVI,
# kept by every release since.
_BATCH_NORM = {"momentum": 0.01, "eps": 0.001}


class BatchNorm1d(nn.BatchNorm1d):
    """That of torch, in training with the statistics of the cells of all processes that share a minibatch.

    torch.nn.SyncBatchNorm does the same, on CUDA alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n), or the rows of any number of samples of B cells, to the same shape."""
        n = ranks.current().n
        if n == 1 or not self.training:
            return super().forward(x)
        dtype = self.weight.dtype  # statistics have the parameters' precision, also where layers are cast
        mean = ranks.mean(x.mean(0, dtype=dtype))
        centred = x.to(dtype) - mean
        var = ranks.mean(centred.square().mean(0))
        with torch.no_grad():
            n_rows = n * len(x)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n_rows / (n_rows - 1)), self.momentum)
        return torch.addcmul(self.bias, centred, self.weight * torch.rsqrt(var + self.eps)).to(x.dtype)


class Dropout(nn.Dropout):
    """That of torch, of the cells of all processes that share a minibatch: each has the rows of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n) or (S, B, n) to the same shape."""
        return ranks.dropout(x, self.p) if self.training else x


class Head(nn.Linear):
    """That of torch, from hidden units to all genes: the largest product of a step, in the precision of the fit."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out)
        _lay_out_by_input(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_out)."""
        return linear(x, self.weight, self.bias)


class FCLayer(nn.Module):
    """Linear, batch norm, layer norm, ReLU, dropout: each but the first only where asked for."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        dropout_rate: float,
        use_batch_norm: bool,
        use_layer_norm: bool,
        use_relu: bool,
        bias: bool,
        n_instances: int,
    ):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=bias)
        self.has_kernel = use_batch_norm and use_relu and not use_layer_norm
        norms = n_instances if use_batch_norm else 0
        self.batch_norm = nn.ModuleList(BatchNorm1d(n_out, **_BATCH_NORM) for _ in range(norms))
        rest = []
        if use_layer_norm:
            rest.append(nn.LayerNorm(n_out, elementwise_affine=False))
        if use_relu:
            rest.append(nn.ReLU())
        if dropout_rate > 0:
            rest.append(Dropout(dropout_rate))
        self.rest = nn.Sequential(*rest)

    @property
    def dropout_rate(self) -> float:
        """Share of the units that is dropped now."""
        last = self.rest[-1] if len(self.rest) else None
        return last.p if isinstance(last, Dropout) and last.training else 0.0

    def forward(self, x: Tensor | SparseRows, covariates: Tensor | None = None, instance_id: int = 0) -> Tensor:
        """Map (..., n_in) to (..., n_out); ``covariates`` (..., n) belong to the last columns of the weights."""
        weight, bias = self.linear.weight, self.linear.bias
        if covariates is None:
            h = x.linear(weight, bias) if isinstance(x, SparseRows) else linear(x, weight, bias)
        elif not isinstance(x, SparseRows) and x.shape[:-1] == covariates.shape[:-1] and x.shape[-1] <= len(weight):
            h = linear(torch.cat([x, covariates], dim=-1), weight, bias)
        else:
            own, of_covariates = weight.split([weight.shape[1] - covariates.shape[-1], covariates.shape[-1]], dim=1)
            h = x.linear(own, bias) if isinstance(x, SparseRows) else linear(x, own, bias)
            h = h + linear(covariates, of_covariates)
        if not self.batch_norm:
            return self.rest(h)
        norm = self.batch_norm[instance_id]
        cells = h.flatten(0, -2)
        if self.has_kernel and self.training and hidden.takes(cells, norm) and ranks.current().n == 1:
            return hidden.activate(cells, norm, self.dropout_rate).view_as(h)
        return self.rest(norm(cells).view_as(h))


class FCLayers(nn.Module):
    """A stack of fully connected layers; one-hot covariates are appended to the input of every layer.

    Parameters
    ----------
    n_in, n_out
        Sizes of input and output.
    n_cat_list
        Number of categories of each categorical covariate; those with fewer than two are left out.
    n_layers, n_hidden
        Number of layers, and size of all but the last.
    dropout_rate
        Dropout after each layer.
    use_batch_norm, use_relu, bias
        As they say.
    use_layer_norm
        Layer normalisation (without parameters) after batch normalisation.
    inject_covariates
        False: covariates enter the first layer only.
    n_instances
        Number of separate batch normalisations, of which ``instance_id`` picks one.
    covariate_gain
        Factor of the initial weights of the covariates.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_cat_list: Sequence[int] | None = None,
        n_layers: int = 1,
        n_hidden: int = 128,
        dropout_rate: float = 0.1,
        use_batch_norm: bool = True,
        use_relu: bool = True,
        bias: bool = True,
        *,
        use_layer_norm: bool = False,
        inject_covariates: bool = True,
        n_instances: int = 1,
        covariate_gain: float = 1.0,
    ):
        super().__init__()
        if n_layers < 1:
            msg = f"n_layers={n_layers}: a network has at least one layer."
            raise ValueError(msg)
        self.n_cat_list = [n if n > 1 else 0 for n in n_cat_list or ()]
        self.inject_covariates = inject_covariates
        n_cov = sum(self.n_cat_list)
        sizes = [n_in] + (n_layers - 1) * [n_hidden] + [n_out]
        self.layers = nn.ModuleList(
            FCLayer(
                a + (n_cov if i == 0 or inject_covariates else 0),
                b,
                dropout_rate=dropout_rate,
                use_batch_norm=use_batch_norm,
                use_layer_norm=use_layer_norm,
                use_relu=use_relu,
                bias=bias,
                n_instances=n_instances,
            )
            for i, (a, b) in enumerate(pairwise(sizes))
        )
        with torch.no_grad():
            for layer in self.layers if inject_covariates else self.layers[:1]:
                layer.linear.weight[:, layer.linear.in_features - n_cov :] *= covariate_gain

    def forward(
        self, x: Tensor | SparseRows, *cat_list: Tensor, dense: Tensor | None = None, instance_id: int = 0
    ) -> Tensor:
        """Map (B, n_in) or (S, B, n_in) to n_out; ``cat_list`` are codes (B,), (B, 1) or one-hot (B, n), (S, 1, n).

        The product with ``x`` is made once for all S, where only the covariates differ between them. ``dense`` are the
        last of the n_in columns, (B, n), where ``x`` is sparse and has the first ones only.
        """
        covariates = self.one_hots(cat_list)
        beside = covariates
        if dense is not None:
            dense = dense.to(self.layers[0].linear.weight.dtype)
            beside = dense if covariates is None else _side_by_side([dense, covariates])
        for i, layer in enumerate(self.layers):
            x = layer(x, beside if i == 0 else covariates if self.inject_covariates else None, instance_id)
        return x

    def for_sparse_rows(self) -> FCLayers:
        """The same layers, the weights of the first laid out gene by gene, as products with sparse rows read them."""
        _lay_out_by_input(self.layers[0].linear)
        return self

    def one_hots(self, cat_list: Sequence[Tensor]) -> Tensor | None:
        """All covariates side by side, (B, n), (S, 1, n) or (S, B, n); None where there are none."""
        if len(cat_list) != len(self.n_cat_list):
            msg = f"{len(cat_list)} categorical covariates given, {len(self.n_cat_list)} expected."
            raise ValueError(msg)
        kept = [(c, n) for c, n in zip(cat_list, self.n_cat_list, strict=True) if n > 1]
        if not kept:
            return None
        dtype = self.layers[0].linear.weight.dtype
        columns = [(c if c.shape[-1] == n and c.dim() > 1 else one_hot(c, n)).to(dtype) for c, n in kept]
        return _side_by_side(columns)


def _lay_out_by_input(layer: nn.Linear) -> None:
    """Bring the weights of one input after the other into memory, as products and their gradients go through them."""
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())


def _side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Columns of B cells or of S samples of them, (B, n), (S, 1, n) or (S, B, n), as one tensor."""
    lead = max((c.shape[:-1] for c in columns), key=len)
    if any(c.shape[:-1] != lead for c in columns):
        lead = torch.broadcast_shapes(*(c.shape[:-1] for c in columns))
        columns = [c.expand(*lead, -1) for c in columns]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
