r"""totalVI: genes and surface proteins of the same cells, CITE-seq (Gayoso et al. 2021).

Generative process of cell n, gene g, protein t, with batch and covariates s_n:

.. math::
    z_n &\sim N(0, I) \text{, or its softmax}, \qquad \rho_n = f(z_n, s_n), \quad \textstyle\sum_g \rho_{ng} = 1 \\
    x_{ng} &\sim \mathrm{NB}(e^{l_n} \rho_{ng},\; \theta_g) \text{ or ZINB, } l_n \text{ as in scVI} \\
    \log \beta_{nt} &\sim N(c_{t,batch}, d^2_{t,batch}), \qquad
    \alpha_{nt} = 1 + \mathrm{ReLU}(f_\alpha(z_n, s_n)_t), \qquad \pi_{nt} = \mathrm{sigmoid}(f_\pi(z_n, s_n)_t) \\
    y_{nt} &\sim \pi_{nt} \mathrm{NB}(\beta_{nt}, \phi_t) + (1 - \pi_{nt}) \mathrm{NB}(\alpha_{nt} \beta_{nt}, \phi_t)

so that beta is the background of a protein, ambient antibody for the most part, with a prior of its own in each batch,
and alpha beta its foreground. Inference network: :math:`q(z, \beta, l \mid x, y) = q(z \mid x, y)\; q(\beta \mid z)\;
q(l \mid x, y)`.

A protein that was not measured in a batch has no part in the likelihood of its cells, and the encoder sees zeros,
whatever stands in the table. Where batches differ in this, a critic watches z and tells batches from it; until the KL
divergences have their full weight, z is asked to leave it in the dark.

Where we differ from scvi-tools: the likelihood of the proteins has its weight from the first step (there it is warmed
up with the KL divergences); the ELBO has no terms but those of the model; heads and encoders exist only where they are
used; the efficiency of a batch is an option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn.functional import softplus

from scvi_ext._contract import Capability, Expression, Loss, Minibatch, ModelSpec, Posterior, ProteinExpression
from scvi_ext._errors import one_of
from scvi_ext.functional import mixture
from scvi_ext.functional.adversary import adversarial_loss
from scvi_ext.functional.counts import log_mixture_nb, log_normal
from scvi_ext.functional.divergences import kl_standard_normal, normal_divergences
from scvi_ext.functional.sampling import sample_normal
from scvi_ext.models.base import CountVAE
from scvi_ext.nn.classifier import Classifier
from scvi_ext.nn.decoders import DecoderTOTALVI
from scvi_ext.nn.dispersion import Dispersion
from scvi_ext.nn.encoders import EncoderInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_UNMEASURED_START = 3.0  # of the log background before anything is known of it, as in scvi-tools
# A foreground that equals the background leaves open which of them a count is of. This much says: background.
_BACKGROUND_IF_ALIKE = 1e-3


@dataclass(frozen=True)
class Config:
    """Options of totalVI; keyword arguments of ``tl.fit(adata, model="totalvi")``."""

    n_hidden: int = 256
    n_latent: int = 20
    n_layers: int = 1
    n_layers_encoder: int | None = None
    dropout_rate_decoder: float = 0.0  # the default plan is short: dropout delays more there than it guards
    dropout_rate_encoder: float = 0.1
    gene_dispersion: Literal["gene", "gene-batch", "gene-label"] = "gene"
    protein_dispersion: Literal["protein", "protein-batch", "protein-label"] = "protein"
    log_variational: bool = True
    reconstruction_loss_gene: Literal["nb", "zinb"] = "nb"
    latent_distribution: Literal["normal", "ln"] = "normal"
    library: Literal["observed", "latent", "size_factor"] = "observed"
    encode_covariates: bool = True
    protein_background: Literal["empirical", "learned"] = "empirical"
    protein_efficiency: bool = False
    protein_weight: float = 1.0
    adversarial_classifier: Literal["auto", "on", "off"] = "auto"
    use_batch_norm: Literal["encoder", "decoder", "both", "none"] = "both"
    use_layer_norm: Literal["encoder", "decoder", "both", "none"] = "none"


def needs(config: Config) -> frozenset[str]:
    """The optional columns of a minibatch that this configuration reads."""
    by_label = config.gene_dispersion == "gene-label" or config.protein_dispersion == "protein-label"
    columns = {"protein": True, "labels": by_label, "size_factor": config.library == "size_factor"}
    return frozenset(name for name, wanted in columns.items() if wanted)


class TOTALVI(CountVAE):
    """The torch module of totalVI.

    Parameters
    ----------
    n_input_genes, n_input_proteins
        Numbers of genes and proteins.
    n_batch, n_labels
        Numbers of batches and labels; 0 where there are none.
    n_hidden, n_latent, n_layers
        Units of a hidden layer, units of the latent space, hidden layers of each network.
    dropout_rate_decoder, dropout_rate_encoder
        Dropout in the networks of decoder and encoder.
    gene_dispersion, protein_dispersion
        Inverse dispersion of each gene and protein, also by batch or label.
    log_variational
        Encode log(1 + counts), of counts divided by 1 + their mean in the cell.
    reconstruction_loss_gene
        ``"nb"`` or ``"zinb"``.
    latent_distribution
        ``"normal"``, or ``"ln"`` (logistic normal: z is the softmax of a normal variable).
    n_layers_encoder
        Hidden layers of the encoder where they are to be others than those of the decoder.
    library
        ``"latent"``, ``"observed"`` or ``"size_factor"``, as in scVI.
    encode_covariates
        Whether batch and covariates enter the encoder, if there are any.
    protein_background
        Where the prior of the background starts: ``"empirical"`` (``background_means`` and ``background_scales``), or
        ``"learned"`` from the same for all.
    protein_efficiency
        Whether the counts of each protein have a factor of their own in each batch, which denoised values leave out.
    protein_weight
        Of the likelihood of the proteins in what is minimised. (In the ELBO it is 1.)
    adversarial_classifier
        Whether z shall not tell batches to a critic: ``"auto"`` where they have measured different proteins.
    n_cats_per_cov, n_continuous_cov
        Categories of each categorical covariate, number of continuous covariates.
    use_batch_norm, use_layer_norm
        Where to normalise: ``"encoder"``, ``"decoder"``, ``"both"`` or ``"none"``.
    library_log_means, library_log_vars
        Prior of a latent log library in each batch, shape (K,).
    protein_batch_mask
        Which proteins were measured in which batch, shape (K, P); all by default.
    background_means, background_scales
        Mean and standard deviation of the log background to start from, shape (K, P).

    Raises
    ------
    ValueError
        For an unknown value, or an option that would have no effect in this combination.
    """

    def __init__(
        self,
        n_input_genes: int,
        n_input_proteins: int,
        n_batch: int = 0,
        n_labels: int = 0,
        n_hidden: int = 256,
        n_latent: int = 20,
        n_layers: int = 1,
        dropout_rate_decoder: float = 0.2,
        dropout_rate_encoder: float = 0.2,
        gene_dispersion: str = "gene",
        protein_dispersion: str = "protein",
        log_variational: bool = True,
        reconstruction_loss_gene: str = "nb",
        latent_distribution: str = "ln",
        *,
        n_layers_encoder: int | None = None,
        library: str = "latent",
        encode_covariates: bool = True,
        protein_background: str = "empirical",
        protein_efficiency: bool = False,
        protein_weight: float = 1.0,
        adversarial_classifier: str = "auto",
        n_cats_per_cov: Sequence[int] = (),
        n_continuous_cov: int = 0,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        library_log_means: Sequence[float] = (),
        library_log_vars: Sequence[float] = (),
        protein_batch_mask: Sequence[Sequence[bool]] = (),
        background_means: Sequence[Sequence[float]] = (),
        background_scales: Sequence[Sequence[float]] = (),
    ):
        one_of("gene_dispersion", gene_dispersion, ("gene", "gene-batch", "gene-label"))
        one_of("protein_dispersion", protein_dispersion, ("protein", "protein-batch", "protein-label"))
        one_of("reconstruction_loss_gene", reconstruction_loss_gene, ("nb", "zinb"))
        one_of("protein_background", protein_background, ("empirical", "learned"))
        one_of("adversarial_classifier", adversarial_classifier, ("auto", "on", "off"))
        dispersions = {"gene_dispersion": gene_dispersion, "protein_dispersion": protein_dispersion}
        _check(n_input_proteins, n_batch, n_labels, dispersions, adversarial_classifier)
        dropout = {"dropout_rate_encoder": dropout_rate_encoder, "dropout_rate_decoder": dropout_rate_decoder}
        _check_numbers(n_layers_encoder, dropout, protein_weight)
        super().__init__(
            n_input_genes,
            n_batch,
            n_labels,
            n_hidden,
            n_latent,
            n_layers if n_layers_encoder is None else n_layers_encoder,
            dropout_rate_encoder,
            gene_dispersion,
            log_variational,
            reconstruction_loss_gene,
            latent_distribution=latent_distribution,
            library=library,
            n_cats_per_cov=n_cats_per_cov,
            n_continuous_cov=n_continuous_cov,
            encode_covariates=encode_covariates and (n_batch > 1 or bool(n_cats_per_cov) or n_continuous_cov > 0),
            use_batch_norm=use_batch_norm,
            use_layer_norm=use_layer_norm,
            library_log_means=library_log_means,
            library_log_vars=library_log_vars,
            n_dense_input=n_input_proteins,
        )
        self.protein_weight = protein_weight
        self.decoder = DecoderTOTALVI(
            n_latent + self.covariates.n_dense,
            n_input_genes,
            n_input_proteins,
            self.covariates.n_cat_list,
            n_layers,
            n_hidden,
            dropout_rate_decoder,
            scale_activation=self.heads["scale_activation"],
            zero_inflation=self.heads["zero_inflation"],
            use_batch_norm=use_batch_norm in ("decoder", "both"),
            use_layer_norm=use_layer_norm in ("decoder", "both"),
        )
        self.protein_dispersion = Dispersion(protein_dispersion, n_input_proteins, n_batch, n_labels)
        shape = (max(n_batch, 1), n_input_proteins)
        mask = torch.as_tensor(protein_batch_mask) if len(protein_batch_mask) else torch.ones(shape, dtype=torch.bool)
        complete = all(all(measured) for measured in protein_batch_mask)
        self.register_buffer("protein_batch_mask", mask)
        if protein_background == "learned" or not len(background_means):
            means, scales = torch.full(shape, _UNMEASURED_START), torch.ones(shape)
        else:
            means, scales = torch.tensor(background_means), torch.tensor(background_scales)
        self.background_mean = nn.Parameter(means)
        self.decoder.start_background((means * mask).sum(0) / mask.sum(0).clamp(min=1))
        self.background_log_scale = nn.Parameter(torch.log(scales))
        self.log_efficiency = nn.Parameter(torch.zeros(shape)) if protein_efficiency else None
        watched = adversarial_classifier == "on" or (adversarial_classifier == "auto" and not complete)
        self.critic = None
        if watched and n_batch > 1:
            self.critic = Classifier(n_latent, 32, n_batch, 2, logits=True, use_batch_norm=False)

    def loss(self, cells: Minibatch, kl_weight: Tensor | float = 1.0, noise: Tensor | None = None) -> Loss:
        """The negative ELBO (Gayoso et al. 2021, methods), its KL to the priors of z and beta by ``kl_weight``."""
        qz, ql = posteriors = self.posteriors(cells)
        z, log_library = self.draw(cells, posteriors, noise)
        z = self.transform_z(z)
        py = self.decode_protein(z, cells)
        log_background = self._draw_background(py, noise)

        of_genes = -self.log_px(z, cells, log_library)  # (B,)
        of_proteins = -self.log_py(py, cells, log_background)  # (B,)
        kl_z = kl_standard_normal(qz)  # (B,)
        kl_background = (self._measured(cells) * normal_divergences(py.background, self.prior(cells))).sum(-1)  # (B,)
        kl_library = self.library.kl(ql, cells)  # (B,)
        total = of_genes + self.protein_weight * of_proteins + kl_library + kl_weight * (kl_z + kl_background)
        total = total.mean() + self._preferences(py, cells)
        if self.critic is not None and self.training:
            total = total + adversarial_loss(self.critic, z, cells.batch_index, 1 - kl_weight)
        return Loss(total, of_genes + of_proteins, kl_z + kl_background, kl_library)

    def decode_protein(self, z: Tensor, cells: Minibatch) -> ProteinExpression:
        """p(y | z, beta) and q(beta | z) at the covariates of ``cells``; z is transformed, (B, L) or (S, B, L).

        The background does not include the efficiency of a batch.
        """
        background, log_ratio, mixing = self.decoder.proteins(*self._decoder_input(z, cells))
        return ProteinExpression(background, log_ratio, torch.exp(self.protein_dispersion(cells)), mixing)

    def log_py(self, py: ProteinExpression, cells: Minibatch, log_background: Tensor) -> Tensor:
        """log p(y | z, beta) of the proteins that were measured in each cell, shape (B,) or (S, B)."""
        if self.log_efficiency is not None:
            log_background = log_background + self.log_efficiency[cells.batch_index]
        return mixture.log_likelihood(
            cells.protein,
            self._measured(cells),
            log_background,
            py.log_ratio,
            self.protein_dispersion(cells),
            py.mixing_logits,
        )

    def prior(self, cells: Minibatch) -> Posterior:
        """p(log beta) in the batch of each cell, shape (B, P)."""
        scale = torch.exp(self.background_log_scale)
        return Posterior(self.background_mean[cells.batch_index], scale[cells.batch_index])

    def _measured(self, cells: Minibatch) -> Tensor:
        return self.protein_batch_mask[cells.batch_index]  # (B, P)

    def _draw_background(self, py: ProteinExpression, noise: Tensor | None) -> Tensor:
        """A sample of q(log beta | z), shape (B, P)."""
        return sample_normal(py.background, None if noise is None else noise[:, self.n_latent : -1])

    def _preferences(self, py: ProteinExpression, cells: Minibatch) -> Tensor:
        """What is minimised beside the ELBO, where that leaves something open."""
        alike = _BACKGROUND_IF_ALIKE * softplus(-py.mixing_logits).sum(-1).mean()
        if self.log_efficiency is None:
            return alike
        return alike + 0.5 * (self.log_efficiency[cells.batch_index] ** 2).sum(-1).mean()  # log N(0, 1) of each factor

    def _encoder_input(self, cells: Minibatch) -> EncoderInput:
        measured = torch.where(self._measured(cells), cells.protein, 0.0)
        x, y = (counts / (1 + counts.mean(-1, keepdim=True)) for counts in (cells.x, measured))
        if self.log_variational:
            x, y = x.log1p(), y.log1p()
        if not self.encode_covariates:
            return EncoderInput(x, y)
        return EncoderInput(x, self.covariates.append(y, cells), tuple(self.covariates.codes(cells)))

    # ---- what the read-outs ask ------------------------------------------------------------------------------------

    @property
    def n_noise(self) -> int:
        """Standard normal draws that one posterior sample of a cell takes: for z, the background and the library."""
        return self.n_latent + self.protein_batch_mask.shape[1] + 1

    def log_weight(
        self, cells: Minibatch, posteriors: tuple[Posterior, Posterior | None], noise: Tensor | None = None
    ) -> Tensor:
        """log p(x, y, z, beta, l) - log q(z, beta, l | x, y) at one posterior sample, shape (B,)."""
        if noise is None:
            noise = torch.randn(len(cells.batch_index), self.n_noise, device=cells.batch_index.device)
        z, _ = self.draw(cells, posteriors, noise)
        py = self.decode_protein(self.transform_z(z), cells)
        log_background = self._draw_background(py, noise)
        log_p, log_q = (log_normal(log_background, p.loc, p.scale) for p in (self.prior(cells), py.background))
        of_background = (self._measured(cells) * (log_p - log_q)).sum(-1)
        return super().log_weight(cells, posteriors, noise) + self.log_py(py, cells, log_background) + of_background

    # ---- the seed's vocabulary (scVI 0.5.0): x counts of genes (B, G), y of proteins (B, P) -------------------------

    def get_latents(self, x: Tensor, y: Tensor, batch_index: Tensor | None = None) -> list[Tensor]:
        """A list with one sample of z, shape (B, L)."""
        return [self.sample_from_posterior_z(x, y, batch_index)]

    def sample_from_posterior_z(
        self,
        x: Tensor,
        y: Tensor,
        batch_index: Tensor | None = None,
        give_mean: bool = False,
        n_samples: int = 5000,
    ) -> Tensor:
        """One sample of q(z | x, y), or its mean (of a logistic normal, over so many samples), shape (B, L)."""
        qz = self.encode(self._both(x, y, batch_index))
        if not give_mean:
            return self.transform_z(sample_normal(qz))
        if self.latent_distribution == "normal":
            return qz.loc
        return self.mean_z(qz, torch.randn(len(x), n_samples, self.n_latent, device=x.device))

    def sample_from_posterior_l(
        self, x: Tensor, y: Tensor, batch_index: Tensor | None = None, give_mean: bool = True
    ) -> Tensor:
        """The mean of the log library size of the genes, or a sample of it, or the known one, shape (B, 1)."""
        cells = self._both(x, y, batch_index)
        ql = self.encode_library(cells)
        if ql is None:
            return self.library.point(cells)
        return ql.loc if give_mean else sample_normal(ql)

    def get_sample_dispersion(
        self,
        x: Tensor,
        y: Tensor,
        batch_index: Tensor | None = None,
        label: Tensor | None = None,
        n_samples: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Inverse dispersions of genes and of proteins."""
        outputs = self.inference(x, y, batch_index, label, n_samples)
        return outputs["px_"]["r"], outputs["py_"]["r"]

    def get_sample_rate(
        self,
        x: Tensor,
        y: Tensor,
        batch_index: Tensor | None = None,
        label: Tensor | None = None,
        n_samples: int = 1,
    ) -> Tensor:
        """Mean counts of the genes at posterior samples, shape (B, G), or (S, B, G) for more than one sample."""
        return self.inference(x, y, batch_index, label, n_samples)["px_"]["rate"]

    def get_sample_scale(
        self,
        x: Tensor,
        y: Tensor,
        batch_index: Tensor | None = None,
        label: Tensor | None = None,
        n_samples: int = 1,
        transform_batch: int | None = None,
    ) -> Tensor:
        """Normalised expression of genes, and foreground of proteins as a share, side by side: (B, G + P)."""
        outputs = self.inference(x, y, batch_index, label, n_samples, transform_batch)
        return torch.cat([outputs["px_"]["scale"], outputs["py_"]["scale"]], dim=-1)

    def scale_from_z(self, x: Tensor, y: Tensor, fixed_batch: int) -> Tensor:
        """The same, had the cells been seen in batch ``fixed_batch``; they are encoded as of the first batch."""
        return self.get_sample_scale(x, y, torch.zeros(len(x), device=x.device), transform_batch=fixed_batch)

    def inference(
        self,
        x: Tensor,
        y: Tensor,
        batch_index: Tensor | None = None,
        label: Tensor | None = None,
        n_samples: int = 1,
        transform_batch: int | None = None,
    ) -> dict[str, dict[str, Tensor | None] | Tensor | None]:
        """Posteriors, samples and decoded parameters under the seed's names.

        ``px_`` (``scale``, ``r``, ``rate``, ``dropout``) and ``py_`` (``back_alpha``, ``back_beta``, ``rate_back``,
        ``fore_scale``, ``rate_fore``, ``mixing``, ``scale``, ``r``) at the samples ``z`` and ``library_gene`` (a log);
        ``qz_m``, ``qz_v``, ``ql_m``, ``ql_v`` (None where the library is known). With ``n_samples > 1`` samples come
        first: (S, B, ...).
        """
        cells = self._both(x, y, batch_index, label)
        qz, ql = self.posteriors(cells)
        lead = (n_samples,) if n_samples > 1 else ()
        untransformed = sample_normal(qz, torch.randn(*lead, *qz.loc.shape, device=x.device))
        z = self.transform_z(untransformed)
        if ql is None:
            log_library = self.library.point(cells).expand(*lead, -1, -1)
        else:
            log_library = sample_normal(ql, torch.randn(*lead, *ql.loc.shape, device=x.device))
        cells = cells if transform_batch is None else self._in_batch(cells, transform_batch)
        z_and_dense, *codes = self._decoder_input(z, cells)
        px, py, _ = self.decoder(z_and_dense, torch.exp(log_library), *codes)
        px["r"] = torch.exp(self.dispersion(cells))
        py["r"] = torch.exp(self.protein_dispersion(cells))
        return {
            "px_": px,
            "py_": py,
            "qz_m": qz.loc,
            "qz_v": qz.scale**2,
            "z": z,
            "untran_z": untransformed,
            "ql_m": None if ql is None else ql.loc,
            "ql_v": None if ql is None else ql.scale**2,
            "library_gene": log_library,
        }

    def get_reconstruction_loss(
        self, x: Tensor, y: Tensor, px_: dict[str, Tensor], py_: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """-log p of genes and of all proteins from the decoded parameters of :meth:`inference`, shape (B,) each."""
        of_genes = self.log_likelihood(x, Expression(px_["scale"], px_["rate"], px_["r"], px_["dropout"]))
        of_proteins = log_mixture_nb(y, py_["rate_back"], py_["rate_fore"], py_["r"], None, py_["mixing"]).sum(-1)
        return -of_genes, -of_proteins

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        local_l_mean_gene: Tensor | None = None,
        local_l_var_gene: Tensor | None = None,
        batch_index: Tensor | None = None,
        label: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Reconstruction of genes and of proteins, KL of z, of the library and of the background: (B,) each.

        ``local_l_mean_gene`` and ``local_l_var_gene`` are mean and variance of the prior of the log library, shape
        (B, 1), in place of the one the module holds.
        """
        cells = self._both(x, y, batch_index, label)
        qz, ql = posteriors = self.posteriors(cells)
        z, log_library = self.draw(cells, posteriors)
        z = self.transform_z(z)
        py = self.decode_protein(z, cells)
        kl_background = (self._measured(cells) * normal_divergences(py.background, self.prior(cells))).sum(-1)
        return (
            -self.log_px(z, cells, log_library),
            -self.log_py(py, cells, self._draw_background(py, None)),
            kl_standard_normal(qz),
            self._kl_library(ql, cells, local_l_mean_gene, local_l_var_gene),
            kl_background,
        )

    def _both(self, x: Tensor, y: Tensor, batch_index: Tensor | None = None, label: Tensor | None = None) -> Minibatch:
        return self._cells(x, batch_index, label)._replace(protein=y)


def _check(
    n_proteins: int, n_batch: int, n_labels: int, dispersions: Mapping[str, str], adversarial_classifier: str
) -> None:
    if n_proteins < 1:
        msg = "totalVI needs proteins: register their counts with pp.setup_anndata(adata, protein_obsm_key=...)."
        raise ValueError(msg)
    for option, kind in dispersions.items():
        if kind.endswith("-label") and n_labels < 1:
            msg = f"{option}={kind!r} needs labels: register them with pp.setup_anndata(adata, labels_key=...)."
            raise ValueError(msg)
    if adversarial_classifier == "on" and n_batch < 2:
        msg = "adversarial_classifier='on' has no effect: there is one batch, and nothing to tell from it."
        raise ValueError(msg)


def _check_numbers(n_layers_encoder: int | None, dropout_rates: Mapping[str, float], protein_weight: float) -> None:
    if n_layers_encoder is not None and n_layers_encoder < 1:
        msg = f"n_layers_encoder={n_layers_encoder} must be 1 or more."
        raise ValueError(msg)
    for option, rate in dropout_rates.items():
        if not 0 <= rate < 1:
            msg = f"{option}={rate} must be at least 0 and below 1."
            raise ValueError(msg)
    if not 0 < protein_weight < math.inf:
        msg = f"protein_weight={protein_weight} must be positive and finite."
        raise ValueError(msg)


SPEC = ModelSpec(
    name="totalvi",
    module=TOTALVI,
    config=Config,
    needs=needs,
    capabilities=frozenset({Capability.COUNTS, Capability.PROTEIN}),
    reference="Gayoso et al. (2021), Joint probabilistic modeling of single-cell multi-omic data with totalVI, "
    "Nature Methods.",
    peak_lr=3e-2,
    effort=13.0,
    most_epochs=100,  # to impute what a batch has not measured, batches have to come together, however few the cells
)
