"""The kernels of the processor against the formulas of functional.counts in float64 and their derivatives by autograd.

One unit of tolerance is explained in _tolerances.py; nothing here is compared with a float32 formula.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from _tolerances import COUNT_KERNEL, COUNT_KERNEL_OF_LARGEST, FLOAT32, LGAMMA_DIFFERENCE
from torch.nn.functional import softplus
from torch.testing import assert_close

from scvi_ext._contract import Expression
from scvi_ext.functional import fused
from scvi_ext.functional.counts import LIKELIHOODS, log_nb_positive
from scvi_ext.kernels import cpu
from scvi_ext.kernels.sparse import SparseRows

KERNELS = ("zinb", "nb", "poisson")
ACTIVATIONS = pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "softplus"])
NAMES = ("logits", "log_library", "log_theta", "dropout")


def draw(name, n_cells=5, n_genes=33, n_samples=1, theta="gene", softmax=True, seed=0):
    """Counts of zero, small, large and fractional, and float32 parameters of a likelihood: x and a dictionary."""
    g = torch.Generator().manual_seed(1000 * n_genes + 10 * n_samples + seed)
    lead = (n_cells, n_genes) if n_samples == 1 else (n_samples, n_cells, n_genes)

    def normal(*shape, scale=2.0):
        return scale * torch.randn(*shape, generator=g)

    x = torch.poisson(2 * torch.rand(n_cells, n_genes, generator=g), generator=g)
    x[:, ::5] *= 31
    x[:, 3::11] += 0.25
    parameters = {
        "logits": normal(*lead),
        "log_library": normal(*lead[:-1], 1, scale=1.0) + (float(np.log(2 * n_genes)) if softmax else 0.0),
        "log_theta": normal(*{"gene": (n_genes,), "cell": (n_cells, n_genes), "sample": lead}[theta]),
        "dropout": normal(*lead),
    }
    return x, used(name, parameters)


def used(name, parameters):
    """``parameters`` with None for what the likelihood does not have."""
    without = {"zinb": (), "nb": ("dropout",), "poisson": ("log_theta", "dropout")}[name]
    return {key: None if key in without else value for key, value in parameters.items()}


def sparse(x):
    return SparseRows.from_dense(x)


def differentiate(log_p_of, parameters, weights=None):
    """Log-probabilities, and gradients of their weighted sum by what is there."""
    leaves = {key: None if t is None else t.clone().requires_grad_() for key, t in parameters.items()}
    log_p = log_p_of(**leaves)
    there = {key: leaf for key, leaf in leaves.items() if leaf is not None}
    weights = torch.ones_like(log_p) if weights is None else weights.to(log_p.dtype)
    gradients = torch.autograd.grad((weights * log_p).sum(), list(there.values()))
    return {"ll": log_p.detach(), **dict(zip(there, gradients, strict=True))}


def by_kernel(name, x, softmax, parameters, weights=None):
    run, rows = cpu.LIKELIHOODS[name], x if isinstance(x, SparseRows) else sparse(x)
    return differentiate(lambda **p: fused.log_likelihood(run, rows, softmax, **p), parameters, weights)


def by_formula(name, x, softmax, parameters, weights=None):
    def log_p(logits, log_library, log_theta, dropout):
        rate = torch.exp(log_library) * (torch.softmax(logits, -1) if softmax else softplus(logits))
        theta = None if log_theta is None else torch.exp(log_theta)
        return LIKELIHOODS[name](x.double(), Expression(rate, rate, theta, dropout)).sum(-1)

    return differentiate(log_p, {key: None if t is None else t.double() for key, t in parameters.items()}, weights)


def assert_agree(found, expected):
    """To float32 accuracy of the largest entry of each.

    The gradient by a logit of a softmax is a difference of two terms of the size of the one by the library.
    """
    assert found.keys() == expected.keys()
    largest = {key: max(1.0, float(e.abs().max())) for key, e in expected.items()}
    largest["logits"] = max(largest["logits"], largest["log_library"])
    for key, e in expected.items():
        f = found[key]
        assert f.dtype == torch.float32, key
        assert f.shape == e.shape, key
        atol = COUNT_KERNEL_OF_LARGEST * largest[key]
        assert_close(f.double(), e, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


# ---- against the formula -------------------------------------------------------------------------------------------


@ACTIVATIONS
@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize(
    ("name", "theta"),
    [(name, theta) for name in ("zinb", "nb") for theta in ("gene", "cell", "sample")] + [("poisson", "gene")],
)
@pytest.mark.parametrize(("n_cells", "n_genes"), [(1, 1), (5, 1), (1, 33), (5, 33), (3, 2003)])
def test_it_is_the_formula(name, theta, softmax, n_samples, n_cells, n_genes):
    x, parameters = draw(name, n_cells, n_genes, n_samples, theta, softmax)
    assert_agree(by_kernel(name, x, softmax, parameters), by_formula(name, x, softmax, parameters))


@ACTIVATIONS
@pytest.mark.parametrize("name", KERNELS)
def test_cells_may_have_their_own_weights(name, softmax):
    x, parameters = draw(name, n_samples=3, theta="cell", softmax=softmax)
    weights = torch.linspace(-2, 3, 15).reshape(3, 5)  # one of them 0.5, none special
    weights[1, 2] = 0.0
    assert_agree(by_kernel(name, x, softmax, parameters, weights), by_formula(name, x, softmax, parameters, weights))


@ACTIVATIONS
@pytest.mark.parametrize("name", KERNELS)
def test_cells_without_counts(name, softmax):
    x, parameters = draw(name, softmax=softmax)
    x[[0, 3]] = 0
    assert_agree(by_kernel(name, x, softmax, parameters), by_formula(name, x, softmax, parameters))
    assert_agree(by_kernel(name, 0 * x, softmax, parameters), by_formula(name, 0 * x, softmax, parameters))


@pytest.mark.parametrize("name", KERNELS)
def test_zeros_may_be_stored_and_genes_be_in_any_order(name):
    x, parameters = draw(name, n_genes=33)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    full = SparseRows(33 * torch.arange(6), order.int().repeat(5), x[:, order].flatten(), 33)
    assert (full.values == 0).sum() > 20
    for key, found in by_kernel(name, full, True, parameters).items():
        assert_close(found, by_kernel(name, x, True, parameters)[key], **FLOAT32)


@pytest.mark.parametrize("name", KERNELS)
def test_a_library_may_be_shared_by_samples(name):
    x, parameters = draw(name, n_samples=3, theta="cell")
    parameters["log_library"] = parameters["log_library"][0]  # (B, 1) beside logits of (S, B, G)
    assert_agree(by_kernel(name, x, True, parameters), by_formula(name, x, True, parameters))


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "softplus"])
@pytest.mark.parametrize("name", KERNELS)
def test_finite_parameters_give_finite_numbers(name, softmax):
    x, parameters = draw(name, softmax=softmax)
    parameters["logits"][0, ::2], parameters["logits"][1, ::2] = -1e3, 80.0
    parameters["logits"][2] = -1e4
    parameters["log_library"][[3, 4]] = torch.tensor([[-20.0], [20.0]])
    for key, found in by_kernel(name, x, softmax, parameters).items():
        assert torch.isfinite(found).all(), key


# ---- the ends of the range -----------------------------------------------------------------------------------------

COUNTS = (0, 0.25, 1, 2, 3, 7, 7.5, 8, 9, 57, 1e3, 1e6)
RATES = (1e-8, 1e-4, 0.03, 1.0, 7.5, 1e3, 1e6)
THETAS = (1e-4, 0.02, 0.99, 9.0, 1e3, 1e6)
DROPOUTS = (-30.0, -1.0, 0.0, 2.0, 30.0)


def grid(name):
    """Every combination as one column: counts, and parameters with rate = exp(log_library) softplus(logit).

    The library is 1, so the logit is the inverse of softplus.
    """
    rates = torch.tensor(RATES, dtype=torch.float64)
    logits = torch.where(rates > 30, rates, torch.log(torch.expm1(rates)))
    axes = {"zinb": (COUNTS, THETAS, DROPOUTS), "nb": (COUNTS, THETAS, [0]), "poisson": (COUNTS, [0], [0])}[name]
    x, theta, dropout, logits = torch.meshgrid(
        *(torch.tensor(a, dtype=torch.float64) for a in axes), logits, indexing="ij"
    )
    columns = {"logits": logits, "log_theta": torch.log(theta), "dropout": dropout}
    columns = {key: column.reshape(-1, 1).float() for key, column in columns.items()}
    columns["log_library"] = torch.zeros_like(columns["logits"])
    return x.reshape(-1, 1).float(), used(name, {key: columns[key] for key in NAMES})


def assert_agree_entry_by_entry(found, expected, x, parameters, where=""):
    """Each entry within what float32 allows for it: its own size, and the size of the terms it is made of."""
    rate = softplus(parameters["logits"].double())
    theta = None if parameters["log_theta"] is None else torch.exp(parameters["log_theta"].double())
    shrink = 1.0 if theta is None else 1 / (1 + rate / theta)
    terms = {
        # d log NB / d log mu = x / (1 + r) - mu / (1 + r)
        "logits": shrink * (x + rate) * torch.sigmoid(parameters["logits"].double()) / rate,
        "log_library": shrink * (x + rate),
    }
    assert found.keys() == expected.keys()
    for key, e in expected.items():
        f, e = found[key].reshape(-1).double(), e.reshape(-1)
        size = 1 + e.abs() + terms.get(key, torch.zeros(1)).reshape(-1)
        excess = (f - e).abs() / size
        worst = int(excess.argmax())
        at = {k: float(v.reshape(-1)[worst]) for k, v in {"x": x, **parameters}.items() if v is not None}
        assert excess[worst] <= COUNT_KERNEL, (where, key, float(f[worst]), float(e[worst]), float(excess[worst]), at)


@pytest.mark.parametrize("name", KERNELS)
def test_counts_rates_dispersions_and_dropout_may_be_extreme(name):
    x, parameters = grid(name)
    found, expected = by_kernel(name, x, False, parameters), by_formula(name, x, False, parameters)
    assert len(x) == {"zinb": 2520, "nb": 504, "poisson": 84}[name]
    assert_agree_entry_by_entry(found, expected, x, parameters)


@pytest.mark.parametrize("name", KERNELS)
def test_the_library_carries_the_rate_as_well(name):
    x, parameters = grid(name)
    as_library = dict(parameters)
    as_library["log_library"] = torch.log(softplus(parameters["logits"].double())).float()
    as_library["logits"] = torch.zeros_like(parameters["logits"])  # the softmax of one gene is 1
    found, expected = by_kernel(name, x, True, as_library), by_formula(name, x, True, as_library)
    d_logits = found.pop("logits")  # the profile of one gene cannot change
    assert (expected.pop("logits") == 0).all()
    assert (d_logits.abs() <= COUNT_KERNEL * (1 + found["log_library"].abs())).all()
    assert_agree_entry_by_entry(found, expected, x, parameters)


@pytest.mark.parametrize("name", KERNELS)
def test_one_cell_with_all_of_them_as_its_genes(name):
    """The loops over genes, in which every combination has neighbours."""
    x, parameters = grid(name)
    row = {key: None if t is None else t.reshape(1, -1) for key, t in parameters.items()}
    row["log_library"] = torch.zeros(1, 1)
    found, expected = (by(name, x.reshape(1, -1), False, row) for by in (by_kernel, by_formula))
    for result in (found, expected):  # sums over the genes
        result.pop("log_library")
    ll, exact = found.pop("ll"), expected.pop("ll")
    terms = by_formula(name, x, False, parameters)["ll"].abs().sum()
    assert_close(ll.double(), exact, rtol=0, atol=float(COUNT_KERNEL * terms))
    assert_agree_entry_by_entry(found, expected, x, parameters)


def test_the_formula_in_float64_is_right_where_large_terms_cancel():
    """It is what everything here is compared with, so it is compared with sums in which nothing cancels."""
    x, rate, theta = np.array(np.meshgrid([c for c in COUNTS if c == int(c)], RATES, THETAS)).reshape(3, -1)
    log_rate, log_theta = (torch.from_numpy(np.log(v)).requires_grad_() for v in (rate, theta))
    ll = log_nb_positive(torch.from_numpy(x), torch.exp(log_rate), torch.exp(log_theta))
    d_rate, d_theta = torch.autograd.grad(ll.sum(), [log_rate, log_theta])

    r, inverse = rate / (theta + 1e-8), 1 / (theta + 1e-8)
    shrink = 1 / (1 + r)
    binomial, digammas = np.empty_like(x), np.empty_like(x)
    for i, (count, t) in enumerate(zip(x, theta, strict=True)):
        j = np.arange(count)
        binomial[i] = np.log((t + j) * inverse[i] / (j + 1)).sum()  # Gamma(x + t) / (Gamma(t) x!) / (t + eps)^x
        digammas[i] = (1 / (t + j)).sum()
    exact = binomial + x * np.log(rate + 1e-8) - (x + theta) * np.log1p(r)
    assert_close(ll, torch.from_numpy(exact), **LGAMMA_DIFFERENCE)
    exact = x * rate / (rate + 1e-8) - (x + theta) * r * shrink
    assert_close(d_rate, torch.from_numpy(exact), **LGAMMA_DIFFERENCE)
    exact = theta * (digammas - np.log1p(r) + (x + theta) * r * shrink * inverse - x * inverse)
    assert_close(d_theta, torch.from_numpy(exact), **LGAMMA_DIFFERENCE)


# ---- what is not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("zinb", key) for key in ("x", *NAMES)),
        *(("nb", key) for key in ("x", *NAMES[:3])),
        *(("poisson", key) for key in ("x", *NAMES[:2])),
    ],
)
@ACTIVATIONS
def test_what_is_not_finite_is_nan_in_its_cell_and_nowhere_else(name, key, bad, softmax):
    x, parameters = draw(name, theta="sample", softmax=softmax)
    expected = by_kernel(name, x, softmax, parameters)
    {"x": x, **parameters}[key][2, -1] = bad
    found = by_kernel(name, x, softmax, parameters)
    others = [0, 1, 3, 4]
    for what, values in found.items():
        assert torch.isnan(values[2]).all(), what
        assert torch.equal(values[others], expected[what][others]), what


@pytest.mark.parametrize("name", KERNELS)
def test_a_negative_count_is_nan_in_its_cell_too(name):
    x, parameters = draw(name, theta="sample")
    x[2, 7] = -1.0
    for what, values in by_kernel(name, x, True, parameters).items():
        assert torch.isnan(values[2]).all(), what
        assert torch.isfinite(values[[0, 1, 3, 4]]).all(), what


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_shared_dispersion_that_is_not_finite_is_nan_in_every_cell(bad):
    x, parameters = draw("zinb")
    parameters["log_theta"][7] = bad
    found = by_kernel("zinb", x, True, parameters)
    assert all(torch.isnan(values).all() for values in found.values())


# ---- forms of the call ---------------------------------------------------------------------------------------------


@ACTIVATIONS
@pytest.mark.parametrize("name", KERNELS)
def test_without_gradients_it_is_the_same_and_writes_nowhere(name, softmax):
    x, parameters = draw(name, n_samples=3, theta="sample", softmax=softmax)
    with_gradients = by_kernel(name, x, softmax, parameters)["ll"]
    flat = {key: None if t is None else t.flatten(0, -2) for key, t in parameters.items()}
    flat["log_library"] = flat["log_library"].flatten()
    before = {key: None if t is None else t.clone() for key, t in flat.items()}
    ll = cpu.LIKELIHOODS[name](sparse(x), softmax, **flat, weight=1.0, gradients=False)[0]
    assert torch.equal(ll.view(3, 5), with_gradients)
    for key, t in flat.items():
        assert t is None or torch.equal(t, before[key]), key


@pytest.mark.parametrize("name", KERNELS)
def test_the_weight_is_of_the_gradients_alone(name):
    x, parameters = draw(name, theta="cell")
    parameters["log_library"] = parameters["log_library"].flatten()

    def run(weight):
        copies = {key: None if t is None else t.clone() for key, t in parameters.items()}
        return cpu.LIKELIHOODS[name](sparse(x), True, **copies, weight=weight, gradients=True)

    one, quarter = run(1.0), run(-0.25)
    assert torch.equal(one[0], quarter[0])
    for a, b in zip(one[1:], quarter[1:], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(-0.25 * a, b)  # a power of two rounds nothing


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_lie_where_the_outputs_of_the_decoder_were(name):
    x, parameters = draw(name)
    parameters["log_library"] = parameters["log_library"].flatten()
    _, d_logits, _, _, d_dropout = cpu.LIKELIHOODS[name](sparse(x), True, **parameters, weight=1.0, gradients=True)
    assert d_logits.data_ptr() == parameters["logits"].data_ptr()
    assert name != "zinb" or d_dropout.data_ptr() == parameters["dropout"].data_ptr()


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_call_gives_the_same_bits(name):
    x, parameters = draw(name, n_genes=2003)
    one, other = (by_kernel(name, x, True, parameters) for _ in range(2))
    for key in one:
        assert torch.equal(one[key], other[key]), key


# ---- threads -------------------------------------------------------------------------------------------------------

# In a process of its own: numba learns its number of threads once, before it is imported.
THREADS = """
    import json, sys
    from concurrent.futures import ThreadPoolExecutor
    import numpy as np
    import torch
    from scvi_ext.functional import fused, mixture
    from scvi_ext.kernels import cpu
    from scvi_ext.kernels.sparse import SparseRows

    rng = np.random.default_rng(0)
    tensor = lambda *shape: torch.from_numpy(rng.normal(0, 2, shape).astype(np.float32))
    x = SparseRows.from_dense(torch.from_numpy(rng.poisson(1.0, (37, 91)).astype(np.float32)))
    inputs, weight = [tensor(37, 91), tensor(37, 1), tensor(91), tensor(37, 91)], tensor(16, 91)
    y, measured = torch.from_numpy(rng.poisson(9.0, (37, 23)).astype(np.float32)), tensor(37, 23) > 0
    of_proteins = [tensor(37, 23), tensor(37, 23).abs(), tensor(23), tensor(37, 23)]
    kept = {}

    def compute():
        results = {}
        leaves = [t.clone().requires_grad_() for t in of_proteins]
        ll = mixture.log_likelihood(y, measured, *leaves)
        gradients = torch.autograd.grad(ll.mean(), leaves)
        results |= {f"mixture{i}": t.detach().numpy() for i, t in enumerate([ll, *gradients])}
        for name in ("zinb", "poisson"):
            leaves = [t.clone().requires_grad_() for t in inputs]
            used = leaves if name == "zinb" else [*leaves[:2], None, None]
            ll = fused.log_likelihood(cpu.LIKELIHOODS[name], x, True, *used)
            gradients = torch.autograd.grad(ll.mean(), [t for t in used if t is not None])
            results |= {f"{name}{i}": t.detach().numpy() for i, t in enumerate([ll, *gradients])}
        leaf = weight.clone().requires_grad_()
        out = x.linear(leaf)
        return results | {"out": out.detach().numpy(), "d": torch.autograd.grad(out.square().sum(), leaf)[0].numpy()}

    torch.set_num_threads(1)
    fused.log_likelihood(cpu.LIKELIHOODS["poisson"], x, True, *inputs[:2], None, None)
    after_first = torch.get_num_threads()
    for call, n_threads in enumerate([1, 1, 2, 2]):
        torch.set_num_threads(n_threads)
        kept |= {f"call{call}_{key}": value for key, value in compute().items()}
        assert torch.get_num_threads() == n_threads
    with ThreadPoolExecutor(2) as pool:  # two Python threads at a time
        for call, results in enumerate([f.result() for f in [pool.submit(compute) for _ in range(8)]]):
            kept |= {f"pool{call}_{key}": value for key, value in results.items()}
    np.savez(sys.argv[1], **kept)
    import numba
    print(json.dumps({"after_first": after_first, "numba": numba.config.NUMBA_NUM_THREADS}))
