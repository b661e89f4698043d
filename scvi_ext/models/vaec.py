r"""VAEC: a conditional VAE of counts whose condition, the cell type, is known for some of the cells.

This is the model M2 of Kingma et al. (2014) with the likelihoods of scVI. Generative process of cell n:

.. math::
    y_n &\sim \mathrm{Categorical}(\pi), \qquad z_n \sim N(0, I) \\
    x_{ng} &\sim \mathrm{ZINB}(e^{l_n} f(z_n, y_n, s_n)_g,\; \theta_g,\; \pi_{ng}) \text{ and so on, as in scVI}

so that z is what the label leaves unexplained. Inference network: :math:`q(y, z \mid x) = q(y \mid x) q(z \mid x, y)`,
with all labels enumerated in place of one that was not seen. :math:`r` times the cross-entropy of the labels that were
seen is added to the negative ELBO, which alone would not teach them to the classifier q(y | x).

Where we differ from scVI 0.5.0: its classifier saw log counts whatever ``log_variational`` said. scvi-tools has no such
model; what is called VAEC there is another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from scvi_ext._contract import LABELLED, Capability, Loss, ModelSpec, Posterior, Stream
from scvi_ext.functional.divergences import kl_categorical, kl_standard_normal
from scvi_ext.functional.labels import check_labels, cross_entropy, fill_in, label_weights, log_prior
from scvi_ext.models.base import CountConfig, CountVAE, needs
from scvi_ext.nn.classifier import Classifier
from scvi_ext.nn.decoders import DecoderSCVI
from scvi_ext.nn.encoders import Encoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scvi_ext._contract import Minibatch
    from scvi_ext.kernels.sparse import SparseRows


@dataclass(frozen=True)
class Config(CountConfig):
    """Options of VAEC; keyword arguments of ``tl.fit(adata, model="vaec")``."""

    classification_ratio: float = 50.0
    y_prior: tuple[float, ...] | None = None


class VAEC(CountVAE):
    """The torch module of VAEC.

    Parameters
    ----------
    n_input, n_batch, n_labels, n_hidden, n_latent, n_layers, dropout_rate
        As in :class:`~scvi_ext.models.base.CountVAE`, in the seed's order and with its defaults; hidden layers are
        those of encoder, decoder and classifier.
    y_prior
        Probability of each label, or numbers in proportion; by default the same for all.
    dispersion, log_variational, reconstruction_loss
        As in :class:`~scvi_ext.models.base.CountVAE`.
    classification_ratio
        Weight r of the cross-entropy of the labels that were seen.
    use_batch_norm, use_layer_norm, deeply_inject_covariates, encode_covariates, **options
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
        y_prior: Sequence[float] | None = None,
        dispersion: str = "gene",
        log_variational: bool = True,
        reconstruction_loss: str = "zinb",
        *,
        classification_ratio: float = 50.0,
        deeply_inject_covariates: bool = True,
        encode_covariates: bool = False,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        **options: object,
    ):
        check_labels("vaec", n_labels, classification_ratio)
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
            encode_covariates=encode_covariates,
            use_batch_norm=use_batch_norm,
            use_layer_norm=use_layer_norm,
            **options,
        )
        self.classification_ratio = classification_ratio
        self.n_labels = n_labels
        self.register_buffer("log_y_prior", log_prior(y_prior, n_labels))
        in_encoder = {
            "use_batch_norm": use_batch_norm in ("encoder", "both"),
            "use_layer_norm": use_layer_norm in ("encoder", "both"),
        }
        self.classifier = Classifier(n_input, n_hidden, n_labels, n_layers, dropout_rate, **in_encoder)
        self.z_encoder = Encoder(
            n_input + (self.covariates.n_dense if encode_covariates else 0),
            n_latent,
            [*(self.covariates.n_cat_list if encode_covariates else ()), n_labels],
            n_layers,
            n_hidden,
            dropout_rate,
            inject_covariates=deeply_inject_covariates,
            **in_encoder,
        )
        self.decoder = DecoderSCVI(
            n_latent + self.covariates.n_dense,
            n_input,
            [*self.covariates.n_cat_list, n_labels],
            n_layers,
            n_hidden,
            use_batch_norm=use_batch_norm in ("decoder", "both"),
            use_layer_norm=use_layer_norm in ("decoder", "both"),
            inject_covariates=deeply_inject_covariates,
            **self.heads,
        )

    def loss(
        self,
        cells: Minibatch,
        labelled: Minibatch | None = None,
        kl_weight: Tensor | float = 1.0,
        noise: Tensor | None = None,
    ) -> Loss:
        """The negative ELBO of ``cells`` (Kingma et al. 2014, eq. 6 and 7), and the cross-entropy of ``labelled``."""
        log_qy = self.encode_label(cells)  # (B, C)
        weights = label_weights(cells.labels, log_qy).t()  # (C, B)
        with_y = self._with_every_label(cells)
        qz, ql = posteriors = self.posteriors(with_y)  # (C, B, L), (B, 1)
        z, log_library = self.draw(with_y, posteriors, noise)
        kl_y = torch.where(cells.labels < 0, kl_categorical(log_qy, self.log_y_prior), 0.0)  # (B,)

        reconstruction = -(weights * self.log_px(self.transform_z(z), with_y, log_library)).sum(0)  # (B,)
        kl_z = (weights * kl_standard_normal(qz)).sum(0) + kl_y  # (B,)
        kl_library = self.library.kl(ql, cells)  # (B,)
        total = (reconstruction + kl_library + kl_weight * kl_z).mean()
        if labelled is None:
            return Loss(total, reconstruction, kl_z, kl_library)
        classification = cross_entropy(self.encode_label(labelled), labelled.labels)
        total = total + self.classification_ratio * classification.mean()
        return Loss(total, reconstruction, kl_z, kl_library, classification)

    def _with_every_label(self, cells: Minibatch) -> Minibatch:
        """The cells with codes of shape (C, B) for labels: what is made of them has C samples, one for each label."""
        every = torch.arange(self.n_labels, device=cells.batch_index.device)
        return cells._replace(labels=every.unsqueeze(-1).expand(-1, len(cells.batch_index)))

    def posteriors(self, cells: Minibatch) -> tuple[Posterior, Posterior | None]:
        """q(z | x, y) at the label, or the most probable one, and q(l | x); the latter is None where it is known."""
        cells = self.with_labels(cells)
        encoder_input = self._encoder_input(cells)
        qz = self.z_encoder.of(encoder_input.with_codes(*self._label_codes(cells)))
        return qz, self.library.posterior(cells, encoder_input)

    def encode(self, cells: Minibatch) -> Posterior:
        """q(z | x, y) at the label, or the most probable one, before :meth:`transform_z`, shape (B, L)."""
        return self.posteriors(cells)[0]

    def encode_label(self, cells: Minibatch) -> Tensor:
        """log q(y | x), shape (B, C)."""
        return self._log_qy(cells.x)

    def _log_qy(self, x: Tensor | SparseRows) -> Tensor:
        return self.classifier.log_probabilities(x.log1p() if self.log_variational else x)

    def with_labels(self, cells: Minibatch) -> Minibatch:
        """The cells, with the most probable label where there is none."""
        if cells.labels is not None and (cells.labels.dim() > 1 or not (cells.labels < 0).any()):
            return cells
        return cells._replace(labels=fill_in(cells.labels, self.encode_label(cells)))

    def _decoder_input(self, z: Tensor, cells: Minibatch) -> tuple[Tensor, ...]:
        return (*super()._decoder_input(z, cells), *self._label_codes(cells))

    def _label_codes(self, cells: Minibatch) -> tuple[Tensor]:
        if cells.labels.dim() == 1:
            return (cells.labels,)
        return (torch.eye(self.n_labels, device=cells.labels.device).unsqueeze(1),)  # (C, 1, C): every label

    @property
    def encoders(self) -> nn.ModuleList:
        """The parts of q(z, y, l | x); all other parameters belong to the generative model."""
        return nn.ModuleList([*super().encoders, self.classifier])

    def log_weight(
        self, cells: Minibatch, posteriors: tuple[Posterior, Posterior | None], noise: Tensor | None = None
    ) -> Tensor:
        """log p(x, z, l) - log q(z, l | x) at one posterior sample, shape (B,); given the label where there is one.

        The sum over labels is carried out, with a sample of q(z | x, y) for each: ``posteriors`` are not needed.
        """
        with_y = self._with_every_label(cells)
        log_weight = super().log_weight(with_y, self.posteriors(with_y), noise)  # (C, B)
        seen = cells.labels.clamp(min=0).unsqueeze(0)
        return torch.where(
            cells.labels >= 0,
            log_weight.gather(0, seen).squeeze(0),
            torch.logsumexp(log_weight + self.log_y_prior.unsqueeze(-1), dim=0),
        )

    # ---- the seed's vocabulary -------------------------------------------------------------------------------------

    def classify(self, x: Tensor) -> Tensor:
        """Probabilities of the labels, shape (B, C)."""
        return torch.exp(self._log_qy(x))


SPEC = ModelSpec(
    name="vaec",
    module=VAEC,
    config=Config,
    needs=lambda config: needs(config) | {"labels"},
    streams=(Stream("cells"), LABELLED),
    capabilities=frozenset({Capability.COUNTS, Capability.LABELS}),
    reference="Kingma et al. (2014), Semi-supervised learning with deep generative models, NeurIPS.",
)
