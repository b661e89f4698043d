"""The Triton kernels against the float64 formula: on a CUDA device, or anywhere with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import _mixture
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.nn.functional import softplus

from scvi_ext.functional.counts import log_nb_positive, log_poisson, log_zinb_positive

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = [
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device, or TRITON_INTERPRET=1"
    ),
    # The interpreter is NumPy, which remarks on what a tl.where leaves out and on the NaN that are asked for.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DEVICE = "cpu" if INTERPRETED else "cuda"
NAMES = ("ll", "d_logits", "d_library", "d_theta", "d_dropout")

# float32 against float64, of the largest value: about 2e-7 was seen; exp on a device rounds its argument, up to 15.
OF_LARGEST = 3e-6

# Entry by entry over the extreme grid. ARGUMENT: mu = exp(log mu) is known to this, relatively, and theta too, since
# the argument of exp, up to 14, is rounded. PER_UNIT: of 1 + the value; phi(u) loses up to 8 of 6e-8 where |u| is
# about 0.4, and the terms of a derivative by log theta are of order 1 where their sum is small.
ARGUMENT = 3e-6
PER_UNIT = 3e-6

# A gradient has the 8 bits of bfloat16: a device rounds to 2^-9, the interpreter cuts off up to 2^-7.
BFLOAT16 = {"rtol": 2.0**-7, "atol": 3e-4}  # the sums it is made of are float32, of values up to 100

FLOAT32 = torch.float32


@pytest.fixture(scope="module")
def cuda():
    from scvi_ext.kernels import cuda

    return cuda


def draw(kind: str, n_genes: int, softmax: bool = True, per_cell: bool = False, n_cells: int = 3, n_samples: int = 1):
    """Inputs of a likelihood in its order, with counts of zero, small, large and fractional."""
    n, g = n_cells * n_samples, torch.Generator().manual_seed(n_genes + 7 * n_samples)
    x = torch.poisson(2 * torch.rand(n_cells, n_genes, generator=g), generator=g)
    x[:, ::5] *= 31
    x[:, 3::11] += 0.25
    logits = 2 * torch.randn(n, n_genes, generator=g)
    log_library = torch.randn(n, generator=g) + (float(np.log(2 * n_genes)) if softmax else 0.0)
    log_theta = 2 * torch.randn(*((n,) if per_cell else ()), n_genes, generator=g)
    dropout = 2 * torch.randn(n, n_genes, generator=g)
    return [
        x,
        softmax,
        logits,
        log_library,
        None if kind == "poisson" else log_theta,
        dropout if kind == "zinb" else None,
    ]


def oracle(kind: str, x, softmax, logits, log_library, log_theta, dropout, weight=1.0):
    """The same by functional.counts and autograd in float64; log_theta is taken per row."""
    n = logits.shape[0]
    if log_theta is not None:
        log_theta = log_theta.expand(n, -1)
    inputs = [
        None if t is None else t.detach().double().requires_grad_() for t in (logits, log_library, log_theta, dropout)
    ]
    logits, log_library, log_theta, dropout = inputs
    rate = log_library.exp()[:, None] * (torch.softmax(logits, 1) if softmax else softplus(logits))
    x = x.double().repeat(n // x.shape[0], 1)
    if kind == "poisson":
        ll = log_poisson(x, rate)
    elif kind == "nb":
        ll = log_nb_positive(x, rate, log_theta.exp())
    else:
        ll = log_zinb_positive(x, rate, log_theta.exp(), dropout)
    ll.sum().backward()
    return [ll.detach().sum(1), *(None if t is None else weight * t.grad for t in inputs)]


def run(cuda, kind: str, inputs: list, weight: float = 1.0) -> list:
    inputs = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in inputs]
    return [None if t is None else t.cpu() for t in cuda.LIKELIHOODS[kind](*inputs, weight)]


def assert_agree(found: list, expected: list, tolerance: float = OF_LARGEST) -> None:
    for name, f, e in zip(NAMES, found, expected, strict=True):
        assert (f is None) == (e is None), name
        if e is not None:
            atol = tolerance * max(1.0, float(e.abs().max()))
            torch.testing.assert_close(f.double(), e, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# ---- against the formula -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "softplus"])
@pytest.mark.parametrize(
    ("kind", "per_cell"), [("zinb", False), ("zinb", True), ("nb", False), ("nb", True), ("poisson", False)]
)
@pytest.mark.parametrize(("n_genes", "n_samples"), [(1, 1), (33, 3), (700, 1)])
def test_it_is_the_formula(cuda, kind, per_cell, softmax, n_genes, n_samples):
    inputs = draw(kind, n_genes, softmax, per_cell, n_samples=n_samples)
    found = run(cuda, kind, inputs, 0.7)
    assert all(f is None or f.dtype == FLOAT32 for f in found)
    assert_agree(found, oracle(kind, *inputs, 0.7))


@pytest.mark.parametrize("kind", ["zinb", "nb", "poisson"])
def test_a_row_may_be_longer_than_a_block(cuda, kind, monkeypatch):
    monkeypatch.setattr(cuda, "_MAX_BLOCK", 256)
    inputs = draw(kind, 700, n_cells=2)
    inputs[2][0, -1] = 12.0  # the largest logit comes last
    assert_agree(run(cuda, kind, inputs), oracle(kind, *inputs))


@pytest.mark.parametrize(("kind", "logit"), [("nb", None), ("zinb", -30.0), ("zinb", 1.0), ("poisson", None)])
def test_counts_rates_and_dispersions_may_be_extreme(cuda, kind, logit):
    x, log_mu, log_theta = torch.meshgrid(
        torch.tensor([0, 0.25, 1, 9, 57, 1e6]),
        torch.tensor([1e-8, 0.03, 1.0, 7.5, 1e3, 1e6]).log(),
        torch.tensor([1e-4, 0.02, 0.99, 9.0, 1e3, 1e6]).log(),
        indexing="ij",
    )
    x, log_mu, log_theta = x.reshape(-1, 1), log_mu.reshape(-1), log_theta.reshape(-1, 1)
    if kind == "poisson":
        x, log_mu, log_theta = x[::6], log_mu[::6], None
    dropout = None if logit is None else torch.full_like(x, logit)
    # The softmax of one gene is 1, so the rate is the library.
    inputs = [x, True, torch.zeros_like(x), log_mu, log_theta, dropout]
    found, expected = run(cuda, kind, inputs), oracle(kind, *inputs)
    ll, _, d, d_theta, _ = expected
    mu = log_mu.double().exp()
    shrink = 1.0 if log_theta is None else 1 / (1 + mu / log_theta[:, 0].double().exp())
    d_theta = torch.zeros_like(x) if d_theta is None else d_theta
    allowed = {
        "ll": PER_UNIT * (1 + ll.abs()) + ARGUMENT * (d.abs() + d_theta[:, 0].abs()),
        "d_logits": PER_UNIT * (1 + d.abs())[:, None],
        "d_library": PER_UNIT * (1 + d.abs()) + ARGUMENT * shrink * (x[:, 0] + mu),
        "d_theta": PER_UNIT * (1 + d_theta.abs()) + ARGUMENT * d[:, None].abs(),
        "d_dropout": torch.full_like(x, PER_UNIT).double() + ARGUMENT * d[:, None].abs(),
    }
    for name, f, e in zip(NAMES, found, expected, strict=True):
        if e is not None:
            excess = (f.double() - e).abs() / allowed[name]
            worst = int(excess.argmax())
            assert excess.max() <= 1, (name, x[worst], mu[worst], f.flatten()[worst], e.flatten()[worst])


def test_a_cell_without_counts_and_an_improbable_rate(cuda):
    inputs = draw("zinb", 33)
    inputs[0][:] = 0
    inputs[2][:, 0] = -200.0
    assert_agree(run(cuda, "zinb", inputs), oracle("zinb", *inputs))
    inputs[1] = False  # softplus(-200) is below float32, its relative derivative is 1
    assert all(torch.isfinite(t).all() for t in run(cuda, "zinb", inputs))


# ---- forms of the inputs -------------------------------------------------------------------------------------------


def test_rows_may_lie_apart(cuda):
    inputs = draw("zinb", 33, per_cell=True)
    expected = run(cuda, "zinb", inputs)
    wide = torch.cat([inputs[2], inputs[5], inputs[4]], 1).to(DEVICE)
    inputs[2], inputs[5], inputs[4] = wide.split(33, 1)
    inputs[0] = torch.cat([inputs[0], inputs[0]], 1).to(DEVICE)[:, :33]
    inputs[3] = torch.stack([inputs[3], inputs[3]], 1).to(DEVICE)[:, 0]
    for name, f, e in zip(NAMES, run(cuda, "zinb", inputs), expected, strict=True):
        assert torch.equal(f, e), name


def test_gradients_of_logits_and_dropout_are_halves_of_one_tensor(cuda):
    inputs = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in draw("zinb", 33)]
    _, d_logits, _, _, d_dropout = cuda.log_likelihood(*inputs, 1.0)
    assert d_logits.stride() == d_dropout.stride() == (66, 1)
    assert d_dropout.data_ptr() - d_logits.data_ptr() == 33 * 4


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "softplus"])
def test_bfloat16_is_read_exactly_and_rounds_the_gradients(cuda, softmax):
    inputs = draw("zinb", 33, softmax)
    inputs[2], inputs[5] = inputs[2].bfloat16(), inputs[5].bfloat16()
    found, expected = run(cuda, "zinb", inputs), oracle("zinb", *inputs)
    assert [t.dtype for t in found] == [FLOAT32, torch.bfloat16, FLOAT32, FLOAT32, torch.bfloat16]
    for i in (0, 2, 3):
        assert_agree([found[i]] * 5, [expected[i]] * 5)
    for i in (1, 4):
        torch.testing.assert_close(found[i].double(), expected[i], **BFLOAT16)


def test_the_weight_is_of_the_gradients_alone(cuda):
    inputs = draw("zinb", 33)
    one, quarter = run(cuda, "zinb", inputs), run(cuda, "zinb", inputs, -0.25)
    assert torch.equal(one[0], quarter[0])
    for a, b in zip(one[1:], quarter[1:], strict=True):
        assert torch.equal(-0.25 * a, b)  # a power of two rounds nothing


def test_it_is_deterministic(cuda):
    inputs = draw("zinb", 700)
    for a, b in zip(run(cuda, "zinb", inputs), run(cuda, "zinb", inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 2, 3, 4, 5], ids=["x", "logits", "log_library", "log_theta", "dropout"])
@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "softplus"])
def test_what_is_not_finite_is_nan_in_its_row(cuda, which, value, softmax):
    inputs = draw("zinb", 33, softmax, per_cell=True)
    inputs[which].view(3, -1)[1, -1] = value
    ll = run(cuda, "zinb", inputs)[0]
    assert torch.isnan(ll).tolist() == [False, True, False]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_captures_it(cuda):
    inputs = [t.cuda() if isinstance(t, torch.Tensor) else t for t in draw("zinb", 700)]
    expected = cuda.log_likelihood(*inputs, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cuda.log_likelihood(*inputs, 1.0)
    graph.replay()
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


# ---- proteins ------------------------------------------------------------------------------------------------------


def run_mixture(cuda, counts: tuple, parameters: dict, weight: float = 1.0) -> dict:
    """All that the kernel makes, of rows; theta may be shared."""
    inputs = [t.to(DEVICE) for t in (*counts, *parameters.values())]
    made = (t.cpu() for t in cuda.nb_mixture(*inputs, weight))
    return dict(zip(("log_p", *_mixture.NAMES), made, strict=True))


def mixture_oracle(counts: tuple, parameters: dict) -> dict:
    """The formula in float64; log_theta is taken per row."""
    expanded = parameters | {"log_theta": parameters["log_theta"].expand_as(parameters["mixing"])}
    return _mixture.by_formula(counts, expanded)


@pytest.mark.parametrize("theta", ["protein", "cell"])
@pytest.mark.parametrize(("n_cells", "n_proteins"), [(1, 1), (5, 33), (3, 300)])
def test_a_mixture_is_the_formula(cuda, n_cells, n_proteins, theta):
    counts, parameters = _mixture.draw(n_cells, n_proteins, theta)
    found, expected = run_mixture(cuda, counts, parameters), mixture_oracle(counts, parameters)
    for key, e in expected.items():
        assert (found[key].dtype, found[key].shape) == (FLOAT32, e.shape), key
        atol = OF_LARGEST * max(1.0, float(e.abs().max()))
        torch.testing.assert_close(found[key].double(), e, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    quarter = run_mixture(cuda, counts, parameters, -0.25)
    assert torch.equal(quarter["log_p"], found["log_p"])
    for key in _mixture.NAMES:
        assert torch.equal(quarter[key], -0.25 * found[key]), key


def test_there_may_be_more_proteins_than_fit_in_a_block(cuda, monkeypatch):
    counts, parameters = _mixture.draw(3, 300)
    expected = run_mixture(cuda, counts, parameters)
    monkeypatch.setattr(cuda, "_MAX_BLOCK", 256)  # a quarter of it holds proteins
    for key, found in run_mixture(cuda, counts, parameters).items():
        torch.testing.assert_close(found, expected[key], rtol=1e-6, atol=1e-6)


def test_counts_means_and_mixing_of_proteins_may_be_extreme(cuda):
    """Each gradient within its own rounding, and within that of the odds of background, which weigh both components."""
    (y, measured), parameters = _mixture.grid()
    wide = {key: t.reshape(-1, 150) for key, t in parameters.items()}  # few cells: the interpreter takes its time
    found = run_mixture(cuda, (y.reshape(-1, 150), measured.reshape(-1, 150)), wide)
    expected = mixture_oracle((y, measured), parameters)

    def component(log_mean: torch.Tensor) -> dict:
        alone = parameters | {"log_background": log_mean, "log_ratio": torch.zeros_like(log_mean)}
        return {key: t.reshape(-1) for key, t in mixture_oracle((y, measured), alone).items()}

    log_fore = parameters["log_background"] + parameters["log_ratio"]
    back, fore = component(parameters["log_background"]), component(log_fore)
    # What log-probabilities are known to, and so the odds; a weight between 0 and 1 changes by a quarter of that.
    known = sum(
        PER_UNIT * (1 + c["log_p"].abs()) + ARGUMENT * (c["log_background"].abs() + c["log_theta"].abs())
        for c in (back, fore)
    )
    shift = known.clamp(max=1.0) / 4
    mean, theta = (torch.exp(t.double()).reshape(-1) for t in (log_fore, parameters["log_theta"]))
    rounded = ARGUMENT * (y.reshape(-1) + mean) / (1 + mean / theta)  # of the terms of a derivative by a log mean
    apart = {key: (fore[key] - back[key]).abs() for key in ("log_background", "log_theta")}
    allowed = {
        "log_background": rounded + shift * apart["log_background"],
        "log_ratio": rounded + shift * fore["log_background"].abs(),
        "log_theta": rounded + shift * apart["log_theta"],
        "mixing": shift,
    }
    for key, tolerance in allowed.items():
        f, e = found[key].reshape(-1).double(), expected[key].reshape(-1)
        assert f.isfinite().all(), key
        excess = (f - e).abs() / (tolerance + PER_UNIT * (1 + e.abs()))
        worst = int(excess.argmax())
        at = {k: float(v[worst]) for k, v in {"y": y, **parameters}.items()}
        assert excess[worst] <= 1, (key, float(f[worst]), float(e[worst]), float(excess[worst]), at)

    some = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:60]
    few = run_mixture(cuda, (y[some], measured[some]), {key: t[some] for key, t in parameters.items()})
    assert ((few["log_p"].double() - expected["log_p"][some]).abs() <= known[some]).all()


def test_unmeasured_proteins_are_not_read(cuda):
    (y, measured), parameters = _mixture.draw(theta="cell")
    expected = run_mixture(cuda, (y, measured), parameters)
    poisoned = {key: torch.where(measured, t, torch.nan) for key, t in parameters.items()}
    found = run_mixture(cuda, (torch.where(measured, y, -1.0), measured), poisoned)
    for key, e in expected.items():
        assert torch.equal(found[key], e), key
    assert all((expected[key][~measured] == 0).all() for key in _mixture.NAMES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["y", *_mixture.NAMES])
def test_what_is_not_finite_of_a_protein_is_nan_in_its_row(cuda, key, value):
    (y, measured), parameters = _mixture.draw(theta="cell")
    measured[1, -1] = True
    {"y": y, **parameters}[key][1, -1] = value
    assert run_mixture(cuda, (y, measured), parameters)["log_p"].isnan().tolist() == [i == 1 for i in range(5)]


def test_a_negative_count_of_a_protein_is_nan_in_its_row(cuda):
    (y, measured), parameters = _mixture.draw()
    y[1, -1], measured[1, -1] = -1.0, True
    assert run_mixture(cuda, (y, measured), parameters)["log_p"].isnan().tolist() == [i == 1 for i in range(5)]


def test_finite_parameters_of_proteins_give_finite_numbers(cuda):
    counts, parameters = _mixture.draw(theta="cell")
    for key in parameters:
        for value in (-1e3, 1e3):
            extreme = parameters | {key: torch.full_like(parameters[key], value)}
            for made in run_mixture(cuda, counts, extreme).values():
                assert made.isfinite().all(), (key, value)


def test_rows_of_proteins_may_lie_apart(cuda):
    (y, measured), parameters = _mixture.draw(theta="cell")
    expected = run_mixture(cuda, (y, measured), parameters)
    wide = torch.cat(list(parameters.values()), 1).to(DEVICE)
    apart = dict(zip(parameters, wide.split(y.shape[1], 1), strict=True))
    twice = (torch.cat([t, t], 1).to(DEVICE)[:, : y.shape[1]] for t in (y, measured))
    for key, found in run_mixture(cuda, tuple(twice), apart).items():
        assert torch.equal(found, expected[key]), key


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_captures_a_mixture(cuda):
    counts, parameters = _mixture.draw(64, 100)
    inputs = [t.cuda() for t in (*counts, *parameters.values())]
    expected = cuda.nb_mixture(*inputs, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cuda.nb_mixture(*inputs, 1.0)
    graph.replay()
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


# ---- gathering -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_genes", [1, 33, 1300])
def test_gathered_rows_are_scipys(cuda, n_genes):
    matrix = sp.random(9, n_genes, 0.4, "csr", np.float32, random_state=np.random.default_rng(1))
    matrix = sp.vstack(
        [matrix, sp.csr_matrix((1, n_genes), dtype=np.float32), np.ones((1, n_genes), np.float32)], "csr"
    )
    rows = np.array([10, 3, 9, 3, 0])  # full, twice the same, empty
    x = torch.full((len(rows), n_genes + 2), -1.0, device=DEVICE)
    csr = (torch.from_numpy(a).to(DEVICE) for a in (matrix.indptr.astype(np.int64), matrix.indices, matrix.data))
    cuda.gather_rows(*csr, torch.from_numpy(rows).to(DEVICE), x[:, :n_genes])
    np.testing.assert_array_equal(x[:, :n_genes].cpu().numpy(), matrix[rows].toarray())
    assert (x[:, n_genes:] == -1).all()  # nothing beside it is touched
