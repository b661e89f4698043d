"""Networks of several data sets: each has parts of its own, and one part that all share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

from scvi_ext._contract import Posterior
from scvi_ext._errors import one_of
from scvi_ext.functional.sampling import reparameterize_gaussian
from scvi_ext.nn.decoders import DISPERSIONS
from scvi_ext.nn.layers import FCLayers, Head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scvi_ext.kernels.sparse import SparseRows

_MAX_LOG_VAR = 20.0  # of a posterior, in either direction: far beyond any useful one


class MultiEncoder(nn.Module):
    """Encoders of several data sets: layers of each, then shared ones.

    Parameters
    ----------
    n_heads
        Number of data sets.
    n_input_list
        Number of genes of each.
    n_output
        Units of the latent space.
    n_hidden, n_layers_individual, n_layers_shared, dropout_rate
        Of the layers.
    n_cat_list
        Number of categories of each categorical covariate.
    """

    def __init__(
        self,
        n_heads: int,
        n_input_list: Sequence[int],
        n_output: int,
        n_hidden: int = 128,
        n_layers_individual: int = 1,
        n_layers_shared: int = 2,
        n_cat_list: Sequence[int] | None = None,
        dropout_rate: float = 0.1,
    ):
        super().__init__()
        if len(n_input_list) != n_heads:
            msg = f"n_input_list has {len(n_input_list)} entries; one for each of {n_heads} heads is needed."
            raise ValueError(msg)
        self.encoders = nn.ModuleList(
            FCLayers(n_input, n_hidden, n_cat_list, n_layers_individual, n_hidden, dropout_rate).for_sparse_rows()
            for n_input in n_input_list
        )
        # Batch normalisation sees the data sets apart, in training and when it is used.
        self.encoder_shared = FCLayers(
            n_hidden, n_hidden, n_cat_list, n_layers_shared, n_hidden, dropout_rate, n_instances=n_heads
        )
        self.mean_encoder = nn.Linear(n_hidden, n_output)
        self.var_encoder = nn.Linear(n_hidden, n_output)

    def posterior(self, x: Tensor | SparseRows, head_id: int, *cat_list: Tensor) -> Posterior:
        """q(z | x) of cells of the data set ``head_id``, shape (B, n_output)."""
        h = self.encoders[head_id](x, *cat_list)
        h = self.encoder_shared(h, *cat_list, instance_id=head_id)  # (B, n_hidden)
        dtype = self.mean_encoder.weight.dtype
        loc, log_var = self.mean_encoder(h).to(dtype), self.var_encoder(h).to(dtype)
        return Posterior(loc, torch.exp(0.5 * log_var.clamp(-_MAX_LOG_VAR, _MAX_LOG_VAR)))

    def forward(self, x: Tensor, head_id: int, *cat_list: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and one sample, each of shape (B, n_output)."""
        q = self.posterior(x, head_id, *cat_list)
        var = q.scale**2
        return q.loc, var, reparameterize_gaussian(q.loc, var)


class MultiDecoder(nn.Module):
    """The decoder of several data sets: layers conditioned on data set and batch, shared ones, and linear maps.

    Without layers the logits of the profile are linear in z.

    Parameters
    ----------
    n_input, n_output
        Sizes of the latent space and of the genes of all data sets.
    n_hidden_conditioned, n_hidden_shared, n_layers_conditioned, n_layers_shared, dropout_rate
        Of the layers.
    n_cat_list
        Number of categories of each categorical covariate, which the conditioned layers see.
    n_heads
        Number of data sets: all layers have a batch normalisation for each.
    gene_cell, zero_inflation
        Whether there are maps for an inverse dispersion per gene and cell, and for dropout.
    """

    def __init__(
        self,
        n_input: int,
        n_output: int,
        n_hidden_conditioned: int = 32,
        n_hidden_shared: int = 128,
        n_layers_conditioned: int = 1,
        n_layers_shared: int = 1,
        n_cat_list: Sequence[int] | None = None,
        dropout_rate: float = 0.2,
        *,
        n_heads: int = 1,
        gene_cell: bool = True,
        zero_inflation: bool = True,
    ):
        super().__init__()
        self.px_decoder_conditioned = self.px_decoder_final = None
        n_in = n_input
        if n_layers_conditioned:
            n_out = n_hidden_conditioned if n_layers_shared else n_hidden_shared
            self.px_decoder_conditioned = FCLayers(
                n_in, n_out, n_cat_list, n_layers_conditioned, n_hidden_conditioned, dropout_rate, n_instances=n_heads
            )
            n_in = n_out
        if n_layers_shared:
            self.px_decoder_final = FCLayers(
                n_in, n_hidden_shared, None, n_layers_shared, n_hidden_shared, dropout_rate, n_instances=n_heads
            )
            n_in = n_hidden_shared
        self.px_scale_decoder = Head(n_in, n_output)
        self.px_r_decoder = Head(n_in, n_output) if gene_cell else None
        self.px_dropout_decoder = Head(n_in, n_output) if zero_inflation else None
        self.softmax = True
        self.scale_activation = partial(torch.softmax, dim=-1)

    def hidden(self, z: Tensor, dataset_id: int, *cat_list: Tensor) -> Tensor:
        """What the linear maps see, (B, n) or (S, B, n)."""
        if self.px_decoder_conditioned is not None:
            z = self.px_decoder_conditioned(z, *cat_list, instance_id=dataset_id)
        if self.px_decoder_final is not None:
            z = self.px_decoder_final(z, instance_id=dataset_id)
        return z

    def heads(self, h: Tensor, genes: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Logits of the scale, of log theta and of dropout of the ``genes`` at these positions; None takes all.

        Each is (B, G), or None where there is no such map.
        """
        maps = (self.px_scale_decoder, self.px_r_decoder, self.px_dropout_decoder)
        return tuple(None if m is None else _of_genes(m, h, genes) for m in maps)

    def forward(
        self, z: Tensor, dataset_id: int, library: Tensor, dispersion: str, *cat_list: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The seed's call: scale, r (None unless ``dispersion="gene-cell"``), rate, dropout. ``library`` is a log."""
        one_of("dispersion", dispersion, DISPERSIONS)
        logits, r, dropout = self.heads(self.hidden(z, dataset_id, *cat_list))
        if dispersion == "gene-cell" and r is None:
            msg = "dispersion='gene-cell' needs a decoder built with gene_cell=True."
            raise ValueError(msg)
        scale = torch.softmax(logits, dim=-1)
        return scale, r if dispersion == "gene-cell" else None, torch.exp(library) * scale, dropout


def _of_genes(layer: nn.Linear, h: Tensor, genes: Tensor | None) -> Tensor:
    if genes is None:
        return layer(h)
    return linear(h, layer.weight.index_select(0, genes), layer.bias.index_select(0, genes))