"""


@pytest.fixture(scope="module")
def threads(tmp_path_factory):
    """What a process that has two threads says about itself, and its results: number of the call -> name -> array."""
    path = tmp_path_factory.mktemp("threads") / "results.npz"
    environment = os.environ | {"NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(THREADS), str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    calls = {}
    with np.load(path) as arrays:
        for key in arrays:
            call, name = key.split("_")
            calls.setdefault(call, {})[name] = torch.from_numpy(arrays[key])
    return json.loads(run.stdout), calls


def test_the_first_parallel_call_leaves_torchs_number_of_threads_alone(threads):
    assert threads[0] == {"after_first": 1, "numba": 2}


def test_the_number_of_threads_changes_no_result(threads):
    _, calls = threads
    for key, alone in calls["call0"].items():
        assert torch.equal(alone, calls["call1"][key]), key
        assert torch.equal(calls["call2"][key], calls["call3"][key]), key
        assert_close(calls["call2"][key], alone, **FLOAT32, msg=lambda m, key=key: f"{key}: {m}")
        assert not key.startswith("mixture") or torch.equal(calls["call2"][key], alone), key


def test_two_python_threads_do_not_disturb_each_other(threads):
    _, calls = threads
    for call in range(8):
        for key, alone in calls["call0"].items():
            assert_close(calls[f"pool{call}"][key], alone, **FLOAT32, msg=lambda m, key=key: f"{key}: {m}")
