"""From counts to the posterior of a latent variable."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from scvi_ext._contract import Posterior
from scvi_ext._errors import one_of
from scvi_ext.functional.sampling import reparameterize_gaussian
from scvi_ext.kernels import latent
from scvi_ext.nn.layers import FCLayers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scvi_ext.kernels.sparse import SparseRows

VAR_EPS = 1e-4  # smallest variance, as in scVI 0.5.0
MAX_LOG_VAR = 20.0  # exp(20) is far beyond any useful posterior, and far below the overflow at exp(88)


class EncoderInput(NamedTuple):
    """What an encoder is shown of the cells."""

    x: Tensor | SparseRows  # (B, G)
    dense: Tensor | None = None  # (B, n) further columns
    codes: tuple[Tensor, ...] = ()  # (B,) of each categorical covariate

    def with_codes(self, *codes: Tensor) -> EncoderInput:
        """The same with further categories."""
        return self._replace(codes=(*self.codes, *codes))


class Encoder(nn.Module):
    """A network whose output is the mean and the variance of a diagonal normal distribution.

    Parameters
    ----------
    n_input, n_output
        Sizes of input (genes, and covariates that are encoded) and latent space.
    n_cat_list
        Number of categories of each categorical covariate.
    n_layers, n_hidden, dropout_rate
        Of the hidden layers.
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
        dropout_rate: float = 0.1,
        **layer_options: bool,
    ):
        super().__init__()
        layers = FCLayers(n_input, n_hidden, n_cat_list, n_layers, n_hidden, dropout_rate, **layer_options)
        self.encoder = layers.for_sparse_rows()
        self.mean_encoder = nn.Linear(n_hidden, n_output)
        self.var_encoder = nn.Linear(n_hidden, n_output)

    def posterior(self, x: Tensor | SparseRows, *cat_list: Tensor, dense: Tensor | None = None) -> Posterior:
        """q(z | x) of shape (B, n_output): variance exp(linear) + 1e-4."""
        h = self.encoder(x, *cat_list, dense=dense)  # (B, n_hidden)
        if latent.takes(h, self.mean_encoder.weight):
            return Posterior(*latent.posterior(h, self.mean_encoder, self.var_encoder, MAX_LOG_VAR, VAR_EPS))
        dtype = self.mean_encoder.weight.dtype  # casts end here: z and its likelihoods have the parameters' precision
        loc, log_var = self.mean_encoder(h).to(dtype), self.var_encoder(h).to(dtype)
        return Posterior(loc, torch.sqrt(torch.exp(log_var.clamp(max=MAX_LOG_VAR)) + VAR_EPS))

    def of(self, cells: EncoderInput) -> Posterior:
        """The same of all that is shown of the cells."""
        return self.posterior(cells.x, *cells.codes, dense=cells.dense)

    def forward(self, x: Tensor, *cat_list: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and one sample, each of shape (B, n_output)."""
        q = self.posterior(x, *cat_list)
        var = q.scale**2
        return q.loc, var, reparameterize_gaussian(q.loc, var)


class EncoderTOTALVI(nn.Module):
    """The seed's encoder of totalVI: one network for z, one for the library, both of genes and proteins.

    The model itself has an :class:`Encoder` for each, the second one only where the library is latent.

    Parameters
    ----------
    n_input, n_output
        Sizes of input (genes and proteins) and latent space.
    n_cat_list, n_layers, n_hidden, dropout_rate
        As in :class:`Encoder`; the network of the library has one hidden layer.
    distribution
        ``"ln"`` (logistic normal: z is the softmax of a normal variable) or ``"normal"``.

    References
    ----------
    Gayoso et al. (2021), Nature Methods 18, 272.
    """

    def __init__(
        self,
        n_input: int,
        n_output: int,
        n_cat_list: Sequence[int] | None = None,
        n_layers: int = 2,
        n_hidden: int = 256,
        dropout_rate: float = 0.1,
        distribution: str = "ln",
    ):
        super().__init__()
        one_of("distribution", distribution, ("normal", "ln"))
        self.distribution = distribution
        self.z_encoder = Encoder(n_input, n_output, n_cat_list, n_layers, n_hidden, dropout_rate)
        self.l_encoder = Encoder(n_input, 1, n_cat_list, 1, n_hidden, dropout_rate)

    def reparameterize_transformation(self, mu: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """A sample of z, and the normal one that it is made of, (B, n_output) each."""
        untransformed = reparameterize_gaussian(mu, var)
        return torch.softmax(untransformed, dim=-1) if self.distribution == "ln" else untransformed, untransformed

    def forward(self, data: Tensor, *cat_list: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict, dict]:
        """Means and variances of z and of the log library, and samples ``"z"`` and ``"l"``, transformed and not.

        The library is transformed by the exponential, z by the softmax where it is logistic normal.
        """
        qz, ql = self.z_encoder.posterior(data, *cat_list), self.l_encoder.posterior(data, *cat_list)
        z, untransformed = self.reparameterize_transformation(qz.loc, qz.scale**2)
        log_library = reparameterize_gaussian(ql.loc, ql.scale**2)
        latent = {"z": z, "l": torch.exp(log_library)}
        return qz.loc, qz.scale**2, ql.loc, ql.scale**2, latent, {"z": untransformed, "l": log_library}
