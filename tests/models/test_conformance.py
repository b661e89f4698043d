"""What every model owes the engine and the read-outs, for every value of its options."""

from __future__ import annotations

import ast
import inspect
from dataclasses import FrozenInstanceError, asdict, fields, replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from _small import (
    BARE,
    GENERATIVE,
    N_CELLS,
    SMALL,
    SUMMARY,
    all_measured,
    build,
    given,
    label,
    make_cells,
    named,
    noise,
    offering,
    streams,
    take,
    values,
    variants,
)
from _tolerances import FLOAT64
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close

import scvi_ext
from scvi_ext import models
from scvi_ext._contract import (
    Capability,
    DataSummary,
    Expression,
    Loss,
    Minibatch,
    ModelSpec,
    Posterior,
    ProteinSummary,
    SavedFit,
)

PACKAGE = Path(scvi_ext.__file__).parent
ALL = pytest.mark.parametrize("name", models.names())
MODELS = pytest.mark.parametrize("name", GENERATIVE)
VARIANTS = pytest.mark.parametrize(("name", "options"), variants(), ids=label)
ALL_CROSSED = pytest.mark.parametrize(("name", "options"), variants("latent_distribution"), ids=label)


def needs(name: str, column: str) -> bool:
    spec = models.get(name)
    return column in spec.needs(spec.config())


# ---- the folder is the registry ----------------------------------------------------------------------------------


def test_names_are_the_files():
    files = {path.stem for path in (PACKAGE / "models").glob("*.py")}
    assert models.names() == sorted(files - {"__init__", "base"})


def test_no_other_list_of_models():
    """Outside the folder nobody lists the models or asks which one it is."""
    names = set(models.names())
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "models":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Compare):
                listed = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value in names}
                limit = 0 if isinstance(node, ast.Compare) else 1
                assert len(listed) <= limit, f"{path.name}, line {node.lineno}: {listed}"


@ALL
def test_spec(name):
    spec = models.get(name)
    assert isinstance(spec, ModelSpec)
    assert spec.name == name
    assert issubclass(spec.module, nn.Module)
    assert spec.module.__module__ == f"scvi_ext.models.{name}"
    assert getattr(models, spec.module.__name__) is spec.module
    assert spec.reference
    with pytest.raises(FrozenInstanceError):
        spec.config().n_hidden = 3


@MODELS
def test_one_level_of_inheritance(name):
    module = models.get(name).module
    assert not inspect.isabstract(module)
    assert not module.__subclasses__()
    (base,) = module.__bases__
    assert inspect.isabstract(base)
    with pytest.raises(TypeError, match="abstract"):
        base(5)


@MODELS
def test_config_is_what_the_constructor_takes(name):
    spec = models.get(name)
    accepted, passed_on = {}, True
    for cls in spec.module.__mro__:
        if passed_on:  # what a class does not name goes to the next one, if it takes any keyword
            parameters = inspect.signature(cls.__init__).parameters
            accepted = dict(parameters) | accepted
            passed_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = {k: p for k, p in accepted.items() if p.kind is not p.VAR_KEYWORD and k != "self"}
    shape = [k for k, p in accepted.items() if p.default is p.empty]
    sizes = {f.name for f in fields(DataSummary)} - {"n_input", "proteins", "joint"}
    if Capability.ZERO_INFLATION not in spec.capabilities:
        sizes -= {"n_train"}
    if needs(name, "protein"):
        sizes |= {f.name for f in fields(ProteinSummary)} - {"n_proteins"}
    assert len(shape) == (2 if needs(name, "protein") else 1)
    options = {f.name: f.default for f in fields(spec.config)}
    # What a model tells its base: what it shows the encoders beside the genes, and the likelihood, if it has but one.
    for told in {"n_dense_input", "reconstruction_loss"} - options.keys():
        accepted.pop(told, None)
    assert options.keys() | sizes | set(shape) == accepted.keys()
    differing = {k: v for k, v in options.items() if v != accepted[k].default}
    # The class keeps the seed's latent library (and of totalVI logistic normal and dropout), the function has others.
    assert differing["library"] == "observed"
    of_totalvi = {"latent_distribution", "dropout_rate_decoder", "dropout_rate_encoder"}
    assert differing.keys() - {"library"} <= (of_totalvi if needs(name, "protein") else set())
    with pytest.raises(TypeError, match="n_hiden"):
        spec.module(*(5 for _ in shape), n_labels=2, n_hiden=3)


