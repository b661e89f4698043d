"""Processes that share a minibatch, each with its part of the cells: what one process with all of them would do.

Two real processes take a step of every model, each with half of the cells; here the whole of them takes the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from _tolerances import FLOAT64, MODULE_WITH_KERNEL, N_STANDARD_ERRORS
from models._small import SUMMARY, build, make_cells, noise, streams, take
from torch import Tensor, nn
from torch.testing import assert_close

from scvi_ext import models
from scvi_ext._contract import DataSummary, JointSummary, Minibatch
from scvi_ext.functional import ranks
from scvi_ext.functional.ranks import Ranks, training_as
from scvi_ext.kernels.sparse import SparseRows
from scvi_ext.nn.layers import BatchNorm1d, Dropout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scvi_ext._contract import Loss

N = 2
B = 24  # cells of all processes
KL_WEIGHT = 0.3

# ---- a step of every model -----------------------------------------------------------------------------------------

# Data sets of 8 and 3 genes out of 9, each with batches of its own.
GENES = ((3, 0, 5, 1, 7, 2, 4, 6), (5, 8, 1))
BATCHES = ((0, 1), (2,))
JOINT = DataSummary(9, n_batch=3, joint=JointSummary(GENES, 9, ((1.0, 1.3, 1.6),) * 2, ((0.2, 0.3, 0.4),) * 2))
SMALL_JOINT = {
    "n_latent": 3,
    "dim_hidden_encoder": 8,
    "dim_hidden_decoder_shared": 5,
    "reconstruction_losses": ("zinb", "nb"),
    "model_library_bools": (True, False),
}


@dataclass(frozen=True)
class Case:
    """A model with options, in float64 and with counts as a tensor, or as they are in training on a processor."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    frozen: str | None = None  # a model inside
    as_trained: bool = False


DEEP = {"n_layers": 2, "dropout_rate": 0.3, "encode_covariates": True}
CASES = {
    "scvi": Case("scvi", DEEP | {"library": "latent", "dispersion": "gene-batch"}),
    "scvi-float32": Case("scvi", DEEP | {"library": "latent"}, as_trained=True),
    "scvi-ln": Case("scvi", {"latent_distribution": "ln", "use_layer_norm": "both", "dispersion": "gene-label"}),
    "scvi-mixing": Case("scvi", {"adversarial_mixing": 3.0}),
    "ldvae": Case("ldvae", {"dispersion": "gene-cell", "dropout_rate": 0.3}),
    "vaec": Case("vaec", DEEP),
    "vaec-float32": Case("vaec", DEEP, as_trained=True),
    "scanvi": Case("scanvi", {"n_layers": 2, "dropout_rate": 0.3, "dispersion": "gene-label"}),
    "scanvi-groups": Case("scanvi", {"labels_groups": ("a", "b", "a", "b"), "training": "alternate"}),
    "autozi": Case("autozi", DEEP | {"library": "latent"}),
    "autozi-batch": Case("autozi", {"zero_inflation": "gene-batch", "alpha_prior": None, "beta_prior": None}),
    "totalvi": Case("totalvi", {"adversarial_classifier": "on", "library": "latent", "encode_covariates": True}),
    "totalvi-float32": Case("totalvi", {"protein_efficiency": True}, as_trained=True),
    "classifier": Case("classifier", {"n_layers": 2, "dropout_rate": 0.3}),
    "classifier-frozen": Case("classifier", {"classifies": "z_library"}, frozen="scvi"),
    "gimvi": Case("gimvi", {"n_layers_decoder_individual": 1, "dim_hidden_decoder_individual": 6}),
    "gimvi-separate": Case("gimvi", {"fool_step": "separate", "dispersion": "gene-cell", "kappa_fades": True}),
}


def module_of(case: Case) -> nn.Module:
    if case.model == "gimvi":
        spec = models.get(case.model)
        torch.manual_seed(0)
        return models.build(spec, spec.config(**SMALL_JOINT | case.options), JOINT).double()
    if case.model == "classifier":
        frozen = None if case.frozen is None else build(case.frozen, library="latent")
        torch.manual_seed(0)
        return models.CellClassifier(SUMMARY.n_input, 4, frozen=frozen, **case.options).double()
    module = build(case.model, **case.options)
    return module.float() if case.as_trained else module


