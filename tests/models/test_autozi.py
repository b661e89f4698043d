"""The laws of AutoZI that other models do not have: delta, its prior, and the mixture."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from _small import BARE, SUMMARY, build, given, make_cells, noise
from _tolerances import FLOAT64, N_STANDARD_ERRORS
from torch.distributions import Beta, kl_divergence
from torch.testing import assert_close

from scvi_ext import models
from scvi_ext.functional.counts import log_nb_positive, log_zinb_positive

KINDS = ("gene", "gene-batch", "gene-label", "gene-cell")
SHARED_KINDS = KINDS[:3]
G, K, C = SUMMARY.n_input, SUMMARY.n_batch, SUMMARY.n_labels
SHAPES = {"gene": (G,), "gene-batch": (K, G), "gene-label": (C, G)}

kinds = pytest.mark.parametrize("kind", KINDS)
shared_kinds = pytest.mark.parametrize("kind", SHARED_KINDS)


def make(kind: str, summary=SUMMARY, **options) -> torch.nn.Module:
    module = build("autozi", summary, zero_inflation=kind, **options).eval()
    if kind != "gene-cell":
        generator = torch.Generator().manual_seed(7)
        for logits in (module.alpha_posterior_logit, module.beta_posterior_logit):
            torch.nn.init.normal_(logits, generator=generator)
    return module


def of_cells(by_group: torch.Tensor, kind: str, cells) -> torch.Tensor:
    """One row for each cell, by a loop."""
    if kind in ("gene", "gene-cell"):
        return by_group.expand(len(cells.x), -1)
    codes = cells.batch_index if kind == "gene-batch" else cells.labels
    return torch.stack([by_group[code] for code in codes.tolist()])


# ---- the likelihood --------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("minimal_dropout", [0.0, 0.05])
def test_the_likelihood_is_a_mixture(kind, minimal_dropout):
    module, cells = make(kind, minimal_dropout=minimal_dropout), make_cells()
    posteriors = module.posteriors(cells)
    z, log_library = module.draw(cells, posteriors, noise(module))
    shared = module.draw_shared(np.random.default_rng(0))
    with torch.no_grad():
        found = module.log_px(z, cells, log_library, shared)
        dropout = module.decoder.heads(*module._decoder_input(z, cells))[2]
        px = module.decode(z, cells, log_library, shared)
        delta = torch.full((G,), 0.5).double() if shared is None else torch.sigmoid(shared)
    delta = of_cells(delta, kind, cells)
    pi = minimal_dropout + (1 - minimal_dropout) * torch.sigmoid(dropout)
    nb = log_nb_positive(cells.x, px.rate, px.theta)
    zinb = log_zinb_positive(cells.x, px.rate, px.theta, torch.logit(pi))
    expected = torch.log(delta * torch.exp(nb) + (1 - delta) * torch.exp(zinb)).sum(-1)
    assert_close(found, expected, **FLOAT64)


@shared_kinds
def test_without_a_draw_delta_is_at_its_mean(kind):
    module, cells = make(kind), make_cells()
    z = module.posteriors(cells)[0].loc
    a, b = module.zero_inflation_posterior()
    expected = module.decode(z, cells, None, torch.logit(a / (a + b)))
    assert_close(module.decode(z, cells).dropout_logits, expected.dropout_logits, **FLOAT64)


@shared_kinds
def test_the_mean_over_delta_is_exact_for_one_count(kind):
    """p(x | z) of one gene is linear in its delta, so that draws average to what is said at the mean."""
    module, cells = make(kind), make_cells()
    z = module.posteriors(cells)[0].loc
    rng, n = np.random.default_rng(3), 1000
    with torch.no_grad():
        at_mean = torch.sigmoid(module.decode(z, cells).dropout_logits)
        draws = torch.stack(
            [torch.sigmoid(module.decode(z, cells, None, module.draw_shared(rng)).dropout_logits) for _ in range(n)]
        )
    error = draws.std(0) / math.sqrt(n)
    assert ((draws.mean(0) - at_mean).abs() < N_STANDARD_ERRORS * error).all()


def test_gene_cell_leaves_the_mean_of_the_prior():
    module, cells = make("gene-cell", alpha_prior=0.2, beta_prior=0.6), make_cells()
    assert module.draw_shared() is None
    assert module.kl_shared() == 0
    z = module.posteriors(cells)[0].loc
    mean = torch.logit(torch.tensor([0.2 / 0.8], dtype=torch.float64))
    # The prior is kept as a float32 logit.
    assert_close(
        module.decode(z, cells).dropout_logits, module.decode(z, cells, None, mean).dropout_logits, rtol=1e-6, atol=1e-6
    )


def test_gene_label_needs_the_label_of_each_cell():
    module, cells = make("gene-label"), make_cells()
    with pytest.raises(ValueError, match="zero_inflation='gene-label' needs the label of each cell"):
        module.loss(cells._replace(labels=None))


# ---- the loss --------------------------------------------------------------------------------------------------------


@shared_kinds
@pytest.mark.parametrize("n_train", [1, 50])
def test_each_cell_bears_its_share_of_the_divergence(kind, n_train):
    module, cells = make(kind, replace(SUMMARY, n_train=n_train)), make_cells()
    q, p = module.zero_inflation_posterior(), module.prior()
    divergence = kl_divergence(Beta(*q), Beta(*p)).sum()
    assert_close(module.compute_global_kl_divergence(), divergence, **FLOAT64)
    loss = module.loss(cells, kl_weight=0.3, **given(module, noise(module)))
    assert_close(loss.kl_global, (divergence / n_train).expand(len(cells.x)), **FLOAT64)
    parts = loss.reconstruction + loss.kl_library + 0.3 * loss.kl_z + loss.kl_global  # which is never warmed up
    assert_close(loss.total, parts.mean(), **FLOAT64)


@shared_kinds
def test_the_weight_of_a_draw_averages_to_minus_the_divergence(kind):
    module, rng = make(kind), np.random.default_rng(0)
    with torch.no_grad():
        weights = torch.stack([module.log_weight_shared(module.draw_shared(rng)) for _ in range(3000)])
    error = weights.std() / math.sqrt(3000)
    assert (weights.mean() + module.kl_shared()).abs() < N_STANDARD_ERRORS * error


@shared_kinds
def test_delta_learns(kind):
    module, cells = make(kind), make_cells()
    module.loss(cells).total.backward()
    for logits in (module.alpha_posterior_logit, module.beta_posterior_logit):
        assert logits.shape == SHAPES[kind]
        assert logits.grad.abs().min() > 0


# ---- the prior -------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    ("given_", "expected"),
    [((0.3, 0.8), (0.3, 0.8)), ((0.3, None), (0.3, 0.7)), ((None, 0.8), (0.2, 0.8)), ((0.5, 0.5), (0.5, 0.5))],
)
def test_both_parameters_of_the_prior_count(kind, given_, expected):
    alpha_prior, beta_prior = given_
    module = make(kind, alpha_prior=alpha_prior, beta_prior=beta_prior)
    found = [value.item() for value in module.prior()]
    assert found == pytest.approx(expected, rel=1e-6)  # float32
    assert not any("prior" in name for name, _ in module.named_parameters())


@kinds
def test_the_prior_can_be_learned(kind):
    module, cells = make(kind, alpha_prior=None, beta_prior=None), make_cells()
    module.loss(cells).total.backward()
    rows = SHAPES.get(kind, (G,))[:-1]
    for logits in (module.alpha_prior_logit, module.beta_prior_logit):
        assert isinstance(logits, torch.nn.Parameter)
        assert logits.shape == (*rows, 1)
        assert logits.grad.abs().min() > 0
    assert all(value.shape == (*rows, 1) for value in module.prior())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha_prior": 0.0}, ValueError, r"alpha_prior=0.0 must be above 0 and below 1, or None"),
        ({"beta_prior": 1.0}, ValueError, r"beta_prior=1.0 must be above 0 and below 1, or None"),
        ({"minimal_dropout": 1.0}, ValueError, r"minimal_dropout=1.0 must be at least 0 and below 1"),
        ({"minimal_dropout": -0.1}, ValueError, r"minimal_dropout=-0.1 must be at least 0"),
        ({"zero_inflation": "genes"}, ValueError, r"zero_inflation='genes' is not one of .* Did you mean 'gene'\?"),
        ({"reconstruction_loss": "nb"}, TypeError, r"AutoZI has its own likelihood: leave out reconstruction_loss"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        models.AutoZIVAE(5, **options)


def test_gene_label_needs_labels():
    with pytest.raises(ValueError, match=r"zero_inflation='gene-label' needs labels: register them"):
        models.AutoZIVAE(5, zero_inflation="gene-label")


def test_one_batch_is_a_batch():
    module, cells = make("gene-batch", BARE), make_cells(BARE)
    assert module.alpha_posterior_logit.shape == (1, BARE.n_input)
    assert module.loss(cells).total.isfinite()


# ---- the seed's vocabulary -------------------------------------------------------------------------------------------

REQUIRED = inspect.Parameter.empty
METHODS = {
    "get_alphas_betas": {"as_numpy": True},
    "compute_global_kl_divergence": {},
    "sample_from_beta_distribution": {"alpha": REQUIRED, "beta": REQUIRED, "eps_gamma": 1e-30, "eps_sample": 1e-7},
    "sample_bernoulli_params": {"batch_index": None, "y": None, "n_samples": 1},
    "reshape_bernoulli": {"bernoulli_params": REQUIRED, "batch_index": None, "y": None},
    "rescale_dropout": {"px_dropout": REQUIRED, "eps_log": 1e-8},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_the_seed(method):
    parameters = dict(inspect.signature(getattr(models.AutoZIVAE, method)).parameters)
    del parameters["self"]
    assert {name: p.default for name, p in parameters.items()} == METHODS[method]


def test_arguments_of_the_seed():
    parameters = inspect.signature(models.AutoZIVAE).parameters.values()
    expected = {"n_input": REQUIRED, "alpha_prior": 0.5, "beta_prior": 0.5, "minimal_dropout": 0.01}
    expected["zero_inflation"] = "gene"
    found = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(found.items())[:5] == list(expected.items())


def plain(kind: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A module without covariates, which the seed's methods take loose tensors for."""
    summary = replace(SUMMARY, n_cats_per_cov=(), n_continuous_cov=0)
    cells = make_cells(summary)
    return make(kind, summary), {"x": cells.x, "batch_index": cells.batch_index[:, None], "y": cells.labels[:, None]}