@ALL
def test_capabilities_are_methods(name):
    spec = models.get(name)
    present = {capability for capability in Capability if callable(getattr(spec.module, capability.value, None))}
    assert spec.capabilities == present


def test_an_unknown_model_lists_the_known():
    with pytest.raises(
        ValueError, match=r"^model='scvii' is not one of .*'ldvae', .*'scvi'.*\. Did you mean 'scvi'\?$"
    ):
        models.get("scvii")


def test_show_is_a_table_of_the_models():
    table = models.show()
    assert isinstance(table, pd.DataFrame)
    assert table.index.name == "model"
    assert table.index.tolist() == models.names()
    assert table.columns.tolist() == ["module", "capabilities", "options", "reference"]
    for name, row in table.iterrows():
        spec = models.get(name)
        assert row["module"] == spec.module.__name__
        assert row["capabilities"] == ", ".join(sorted(spec.capabilities))
        assert all(f"{f.name}={f.default!r}" in row["options"] for f in fields(spec.config))
        assert row["reference"] == spec.reference


# ---- building and learning -----------------------------------------------------------------------------------------


@VARIANTS
def test_contract(name, options):
    module, cells = build(name, **options).eval(), make_cells()
    q = module.encode(cells)
    assert isinstance(q, Posterior)
    assert q.loc.shape == q.scale.shape == (N_CELLS, module.n_latent)
    assert (q.scale > 0).all()
    px = module.decode(module.transform_z(q.loc), cells)
    assert isinstance(px, Expression)
    assert px.scale.shape == px.rate.shape == (N_CELLS, SUMMARY.n_input)
    assert all(p.isfinite().all() for p in px if p is not None)
    loss = module.loss(cells)
    assert isinstance(loss, Loss)
    assert loss.total.shape == ()
    assert loss.reconstruction.shape == loss.kl_z.shape == loss.kl_library.shape == (N_CELLS,)
    if Capability.Z2 not in models.get(name).capabilities:  # there it is an estimate
        assert (loss.kl_z >= 0).all()
    assert (loss.kl_library >= 0).all()


@VARIANTS
def test_the_loss_is_the_mean_of_its_parts(name, options):
    module, cells = build(name, **options).eval(), make_cells()
    beside = []  # what is minimised beside the ELBO: the same at any weight
    for weight in (0.0, 0.3, torch.tensor(1.0)):
        loss = module.loss(cells, kl_weight=weight, **given(module, noise(module)))
        parts = loss.reconstruction + weight * loss.kl_z + loss.kl_library
        beside.append(loss.total - (parts if loss.kl_global is None else parts + loss.kl_global).mean())
    expected = beside[0] if needs(name, "protein") else torch.zeros((), dtype=torch.float64)
    for found in beside:
        assert_close(found, expected, rtol=0, atol=FLOAT64["rtol"] * loss.total.item())


def assert_every_parameter_learns(name: str, module: nn.Module, cells: Minibatch) -> None:
    # A bias in front of a batch normalisation cancels in training mode: evaluation mode tells it from an unused one.
    module.eval().loss(*streams(name, cells), **given(module, noise(module))).total.backward()
    assert {n for n, p in module.named_parameters() if not moves(p)} == of_critic(module)
    module.zero_grad(set_to_none=True)
    module.train().loss(*streams(name, cells)).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert all(moves(p) for n, p in module.named_parameters() if n in of_critic(module))


