r"""A classifier of cells, trained on those that have a label, and nothing else.

.. math::
    q(y_n \mid x_n) = \mathrm{softmax}(f(\log(1 + x_n))), \qquad q(y_n \mid z_n), \qquad q(y_n \mid z_n, l_n)

It sees the counts, or what a fitted model whose weights no longer change makes of them: its latent variable z, or z and
the log library size l. While it is trained z is a sample of q(z | x), so that it learns how sure z is; afterwards it is
the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from scvi_ext._contract import LABELLED, Capability, Loss, ModelSpec
from scvi_ext._errors import one_of, whole_number
from scvi_ext.functional.labels import check_labels, cross_entropy
from scvi_ext.nn.classifier import Classifier

if TYPE_CHECKING:
    from torch import Tensor

    from scvi_ext._contract import Minibatch


@dataclass(frozen=True)
class Config:
    """Options of the classifier; keyword arguments of ``tl.fit(adata, model="classifier")``."""

    n_hidden: int = 128
    n_layers: int = 1
    dropout_rate: float = 0.1
    log_variational: bool = True
    classifies: Literal["counts", "z", "z_library"] = "counts"


class CellClassifier(nn.Module):
    """The torch module of the classifier.

    Parameters
    ----------
    n_input, n_labels
        Numbers of genes and labels.
    n_hidden, n_layers, dropout_rate
        Of the network.
    log_variational
        Classify by log(1 + counts) rather than counts.
    classifies
        ``"counts"``, or of a fitted model ``"z"`` or ``"z_library"``, z and the log library size.
    frozen
        The fitted model, a :class:`~scvi_ext.models.base.CountVAE`. Its weights stay as they are.
    **sizes
        Further sizes of the data, which it does not see.
    """

    def __init__(
        self,
        n_input: int,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        log_variational: bool = True,
        *,
        classifies: str = "counts",
        frozen: nn.Module | None = None,
        **sizes: Any,
    ):
        super().__init__()
        one_of("classifies", classifies, ("counts", "z", "z_library"))
        for name, size in {"n_hidden": n_hidden, "n_layers": n_layers}.items():
            whole_number(name, size, 1)
        check_labels("classifier", n_labels)
        if (classifies == "counts") != (frozen is None):
            found = "there is no fitted model to make that of" if frozen is None else "a fitted model has no effect"
            msg = f"classifies={classifies!r}, and {found}: give init_from=... and classifies='z', or neither."
            raise ValueError(msg)
        if frozen is not None and not log_variational:
            msg = f"log_variational=False has no effect on classifies={classifies!r}: the fitted model sees the counts."
            raise ValueError(msg)
        self.log_variational, self.with_library = log_variational, classifies == "z_library"
        if not 0 <= dropout_rate < 1:
            msg = f"dropout_rate={dropout_rate} must be at least 0 and below 1."
            raise ValueError(msg)
        # Logs of library sizes are far from zero, where z is: without this they would drown it.
        means, variances = (torch.tensor(sizes.get(f"library_log_{name}") or (0.0,)) for name in ("means", "vars"))
        self.register_buffer("library_center", means.mean())
        self.register_buffer("library_scale", torch.sqrt((variances + (means - means.mean()) ** 2).mean().clamp(1e-2)))
        self.frozen = None if frozen is None else frozen.requires_grad_(False)
        width = n_input if frozen is None else frozen.n_latent + self.with_library
        self.classifier = Classifier(width, n_hidden, n_labels, n_layers, dropout_rate)

    def train(self, mode: bool = True) -> CellClassifier:
        """Dropout and batch normalisation of the classifier; what is frozen stays as it is."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def loss(self, labelled: Minibatch, kl_weight: Tensor | float = 1.0, noise: Tensor | None = None) -> Loss:
        """The cross-entropy of the labels; there is no KL divergence to weigh, and no posterior sample."""
        classification = cross_entropy(self.encode_label(labelled), labelled.labels)
        return Loss(classification.mean(), None, None, None, classification)

    def encode_label(self, cells: Minibatch) -> Tensor:
        """log q(y | x), shape (B, C)."""
        return self.classifier.log_probabilities(self._input(cells))

    def _input(self, cells: Minibatch) -> Tensor:
        if self.frozen is None:
            return cells.x.log1p() if self.log_variational else cells.x
        # Without labels: a model that reads them would tell the label that is to be learned.
        cells = cells._replace(labels=None)
        mean = torch.zeros(len(cells.batch_index), self.frozen.n_noise, device=cells.batch_index.device)
        with torch.no_grad():
            posteriors = self.frozen.posteriors(cells)
            z, log_library = self.frozen.draw(cells, posteriors, None if self.training else mean)
        if not self.with_library:
            return z
        return torch.cat([z, (log_library - self.library_center) / self.library_scale], dim=-1)


SPEC = ModelSpec(
    name="classifier",
    module=CellClassifier,
    config=Config,
    needs=lambda config: frozenset({"labels"}),
    streams=(LABELLED,),
    capabilities=frozenset({Capability.LABELS}),
    reference="Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics, Nature Methods.",
)
