r"""LDVAE: scVI with a linear decoder, whose weights are gene loadings (Svensson et al. 2020).

.. math::
    z_n \sim N(0, I), \qquad \rho_n = \mathrm{softmax}\big(\mathrm{BN}(W z_n + V s_n)\big), \qquad
    x_{ng} \sim \mathrm{ZINB}(e^{l_n} \rho_{ng}, \theta_g, \pi_{ng}) \text{ or NB, Poisson, normal, Bernoulli}

The inference network is that of scVI. Loadings are :math:`\mathrm{diag}(\gamma / \sqrt{\sigma^2 + \epsilon})\, W` with
the scale and running variance of the batch normalisation BN, so that they act on z as the fitted decoder does.

Where we differ from scvi-tools: all four dispersions work (two of them crash there), covariates enter the decoder, and
the likelihood default is that of scVI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from scvi_ext._contract import Capability, Loss, ModelSpec
from scvi_ext._errors import one_of
from scvi_ext.functional.adversary import mixing_loss
from scvi_ext.functional.divergences import kl_standard_normal
from scvi_ext.models.base import CountConfig, CountVAE, batch_critic, needs
from scvi_ext.nn.decoders import LinearDecoderSCVI

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_ext._contract import Minibatch


@dataclass(frozen=True)
class Config(CountConfig):
    """Options of LDVAE; keyword arguments of ``tl.fit(adata, model="ldvae")``. Layers and units are the encoder's."""

    use_layer_norm: Literal["encoder", "none"] = "none"
    bias: bool = False
    adversarial_mixing: float = 0.0


class LDVAE(CountVAE):
    """The torch module of LDVAE.

    Parameters
    ----------
    n_input, n_batch, n_labels, n_hidden, n_latent, n_layers, dropout_rate
        As in :class:`~scvi_ext.models.base.CountVAE`, in the seed's order and with its defaults; hidden layers are the
        encoder's.
    dispersion, log_variational, reconstruction_loss
        The same.
    bias
        Whether the linear decoder has a bias besides that of its batch normalisation.
    adversarial_mixing
        As in :class:`~scvi_ext.models.VAE`.
    encode_covariates, deeply_inject_covariates
        Of the encoder; the second needs the first.
    use_batch_norm
        Where to normalise.
    use_layer_norm
        ``"encoder"`` or ``"none"``: in the decoder it would not be linear.
    **options
        Further options of :class:`~scvi_ext.models.base.CountVAE`.
    """

    def __init__(
        self,
        n_input: int,
        n_batch: int = 0,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        log_variational: bool = True,
        reconstruction_loss: str = "zinb",
        *,
        bias: bool = False,
        adversarial_mixing: float = 0.0,
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        **options: object,
    ):
        one_of("use_layer_norm", use_layer_norm, ("encoder", "none"))
        if not (deeply_inject_covariates or encode_covariates):
            msg = (
                "deeply_inject_covariates=False has no effect without encode_covariates=True: the linear decoder has "
                "no later layers."
            )
            raise ValueError(msg)
        super().__init__(
            n_input,
            n_batch,
            n_labels,
            n_hidden,
            n_latent,
            n_layers,
            dropout_rate,
            dispersion,
            log_variational,
            reconstruction_loss,
            encode_covariates=encode_covariates,
            deeply_inject_covariates=deeply_inject_covariates,
            use_batch_norm=use_batch_norm,
            use_layer_norm=use_layer_norm,
            **options,
        )
        self.decoder = LinearDecoderSCVI(
            n_latent + self.covariates.n_dense,
            n_input,
            self.covariates.n_cat_list,
            use_batch_norm=use_batch_norm in ("decoder", "both"),
            bias=bias,
            **self.heads,
        )
        self.adversarial_mixing = adversarial_mixing
        self.critic = batch_critic(adversarial_mixing, n_latent, n_batch)

    def loss(self, cells: Minibatch, kl_weight: Tensor | float = 1.0, noise: Tensor | None = None) -> Loss:
        """The negative ELBO (Svensson et al. 2020), its KL to the prior of z weighted by ``kl_weight``."""
        qz, ql = posteriors = self.posteriors(cells)
        z, log_library = self.draw(cells, posteriors, noise)
        reconstruction = -self.log_px(self.transform_z(z), cells, log_library)  # (B,)
        kl_z = kl_standard_normal(qz)  # (B,)
        kl_library = self.library.kl(ql, cells)  # (B,)
        total = (reconstruction + kl_library + kl_weight * kl_z).mean()
        if self.critic is not None and self.training:
            weight = kl_weight * self.adversarial_mixing
            total = total + mixing_loss(self.critic, self.transform_z(z), cells.batch_index, weight)
        return Loss(total, reconstruction, kl_z, kl_library)

    @torch.no_grad()
    def get_loadings(self) -> Tensor:
        """Weight of each latent unit on each gene, shape (G, L), corrected for the batch normalisation."""
        layer = self.decoder.factor_regressor.layers[0]
        weight = layer.linear.weight[:, : self.n_latent]
        for norm in layer.batch_norm:
            weight = weight * (norm.weight / torch.sqrt(norm.running_var + norm.eps)).unsqueeze(1)
        return weight.clone()


SPEC = ModelSpec(
    name="ldvae",
    module=LDVAE,
    config=Config,
    needs=needs,
    capabilities=frozenset({Capability.COUNTS, Capability.LOADINGS}),
    reference="Svensson et al. (2020), Interpretable factor models of single-cell RNA-seq via variational "
    "autoencoders, Bioinformatics.",
    # The baseline of a gene is one number here, where scVI has its 128 hidden units to move it: there is further to go.
    peak_lr=6e-2,
    effort=16.0,
)
