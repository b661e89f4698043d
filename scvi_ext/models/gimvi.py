r"""gimVI: several data sets with genes of their own, whose cells are of the same kinds (Lopez et al. 2019).

Generative process of cell n of data set m, for the genes :math:`G_m` that were measured there, out of all genes:

.. math::
    z_n &\sim N(0, I), \qquad h_n = f(z_n, s_n), \quad \rho_n = \mathrm{softmax}(W h_n + b) \\
    \rho_{ng}^m &= \rho_{ng} \Big/ \sum_{g' \in G_m} \rho_{ng'}, \qquad
    l_n \sim N(m_{batch}, v_{batch}) \text{ or the log of the total over } G_m \\
    x_{ng} &\sim \mathrm{ZINB}(e^{l_n} \rho_{ng}^m,\; \theta_{g,batch},\; \pi_{ng}) \text{ or NB or Poisson}

with a likelihood for each data set. Layers of f have a batch normalisation for each data set, that of the one that a
cell is decoded as; without layers f is the identity, and genes are linear in z but for the softmax. Inference network:
layers of each data set, then shared ones, :math:`q(z_n \mid x_n, m)`. A critic watches the means of z and tells data
sets from them; they are asked to leave it in the dark. Of a gene that was not measured in a cell, :math:`\rho_{ng}^m`
is the imputation.

Where we differ from scvi-tools: there are any number of data sets, none of which needs to have all genes; batch
normalisation of shared layers knows data sets apart when the model is used as it does in training; the critic sees
means of z rather than samples; the decoder has a layer by default; data sets are not changed by the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from scvi_ext._contract import Capability, Expression, Loss, Minibatch, ModelSpec, Posterior
from scvi_ext._errors import one_of
from scvi_ext.functional import ranks
from scvi_ext.functional.adversary import adversarial_loss
from scvi_ext.functional.counts import LIKELIHOODS
from scvi_ext.functional.divergences import kl_standard_normal
from scvi_ext.models.base import CountVAE
from scvi_ext.nn.classifier import Classifier
from scvi_ext.nn.covariates import Covariates
from scvi_ext.nn.dispersion import Dispersion
from scvi_ext.nn.encoders import Encoder
from scvi_ext.nn.library import make_library
from scvi_ext.nn.multi import MultiDecoder, MultiEncoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_DROPOUT_DECODER = 0.3  # of the seed, where the decoder has no layers to drop out of
# Standard deviation of the noise in what the critic sees: sharp points it could tell apart for ever. See benchmarks.
_BLUR = 0.5


@dataclass(frozen=True)
class Config:
    """Options of gimVI; keyword arguments of ``tl.fit({"rna": adata, "spatial": other}, model="gimvi")``."""

    reconstruction_losses: tuple[str, ...] | None = None
    model_library_bools: tuple[bool, ...] | None = None
    n_latent: int = 10
    n_layers_encoder_individual: int = 1
    n_layers_encoder_shared: int = 1
    dim_hidden_encoder: int = 128
    n_layers_decoder_individual: int = 0
    n_layers_decoder_shared: int = 1
    dim_hidden_decoder_individual: int = 32
    dim_hidden_decoder_shared: int = 128
    dropout_rate_encoder: float = 0.1
    dropout_rate_decoder: float = _DROPOUT_DECODER
    dispersion: Literal["gene", "gene-batch", "gene-cell"] = "gene-batch"
    log_variational: bool = True
    kappa: float = 1.0
    kappa_fades: bool = False
    fool_step: Literal["joint", "separate"] = "joint"


class JVAE(CountVAE):
    """The torch module of gimVI.

    Beside what it does for all data sets at once, it can do for one of them what any count VAE does for its cells: that
    of :attr:`mode`. Batches are numbered through all data sets.

    Parameters
    ----------
    dim_input_list
        Number of genes of each data set.
    total_genes
        Number of genes that any of them has.
    indices_mappings
        Of each data set, the positions of its genes among all.
    reconstruction_losses
        Of each data set ``"zinb"``, ``"nb"`` or ``"poisson"``.
    model_library_bools
        Of each data set, whether its library is a latent variable or the total of the counts.
    n_latent
        Units of the latent space.
    n_layers_encoder_individual, n_layers_encoder_shared, dim_hidden_encoder, dropout_rate_encoder
        Of the encoders.
    n_layers_decoder_individual, n_layers_decoder_shared, dim_hidden_decoder_individual, dim_hidden_decoder_shared, \
