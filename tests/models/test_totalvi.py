"""totalVI: counts of proteins that are background or foreground, a bound that can be integrated, and a critic."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from _small import N_CELLS, PROTEINS, SUMMARY, all_measured, build, make_cells, noise, take
from _tolerances import FLOAT32, FLOAT64, N_STANDARD_ERRORS, QUADRATURE
from scipy import stats
from scipy.special import expit
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy, log_softmax, softplus
from torch.testing import assert_close

from scvi_ext import models
from scvi_ext._contract import DataSummary, Minibatch, ProteinExpression
from scvi_ext.functional.divergences import kl_standard_normal

COMPLETE = replace(SUMMARY, proteins=all_measured(4, 3))
MASK = torch.tensor(PROTEINS.protein_batch_mask)
P = PROTEINS.n_proteins

# eps = 1e-8 inside the logarithms, at up to 40 counts of each of four proteins and a background of at least 0.02.
LOG_EPS_OF_PROTEINS = {"rtol": 0.0, "atol": 1e-4}


def learned(summary: DataSummary = SUMMARY, **options: object) -> nn.Module:
    """In evaluation mode; parameters that start equal for all proteins or batches have been drawn."""
    module = build("totalvi", summary, **options).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "log_theta" in name or name in ("background_mean", "background_log_scale", "log_efficiency"):
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def without_dropout(module: nn.Module) -> nn.Module:
    """In training mode, as far as that is not random."""
    for dropout in (m for m in module.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    return module.train()


def sampled(module: nn.Module, cells: Minibatch, draws: Tensor) -> tuple[ProteinExpression, Tensor]:
    """What is decoded at one posterior sample, and the log background of it."""
    z, _ = module.draw(cells, module.posteriors(cells), draws)
    py = module.decode_protein(module.transform_z(z), cells)
    return py, py.background.loc + py.background.scale * draws[:, module.n_latent : -1]


def parts_of(module: nn.Module, cells: Minibatch, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction loss of the proteins, and KL of the background, each per cell."""
    py, log_background = sampled(module, cells, draws)
    q, p = py.background, module.prior(cells)
    measured = module.protein_batch_mask[cells.batch_index]
    return -module.log_py(py, cells, log_background), (measured * kl_divergence(Normal(*q), Normal(*p))).sum(-1)


