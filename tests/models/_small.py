"""Small modules and minibatches, and the grid of options that the tests of the models walk."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from itertools import product
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch

from scvi_ext import models
from scvi_ext._contract import Capability, DataSummary, Minibatch, ProteinSummary

N_CELLS = 24


def all_measured(n_proteins: int, n_batch: int = 1) -> ProteinSummary:
    """Proteins that were measured in every batch."""
    means = tuple(0.5 + 0.5 * (3 * t % 4) for t in range(n_proteins))
    scales = tuple(0.3 + 0.1 * (t % 4) for t in range(n_proteins))
    return ProteinSummary(n_proteins, ((True,) * n_proteins,) * n_batch, (means,) * n_batch, (scales,) * n_batch)


PROTEINS = replace(
    all_measured(4, 3),
    protein_batch_mask=((True, True, True, True), (True, False, True, False), (True, True, True, True)),
)
SUMMARY = DataSummary(
    n_input=13,
    n_batch=3,
    n_labels=4,
    n_cats_per_cov=(2, 3),
    n_continuous_cov=2,
    library_log_means=(2.0, 2.5, 3.0),
    library_log_vars=(0.2, 0.3, 0.4),
    proteins=PROTEINS,
)
BARE = DataSummary(
    n_input=7,
    n_batch=1,
    n_labels=1,
    library_log_means=(2.0,),
    library_log_vars=(0.3,),
    proteins=all_measured(3),
)
SMALL = {"n_hidden": 8, "n_latent": 3}

# Values for the options whose type does not list them. An option that is missing here fails the test of its effect.
VALUES = {
    "n_hidden": (8, 5),
    "n_latent": (3, 2),
    "n_layers": (1, 2),
    "dropout_rate": (0.1, 0.0),
    "classification_ratio": (50.0, 1.0),
    "y_prior": (None, (0.4, 0.3, 0.2, 0.1)),
    "labels_groups": (None, ("a", "b", "a", "b")),
    "n_layers_encoder": (None, 2),
    "dropout_rate_decoder": (0.2, 0.0),
    "dropout_rate_encoder": (0.2, 0.0),
    "protein_weight": (1.0, 0.5),
    "adversarial_mixing": (0.0, 3.0),
    "alpha_prior": (0.5, 0.3),
    "beta_prior": (0.5, 0.8),
    "minimal_dropout": (0.01, 0.0),
}

# What an option needs beside it to have an effect.
BESIDE = {"deeply_inject_covariates": {"n_layers": 2, "encode_covariates": True}}

# What a model calls the options of its genes where it has other features too.
OF_GENES = {"dispersion": "gene_dispersion", "reconstruction_loss": "reconstruction_loss_gene"}


def _stands_alone(name: str) -> bool:
    capabilities = models.get(name).capabilities
    return Capability.COUNTS in capabilities and Capability.JOINT not in capabilities


# Those of one data set: models of several have their own tests.
GENERATIVE = [name for name in models.names() if _stands_alone(name)]
CROSSED = ("reconstruction_loss", "dispersion", "library", *OF_GENES.values())


def build(name: str, summary: DataSummary = SUMMARY, *, seed: int = 0, **options: Any) -> torch.nn.Module:
    """A small module in float64, so that equal means equal to ten digits."""
    spec = models.get(name)
    torch.manual_seed(seed)
    return models.build(spec, spec.config(**SMALL | options), summary).double()


def make_cells(summary: DataSummary = SUMMARY, n_cells: int = N_CELLS, seed: int = 0) -> Minibatch:
    """Counts with every column that ``summary`` speaks of; all batches, labels and categories occur."""
    generator = torch.Generator().manual_seed(seed)
    mean = 4 * torch.rand(summary.n_input, generator=generator, dtype=torch.float64)
    index = torch.arange(n_cells)
    categories = [(index // (i + 2)) % n for i, n in enumerate(summary.n_cats_per_cov)]
    return Minibatch(
        x=torch.poisson(mean.expand(n_cells, -1), generator=generator),
        batch_index=index % summary.n_batch,
        labels=(index // 3) % summary.n_labels,
        size_factor=0.5 + torch.rand(n_cells, generator=generator, dtype=torch.float64),
        categorical=torch.stack(categories, 1) if categories else None,
        continuous=torch.randn(n_cells, summary.n_continuous_cov, generator=generator, dtype=torch.float64)
        if summary.n_continuous_cov
        else None,
        protein=None if summary.proteins is None else _draw_proteins(n_cells, summary.proteins.n_proteins, generator),
    )


def _draw_proteins(n_cells: int, n_proteins: int, generator: torch.Generator) -> torch.Tensor:
    mean = 20 * torch.rand(n_cells, n_proteins, generator=generator, dtype=torch.float64)
    return torch.poisson(mean, generator=generator)


def streams(name: str, cells: Minibatch) -> list[Minibatch]:
    """The same cells for every stream that the loss of a model takes."""
    return [cells for _ in models.get(name).streams]


def take(cells: Minibatch, rows: Any) -> Minibatch:
    return Minibatch(*(None if column is None else column[rows] for column in cells))


def noise(module: torch.nn.Module, n_cells: int = N_CELLS, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_cells, module.n_noise, generator=generator, dtype=torch.float64)


def given(module: torch.nn.Module, draws: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that a loss draws, fixed: what each cell takes, and what all cells share."""
    shared = module.draw_shared(np.random.default_rng(2))
    return {"noise": draws} if shared is None else {"noise": draws, "shared": shared}