dropout_rate_decoder
        Of the decoder. Only its individual layers see the batch.
    n_batch, n_labels
        Numbers of batches and labels of all data sets together.
    dispersion
        Inverse dispersion per gene, per gene and batch, gene and label, or gene and cell.
    log_variational
        Encode log(1 + counts) rather than counts.
    library_log_means, library_log_vars
        Of each data set, the prior of a latent log library in each of all batches.
    kappa
        Weight of fooling the critic; with 0 there is no critic.
    kappa_fades
        Whether that weight falls to zero while that of the divergences rises.
    fool_step
        ``"joint"``: the critic is fooled in the step that raises the ELBO. ``"separate"``: in one before it, as in
        scVI 0.5.
    mode
        The data set whose cells are spoken of where none is named.

    Raises
    ------
    ValueError
        For an unknown value, or an option that would have no effect in this combination.
    """

    def __init__(
        self,
        dim_input_list: Sequence[int],
        total_genes: int,
        indices_mappings: Sequence[Sequence[int] | slice],
        reconstruction_losses: Sequence[str],
        model_library_bools: Sequence[bool],
        n_latent: int = 10,
        n_layers_encoder_individual: int = 1,
        n_layers_encoder_shared: int = 1,
        dim_hidden_encoder: int = 128,
        n_layers_decoder_individual: int = 0,
        n_layers_decoder_shared: int = 0,
        dim_hidden_decoder_individual: int = 32,
        dim_hidden_decoder_shared: int = 128,
        dropout_rate_encoder: float = 0.1,
        dropout_rate_decoder: float = _DROPOUT_DECODER,
        n_batch: int = 0,
        n_labels: int = 0,
        dispersion: str = "gene-batch",
        log_variational: bool = True,
        *,
        library_log_means: Sequence[Sequence[float]] = (),
        library_log_vars: Sequence[Sequence[float]] = (),
        kappa: float = 1.0,
        kappa_fades: bool = False,
        fool_step: str = "joint",
        mode: int | None = None,
    ):
        nn.Module.__init__(self)  # its parts are those of several data sets
        n_heads = len(dim_input_list)
        genes = _positions(indices_mappings, dim_input_list, total_genes)
        _check_each(n_heads, reconstruction_losses, model_library_bools)
        one_of("dispersion", dispersion, ("gene", "gene-batch", "gene-label", "gene-cell"))
        one_of("fool_step", fool_step, ("joint", "separate"))
        with_theta = any(likelihood != "poisson" for likelihood in reconstruction_losses)
        _refuse(
            dispersion not in ("gene", "gene-batch") and not with_theta,
            f"dispersion={dispersion!r} has no effect: no data set has a dispersion.",
        )
        _refuse(
            dispersion == "gene-label" and n_labels < 1,
            "dispersion='gene-label' needs labels, and data sets need not have the same ones: tl.fit knows none of "
            "them. Take another dispersion, or give the module n_labels.",
        )
        _check_numbers(locals())
        _check_critic(kappa, kappa_fades, fool_step, n_heads)

        self.mode = 0 if n_heads == 1 else mode
        self.n_latent, self.log_variational, self.latent_distribution = n_latent, log_variational, "normal"
        self.encode_covariates = False
        self.kappa, self.kappa_fades, self.fools_before = kappa, kappa_fades, fool_step == "separate"
        self.reconstruction_losses = tuple(reconstruction_losses)
        self.total_genes, self.n_labels = total_genes, n_labels
        self.has_all = [np.array_equal(positions, np.arange(total_genes)) for positions in genes]
        for i, positions in enumerate(genes):
            self.register_buffer(f"genes_{i}", torch.as_tensor(positions))
        self.covariates = Covariates(n_batch, (), 0, "one-hot")
        self.encoder = MultiEncoder(
            n_heads,
            dim_input_list,
            n_latent,
            dim_hidden_encoder,
            n_layers_encoder_individual,
            n_layers_encoder_shared,
            dropout_rate=dropout_rate_encoder,
        )
        means, variances = library_log_means or ((),) * n_heads, library_log_vars or ((),) * n_heads
        self.libraries = nn.ModuleList(
            make_library(
                "latent" if latent else "observed",
                lambda n=n: Encoder(n, 1, n_layers=1, dropout_rate=dropout_rate_encoder),
                means[i],
                variances[i],
            )
            for i, (n, latent) in enumerate(zip(dim_input_list, model_library_bools, strict=True))
        )
        self.decoder = MultiDecoder(
            n_latent,
            total_genes,
            dim_hidden_decoder_individual,
            dim_hidden_decoder_shared,
            n_layers_decoder_individual,
            n_layers_decoder_shared,
            [n_batch],
            dropout_rate_decoder,
            n_heads=n_heads,
            gene_cell=with_theta and dispersion == "gene-cell",
            zero_inflation="zinb" in reconstruction_losses,
        )
        shared_theta = with_theta and dispersion != "gene-cell"
        self.dispersion = Dispersion(dispersion, total_genes, n_batch, n_labels) if shared_theta else None
        self.critic = None
        if kappa > 0 and n_heads > 1:
            self.critic = Classifier(n_latent, 32, n_heads, 3, logits=True, use_batch_norm=False)

    def loss(self, *datasets: Minibatch | None, kl_weight: Tensor | float = 1.0, noise: Tensor | None = None) -> Loss:
        """The negative ELBO (Lopez et al. 2019) of cells of every data set, None where there are none of it.

        All its divergences are weighted by ``kl_weight``. Of one minibatch alone it is that of :attr:`mode`.
        """
        if len(datasets) == 1:
            return self._loss([(self._known_mode(), datasets[0])], kl_weight, noise)
        return self._loss([(m, cells) for m, cells in enumerate(datasets) if cells is not None], kl_weight, noise)

    def _loss(self, parts: list[tuple[int, Minibatch]], kl_weight: Tensor | float, noise: Tensor | None) -> Loss:
        posteriors, losses = zip(*(self._of_cells(mode, cells, noise) for mode, cells in parts), strict=True)
        reconstruction, kl_z, kl_library = (torch.cat(values) for values in zip(*losses, strict=True))
        total = (reconstruction + kl_weight * (kl_z + kl_library)).mean()
        if self.critic is not None and self.training and not self.fools_before:
            blur = None if noise is None else noise[:, : self.n_latent]
            watched = [(mode, self.watched(qz, blur)) for (mode, _), qz in zip(parts, posteriors, strict=True)]
            total = total + self._adversarial(watched, kl_weight)
        return Loss(total, reconstruction, kl_z, kl_library)

    def losses(self, *datasets: Minibatch, kl_weight: Tensor | float = 1.0) -> Iterator[Tensor | Loss]:
        """What takes a step of the optimiser, one after the other: fooling the critic first, if that was asked for."""
        if self.critic is not None and self.fools_before:
            watched = [(mode, self.watched(self._posterior_z(cells, mode))) for mode, cells in enumerate(datasets)]
            yield self._adversarial(watched, kl_weight)
        yield self.loss(*datasets, kl_weight=kl_weight)

    def _of_cells(
        self, mode: int, cells: Minibatch, noise: Tensor | None
    ) -> tuple[Posterior, tuple[Tensor, Tensor, Tensor]]:
        """q(z | x) of cells of one data set, and -log p(x | z, l) and both divergences, (B,) each."""
        with _speaking_of(self, mode):
            qz, ql = posteriors = self.posteriors(cells)
            z, log_library = self.draw(cells, posteriors, noise)
            kl_library = self.library.kl(ql, cells)
            return qz, (-self.log_px(z, cells, log_library), kl_standard_normal(qz), kl_library)

    def watched(self, qz: Posterior, noise: Tensor | None = None) -> Tensor:
        """What the critic sees of cells: the means of q(z | x), equally blurred, (B, L).

        Samples are blurred more where there are fewer genes, and look alike where the means, which users see, do not.
        """
        return qz.loc + _BLUR * (ranks.normal_like(qz.loc) if noise is None else noise)

    def _adversarial(self, watched: list[tuple[int, Tensor]], kl_weight: Tensor | float) -> Tensor:
        # Stacked where they can be: one below the other, the cells of a process would not lie together, see `ranks`.
        together = torch.stack if len({len(of_one) for _, of_one in watched}) == 1 else torch.cat
        z = together([of_one for _, of_one in watched])  # (data sets, B, L)
        modes = together([torch.full((len(of_one),), mode, device=z.device) for mode, of_one in watched])
        return adversarial_loss(self.critic, z, modes, self.kappa * (1 - kl_weight if self.kappa_fades else 1.0))

    # ---- one data set, as any count VAE ----------------------------------------------------------------------------

    def _known_mode(self, mode: int | None = None) -> int:
        mode = self.mode if mode is None else mode
        if mode is None or not 0 <= mode < len(self.libraries):
            msg = f"mode={mode!r} names none of {len(self.libraries)} data sets: give their number, from 0."
            raise ValueError(msg)
        return mode

    @property
    def library(self) -> nn.Module:
        """The library of the data set."""
        return self.libraries[self._known_mode()]

    @property
    def reconstruction_loss(self) -> str:
        """The likelihood of the data set."""
        return self.reconstruction_losses[self._known_mode()]

    @property
    def profile_sees_batch(self) -> bool:
        """Whether the decoder has individual layers, which alone see the batch."""
        return self.decoder.px_decoder_conditioned is not None

    @property
    def likelihoods(self) -> tuple[str, ...]:
        """Those of all data sets."""
        return self.reconstruction_losses

    @property
    def likelihood(self) -> object:
        """The same as a function."""
        return LIKELIHOODS[self.reconstruction_loss]

    @property
    def heads(self) -> dict[str, object]:
        """What the decoder says of its cells."""
        return {
            "scale_activation": "softmax",
            "gene_cell": self.has_theta and self.decoder.px_r_decoder is not None,
            "zero_inflation": self.reconstruction_loss == "zinb",
        }

    @property
    def genes(self) -> Tensor | None:
        """Positions of its genes among all; None where it has all in their order."""
        mode = self._known_mode()
        return None if self.has_all[mode] else getattr(self, f"genes_{mode}")

    @property
    def encoders(self) -> nn.ModuleList:
        """The parts of q(z, l | x); all other parameters belong to the generative model, or to the critic."""
        return nn.ModuleList([self.encoder, self.libraries])

    def _posterior_z(self, cells: Minibatch, mode: int | None = None) -> Posterior:
        return self.encoder.posterior(self._encoder_input(cells).x, self._known_mode(mode))

    def encode(self, cells: Minibatch | Tensor, mode: int | None = None) -> Posterior | tuple[Tensor | None, ...]:
        """q(z | x) of a minibatch, shape (B, L).

        Of counts ``(B, G)`` and their ``mode`` it is the seed's call: mean, variance and a sample of z; mean and
        variance of the log library, None where it is known; the log library.
        """
        if isinstance(cells, Minibatch):
            return self._posterior_z(cells, mode)
        with _speaking_of(self, self._known_mode(mode)):
            cells = self._cells(cells, decoded=False)
            qz, ql = posteriors = self.posteriors(cells)
            z, log_library = self.draw(cells, posteriors)
        ql_m, ql_v = (None, None) if ql is None else (ql.loc, ql.scale**2)
        return qz.loc, qz.scale**2, z, ql_m, ql_v, log_library

    def posteriors(self, cells: Minibatch) -> tuple[Posterior, Posterior | None]:
        """q(z | x) and q(l | x); the latter is None where the library is known."""
        return self._posterior_z(cells), self.library.posterior(cells, self._encoder_input(cells))

    def scale(self, z: Tensor, cells: Minibatch) -> Tensor:
        """The normalised profile of the genes of the data set, (B, G) or (S, B, G)."""
        return torch.softmax(self.decoder.heads(self._hidden(z, cells), self.genes)[0], dim=-1)

    def _hidden(self, z: Tensor, cells: Minibatch, mode: int | None = None) -> Tensor:
        return self.decoder.hidden(z, self._known_mode(mode), *self.covariates.codes(cells))

    def _heads(
        self, z: Tensor, cells: Minibatch, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits, log_theta, dropout = self.decoder.heads(self._hidden(z, cells), self.genes)
        likelihood = self.reconstruction_loss
        if likelihood == "poisson":
            return logits, None, None
        return logits, self._log_theta(cells, log_theta, self.genes), dropout if likelihood == "zinb" else None

    def _log_theta(self, cells: Minibatch, of_decoder: Tensor | None, genes: Tensor | None) -> Tensor | None:
        if self.dispersion is None:
            return of_decoder
        log_theta = self.dispersion(cells)
        return log_theta if genes is None else log_theta.index_select(-1, genes)

    # ---- all genes -------------------------------------------------------------------------------------------------

    def decode_joint(
        self,
        z: Tensor,
        cells: Minibatch,
        decode_mode: int | None = None,
        log_library: Tensor | None = None,
    ) -> Expression:
        """p(x | z, l) of the genes of all data sets, (B, G) or (S, B, G), as the data set ``decode_mode`` has them.

        The scale sums to 1 over the genes of that data set.

        Parameters
        ----------
        z
            Shape (B, L) or (S, B, L).
        cells
            Cells of the data set :attr:`mode`.
        decode_mode
            A data set; that of the cells by default.
        log_library
            Shape (B, 1) or (S, B, 1); None takes the observed one, or the mean of q(l | x).
        """
        if log_library is None:
            ql = self.encode_library(cells)
            log_library = self.library.point(cells) if ql is None else ql.loc
        return self._of_all_genes(z, cells, self._known_mode(decode_mode), log_library)

    def _of_all_genes(self, z: Tensor, cells: Minibatch, mode: int, log_library: Tensor) -> Expression:
        logits, log_theta, dropout = self.decoder.heads(self._hidden(z, cells, mode))
        own = logits if self.has_all[mode] else logits.index_select(-1, getattr(self, f"genes_{mode}"))
        scale = torch.exp(logits - torch.logsumexp(own, dim=-1, keepdim=True))
        log_theta = self._log_theta(cells, log_theta, None)
        theta = None if log_theta is None else torch.exp(log_theta)
        return Expression(scale, torch.exp(log_library) * scale, theta, dropout)

    def confusion(self, z: Tensor) -> Tensor:
        """What the critic takes cells at z for: probabilities of the data sets, (B, D)."""
        if self.critic is None:
            msg = "This module has no critic: it was made with kappa=0, or of one data set."
            raise ValueError(msg)
        return torch.softmax(self.critic(z), dim=-1)

    # ---- the seed's vocabulary -------------------------------------------------------------------------------------

    def decode(
        self,
        z: Tensor,
        cells: Minibatch | int,
        log_library: Tensor | None = None,
        shared: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Expression | tuple[Tensor | None, ...]:
        """p(x | z, l) of the genes of the data set, as of any count VAE.

        With a ``mode`` for ``cells`` it is the seed's call ``decode(z, mode, library, batch_index, y)``: scale, theta,
        rate and logits of dropout of all genes.
        """
        if isinstance(cells, Minibatch):
            return super().decode(z, cells, log_library, shared)
        px = self._of_all_genes(z, self._loose(z, shared, y), self._known_mode(cells), log_library)
        return px.scale, px.theta, px.rate, px.dropout_logits

    def sample_from_posterior_z(self, x: Tensor, mode: int | None = None, deterministic: bool = False) -> Tensor:
        """One sample of q(z | x), or its mean, shape (B, L)."""
        qz_m, _, z, *_ = self.encode(x, mode)
        return qz_m if deterministic else z

    def sample_from_posterior_l(self, x: Tensor, mode: int | None = None, deterministic: bool = False) -> Tensor:
        """One sample of the log library, or its mean, or the known one, shape (B, 1)."""
        *_, ql_m, _, log_library = self.encode(x, mode)
        return ql_m if deterministic and ql_m is not None else log_library

    def sample_scale(
        self,
        x: Tensor,
        mode: int,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
        deterministic: bool = False,
        decode_mode: int | None = None,
    ) -> Tensor:
        """Profile of all genes at a sample of z, or its mean, shape (B, G)."""
        return self._sampled(x, mode, batch_index, y, deterministic, decode_mode)[0]

    def sample_rate(
        self,
        x: Tensor,
        mode: int,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
        deterministic: bool = False,
        decode_mode: int | None = None,
    ) -> Tensor:
        """Mean counts of all genes at samples of z and the library, or their means, shape (B, G)."""
        return self._sampled(x, mode, batch_index, y, deterministic, decode_mode)[2]

    def get_sample_rate(self, x: Tensor, batch_index: Tensor | None = None, *_: object, **__: object) -> Tensor:
        """:meth:`sample_rate` of the first data set."""
        return self.sample_rate(x, 0, batch_index)

    def _sampled(
        self,
        x: Tensor,
        mode: int,
        batch_index: Tensor | None,
        y: Tensor | None,
        deterministic: bool,
        decode_mode: int | None,
    ) -> tuple[Tensor | None, ...]:
        qz_m, _, z, ql_m, _, log_library = self.encode(x, mode)
        if deterministic:
            z, log_library = qz_m, log_library if ql_m is None else ql_m
        return self.decode(z, mode if decode_mode is None else decode_mode, log_library, batch_index, y)

    def get_reconstruction_loss(
        self, x: Tensor, px_rate: Tensor, px_r: Tensor | None, px_dropout: Tensor | None, mode: int | None = None
    ) -> Tensor:
        """-log p(x | z, l) of cells of a data set from parameters of all genes, shape (B,).

        The seed calls it ``reconstruction_loss``, which is here what other models call that: the likelihood.
        """
        with _speaking_of(self, self._known_mode(mode)):
            px = Expression(
                *(
                    v if v is None or self.genes is None else v[..., self.genes]
                    for v in (px_rate, px_rate, px_r, px_dropout)
                )
            )
            return -self.log_likelihood(x, px)

    def forward(
        self,
        x: Tensor,
        local_l_mean: Tensor | None = None,
        local_l_var: Tensor | None = None,
        batch_index: Tensor | None = None,
        y: Tensor | None = None,
        mode: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The seed's loss: reconstruction, and the sum of the divergences, shape (B,) each.

        ``local_l_mean`` and ``local_l_var`` are the prior of a latent log library, (B, 1), in place of the one the
        module holds.
        """
        mode = self._known_mode(mode)
        with _speaking_of(self, mode):
            cells = self._cells(x, batch_index, y)
            qz, ql = posteriors = self.posteriors(cells)
            z, log_library = self.draw(cells, posteriors)
            kl = kl_standard_normal(qz) + self._kl_library(ql, cells, local_l_mean, local_l_var)
            return -self.log_px(z, cells, log_library), kl

    def _loose(self, z: Tensor, batch_index: Tensor | None, y: Tensor | None) -> Minibatch:
        """Batch and label of cells of which there are no counts."""
        if batch_index is None:
            batch_index = torch.zeros(z.shape[-2], dtype=torch.long, device=z.device)
        return Minibatch(None, batch_index.reshape(-1).long(), None if y is None else y.reshape(-1).long())


