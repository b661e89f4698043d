"""From the latent space to the parameters of the counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import normalize, softplus

from scvi_ext._contract import Posterior
from scvi_ext._errors import one_of
from scvi_ext.functional.sampling import sample_normal
from scvi_ext.nn.layers import FCLayers, Head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SCALES = {"softmax": lambda logits: torch.softmax(logits, dim=-1), "softplus": softplus}
# Of the covariates' initial weights. What a decoder does not yet know of the batch, z learns, and gives up again only
# slowly: a strong start of the batch leaves z less to learn of it. See the page of benchmarks.
_COVARIATE_GAIN = 5.0
_SCALE_EPS = 1e-8  # of the background and its ratio, as in scvi-tools
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")


class Decoder(nn.Module):
    """A network whose output is the mean and the variance of a diagonal normal distribution."""

    def __init__(
        self,
        n_input: int,
        n_output: int,
        n_cat_list: Sequence[int] | None = None,
        n_layers: int = 1,
        n_hidden: int = 128,
        **layer_options: bool,
    ):
        super().__init__()
        self.decoder = FCLayers(n_input, n_hidden, n_cat_list, n_layers, n_hidden, dropout_rate=0, **layer_options)
        self.mean_decoder = nn.Linear(n_hidden, n_output)
        self.var_decoder = nn.Linear(n_hidden, n_output)

    def forward(self, x: Tensor, *cat_list: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, each of shape (B, n_output)."""
        h = self.decoder(x, *cat_list)
        return self.mean_decoder(h), torch.exp(self.var_decoder(h))


class DecoderSCVI(nn.Module):
    """The decoder of scVI: a network, then one linear map for each parameter of the counts.

    Parameters
    ----------
    n_input, n_output
        Sizes of the latent space (and dense covariates) and of the genes.
    n_cat_list, n_layers, n_hidden
        Of the network.
    scale_activation
        ``"softmax"`` (profile sums to 1) or ``"softplus"`` (with size factors).
    gene_cell, zero_inflation
        Whether there are heads for an inverse dispersion per gene and cell, and for dropout.
    **layer_options
        Passed to :class:`~scvi_ext.nn.layers.FCLayers`.
    """

    def __init__(
        self,
        n_input: int,
        n_output: int,
        n_cat_list: Sequence[int] | None = None,
        n_layers: int = 1,
        n_hidden: int = 128,
        *,
        scale_activation: str = "softmax",
        gene_cell: bool = True,
        zero_inflation: bool = True,
        **layer_options: bool,
    ):
        super().__init__()
        one_of("scale_activation", scale_activation, _SCALES)
        self.px_decoder = FCLayers(
            n_input,
            n_hidden,
            n_cat_list,
            n_layers,
            n_hidden,
            dropout_rate=0,
            covariate_gain=_COVARIATE_GAIN,
            **layer_options,
        )
        self.px_scale_decoder = Head(n_hidden, n_output)
        self.px_r_decoder = Head(n_hidden, n_output) if gene_cell else None
        self.px_dropout_decoder = Head(n_hidden, n_output) if zero_inflation else None
        self.softmax = scale_activation == "softmax"
        self.scale_activation = _SCALES[scale_activation]

    def heads(self, z: Tensor, *cat_list: Tensor) -> tuple[Tensor | None, ...]:
        """Logits of the scale, of log theta and of dropout, each (B, G) or None where there is no such head."""
        h = self.px_decoder(z, *cat_list)  # (B, n_hidden)
        r = None if self.px_r_decoder is None else self.px_r_decoder(h)
        dropout = None if self.px_dropout_decoder is None else self.px_dropout_decoder(h)
        return self.px_scale_decoder(h), r, dropout

    def scale(self, z: Tensor, *cat_list: Tensor) -> Tensor:
        """The normalised profile alone, (B, G)."""
        return self.scale_activation(self.px_scale_decoder(self.px_decoder(z, *cat_list)))

    def forward(self, dispersion: str, z: Tensor, library: Tensor, *cat_list: Tensor) -> tuple[Tensor | None, ...]:
        """The seed's call: scale, r (None unless ``dispersion="gene-cell"``), rate, dropout. ``library`` is a log."""
        return _seed_forward(self, dispersion, z, library, *cat_list)


