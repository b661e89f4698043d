from __future__ import annotations

import json
import math
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest

import scvi_ext as sx
from scvi_ext._errors import ScviExtWarning
from scvi_ext.engine.plan import PLANS, Plan, make_plan
from scvi_ext.kernels.adam import Adam


def plan(name="auto", n_cells=2000, **options):
    defaults = {"batch_size": None, "max_epochs": None, "lr": None, "kl_warmup": None, "weight_decay": None}
    defaults |= {"peak_lr": 0.02, "effort": 7.0}
    n_train = options.pop("n_train", math.ceil(0.9 * n_cells))
    return make_plan(name, n_cells=n_cells, n_train=n_train, **defaults | options)


def lr_curve(p):
    return np.array([p.lr_at(step) for step in range(p.n_steps)])


def kl_curve(p):
    return np.array([p.kl_weight_at(step) for step in range(p.n_steps)])


@pytest.mark.parametrize("n_cells", [100, 1000, 30_000])
def test_one_cycle_rises_to_its_peak_and_falls_to_almost_nothing(n_cells):
    p = plan(n_cells=n_cells, lr=0.01)
    lr = lr_curve(p)
    top = int(lr.argmax())
    assert (np.diff(lr[: top + 1]) > 0).all()
    assert (np.diff(lr[top:]) < 0).all()
    assert 0 < lr[0] < 0.5 * p.lr
    assert lr[top] == pytest.approx(0.01, rel=0.01)  # the peak may lie between two steps
    assert 0 < lr[-1] < 0.01 * p.lr


def test_one_cycle_has_one_shape_whatever_its_length():
    short, long = plan(max_epochs=10), plan(max_epochs=1000)
    shares = np.arange(short.n_steps) / short.n_steps
    stretched = [long.lr_at(round(share * long.n_steps)) for share in shares]
    np.testing.assert_allclose(lr_curve(short), stretched, rtol=1e-9)  # the same formula at the same share


@pytest.mark.parametrize("n_cells", [100, 1000, 10_000, 100_000, 1_000_000])
def test_kl_weight_of_auto_rises_from_zero_to_one_at_any_size(n_cells):
    p = plan(n_cells=n_cells)
    weights = kl_curve(p)
    assert weights[0] == 0
    assert (np.diff(weights) >= 0).all()
    assert weights[-1] == p.final_kl_weight == 1
    assert 0 < p.kl_warmup_steps < p.n_steps