def cells_of(case: Case) -> list[Minibatch]:
    """A minibatch for each stream; of a model that learns labels, the first has cells without."""
    if case.model == "gimvi":
        generator = torch.Generator().manual_seed(0)
        means = [4 * torch.rand(B, len(genes), generator=generator, dtype=torch.float64) for genes in GENES]
        return [
            Minibatch(torch.poisson(mean, generator=generator), torch.tensor(batches)[torch.arange(B) % len(batches)])
            for mean, batches in zip(means, BATCHES, strict=True)
        ]
    minibatches = streams(case.model, make_cells(n_cells=B))
    if len(minibatches) > 1:
        cells = minibatches[0]
        unlabelled = torch.arange(B) % 5 < 2
        minibatches[0] = cells._replace(labels=torch.where(unlabelled, -1, cells.labels))
        minibatches[1] = make_cells(n_cells=B, seed=5)
    return minibatches


def as_trained(cells: Minibatch) -> Minibatch:
    single = (v.float() if v is not None and v.is_floating_point() else v for v in cells)
    cells = Minibatch(*single)
    return cells._replace(x=SparseRows.from_dense(cells.x))


def losses_of(module: nn.Module, cells: list[Minibatch]) -> Iterable[Tensor | Loss]:
    if isinstance(module, models.JVAE):
        return module.losses(*cells, kl_weight=KL_WEIGHT)
    return (module.loss(*cells, kl_weight=KL_WEIGHT),)


