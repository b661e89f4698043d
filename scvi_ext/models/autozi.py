r"""AutoZI: which genes are zero-inflated (Clivio et al. 2019).

Generative process of cell n, gene g; z, l and rho as in scVI, with d another output of the decoder:

.. math::
    \delta_g &\sim \mathrm{Beta}(\alpha, \beta), \qquad m_{ng} \sim \mathrm{Bernoulli}(\delta_g) \\
    \pi_{ng} &= \pi_{min} + (1 - \pi_{min})\, \mathrm{sigmoid}(d_g(z_n, s_n)) \\
    x_{ng} &\sim \mathrm{NB}(e^{l_n} \rho_{ng}, \theta_g) \text{ if } m_{ng} = 1, \text{ else }
    \mathrm{ZINB}(e^{l_n} \rho_{ng}, \theta_g, \pi_{ng})

so that delta is the share of counts without technical zeros. The sum over m makes p(x | z, delta) a ZINB again, with
inflation :math:`(1 - \delta_g) \pi_{ng}`. Inference network: that of scVI, and :math:`q(\delta_g) = \mathrm{Beta}(a_g,
b_g)`, the same for all cells, with all of alpha, beta, a, b between 0 and 1. A gene is called inflated if
:math:`q(\delta_g < 0.5) > 0.5`.

With ``zero_inflation="gene-batch"`` or ``"gene-label"`` each batch or label has a delta of its own. With
``"gene-cell"`` each count has one; then it is integrated out, which leaves its prior mean, and what a count says about
its own m is its posterior.

Where we differ from scvi-tools: both parameters of the prior count, and can be learned with every kind of zero
inflation (there, beta is replaced by alpha, and learning fails but for genes); the divergence of delta is part of the
reported ELBO; there is gene-cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from scvi_ext._contract import ELBO, KL_GLOBAL, Capability, Loss, ModelSpec, Stream
from scvi_ext._errors import one_of
from scvi_ext.functional.counts import log_nb_positive, log_zinb_positive
from scvi_ext.functional.divergences import kl_standard_normal
from scvi_ext.functional.inflation import inflation_logits, kl_beta, log_beta, sample_logit_beta
from scvi_ext.models.base import CountVAE
from scvi_ext.nn.decoders import DecoderSCVI

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from scvi_ext._contract import Minibatch

_LEAST_PRIOR = 1e-6  # float32 tells this much from 0 and from 1
KINDS = ("gene", "gene-batch", "gene-label", "gene-cell")


@dataclass(frozen=True)
class Config:
    """Options of AutoZI; keyword arguments of ``tl.fit(adata, model="autozi")``."""

    n_hidden: int = 128
    n_latent: int = 10
    n_layers: int = 1
    dropout_rate: float = 0.1
    dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene"
    log_variational: bool = True
    latent_distribution: Literal["normal", "ln"] = "normal"
    library: Literal["observed", "latent", "size_factor"] = "observed"
    zero_inflation: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene"
    alpha_prior: float | None = 0.5
    beta_prior: float | None = 0.5
    minimal_dropout: float = 0.01
    encode_covariates: bool = False
    deeply_inject_covariates: bool = True
    batch_representation: Literal["one-hot", "embedding"] = "one-hot"
    use_batch_norm: Literal["encoder", "decoder", "both", "none"] = "both"
    use_layer_norm: Literal["encoder", "decoder", "both", "none"] = "none"


def needs(config: Config) -> frozenset[str]:
    """The optional columns of a minibatch that this configuration reads."""
    by_label = "gene-label" in (config.dispersion, config.zero_inflation)
    columns = {"labels": by_label, "size_factor": config.library == "size_factor"}
    return frozenset(name for name, wanted in columns.items() if wanted)


class AutoZIVAE(CountVAE):
    """The torch module of AutoZI.

    Parameters
    ----------
    n_input
        Number of genes.
    alpha_prior, beta_prior
        Of the prior of delta, between 0 and 1. One that is None is 1 minus the other; if both are, they are learned.
    minimal_dropout
        Smallest inflation of an inflated gene, from 0 to below 1. With 0 an inflated gene may have none, which leaves
        open what it is.
    zero_inflation
        What has a delta of its own: ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or ``"gene-cell"``.
    n_batch, n_labels, n_hidden, n_latent, n_layers, dropout_rate, dispersion, log_variational
        As in :class:`~scvi_ext.models.base.CountVAE`; the likelihood is given by the model.
    n_train
        Number of cells to be trained on: each bears that share of the divergence of delta.
    use_batch_norm, use_layer_norm, deeply_inject_covariates, **options
        Further options of :class:`~scvi_ext.models.base.CountVAE`.

    Raises
    ------
    ValueError
        For an unknown value, or an option that would have no effect in this combination.
    """

    def __init__(
        self,
        n_input: int,
        alpha_prior: float | None = 0.5,
        beta_prior: float | None = 0.5,
        minimal_dropout: float = 0.01,
        zero_inflation: str = "gene",
        *,
        n_train: int = 1,
        n_batch: int = 0,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        log_variational: bool = True,
        deeply_inject_covariates: bool = True,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        **options: object,
    ):
        one_of("zero_inflation", zero_inflation, KINDS)
        _check(alpha_prior, beta_prior, minimal_dropout, zero_inflation, n_labels, options)
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
            "zinb",
            deeply_inject_covariates=deeply_inject_covariates,
            use_batch_norm=use_batch_norm,
            use_layer_norm=use_layer_norm,
            **options,
        )
        self.zero_inflation, self.minimal_dropout = zero_inflation, minimal_dropout
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
        rows = {"gene-batch": (max(n_batch, 1),), "gene-label": (n_labels,)}.get(zero_inflation, ())
        self.column = {"gene-batch": "batch_index", "gene-label": "labels"}.get(zero_inflation)
        if zero_inflation == "gene-cell":
            self.alpha_posterior_logit = self.beta_posterior_logit = None
        else:
            self.alpha_posterior_logit = nn.Parameter(torch.zeros(*rows, n_input))
            self.beta_posterior_logit = nn.Parameter(torch.zeros(*rows, n_input))
        if alpha_prior is None and beta_prior is None:
            self.alpha_prior_logit = nn.Parameter(torch.zeros(*rows, 1))
            self.beta_prior_logit = nn.Parameter(torch.zeros(*rows, 1))
        else:
            alpha = 1 - beta_prior if alpha_prior is None else alpha_prior
            beta = 1 - alpha_prior if beta_prior is None else beta_prior
            self.register_buffer("alpha_prior_logit", torch.logit(torch.tensor([alpha], dtype=torch.float32)))
            self.register_buffer("beta_prior_logit", torch.logit(torch.tensor([beta], dtype=torch.float32)))
        self.register_buffer("n_train", torch.tensor([float(n_train)]))  # files keep the type of arrays only

    def loss(
        self,
        cells: Minibatch,
        kl_weight: Tensor | float = 1.0,
        noise: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> Loss:
        """The negative ELBO (Clivio et al. 2019, eq. 4), its KL to the prior of z weighted by ``kl_weight``.

        ``shared`` is a draw of logit(delta), made here where it is not given.
        """
        qz, ql = posteriors = self.posteriors(cells)
        z, log_library = self.draw(cells, posteriors, noise)
        logit_delta = self.draw_shared() if shared is None else shared
        reconstruction = -self.log_px(self.transform_z(z), cells, log_library, logit_delta)  # (B,)
        kl_z = kl_standard_normal(qz)  # (B,)
        kl_library = self.library.kl(ql, cells)  # (B,)
        kl_global = (self.kl_shared() / self.n_train).expand_as(kl_z)  # (B,)
        total = (reconstruction + kl_library + kl_global + kl_weight * kl_z).mean()
        return Loss(total, reconstruction, kl_z, kl_library, kl_global=kl_global)

    # ---- delta -----------------------------------------------------------------------------------------------------

    def prior(self) -> tuple[Tensor, Tensor]:
        """alpha and beta of p(delta), broadcastable to those of :meth:`zero_inflation_posterior`."""
        return self._of_all_cells(self.alpha_prior_logit), self._of_all_cells(self.beta_prior_logit)

    def zero_inflation_posterior(self) -> tuple[Tensor, Tensor]:
        """a and b of q(delta), shape (G,), (K, G) by batch or (C, G) by label; of gene-cell the prior, shape (1,)."""
        if self.alpha_posterior_logit is None:
            return self.prior()
        return self._of_all_cells(self.alpha_posterior_logit), self._of_all_cells(self.beta_posterior_logit)

    def _of_all_cells(self, logit: Tensor) -> Tensor:
        """Its sigmoid, the gradient that of the sum over all cells rather than of their mean.

        What one cell says of delta is little, and would be below the epsilon of Adam, which holds small gradients back.
        """
        fixed = logit.detach()
        return torch.sigmoid(fixed + self.n_train * (logit - fixed))

    def draw_shared(self, rng: np.random.Generator | None = None) -> Tensor | None:
        """A sample of logit(delta), of the shape of its posterior; None where each count has its own."""
        if self.alpha_posterior_logit is None:
            return None
        return sample_logit_beta(*self.zero_inflation_posterior(), rng)

    def kl_shared(self) -> Tensor:
        """KL(q(delta) || p(delta)), the sum over genes, shape ()."""
        if self.alpha_posterior_logit is None:
            return super().kl_shared()
        return kl_beta(*self.zero_inflation_posterior(), *self.prior()).sum()

    def log_weight_shared(self, shared: Tensor) -> Tensor:
        """log p(delta) - log q(delta) at a draw of logit(delta), the sum over genes, shape ()."""
        return (log_beta(shared, *self.prior()) - log_beta(shared, *self.zero_inflation_posterior())).sum()

    def _heads(
        self, z: Tensor, cells: Minibatch, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits, log_theta, dropout = super()._heads(z, cells)
        if shared is None:  # each count depends on one delta, so that the mean over q(delta) is at its mean
            a, b = self.zero_inflation_posterior()
            shared = torch.log(a) - torch.log(b)
        return logits, log_theta, inflation_logits(dropout, self._of_cells(shared, cells), self.minimal_dropout)

    def _of_cells(self, by_group: Tensor, cells: Minibatch) -> Tensor:
        """Of values of genes by batch or label those of each cell, (B, G); others as they are."""
        if self.column is None:
            return by_group
        codes = getattr(cells, self.column)
        if codes is None:
            msg = f"zero_inflation={self.zero_inflation!r} needs the label of each cell, and no labels were given."
            raise ValueError(msg)
        return by_group[codes]

    # ---- the seed's vocabulary -------------------------------------------------------------------------------------

    def get_alphas_betas(self, as_numpy: bool = True) -> dict[str, Tensor | np.ndarray]:
        """Parameters of prior and posterior of delta: ``"alpha_posterior"``, (G,), (G, K) or (G, C), and so on."""
        names = ("alpha_posterior", "beta_posterior", "alpha_prior", "beta_prior")
        values = [
            value.t() if value.dim() > 1 else value for value in (*self.zero_inflation_posterior(), *self.prior())
        ]
        return {n: v.detach().cpu().numpy() if as_numpy else v for n, v in zip(names, values, strict=True)}

    def compute_global_kl_divergence(self) -> Tensor:
        """KL(q(delta) || p(delta)), shape ()."""
        return self.kl_shared()

    def sample_from_beta_distribution(
        self, alpha: Tensor, beta: Tensor, eps_gamma: float = 1e-30, eps_sample: float = 1e-7
    ) -> Tensor:
        """A sample of Beta(alpha, beta) through which gradients flow, at least ``eps_sample`` away from 0 and 1.

        ``eps_gamma`` is accepted for the seed's signature: the Gamma variables are drawn as logarithms.
        """
        return eps_sample + (1 - 2 * eps_sample) * torch.sigmoid(sample_logit_beta(alpha, beta))

    def sample_bernoulli_params(
        self, batch_index: Tensor | None = None, y: Tensor | None = None, n_samples: int = 1
    ) -> Tensor:
        """A sample of delta, of the cells as in :meth:`reshape_bernoulli`; samples come first where there are more."""
        alpha, beta = (v.t() if v.dim() > 1 else v for v in self.zero_inflation_posterior())
        lead = (n_samples,) if n_samples > 1 else ()
        samples = self.sample_from_beta_distribution(alpha.expand(*lead, *alpha.shape), beta.expand(*lead, *beta.shape))
        return self.reshape_bernoulli(samples, batch_index, y)

    def reshape_bernoulli(
        self, bernoulli_params: Tensor, batch_index: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """Of delta by batch (..., G, K) or label (..., G, C) that of each cell, (..., B, G); others as they are."""
        if self.column is None:
            return bernoulli_params
        codes = batch_index if self.column == "batch_index" else y
        if codes is None:
            msg = f"zero_inflation={self.zero_inflation!r} needs the batch or label of each cell."
            raise ValueError(msg)
        return bernoulli_params.transpose(-1, -2)[..., codes.reshape(-1).long(), :]

    def rescale_dropout(self, px_dropout: Tensor, eps_log: float = 1e-8) -> Tensor:
        """The logit of pi, which is ``minimal_dropout`` or more, from that of a sigmoid.

        ``eps_log`` is accepted for the seed's signature.
        """
        return inflation_logits(px_dropout, px_dropout.new_tensor(-math.inf), self.minimal_dropout)

    def inference(
        self,
        x: Tensor,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
        n_samples: int = 1,
        transform_batch: int | None = None,
        eps_log: float = 1e-8,
    ) -> dict[str, Tensor | None]:
        """As in :class:`~scvi_ext.models.base.CountVAE`, with a draw of delta, ``"bernoulli_params"``.

        ``px_dropout`` is the logit of pi. ``eps_log`` is accepted for the seed's signature.
        """
        outputs = super().inference(x, batch_index, y, n_samples, transform_batch)
        cells = self._cells(x, batch_index, y, decoded=transform_batch is None)
        cells = cells if transform_batch is None else self._in_batch(cells, transform_batch)
        dropout = super()._heads(outputs["z"], cells)[2]
        delta = self.sample_bernoulli_params(cells.batch_index, cells.labels, n_samples)
        if n_samples > 1 and self.column is None:
            delta = delta.unsqueeze(1)
        return outputs | {"px_dropout": self.rescale_dropout(dropout), "bernoulli_params": delta}

    def get_reconstruction_loss(
        self,
        x: Tensor,
        px_rate: Tensor,
        px_r: Tensor | None,
        px_dropout: Tensor | None,
        bernoulli_params: Tensor,
        eps_log: float = 1e-8,
        **outputs: Tensor | None,
    ) -> Tensor:
        """-log of the mixture of both likelihoods with weights delta and 1 - delta, shape (B,).

        ``outputs`` are the other entries of :meth:`inference`, which may be handed over whole; they are not needed.
        """
        nb = torch.log(bernoulli_params + eps_log) + log_nb_positive(x, px_rate, px_r)
        zinb = torch.log(1 - bernoulli_params + eps_log) + log_zinb_positive(x, px_rate, px_r, px_dropout)
        return -torch.logaddexp(nb, zinb).sum(-1)


def _check(
    alpha: float | None, beta: float | None, minimal: float, kind: str, n_labels: int, options: dict[str, object]
) -> None:
    for name, value in {"alpha_prior": alpha, "beta_prior": beta}.items():
        if value is not None and not _LEAST_PRIOR <= value <= 1 - _LEAST_PRIOR:
            msg = f"{name}={value!r} must be above 0 and below 1, or None; {_LEAST_PRIOR:g} or more away from both."
            raise ValueError(msg)
    if not 0 <= minimal < 1:
        msg = f"minimal_dropout={minimal!r} must be at least 0 and below 1."
        raise ValueError(msg)
    if kind == "gene-label" and n_labels < 1:
        msg = "zero_inflation='gene-label' needs labels: register them with pp.setup_anndata(adata, labels_key=...)."
        raise ValueError(msg)
    if "reconstruction_loss" in options:
        msg = "AutoZI has its own likelihood: leave out reconstruction_loss."
        raise TypeError(msg)


SPEC = ModelSpec(
    name="autozi",
    module=AutoZIVAE,
    config=Config,
    needs=needs,
    streams=(Stream("cells", parts=(*ELBO, KL_GLOBAL)),),
    capabilities=frozenset({Capability.COUNTS, Capability.ZERO_INFLATION}),
    # Twice the usual steps' length, and half as many steps again: q(delta) has a way to go.
    peak_lr=4e-2,
    effort=10.0,
    most_epochs=60,
    reference="Clivio et al. (2019), Detecting zero-inflated genes in single-cell transcriptomics data, bioRxiv.",
)