@pytest.mark.parametrize(("n_cells", "epochs"), [(100, 400), (20_000, 400), (20_001, 400), (100_000, 80), (10**8, 1)])
def test_scvi_tools_schedule_has_the_numbers_of_the_reference(n_cells, epochs):
    p = plan("scvi-tools", n_cells)
    assert p.n_epochs == min(400, max(1, round(2e4 / n_cells * 400))) == epochs
    assert p.batch_size == min(128, math.ceil(0.9 * n_cells))
    assert {p.lr_at(0), p.lr_at(p.n_steps // 2), p.lr_at(p.n_steps - 1)} == {1e-3}
    assert p.weight_decay == 1e-6
    assert p.patience == 45
    for epoch in {0, 1, epochs // 2, epochs - 1}:
        first = epoch * p.steps_per_epoch
        assert p.kl_weight_at(first) == p.kl_weight_at(first + p.steps_per_epoch - 1)  # constant within an epoch
        assert p.kl_weight_at(first) == pytest.approx(epoch / 400, abs=1e-12)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kl_warmup", [0, 0.25, 1])
def test_kl_warmup_is_a_share_of_the_steps_and_ends_at_one(name, kl_warmup):
    p = plan(name, kl_warmup=kl_warmup, max_epochs=20)
    weights = kl_curve(p)
    assert weights[-1] == 1
    assert weights[0] == (1 if kl_warmup == 0 else 0)
    # the first step of full weight; a warm-up of all steps ends one step early
    assert abs(int((weights < 1).sum()) - kl_warmup * p.n_steps) <= 1


def test_steps_grow_with_the_root_of_the_cells_and_passes_stay_in_bounds():
    epochs = {n: plan(n_cells=n, n_train=n, batch_size=100).n_epochs for n in (100, 10_000, 40_000, 10**6)}
    assert epochs == {100: 40, 10_000: 7, 40_000: 4, 10**6: 4}  # 7 sqrt(n) steps of 100 cells, 4 to 40 passes


def test_a_model_may_go_over_few_cells_more_often():
    sizes = {n: plan(n_cells=n, n_train=n, batch_size=100, most_epochs=100).n_epochs for n in (100, 1000, 10_000)}
    assert sizes == {100: 70, 1000: 23, 10_000: 7}  # 7 sqrt(n) steps of 100 cells


@pytest.mark.parametrize("effort", [7.0, 16.0])
def test_many_cells_are_taken_256_at_a_time_in_as_many_passes_at_a_rate_that_fits(effort):
    few, many = (plan(n_cells=10**5, n_train=n, effort=effort) for n in (14_999, 15_000))
    assert (few.batch_size, few.lr) == (128, 0.02)
    assert (many.batch_size, many.steps_per_epoch) == (256, math.ceil(15_000 / 256))
    assert many.lr == pytest.approx(0.02 * math.sqrt(2))
    asked = plan(n_cells=10**5, n_train=15_000, batch_size=128, effort=effort)
    assert (asked.n_epochs, asked.batch_size, asked.lr) == (many.n_epochs, 128, 0.02)
    assert plan(n_train=15_000, lr=0.01).lr == 0.01
    assert plan("scvi-tools", n_train=15_000).batch_size == 128


@pytest.mark.parametrize("model", ["scvi", "ldvae", "totalvi"])
def test_the_plan_is_that_of_the_model(model, registered):
    spec = sx.models.get(model)
    registered.obsm["proteins"] = np.random.default_rng(0).poisson(5.0, (registered.n_obs, 3))
    sx.pp.setup_anndata(registered, batch_key="batch", protein_obsm_key="proteins")
    sx.tl.fit(registered, model=model, batch_size=20, n_latent=2, progress=False)
    found = registered.uns["scvi_ext"]["fits"][model]["run"]["plan"]
    pace = {"peak_lr": spec.peak_lr, "effort": spec.effort, "most_epochs": spec.most_epochs}
    expected = plan(n_cells=registered.n_obs, batch_size=20, **pace)
    assert (found["n_epochs"], found["lr"]) == (expected.n_epochs, expected.lr)


@pytest.mark.parametrize(("name", "beta2"), [("auto", 0.97), ("scvi-tools", 0.999)])
def test_adam_forgets_as_the_plan_says(name, beta2, registered, monkeypatch):
    seen = set()
    step = Adam.step

    def watched(self):
        seen.add(self.param_groups[0]["betas"])
        step(self)

    monkeypatch.setattr(Adam, "step", watched)
    sx.tl.fit(registered, plan=name, max_epochs=1, kl_warmup=0, n_hidden=8)
    assert seen == {(0.9, beta2)}


def test_a_plan_that_was_saved_before_it_had_a_beta2_goes_on_with_that_of_adam():
    saved = asdict(plan())
    del saved["beta2"]
    assert Plan(**saved).beta2 == 0.999


@pytest.mark.parametrize("name", PLANS)
def test_arguments_override_the_plan(name):
    p = plan(name, batch_size=50, max_epochs=7, lr=0.5, weight_decay=0, n_train=101)
    assert (p.n_epochs, p.batch_size, p.steps_per_epoch, p.n_steps) == (7, 50, 3, 21)
    assert (p.lr, p.weight_decay) == (0.5, 0)


@pytest.mark.parametrize("number", [np.float32(0.25), Fraction(1, 4)])
def test_numbers_of_any_kind_are_kept_as_plain_ones(number):
    p = plan(lr=number, weight_decay=number, kl_warmup=number)
    assert (p.lr, p.weight_decay) == (0.25, 0.25)
    assert json.loads(json.dumps(asdict(p))) == asdict(p)


def test_a_batch_is_never_larger_than_the_training_cells():
    p = plan(n_cells=10, n_train=9)
    assert (p.batch_size, p.steps_per_epoch) == (9, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fast"}, r"plan='fast' is not one of 'auto', 'scvi-tools'\."),
        ({"batch_size": 2}, r"batch_size=2 must be 3 or more: batch normalisation"),
        ({"max_epochs": 0}, r"max_epochs=0 must be 1 or more\."),
        ({"max_epochs": -1}, r"max_epochs=-1 must be 1 or more\."),
        ({"lr": 0}, r"lr=0 must be positive and finite"),
        ({"lr": math.inf}, r"lr=inf must be positive and finite"),
        ({"lr": math.nan}, r"lr=nan must be positive and finite"),
        ({"kl_warmup": 1.5}, r"kl_warmup=1.5 must be a share of the steps, from 0 to 1\."),
        ({"kl_warmup": -0.1}, r"kl_warmup=-0.1 must be a share of the steps"),
        ({"weight_decay": -1}, r"weight_decay=-1 must be 0 or more, and finite"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_a_final_kl_weight_below_one_is_said_aloud(registered):
    with pytest.warns(ScviExtWarning, match=r"KL weight ends at 0\.005, not 1.*plan='auto', or give kl_warmup"):
        sx.tl.fit(registered, plan="scvi-tools", max_epochs=3, n_hidden=8)
    history = sx.get.history(registered)
    np.testing.assert_allclose(history["kl_weight"], np.arange(3) / 400, rtol=1e-12)
    np.testing.assert_array_equal(history["lr"], 1e-3)
    assert sx.get.fits(registered)["epochs"].tolist() == [3]
