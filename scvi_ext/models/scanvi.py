r"""scANVI: scVI with cell types, known for some of the cells (Xu et al. 2021).

Generative process of cell n, with label y_n, batch and covariates s_n:

.. math::
    y_n &\sim \mathrm{Categorical}(\pi), \qquad z^2_n \sim N(0, I), \qquad
    z^1_n \sim N(\mu(z^2_n, y_n), \sigma^2(z^2_n, y_n)) \\
    x_{ng} &\sim \mathrm{ZINB}(e^{l_n} f(z^1_n, s_n)_g,\; \theta_g,\; \pi_{ng}) \text{ and so on, as in scVI}

so that z1 is the latent space of scVI, and z2 what the label leaves unexplained of it. Inference network:

.. math::
    q(z^1, z^2, y \mid x) = q(z^1 \mid x)\; q(y \mid z^1)\; q(z^2 \mid z^1, y)

with all labels enumerated in place of one that was not seen. The classifier q(y | z1) is also trained to tell the
labels that were seen: :math:`r` times their cross-entropy is added to the negative ELBO.

Where we differ from scvi-tools: a label that was seen enters the ELBO (there, only the cross-entropy), and that of no
other cell can; labels come with a prior and in groups; theta by label works, and z2 can be read out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from scvi_ext._contract import LABELLED, Capability, Loss, ModelSpec, Posterior, Stream
from scvi_ext._errors import one_of
from scvi_ext.functional.adversary import mixing_loss
from scvi_ext.functional.divergences import kl_categorical, kl_standard_normal, log_density
from scvi_ext.functional.labels import check_labels, cross_entropy, fill_in, label_weights, log_prior
from scvi_ext.functional.sampling import sample_normal
from scvi_ext.models.base import CountConfig, CountVAE, batch_critic, needs
from scvi_ext.nn.classifier import Classifier
from scvi_ext.nn.decoders import Decoder, DecoderSCVI
from scvi_ext.nn.encoders import Encoder

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

    from scvi_ext._contract import Minibatch


@dataclass(frozen=True)
class Config(CountConfig):
    """Options of scANVI; keyword arguments of ``tl.fit(adata, model="scanvi")``."""

    classification_ratio: float = 50.0
    training: Literal["joint", "alternate"] = "joint"
    linear_classifier: bool = False
    y_prior: tuple[float, ...] | None = None
    labels_groups: tuple[str, ...] | None = None
    adversarial_mixing: float = 0.0


class SCANVI(CountVAE):
    """The torch module of scANVI.

    Parameters
    ----------
    n_input, n_batch, n_labels, n_hidden, n_latent, n_layers, dropout_rate
        As in :class:`~scvi_ext.models.base.CountVAE`, in the seed's order and with its defaults; hidden layers are
        those of all networks.
    dispersion, log_variational, reconstruction_loss
        The same. With ``dispersion="gene-label"`` every label is decoded for a cell without one.
    classification_ratio
        Weight r of the cross-entropy of the labels that were seen.
    training
        ``"joint"``: this cross-entropy trains classifier and encoder. ``"alternate"``: the classifier only, on the
        latent space as the ELBO makes it.
    linear_classifier
        A classifier without hidden layers.
    y_prior
        Probability of each label, or numbers in proportion; by default the same for all.
    labels_groups
        Group of each label. Then q(y | z1) = q(group | z1) q(y | z1, group), with a classifier for each.
    adversarial_mixing
        As in :class:`~scvi_ext.models.VAE`, of z1.
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
        classification_ratio: float = 50.0,
        training: str = "joint",
        linear_classifier: bool = False,
        y_prior: Sequence[float] | None = None,
        labels_groups: Sequence[Hashable] | None = None,
        adversarial_mixing: float = 0.0,
        deeply_inject_covariates: bool = True,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        **options: object,
    ):
        one_of("training", training, ("joint", "alternate"))
        check_labels("scanvi", n_labels, classification_ratio)
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
        self.classification_ratio = classification_ratio
        self.training_alternates = training == "alternate"
        self.n_labels = n_labels
        self.register_buffer("log_y_prior", log_prior(y_prior, n_labels))
        in_encoder = {
            "use_batch_norm": use_batch_norm in ("encoder", "both"),
            "use_layer_norm": use_layer_norm in ("encoder", "both"),
        }
        in_decoder = {
            "use_batch_norm": use_batch_norm in ("decoder", "both"),
            "use_layer_norm": use_layer_norm in ("decoder", "both"),
        }

        def classifier(n_classes: int) -> Classifier:
            layers = 0 if linear_classifier else n_layers
            return Classifier(n_latent, n_hidden, n_classes, layers, dropout_rate, logits=True, **in_encoder)

        self.classifier = classifier(n_labels)
        groups = _groups(labels_groups, n_labels)
        self.register_buffer("groups", None if groups is None else torch.as_tensor(groups))
        self.group_classifier = None if groups is None else classifier(groups.max() + 1)
        self.encoder_z2_z1 = Encoder(n_latent, n_latent, [n_labels], n_layers, n_hidden, dropout_rate, **in_encoder)
        self.decoder_z1_z2 = Decoder(n_latent, n_latent, [n_labels], n_layers, n_hidden, **in_decoder)
        self.decoder = DecoderSCVI(
            n_latent + self.covariates.n_dense,
            n_input,
            self.covariates.n_cat_list,
            n_layers,
            n_hidden,
            inject_covariates=deeply_inject_covariates,
            **in_decoder,
            **self.heads,
        )
        self.adversarial_mixing = adversarial_mixing
        self.critic = batch_critic(adversarial_mixing, n_latent, n_batch)

    def loss(
        self,
        cells: Minibatch,
        labelled: Minibatch | None = None,
        kl_weight: Tensor | float = 1.0,
        noise: Tensor | None = None,
    ) -> Loss:
        """The negative ELBO of ``cells`` (Xu et al. 2021, methods), and the cross-entropy of ``labelled`` ones."""
        qz1, ql = posteriors = self.posteriors(cells)
        z1, log_library = self.draw(cells, posteriors, noise)
        log_qy = self.log_qy(z1)  # (B, C)
        weights = label_weights(cells.labels, log_qy)  # (B, C)
        log_pz1, kl_z2 = self.given_labels(z1, noise)  # (B, C) each
        kl_y = torch.where(cells.labels < 0, kl_categorical(log_qy, self.log_y_prior), 0.0)  # (B,)

        reconstruction = -self._expected_log_px(z1, cells, log_library, weights)  # (B,)
        kl_z = log_density(z1, qz1) + (weights * (kl_z2 - log_pz1)).sum(-1) + kl_y  # (B,)
        kl_library = self.library.kl(ql, cells)  # (B,)
        total = (reconstruction + kl_library + kl_weight * kl_z).mean()
        if self.critic is not None and self.training:
            weight = kl_weight * self.adversarial_mixing
            total = total + mixing_loss(self.critic, self.transform_z(z1), cells.batch_index, weight)
        if labelled is None:
            return Loss(total, reconstruction, kl_z, kl_library)
        z1 = self.encode(labelled).loc
        log_qy = self.log_qy(z1.detach() if self.training_alternates else z1)
        classification = cross_entropy(log_qy, labelled.labels)
        total = total + self.classification_ratio * classification.mean()
        return Loss(total, reconstruction, kl_z, kl_library, classification)

    def log_qy(self, z1: Tensor) -> Tensor:
        """log q(y | z1), shape (B, C)."""
        scores = self.classifier.scores(z1)
        if self.groups is None:
            return torch.log_softmax(scores, dim=-1)
        log_q_group = self.group_classifier.log_probabilities(z1)  # (B, groups)
        same = self.groups.unsqueeze(0) == self.groups.unsqueeze(1)  # (C, C)
        of_group = torch.where(same, scores.unsqueeze(-2), -torch.inf).logsumexp(-1)  # (B, C)
        return log_q_group[..., self.groups] + scores - of_group

    def given_labels(self, z1: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p(z1 | z2, y) at a sample of q(z2 | z1, y), and KL(q(z2 | z1, y) || p(z2)), for every y: (B, C) each."""
        qz2, _, pz1 = self._enumerated(z1, noise)
        return log_density(z1, pz1).t(), kl_standard_normal(qz2).t()

    def _enumerated(self, z1: Tensor, noise: Tensor | None) -> tuple[Posterior, Tensor, Posterior]:
        """q(z2 | z1, y), a sample of it and p(z1 | z2, y) for every y: (C, B, L) each."""
        every = torch.eye(self.n_labels, device=z1.device).unsqueeze(1)  # (C, 1, C)
        qz2 = self.encoder_z2_z1.posterior(z1, every)
        z2 = sample_normal(qz2, None if noise is None else self._noise_z2(noise))
        loc, var = self.decoder_z1_z2(z2, every)
        return qz2, z2, Posterior(loc, torch.sqrt(var))

    def _noise_z2(self, noise: Tensor) -> Tensor:
        return noise[:, self.n_latent : 2 * self.n_latent]

    def _expected_log_px(self, z1: Tensor, cells: Minibatch, log_library: Tensor, weights: Tensor) -> Tensor:
        """log p(x | z1), averaged over the labels where they have a theta of their own, shape (B,)."""
        if not self.decodes_labels:
            return self.log_px(self.transform_z(z1), cells, log_library)
        return (weights * self._log_px_by_label(z1, cells, log_library)).sum(-1)

    def _log_px_by_label(self, z1: Tensor, cells: Minibatch, log_library: Tensor) -> Tensor:
        """log p(x | z1, y) for every y, shape (B, C)."""
        every = torch.arange(self.n_labels, device=z1.device).unsqueeze(-1).expand(-1, len(z1))  # (C, B)
        z = self.transform_z(z1).expand(self.n_labels, -1, -1)
        return self.log_px(z, cells._replace(labels=every), log_library).t()

    @property
    def decodes_labels(self) -> bool:
        """Whether the label of a cell has a part in p(x | z1)."""
        return self.dispersion is not None and self.dispersion.column == "labels"

    # ---- what the read-outs ask ------------------------------------------------------------------------------------

    @property
    def encoders(self) -> nn.ModuleList:
        """The parts of q(z1, z2, y, l | x); all other parameters belong to the generative model."""
        parts = [*super().encoders, self.encoder_z2_z1, self.classifier, self.group_classifier]
        return nn.ModuleList(part for part in parts if part is not None)

    @property
    def n_noise(self) -> int:
        """Standard normal draws that one posterior sample of a cell takes: for z1, for z2 and for the library."""
        return 2 * self.n_latent + 1

    def encode_label(self, cells: Minibatch) -> Tensor:
        """log q(y | z1) at the mean of q(z1 | x), shape (B, C)."""
        return self.log_qy(self.encode(cells).loc)

    def encode_z2(self, cells: Minibatch) -> Posterior:
        """q(z2 | z1, y) at the mean of q(z1 | x) and the label, or the most probable one, shape (B, L)."""
        z1 = self.encode(cells).loc
        return self.encoder_z2_z1.posterior(z1, fill_in(cells.labels, self.log_qy(z1)))

    def with_labels(self, cells: Minibatch) -> Minibatch:
        """The cells, with the most probable label where there is none and theta depends on it."""
        if not self.decodes_labels or (cells.labels is not None and cells.labels.dim() > 1):
            return cells
        return cells._replace(labels=fill_in(cells.labels, self.encode_label(cells)))

    def log_weight(
        self, cells: Minibatch, posteriors: tuple[Posterior, Posterior | None], noise: Tensor | None = None
    ) -> Tensor:
        """log p(x, z1, l) - log q(z1, l | x) at one posterior sample, shape (B,); given the label where there is one.

        The sum over labels is carried out, and p(z1 | y) is p(z1 | z2, y) p(z2) / q(z2 | z1, y) at a sample of z2.
        """
        qz1, ql = posteriors
        z1, log_library = self.draw(cells, posteriors, noise)
        qz2, z2, pz1 = self._enumerated(z1, noise)
        prior = Posterior(torch.zeros_like(qz2.loc), torch.ones_like(qz2.scale))
        log_weight = (log_density(z1, pz1) + log_density(z2, prior) - log_density(z2, qz2)).t()  # (B, C)
        if self.decodes_labels:
            log_weight = log_weight + self._log_px_by_label(z1, cells, log_library)
        else:
            log_weight = log_weight + self.log_px(self.transform_z(z1), cells, log_library).unsqueeze(-1)
        seen = cells.labels.clamp(min=0).unsqueeze(-1)
        log_weight = torch.where(
            cells.labels >= 0,
            log_weight.gather(-1, seen).squeeze(-1),
            torch.logsumexp(log_weight + self.log_y_prior, dim=-1),
        )
        log_weight = log_weight - log_density(z1, qz1)
        if ql is not None:
            log_weight = log_weight + log_density(log_library, self.library.prior(cells)) - log_density(log_library, ql)
        return log_weight

    # ---- the seed's vocabulary -------------------------------------------------------------------------------------

    def classify(self, x: Tensor, batch_index: Tensor | None = None) -> Tensor:
        """Probabilities of the labels, shape (B, C); with groups, those of the group times those within it."""
        return torch.exp(self.encode_label(self._cells(x, batch_index, decoded=False)))

    def get_latents(self, x: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """A sample of z1, and the mean of z2 given it and the label, by default the most probable one: (B, L) each."""
        z1 = sample_normal(self.encode(self._cells(x, None, y, decoded=False)))
        labels = fill_in(None if y is None else y.reshape(-1).long(), self.log_qy(z1))
        return [self.transform_z(z1), self.encoder_z2_z1.posterior(z1, labels).loc]


def _groups(labels_groups: Sequence[Hashable] | None, n_labels: int) -> np.ndarray | None:
    """Codes of the groups of the labels, shape (C,)."""
    if labels_groups is None:
        return None
    names, codes = np.unique([str(group) for group in labels_groups], return_inverse=True)
    if len(codes) != n_labels:
        msg = (
            f"labels_groups names the groups of {len(codes)} labels, and there are {n_labels}: one for each is needed."
        )
        raise ValueError(msg)
    if not 1 < len(names) < n_labels:
        msg = f"labels_groups has no effect with {len(names)} groups of {n_labels} labels."
        raise ValueError(msg)
    return codes


SPEC = ModelSpec(
    name="scanvi",
    module=SCANVI,
    config=Config,
    needs=lambda config: needs(config) | {"labels"},
    streams=(Stream("cells"), LABELLED),
    capabilities=frozenset({Capability.COUNTS, Capability.LABELS, Capability.Z2}),
    reference="Xu et al. (2021), Probabilistic harmonization and annotation of single-cell transcriptomics data with "
    "deep generative models, Molecular Systems Biology.",
)
