"""gimVI: what every model owes, of several data sets with genes of their own, none of which has all."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, fields, replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from _small import take
from _tolerances import FLOAT32, FLOAT64, LOG_EPS, MODULE_WITH_KERNEL, N_STANDARD_ERRORS
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy, log_softmax
from torch.testing import assert_close

from scvi_ext import models
from scvi_ext._contract import DataSummary, Expression, JointSummary, Loss, Minibatch, Posterior, SavedFit
from scvi_ext.functional import fused
from scvi_ext.kernels.sparse import SparseRows
from scvi_ext.models.gimvi import JVAE, SPEC, Config

B, L = 16, 3
# Positions of the genes of each data set among all, with overlaps and in no order; none has all if there are several.
GENES = {
    1: ((4, 1, 0, 3, 2),),
    2: ((3, 0, 5, 1, 7, 2, 4, 6), (5, 8, 1)),
    3: ((3, 0, 5, 1, 7, 2), (5, 8, 9, 1, 10), (9, 11, 12, 6, 4, 10)),
}
BATCHES = ((0, 1), (2,), (3, 4))  # of each data set
SMALL = {"n_latent": L, "dim_hidden_encoder": 8, "dim_hidden_decoder_individual": 6, "dim_hidden_decoder_shared": 5}
MIXED = ("zinb", "nb", "poisson")

numbers = pytest.mark.parametrize("n", GENES)


def summary(n: int) -> DataSummary:
    n_batch = BATCHES[n - 1][-1] + 1
    means = tuple(tuple(1.0 + 0.3 * k + 0.1 * m for k in range(n_batch)) for m in range(n))
    variances = tuple(tuple(0.2 + 0.05 * k for k in range(n_batch)) for _ in range(n))
    n_genes = 1 + max(max(genes) for genes in GENES[n])
    return summary_of(GENES[n], n_genes, n_batch, means, variances)


def summary_of(genes, n_genes, n_batch, means=None, variances=None) -> DataSummary:
    means = means or ((1.0,) * n_batch,) * len(genes)
    variances = variances or ((0.5,) * n_batch,) * len(genes)
    return DataSummary(n_genes, n_batch=n_batch, joint=JointSummary(genes, n_genes, means, variances))


def config(n: int, **options) -> Config:
    layers = options.get("n_layers_decoder_individual", 0), options.get("n_layers_decoder_shared", 1)
    unused = set()
    if not layers[0] or layers == (1, 0):
        unused.add("dim_hidden_decoder_individual")
    if layers == (0, 0):
        unused.add("dim_hidden_decoder_shared")
    small = {name: value for name, value in SMALL.items() if name not in unused}
    each = {"reconstruction_losses": ("zinb", "nb", "nb")[:n], "model_library_bools": (False,) * n}
    given = {k: v[:n] if isinstance(v, tuple) else v for k, v in options.items()}
    return Config(**small | each | given)


def build(n: int, *, seed: int = 0, of: DataSummary | None = None, **options) -> JVAE:
    torch.manual_seed(seed)
    return models.build(SPEC, config(n, **options), of or summary(n)).double()


def without_dropout(module: JVAE) -> JVAE:
    for dropout in (part for part in module.modules() if isinstance(part, nn.Dropout)):
        dropout.p = 0.0
    return module


def make_cells(n: int, n_cells: int = B, seed: int = 0) -> list[Minibatch]:
    """Counts of each data set, in batches of its own."""
    generator = torch.Generator().manual_seed(seed)
    minibatches = []
    for genes, batches in zip(GENES[n], BATCHES, strict=False):
        mean = 4 * torch.rand(len(genes), generator=generator, dtype=torch.float64)
        x = torch.poisson(mean.expand(n_cells, -1), generator=generator)
        minibatches.append(Minibatch(x, torch.tensor(batches)[torch.arange(n_cells) % len(batches)]))
    return minibatches


def noise(n_cells: int = B, seed: int = 1) -> Tensor:
    return torch.randn(n_cells, L + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def speaking_of(module: JVAE, mode: int) -> JVAE:
    module.mode = mode
    return module


def trained(n: int, **options) -> JVAE:
    """In evaluation mode after a few steps, without gradients."""
    module, cells = build(n, **options), make_cells(n, seed=7)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(3):
        for loss in module.losses(*cells):
            optimizer.zero_grad()
            getattr(loss, "total", loss).backward()
            optimizer.step()
    return module.eval().requires_grad_(False)


def label(options: dict) -> str:
    return ",".join(f"{k}={'/'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in options.items())


LIKELIHOODS = [("zinb", "zinb", "zinb"), MIXED, ("poisson", "nb", "nb"), ("nb", "zinb", "poisson")]
LIBRARIES = [(False, False, False), (True, True, True), (False, True, False)]
CROSSED = [
    {"reconstruction_losses": likelihoods, "model_library_bools": libraries, "dispersion": dispersion}
    for likelihoods, libraries, dispersion in product(LIKELIHOODS, LIBRARIES, ("gene", "gene-batch", "gene-cell"))
]
SINGLE = [
    {"n_layers_encoder_individual": 2},
    {"n_layers_encoder_shared": 2},
    {"n_layers_decoder_individual": 1},
    {"n_layers_decoder_individual": 1, "n_layers_decoder_shared": 0},
    {"n_layers_decoder_shared": 0},
    {"n_layers_decoder_shared": 0, "dispersion": "gene-cell"},
    {"n_layers_decoder_individual": 2, "n_layers_decoder_shared": 2, "dispersion": "gene-cell"},
    {"log_variational": False},
    {"kappa": 0.0},
    {"fool_step": "separate"},
]
EVERY = [
    *((1, options) for options in CROSSED[::9]),
    *((2, options) for options in [*SINGLE, *CROSSED[::7]]),
    *((3, options) for options in [*SINGLE, *CROSSED[::5]]),
]
variants = pytest.mark.parametrize(("n", "options"), EVERY, ids=lambda v: label(v) if isinstance(v, dict) else str(v))


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_arguments_and_defaults_of_the_seed():
    required = inspect.Parameter.empty
    expected = dict.fromkeys(
        ["dim_input_list", "total_genes", "indices_mappings", "reconstruction_losses", "model_library_bools"], required
    )
    expected |= {
        "n_latent": 10,
        "n_layers_encoder_individual": 1,
        "n_layers_encoder_shared": 1,
        "dim_hidden_encoder": 128,
        "n_layers_decoder_individual": 0,
        "n_layers_decoder_shared": 0,
        "dim_hidden_decoder_individual": 32,
        "dim_hidden_decoder_shared": 128,
        "dropout_rate_encoder": 0.1,
        "dropout_rate_decoder": 0.3,
        "n_batch": 0,
        "n_labels": 0,
        "dispersion": "gene-batch",
        "log_variational": True,
    }
    parameters = inspect.signature(JVAE).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} == expected


def test_config_is_what_the_constructor_takes():
    accepted = {p.name: p.default for p in inspect.signature(JVAE).parameters.values()}
    sizes = {"dim_input_list", "total_genes", "indices_mappings", "n_batch", "n_labels", "mode"}
    sizes |= {"library_log_means", "library_log_vars"}
    options = {f.name: f.default for f in fields(Config)}
    assert options.keys() | sizes == accepted.keys()
    differ = {name: value for name, value in options.items() if value != accepted[name]}
    assert differ == {"reconstruction_losses": None, "model_library_bools": None, "n_layers_decoder_shared": 1}


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("encode", ["cells", "mode"]),
        ("decode", ["z", "cells", "log_library", "shared", "y"]),  # mode, library and batch_index of the seed
        ("sample_from_posterior_z", ["x", "mode", "deterministic"]),
        ("sample_from_posterior_l", ["x", "mode", "deterministic"]),
        ("sample_scale", ["x", "mode", "batch_index", "y", "deterministic", "decode_mode"]),
        ("sample_rate", ["x", "mode", "batch_index", "y", "deterministic", "decode_mode"]),
        ("get_reconstruction_loss", ["x", "px_rate", "px_r", "px_dropout", "mode"]),
        ("forward", ["x", "local_l_mean", "local_l_var", "batch_index", "y", "mode"]),
    ],
)
def test_methods_of_the_seed(method, arguments):
    assert list(inspect.signature(getattr(JVAE, method)).parameters)[1:] == arguments


BAD = [
    ({"reconstruction_losses": ("zinb", "normal")}, "reconstruction_losses='normal' is not one of 'nb', 'poisson', "),
    ({"reconstruction_losses": ("zinb",)}, "reconstruction_losses has 1 entries; there are 2 data sets."),
    ({"model_library_bools": (True,)}, "model_library_bools has 1 entries; there are 2 data sets."),
    ({"model_library_bools": ("yes", "no")}, "model_library_bools holds 'yes'; True or False is needed for each."),
    ({"dispersion": "gene_cell"}, "dispersion='gene_cell' is not one of"),
    ({"dispersion": "gene-label"}, "dispersion='gene-label' needs labels, and data sets need not have the same ones"),
    (
        {"dispersion": "gene-cell", "reconstruction_losses": ("poisson", "poisson")},
        "dispersion='gene-cell' has no effect: no data set has a dispersion.",
    ),
    ({"fool_step": "both"}, "fool_step='both' is not one of 'joint', 'separate'."),
    ({"n_latent": 0}, "n_latent=0 must be 1 or more."),
    ({"n_layers_encoder_individual": 0}, "n_layers_encoder_individual=0 must be 1 or more."),
    ({"n_layers_encoder_shared": 0}, "n_layers_encoder_shared=0 must be 1 or more."),
    ({"n_layers_decoder_shared": -1}, "n_layers_decoder_shared=-1 must be 0 or more."),
    ({"dropout_rate_encoder": 1.0}, "dropout_rate_encoder=1.0 must be at least 0 and below 1."),
    ({"kappa": -1.0}, "kappa=-1.0 must be 0 or more, and finite."),
    ({"kappa": float("inf")}, "kappa=inf must be 0 or more, and finite."),
    ({"kappa": 0.0, "kappa_fades": True}, "kappa_fades=True has no effect with kappa=0: there is no critic."),
    ({"kappa": 0.0, "fool_step": "separate"}, "fool_step='separate' has no effect with kappa=0: there is no critic."),
    (
        {"dim_hidden_decoder_shared": 64, "n_layers_decoder_shared": 0},
        "dim_hidden_decoder_shared=64 has no effect with n_layers_decoder_individual=0 and n_layers_decoder_shared=0.",
    ),
    ({"dim_hidden_decoder_individual": 64}, "dim_hidden_decoder_individual=64 has no effect with"),
    (
        {"dim_hidden_decoder_individual": 64, "n_layers_decoder_individual": 1, "n_layers_decoder_shared": 0},
        "dim_hidden_decoder_individual=64 has no effect with n_layers_decoder_individual=1 and n_layers_decoder_shared",
    ),
    (
        {"dropout_rate_decoder": 0.5, "n_layers_decoder_shared": 0},
        "dropout_rate_decoder=0.5 has no effect with n_layers_decoder_individual=0 and",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: label(v) if isinstance(v, dict) else "")
def test_what_is_impossible_or_without_effect_is_refused(options, message):
    each = {"reconstruction_losses": ("zinb", "nb"), "model_library_bools": (False, False)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        models.build(SPEC, Config(**each | options), summary(2))


def test_mappings_must_fit_the_numbers_of_genes():
    with pytest.raises(ValueError, match="indices_mappings do not fit dim_input_list"):
        JVAE([3, 2], 5, [[0, 1, 2], [1, 3, 4]], ["zinb", "nb"], [False, False])
    with pytest.raises(ValueError, match=r"indices_mappings name genes \[7\] of 5"):
        JVAE([3, 2], 5, [[0, 1, 2], [3, 7]], ["zinb", "nb"], [False, False])
    with pytest.raises(ValueError, match="indices_mappings name a gene twice"):
        JVAE([3, 2], 5, [[0, 1, 2], [3, 3]], ["zinb", "nb"], [False, False])
    slices = JVAE([5, 2], 5, [slice(None), slice(1, 3)], ["zinb", "nb"], [False, False])
    assert slices.has_all == [True, False]
    assert slices.genes_1.tolist() == [1, 2]


VALUES = {
    "reconstruction_losses": (("zinb", "zinb"), ("nb", "zinb"), ("zinb", "nb"), ("zinb", "poisson")),
    "model_library_bools": ((False, False), (True, False), (False, True)),
    "n_latent": (3, 2),
    "n_layers_encoder_individual": (1, 2),
    "n_layers_encoder_shared": (1, 2),
    "dim_hidden_encoder": (8, 7),
    "n_layers_decoder_individual": (0, 1),
    "n_layers_decoder_shared": (0, 1),
    "dim_hidden_decoder_individual": (6, 5),
    "dim_hidden_decoder_shared": (6, 5),
    "dropout_rate_encoder": (0.1, 0.0),
    "dropout_rate_decoder": (0.3, 0.0),
    "dispersion": ("gene", "gene-batch", "gene-cell"),
    "log_variational": (True, False),
    "kappa": (1.0, 2.0, 0.0),
    "kappa_fades": (False, True),
    "fool_step": ("joint", "separate"),
}
LAYERS = {"n_layers_decoder_individual": 1, "n_layers_decoder_shared": 1}


def test_every_option_is_tried():
    assert VALUES.keys() == {f.name for f in fields(Config)}


@pytest.mark.parametrize("option", VALUES)
def test_every_value_of_an_option_has_an_effect(option):
    beside = LAYERS if option.endswith(("decoder_individual", "decoder_shared", "rate_decoder")) else {}
    found = set()
    for value in VALUES[option]:
        module = build(2, **beside | {option: value})
        torch.manual_seed(1)
        steepness = []
        for loss in module.losses(*make_cells(2), kl_weight=0.3):
            module.zero_grad()
            getattr(loss, "total", loss).backward()
            steepness.append(sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None))
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in module.state_dict().items())
        found.add((shapes, *steepness))
    assert len(found) == len(VALUES[option])


# ---- the loss ------------------------------------------------------------------------------------------------------


@variants
def test_the_loss_is_the_mean_of_its_parts_over_all_cells(n, options):
    module, cells = build(n, **options).eval(), make_cells(n)
    for weight in (0.0, 0.3, torch.tensor(1.0)):
        loss = module.loss(*cells, kl_weight=weight, noise=noise())
        assert isinstance(loss, Loss)
        assert loss.reconstruction.shape == loss.kl_z.shape == loss.kl_library.shape == (n * B,)
        assert (loss.kl_z >= 0).all()
        assert (loss.kl_library >= 0).all()
        expected = (loss.reconstruction + weight * (loss.kl_z + loss.kl_library)).mean()
        assert_close(loss.total, expected, **FLOAT64)


@variants
def test_the_loss_of_each_data_set_does_not_depend_on_the_others(n, options):
    module, cells = build(n, **options).eval(), make_cells(n)
    together = module.loss(*cells, noise=noise())
    for m in range(n):
        alone = speaking_of(module, m).loss(cells[m], noise=noise())
        beside = module.loss(*(cells[k] if k == m else None for k in range(n)), noise=noise()) if n > 1 else alone
        own = slice(m * B, (m + 1) * B)
        for part in ("reconstruction", "kl_z", "kl_library"):
            for found in (alone, beside):
                assert_close(getattr(found, part).double(), getattr(together, part)[own].double(), **FLOAT64)


@variants
def test_the_parts_are_those_of_the_generative_process(n, options):
    """Written out: posterior, normalised profile over the genes of the data set, likelihood, divergences."""
    module, cells = trained(n, **options), make_cells(n)
    for m, (genes, own) in enumerate(zip(GENES[n], cells, strict=True)):
        found = speaking_of(module, m).loss(own, noise=noise())
        qz, ql = module.posteriors(own)
        z = qz.loc + qz.scale * noise()[:, :L]
        hidden = module.decoder.hidden(z, m, *module.covariates.codes(own))
        rho = torch.softmax(module.decoder.px_scale_decoder(hidden), -1)[:, genes]
        rho = rho / rho.sum(-1, keepdim=True)
        if ql is None:
            library = own.x.sum(-1, keepdim=True) + 1e-8
            kl_library = torch.zeros(B)
        else:
            library = torch.exp(ql.loc + ql.scale * noise()[:, -1:])
            of_batch = own.batch_index
            means, variances = (torch.tensor(v[m]).double()[of_batch] for v in priors(n))
            kl_library = kl_divergence(Normal(*ql), Normal(means.unsqueeze(1), variances.sqrt().unsqueeze(1))).squeeze(
                1
            )
        theta = dropout = None
        likelihood = module.reconstruction_losses[m]
        if likelihood != "poisson":
            log_theta = module.decoder.px_r_decoder(hidden) if module.dispersion is None else module.dispersion(own)
            theta = torch.exp(log_theta)[..., genes]
        if likelihood == "zinb":
            dropout = module.decoder.px_dropout_decoder(hidden)[:, genes]
        px = Expression(rho, library * rho, theta, dropout)
        tolerance = LOG_EPS if likelihood == "poisson" else FLOAT64
        assert_close(found.reconstruction, -log_likelihood(likelihood, own.x, px), **tolerance)
        assert_close(found.kl_z, kl_divergence(Normal(*qz), Normal(0.0, 1.0)).sum(-1), **FLOAT64)
        # The module holds its prior in float32.
        assert_close(found.kl_library.double(), kl_library.double(), rtol=1e-6, atol=1e-6)


def priors(n: int) -> tuple:
    joint = summary(n).joint
    return joint.library_log_means, joint.library_log_vars


def log_likelihood(name: str, x: Tensor, px: Expression) -> Tensor:
    if name == "zinb":
        return models.log_zinb_positive(x, px.rate, px.theta, px.dropout_logits).sum(-1)
    if name == "nb":
        return models.log_nb_positive(x, px.rate, px.theta).sum(-1)
    return torch.distributions.Poisson(px.rate).log_prob(x).sum(-1)


def moves(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


@variants
def test_every_parameter_receives_a_gradient(n, options):
    module, cells = build(n, **options), make_cells(n)
    # A bias in front of a batch normalisation cancels in training mode: evaluation mode tells it from an unused one.
    module.eval().loss(*cells, noise=noise()).total.backward()
    of_critic = {name for name, _ in module.named_parameters() if name.startswith("critic.")}
    assert bool(of_critic) == (n > 1 and module.kappa > 0)
    assert {name for name, p in module.named_parameters() if not moves(p)} == of_critic
    module.zero_grad(set_to_none=True)
    sum(getattr(loss, "total", loss) for loss in module.train().losses(*cells)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert all(moves(p) for name, p in module.named_parameters() if name in of_critic)


@numbers
def test_a_gene_learns_where_it_was_measured_and_nowhere_else(n):
    module = build(n, reconstruction_losses=MIXED).eval()
    module.loss(*make_cells(n), noise=noise()).total.backward()
    n_genes, n_batch = summary(n).joint.n_genes, summary(n).n_batch
    measured = torch.zeros(n_genes, n_batch, dtype=torch.bool)
    for m, (genes, batches) in enumerate(zip(GENES[n], BATCHES, strict=False)):
        if MIXED[m] != "poisson":
            measured[torch.tensor(genes)[:, None], torch.tensor(batches)] = True
    assert torch.equal(module.dispersion.log_theta.grad != 0, measured.T)
    inflated = torch.zeros(n_genes, dtype=torch.bool)
    inflated[list(GENES[n][0])] = True
    assert torch.equal((module.decoder.px_dropout_decoder.weight.grad != 0).any(-1), inflated)
    known = torch.zeros(n_genes, dtype=torch.bool)
    known[[g for genes in GENES[n] for g in genes]] = True
    assert torch.equal((module.decoder.px_scale_decoder.weight.grad != 0).any(-1), known)


def test_loss_falls():
    module, cells = build(3), make_cells(3)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    elbo = []
    for _ in range(15):
        torch.manual_seed(0)  # the same dropout at every step
        loss = module.loss(*cells, noise=noise())
        elbo.append((loss.reconstruction + loss.kl_z).mean().item())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert elbo[-1] < elbo[0] - 1


# ---- the critic ----------------------------------------------------------------------------------------------------


def watched_by_hand(module: JVAE, cells: list[Minibatch], draw=lambda loc: noise()[:, :L]) -> list[Tensor]:
    """Means of q(z | x) with a noise of standard deviation 0.5."""
    means = [module.encode(c, m).loc for m, c in enumerate(cells)]
    return [loc + 0.5 * draw(loc) for loc in means]


def by_hand(module: JVAE, z: list[Tensor], weight: float) -> Tensor:
    """Cross-entropy of the critic, and ``weight`` times that of believing in all other data sets alike."""
    z, truth = torch.cat(z), torch.arange(len(z)).repeat_interleave(B)
    n = len(module.libraries)
    log_p = log_softmax(module.critic(z), -1)
    others = (1 - torch.nn.functional.one_hot(truth, n)) / (n - 1)
    return cross_entropy(module.critic(z), truth) - weight * (others * log_p).sum(-1).mean()


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(
    ("options", "weight"), [({}, 1.0), ({"kappa": 2.5}, 2.5), ({"kappa_fades": True}, 0.7)], ids=str
)
def test_in_training_the_critic_is_beside_the_elbo(n, options, weight):
    module, cells = without_dropout(build(n, **options)), make_cells(n)
    (loss,) = module.losses(*cells, kl_weight=0.3)
    assert isinstance(loss, Loss)
    loss = module.loss(*cells, kl_weight=0.3, noise=noise())
    elbo = (loss.reconstruction + 0.3 * (loss.kl_z + loss.kl_library)).mean()
    assert_close(loss.total - elbo, by_hand(module, watched_by_hand(module, cells), weight), **FLOAT64)
    evaluated = module.eval().loss(*cells, kl_weight=0.3, noise=noise())
    assert_close(evaluated.total, (evaluated.reconstruction + 0.3 * evaluated.kl_z).mean(), **FLOAT64)


@pytest.mark.parametrize("n", [2, 3])
def test_the_critic_learns_to_tell_and_the_encoder_to_hide(n):
    """Neither has a gradient of what the other wants."""
    gradients = {}
    for kappa in (0.0, 1.0, 3.0):
        module, cells = without_dropout(build(n)), make_cells(n)
        module.kappa = kappa
        module.loss(*cells, noise=noise()).total.backward()
        gradients[kappa] = {name: p.grad for name, p in module.named_parameters()}
    for name in gradients[1.0]:
        of_none, of_one, of_three = (gradients[kappa][name] for kappa in (0.0, 1.0, 3.0))
        if name.startswith("critic."):
            assert torch.equal(of_one, of_three)  # how much its belief counts is not its concern
        else:
            assert_close(of_three - of_none, 3 * (of_one - of_none), **FLOAT64)
        if name.startswith("decoder."):
            assert torch.equal(of_one, of_none)
    module.zero_grad()
    z = watched_by_hand(module, cells)
    truth = torch.arange(n).repeat_interleave(B)
    cross_entropy(module.critic(torch.cat(z).detach()), truth).backward()
    for name, parameter in module.critic.named_parameters():
        assert_close(gradients[1.0][f"critic.{name}"], parameter.grad, **FLOAT64)


@pytest.mark.parametrize("n", [2, 3])
def test_fooling_can_take_a_step_of_its_own(n):
    module, cells = without_dropout(build(n, fool_step="separate")), make_cells(n)
    torch.manual_seed(5)
    fooling, loss = module.losses(*cells, kl_weight=0.3)
    torch.manual_seed(5)
    z = watched_by_hand(module, cells, torch.randn_like)
    assert_close(fooling, by_hand(module, z, 1.0), **FLOAT64)
    expected = (loss.reconstruction + 0.3 * (loss.kl_z + loss.kl_library)).mean()
    assert_close(loss.total, expected, **FLOAT64)
    fooling.backward()
    assert {name.partition(".")[0] for name, p in module.named_parameters() if moves(p)} == {"critic", "encoder"}


def test_how_sure_a_posterior_is_tells_the_critic_nothing():
    module, cells = trained(2), make_cells(2)
    qz = module.encode(cells[0], 0)
    sharp = Posterior(qz.loc, qz.scale / 100)
    assert torch.equal(module.watched(sharp, noise()[:, :L]), module.watched(qz, noise()[:, :L]))
    torch.manual_seed(3)
    draws = torch.stack([module.watched(qz) for _ in range(2000)]) - qz.loc
    # Of 2000 * 48 normal draws: the standard error of their mean, and of their standard deviation, which is 1/sqrt(2n).
    assert draws.mean().abs() < N_STANDARD_ERRORS * 0.5 / np.sqrt(draws.numel())
    assert abs(draws.std() - 0.5) < N_STANDARD_ERRORS * 0.5 / np.sqrt(2 * draws.numel())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_where_noise_is_given_nothing_else_is_drawn(mode):
    module, cells = getattr(without_dropout(build(3)), mode)(), make_cells(3)
    before = torch.get_rng_state()
    first = module.loss(*cells, noise=noise())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(module.loss(*cells, noise=noise()).total, first.total)


def test_with_one_data_set_or_no_kappa_there_is_no_critic():
    for module in (build(1), build(2, kappa=0.0)):
        assert module.critic is None
        with pytest.raises(ValueError, match="no critic: it was made with kappa=0, or of one data set"):
            module.confusion(torch.zeros(2, L))


@pytest.mark.parametrize("n", [2, 3])
def test_confusion_is_a_probability_of_each_data_set(n):
    module = build(n)
    found = module.confusion(torch.randn(4, L, dtype=torch.float64))
    assert found.shape == (4, n)
    assert_close(found.sum(-1), torch.ones(4, dtype=torch.float64), **FLOAT64)


# ---- inference -----------------------------------------------------------------------------------------------------


def inferred(module: JVAE, cells: Minibatch, draws: Tensor) -> dict[str, Tensor]:
    """All that the read-outs take from a module, per cell."""
    posteriors = qz, _ = module.posteriors(cells)
    z, log_library = module.draw(cells, posteriors, draws)
    px, every = module.decode(z, cells, log_library), module.decode_joint(z, cells, None, log_library)
    loss = module.loss(cells, noise=draws)
    return {
        "loc": qz.loc,
        "z": z,
        "log_library": log_library,
        "scale": px.scale,
        "rate": px.rate,
        "scale of all": every.scale,
        "rate of all": every.rate,
        "log_likelihood": module.log_likelihood(cells.x, px),
        "log_weight": module.log_weight(cells, posteriors, draws),
        "reconstruction": loss.reconstruction,
        "kl": loss.kl_z + loss.kl_library,
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        assert_close(found[key], value, **FLOAT64, msg=lambda m, k=key: f"{k}: {m}")


@variants
def test_minibatches_and_order_of_cells_do_not_change_inference(n, options):
    module, draws = trained(n, **options), noise()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(3))
    for m, cells in enumerate(make_cells(n)):
        whole = inferred(speaking_of(module, m), cells, draws)
        pieces = [inferred(module, take(cells, rows), draws[rows]) for rows in torch.arange(B).split(7)]
        assert_same({key: torch.cat([piece[key] for piece in pieces]) for key in whole}, whole)
        permuted = inferred(module, take(cells, order), draws[order])
        assert_same(permuted, {key: value[order] for key, value in whole.items()})


@variants
def test_what_is_decoded_is_a_part_of_what_is_decoded_for_all_genes(n, options):
    module = trained(n, **options)
    for m, (genes, cells) in enumerate(zip(GENES[n], make_cells(n), strict=True)):
        z, log_library = speaking_of(module, m).draw(cells, module.posteriors(cells), noise())
        own, every = module.decode(z, cells, log_library), module.decode_joint(z, cells, None, log_library)
        assert own.scale.shape == (B, len(genes))
        assert every.scale.shape == (B, summary(n).joint.n_genes)
        for part in ("scale", "rate"):
            assert_close(getattr(own, part), getattr(every, part)[:, genes], **FLOAT64)
        assert_close(module.scale(z, cells), own.scale, **FLOAT64)
        if own.theta is not None:
            assert_close(own.theta, every.theta[..., genes], **FLOAT64)
        if own.dropout_logits is not None:
            assert_close(own.dropout_logits, every.dropout_logits[..., genes], **FLOAT64)
        assert (own.dropout_logits is not None) == (module.reconstruction_losses[m] == "zinb")
        assert (own.theta is not None) == (module.reconstruction_losses[m] != "poisson")
        for k, of_other in enumerate(GENES[n]):
            px = module.decode_joint(z, cells, k, log_library)
            assert (px.scale > 0).all()
            assert_close(px.scale[:, of_other].sum(-1), torch.ones(B, dtype=torch.float64), **FLOAT64)
            assert_close(px.rate, torch.exp(log_library) * px.scale, **FLOAT64)


@numbers
def test_without_a_log_library_it_is_the_known_one_or_its_posterior_mean(n):
    module = trained(n, model_library_bools=(False, True, True))
    for m, cells in enumerate(make_cells(n)):
        z = speaking_of(module, m).encode(cells).loc
        ql = module.encode_library(cells)
        assert (ql is None) == (m == 0)
        log_library = torch.log(cells.x.sum(-1, keepdim=True) + 1e-8) if ql is None else ql.loc
        px = module.decode_joint(z, cells)
        assert_close(px.rate, torch.exp(log_library) * px.scale, **FLOAT64)
        assert_close(module.decode(z, cells).rate, px.rate[:, GENES[n][m]], **FLOAT64)


@variants
def test_samples_decode_as_one_by_one(n, options):
    module = trained(n, **options)
    for m, cells in enumerate(make_cells(n)):
        posteriors = speaking_of(module, m).posteriors(cells)
        drawn = [module.draw(cells, posteriors, noise(seed=s)) for s in range(3)]
        z, log_library = (torch.stack(values) for values in zip(*drawn, strict=True))
        together = module.decode(z, cells, log_library)
        every = module.decode_joint(z, cells, None, log_library)
        for s in range(3):
            alone = module.decode(z[s], cells, log_library[s])
            assert_close(together.rate[s], alone.rate, **FLOAT64)
            assert_close(every.rate[s], module.decode_joint(z[s], cells, None, log_library[s]).rate, **FLOAT64)
            found = module.log_likelihood(cells.x, together)[s]
            assert_close(found, module.log_likelihood(cells.x, alone), **FLOAT64)


@variants
def test_importance_weight_is_joint_over_posterior(n, options):
    module, draws = trained(n, **options), noise()
    for m, cells in enumerate(make_cells(n)):
        qz, ql = posteriors = speaking_of(module, m).posteriors(cells)
        z, log_library = module.draw(cells, posteriors, draws)
        expected = -module.loss(cells, noise=draws).reconstruction
        expected = expected + (Normal(0.0, 1.0).log_prob(z) - Normal(*qz).log_prob(z)).sum(-1)
        if ql is not None:
            ratio = Normal(*module.library.prior(cells)).log_prob(log_library) - Normal(*ql).log_prob(log_library)
            expected = expected + ratio.squeeze(-1)
        assert_close(module.log_weight(cells, posteriors, draws), expected, **FLOAT64)


def test_only_individual_layers_of_the_decoder_know_the_batch():
    for options, sees in [({}, False), ({"n_layers_decoder_shared": 0}, False), (LAYERS, True)]:
        module = speaking_of(trained(2, **options), 0)
        cells = make_cells(2)[0]
        z = module.encode(cells).loc
        here, there = (module.decode(z, cells._replace(batch_index=torch.full((B,), k))) for k in BATCHES[0])
        assert torch.equal(here.scale, there.scale) != sees
        assert not torch.equal(here.theta, there.theta)  # dispersion by batch
        own = cells.batch_index == 0
        assert torch.equal(module.decode(z, cells).scale[own], here.scale[own])


def test_batch_normalisation_knows_data_sets_apart():
    module, cells = build(3), make_cells(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.loss(None, cells[1], None)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    layers = ("encoder.encoders.1.layers.0", "encoder.encoder_shared.layers.0", "decoder.px_decoder_final.layers.0")
    own = [f"{layer}.batch_norm.{int('shared' in layer or 'final' in layer)}" for layer in layers]
    moments = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{moment}" for norm, moment in product(own, moments)}


@pytest.mark.parametrize("options", [{}, LAYERS], ids=label)
def test_cells_are_decoded_with_the_batch_normalisation_of_the_data_set_that_they_are_decoded_as(options):
    module, cells = trained(3, **options), make_cells(3)[0]
    z = speaking_of(module, 0).encode(cells).loc
    before = [module.decode_joint(z, cells, k).scale for k in range(3)]
    assert all(not torch.allclose(before[k], before[(k + 1) % 3]) for k in range(3))
    for name, values in module.decoder.named_parameters():
        if ".batch_norm.1." in name:
            values += 0.5
    after = [module.decode_joint(z, cells, k).scale for k in range(3)]
    assert [torch.equal(one, two) for one, two in zip(before, after, strict=True)] == [True, False, True]


def test_without_layers_a_gene_is_the_same_function_of_z_in_all_data_sets():
    module, cells = trained(3, n_layers_decoder_shared=0), make_cells(3)[0]
    z = speaking_of(module, 0).encode(cells).loc
    ratios = [px.scale / px.scale[:, :1] for px in (module.decode_joint(z, cells, k) for k in range(3))]
    assert_close(ratios[1], ratios[0], **FLOAT64)
    assert_close(ratios[2], ratios[0], **FLOAT64)


@variants
def test_the_order_of_the_genes_of_a_data_set_does_not_matter(n, options):
    module, cells, draws = trained(n, **options), make_cells(n), noise()
    orders = [np.random.default_rng(m).permutation(len(genes)) for m, genes in enumerate(GENES[n])]
    genes = tuple(tuple(np.array(g)[order].tolist()) for g, order in zip(GENES[n], orders, strict=True))
    joint = replace(summary(n).joint, genes=genes)
    other = build(n, of=replace(summary(n), joint=joint), **options).eval()
    state = module.state_dict()
    for m, order in enumerate(orders):
        state[f"genes_{m}"] = torch.tensor(genes[m])
        firsts = [
            f"encoder.encoders.{m}.layers.0.linear.weight",
            f"libraries.{m}.encoder.encoder.layers.0.linear.weight",
        ]
        for first in (name for name in firsts if name in state):
            state[first] = state[first][:, order]
    other.load_state_dict(state)
    for m, order in enumerate(orders):
        here = inferred(speaking_of(module, m), cells[m], draws)
        there = inferred(speaking_of(other, m), cells[m]._replace(x=cells[m].x[:, order]), draws)
        assert_same(there, {key: value[:, order] if key in ("scale", "rate") else value for key, value in here.items()})


def test_the_order_of_the_data_sets_does_not_matter():
    options = LAYERS | {"reconstruction_losses": MIXED, "model_library_bools": (False, True, True)}
    module, cells, draws = trained(3, **options), make_cells(3), noise()
    joint = summary(3).joint
    turned = {f.name: tuple(getattr(joint, f.name)[::-1]) for f in fields(joint) if f.name != "n_genes"}
    options |= {"reconstruction_losses": MIXED[::-1], "model_library_bools": (True, True, False)}
    other = build(3, of=replace(summary(3), joint=replace(joint, **turned)), **options).eval()
    swap = re.compile(r"(^genes_|^encoder\.encoders\.|^libraries\.|batch_norm\.)([02])(?=\.|$)")
    # Individual encoders have a batch normalisation each, which is its first and only one.
    state = {
        (name if re.match(r"(encoder\.encoders|libraries)\.1\.", name) else _turned(swap, name)): value
        for name, value in module.state_dict().items()
    }
    state |= {
        name: value[[2, 1, 0]] for name, value in state.items() if re.match(r"critic\..*", name) and len(value) == 3
    }
    other.load_state_dict(state)
    for m in range(3):
        here, there = (inferred(speaking_of(one, k), cells[m], draws) for one, k in ((module, m), (other, 2 - m)))
        assert_same(there, here)
    assert_close(other.loss(*cells[::-1], noise=draws).total, module.loss(*cells, noise=draws).total, **FLOAT64)
    z = torch.randn(5, L, dtype=torch.float64)
    assert_close(other.confusion(z), module.confusion(z)[:, [2, 1, 0]], **FLOAT64)


def _turned(swap: re.Pattern, name: str) -> str:
    """The name of the same tensor where the first data set is the last: only the first number that names one."""
    return swap.sub(lambda match: match[1] + str(2 - int(match[2])), name, count=1)


@numbers
def test_odd_sizes(n):
    genes = (((0,),), ((0,), (0, 1)), ((0,), (0, 1), (2, 1)))[n - 1]
    module = build(n, of=summary_of(genes, n, 1), n_latent=1, dim_hidden_encoder=1, model_library_bools=(True,) * n)
    zeros = torch.zeros(3, dtype=torch.long)
    cells = [Minibatch(torch.ones(3, len(g), dtype=torch.float64), zeros) for g in genes]
    assert module.loss(*cells).total.isfinite()
    empty = [c._replace(x=torch.zeros_like(c.x)) for c in cells]  # cells without a count
    assert module.loss(*empty).total.isfinite()
    assert module.eval().loss(*(take(c, slice(1)) for c in cells)).total.isfinite()


def test_a_small_data_set_beside_a_large_one():
    module, (small, large) = build(2), make_cells(2)
    loss = module.loss(take(small, slice(3)), large)
    assert loss.reconstruction.shape == (3 + B,)
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("mode", [None, -1, 2])
def test_a_data_set_must_be_named(mode):
    module, cells = build(2), make_cells(2)[0]
    module.mode = mode
    for ask in (lambda: module.encode(cells), lambda: module.loss(cells), lambda: module.likelihood):
        with pytest.raises(ValueError, match=rf"mode={mode} names none of 2 data sets: give their number, from 0"):
            ask()
    assert module.likelihoods == ("zinb", "nb")


# ---- kernels -------------------------------------------------------------------------------------------------------


@variants
def test_a_training_step_with_kernels_is_that_of_the_plain_formula_in_float64(n, options, monkeypatch):
    module, cells = without_dropout(build(n, **options)), make_cells(n)
    exact, exact_gradients = loss_and_gradients(module, cells, noise())
    for likelihood in module.likelihoods:  # a kernel is tried before its first use
        fused.choose(likelihood, "cpu", torch.float32)
    used, plain = [], fused.log_likelihood
    monkeypatch.setattr(fused, "log_likelihood", lambda *inputs: used.append(1) or plain(*inputs))
    sparse = [c._replace(x=SparseRows.from_dense(c.x.float())) for c in cells]
    found, gradients = loss_and_gradients(module.float(), sparse, noise().float())
    assert len(used) == n
    assert_close(found.double(), exact, **MODULE_WITH_KERNEL)
    largest = max(float(g.abs().max()) for g in exact_gradients.values())
    for key, gradient in gradients.items():
        expected = exact_gradients[key]
        assert_close(gradient.double(), expected, rtol=0, atol=MODULE_WITH_KERNEL["rtol"] * largest, msg=key)


def loss_and_gradients(module, cells, draws):
    module.zero_grad()
    loss = module.loss(*cells, kl_weight=0.5, noise=draws)
    loss.total.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return loss.reconstruction.detach(), gradients


# ---- saving --------------------------------------------------------------------------------------------------------


@variants
def test_state_dict_round_trip(n, options):
    module, cells, draws = trained(n, **options), make_cells(n), noise()
    other = build(n, seed=99, **options).eval()
    other.load_state_dict(module.state_dict())
    for m in range(n):
        here, there = (inferred(speaking_of(one, m), cells[m], draws) for one in (module, other))
        assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.parametrize("dataset", ["rna", "spatial"])
def test_restored_from_plain_arrays_it_speaks_of_its_data_set(dataset):
    options = {"model_library_bools": (True, True)}
    module, cells = trained(2, **options).float(), make_cells(2)
    m = ["rna", "spatial"].index(dataset)
    saved = SavedFit(
        key="k",
        model="gimvi",
        config=asdict(config(2, **options)),
        run={},
        setup={},
        var_names=[],
        state={key: value.numpy() for key, value in module.state_dict().items()},
        history=pd.DataFrame(),
        status={},
        joint={"datasets": np.array(["rna", "spatial"]), "dataset": dataset},
    )
    restored = models.restore(saved, summary(2))
    assert restored.mode == m
    assert not restored.training
    own = cells[m]._replace(x=cells[m].x.float())
    with torch.no_grad():
        assert torch.equal(restored.encode(own).loc, speaking_of(module, m).encode(own).loc)
        assert torch.equal(restored.library.prior(own).loc, module.library.prior(own).loc)
        next(restored.parameters()).fill_(7)
    state = module.state_dict()
    assert all(np.array_equal(array, state[name]) for name, array in saved.state.items())  # the fit keeps its own


# ---- the seed's vocabulary -----------------------------------------------------------------------------------------


@pytest.fixture
def of_two() -> tuple[JVAE, list[Minibatch]]:
    """A module of two data sets, whose second has a latent library, and cells of both."""
    return trained(2, reconstruction_losses=("zinb", "nb"), model_library_bools=(False, True)), make_cells(2)


@pytest.mark.parametrize("mode", [0, 1])
def test_encode_gives_moments_and_samples(of_two, mode):
    module, cells = of_two
    x = cells[mode].x
    torch.manual_seed(3)
    qz_m, qz_v, z, ql_m, ql_v, log_library = module.encode(x, mode)
    qz, ql = speaking_of(module, mode).posteriors(cells[mode])
    assert torch.equal(qz_m, qz.loc)
    assert torch.equal(qz_v, qz.scale**2)
    torch.manual_seed(3)
    assert torch.equal(z, qz.loc + qz.scale * torch.randn_like(qz.loc))
    if mode == 0:
        assert ql_m is None
        assert ql_v is None
        assert_close(log_library, torch.log(x.sum(-1, keepdim=True)), rtol=1e-8, atol=1e-8)  # 1e-8 is added
    else:
        assert torch.equal(ql_m, ql.loc)
        assert torch.equal(ql_v, ql.scale**2)
        assert torch.equal(log_library, ql.loc + ql.scale * torch.randn_like(ql.loc))


@pytest.mark.parametrize("mode", [0, 1])
def test_decode_takes_a_mode_and_gives_all_genes(of_two, mode):
    module, cells = of_two
    qz_m, *_ = module.encode(cells[mode].x, mode)
    log_library = torch.full((B, 1), 2.0, dtype=torch.float64)
    batch_index = cells[mode].batch_index
    for shape in ((B,), (B, 1)):
        scale, theta, rate, dropout = module.decode(qz_m, mode, log_library, batch_index.reshape(shape))
        px = speaking_of(module, mode).decode_joint(qz_m, cells[mode], None, log_library)
        for found, expected in zip(
            (scale, theta, rate, dropout), (px.scale, px.theta, px.rate, px.dropout_logits), strict=True
        ):
            assert torch.equal(found, expected)
    assert_close(scale[:, GENES[2][mode]].sum(-1), torch.ones(B, dtype=torch.float64), **FLOAT64)


@pytest.mark.parametrize("mode", [0, 1])
def test_samples_and_means_of_latent_variables(of_two, mode):
    module, cells = of_two
    x = cells[mode].x
    qz_m, qz_v, _, ql_m, ql_v, known = module.encode(x, mode)
    assert torch.equal(module.sample_from_posterior_z(x, mode, deterministic=True), qz_m)
    z = torch.stack([module.sample_from_posterior_z(x, mode) for _ in range(400)])
    assert ((z.mean(0) - qz_m).abs() < N_STANDARD_ERRORS * torch.sqrt(qz_v / 400)).all()
    mean = module.sample_from_posterior_l(x, mode, deterministic=True)
    samples = torch.stack([module.sample_from_posterior_l(x, mode) for _ in range(400)])
    if mode == 0:
        assert torch.equal(mean, known)
        assert (samples == known).all()
    else:
        assert torch.equal(mean, ql_m)
        assert ((samples.mean(0) - ql_m).abs() < N_STANDARD_ERRORS * torch.sqrt(ql_v / 400)).all()


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("decode_mode", [None, 0, 1])
def test_sample_scale_and_rate_are_imputations(of_two, mode, decode_mode):
    module, cells = of_two
    own = cells[mode]
    options = {"deterministic": True, "decode_mode": decode_mode}
    scale = module.sample_scale(own.x, mode, own.batch_index, **options)
    rate = module.sample_rate(own.x, mode, own.batch_index, **options)
    px = speaking_of(module, mode).decode_joint(module.encode(own).loc, own, decode_mode)
    assert_close(scale, px.scale, **FLOAT64)
    assert_close(rate, px.rate, **FLOAT64)
    torch.manual_seed(0)
    one = module.sample_scale(own.x, mode, own.batch_index, decode_mode=decode_mode)
    assert not torch.equal(one, scale)


def test_get_sample_rate_is_of_the_first_data_set(of_two):
    module, cells = of_two
    torch.manual_seed(0)
    found = module.get_sample_rate(cells[0].x, cells[0].batch_index)
    torch.manual_seed(0)
    assert torch.equal(found, module.sample_rate(cells[0].x, 0, cells[0].batch_index))


@pytest.mark.parametrize("mode", [0, 1])
def test_forward_and_reconstruction_loss(of_two, mode):
    module, cells = of_two
    own = cells[mode]
    torch.manual_seed(3)
    reconstruction, kl = module(own.x, batch_index=own.batch_index, mode=mode)
    torch.manual_seed(3)
    loss = speaking_of(module, mode).loss(own)
    assert torch.equal(reconstruction, loss.reconstruction)
    assert torch.equal(kl, loss.kl_z + loss.kl_library)
    torch.manual_seed(3)
    _, _, z, _, _, log_library = module.encode(own.x, mode)
    _, px_r, px_rate, px_dropout = module.decode(z, mode, log_library, own.batch_index)
    assert_close(module.get_reconstruction_loss(own.x, px_rate, px_r, px_dropout, mode), reconstruction, **FLOAT64)


def test_forward_takes_another_prior_of_the_library(of_two):
    module, cells = of_two
    own = cells[1]
    mean, var = torch.full((B,), 1.7), torch.linspace(0.1, 2.0, B)
    divergences = []
    for prior in [(None, None), (mean, var), (mean.unsqueeze(1), var.unsqueeze(1))]:
        torch.manual_seed(3)
        divergences.append(module(own.x, *prior, own.batch_index, mode=1)[1])
    ql = speaking_of(module, 1).encode_library(own)
    expected = kl_divergence(Normal(*ql), Normal(mean.unsqueeze(1), var.sqrt().unsqueeze(1))) - kl_divergence(
        Normal(*ql), Normal(*module.library.prior(own))
    )
    assert_close(divergences[1] - divergences[0], expected.squeeze(1), **FLOAT32)
    assert torch.equal(divergences[1], divergences[2])


@pytest.mark.parametrize("prior", [(1.0, 1.0), (1.0, None), (None, 1.0)])
def test_half_a_prior_or_one_without_use(of_two, prior):
    module, cells = of_two
    mode = 0 if None not in prior else 1
    given = [None if p is None else torch.full((B, 1), p, dtype=torch.float64) for p in prior]
    with pytest.raises(ValueError, match="are the prior of a latent library: give both"):
        module(cells[mode].x, *given, cells[mode].batch_index, mode=mode)


def test_posteriors_are_of_the_contract(of_two):
    module, cells = of_two
    assert isinstance(module.encode(cells[1], 1), Posterior)
    speaking_of(module, 1).encode(cells[0].x, 0)
    assert module.mode == 1  # asking about another data set does not make the module speak of it from then on
