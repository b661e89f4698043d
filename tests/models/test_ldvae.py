"""LDVAE: loadings that act on z as the decoder does, and a marginal likelihood that can be integrated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _small import N_CELLS, SUMMARY, build, make_cells, noise
from _tolerances import FLOAT64, LOG_EPS, N_STANDARD_ERRORS, QUADRATURE
from scipy import stats
from torch import nn
from torch.testing import assert_close

from scvi_ext import models
from scvi_ext._contract import DataSummary, Minibatch


def with_statistics(module: nn.Module) -> nn.Module:
    """In evaluation mode, with batch normalisations that have seen data and learned."""
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.2, 3.0)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    return module.eval().requires_grad_(False)


# ---- loadings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
@pytest.mark.parametrize("use_batch_norm", ["both", "decoder", "encoder", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_representation", ["one-hot", "embedding"])
def test_loadings_are_the_slope_of_the_logits(dispersion, use_batch_norm, bias, batch_representation):
    options = {"dispersion": dispersion, "use_batch_norm": use_batch_norm, "bias": bias}
    module = with_statistics(build("ldvae", batch_representation=batch_representation, **options))
    cells, loadings = make_cells(), module.get_loadings()
    assert loadings.shape == (SUMMARY.n_input, module.n_latent)

    def logits(z: torch.Tensor) -> torch.Tensor:
        return module.decoder.factor_regressor(module.covariates.append(z, cells), *module.covariates.codes(cells))

    z = torch.randn(N_CELLS, module.n_latent, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(logits(z) - logits(torch.zeros_like(z)), z @ loadings.T, **FLOAT64)
    # and so are log ratios of the decoded profile, whatever the covariates of the cell
    log_scale = torch.log(module.decode(z, cells).scale) - torch.log(module.decode(0 * z, cells).scale)
    centred = z @ (loadings - loadings.mean(0)).T
    assert_close(log_scale - log_scale.mean(-1, keepdim=True), centred, **FLOAT64)


def test_loadings_follow_the_batch_norm():
    module = with_statistics(build("ldvae"))
    before, norm = module.get_loadings(), module.decoder.factor_regressor.layers[0].batch_norm[0]
    norm.weight[2] *= 3
    norm.running_var[4] = 4 * norm.running_var[4] + 3 * norm.eps  # so that its square root with eps doubles
    after = module.get_loadings()
    assert_close(after[2], 3 * before[2], **FLOAT64)
    assert_close(after[4], before[4] / 2, **FLOAT64)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])


def test_loadings_are_a_copy_without_gradient():
    module = build("ldvae", use_batch_norm="none").eval()
    loadings = module.get_loadings()
    assert not loadings.requires_grad
    loadings.zero_()
    assert module.get_loadings().any()


# ---- marginal likelihood ---------------------------------------------------------------------------------------------

GRID = torch.linspace(-10, 10, 1001, dtype=torch.float64)
DENSITY = torch.exp(-0.5 * GRID**2).unsqueeze(1) / math.sqrt(2 * math.pi)
ONE_LATENT = DataSummary(n_input=4, n_batch=2, n_labels=2, library_log_means=(1.5, 2.0), library_log_vars=(0.2, 0.4))


def one_latent(**options: object) -> tuple[nn.Module, Minibatch]:
    module = with_statistics(build("ldvae", ONE_LATENT, n_latent=1, **options))
    return module, make_cells(ONE_LATENT, n_cells=6)


def noise_on_grid(module: nn.Module) -> torch.Tensor:
    """The same noise for each of six cells, node by node; that of an observed library is not used."""
    draws = torch.zeros(len(GRID), 6, module.n_noise, dtype=torch.float64)
    draws[:, :, 0] = GRID.unsqueeze(1)
    return draws


def integral_over_noise(module: nn.Module, cells: Minibatch) -> torch.Tensor:
    """log p(x): log of the integral of exp(log_weight(e)) N(e; 0, 1) de, for the noise e behind the latent unit."""
    posteriors = module.posteriors(cells)
    weights = torch.stack([module.log_weight(cells, posteriors, draws) for draws in noise_on_grid(module)]).exp()
    return torch.log(torch.trapezoid(weights * DENSITY, GRID, dim=0))


def integral_over_z(module: nn.Module, cells: Minibatch) -> torch.Tensor:
    """The same from scipy: the integral of NB(x; rate(z), theta) N(z; 0, 1) dz."""
    px = module.decode(GRID.reshape(-1, 1, 1).expand(-1, len(cells.x), 1), cells)
    rate, theta = px.rate.numpy(), px.theta.numpy()
    log_p = stats.nbinom.logpmf(cells.x.numpy(), theta, theta / (theta + rate)).sum(-1)
    joint = np.exp(log_p + stats.norm.logpdf(GRID.numpy())[:, None])
    return torch.log(torch.trapezoid(torch.from_numpy(joint), GRID, dim=0))


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
def test_importance_weights_integrate_to_the_marginal_likelihood(dispersion):
    module, cells = one_latent(reconstruction_loss="nb", dispersion=dispersion)
    assert_close(integral_over_noise(module, cells), integral_over_z(module, cells), **LOG_EPS)


def test_importance_weights_do_not_depend_on_the_proposal():
    module, cells = one_latent(reconstruction_loss="nb")
    before, proposal = integral_over_noise(module, cells), module.encode(cells)
    module.z_encoder.mean_encoder.bias += 0.4
    module.z_encoder.var_encoder.bias += 0.3
    assert (module.encode(cells).loc - proposal.loc).min() > 0.39
    assert_close(integral_over_noise(module, cells), before, **QUADRATURE)


def test_importance_weights_with_a_latent_library():
    module, cells = one_latent(reconstruction_loss="nb", library="latent")
    nodes = torch.linspace(-8, 8, 121, dtype=torch.float64)
    e_z, e_l = (n.reshape(-1) for n in torch.meshgrid(nodes, nodes, indexing="ij"))
    prior, weights = module.library.prior(cells), -0.5 * (e_z**2 + e_l**2) - math.log(2 * math.pi)
    step = (nodes[1] - nodes[0]).item()

    def sum_over_nodes(log_values: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(log_values + weights, -1) + 2 * math.log(step)

    for i in range(len(cells.x)):
        one = Minibatch(*(None if c is None else c[[i]].expand(len(e_z), *c.shape[1:]) for c in cells))
        by_weight = module.log_weight(one, module.posteriors(one), torch.stack([e_z, e_l], 1))
        log_library = (prior.loc[i] + prior.scale[i] * e_l).unsqueeze(1)
        by_prior = module.log_likelihood(one.x, module.decode(e_z.unsqueeze(1), one, log_library))
        assert_close(sum_over_nodes(by_weight), sum_over_nodes(by_prior), **QUADRATURE)


def test_elbo_is_below_the_marginal_likelihood_by_the_kl_to_the_true_posterior():
    module, cells = one_latent(reconstruction_loss="nb")
    posteriors = module.posteriors(cells)
    draws = noise_on_grid(module)
    log_weights = torch.stack([module.log_weight(cells, posteriors, d) for d in draws])
    elbo = torch.trapezoid(log_weights * DENSITY, GRID, dim=0)
    losses = [module.loss(cells, noise=d) for d in draws]
    reconstruction = torch.trapezoid(torch.stack([loss.reconstruction for loss in losses]) * DENSITY, GRID, dim=0)
    by_parts = -reconstruction - losses[0].kl_z - losses[0].kl_library
    assert_close(elbo, by_parts, **QUADRATURE)
    gap = integral_over_noise(module, cells) - elbo
    assert (gap > 0).all()


def test_compute_marginal_log_likelihood_is_the_integral():
    module, cells = one_latent(reconstruction_loss="nb")
    torch.manual_seed(0)
    n_samples = 4000
    estimate = models.compute_marginal_log_likelihood_scvi(module, [cells], n_samples)
    posteriors = module.posteriors(cells)
    weights = torch.stack([module.log_weight(cells, posteriors, noise(module, 6, seed=s)) for s in range(300)]).exp()
    # The logarithm of a mean of S weights has variance var(w) / (mean(w)^2 S); the cells are averaged.
    relative = (weights.var(0) / weights.mean(0) ** 2).sum() / 6**2
    exact = -integral_over_noise(module, cells).mean()
    assert abs(estimate - exact) < N_STANDARD_ERRORS * math.sqrt(relative / n_samples)