class _speaking_of:
    """Inside, a module speaks of one of its data sets."""

    def __init__(self, module: JVAE, mode: int):
        self.module, self.mode = module, mode

    def __enter__(self) -> None:
        self.before, self.module.mode = self.module.mode, self.mode

    def __exit__(self, *_: object) -> None:
        self.module.mode = self.before


def _refuse(condition: object, msg: str) -> None:
    if condition:
        raise ValueError(msg)


def _positions(
    mappings: Sequence[Sequence[int] | slice], dim_input_list: Sequence[int], total_genes: int
) -> list[np.ndarray]:
    """Of each data set, the positions of its genes among all, checked."""
    _refuse(
        len(mappings) != len(dim_input_list),
        f"indices_mappings has {len(mappings)} entries; there are {len(dim_input_list)} data sets.",
    )
    every = np.arange(total_genes)
    genes = [every[m] if isinstance(m, slice) else np.asarray(m, dtype=np.int64) for m in mappings]
    for positions, n_input in zip(genes, dim_input_list, strict=True):
        outside = positions[(positions < 0) | (positions >= total_genes)]
        _refuse(len(outside), f"indices_mappings name genes {outside[:3]} of {total_genes}: they count from 0.")
        _refuse(len(np.unique(positions)) < len(positions), "indices_mappings name a gene twice.")
        _refuse(len(positions) != n_input, "indices_mappings do not fit dim_input_list.")
    return genes