def values(name: str) -> dict[str, tuple]:
    """Option -> the values to try, read from the type of the option where it lists them."""
    config = models.get(name).config
    hints = get_type_hints(config)

    def of(option: str) -> tuple:
        if get_origin(hints[option]) is Literal:
            return get_args(hints[option])
        return (True, False) if hints[option] is bool else VALUES[option]

    return {f.name: of(f.name) for f in fields(config)}


def named(name: str, **options: Any) -> dict[str, Any]:
    """The options under the names that the model has for them."""
    own = values(name)
    return {option if option in own else OF_GENES.get(option, option): value for option, value in options.items()}


def offering(**options: Any) -> list[str]:
    """The models that have all of these options, with these values among those to choose from."""

    def offers(name: str) -> bool:
        tried = values(name)
        return all(value in tried.get(option, ()) for option, value in named(name, **options).items())

    return [name for name in GENERATIVE if offers(name)]


def accepted(name: str, options: dict[str, Any]) -> bool:
    """Whether the model takes these options together. It may refuse them only because one would have no effect."""
    try:
        build(name, **options)
    except ValueError as error:
        if "has no effect" not in str(error):
            raise
        return False
    return True


def variants(*also_crossed: str) -> list[tuple[str, dict[str, Any]]]:
    """Every model with every value of every option: one by one, or crossed where they shape the likelihood together."""
    crossed = (*CROSSED, *also_crossed)
    found = []
    for name in GENERATIVE:
        tried, default = values(name), asdict(models.get(name).config(**SMALL))
        off = [(option, value) for option in tried for value in tried[option] if value != default[option]]
        single = [BESIDE.get(option, {}) | {option: value} for option, value in off if option not in crossed]
        of_this = [option for option in crossed if option in tried]
        together = [dict(zip(of_this, chosen, strict=True)) for chosen in product(*(tried[o] for o in of_this))]
        found += [(name, options) for options in single + together if accepted(name, options)]
    return found


def label(value: Any) -> str:
    """Test ids such as ``scvi-nb,gene-cell,latent`` and ``ldvae-n_layers=2``."""
    if not isinstance(value, dict):
        return str(value)
    return ",".join(v if k in CROSSED else f"{k}={v}" for k, v in value.items()) or "default"
