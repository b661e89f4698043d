from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _tolerances import FLOAT64, N_STANDARD_ERRORS
from scipy.special import betaln
from torch import nn
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from scvi_ext._contract import Loss, Minibatch, Posterior
from scvi_ext.functional.counts import log_normal, log_poisson
from scvi_ext.functional.divergences import log_density
from scvi_ext.functional.evidence import (
    compute_elbo,
    compute_marginal_log_likelihood_autozi,
    compute_marginal_log_likelihood_scvi,
    compute_reconstruction_error,
    effective_sample_size,
)
from scvi_ext.functional.inflation import log_beta, sample_logit_beta

N = 23
X = torch.randint(0, 9, (N, 3), generator=torch.Generator().manual_seed(0)).double()
SPLITS = [N, 1, 5, 11, 22]  # 5 and 11 leave a short last minibatch, 22 leaves one of a single cell


def split(size: int) -> list[Minibatch]:
    return [Minibatch(x, torch.zeros(len(x), dtype=torch.long)) for x in X.split(size)]


class Fixed(nn.Module):
    """Losses that are known functions of the counts, and a posterior that is not sampled."""

    def loss(self, cells: Minibatch) -> Loss:
        reconstruction, kl_z, kl_library = cells.x[:, 0] ** 2, 10 * cells.x[:, 1], 1000 + cells.x[:, 2]
        return Loss((reconstruction + kl_library + 0.1 * kl_z).mean(), reconstruction, kl_z, kl_library)

    def kl_shared(self) -> torch.Tensor:
        return torch.zeros(())

    def posteriors(self, cells: Minibatch) -> None:
        return None

    def log_weight(self, cells: Minibatch, posteriors: None) -> torch.Tensor:
        return -cells.x.sum(-1)


@pytest.mark.parametrize("size", SPLITS)
def test_every_cell_weighs_the_same(size):
    loss = Fixed().loss(*split(N))
    reconstruction = loss.reconstruction.mean().item()
    elbo = (loss.reconstruction + loss.kl_z + loss.kl_library).mean().item()
    marginal = X.sum(-1).mean().item()
    assert_close(compute_reconstruction_error(Fixed(), split(size)), reconstruction, **FLOAT64)
    assert_close(compute_elbo(Fixed(), split(size)), elbo, **FLOAT64)
    assert_close(compute_marginal_log_likelihood_scvi(Fixed(), split(size), n_samples_mc=7), marginal, **FLOAT64)


def test_any_iterable_of_minibatches_will_do():
    assert compute_elbo(Fixed(), iter(split(5))) == compute_elbo(Fixed(), split(5))