def gradients(module: nn.Module, total: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ---- the likelihood --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protein_efficiency", [False, True])
@pytest.mark.parametrize("protein_dispersion", ["protein", "protein-batch", "protein-label"])
def test_counts_of_proteins_are_a_mixture(protein_dispersion, protein_efficiency):
    module = learned(protein_dispersion=protein_dispersion, protein_efficiency=protein_efficiency)
    cells = make_cells()
    py, log_background = sampled(module, cells, noise(module))
    found = module.log_py(py, cells, log_background).detach()
    log_theta, rows = module.protein_dispersion.log_theta.detach(), {"batch": cells.batch_index, "label": cells.labels}
    by = protein_dispersion.partition("-")[2]
    theta = np.broadcast_to(torch.exp(log_theta[rows[by]] if by else log_theta).numpy(), cells.protein.shape)
    background = torch.exp(log_background).detach().numpy()
    if protein_efficiency:
        background = background * np.exp(module.log_efficiency.detach().numpy()[cells.batch_index])
    p_of_cell = []
    for share, mean in (
        (expit(py.mixing_logits.detach().numpy()), background),
        (expit(-py.mixing_logits.detach().numpy()), background * np.exp(py.log_ratio.detach().numpy())),
    ):
        p_of_cell.append(share * stats.nbinom.pmf(cells.protein.numpy(), theta, theta / (theta + mean)))
    expected = np.where(MASK[cells.batch_index], np.log(sum(p_of_cell)), 0.0).sum(-1)
    assert_close(found, torch.from_numpy(expected), **LOG_EPS_OF_PROTEINS)
    assert_close(py.theta.expand_as(cells.protein).detach(), torch.from_numpy(theta.copy()), **FLOAT64)


def test_the_foreground_is_at_least_the_background():
    module, cells = learned(), make_cells()
    py, _ = sampled(module, cells, noise(module))
    assert (py.log_ratio >= 0).all()
    assert (py.background.scale > 0).all()
    assert (py.log_ratio > 0.01).any()  # and in some cells it is more


@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
def test_samples_are_decoded_as_one_by_one(latent_distribution):
    module, cells = learned(latent_distribution=latent_distribution, protein_efficiency=True), make_cells()
    posteriors, draws = module.posteriors(cells), [noise(module, seed=s) for s in range(3)]
    z = module.transform_z(torch.stack([module.draw(cells, posteriors, d)[0] for d in draws]))
    together = module.decode_protein(z, cells)
    log_background = together.background.loc + 0.1
    log_p = module.log_py(together, cells, log_background)
    assert log_p.shape == (3, N_CELLS)
    for s in range(3):
        alone = module.decode_protein(z[s], cells)
        assert_close(together.background.loc[s], alone.background.loc, **FLOAT64)
        assert_close(together.mixing_logits[s], alone.mixing_logits, **FLOAT64)
        assert_close(log_p[s], module.log_py(alone, cells, log_background[s]), **FLOAT64)


def test_a_batch_that_counts_less_has_an_efficiency():
    module, cells = learned(protein_efficiency=True), make_cells()
    py, log_background = sampled(module, cells, noise(module))
    with torch.no_grad():
        module.log_efficiency.zero_()
        expected = module.log_py(py, cells, log_background + 0.7)
        module.log_efficiency.fill_(0.7)
        assert_close(module.log_py(py, cells, log_background), expected, **FLOAT64)
    # and what is decoded does not depend on it
    other, _ = sampled(module, cells, noise(module))
    assert torch.equal(other.background.loc, py.background.loc)
    assert build("totalvi").log_efficiency is None


# ---- what was not measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_counts_of_unmeasured_proteins_reach_nothing(training):
    module = without_dropout(learned(protein_efficiency=True)).train(training)
    cells, draws = make_cells(), noise(module)
    measured = MASK[cells.batch_index]
    assert not measured.all()
    module.train(training)
    found = []
    for counts in (cells.protein, cells.protein + 1000 * ~measured, cells.protein.masked_fill(~measured, torch.nan)):
        torch.manual_seed(0)
        loss = module.loss(cells._replace(protein=counts), kl_weight=0.4, noise=draws)
        found.append([loss.total.detach(), loss.reconstruction, *gradients(module, loss.total).values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    changed = module.loss(cells._replace(protein=cells.protein + 1000 * measured), kl_weight=0.4, noise=draws)
    assert not torch.equal(changed.total, found[0][0])


def test_the_prior_of_an_unmeasured_protein_does_not_learn():
    module, cells = learned(protein_dispersion="protein-batch"), make_cells()
    loss = module.loss(cells, noise=noise(module))
    found = gradients(module, loss.total)
    for name in ("background_mean", "background_log_scale", "protein_dispersion.log_theta"):
        assert torch.equal(found[name] != 0, MASK), name


def test_all_measured_is_the_same_as_no_mask():
    module = models.TOTALVI(7, 3, n_batch=2)
    assert module.protein_batch_mask.all()
    assert module.protein_batch_mask.shape == (2, 3)
    assert module.critic is None


def test_the_panel_of_a_batch_reaches_the_other_batches_through_the_networks_only():
    """Cells of a batch with the whole panel have the loss they have where no batch lacks anything."""
    some, all_ = learned(adversarial_classifier="off"), learned(COMPLETE, adversarial_classifier="off")
    state = {name: value for name, value in some.state_dict().items() if name != "protein_batch_mask"}
    all_.load_state_dict(state, strict=False)
    cells = make_cells()
    here, there = (module.loss(cells, noise=noise(module)) for module in (some, all_))
    whole = MASK.all(-1)[cells.batch_index]
    assert torch.equal(here.reconstruction[whole], there.reconstruction[whole])
    assert torch.equal(here.kl_z[whole], there.kl_z[whole])
    assert (here.kl_z[~whole] < there.kl_z[~whole]).all()


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_the_kl_of_the_background_in_closed_form():
    module, cells = learned(), make_cells()
    draws = noise(module)
    loss, (_, kl_background) = module.loss(cells, noise=draws), parts_of(module, cells, draws)
    assert_close(loss.kl_z, kl_standard_normal(module.encode(cells)) + kl_background, **FLOAT64)
    expected = Normal(module.background_mean, torch.exp(module.background_log_scale))
    for k in range(3):
        own = cells.batch_index == k
        assert torch.equal(module.prior(cells).loc[own], expected.loc[k].expand(int(own.sum()), -1))
        assert torch.equal(module.prior(cells).scale[own], expected.scale[k].expand(int(own.sum()), -1))


@pytest.mark.parametrize("protein_background", ["empirical", "learned"])
def test_where_the_prior_of_the_background_starts(protein_background):
    module = build("totalvi", protein_background=protein_background)
    learned_only = protein_background == "learned"
    means = torch.full((3, P), 3.0) if learned_only else torch.tensor(PROTEINS.background_means)
    scales = torch.ones(3, P) if learned_only else torch.tensor(PROTEINS.background_scales)
    assert_close(module.background_mean.float(), means)
    assert_close(torch.exp(module.background_log_scale).float(), scales)


@pytest.mark.parametrize("library", ["observed", "latent"])
@pytest.mark.parametrize("reconstruction_loss_gene", ["nb", "zinb"])
def test_importance_weight_is_joint_over_posterior(library, reconstruction_loss_gene):
    module = learned(library=library, reconstruction_loss_gene=reconstruction_loss_gene, protein_efficiency=True)
    cells, draws = make_cells(), noise(module)
    qz, ql = posteriors = module.posteriors(cells)
    z, log_library = module.draw(cells, posteriors, draws)
    py, log_background = sampled(module, cells, draws)
    measured = MASK[cells.batch_index]
    expected = module.log_px(z, cells, log_library) + module.log_py(py, cells, log_background)
    expected = expected + (Normal(0.0, 1.0).log_prob(z) - Normal(*qz).log_prob(z)).sum(-1)
    prior, proposal = (Normal(*p).log_prob(log_background) for p in (module.prior(cells), py.background))
    expected = expected + torch.where(measured, prior - proposal, 0.0).sum(-1)
    if ql is not None:
        of_library = (Normal(*p).log_prob(log_library) for p in (module.library.prior(cells), ql))
        expected = expected + (next(of_library) - next(of_library)).squeeze(-1)
    assert_close(module.log_weight(cells, posteriors, draws), expected, **FLOAT64)


ONE = DataSummary(
    n_input=3, n_batch=2, n_labels=1, proteins=replace(all_measured(1, 2), protein_batch_mask=((True,), (False,)))
)
Z_NODES, B_NODES = (torch.linspace(-8, 8, n, dtype=torch.float64) for n in (401, 101))
# Along z the integrand has the kinks of ReLUs, where the trapezoid rule with steps of 0.04 loses some 1e-5.
WITH_KINKS = {"rtol": 0.0, "atol": 1e-4}


def on_nodes(module: nn.Module, cells: Minibatch) -> tuple[Minibatch, Tensor, Tensor]:
    """The cells once for every pair of nodes; the pairs as noise of the latent unit and of the background; weights."""
    e_z, e_b = (e.reshape(-1) for e in torch.meshgrid(Z_NODES, B_NODES, indexing="ij"))
    rows = torch.arange(len(cells.x)).repeat(len(e_z))
    draws = torch.stack([e_z, e_b, torch.zeros_like(e_z)], 1).repeat_interleave(len(cells.x), 0)
    density = torch.exp(-0.5 * (e_z**2 + e_b**2)) / (2 * math.pi) * 0.04 * 0.16
    return take(cells, rows), draws, density.unsqueeze(-1)


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, Minibatch]:
    module = learned(ONE, n_latent=1, n_hidden=6, adversarial_classifier="off").requires_grad_(False)
    # wide enough for the tails of the posterior
    module.z_encoder.var_encoder.bias.fill_(0.5)
    module.decoder.py_back_mean_log_beta.layers[0].linear.bias.fill_(2.0)
    return module, make_cells(ONE, n_cells=4)


def test_importance_weights_integrate_to_the_marginal_likelihood(tiny):
    """p(x, y) by the weights, and by scipy from the prior; in two of the cells the protein was not measured."""
    module, cells = tiny
    every, draws, density = on_nodes(module, cells)
    log_weight = module.log_weight(every, module.posteriors(every), draws).view(-1, 4)
    found = torch.log((torch.exp(log_weight) * density).sum(0))

    z, e_b = draws[:, :1], draws[:, 1]  # the noise itself, as z and as the standardised log background of the prior
    px, py, prior = module.decode(z, every), module.decode_protein(z, every), module.prior(every)
    theta = px.theta.numpy()
    p = stats.nbinom.pmf(every.x.numpy(), theta, theta / (theta + px.rate.numpy())).prod(-1)
    background = torch.exp(prior.loc[:, 0] + prior.scale[:, 0] * e_b).numpy()
    phi, y, share = float(py.theta), every.protein[:, 0].numpy(), expit(py.mixing_logits[:, 0].numpy())
    foreground = background * np.exp(py.log_ratio[:, 0].numpy())
    mixture = share * stats.nbinom.pmf(y, phi, phi / (phi + background))
    mixture += (1 - share) * stats.nbinom.pmf(y, phi, phi / (phi + foreground))
    p *= np.where(every.batch_index == 0, mixture, 1.0)
    expected = torch.log((torch.from_numpy(p).view(-1, 4) * density).sum(0))
    assert_close(found, expected, **WITH_KINKS)


def test_the_elbo_is_below_the_marginal_likelihood(tiny):
    module, cells = tiny
    every, draws, density = on_nodes(module, cells)
    log_weight = module.log_weight(every, module.posteriors(every), draws).view(-1, 4)
    elbo = (log_weight * density).sum(0)
    loss = module.loss(every, noise=draws)
    by_parts = (-(loss.reconstruction + loss.kl_z + loss.kl_library).view(-1, 4) * density).sum(0)
    assert_close(elbo, by_parts, **QUADRATURE)
    assert (torch.log((torch.exp(log_weight) * density).sum(0)) > elbo).all()


# ---- what is minimised beside it -------------------------------------------------------------------------------------


def test_proteins_weigh_what_they_are_told_to():
    cells = make_cells()
    losses = {}
    for weight in (1.0, 0.25):
        module = learned(protein_weight=weight)
        losses[weight] = module.loss(cells, noise=noise(module))
    of_proteins, _ = parts_of(module, cells, noise(module))
    assert_close(losses[0.25].total, losses[1.0].total - 0.75 * of_proteins.mean(), **FLOAT64)
    assert torch.equal(losses[0.25].reconstruction, losses[1.0].reconstruction)  # the ELBO is that of the model


@pytest.mark.parametrize("protein_efficiency", [False, True])
def test_what_is_preferred_beside_the_bound(protein_efficiency):
    module, cells = learned(protein_efficiency=protein_efficiency), make_cells()
    draws = noise(module)
    loss, (py, _) = module.loss(cells, noise=draws), sampled(module, cells, draws)
    beside = loss.total - (loss.reconstruction + loss.kl_z + loss.kl_library).mean()
    expected = 1e-3 * softplus(-py.mixing_logits).sum(-1).mean()
    if protein_efficiency:
        of_batch = -Normal(0.0, 1.0).log_prob(module.log_efficiency).sum(-1)
        expected = expected + (of_batch[cells.batch_index] - 0.5 * P * math.log(2 * math.pi)).mean()
    assert_close(beside, expected, rtol=1e-9, atol=0.0)  # a difference of losses of a hundred


def test_where_foreground_and_background_are_alike_it_is_background():
    module, cells = learned(), make_cells()
    foreground, mixing = (
        net.layers[0].linear for net in (module.decoder.py_fore_scale_decoder, module.decoder.py_background_decoder)
    )
    with torch.no_grad():
        foreground.weight.zero_()
        foreground.bias.fill_(-1.0)
    module.loss(cells, noise=noise(module)).total.backward()
    assert (mixing.bias.grad < 0).all()  # a step goes to more background


# ---- the critic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "summary", "there"),
    [
        ("auto", SUMMARY, True),
        ("auto", COMPLETE, False),
        ("on", COMPLETE, True),
        ("off", SUMMARY, False),
    ],
)
def test_a_critic_watches_where_panels_differ_or_when_asked(asked, summary, there):
    assert (build("totalvi", summary, adversarial_classifier=asked).critic is not None) == there


def test_the_critic_is_no_part_of_the_model():
    module, cells = learned(), make_cells()
    before = module.loss(cells, kl_weight=0.3, noise=noise(module))
    with torch.no_grad():
        for parameter in module.critic.parameters():
            parameter.normal_()
    after = module.loss(cells, kl_weight=0.3, noise=noise(module))
    assert torch.equal(before.total, after.total)
    encoders = {id(p) for p in module.encoders.parameters()}
    assert not any(id(p) in encoders for p in module.critic.parameters())


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_critic_and_encoder_each_follow_their_own_loss(kl_weight):
    """The critic's gradient is that of its cross-entropy; the encoder's, that of the bound and of (1 - w) fooling."""
    module, cells = without_dropout(learned()), make_cells()
    draws = noise(module)
    found = gradients(module, module.loss(cells, kl_weight=kl_weight, noise=draws).total)

    critic, module.critic = module.critic, None
    expected = gradients(module, module.loss(cells, kl_weight=kl_weight, noise=draws).total)
    z, _ = module.draw(cells, module.posteriors(cells), draws)
    log_p = log_softmax(critic(z), -1)
    others = torch.ones(N_CELLS, 3, dtype=torch.float64).scatter_(1, cells.batch_index[:, None], 0.0) / 2
    fooled = gradients(module, -(others * log_p).sum(-1).mean())
    of_critic = gradients(critic, cross_entropy(critic(z.detach()), cells.batch_index))

    for name, gradient in of_critic.items():
        assert (gradient != 0).any()
        assert_close(found[f"critic.{name}"], gradient, **FLOAT64)
    for name, gradient in expected.items():
        assert_close(found[name], gradient + (1 - kl_weight) * fooled.get(name, 0), **FLOAT64, msg=name)
    assert any((gradient != 0).any() for gradient in fooled.values())
    if kl_weight == 1:
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


# ---- what the encoder sees -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_variational", [True, False])
def test_depths_of_genes_and_of_proteins_are_no_part_of_what_is_encoded(log_variational):
    """Counts are divided by 1 + their mean in the cell, so where there are many their number no longer matters."""
    module, cells = learned(COMPLETE, log_variational=log_variational), make_cells(COMPLETE)
    cells = cells._replace(x=1e4 * (cells.x + 1), protein=1e4 * (cells.protein + 1))
    deep = cells._replace(x=1e4 * cells.x)
    deeper = deep._replace(protein=1e4 * cells.protein)
    for other in (deep, deeper):
        assert_close(module.encode(other).loc, module.encode(cells).loc, rtol=0, atol=1e-3)  # 1e-4 of each input
    swapped = cells._replace(protein=cells.protein.flip(-1))
    assert (module.encode(swapped).loc - module.encode(cells).loc).abs().max() > 1e-2


def test_what_there_is_none_of_is_not_encoded():
    bare = DataSummary(n_input=5, proteins=all_measured(2))
    with_default, without = (build("totalvi", bare, **options) for options in ({}, {"encode_covariates": False}))
    for a, b in zip(with_default.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# ---- the seed's vocabulary -------------------------------------------------------------------------------------------

REQUIRED = inspect.Parameter.empty
SEED = {
    "n_input_genes": REQUIRED,
    "n_input_proteins": REQUIRED,
    "n_batch": 0,
    "n_labels": 0,
    "n_hidden": 256,
    "n_latent": 20,
    "n_layers": 1,
    "dropout_rate_decoder": 0.2,
    "dropout_rate_encoder": 0.2,
    "gene_dispersion": "gene",
    "protein_dispersion": "protein",
    "log_variational": True,
    "reconstruction_loss_gene": "nb",
    "latent_distribution": "ln",
}
XY, CODES = {"x": REQUIRED, "y": REQUIRED}, {"batch_index": None, "label": None}
METHODS = {
    "get_sample_dispersion": XY | CODES | {"n_samples": 1},
    "get_sample_rate": XY | CODES | {"n_samples": 1},
    "get_sample_scale": XY | CODES | {"n_samples": 1},
    "inference": XY | CODES | {"n_samples": 1},
    "sample_from_posterior_l": XY | {"batch_index": None, "give_mean": True},
    "sample_from_posterior_z": XY | {"batch_index": None, "give_mean": False, "n_samples": 5000},
    "scale_from_z": XY | {"fixed_batch": REQUIRED},
    "get_reconstruction_loss": XY | {"px_": REQUIRED, "py_": REQUIRED},
    "get_latents": XY,
}
PRIOR = {"library_log_means": (2.0, 2.5, 3.0), "library_log_vars": (0.2, 0.3, 0.4)}
B, G, L = 12, 7, 3


def positional(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


def of_the_seed(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return models.TOTALVI(G, P, 3, 2, n_hidden=8, n_latent=L, **PRIOR | options).eval().requires_grad_(False)


@pytest.fixture
def seen() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts of genes and of proteins, codes of batch and of label."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.poisson(torch.full((B, n), mean), generator=generator) for n, mean in ((G, 3.0), (P, 20.0)))
    return x, y, (torch.arange(B) % 3).unsqueeze(1), (torch.arange(B) % 2).unsqueeze(1)


def repeated(call, *args, **options):
    torch.manual_seed(3)
    return call(*args, **options)


def test_arguments_and_defaults():
    assert positional(models.TOTALVI) == SEED
    assert list(positional(models.TOTALVI.forward)) == [
        "x",
        "y",
        "local_l_mean_gene",
        "local_l_var_gene",
        "batch_index",
        "label",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_methods(method):
    """Further arguments may follow those of the seed if they have a default."""
    found = list(positional(getattr(models.TOTALVI, method)).items())
    n = len(METHODS[method])
    assert found[:n] == list(METHODS[method].items())
    assert REQUIRED not in dict(found[n:]).values()


def test_the_decoder_takes_a_library_size_and_gives_a_sample_of_the_log_background(seen):
    decoder = models.DecoderTOTALVI(L, G, P, [3], n_hidden=8).eval().requires_grad_(False)
    z, codes = torch.randn(B, L, generator=torch.Generator().manual_seed(0)), seen[2]
    library = seen[0].sum(1, keepdim=True)
    px, py, log_background = repeated(decoder, z, library, codes)
    assert_close(px["rate"].sum(1, keepdim=True), library, **FLOAT32)
    assert_close(py["rate_back"], torch.exp(log_background), **FLOAT32)
    torch.manual_seed(3)
    drawn = py["back_alpha"] + py["back_beta"] * torch.randn(B, P)
    assert_close(log_background, drawn, **FLOAT32)
    assert torch.equal(decoder.scale(z, codes), px["scale"])


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("library", ["latent", "observed"])
@pytest.mark.parametrize("by", ["", "-batch", "-label"])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_inference(seen, n_samples, library, by, likelihood):
    module = of_the_seed(
        library=library,
        gene_dispersion=f"gene{by}",
        protein_dispersion=f"protein{by}",
        reconstruction_loss_gene=likelihood,
    )
    found = module.inference(*seen, n_samples)
    lead = () if n_samples == 1 else (n_samples,)
    px, py = found.pop("px_"), found.pop("py_")
    of_genes = {"scale": (*lead, B, G), "rate": (*lead, B, G), "r": (B, G) if by else (G,)}
    of_genes["dropout"] = (*lead, B, G) if likelihood == "zinb" else None
    names = ("back_alpha", "back_beta", "rate_back", "fore_scale", "rate_fore", "mixing", "scale")
    of_proteins = dict.fromkeys(names, (*lead, B, P)) | {"r": (B, P) if by else (P,)}
    others = {"qz_m": (B, L), "qz_v": (B, L), "z": (*lead, B, L), "untran_z": (*lead, B, L)}
    others |= {"ql_m": (B, 1), "ql_v": (B, 1)} if library == "latent" else {"ql_m": None, "ql_v": None}
    others["library_gene"] = (*lead, B, 1)
    for values, expected in ((px, of_genes), (py, of_proteins), (found, others)):
        assert {key: None if v is None else tuple(v.shape) for key, v in values.items()} == expected
    ones = torch.ones(*lead, B)
    assert_close(px["scale"].sum(-1), ones, **FLOAT32)
    assert_close(px["rate"], torch.exp(found["library_gene"]) * px["scale"], **FLOAT32)
    assert_close(py["rate_fore"], py["rate_back"] * py["fore_scale"], **FLOAT32)
    assert (py["fore_scale"] >= 1).all()
    assert_close(py["scale"].sum(-1), ones, **FLOAT32)
    foreground = (1 - torch.sigmoid(py["mixing"])) * py["rate_fore"]
    assert_close(py["scale"], foreground / foreground.sum(-1, keepdim=True), **FLOAT32)
    assert_close(found["z"], torch.softmax(found["untran_z"], -1), **FLOAT32)
    if n_samples > 1:
        assert not torch.equal(found["z"][0], found["z"][1])
        assert torch.equal(found["library_gene"][0], found["library_gene"][1]) == (library == "observed")


def test_the_background_is_drawn_from_its_posterior(seen):
    found = of_the_seed().inference(*seen[:3], n_samples=400)["py_"]
    standardised = (torch.log(found["rate_back"]) - found["back_alpha"]) / found["back_beta"]
    error = 1 / math.sqrt(standardised.numel())
    assert abs(standardised.mean()) < N_STANDARD_ERRORS * error
    assert abs(standardised.std() - 1) < N_STANDARD_ERRORS * error


def test_z_is_a_sample_or_its_mean(seen):
    module = of_the_seed(latent_distribution="normal")
    mean = module.sample_from_posterior_z(*seen[:3], give_mean=True)
    inferred = module.inference(*seen[:3])
    assert torch.equal(mean, inferred["qz_m"])
    samples = torch.stack([module.sample_from_posterior_z(*seen[:3]) for _ in range(400)])
    assert ((samples.mean(0) - mean).abs() < N_STANDARD_ERRORS * torch.sqrt(inferred["qz_v"] / 400)).all()
    (latent,) = repeated(module.get_latents, *seen[:3])
    assert torch.equal(latent, repeated(module.sample_from_posterior_z, *seen[:3]))


def test_the_mean_of_a_logistic_normal_is_over_so_many_samples(seen):
    module = of_the_seed()
    z = repeated(module.sample_from_posterior_z, *seen[:3], give_mean=True, n_samples=6)
    assert_close(z.sum(-1), torch.ones(B), **FLOAT32)
    torch.manual_seed(3)
    found = module.inference(*seen[:3])
    torch.manual_seed(3)
    draws = found["qz_m"].unsqueeze(1) + torch.sqrt(found["qz_v"]).unsqueeze(1) * torch.randn(B, 6, L)
    assert_close(z, torch.softmax(draws, -1).mean(1), **FLOAT32)


def test_the_log_library_is_a_mean_or_a_sample(seen):
    module, observed = of_the_seed(), of_the_seed(library="observed")
    assert torch.equal(module.sample_from_posterior_l(*seen[:3]), module.inference(*seen[:3])["ql_m"])
    assert not torch.equal(
        module.sample_from_posterior_l(*seen[:3], give_mean=False), module.sample_from_posterior_l(*seen[:3])
    )
    assert_close(observed.sample_from_posterior_l(*seen[:3]), torch.log(seen[0].sum(1, keepdim=True)), **FLOAT32)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_what_is_sampled_is_that_of_inference(seen, n_samples):
    module = of_the_seed(gene_dispersion="gene-batch", protein_dispersion="protein-label")
    found = repeated(module.inference, *seen, n_samples)
    r_x, r_y = repeated(module.get_sample_dispersion, *seen, n_samples)
    assert torch.equal(r_x, found["px_"]["r"])
    assert torch.equal(r_y, found["py_"]["r"])
    assert torch.equal(repeated(module.get_sample_rate, *seen, n_samples), found["px_"]["rate"])
    scale = repeated(module.get_sample_scale, *seen, n_samples)
    assert torch.equal(scale, torch.cat([found["px_"]["scale"], found["py_"]["scale"]], -1))


def test_a_fixed_batch_is_a_counterfactual(seen):
    module = of_the_seed()
    own, there = (repeated(module.inference, *seen, transform_batch=batch) for batch in (None, 1))
    in_it = seen[2].squeeze() == 1
    for of in ("px_", "py_"):
        assert torch.equal(there[of]["scale"][in_it], own[of]["scale"][in_it])
        assert not torch.equal(there[of]["scale"][~in_it], own[of]["scale"][~in_it])
    for key in ("qz_m", "ql_m", "z"):  # the cell was seen in its own batch
        assert torch.equal(there[key], own[key])
    x, y = seen[:2]
    first = torch.zeros(B, dtype=torch.long)
    expected = repeated(module.get_sample_scale, x, y, first, transform_batch=2)
    assert torch.equal(repeated(module.scale_from_z, x, y, 2), expected)
    with pytest.raises(ValueError, match=r"There is no batch 3: the module knows 0 to 2\."):
        module.scale_from_z(x, y, 3)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_reconstruction_losses_are_those_of_the_decoded_parameters(seen, likelihood):
    module, (x, y, *_) = of_the_seed(reconstruction_loss_gene=likelihood), seen
    found = module.inference(*seen)
    of_genes, of_proteins = module.get_reconstruction_loss(x, y, found["px_"], found["py_"])
    px, py = found["px_"], found["py_"]
    if likelihood == "nb":
        expected = models.log_nb_positive(x, px["rate"], px["r"])
    else:
        expected = models.log_zinb_positive(x, px["rate"], px["r"], px["dropout"])
    assert torch.equal(of_genes, -expected.sum(-1))
    expected = models.log_mixture_nb(y, py["rate_back"], py["rate_fore"], py["r"], None, py["mixing"])
    assert torch.equal(of_proteins, -expected.sum(-1))


@pytest.mark.parametrize("library", ["latent", "observed"])
def test_forward_gives_five_parts_that_add_up_to_the_elbo(seen, library):
    x, y, batch_index, label = seen
    module = of_the_seed(library=library, protein_batch_mask=PROTEINS.protein_batch_mask, gene_dispersion="gene-label")
    parts = repeated(module, x, y, batch_index=batch_index, label=label)
    cells = Minibatch(x, batch_index.squeeze(1), label.squeeze(1), protein=y)
    loss = repeated(module.loss, cells)
    assert [part.shape for part in parts] == [(B,)] * 5
    of_genes, of_proteins, kl_z, kl_library, kl_background = parts
    assert_close(of_genes + of_proteins, loss.reconstruction, **FLOAT32)
    assert_close(kl_z + kl_background, loss.kl_z, **FLOAT32)
    assert_close(kl_library, loss.kl_library, **FLOAT32)
    assert_close(kl_z, kl_standard_normal(module.encode(cells)), **FLOAT32)


def test_forward_takes_another_prior_of_the_library(seen):
    x, y, batch_index, _ = seen
    module = of_the_seed()
    mean, var = torch.full((B, 1), 1.7), torch.linspace(0.1, 2.0, B).unsqueeze(1)
    own, other = (repeated(module, x, y, *prior, batch_index) for prior in ((None, None), (mean, var)))
    ql = module.encode_library(Minibatch(x, batch_index.squeeze(1), protein=y))
    assert_close(other[3], kl_divergence(Normal(*ql), Normal(mean, torch.sqrt(var))).squeeze(1), **FLOAT32)
    for i in (0, 1, 2, 4):
        assert torch.equal(own[i], other[i])
    with pytest.raises(ValueError, match="are the prior of a latent library: give both"):
        module(x, y, mean, None, batch_index)


def test_what_is_missing_is_said(seen):
    x, y = seen[:2]
    with pytest.raises(ValueError, match=r"The batch of each cell is needed \(n_batch=3\)"):
        of_the_seed().inference(x, y)
    with pytest.raises(ValueError, match="protein_dispersion='protein-label' needs labels"):
        models.TOTALVI(G, P, protein_dispersion="protein-label")
    with pytest.raises(ValueError, match="dispersion='protein-label' needs the label of each cell"):
        of_the_seed(protein_dispersion="protein-label").inference(x, y, seen[2])
    with pytest.raises(ValueError, match="totalVI needs proteins: register their counts"):
        models.TOTALVI(G, 0)
    assert models.TOTALVI(G, P).eval().inference(x, y)["z"].shape == (B, 20)


def test_the_background_starts_where_the_data_have_theirs():
    module = build("totalvi").eval()
    cells = make_cells()
    with torch.no_grad():
        background = module.decode_protein(torch.zeros(N_CELLS, module.n_latent).double(), cells).background.loc
    means = torch.tensor(PROTEINS.background_means, dtype=torch.float64)
    start = (means * MASK).sum(0) / MASK.sum(0)
    assert_close(module.decoder.py_back_mean_log_alpha.layers[0].linear.bias.detach(), start, **FLOAT32)
    assert ((background.mean(0) - start).abs() < 1.0).all()  # what the initial weights add
