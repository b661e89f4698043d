r"""scVI: a variational autoencoder of counts (Lopez et al. 2018).

Generative process of cell n, gene g, with batch and covariates s_n:

.. math::
    z_n &\sim N(0, I), \qquad \rho_n = f(z_n, s_n), \quad \textstyle\sum_g \rho_{ng} = 1 \\
    l_n &\sim N(m_{batch}, v_{batch}) \text{ (latent)}, \quad \text{or the log of the total or of a size factor} \\
    x_{ng} &\sim \mathrm{ZINB}(e^{l_n} \rho_{ng},\; \theta_g,\; \pi_{ng}) \text{ or NB, Poisson, normal, Bernoulli}

Inference network: :math:`q(z_n \mid x_n) = N(\mu(x_n), \sigma^2(x_n))`, and the same for l_n where it is latent.

Where we differ from scvi-tools: an encoder of the library, a dispersion head and a dropout head exist only where the
model uses them (with its defaults, 40 % of the reference's parameters never receive a gradient), the variance cannot
overflow, and there is a Bernoulli likelihood of detection.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from scvi_ext._contract import Capability, Loss, ModelSpec
from scvi_ext.functional import fused
from scvi_ext.functional.adversary import mixing_loss
from scvi_ext.functional.divergences import kl_standard_normal
from scvi_ext.models.base import CountConfig, CountVAE, batch_critic, needs
from scvi_ext.nn import at_once
from scvi_ext.nn.decoders import DecoderSCVI
from scvi_ext.nn.library import ObservedLibrary

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from scvi_ext._contract import Minibatch


@dataclass(frozen=True)
class Config(CountConfig):
    """Options of scVI; keyword arguments of ``tl.fit(adata, model="scvi")``."""

    adversarial_mixing: float = 0.0


class VAE(CountVAE):
    """The torch module of scVI.

    Parameters
    ----------
    n_input, n_batch, n_labels, n_hidden, n_latent, n_layers, dropout_rate
        As in :class:`~scvi_ext.models.base.CountVAE`, in the seed's order and with its defaults; hidden layers are
        those of encoder and decoder.
    dispersion, log_variational, reconstruction_loss
        The same.
    adversarial_mixing
        Weight of telling as little as possible of the batch in z, beside that of its KL divergence: a critic watches,
        and how far z and batch are from independent is a part of the loss, in nats. 0: no critic; 100 at most.
    use_batch_norm, use_layer_norm, deeply_inject_covariates, **options
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
        adversarial_mixing: float = 0.0,
        deeply_inject_covariates: bool = True,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        **options: object,
    ):
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
            deeply_inject_covariates=deeply_inject_covariates,
            use_batch_norm=use_batch_norm,
            use_layer_norm=use_layer_norm,
            **options,
        )
        self.decoder = DecoderSCVI(
            n_latent + self.covariates.n_dense,
            n_input,
            self.covariates.n_cat_list,
            n_layers,
            n_hidden,
            use_batch_norm=use_batch_norm in ("decoder", "both"),
            use_layer_norm=use_layer_norm in ("decoder", "both"),
            inject_covariates=deeply_inject_covariates,
            **self.heads,
        )
        self.adversarial_mixing = adversarial_mixing
        self.critic = batch_critic(adversarial_mixing, n_latent, n_batch)

    def loss(self, cells: Minibatch, kl_weight: Tensor | float = 1.0, noise: Tensor | None = None) -> Loss:
        """The negative ELBO (Lopez et al. 2018, methods), its KL to the prior of z weighted by ``kl_weight``."""
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

    def loss_at_once(self, n_cells: int) -> Callable[[Minibatch, Tensor | float], Loss] | None:
        """A faster way to :meth:`loss` and its gradients, for training on ``n_cells`` at a time; None if there is none.

        It leaves the gradients in the parameters, which have to stay where they are in memory.
        """
        known = self.latent_distribution == "normal" and isinstance(self.library, ObservedLibrary)
        plain = known and not self.covariates.n_dense and at_once.fits(self.z_encoder, self.decoder, n_cells)
        if not plain or any(not p.requires_grad or p._backward_hooks for p in self.parameters()):
            return None
        run, _ = fused.choose(self.reconstruction_loss, "cpu", torch.float32)
        if run is None:
            return None
        whole = at_once.AtOnce(run, self.z_encoder, self.decoder, n_cells)
        mixing = None if self.critic is None else at_once.Mixing(self.critic)
        kl_library = torch.zeros(n_cells)

        @torch.no_grad()
        def loss(cells: Minibatch, kl_weight: Tensor | float = 1.0) -> Loss:
            kl_weight = float(kl_weight)
            encoded = cells.x.log1p() if self.log_variational else cells.x
            log_theta = None if self.dispersion is None else self.dispersion(cells)
            codes, log_library = self.covariates.codes(cells), self.library.point(cells)
            pull = None
            if mixing is not None:
                pull = partial(mixing.gradient, cells.batch_index, kl_weight * self.adversarial_mixing)
            reconstruction, kl_z, d_log_theta = whole(cells.x, encoded, codes, kl_weight, log_library, log_theta, pull)
            if self.dispersion is not None:
                self.dispersion.take_gradient(d_log_theta, cells)
            return Loss(None, reconstruction, kl_z, kl_library)

        return loss


SPEC = ModelSpec(
    name="scvi",
    module=VAE,
    config=Config,
    needs=needs,
    capabilities=frozenset({Capability.COUNTS}),
    reference="Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics, Nature Methods.",
)