@shared_kinds
def test_parameters_of_delta_have_genes_first(kind):
    module, _ = plain(kind)
    found = module.get_alphas_betas()
    assert set(found) == {"alpha_posterior", "beta_posterior", "alpha_prior", "beta_prior"}
    assert found["alpha_posterior"].shape == SHAPES[kind][::-1]
    assert found["alpha_prior"].shape == (1,)
    a, _ = module.zero_inflation_posterior()
    np.testing.assert_allclose(found["alpha_posterior"].T, a.detach(), **FLOAT64)
    as_tensors = module.get_alphas_betas(as_numpy=False)
    assert as_tensors["alpha_posterior"].requires_grad


@shared_kinds
@pytest.mark.parametrize("lead", [(), (4,)])
def test_each_cell_gets_its_delta(kind, lead):
    module, tensors = plain(kind)
    by_group = torch.rand(*lead, *SHAPES[kind][::-1], dtype=torch.float64)
    found = module.reshape_bernoulli(by_group, tensors["batch_index"], tensors["y"])
    if kind == "gene":
        assert found is by_group
        return
    codes = tensors["batch_index" if kind == "gene-batch" else "y"].flatten().tolist()
    expected = torch.stack([by_group[..., code] for code in codes], -2)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="needs the batch or label of each cell"):
        module.reshape_bernoulli(by_group)


