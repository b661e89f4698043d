"""Torch modules of the models, and the folder as their registry.

A model is a file of this folder that declares a ``SPEC``. Nothing else lists them: :func:`names`, :func:`get`,
``tl.fit``, the conformance tests and the documentation read the folder.

Beside the models stands the vocabulary of scVI 0.5.0: layers, encoders and decoders, log-likelihoods and helpers.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._contract import Capability, Minibatch
from scvi_ext._errors import one_of
from scvi_ext.functional.counts import log_mixture_nb, log_nb_positive, log_zinb_positive
from scvi_ext.functional.evidence import (
    compute_elbo,
    compute_marginal_log_likelihood_autozi,
    compute_marginal_log_likelihood_scvi,
    compute_reconstruction_error,
)
from scvi_ext.functional.sampling import reparameterize_gaussian
from scvi_ext.functional.tensors import broadcast_labels, enumerate_discrete, iterate, logsumexp, one_hot
from scvi_ext.nn.classifier import Classifier
from scvi_ext.nn.decoders import Decoder, DecoderSCVI, DecoderTOTALVI, LinearDecoderSCVI
from scvi_ext.nn.encoders import Encoder, EncoderTOTALVI
from scvi_ext.nn.layers import FCLayers
from scvi_ext.nn.multi import MultiDecoder, MultiEncoder

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from torch import nn

    from scvi_ext._contract import DataSummary, ModelSpec, SavedFit

__all__ = [
    "Classifier",
    "Decoder",
    "DecoderSCVI",
    "DecoderTOTALVI",
    "Encoder",
    "EncoderTOTALVI",
    "FCLayers",
    "LinearDecoderSCVI",
    "Minibatch",
    "MultiDecoder",
    "MultiEncoder",
    "broadcast_labels",
    "build",
    "compute_elbo",
    "compute_marginal_log_likelihood_autozi",
    "compute_marginal_log_likelihood_scvi",
    "compute_reconstruction_error",
    "enumerate_discrete",
    "get",
    "iterate",
    "log_mixture_nb",
    "log_nb_positive",
    "log_zinb_positive",
    "logsumexp",
    "names",
    "one_hot",
    "reparameterize_gaussian",
    "restore",
    "show",
]


def names() -> list[str]:
    """Names of the models, as ``tl.fit(adata, model=...)`` takes them."""
    return sorted(m.name for m in iter_modules(__path__) if m.name != "base")


def get(name: str) -> ModelSpec:
    """What a model declares about itself: module, options, needs, capabilities, reference."""
    one_of("model", name, names())
    return import_module(f"{__name__}.{name}").SPEC


def show() -> pd.DataFrame:
    """A table of the models: torch class, capabilities, options with defaults, reference."""
    import pandas as pd

    specs = [get(name) for name in names()]
    return pd.DataFrame(
        {
            "module": [s.module.__name__ for s in specs],
            "capabilities": [", ".join(sorted(s.capabilities)) for s in specs],
            "options": [", ".join(f"{f.name}={f.default!r}" for f in fields(s.config)) for s in specs],
            "reference": [s.reference for s in specs],
        },
        index=pd.Index([s.name for s in specs], name="model"),
    )


def build(spec: ModelSpec, config: object, summary: DataSummary, frozen: Mapping | None = None) -> nn.Module:
    """A fresh module for data of these sizes, around one that is ``frozen`` where a fit has such a part."""
    sizes, inside = asdict(summary), {}
    if Capability.ZERO_INFLATION not in spec.capabilities:  # the only models with variables that all cells share
        del sizes["n_train"]
    proteins, joint = sizes.pop("proteins"), sizes.pop("joint")
    if joint is not None:
        priors = {name: joint[name] for name in ("library_log_means", "library_log_vars")}
        dims = [len(genes) for genes in joint["genes"]]
        shape = [dims, joint["n_genes"], joint["genes"]]
        return spec.module(*shape, n_batch=sizes["n_batch"], **priors, **asdict(config))
    shape = [sizes.pop("n_input")]
    if "protein" in spec.needs(config):
        shape.append(proteins.pop("n_proteins"))
        sizes |= proteins
    if frozen is not None:
        part = get(frozen["model"])
        inside["frozen"] = build(part, part.config(**frozen["config"]), summary)
    return spec.module(*shape, **sizes, **asdict(config), **inside)


def restore(fit: SavedFit, summary: DataSummary) -> nn.Module:
    """The fitted module, in evaluation mode, on the host."""
    spec = get(fit.model)
    with torch.device("meta"):  # no random initial weights, which would draw from the global generator
        module = build(spec, spec.config(**fit.config), summary, fit.frozen)
    state = {name: torch.from_numpy(np.array(array)) for name, array in fit.state.items()}
    module.load_state_dict(state, assign=True)
    if fit.joint is not None:
        module.mode = list(fit.joint["datasets"]).index(fit.joint["dataset"])
    return module.eval()


# The classes of the models stand beside the vocabulary: models.VAE, models.LDVAE, ...
globals().update({_class.__name__: _class for _class in (get(name).module for name in names())})
__all__ += [get(name).module.__name__ for name in names()]
