"""VAEC: a bound that is the sum over labels where there is none, and a likelihood that can be integrated."""

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

ONE = DataSummary(n_input=6, n_batch=1, n_labels=1)
TWO = DataSummary(n_input=6, n_batch=1, n_labels=2)
DISPERSIONS = ["gene", "gene-batch", "gene-label", "gene-cell"]


def labelled_as(cells: Minibatch, label: int) -> Minibatch:
    return cells._replace(labels=torch.full_like(cells.batch_index, label))


def test_with_one_label_there_is_nothing_to_infer():
    module, cells = build("vaec", ONE).eval(), make_cells(ONE)
    draws = noise(module)
    seen, unseen = (module.loss(labelled_as(cells, label), noise=draws) for label in (0, -1))
    for one, other in zip(seen[1:4], unseen[1:4], strict=True):
        assert_close(one, other, **FLOAT64)
    assert_close(module.encode_label(cells), torch.zeros(N_CELLS, 1, dtype=torch.float64), **FLOAT64)


@pytest.mark.parametrize("y_prior", [None, (0.9, 0.1)])
@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("library", ["observed", "latent"])
def test_the_bound_of_two_labels_in_closed_form(dispersion, library, y_prior):
    """-ELBO(x) = sum of q(y) (-ELBO(x, y) + log q(y) - log p(y)), with ELBO(x, y) from cells that have the label y."""
    sizes = {"library_log_means": (2.0,), "library_log_vars": (0.3,)}
    summary = DataSummary(n_input=6, n_batch=1, n_labels=2, **sizes)
    module = build("vaec", summary, dispersion=dispersion, library=library, y_prior=y_prior).eval()
    cells = make_cells(summary)
    draws = noise(module)
    q = module.classify(cells.x)
    prior = torch.tensor(y_prior or (0.5, 0.5), dtype=torch.float64)
    expected = 0
    for label in (0, 1):
        loss = module.loss(labelled_as(cells, label), noise=draws)
        cost = loss.reconstruction + loss.kl_z + loss.kl_library
        expected = expected + q[:, label] * (cost + torch.log(q[:, label]) - torch.log(prior[label]))
    loss = module.loss(labelled_as(cells, -1), noise=draws)
    found = loss.reconstruction + loss.kl_z + loss.kl_library
    assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the prior is kept in float32


def test_some_cells_with_and_some_without_a_label():
    module, cells = build("vaec").eval(), make_cells()
    draws, without = noise(module), torch.arange(N_CELLS) % 3 == 0
    mixed = module.loss(cells._replace(labels=cells.labels.masked_fill(without, -1)), noise=draws)
    none, every = module.loss(labelled_as(cells, -1), noise=draws), module.loss(cells, noise=draws)
    for found, hidden, seen in zip(mixed[1:4], none[1:4], every[1:4], strict=True):
        assert_close(found, torch.where(without, hidden, seen), **FLOAT64)


def test_latent_space_and_decoder_are_conditional_on_the_label():
    module, cells = build("vaec").eval(), make_cells()
    zs, scales = [], []
    for label in range(SUMMARY.n_labels):
        given = labelled_as(cells, label)
        zs.append(module.encode(given).loc)
        scales.append(module.scale(zs[0], given))
    for i in range(1, SUMMARY.n_labels):
        assert not torch.equal(zs[0], zs[i])
        assert not torch.equal(scales[0], scales[i])
    # A cell without a label is read out with its most probable one.
    likely = module.classify(cells.x).argmax(-1)
    hidden = module.encode(labelled_as(cells, -1)).loc
    for label in range(SUMMARY.n_labels):
        assert torch.equal(hidden[likely == label], zs[label][likely == label])


def test_importance_weights_average_to_the_integral():
    """With one latent unit, p(x) = sum over y of p(y) times an integral over z, here on a grid."""
    module = build("vaec", TWO, n_latent=1, reconstruction_loss="poisson", y_prior=(0.7, 0.3))
    module = module.eval().requires_grad_(False)
    cells = make_cells(TWO, n_cells=3)
    grid = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density = torch.tensor(stats.norm.pdf(grid.numpy())) * (grid[1] - grid[0])
    exact = 0
    for label, prior in enumerate((0.7, 0.3)):
        given = labelled_as(cells, label)
        rate = module.decode(grid.reshape(-1, 1, 1).expand(-1, 3, 1), given).rate
        p_x = torch.tensor(stats.poisson.pmf(cells.x.numpy(), rate.numpy())).prod(-1)  # (grid, cells)
        exact = exact + prior * (density.unsqueeze(-1) * p_x).sum(0)
    n_samples = 4000
    hidden = labelled_as(take(cells, torch.arange(3).repeat(n_samples)), -1)
    draws = noise(module, 3 * n_samples)
    weights = torch.exp(module.log_weight(hidden, module.posteriors(hidden), draws)).view(n_samples, 3).numpy()
    error = weights.std(0) / np.sqrt(len(weights))
    assert (np.abs(weights.mean(0) - exact.numpy()) < N_STANDARD_ERRORS * error).all()
    assert (error < 0.05 * weights.mean(0)).all()
    # and so the bound is one
    loss = module.loss(hidden, noise=draws)
    elbo = -(loss.reconstruction + loss.kl_z + loss.kl_library).view(n_samples, 3).mean(0).numpy()
    assert (elbo < np.log(exact.numpy())).all()


def test_the_seeds_vocabulary():
    module, cells = models.VAEC(SUMMARY.n_input, 3, 4).eval(), make_cells()
    x = cells.x.float()
    probabilities = module.classify(x)
    assert probabilities.shape == (N_CELLS, 4)
    assert_close(probabilities.sum(-1), torch.ones(N_CELLS))
    assert module.get_latents(x, cells.labels)[0].shape == (N_CELLS, 10)
    assert module.get_sample_scale(x, cells.batch_index, cells.labels).shape == x.shape
    with pytest.raises(ValueError, match=r"y_prior has 2 values, 0\.5, 0\.5; a positive number for each of 4 labels"):
        models.VAEC(5, 1, 4, y_prior=(0.5, 0.5))
    with pytest.raises(ValueError, match="classification_ratio=-1 is a weight"):
        models.VAEC(5, 1, 4, classification_ratio=-1)
