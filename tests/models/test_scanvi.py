"""scANVI: a bound that is the sum over labels where there is none, and labels that stay where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _small import N_CELLS, SUMMARY, build, make_cells, noise, take
from _tolerances import FLOAT64, N_STANDARD_ERRORS
from scipy import stats
from torch.testing import assert_close

from scvi_ext import models
from scvi_ext._contract import DataSummary, Minibatch

TWO = DataSummary(n_input=6, n_batch=1, n_labels=2)
DISPERSIONS = ["gene", "gene-batch", "gene-label", "gene-cell"]


def labelled_as(cells: Minibatch, label: int) -> Minibatch:
    return cells._replace(labels=torch.full_like(cells.batch_index, label))


def cost(module: torch.nn.Module, cells: Minibatch, draws: torch.Tensor) -> torch.Tensor:
    loss = module.loss(cells, noise=draws)
    return loss.reconstruction + loss.kl_z + loss.kl_library


@pytest.mark.parametrize("y_prior", [None, (0.4, 0.3, 0.2, 0.1)])
@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("library", ["observed", "latent"])
def test_the_bound_without_a_label_in_closed_form(dispersion, library, y_prior):
    """-ELBO(x) = sum of q(y) (-ELBO(x, y) + log q(y) - log p(y)) at a sample of z1 (Xu et al. 2021)."""
    module = build("scanvi", dispersion=dispersion, library=library, y_prior=y_prior).eval()
    cells = make_cells()
    draws = noise(module)
    z1, _ = module.draw(cells, module.posteriors(cells), draws)
    log_q = module.log_qy(z1)
    prior = torch.tensor(y_prior or (0.25,) * 4, dtype=torch.float64)
    expected = 0
    for label in range(SUMMARY.n_labels):
        of_label = cost(module, labelled_as(cells, label), draws) + log_q[:, label] - torch.log(prior[label])
        expected = expected + torch.exp(log_q[:, label]) * of_label
    assert_close(cost(module, labelled_as(cells, -1), draws), expected, rtol=1e-6, atol=1e-6)  # prior in float32


@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_the_label_of_a_cell_without_one_reaches_nothing(dispersion):
    """Any code below zero stands for no label: neither loss nor gradient may tell them apart."""
    module, cells = build("scanvi", dispersion=dispersion).eval(), make_cells()
    draws, hidden = noise(module), torch.arange(N_CELLS) % 2 == 0
    labelled = take(cells, ~hidden)
    found = []
    for poison in (-1, -2, -1000):
        module.zero_grad()
        loss = module.loss(cells._replace(labels=cells.labels.masked_fill(hidden, poison)), labelled, noise=draws)
        loss.total.backward()
        found.append([loss.total.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_cross_entropy_of_the_labelled_stream():
    module, cells = build("scanvi").eval(), make_cells()
    labelled, draws = take(cells, slice(9)), noise(module)
    loss, bare = module.loss(cells, labelled, noise=draws), module.loss(cells, noise=draws)
    probabilities = torch.exp(module.encode_label(labelled))
    expected = -torch.log(probabilities[torch.arange(9), labelled.labels])
    assert_close(loss.classification, expected, **FLOAT64)
    assert bare.classification is None
    assert_close(loss.total, bare.total + 50 * expected.mean(), **FLOAT64)


@pytest.mark.parametrize(("training", "reaches"), [("joint", True), ("alternate", False)])
def test_labels_train_the_encoder_jointly_or_not(training, reaches):
    module, cells = build("scanvi", training=training, classification_ratio=1.0).eval(), make_cells()
    module.loss(cells, cells).classification.sum().backward()
    gradient = module.z_encoder.mean_encoder.weight.grad
    assert (gradient is not None and bool((gradient != 0).any())) == reaches
    assert (module.classifier.output.weight.grad != 0).any()


def test_groups_are_told_first_and_labels_within_them():
    module, cells = build("scanvi", labels_groups=("t", "b", "t", "b")).eval(), make_cells()
    z1 = module.encode(cells).loc
    q = torch.exp(module.log_qy(z1))
    groups = torch.softmax(module.group_classifier.scores(z1), -1)  # in the order of the names: b, t
    scores = module.classifier.scores(z1)
    assert_close(q.sum(-1), torch.ones(N_CELLS, dtype=torch.float64), **FLOAT64)
    for code, members in enumerate(([1, 3], [0, 2])):
        assert_close(q[:, members].sum(-1), groups[:, code], **FLOAT64)
        within = torch.softmax(scores[:, members], -1)
        assert_close(q[:, members], within * groups[:, [code]], **FLOAT64)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (("a", "b", "a"), "labels_groups names the groups of 3 labels, and there are 4: one for each is needed"),
        (("a",) * 4, "labels_groups has no effect with 1 groups of 4 labels"),
        (("a", "b", "c", "d"), "labels_groups has no effect with 4 groups of 4 labels"),
    ],
)
def test_impossible_groups_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        build("scanvi", labels_groups=groups)


def test_z2_depends_on_the_label_and_is_read_out_with_the_most_probable():
    module, cells = build("scanvi").eval(), make_cells()
    of_label = [module.encode_z2(labelled_as(cells, label)).loc for label in range(SUMMARY.n_labels)]
    assert not torch.equal(of_label[0], of_label[1])
    likely, hidden = module.encode_label(cells).argmax(-1), module.encode_z2(labelled_as(cells, -1)).loc
    for label in range(SUMMARY.n_labels):
        assert torch.equal(hidden[likely == label], of_label[label][likely == label])


def test_theta_of_a_cell_without_a_label_is_that_of_the_most_probable():
    module, cells = build("scanvi", dispersion="gene-label").eval(), make_cells()
    with torch.no_grad():
        module.dispersion.log_theta.normal_()
    z, likely = module.encode(cells).loc, module.encode_label(cells).argmax(-1)
    theta = module.decode(z, labelled_as(cells, -1)).theta
    assert torch.equal(theta, torch.exp(module.dispersion.log_theta)[likely])


@pytest.mark.parametrize("dispersion", ["gene", "gene-label"])
def test_importance_weights_average_to_the_integral(dispersion):
    """With one latent unit p(x) is a sum over labels of integrals over z1 and z2, here on a grid."""
    module = build("scanvi", TWO, n_latent=1, dispersion=dispersion, reconstruction_loss="nb", y_prior=(0.7, 0.3))
    module = module.eval().requires_grad_(False)
    module.encoder_z2_z1.var_encoder.bias.fill_(0.5)  # wide enough for the tails of p(z2 | z1)
    module.z_encoder.var_encoder.bias.fill_(1.0)
    module.dispersion.log_theta.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(0))
    cells = make_cells(TWO, n_cells=3)
    grid = torch.linspace(-9, 9, 601, dtype=torch.float64)
    step = (grid[1] - grid[0]).item()
    exact = 0
    for label, prior in enumerate((0.7, 0.3)):
        codes = torch.full((len(grid),), label)
        loc, var = module.decoder_z1_z2(grid.unsqueeze(-1), codes)  # of z1, for each z2
        z1_given_z2 = stats.norm.pdf(grid.numpy()[None, :], loc.numpy(), np.sqrt(var.numpy()))  # (z2, z1)
        p_z1 = (stats.norm.pdf(grid.numpy())[:, None] * z1_given_z2).sum(0) * step  # (z1,)
        px = module.decode(grid.reshape(-1, 1, 1).expand(-1, 3, 1), labelled_as(cells, label))
        rate, theta = px.rate.numpy(), np.broadcast_to(px.theta.numpy(), px.rate.shape)
        p_x = stats.nbinom.pmf(cells.x.numpy(), theta, theta / (theta + rate)).prod(-1)  # (z1, cells)
        exact = exact + prior * (p_z1[:, None] * p_x).sum(0) * step
    n_samples = 6000
    hidden = labelled_as(take(cells, torch.arange(3).repeat(n_samples)), -1)
    draws = noise(module, 3 * n_samples)
    weights = torch.exp(module.log_weight(hidden, module.posteriors(hidden), draws)).view(n_samples, 3).numpy()
    error = weights.std(0) / np.sqrt(len(weights))
    assert (np.abs(weights.mean(0) - exact) < N_STANDARD_ERRORS * error).all()
    assert (error < 0.05 * weights.mean(0)).all()
    elbo = -cost(module, hidden, draws).view(n_samples, 3).mean(0).numpy()
    assert (elbo < np.log(exact)).all()


def test_the_seeds_vocabulary():
    module, cells = models.SCANVI(SUMMARY.n_input, 3, 4).eval(), make_cells()
    x = cells.x.float()
    assert_close(module.classify(x).sum(-1), torch.ones(N_CELLS))
    z1, z2 = module.get_latents(x, cells.labels)
    assert z1.shape == z2.shape == (N_CELLS, 10)
    linear = models.SCANVI(SUMMARY.n_input, 3, 4, linear_classifier=True)
    assert linear.classifier.hidden is None
    with pytest.raises(ValueError, match="training='both' is not one of 'alternate', 'joint'"):
        models.SCANVI(5, 1, 2, training="both")