@shared_kinds
@pytest.mark.parametrize("n_samples", [1, 3])
def test_samples_of_delta_are_probabilities(kind, n_samples):
    module, tensors = plain(kind)
    found = module.sample_bernoulli_params(tensors["batch_index"], tensors["y"], n_samples)
    lead = () if n_samples == 1 else (n_samples,)
    assert found.shape == (*lead, *((G,) if kind == "gene" else (len(tensors["x"]), G)))
    assert (found >= 1e-7).all()
    assert (found <= 1 - 1e-7).all()
    if n_samples > 1:
        assert not torch.equal(found[0], found[1])


def test_the_logit_of_the_dropout_is_rescaled():
    module = make("gene", minimal_dropout=0.2)
    dropout = torch.linspace(-30, 30, 13, dtype=torch.float64)
    found = torch.sigmoid(module.rescale_dropout(dropout))
    assert_close(found, 0.2 + 0.8 * torch.sigmoid(dropout), **FLOAT64)


@shared_kinds
@pytest.mark.parametrize("n_samples", [1, 3])
def test_inference_can_be_handed_to_the_reconstruction_loss(kind, n_samples):
    module, tensors = plain(kind)
    with torch.no_grad():
        found = module.inference(**tensors, n_samples=n_samples)
        loss = module.get_reconstruction_loss(tensors["x"], **found)
    lead = () if n_samples == 1 else (n_samples,)
    assert loss.shape == (*lead, len(tensors["x"]))
    delta = found["bernoulli_params"]
    nb = log_nb_positive(tensors["x"], found["px_rate"], found["px_r"])
    zinb = log_zinb_positive(tensors["x"], found["px_rate"], found["px_r"], found["px_dropout"])
    expected = torch.logaddexp(torch.log(delta) + nb, torch.log1p(-delta) + zinb)
    # eps_log = 1e-8 beside weights of 1e-7 at least: 0.1 in a logarithm at worst, where it hardly counts.
    assert_close(loss, -expected.sum(-1), rtol=1e-3, atol=0)