def _check_each(n_heads: int, losses: Sequence[str], latent_libraries: Sequence[bool]) -> None:
    """Raise a ValueError unless there is a likelihood and a kind of library for each data set."""
    for name, values in {"reconstruction_losses": losses, "model_library_bools": latent_libraries}.items():
        _refuse(len(values) != n_heads, f"{name} has {len(values)} entries; there are {n_heads} data sets.")
    for likelihood in losses:
        one_of("reconstruction_losses", likelihood, ("zinb", "nb", "poisson"))
    for latent in latent_libraries:
        _refuse(latent not in (True, False), f"model_library_bools holds {latent!r}; True or False is needed for each.")


def _check_numbers(given: dict) -> None:
    least = {
        **dict.fromkeys(
            ("n_latent", "n_layers_encoder_individual", "n_layers_encoder_shared", "dim_hidden_encoder"), 1
        ),
        **dict.fromkeys(("dim_hidden_decoder_individual", "dim_hidden_decoder_shared"), 1),
        **dict.fromkeys(("n_layers_decoder_individual", "n_layers_decoder_shared"), 0),
    }
    for name, smallest in least.items():
        _refuse(given[name] < smallest, f"{name}={given[name]} must be {smallest} or more.")
    for name in ("dropout_rate_encoder", "dropout_rate_decoder"):
        _refuse(not 0 <= given[name] < 1, f"{name}={given[name]} must be at least 0 and below 1.")
    individual, shared = given["n_layers_decoder_individual"], given["n_layers_decoder_shared"]
    without_effect = {
        "dim_hidden_decoder_individual": (32, individual > 0 and (shared > 0 or individual > 1)),
        "dim_hidden_decoder_shared": (128, shared > 0 or individual > 0),
        "dropout_rate_decoder": (_DROPOUT_DECODER, individual + shared > 0),
    }
    for name, (default, has_effect) in without_effect.items():
        _refuse(
            given[name] != default and not has_effect,
            f"{name}={given[name]} has no effect with n_layers_decoder_individual={individual} and "
            f"n_layers_decoder_shared={shared}.",
        )


def _check_critic(kappa: float, fades: bool, fool_step: str, n_heads: int) -> None:
    _refuse(not 0 <= kappa < float("inf"), f"kappa={kappa!r} must be 0 or more, and finite.")
    used = {"kappa_fades=True": fades, "fool_step='separate'": fool_step == "separate"}
    for option, is_used in used.items():
        _refuse(is_used and kappa == 0, f"{option} has no effect with kappa=0: there is no critic.")


SPEC = ModelSpec(
    name="gimvi",
    module=JVAE,
    config=Config,
    needs=lambda config: frozenset(),
    capabilities=frozenset({Capability.COUNTS, Capability.JOINT}),
    effort=12.0,
    reference="Lopez et al. (2019), A joint model of unpaired data from scRNA-seq and spatial transcriptomics for "
    "imputing missing gene expression measurements, ICML Workshop on Computational Biology.",
)
