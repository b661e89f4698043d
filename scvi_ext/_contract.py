"""The contract between data, models, engine and AnnData: plain data, no behaviour.

Legend used all over the package: ``B`` cells in the minibatch, ``G`` genes, ``L`` latent units, ``K`` batches,
``C`` labels, ``P`` proteins, ``S`` samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import pandas as pd
    from torch import Tensor


class Minibatch(NamedTuple):
    """The columns of ``B`` cells on one device. A column that was not registered is ``None`` for the whole run."""

    x: Any  # (B, G) counts: a Tensor on a CUDA device, kernels.sparse.SparseRows in host memory
    batch_index: Tensor  # (B,) integer codes
    labels: Tensor | None = None  # (B,) integer codes, -1 = unlabelled
    size_factor: Tensor | None = None  # (B,) positive
    categorical: Tensor | None = None  # (B, number of categorical covariates) integer codes
    continuous: Tensor | None = None  # (B, number of continuous covariates)
    protein: Tensor | None = None  # (B, P) counts


class Posterior(NamedTuple):
    """A diagonal normal distribution; ``scale`` is the standard deviation."""

    loc: Tensor  # (B, L)
    scale: Tensor  # (B, L)


class Expression(NamedTuple):
    """What a decoder says about the counts of a cell."""

    scale: Tensor  # (B, G) normalised profile
    rate: Tensor  # (B, G) mean count before zero inflation
    theta: Tensor | None = None  # broadcastable to (B, G): inverse dispersion
    dropout_logits: Tensor | None = None  # (B, G) logit of a technical zero


class ProteinExpression(NamedTuple):
    """What a decoder says about the proteins of a cell: a mixture of background and foreground."""

    background: Posterior  # (B, P) of the log of the mean count that is background
    log_ratio: Tensor  # (B, P) log of the foreground's mean count over the background's, not negative
    theta: Tensor  # broadcastable to (B, P): inverse dispersion of both
    mixing_logits: Tensor  # (B, P) logit of a count being background


# What a loss may say of each cell, named as in a history: the parts of a negative ELBO, and what labels cost.
ELBO = ("reconstruction_loss", "kl_z", "kl_library")
KL_GLOBAL = "kl_global"
CLASSIFICATION = "classification_loss"


class Loss(NamedTuple):
    """What is minimised, and per cell the parts of the negative ELBO and what labels add; None where there is none."""

    total: Tensor | None  # () what the optimiser minimises, at the current KL weight; None if its gradients are there
    reconstruction: Tensor | None  # (B,) -log p(x | z)
    kl_z: Tensor | None  # (B,) KL(q || p) of all other latent variables, warmed up
    kl_library: Tensor | None  # (B,) KL(q(l) || p(l)), never warmed up (but in gimVI)
    classification: Tensor | None = None  # (cells of the labelled stream,) -log q(y), no part of the ELBO
    kl_global: Tensor | None = None  # (B,) each cell's share of KL(q || p) of what all cells share, never warmed up

    @property
    def elbo(self) -> Tensor:
        """ELBO of each cell, shape (B,), of a model that has one: minus its parts, none of them warmed up."""
        total = self.reconstruction + self.kl_z + self.kl_library
        return -total if self.kl_global is None else -(total + self.kl_global)


class Capability(StrEnum):
    """What some models can do and others cannot. The value is the name of the method that does it."""

    COUNTS = "decode"
    LOADINGS = "get_loadings"
    LABELS = "encode_label"
    Z2 = "encode_z2"
    PROTEIN = "decode_protein"
    ZERO_INFLATION = "zero_inflation_posterior"
    JOINT = "decode_joint"


@dataclass(frozen=True)
class Stream:
    """A sequence of minibatches that a model's loss takes. The longest one makes up an epoch, others go round."""

    name: str
    labelled_only: bool = False  # cells without a label are left out
    dataset: int | None = None  # the one of several data sets that its cells are of; None where there is but one
    parts: tuple[str, ...] = ELBO  # what the loss says of each of its cells


LABELLED = Stream("labelled", labelled_only=True, parts=(CLASSIFICATION,))


@dataclass(frozen=True)
class ProteinSummary:
    """The proteins a module is built for: which were measured where, and where to start with their background."""

    n_proteins: int
    protein_batch_mask: tuple[tuple[bool, ...], ...]  # (K, P) True where a protein was measured in a batch
    background_means: tuple[tuple[float, ...], ...]  # (K, P) of the log of the background's mean count
    background_scales: tuple[tuple[float, ...], ...]  # (K, P) standard deviations of the same


@dataclass(frozen=True)
class JointSummary:
    """The sizes of several data sets that one module is built for; batches are numbered through all of them."""

    genes: tuple[tuple[int, ...], ...]  # of each data set, positions of its genes among all
    n_genes: int  # of all
    library_log_means: tuple[
        tuple[float, ...], ...
    ]  # of each data set, prior of the log library in each of all batches
    library_log_vars: tuple[tuple[float, ...], ...]


N_TRAIN = "n_train"  # the buffer of a module that is of its run, not of what was learned: no other run takes it over


@dataclass(frozen=True)
class DataSummary:
    """The sizes a module is built from, and the prior of the log library size in each batch."""

    n_input: int
    n_train: int = 1  # cells to be trained on
    n_batch: int = 1
    n_labels: int = 0
    n_cats_per_cov: tuple[int, ...] = ()
    n_continuous_cov: int = 0
    library_log_means: tuple[float, ...] = ()  # (K,)
    library_log_vars: tuple[float, ...] = ()  # (K,)
    proteins: ProteinSummary | None = None
    joint: JointSummary | None = None


@dataclass(frozen=True)
class ModelSpec:
    """What a model file declares about itself."""

    name: str  # the stem of the file
    module: type  # the torch module
    config: type  # frozen dataclass; its fields are keyword arguments of tl.fit
    needs: Callable[[Any], frozenset[str]]  # config -> the optional columns of Minibatch it reads
    streams: tuple[Stream, ...] = (Stream("cells"),)  # the minibatches that its loss takes
    capabilities: frozenset[Capability] = frozenset()
    reference: str = ""
    # Of the default plan: peak of the learning rate, number of steps per square root of the cells trained on, and how
    # often at most it goes over them.
    peak_lr: float = 2e-2
    effort: float = 7.0
    most_epochs: int = 40


@dataclass(frozen=True)
class SavedFit:
    """A fitted model as plain arrays and strings: what travels inside an AnnData, or in a folder of its own."""

    key: str
    model: str
    config: Mapping[str, Any]  # keyword arguments of the model's config
    run: Mapping[str, Any]  # keyword arguments of tl.fit that shaped the run
    setup: Mapping[str, Any]  # what setup_anndata had written
    var_names: np.ndarray  # (G,) genes, in the order of the network
    state: Mapping[str, np.ndarray]  # parameters and buffers of the module
    history: pd.DataFrame  # one row per epoch
    status: Mapping[str, Any]  # how the run went
    checkpoint: Mapping[str, np.ndarray] | None = None  # optimiser and random state, to go on exactly
    frozen: Mapping[str, Any] | None = None  # model and config of a fitted model inside it, whose weights stay
    joint: Mapping[str, Any] | None = None  # the data sets it was fitted to, and which of them this is: data/joint.py