@shared_kinds
def test_forward_has_the_divergence_in_the_third_slot(kind):
    module, tensors = plain(kind)
    local, annealed, global_ = module(tensors["x"], batch_index=tensors["batch_index"], y=tensors["y"])
    assert local.shape == annealed.shape == (len(tensors["x"]),)
    assert_close(global_, module.compute_global_kl_divergence(), **FLOAT64)


@kinds
def test_the_elbo_of_any_number_of_cells_bounds_their_evidence(kind):
    """Both are of all cells: the divergence of delta counts once, whatever the number that was trained on."""
    module, cells = make(kind, replace(SUMMARY, n_train=5)), make_cells()
    minibatches = [type(cells)(*(c[i : i + 10] for c in cells)) for i in (0, 10, 20)]
    torch.manual_seed(0)
    elbos = [-models.compute_elbo(module, minibatches) for _ in range(100)]
    marginals = [-models.compute_marginal_log_likelihood_autozi(module, minibatches, 20) for _ in range(5)]
    error = np.std(elbos) / math.sqrt(100) + np.std(marginals) / math.sqrt(5)
    assert np.mean(elbos) < np.mean(marginals) + N_STANDARD_ERRORS * error
    assert np.mean(marginals) > np.mean(elbos)


def test_far_draws_are_finite():
    """At the smallest parameters logits of delta go to thousands."""
    module, cells = make("gene"), make_cells()
    for logits in (module.alpha_posterior_logit, module.beta_posterior_logit):
        torch.nn.init.constant_(logits, -6.0)
    shared = module.draw_shared(np.random.default_rng(0))
    assert shared.abs().max() > 500
    loss = module.loss(cells, noise=noise(module), shared=shared)
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
    assert module.log_weight_shared(shared).isfinite()