def step(case: Case) -> dict[str, dict[str, Tensor]]:
    """Losses, their gradients, parts by cell, buffers and generator of this process, with its cells of all."""
    module, of_all = module_of(case).train(), cells_of(case)
    own = slice(ranks.current().rank * B // ranks.current().n, (ranks.current().rank + 1) * B // ranks.current().n)
    cells = [take(minibatch, own) for minibatch in of_all]
    cells = [as_trained(minibatch) for minibatch in cells] if case.as_trained else cells
    torch.manual_seed(7)
    totals, gradients = {}, {}
    for i, loss in enumerate(losses_of(module, cells)):
        module.zero_grad()
        totals[str(i)] = getattr(loss, "total", loss)
        totals[str(i)].backward()
        named = {f"{i} {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
        gradients |= {name: gradient.clone() for name, gradient in named.items()}
    lead = (len(cells), -1) if case.model == "gimvi" else (-1,)  # cells of data sets come one below the other
    parts = {
        name: value.reshape(lead) for name, value in loss._asdict().items() if name != "total" and value is not None
    }
    found = {
        "totals": totals,
        "gradients": gradients,
        "parts": parts,
        "buffers": dict(module.named_buffers()),
        "generator": {"state": torch.get_rng_state()},
    }
    return {kind: {name: v.detach() for name, v in values.items()} for kind, values in found.items()}


# ---- two processes -------------------------------------------------------------------------------------------------


def one_of_them(rank: int, folder: Path) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=N, timeout=timedelta(seconds=120)
    )
    with training_as(Ranks(rank, N)):
        found = {name: step(case) for name, case in CASES.items()}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> list[dict[str, dict[str, dict[str, Tensor]]]]:
    """Of each process what it found in every case."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(N)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * N, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(N)]


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, dict[str, Tensor]]]:
    """What one process with all cells finds."""
    return {name: step(case) for name, case in CASES.items()}


def mean_of(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    assert all(found[0].keys() == others.keys() for others in found)
    return {name: torch.stack([of_one[name] for of_one in found]).mean(0) for name in found[0]}


cases = pytest.mark.parametrize("name", CASES)


def assert_same(name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In float64 to its roundings; in float32 to those of the largest of them."""
    assert found.keys() == expected.keys()
    tolerance, largest = FLOAT64, 1.0
    if CASES[name].as_trained:
        tolerance, largest = MODULE_WITH_KERNEL, max(float(v.abs().max()) for v in expected.values())
    for key, value in expected.items():
        assert_close(found[key] / largest, value / largest, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@cases
def test_gradients_averaged_over_processes_are_those_of_one(name, halves, whole):
    found = [of_one[name] for of_one in halves]
    assert_same(name, mean_of([of_one["totals"] for of_one in found]), whole[name]["totals"])
    assert_same(name, mean_of([of_one["gradients"] for of_one in found]), whole[name]["gradients"])
    assert any((gradient != 0).any() for gradient in whole[name]["gradients"].values())


@cases
def test_each_process_says_of_its_cells_what_one_says_of_them(name, halves, whole):
    parts = [of_one[name]["parts"] for of_one in halves]
    together = {part: torch.cat([of_one[part] for of_one in parts], dim=-1) for part in parts[0]}
    assert_same(name, together, whole[name]["parts"])


@cases
def test_running_statistics_are_those_of_one(name, halves, whole):
    first, second = (of_one[name]["buffers"] for of_one in halves)
    assert all(torch.equal(first[key], second[key]) for key in first)  # to the bit, or processes would drift apart
    floating = {key: value for key, value in whole[name]["buffers"].items() if value.is_floating_point()}
    assert_same(name, {key: first[key] for key in floating}, floating)
    counted = {key: value for key, value in whole[name]["buffers"].items() if key.endswith("num_batches_tracked")}
    assert all(torch.equal(first[key], value) for key, value in counted.items())


@cases
def test_generators_of_all_processes_are_in_the_state_of_one(name, halves, whole):
    for of_one in halves:
        assert torch.equal(of_one[name]["generator"]["state"], whole[name]["generator"]["state"])


# ---- draws ---------------------------------------------------------------------------------------------------------


def of_each(draw, n: int) -> list[Tensor]:
    """What each of ``n`` processes draws; their generators are in the same state before and after."""
    found, states = [], []
    for rank in range(n):
        torch.manual_seed(3)
        with training_as(Ranks(rank, n)):
            found.append(draw())
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (5, 1), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_process_draws_for_all_cells_and_keeps_its_own(n, shape, dtype):
    *lead, n_cells, n_columns = shape
    of_all = torch.ones(*lead, n * n_cells, n_columns, dtype=dtype)
    own = of_all[..., :n_cells, :]
    for draw in (ranks.normal_like, lambda x: ranks.dropout(x, 0.3)):
        found = torch.cat(of_each(lambda draw=draw: draw(own), n), dim=-2)
        torch.manual_seed(3)
        assert torch.equal(found, draw(of_all))
        assert found.dtype == dtype


@pytest.mark.parametrize("n", [1, 2])
def test_dropout_is_what_it_says_of_each_process(n):
    x, p = torch.randn(400, 50, requires_grad=True), 0.3
    for found in of_each(lambda: Dropout(p)(x), n):
        dropped = found == 0
        error = (dropped.float().mean() - p).abs()
        assert error < N_STANDARD_ERRORS * (p * (1 - p) / x.numel()) ** 0.5
        assert_close(found[~dropped], x[~dropped] / (1 - p))
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert_close(gradient, (~dropped).float() / (1 - p))


def test_nothing_is_dropped_outside_of_training():
    x = torch.randn(6, 7)
    assert Dropout(0.3).eval()(x) is x


# ---- alone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_normalisation_of_a_process_that_is_alone_is_that_of_torch(training):
    torch.manual_seed(0)
    leaf = torch.randn(6, 7)
    found = []
    ours, torchs = BatchNorm1d(7, momentum=0.01, eps=0.001), nn.BatchNorm1d(7, momentum=0.01, eps=0.001)
    for layer in (ours.train(training), torchs.train(training)):
        x = leaf.clone().requires_grad_()
        torch.manual_seed(1)
        y = layer(x)
        (y * leaf).sum().backward()
        found.append([y, x.grad, *layer.state_dict().values(), torch.get_rng_state()])
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(6,), (6, 7), (2, 6, 7)], ids=str)
def test_normal_draws_of_a_process_that_is_alone_are_those_of_torch(shape):
    for x in (torch.empty(shape), torch.empty(shape).t() if len(shape) == 2 else torch.empty(shape).double()):
        found = []
        for draw in (ranks.normal_like, torch.randn_like):
            torch.manual_seed(1)
            found.append([draw(x), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mean_over_one_process_is_what_it_was_given():
    x = torch.randn(3)
    assert ranks.mean(x) is x


# ---- who is who ----------------------------------------------------------------------------------------------------


def test_a_process_is_alone_but_inside():
    assert ranks.current() == Ranks(0, 1)
    with training_as(Ranks(1, 3)):
        with training_as(Ranks(0, 2)):
            assert ranks.current() == Ranks(0, 2)
        assert ranks.current() == Ranks(1, 3)
        with pytest.raises(KeyError), training_as(Ranks(2, 3)):
            raise KeyError
        assert ranks.current() == Ranks(1, 3)
    assert ranks.current() == Ranks(0, 1)


@pytest.mark.parametrize(("rank", "n"), [(2, 2), (-1, 2), (0, 0)])
def test_processes_count_from_0(rank, n):
    with pytest.raises(ValueError, match=f"rank={rank} is none of n={n} processes: they count from 0"):
        Ranks(rank, n)


def test_what_is_evaluated_waits_for_nobody():
    """A process may ask for the loss of cells of its own: without a group of processes this would fail otherwise."""
    module, cells = build("scvi").eval(), make_cells(n_cells=B)
    draws = noise(module, B)
    expected = module.loss(cells, noise=draws)
    with training_as(Ranks(1, 2)):
        assert torch.equal(module.loss(cells, noise=draws).total, expected.total)


if __name__ == "__main__":
    one_of_them(int(sys.argv[1]), Path(sys.argv[2]))