class PoissonOfNormal(nn.Module):
    """z ~ N(0, 1), x_g ~ Poisson(exp(z)): one latent unit, so that p(x) can be integrated. Its q is roughly right."""

    def posteriors(self, cells: Minibatch) -> Posterior:
        loc = torch.log(cells.x.mean(-1, keepdim=True) + 0.5)
        return Posterior(loc, torch.full_like(loc, 0.8))

    def log_joint(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return log_poisson(x, torch.exp(z)).sum(-1) + log_normal(z, torch.zeros_like(z), torch.ones_like(z)).squeeze(-1)

    def log_weight(self, cells: Minibatch, q: Posterior) -> torch.Tensor:
        z = q.loc + q.scale * torch.randn_like(q.loc)
        return self.log_joint(cells.x, z) - log_density(z, q)

    def log_marginal(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        joint = self.log_joint(x, z.reshape(-1, 1, 1)).exp()  # (4001, B)
        return torch.log(torch.trapezoid(joint, z, dim=0))


def test_marginal_log_likelihood_is_the_integral():
    model, n_samples, n_repeats = PoissonOfNormal(), 300, 20
    torch.manual_seed(0)
    estimates = torch.tensor(
        [compute_marginal_log_likelihood_scvi(model, split(11), n_samples) for _ in range(n_repeats)]
    )
    exact = -model.log_marginal(X).mean().item()
    standard_error = (estimates.std() / n_repeats**0.5).item()
    assert standard_error < 0.01
    # The logarithm of a mean is biased by half of the relative variance of that mean, here below 1 / n_samples.
    assert abs(estimates.mean().item() - exact) < N_STANDARD_ERRORS * standard_error + 1 / n_samples


def test_one_sample_of_the_exact_posterior_is_the_marginal_likelihood():
    class Conjugate(nn.Module):
        """z ~ N(0, 1), x ~ N(z, 1), so q(z | x) = N(x / 2, 1 / 2) is exact and every weight is p(x) = N(x; 0, 2)."""

        def posteriors(self, cells: Minibatch) -> Posterior:
            x = cells.x[:, :1]
            return Posterior(x / 2, torch.full_like(x, math.sqrt(0.5)))

        def log_weight(self, cells: Minibatch, q: Posterior) -> torch.Tensor:
            z, one = q.loc + q.scale * torch.randn_like(q.loc), torch.ones_like(q.loc)
            joint = log_normal(cells.x[:, :1], z, one) + log_normal(z, 0 * one, one)
            return joint.squeeze(-1) - log_density(z, q)

    x = X[:, 0]
    exact = -log_normal(x, torch.zeros_like(x), torch.full_like(x, math.sqrt(2))).mean().item()
    assert_close(compute_marginal_log_likelihood_scvi(Conjugate(), split(5), n_samples_mc=1), exact, **FLOAT64)


def test_nothing_is_recorded_for_gradients():
    class Trainable(Fixed):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def loss(self, cells: Minibatch) -> Loss:
            assert not torch.is_grad_enabled()
            return super().loss(cells)

    assert compute_elbo(Trainable(), split(5)) == compute_elbo(Fixed(), split(5))


def test_effective_sample_size_counts_samples_of_equal_weight():
    log_weights = np.array([[0.0, -700.0, 3.0], [0.0, -700.0, -900.0], [0.0, -900.0, -900.0]]) - 1e4
    np.testing.assert_allclose(effective_sample_size(log_weights), [3, 2, 1], rtol=1e-10)
    weights = np.random.default_rng(0).gamma(0.3, 1.0, (50, 4))
    expected = weights.sum(0) ** 2 / (weights**2).sum(0)
    np.testing.assert_allclose(effective_sample_size(np.log(weights)), expected, rtol=1e-10)


class CoinOfUnknownBias(nn.Module):
    """s ~ Beta(alpha, beta), x_n ~ Bernoulli(s): what all cells have together is a ratio of Beta functions."""

    def __init__(self, alpha: float, beta: float, a: float, b: float):
        super().__init__()
        self.p, self.q = torch.tensor([[alpha, beta], [a, b]], dtype=torch.float64)

    def posteriors(self, cells: Minibatch) -> None:
        return None

    def draw_shared(self) -> torch.Tensor:
        return sample_logit_beta(*self.q)

    def log_weight(self, cells: Minibatch, posteriors: None, noise: None, shared: torch.Tensor) -> torch.Tensor:
        return logsigmoid(torch.where(cells.x[:, 0] > 4, shared, -shared))

    def log_weight_shared(self, shared: torch.Tensor) -> torch.Tensor:
        return log_beta(shared, *self.p) - log_beta(shared, *self.q)


@pytest.mark.parametrize("size", SPLITS)
def test_what_all_cells_share_is_drawn_once_for_all_of_them(size):
    heads = int((X[:, 0] > 4).sum())
    exact = -(betaln(0.5 + heads, 0.7 + N - heads) - betaln(0.5, 0.7)) / N
    # q is the posterior, so that every weight is p(x)
    model = CoinOfUnknownBias(0.5, 0.7, 0.5 + heads, 0.7 + N - heads)
    found = compute_marginal_log_likelihood_autozi(model, iter(split(size)), n_samples_mc=2)
    assert_close(found, exact, **FLOAT64)


def test_the_evidence_of_all_cells_is_the_integral():
    heads = int((X[:, 0] > 4).sum())
    exact = betaln(0.5 + heads, 0.7 + N - heads) - betaln(0.5, 0.7)
    model = CoinOfUnknownBias(0.5, 0.7, 0.5 + 0.6 * heads, 0.7 + 0.6 * (N - heads))  # wider than the posterior
    torch.manual_seed(0)
    estimates = [-N * compute_marginal_log_likelihood_autozi(model, split(11), 200) for _ in range(50)]
    ratio = np.exp(np.array(estimates) - exact)  # an importance sampling estimate has no bias
    assert abs(ratio.mean() - 1) < N_STANDARD_ERRORS * ratio.std() / math.sqrt(50)
    assert ratio.std() < 0.2


@pytest.mark.parametrize("size", SPLITS)
def test_the_divergence_of_what_all_cells_share_counts_once(size):
    class Shared(Fixed):
        def loss(self, cells: Minibatch) -> Loss:
            return super().loss(cells)._replace(kl_global=torch.full((len(cells.x),), 99.0))

        def kl_shared(self) -> torch.Tensor:
            return torch.tensor(46.0, requires_grad=True)

    assert_close(compute_elbo(Shared(), split(size)), compute_elbo(Fixed(), split(size)) + 46 / N, **FLOAT64)
