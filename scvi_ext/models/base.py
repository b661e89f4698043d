"""The abstract count VAE: encoding, decoding and the seed's vocabulary, written once.

A model builds its parts in ``__init__`` and writes out its ``loss``; everything here is in terms of those.

Legend: ``B`` cells in the minibatch, ``G`` genes, ``L`` latent units, ``K`` batches, ``C`` labels, ``S`` samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from scvi_ext._contract import Expression, Loss, Minibatch, Posterior
from scvi_ext._errors import number, one_of
from scvi_ext.functional import fused
from scvi_ext.functional.counts import LIKELIHOODS
from scvi_ext.functional.divergences import kl_normal, kl_standard_normal, log_density
from scvi_ext.functional.sampling import sample_normal
from scvi_ext.kernels.sparse import SparseRows
from scvi_ext.nn.classifier import Classifier
from scvi_ext.nn.covariates import Covariates
from scvi_ext.nn.decoders import DISPERSIONS
from scvi_ext.nn.dispersion import Dispersion
from scvi_ext.nn.encoders import Encoder, EncoderInput
from scvi_ext.nn.library import SizeFactorLibrary, make_library

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

_WITH_THETA = frozenset({"zinb", "nb", "normal"})
_LOGISTIC_NORMAL_SAMPLES = 5000  # for the mean of softmax(N), which has no closed form


@dataclass(frozen=True)
class CountConfig:
    """Options that every count VAE has: keyword arguments of ``tl.fit``."""

    n_hidden: int = 128
    n_latent: int = 10
    n_layers: int = 1
    dropout_rate: float = 0.1
    dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene"
    log_variational: bool = True
    reconstruction_loss: Literal["zinb", "nb", "poisson", "normal", "bernoulli"] = "zinb"
    latent_distribution: Literal["normal", "ln"] = "normal"
    library: Literal["observed", "latent", "size_factor"] = "observed"
    encode_covariates: bool = False
    deeply_inject_covariates: bool = True
    batch_representation: Literal["one-hot", "embedding"] = "one-hot"
    use_batch_norm: Literal["encoder", "decoder", "both", "none"] = "both"
    use_layer_norm: Literal["encoder", "decoder", "both", "none"] = "none"


def needs(config: CountConfig) -> frozenset[str]:
    """The optional columns of a minibatch that this configuration reads."""
    columns = {"labels": config.dispersion == "gene-label", "size_factor": config.library == "size_factor"}
    return frozenset(name for name, wanted in columns.items() if wanted)


def batch_critic(adversarial_mixing: float, n_latent: int, n_batch: int) -> Classifier | None:
    """What watches z and tells batches from it, where z is trained to tell as little as it can; else None.

    ``adversarial_mixing`` is the weight of that, beside the KL divergence of z; 0: no critic. Far above 10 the critic
    cannot follow, and there is less mixing rather than more.
    """
    weight = number("adversarial_mixing", adversarial_mixing)
    given = f"adversarial_mixing={adversarial_mixing!r}"
    _refuse(not 0 <= weight <= 100, f"{given} must be from 0 to 100.")
    if weight == 0:
        return None
    _refuse(n_batch < 2, f"{given} has no effect: there is one batch, and nothing to tell from it.")
    return Classifier(n_latent, 128, n_batch, 2, dropout_rate=0.0, logits=True, use_batch_norm=False)


class CountVAE(nn.Module, ABC):
    """A variational autoencoder of counts. A final class adds ``decoder`` and writes out its ``loss``.

    Parameters
    ----------
    n_input
        Number of genes.
    n_batch, n_labels
        Number of batches and labels; 0 where there are none.
    n_hidden, n_latent, n_layers
        Units of a hidden layer, units of the latent space, hidden layers.
    dropout_rate
        Dropout in the encoders.
    dispersion
        Inverse dispersion (for ``reconstruction_loss="normal"``: standard deviation) per gene, per gene and batch, per
        gene and label, or per gene and cell.
    log_variational
        Encode log(1 + counts) rather than counts.
    reconstruction_loss
        ``"zinb"``, ``"nb"``, ``"poisson"``, ``"normal"``, or ``"bernoulli"`` (detected or not: binary cross-entropy).
    latent_distribution
        ``"normal"``, or ``"ln"`` (logistic normal: z is the softmax of a normal variable).
    library
        ``"latent"`` (as in scVI 0.5.0: a normal prior of the log library in each batch), ``"observed"`` or
        ``"size_factor"``. With a size factor the scale is a softplus and does not sum to 1, as in scvi-tools.
    n_cats_per_cov, n_continuous_cov
        Categories of each categorical covariate, number of continuous covariates.
    encode_covariates
        Whether batch and covariates enter the encoders too.
    deeply_inject_covariates
        Whether categorical covariates enter every hidden layer, or only the first.
    batch_representation
        ``"one-hot"`` or ``"embedding"``.
    use_batch_norm, use_layer_norm
        Where to normalise: ``"encoder"``, ``"decoder"``, ``"both"`` or ``"none"``.
    library_log_means, library_log_vars
        Prior of a latent log library in each batch, shape (K,).
    n_dense_input
        Columns that the encoders see beside the genes, other than covariates.

    Raises
    ------
    ValueError
        For an unknown value, or an option that would have no effect in this combination.
    """

    decoder: nn.Module

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
        latent_distribution: str = "normal",
        library: str = "latent",
        n_cats_per_cov: Sequence[int] = (),
        n_continuous_cov: int = 0,
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        batch_representation: str = "one-hot",
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        library_log_means: Sequence[float] = (),
        library_log_vars: Sequence[float] = (),
        n_dense_input: int = 0,
    ):
        super().__init__()
        one_of("dispersion", dispersion, DISPERSIONS)
        one_of("reconstruction_loss", reconstruction_loss, LIKELIHOODS)
        one_of("latent_distribution", latent_distribution, ("normal", "ln"))
        one_of("library", library, ("observed", "latent", "size_factor"))
        one_of("batch_representation", batch_representation, ("one-hot", "embedding"))
        one_of("use_batch_norm", use_batch_norm, ("encoder", "decoder", "both", "none"))
        one_of("use_layer_norm", use_layer_norm, ("encoder", "decoder", "both", "none"))
        for name, size in {"n_hidden": n_hidden, "n_latent": n_latent, "n_layers": n_layers}.items():
            _refuse(size < 1, f"{name}={size} must be 1 or more.")
        _refuse(not 0 <= dropout_rate < 1, f"dropout_rate={dropout_rate} must be at least 0 and below 1.")
        with_theta = reconstruction_loss in _WITH_THETA
        _refuse(
            dispersion != "gene" and not with_theta,
            f"dispersion={dispersion!r} has no effect: reconstruction_loss={reconstruction_loss!r} has no dispersion.",
        )
        _refuse(
            dispersion == "gene-label" and n_labels < 1,
            "dispersion='gene-label' needs labels: register them with pp.setup_anndata(adata, labels_key=...).",
        )
        _refuse(
            encode_covariates and n_batch < 2 and not n_cats_per_cov and not n_continuous_cov,
            "encode_covariates=True has no effect: there is one batch and no covariate to encode.",
        )
        _refuse(
            not deeply_inject_covariates and n_layers == 1,
            "deeply_inject_covariates=False has no effect with n_layers=1: covariates enter the first layer anyway.",
        )
        _refuse(
            latent_distribution == "ln" and n_latent == 1,
            "latent_distribution='ln' leaves nothing to learn with n_latent=1: the softmax of one number is always 1.",
        )
        _refuse(
            batch_representation == "embedding" and n_batch < 2,
            "batch_representation='embedding' has no effect: there is only one batch.",
        )

        self.n_latent = n_latent
        self.log_variational = log_variational
        self.encode_covariates = encode_covariates
        self.latent_distribution = latent_distribution
        self.reconstruction_loss = reconstruction_loss
        self.likelihood = LIKELIHOODS[reconstruction_loss]
        self.heads = {
            "scale_activation": "softplus" if library == "size_factor" else "softmax",
            "gene_cell": with_theta and dispersion == "gene-cell",
            "zero_inflation": reconstruction_loss == "zinb",
        }

        self.covariates = Covariates(n_batch, n_cats_per_cov, n_continuous_cov, batch_representation)
        _refuse(
            not deeply_inject_covariates and max(self.covariates.n_cat_list, default=0) < 2,
            "deeply_inject_covariates=False has no effect: there is no one-hot covariate to leave out of later layers.",
        )

        def encoder(n_output: int, n_layers: int) -> Encoder:
            return Encoder(
                n_input + n_dense_input + (self.covariates.n_dense if encode_covariates else 0),
                n_output,
                self.covariates.n_cat_list if encode_covariates else None,
                n_layers,
                n_hidden,
                dropout_rate,
                use_batch_norm=use_batch_norm in ("encoder", "both"),
                use_layer_norm=use_layer_norm in ("encoder", "both"),
                inject_covariates=deeply_inject_covariates,
            )

        self.z_encoder = encoder(n_latent, n_layers)
        self.library = make_library(library, lambda: encoder(1, 1), library_log_means, library_log_vars)
        shared_theta = with_theta and dispersion != "gene-cell"
        self.dispersion = Dispersion(dispersion, n_input, n_batch, n_labels) if shared_theta else None

    # ---- the contract --------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, cells: Minibatch, kl_weight: Tensor | float = 1.0, noise: Tensor | None = None) -> Loss:
        """The negative ELBO with its parts, at one posterior sample (made from ``noise`` where given)."""

    def encode(self, cells: Minibatch) -> Posterior:
        """q(z | x) before :meth:`transform_z`, shape (B, L)."""
        return self.z_encoder.of(self._encoder_input(cells))

    def encode_library(self, cells: Minibatch) -> Posterior | None:
        """q(l | x), shape (B, 1), or None where the library is observed or given."""
        return self.library.posterior(cells, self._encoder_input(cells))

    def transform_z(self, z: Tensor) -> Tensor:
        """From the normal variable to the one that is decoded: itself, or its softmax for a logistic normal."""
        return torch.softmax(z, dim=-1) if self.latent_distribution == "ln" else z

    def decode(
        self, z: Tensor, cells: Minibatch, log_library: Tensor | None = None, shared: Tensor | None = None
    ) -> Expression:
        """p(x | z, l) at the covariates of ``cells``.

        Parameters
        ----------
        z
            Transformed latent variable, shape (B, L) or (S, B, L).
        cells
            Give batch and covariates (and the counts, where the library is observed).
        log_library
            Shape (B, 1) or (S, B, 1); None takes the observed or given one, or the mean of q(l | x).
        shared
            A draw of what all cells share, see :meth:`draw_shared`; None takes its mean, if there is such a thing.
        """
        if log_library is None:
            ql = self.encode_library(cells)
            log_library = self.library.point(cells) if ql is None else ql.loc
        logits, log_theta, dropout_logits = self._heads(z, cells, shared)
        scale = self.decoder.scale_activation(logits)
        theta = None if log_theta is None else torch.exp(log_theta)
        return Expression(scale, torch.exp(log_library) * scale, theta, dropout_logits)

    def scale(self, z: Tensor, cells: Minibatch) -> Tensor:
        """The normalised profile alone, what :meth:`decode` calls ``scale``: (B, G) or (S, B, G)."""
        return self.decoder.scale(*self._decoder_input(z, self.with_labels(cells)))

    def log_likelihood(self, x: Tensor | SparseRows, px: Expression) -> Tensor:
        """log p(x | z, l) of each cell: the sum over genes, shape (B,) or (S, B)."""
        return self.likelihood(x.to_dense(), px).sum(-1)

    def log_px(self, z: Tensor, cells: Minibatch, log_library: Tensor, shared: Tensor | None = None) -> Tensor:
        """The same from z and the log library: by a fused kernel where there is one, else through :meth:`decode`.

        Kernels of the processor take sparse rows only.
        """
        kernel, _ = fused.choose(self.reconstruction_loss, z.device.type, z.dtype)
        if kernel is None or (z.device.type == "cpu" and not isinstance(cells.x, SparseRows)):
            return self.log_likelihood(cells.x, self.decode(z, cells, log_library, shared))
        logits, log_theta, dropout_logits = self._heads(z, cells, shared)
        return fused.log_likelihood(
            kernel, cells.x, self.decoder.softmax, logits, log_library, log_theta, dropout_logits
        )

    def _heads(
        self, z: Tensor, cells: Minibatch, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the decoder says before any activation, log theta taken from where it is: (B, G) or (G,) each."""
        cells = self.with_labels(cells)
        logits, log_theta, dropout_logits = self.decoder.heads(*self._decoder_input(z, cells))
        return logits, log_theta if self.dispersion is None else self.dispersion(cells), dropout_logits

    def _decoder_input(self, z: Tensor, cells: Minibatch) -> tuple[Tensor, ...]:
        return (self.covariates.append(z, cells), *self.covariates.codes(cells))

    def with_labels(self, cells: Minibatch) -> Minibatch:
        """The cells as they are; a model that infers labels fills in those that are missing, if it decodes by them."""
        return cells

    @property
    def profile_sees_batch(self) -> bool:
        """Whether the normalised profile of genes depends on the batch."""
        return True

    @property
    def likelihoods(self) -> tuple[str, ...]:
        """Names of all likelihoods of counts that it is trained with."""
        return (self.reconstruction_loss,)

    @property
    def has_theta(self) -> bool:
        """Whether the likelihood of the cells has a dispersion."""
        return self.reconstruction_loss in _WITH_THETA

    @property
    def genes(self) -> Tensor | None:
        """Positions of the genes of the cells among those of the parameters; None where they are the same."""
        return None

    @property
    def encoders(self) -> nn.ModuleList:
        """The parts of q(z, l | x); all other parameters belong to the generative model."""
        return nn.ModuleList([self.z_encoder, self.library])

    @property
    def n_noise(self) -> int:
        """Standard normal draws that one posterior sample of a cell takes: L for z and one for the library."""
        return self.n_latent + 1

    def posteriors(self, cells: Minibatch) -> tuple[Posterior, Posterior | None]:
        """q(z | x) and q(l | x); the latter is None where the library is known."""
        encoder_input = self._encoder_input(cells)
        return self.z_encoder.of(encoder_input), self.library.posterior(cells, encoder_input)

    def draw(
        self, cells: Minibatch, posteriors: tuple[Posterior, Posterior | None], noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One posterior sample: z before the transformation, (B, L), and the log library, sampled or known, (B, 1).

        ``noise`` are standard normal draws of shape (B, n_noise); without them torch's generator is asked.
        """
        qz, ql = posteriors
        noise_z, noise_l = (None, None) if noise is None else (noise[:, : self.n_latent], noise[:, -1:])
        z = sample_normal(qz, noise_z)
        return z, self.library.point(cells) if ql is None else sample_normal(ql, noise_l)

    def draw_shared(self, rng: np.random.Generator | None = None) -> Tensor | None:
        """A posterior sample of the latent variables that all cells share, by torch's generator or ``rng``; or None."""
        return None

    def kl_shared(self) -> Tensor:
        """KL(q || p) of these, shape (); zero where there are none."""
        return torch.zeros((), device=next(self.parameters()).device)

    def log_weight(
        self,
        cells: Minibatch,
        posteriors: tuple[Posterior, Posterior | None],
        noise: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> Tensor:
        """log p(x, z, l) - log q(z, l | x) at one posterior sample, shape (B,): its exponential averages to p(x)."""
        qz, ql = posteriors
        z, log_library = self.draw(cells, posteriors, noise)
        prior = Posterior(torch.zeros_like(qz.loc), torch.ones_like(qz.scale))
        log_px = self.log_px(self.transform_z(z), cells, log_library, shared)
        log_weight = log_px + log_density(z, prior) - log_density(z, qz)
        if ql is not None:
            log_weight += log_density(log_library, self.library.prior(cells)) - log_density(log_library, ql)
        return log_weight

    def mean_z(self, qz: Posterior, noise: Tensor | None = None) -> Tensor:
        """E[z], shape (B, L): the location, or for a logistic normal the average over ``noise`` of shape (B, S, L)."""
        if self.latent_distribution == "normal":
            return qz.loc
        if noise is None:
            noise = torch.randn(qz.loc.shape[0], _LOGISTIC_NORMAL_SAMPLES, qz.loc.shape[1], device=qz.loc.device)
        return self.transform_z(qz.loc.unsqueeze(1) + qz.scale.unsqueeze(1) * noise).mean(1)

    def _encoder_input(self, cells: Minibatch) -> EncoderInput:
        x = cells.x.log1p() if self.log_variational else cells.x
        if not self.encode_covariates:
            return EncoderInput(x)
        return EncoderInput(x, self.covariates.dense(cells), tuple(self.covariates.codes(cells)))

    # ---- the seed's vocabulary (scVI 0.5.0): tensors in, tensors out -----------------------------------------------

    def get_latents(self, x: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """A list with one sample of z, shape (B, L)."""
        return [self.sample_from_posterior_z(x, y)]

    def sample_from_posterior_z(self, x: Tensor, y: Tensor | None = None, give_mean: bool = False) -> Tensor:
        """One sample of q(z | x), or its mean, shape (B, L). ``y`` is accepted for models whose z depends on it."""
        cells = self._cells(x, None, y, decoded=False)
        qz = self.encode(cells)
        return self.mean_z(qz) if give_mean else self.transform_z(sample_normal(qz))

    def sample_from_posterior_l(self, x: Tensor) -> Tensor:
        """One sample of the log library size, or the known one, shape (B, 1)."""
        cells = self._cells(x, decoded=False)
        ql = self.encode_library(cells)
        return self.library.point(cells) if ql is None else sample_normal(ql)

    def get_sample_scale(
        self,
        x: Tensor,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
        n_samples: int = 1,
        transform_batch: int | None = None,
    ) -> Tensor:
        """Normalised expression at posterior samples, shape (B, G), or (S, B, G) for more than one sample."""
        return self.inference(x, batch_index, y, n_samples, transform_batch)["px_scale"]

    def get_sample_rate(
        self,
        x: Tensor,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
        n_samples: int = 1,
        transform_batch: int | None = None,
    ) -> Tensor:
        """Mean counts at posterior samples, shape (B, G), or (S, B, G) for more than one sample."""
        return self.inference(x, batch_index, y, n_samples, transform_batch)["px_rate"]

    def scale_from_z(self, sample_batch: Tensor, fixed_batch: int) -> Tensor:
        """Normalised expression of the counts ``sample_batch`` (B, G), had they been seen in batch ``fixed_batch``."""
        cells = self._cells(sample_batch, decoded=False)
        z = self.transform_z(sample_normal(self.encode(cells)))
        fixed = self._in_batch(cells, fixed_batch)
        return self.scale(z, fixed)

    def inference(
        self,
        x: Tensor,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
        n_samples: int = 1,
        transform_batch: int | None = None,
    ) -> dict[str, Tensor | None]:
        """Posteriors, samples and decoded parameters under the seed's names.

        ``px_scale``, ``px_r``, ``px_rate``, ``px_dropout`` at the samples ``z`` and ``library`` (a log), the means and
        variances ``qz_m``, ``qz_v``, ``ql_m``, ``ql_v`` (None where the library is known). With ``n_samples > 1``
        samples come first: (S, B, ...).
        """
        cells = self._cells(x, batch_index, y, decoded=transform_batch is None)
        qz, ql = self.posteriors(cells)
        lead = (n_samples,) if n_samples > 1 else ()
        z = self.transform_z(sample_normal(qz, torch.randn(*lead, *qz.loc.shape, device=x.device)))
        if ql is None:
            log_library = self.library.point(cells).expand(*lead, -1, -1)
        else:
            log_library = sample_normal(ql, torch.randn(*lead, *ql.loc.shape, device=x.device))
        decoded_in = cells if transform_batch is None else self._in_batch(cells, transform_batch)
        px = self.decode(z, decoded_in, log_library)
        return {
            "px_scale": px.scale,
            "px_r": px.theta,
            "px_rate": px.rate,
            "px_dropout": px.dropout_logits,
            "qz_m": qz.loc,
            "qz_v": qz.scale**2,
            "z": z,
            "ql_m": None if ql is None else ql.loc,
            "ql_v": None if ql is None else ql.scale**2,
            "library": log_library,
        }

    def get_reconstruction_loss(
        self, x: Tensor, px_rate: Tensor, px_r: Tensor | None, px_dropout: Tensor | None, **outputs: Tensor | None
    ) -> Tensor:
        """-log p(x | z, l) from the decoded parameters (``px_r`` is theta, ``px_dropout`` logits), shape (B,).

        ``outputs`` are the other entries of :meth:`inference`, which may be handed over whole; they are not needed.
        """
        return -self.log_likelihood(x, Expression(px_rate, px_rate, px_r, px_dropout))

    def forward(
        self,
        x: Tensor,
        local_l_mean: Tensor | None = None,
        local_l_var: Tensor | None = None,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three slots of the seed's loss: reconstruction + KL of the library, KL of z, KL of what all cells share.

        Parameters
        ----------
        x
            Counts, shape (B, G).
        local_l_mean, local_l_var
            Mean and variance of the prior of the log library, shape (B, 1), in place of the one the module holds.
        batch_index, y
            Codes of batch and label, shape (B,) or (B, 1).

        Returns
        -------
        Shapes (B,), (B,) and ().
        """
        cells = self._cells(x, batch_index, y)
        qz, ql = posteriors = self.posteriors(cells)
        z, log_library = self.draw(cells, posteriors)
        reconstruction = -self.log_px(self.transform_z(z), cells, log_library, self.draw_shared())
        return (
            reconstruction + self._kl_library(ql, cells, local_l_mean, local_l_var),
            kl_standard_normal(qz),
            self.kl_shared(),
        )

    def _kl_library(
        self, ql: Posterior | None, cells: Minibatch, local_l_mean: Tensor | None, local_l_var: Tensor | None
    ) -> Tensor:
        if local_l_mean is None and local_l_var is None:
            return self.library.kl(ql, cells)
        if ql is None or local_l_mean is None or local_l_var is None:
            msg = (
                "local_l_mean and local_l_var are the prior of a latent library: give both, and only to a module "
                "built with library='latent'."
            )
            raise ValueError(msg)
        return kl_normal(ql, Posterior(local_l_mean.reshape(-1, 1), torch.sqrt(local_l_var).reshape(-1, 1)))

    def _cells(
        self, x: Tensor, batch_index: Tensor | None = None, y: Tensor | None = None, *, decoded: bool = True
    ) -> Minibatch:
        """A minibatch from the seed's loose tensors; ``decoded``: it will be decoded in the cells' own batches."""
        known = self.covariates
        _refuse(
            known.n_categorical or known.n_continuous or isinstance(self.library, SizeFactorLibrary),
            "This module has covariates or size factors: call encode, decode and loss with a Minibatch instead.",
        )
        _refuse(
            batch_index is None and known.n_batch > 1 and (decoded or self.encode_covariates),
            f"The batch of each cell is needed (n_batch={known.n_batch}): give batch_index, or call encode and decode "
            "with a Minibatch.",
        )
        if batch_index is None:
            batch_index = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        return Minibatch(x, batch_index.reshape(-1).long(), None if y is None else y.reshape(-1).long())

    def _in_batch(self, cells: Minibatch, batch: int) -> Minibatch:
        n_batch = max(self.covariates.n_batch, 1)
        _refuse(not 0 <= batch < n_batch, f"There is no batch {batch!r}: the module knows 0 to {n_batch - 1}.")
        return cells._replace(batch_index=torch.full_like(cells.batch_index, batch))


def _refuse(condition: object, msg: str) -> None:
    if condition:
        raise ValueError(msg)