def moves(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


def of_critic(module: nn.Module) -> set[str]:
    """Names of the parameters of a critic, which is there in training mode only."""
    return {name for name, _ in module.named_parameters() if name.startswith("critic.")}


@ALL_CROSSED
def test_every_parameter_receives_a_gradient(name, options):
    assert_every_parameter_learns(name, build(name, **options), make_cells())


COVARIATES = [
    {"encode_covariates": False},
    {"encode_covariates": True},
    {"encode_covariates": True, "batch_representation": "embedding"},
    {"encode_covariates": True, "n_layers": 2, "deeply_inject_covariates": False},
]


@pytest.mark.parametrize("use_layer_norm", ["none", "both"])
@pytest.mark.parametrize("use_batch_norm", ["none", "encoder", "decoder", "both"])
@pytest.mark.parametrize(
    ("name", "covariates"), [(name, options) for options in COVARIATES for name in offering(**options)], ids=label
)
def test_norms_and_covariates_leave_no_parameter_out(name, use_batch_norm, use_layer_norm, covariates):
    if use_layer_norm not in values(name)["use_layer_norm"]:
        use_layer_norm = "encoder"
    options = {"library": "latent", "use_batch_norm": use_batch_norm, "use_layer_norm": use_layer_norm} | covariates
    module, cells = build(name, **options), make_cells()
    assert_every_parameter_learns(name, module, cells)
    for network in (m for m in module.modules() if isinstance(m, models.FCLayers)):
        for i, layer in enumerate(network.layers):
            n_cov = sum(network.n_cat_list) if i == 0 or network.inject_covariates else 0
            columns = layer.linear.weight.grad[:, layer.linear.in_features - n_cov :]
            assert (columns != 0).any(0).all()  # of every category


@VARIANTS
def test_loss_falls(name, options):
    module, cells = build(name, **options), make_cells()
    fixed = noise(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)  # the same dropout at every step
        loss = module.loss(*streams(name, cells), **given(module, fixed)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert losses[-1] < losses[0]


@MODELS
@pytest.mark.parametrize("n_batch", [0, 1])
def test_odd_sizes(name, n_batch):
    prior = {"library_log_means": (1.0,), "library_log_vars": (0.2,)}
    n_labels = int(needs(name, "labels"))
    summary = DataSummary(n_input=1, n_batch=n_batch, n_labels=n_labels, proteins=all_measured(1), **prior)
    module = build(name, summary, n_hidden=1, n_latent=1, library="latent")
    zeros, counts = torch.zeros(3, dtype=torch.long), torch.arange(3, dtype=torch.float64).reshape(3, 1)
    cells = Minibatch(
        counts,
        zeros,
        labels=zeros if needs(name, "labels") else None,
        protein=counts.flip(0) if needs(name, "protein") else None,
    )
    assert module.loss(cells).total.isfinite()
    assert module.eval().loss(take(cells, slice(1))).total.isfinite()


DISPERSIONS = ["gene", "gene-batch", "gene-label", "gene-cell"]


@pytest.mark.parametrize(("name", "dispersion"), [(n, d) for d in DISPERSIONS for n in offering(dispersion=d)])
def test_one_batch_and_one_label(name, dispersion):
    module, cells = build(name, BARE, **named(name, dispersion=dispersion)), make_cells(BARE)
    module.loss(cells).total.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@MODELS
def test_a_cell_without_counts(name):
    module, cells = build(name).eval(), make_cells()
    for empty in ({"x": torch.zeros_like(cells.x)}, {"protein": torch.zeros_like(cells.protein)}):
        cells = cells._replace(**empty)  # no count of a gene, then none at all
        assert module.loss(cells).total.isfinite()


# ---- inference -----------------------------------------------------------------------------------------------------


def inferred(module: nn.Module, cells: Minibatch, draws: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that the read-outs take from a module, per cell."""
    posteriors = qz, _ = module.posteriors(cells)
    z, log_library = module.draw(cells, posteriors, draws)
    px = module.decode(module.transform_z(z), cells, log_library)
    theta = px.theta.expand_as(px.rate) if px.theta is not None else px.rate
    loss = module.loss(cells, **given(module, draws))
    return {
        "loc": qz.loc,
        "z": z,
        "log_library": log_library,
        "scale": px.scale,
        "rate": px.rate,
        "theta": theta,
        "dropout_logits": px.rate if px.dropout_logits is None else px.dropout_logits,
        "log_likelihood": module.log_likelihood(cells.x, px),
        "log_weight": module.log_weight(cells, posteriors, draws),
        "reconstruction": loss.reconstruction,
        "kl": loss.kl_z + loss.kl_library,
    }


@cache
def trained(name: str, summary: DataSummary = SUMMARY, **options: object) -> nn.Module:
    """In evaluation mode, after a few steps: running statistics and weights are no longer the initial ones."""
    module, cells = build(name, summary, **options), make_cells(summary, seed=7)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        module.loss(cells).total.backward()
        optimizer.step()
    return module.eval().requires_grad_(False)


@VARIANTS
def test_minibatches_do_not_change_inference(name, options):
    module, cells = trained(name, **options), make_cells()
    draws = noise(module)
    whole = inferred(module, cells, draws)
    rows = torch.arange(N_CELLS).split(7)  # and a short last minibatch
    pieces = [inferred(module, take(cells, r), draws[r]) for r in rows]
    for key, expected in whole.items():
        assert_close(torch.cat([piece[key] for piece in pieces]), expected, **FLOAT64, msg=lambda m, k=key: f"{k}: {m}")


@VARIANTS
def test_permuted_cells_give_permuted_results(name, options):
    module, cells = trained(name, **options), make_cells()
    draws, order = noise(module), torch.randperm(N_CELLS, generator=torch.Generator().manual_seed(3))
    here, there = inferred(module, cells, draws), inferred(module, take(cells, order), draws[order])
    for key, value in here.items():
        assert_close(there[key], value[order], **FLOAT64, msg=lambda m, k=key: f"{k}: {m}")


@VARIANTS
def test_scale_sums_to_one(name, options):
    module, cells = trained(name, **options), make_cells()
    px = module.decode(module.transform_z(module.encode(cells).loc), cells)
    assert (px.scale >= 0).all()
    if options.get("library") != "size_factor":
        assert_close(px.scale.sum(-1), torch.ones(N_CELLS, dtype=torch.float64), **FLOAT64)


@VARIANTS
def test_rate_is_scale_times_library(name, options):
    module, cells = trained(name, **options), make_cells()
    z, log_library = module.draw(cells, module.posteriors(cells), noise(module))
    px = module.decode(module.transform_z(z), cells, log_library)
    assert_close(px.rate, torch.exp(log_library) * px.scale, **FLOAT64)
    kind = options.get("library", "observed")
    if kind == "observed":
        assert_close(px.rate.sum(-1), cells.x.sum(-1), rtol=1e-8, atol=0.0)  # 1e-8 is added to the sum of the counts
    elif kind == "size_factor":
        assert_close(torch.exp(log_library).squeeze(-1), cells.size_factor, **FLOAT64)


@VARIANTS
def test_the_observed_batch_is_no_counterfactual(name, options):
    module, cells = trained(name, **options), make_cells()
    z = module.transform_z(module.encode(cells).loc)
    here = module.decode(z, cells)
    for batch in range(SUMMARY.n_batch):
        there = module.decode(z, cells._replace(batch_index=torch.full((N_CELLS,), batch)))
        own = cells.batch_index == batch
        assert_close(there.scale[own], here.scale[own], **FLOAT64)
        moved = (there.scale[~own] - here.scale[~own]).abs().amax(-1) > 1e-8
        assert moved.double().mean() > 0.5  # not all: all units that see the batch may rest in a cell


@VARIANTS
def test_samples_decode_as_one_by_one(name, options):
    module, cells = trained(name, **options), make_cells()
    draws = [noise(module, seed=s) for s in range(3)]
    posteriors = module.posteriors(cells)
    z, log_library = (torch.stack(d) for d in zip(*(module.draw(cells, posteriors, n) for n in draws), strict=True))
    together = module.decode(module.transform_z(z), cells, log_library)
    for s in range(3):
        alone = module.decode(module.transform_z(z[s]), cells, log_library[s])
        assert_close(together.rate[s], alone.rate, **FLOAT64)
        assert_close(module.log_likelihood(cells.x, together)[s], module.log_likelihood(cells.x, alone), **FLOAT64)


@MODELS
@pytest.mark.parametrize("encode_covariates", [True, False])
def test_the_columns_that_are_read_are_those_declared(name, encode_covariates):
    for dispersion, library in [("gene", "observed"), ("gene-label", "latent"), ("gene", "size_factor")]:
        options = named(name, dispersion=dispersion, library=library, encode_covariates=encode_covariates)
        module, cells, spec = trained(name, **options), make_cells(), models.get(name)
        declared = spec.needs(spec.config(**SMALL | options))
        assert declared <= set(Minibatch._fields)
        draws = noise(module)
        before = module.loss(cells, **given(module, draws)).total
        changed = {
            "labels": (cells.labels + 1) % SUMMARY.n_labels,
            "size_factor": 2 * cells.size_factor,
            "categorical": 1 - cells.categorical.clamp(max=1),
            "continuous": cells.continuous + 1,
            "batch_index": (cells.batch_index + 1) % SUMMARY.n_batch,
            "protein": cells.protein + 1,
        }
        for column, value in changed.items():
            after = module.loss(cells._replace(**{column: value}), **given(module, draws)).total
            read = column in declared or column in ("categorical", "continuous", "batch_index")
            assert torch.equal(before, after) != read, (column, options)


@MODELS
@pytest.mark.parametrize("encode_covariates", [True, False])
def test_only_encoded_covariates_reach_the_posterior(name, encode_covariates):
    # A panel is no covariate: what a batch has not measured is hidden from the encoder in any case.
    complete = replace(SUMMARY, proteins=all_measured(4, SUMMARY.n_batch))
    module, cells = trained(name, complete, encode_covariates=encode_covariates, library="latent"), make_cells()
    other = cells._replace(
        batch_index=(cells.batch_index + 1) % SUMMARY.n_batch,
        categorical=1 - cells.categorical.clamp(max=1),
        continuous=cells.continuous + 1,
    )
    for column in ("batch_index", "categorical", "continuous"):
        changed = cells._replace(**{column: getattr(other, column)})
        for here, there in zip(module.posteriors(cells), module.posteriors(changed), strict=True):
            assert torch.equal(here.loc, there.loc) != encode_covariates


@VARIANTS
def test_importance_weight_is_joint_over_posterior(name, options):
    if models.get(name).capabilities & {Capability.LABELS, Capability.PROTEIN}:
        pytest.skip("its own test: labels are summed over, or there is a background of proteins")
    module, cells = trained(name, **options), make_cells()
    draws, (qz, ql) = noise(module), module.posteriors(cells)
    z, log_library = module.draw(cells, (qz, ql), draws)
    expected = -module.loss(cells, **given(module, draws)).reconstruction
    expected = expected + (Normal(0.0, 1.0).log_prob(z) - Normal(*qz).log_prob(z)).sum(-1)
    if ql is not None:
        prior = module.library.prior(cells)
        ratio = Normal(*prior).log_prob(log_library) - Normal(*ql).log_prob(log_library)
        expected = expected + ratio.squeeze(-1)
    assert_close(module.log_weight(cells, (qz, ql), **given(module, draws)), expected, **FLOAT64)


# ---- saving --------------------------------------------------------------------------------------------------------


@VARIANTS
def test_state_dict_round_trip(name, options):
    module, cells = trained(name, **options), make_cells()
    other = build(name, seed=99, **options).eval()
    other.load_state_dict(module.state_dict())
    draws = noise(module)
    here, there = inferred(module, cells, draws), inferred(other, cells, draws)
    assert all(torch.equal(here[key], there[key]) for key in here)


@MODELS
def test_restored_from_plain_arrays(name):
    spec, options = models.get(name), SMALL | named(name, library="latent", dispersion="gene-batch")
    module = build(name, **options).float()
    saved = SavedFit(
        key="k",
        model=name,
        config=asdict(spec.config(**options)),
        run={},
        setup={},
        var_names=[],
        state={key: value.numpy() for key, value in module.state_dict().items()},
        history=pd.DataFrame(),
        status={},
    )
    restored = models.restore(saved, SUMMARY)
    assert not restored.training
    assert type(restored) is spec.module
    state = restored.state_dict()
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    with torch.no_grad():
        next(restored.parameters()).fill_(7)
    assert not (saved.state[next(iter(saved.state))] == 7).any()  # the fit keeps its own arrays
