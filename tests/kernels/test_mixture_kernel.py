"""The mixture kernel of the processor against the formula in float64 and its derivatives by autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _mixture import NAMES, by_formula, differentiate, draw, grid
from _tolerances import COUNT_KERNEL, COUNT_KERNEL_OF_LARGEST, LGAMMA_DIFFERENCE
from scipy import special, stats
from torch.testing import assert_close

from scvi_ext.functional import mixture
from scvi_ext.kernels import cpu


def by_kernel(counts, parameters, weights=None):
    return differentiate(mixture.log_likelihood, counts, parameters, weights)


def assert_agree(found, expected):
    """To float32 accuracy of the largest entry of each."""
    assert found.keys() == expected.keys()
    for key, e in expected.items():
        f = found[key]
        assert (f.dtype, f.shape) == (torch.float32, e.shape), key
        atol = COUNT_KERNEL_OF_LARGEST * max(1.0, float(e.abs().max()))
        assert_close(f.double(), e, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(autouse=True)
def _the_kernel_is_used():
    assert mixture.choose("cpu", torch.float32)[0] is cpu.nb_mixture


# ---- against the formula -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("theta", ["protein", "cell"])
@pytest.mark.parametrize(("n_cells", "n_proteins"), [(1, 1), (5, 1), (1, 33), (5, 33), (3, 300)])
def test_it_is_the_formula(n_cells, n_proteins, theta, n_samples):
    counts, parameters = draw(n_cells, n_proteins, theta, n_samples)
    assert_agree(by_kernel(counts, parameters), by_formula(counts, parameters))


@pytest.mark.parametrize("theta", ["protein", "cell"])
def test_cells_may_have_their_own_weights(theta):
    counts, parameters = draw(theta=theta, n_samples=3)
    weights = torch.linspace(-2, 3, 15).reshape(3, 5)
    weights[1, 2] = 0.0
    assert_agree(by_kernel(counts, parameters, weights), by_formula(counts, parameters, weights))


def test_the_formula_has_the_derivatives_that_autograd_says():
    (y, measured), parameters = draw(3, 4)
    leaves = [value.double().requires_grad_() for value in parameters.values()]
    assert torch.autograd.gradcheck(lambda *p: mixture.plain(y.double(), measured, *p), leaves)


def test_the_formula_is_the_mixture():
    (y, measured), parameters = draw(4, 6)
    y, measured = y.floor().double(), torch.ones_like(measured)
    back, ratio, theta, mixing = (value.double().numpy() for value in parameters.values())
    theta = np.exp(theta)
    log_p = []
    for log_mean, log_share in ((back, special.log_expit(mixing)), (back + ratio, special.log_expit(-mixing))):
        log_p.append(log_share + stats.nbinom.logpmf(y.numpy(), theta, theta / (theta + np.exp(log_mean))))
    expected = special.logsumexp(log_p, axis=0).sum(-1)
    found = mixture.plain(y, measured, *(value.double() for value in parameters.values()))
    assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=0)  # eps = 1e-8 in the logarithms of small means


# ---- the ends of the range -----------------------------------------------------------------------------------------


def test_counts_means_ratios_dispersions_and_mixing_may_be_extreme():
    counts, parameters = grid()
    found, expected = by_kernel(counts, parameters), by_formula(counts, parameters)
    assert len(counts[0]) == 7 * 6 * 5 * 5 * 5
    for key, e in expected.items():
        f, e = found[key].reshape(-1).double(), e.reshape(-1)
        assert f.isfinite().all(), key
        # The formula itself loses some digits to the lgamma of 1e6.
        allowed = COUNT_KERNEL * (1 + e.abs()) + LGAMMA_DIFFERENCE["atol"]
        excess = (f - e).abs() / allowed
        worst = int(excess.argmax())
        at = {k: float(v[worst]) for k, v in {"y": counts[0], **parameters}.items()}
        assert excess[worst] <= 1, (key, float(f[worst]), float(e[worst]), at)


def test_many_proteins_of_one_cell_are_the_sum():
    """The loops over proteins, in which every combination has neighbours."""
    (y, measured), parameters = grid()
    measured = torch.arange(len(y)).reshape(-1, 1) % 3 > 0
    alone = by_kernel((y, measured), parameters)
    row = {key: value.reshape(1, -1) for key, value in parameters.items()}
    together = by_kernel((y.reshape(1, -1), measured.reshape(1, -1)), row)
    for key in NAMES:
        assert torch.equal(together[key].reshape(-1), alone[key].reshape(-1)), key
    total = alone["log_p"].double()
    assert_close(together["log_p"].double(), total.sum(0, keepdim=True), rtol=0, atol=1e-7 * float(total.abs().sum()))


def test_a_foreground_that_is_the_background_leaves_the_mixing_open():
    counts, parameters = draw()
    parameters["log_ratio"] = torch.zeros_like(parameters["log_ratio"])
    found = by_kernel(counts, parameters)
    other = by_kernel(counts, parameters | {"mixing": -7 * parameters["mixing"]})
    assert_close(found["log_p"], other["log_p"], rtol=2e-6, atol=0)
    assert found["mixing"].abs().max() < 1e-6
    assert_agree(found, by_formula(counts, parameters))


@pytest.mark.parametrize(("logit", "component"), [(1e4, "background"), (-1e4, "foreground")])
def test_only_one_component_is_left_for_a_sure_mixing(logit, component):
    counts, parameters = draw()
    parameters["mixing"] = torch.full_like(parameters["mixing"], logit)
    alone = parameters | {"log_ratio": torch.zeros_like(parameters["log_ratio"])}
    if component == "foreground":
        alone["log_background"] = parameters["log_background"] + parameters["log_ratio"]
    found, expected = by_kernel(counts, parameters), by_formula(counts, alone)
    assert_close(found["log_p"].double(), expected["log_p"], rtol=2e-6, atol=0)


# ---- what is not measured, what is not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("theta", ["protein", "cell"])
def test_what_was_not_measured_counts_for_nothing(theta):
    (y, measured), parameters = draw(theta=theta)
    expected = by_kernel((y, measured), parameters)
    poisoned = {key: torch.where(measured, t, torch.nan) if t.dim() > 1 else t for key, t in parameters.items()}
    for counts in (y + 100 * ~measured, torch.where(measured, y, -3.0), torch.where(measured, y, torch.nan)):
        for given in (parameters, poisoned):
            found = by_kernel((counts, measured), given)
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    for key in NAMES if theta == "cell" else ("log_background", "log_ratio", "mixing"):
        assert (expected[key][~measured] == 0).all(), key
        assert (expected[key][measured] != 0).any(), key


def test_a_cell_without_measurements_has_probability_one():
    (y, measured), parameters = draw()
    measured[2] = False
    found = by_kernel((y, measured), parameters)
    assert found["log_p"][2] == 0
    assert (found["log_p"][[0, 1, 3, 4]] < 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["y", *NAMES])
def test_what_is_not_finite_is_nan_in_its_cell_and_nowhere_else(key, bad):
    (y, measured), parameters = draw(theta="cell")
    measured[2, -1] = True
    expected = by_kernel((y, measured), parameters)
    {"y": y, **parameters}[key][2, -1] = bad
    found = by_kernel((y, measured), parameters)
    others = [0, 1, 3, 4]
    assert found["log_p"].isnan().tolist() == [i == 2 for i in range(5)]
    for what, values in found.items():
        assert torch.equal(values[others], expected[what][others]), what


def test_a_negative_count_is_nan_in_its_cell_too():
    (y, measured), parameters = draw()
    measured[2, 7] = True
    y[2, 7] = -1.0
    assert by_kernel((y, measured), parameters)["log_p"].isnan().tolist() == [i == 2 for i in range(5)]


# ---- forms of the call ---------------------------------------------------------------------------------------------


def test_samples_are_cells_of_their_own():
    counts, parameters = draw(n_samples=3, theta="cell")
    together = by_kernel(counts, parameters)
    assert together["log_p"].shape == (3, 5)
    of_theta = 0
    for s in range(3):
        alone = by_kernel(counts, {key: t if key == "log_theta" else t[s] for key, t in parameters.items()})
        of_theta = of_theta + alone.pop("log_theta")
        for key, value in alone.items():
            assert torch.equal(together[key][s], value), key
    assert_close(together["log_theta"], of_theta, rtol=1e-5, atol=1e-5)


def test_a_background_may_be_shared_by_samples():
    counts, parameters = draw(n_samples=3)
    parameters["log_background"] = parameters["log_background"][0]  # (B, P) beside logits of (S, B, P)
    assert_agree(by_kernel(counts, parameters), by_formula(counts, parameters))


def test_inputs_need_not_lie_together():
    (y, measured), parameters = draw(theta="cell")
    expected = by_kernel((y, measured), parameters)
    scattered = {key: value.t().contiguous().t() for key, value in parameters.items()}
    wide = torch.cat([y, y], 1)[:, : y.shape[1]]
    found = by_kernel((wide, measured.t().contiguous().t()), scattered)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("theta", ["protein", "cell"])
def test_without_gradients_it_is_the_same(theta):
    counts, parameters = draw(theta=theta)
    expected = by_kernel(counts, parameters)["log_p"]
    log_p, *made = cpu.nb_mixture(*counts, **parameters, weight=1.0, gradients=False)
    assert torch.equal(log_p, expected)
    assert all(gradient.numel() == 0 for gradient in made)
    with torch.no_grad():
        assert torch.equal(mixture.log_likelihood(*counts, **parameters), expected)


def test_the_weight_is_of_the_gradients_alone():
    counts, parameters = draw()
    one, quarter = (cpu.nb_mixture(*counts, **parameters, weight=w, gradients=True) for w in (1.0, -0.25))
    assert torch.equal(one[0], quarter[0])
    for a, b in zip(one[1:], quarter[1:], strict=True):
        assert torch.equal(-0.25 * a, b)  # a power of two rounds nothing


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_number_of_parts_changes_no_bit(parts):
    counts, parameters = draw(n_cells=6)
    expected, before = by_kernel(counts, parameters), torch.get_num_threads()
    try:
        torch.set_num_threads(parts)
        found = by_kernel(counts, parameters)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_no_cells_at_all():
    (y, measured), parameters = draw()
    none = {key: value if key == "log_theta" else value[:0] for key, value in parameters.items()}
    assert mixture.log_likelihood(y[:0], measured[:0], **none).shape == (0,)


# ---- when it is trusted --------------------------------------------------------------------------------------------

choose = mixture.choose.__wrapped__  # what is chosen is remembered for the process: not here


def one_entry(tensor):
    wrong = tensor.clone()
    wrong.view(-1)[-1] += 1
    return wrong


def one_nan(tensor):
    wrong = tensor.clone()
    wrong.view(-1)[-1] = torch.nan
    return wrong


def scaled(tensor):
    return tensor * 1.001


@pytest.mark.parametrize("distort", [scaled, one_entry, one_nan])
@pytest.mark.parametrize("which", range(5), ids=["log_p", *NAMES])
def test_a_kernel_that_is_wrong_anywhere_is_not_trusted(monkeypatch, which, distort):
    def wrong(*inputs):
        results = list(cpu.nb_mixture(*inputs))
        results[which] = distort(results[which])
        return tuple(results)

    monkeypatch.setitem(cpu.LIKELIHOODS, "nb mixture", wrong)
    run, how = choose("cpu", torch.float32)
    assert run is None
    assert how.startswith("plain formula of nb mixture, because its kernel deviates from it by ")


def test_what_is_chosen():
    run, how = choose("cpu", torch.float32)
    assert run is cpu.nb_mixture
    assert how.startswith("fused kernel of nb mixture")
    assert choose("cpu", torch.float64) == (
        None,
        "plain formula of nb mixture, because the parameters are torch.float64",
    )


def test_choosing_draws_no_random_numbers_and_works_without_gradients():
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert choose("cpu", torch.float32)[0] is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_differentiated_once():
    counts, parameters = draw()
    leaf = parameters["mixing"].requires_grad_()
    log_p = mixture.log_likelihood(*counts, **parameters)
    (gradient,) = torch.autograd.grad(log_p.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