class LinearDecoderSCVI(nn.Module):
    """The decoder of LDVAE: every parameter of the counts is linear in z and the covariates (Svensson et al. 2020).

    Parameters
    ----------
    n_input, n_output, n_cat_list, scale_activation, gene_cell, zero_inflation
        As in :class:`DecoderSCVI`.
    n_layers, n_hidden
        Accepted for the seed's signature; a linear decoder has one layer and no hidden units, so other values raise.
    use_batch_norm, bias
        Of the linear maps. Batch normalisation rescales the loadings, see ``LDVAE.get_loadings``.
    """

    def __init__(
        self,
        n_input: int,
        n_output: int,
        n_cat_list: Sequence[int] | None = None,
        n_layers: int = 1,
        n_hidden: int = 128,
        *,
        scale_activation: str = "softmax",
        gene_cell: bool = True,
        zero_inflation: bool = True,
        use_batch_norm: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        if (n_layers, n_hidden) != (1, 128):
            msg = f"n_layers={n_layers}, n_hidden={n_hidden}: a linear decoder has neither layers nor hidden units."
            raise ValueError(msg)
        one_of("scale_activation", scale_activation, _SCALES)

        def linear() -> FCLayers:
            return FCLayers(
                n_input, n_output, n_cat_list, dropout_rate=0, use_batch_norm=use_batch_norm, use_relu=False, bias=bias
            )

        self.factor_regressor = linear()
        self.px_r_decoder = linear() if gene_cell else None
        self.px_dropout_decoder = linear() if zero_inflation else None
        self.softmax = scale_activation == "softmax"
        self.scale_activation = _SCALES[scale_activation]

    def heads(self, z: Tensor, *cat_list: Tensor) -> tuple[Tensor | None, ...]:
        """Logits of the scale, of log theta and of dropout, each (B, G) or None where there is no such head."""
        r = None if self.px_r_decoder is None else self.px_r_decoder(z, *cat_list)
        dropout = None if self.px_dropout_decoder is None else self.px_dropout_decoder(z, *cat_list)
        return self.factor_regressor(z, *cat_list), r, dropout

    def scale(self, z: Tensor, *cat_list: Tensor) -> Tensor:
        """The normalised profile alone, (B, G)."""
        return self.scale_activation(self.factor_regressor(z, *cat_list))

    def forward(self, dispersion: str, z: Tensor, library: Tensor, *cat_list: Tensor) -> tuple[Tensor | None, ...]:
        """The seed's call: scale, r (None unless ``dispersion="gene-cell"``), rate, dropout. ``library`` is a log."""
        return _seed_forward(self, dispersion, z, library, *cat_list)


class DecoderTOTALVI(nn.Module):
    """The decoder of totalVI: a network for each part of the likelihood, then maps that see z once more.

    Parameters
    ----------
    n_input, n_output_genes, n_output_proteins
        Sizes of the latent space (and dense covariates), of the genes and of the proteins.
    n_cat_list, n_layers, n_hidden, dropout_rate
        Of each network.
    scale_activation
        ``"softmax"`` (profile of the genes sums to 1) or ``"softplus"`` (with size factors).
    zero_inflation
        Whether genes have a head for dropout.
    **layer_options
        Passed to :class:`~scvi_ext.nn.layers.FCLayers`.

    References
    ----------
    Gayoso et al. (2021), Nature Methods 18, 272, supplementary figure 1 and methods.
    """

    def __init__(
        self,
        n_input: int,
        n_output_genes: int,
        n_output_proteins: int,
        n_cat_list: Sequence[int] | None = None,
        n_layers: int = 1,
        n_hidden: int = 256,
        dropout_rate: float = 0,
        *,
        scale_activation: str = "softmax",
        zero_inflation: bool = True,
        **layer_options: bool,
    ):
        super().__init__()
        one_of("scale_activation", scale_activation, _SCALES)

        def network() -> FCLayers:
            return FCLayers(
                n_input,
                n_hidden,
                n_cat_list,
                n_layers,
                n_hidden,
                dropout_rate,
                covariate_gain=_COVARIATE_GAIN,
                **layer_options,
            )

        def head(n_output: int) -> FCLayers:
            size = n_hidden + n_input
            return FCLayers(size, n_output, n_cat_list, dropout_rate=0, use_batch_norm=False, use_relu=False)

        self.px_decoder = network()
        self.px_scale_decoder = head(n_output_genes)
        self.py_back_decoder = network()
        self.py_back_mean_log_alpha = head(n_output_proteins)
        self.py_back_mean_log_beta = head(n_output_proteins)
        self.py_fore_decoder = network()
        self.py_fore_scale_decoder = head(n_output_proteins)
        self.sigmoid_decoder = network()
        self.px_dropout_decoder = head(n_output_genes) if zero_inflation else None
        self.py_background_decoder = head(n_output_proteins)
        self.softmax = scale_activation == "softmax"
        self.scale_activation = _SCALES[scale_activation]

    def heads(self, z: Tensor, *cat_list: Tensor) -> tuple[Tensor | None, ...]:
        """Logits of the genes' scale, None for their theta, and of dropout, (B, G) or None where there is no head."""
        scale = self._read(self.px_decoder, z, cat_list, self.px_scale_decoder)[0]
        if self.px_dropout_decoder is None:
            return scale, None, None
        return scale, None, self._read(self.sigmoid_decoder, z, cat_list, self.px_dropout_decoder)[0]

    def scale(self, z: Tensor, *cat_list: Tensor) -> Tensor:
        """The normalised profile of the genes alone, (B, G)."""
        return self.scale_activation(self._read(self.px_decoder, z, cat_list, self.px_scale_decoder)[0])

    @torch.no_grad()
    def start_background(self, log_means: Tensor) -> None:
        """Begin with this log background of each protein, (P,).

        From 0, large weights would have to grow in all directions to get there, also in those where there are no cells.
        """
        self.py_back_mean_log_alpha.layers[0].linear.bias.copy_(log_means)

    def proteins(self, z: Tensor, *cat_list: Tensor) -> tuple[Posterior, Tensor, Tensor]:
        """log of the background, log ratio of the foreground to it, logit of being background: (B, P) each."""
        dtype = z.dtype
        loc, spread = self._read(
            self.py_back_decoder, z, cat_list, self.py_back_mean_log_alpha, self.py_back_mean_log_beta
        )
        (increment,) = self._read(self.py_fore_decoder, z, cat_list, self.py_fore_scale_decoder)
        (mixing,) = self._read(self.sigmoid_decoder, z, cat_list, self.py_background_decoder)
        background = Posterior(loc.to(dtype), softplus(spread.to(dtype)) + _SCALE_EPS)
        return background, torch.log1p(torch.relu(increment.to(dtype)) + _SCALE_EPS), mixing.to(dtype)

    @staticmethod
    def _read(network: FCLayers, z: Tensor, cat_list: Sequence[Tensor], *heads: FCLayers) -> list[Tensor]:
        h = torch.cat([network(z, *cat_list), z], dim=-1)
        return [head(h, *cat_list) for head in heads]

    def forward(self, z: Tensor, library_gene: Tensor, *cat_list: Tensor) -> tuple[dict, dict, Tensor]:
        """The seed's call: what it says of genes, what of proteins, and a sample of the log background.

        ``library_gene`` is the library size itself, (B, 1). The dictionaries have the seed's names: ``scale``, ``rate``
        and ``dropout``; ``back_alpha``, ``back_beta``, ``rate_back``, ``fore_scale``, ``rate_fore``, ``mixing`` and
        ``scale``, the foreground as a share of all proteins.
        """
        logits, _, dropout = self.heads(z, *cat_list)
        scale = self.scale_activation(logits)
        background, log_ratio, mixing = self.proteins(z, *cat_list)
        log_background = sample_normal(background)
        rate_fore = torch.exp(log_background + log_ratio)
        px = {"scale": scale, "rate": library_gene * scale, "dropout": dropout}
        py = {
            "back_alpha": background.loc,
            "back_beta": background.scale,
            "rate_back": torch.exp(log_background),
            "fore_scale": torch.exp(log_ratio),
            "rate_fore": rate_fore,
            "mixing": mixing,
            "scale": normalize(torch.sigmoid(-mixing) * rate_fore, p=1, dim=-1),
        }
        return px, py, log_background


def _seed_forward(
    decoder: DecoderSCVI | LinearDecoderSCVI, dispersion: str, z: Tensor, library: Tensor, *cat_list: Tensor
) -> tuple[Tensor | None, ...]:
    one_of("dispersion", dispersion, DISPERSIONS)
    logits, r, dropout = decoder.heads(z, *cat_list)
    scale = decoder.scale_activation(logits)
    if dispersion != "gene-cell":
        r = None
    elif r is None:
        msg = "dispersion='gene-cell' needs a decoder built with gene_cell=True."
        raise ValueError(msg)
    return scale, r, torch.exp(library) * scale, dropout
