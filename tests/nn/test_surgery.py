"""A module that has been given room for new categories still says of the known ones what it said before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from _tolerances import FLOAT64

from scvi_ext import models
from scvi_ext._contract import Capability, DataSummary, Minibatch, ProteinSummary
from scvi_ext.functional.evidence import loss_at
from scvi_ext.nn.layers import FCLayers
from scvi_ext.nn.surgery import widen


def proteins(*measured: tuple[bool, ...]) -> ProteinSummary:
    """Two proteins that were measured in these batches."""
    n_batch = len(measured)
    return ProteinSummary(2, measured, ((1.5, 2.5),) * n_batch, ((0.3, 0.6),) * n_batch)


BOTH, ONE, NONE = (True, True), (True, False), (False, False)
OLD = DataSummary(
    n_input=9,
    n_batch=2,
    n_labels=3,
    n_cats_per_cov=(3, 2),
    n_continuous_cov=1,
    library_log_means=(2.0, 2.5),
    library_log_vars=(0.3, 0.4),
    proteins=proteins(BOTH, BOTH),
)
NEW = replace(
    OLD,
    n_batch=4,
    n_cats_per_cov=(3, 4),
    library_log_means=(7.0, 7.0, 3.0, 3.5),
    library_log_vars=(9.0, 9.0, 0.5, 0.6),
    proteins=proteins(BOTH, BOTH, NONE, BOTH),
)
ONE_BATCH = replace(
    OLD,
    n_batch=1,
    library_log_means=(2.0,),
    library_log_vars=(0.3,),
    n_cats_per_cov=(1, 2),
    proteins=proteins(BOTH),
)
FROM_ONE = replace(NEW, n_cats_per_cov=(2, 2))
OF_ONE = [name for name in models.names() if Capability.JOINT not in models.get(name).capabilities]  # mapped onto
COUNT_VAES = [name for name in OF_ONE if "n_latent" in models.get(name).config.__dataclass_fields__]
OPTIONS = {
    "default": {},
    "two layers": {"n_layers": 2},
    "encoded": {"encode_covariates": True, "n_layers": 2},
    "first layer only": {"encode_covariates": True, "n_layers": 2, "deeply_inject_covariates": False},
    "embedding": {"batch_representation": "embedding", "encode_covariates": True},
    "by batch": {"dispersion": "gene-batch", "library": "latent"},
    "by label": {"dispersion": "gene-label"},
    "by cell": {"dispersion": "gene-cell", "use_batch_norm": "none", "use_layer_norm": "encoder"},
}
# What totalVI calls options of the genes, and what it has of its own by batch.
OF_PROTEINS = {
    "by batch": {"protein_dispersion": "protein-batch", "protein_efficiency": True},
    "by label": {"protein_dispersion": "protein-label"},
}


@pytest.fixture(autouse=True)
def exact():
    """In float64: what is left of a law is then some roundings, whatever numbers are drawn."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def options_of(name: str, of: str) -> dict:
    """Those of the options called ``of`` that the model has."""
    known = models.get(name).config.__dataclass_fields__
    renamed = {key if key in known else f"gene_{key}": value for key, value in OPTIONS[of].items()}
    chosen = {key: value for key, value in (renamed | OF_PROTEINS.get(of, {})).items() if key in known}
    if "gene-cell" in chosen.values() and "gene_dispersion" in chosen:
        del chosen["gene_dispersion"]  # it has none by cell
    return chosen


def build(name: str, summary: DataSummary, options: dict):
    torch.manual_seed(len(options))
    spec = models.get(name)
    module = models.build(spec, spec.config(n_hidden=7, n_latent=3, **options), summary)
    with torch.no_grad():  # as if it had been trained: nothing is zero or one
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.abs_().add_(0.1 * torch.rand_like(tensor))
    return module.eval()


def grown(name: str, old_sizes: DataSummary, new_sizes: DataSummary, options: dict):
    """The old module, the new one with arbitrary numbers for what is new, the masks, and the state as it was made."""
    old, new = build(name, old_sizes, options), build(name, new_sizes, options)
    state, masks = widen(old, new, old.state_dict())
    made = {key: tensor.clone() for key, tensor in state.items()}
    for key, mask in masks.items():
        state[key][mask] = torch.randn(int(mask.sum()))
    new.load_state_dict(state)
    return old, new, masks, made


def cells_of(sizes: DataSummary, n: int = 24, seed: int = 1) -> Minibatch:
    rng = torch.Generator().manual_seed(seed)

    def codes(k: int) -> torch.Tensor:
        return torch.randint(k, (n,), generator=rng)

    return Minibatch(
        x=torch.poisson(torch.full((n, sizes.n_input), 3.0), generator=rng),
        batch_index=codes(sizes.n_batch),
        labels=codes(sizes.n_labels),
        size_factor=torch.ones(n),
        protein=torch.poisson(torch.full((n, 2), 5.0), generator=rng),
        categorical=torch.stack([codes(k) for k in sizes.n_cats_per_cov], dim=1),
        continuous=torch.randn(n, sizes.n_continuous_cov, generator=rng),
    )


def everything(module, cells: Minibatch) -> dict[str, torch.Tensor]:
    noise = torch.zeros(len(cells.batch_index), module.n_noise)
    with torch.no_grad():
        qz, ql = posteriors = module.posteriors(cells)
        z, log_library = module.draw(cells, posteriors, noise)
        px = module.decode(module.transform_z(z), cells, log_library)
        loss = loss_at(module, cells, noise, module.draw_shared(np.random.default_rng(0)))
        values = {"loc": qz.loc, "scale": qz.scale, **px._asdict(), **loss._asdict()}
        if Capability.PROTEIN in models.get(type(module).__module__.rpartition(".")[2]).capabilities:
            py = module.decode_protein(z, cells)
            values |= {f"protein {name}": value for name, value in py._asdict().items() if name != "background"}
            values |= {"q": py.background.loc, "p": module.prior(cells).loc, "p scale": module.prior(cells).scale}
    values |= {} if ql is None else {"library": ql.loc}
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", COUNT_VAES)
def test_known_categories_are_as_before_whatever_the_new_parameters_are(name, options):
    old, new, masks, _ = grown(name, OLD, NEW, options_of(name, options))
    assert masks
    cells = cells_of(OLD)
    before, after = everything(old, cells), everything(new, cells)
    assert before.keys() == after.keys()
    for what, values in before.items():
        torch.testing.assert_close(after[what], values, **FLOAT64, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("name", COUNT_VAES)
def test_new_categories_are_seen(name):
    _, new, masks, _ = grown(name, OLD, NEW, {"n_layers": 2})
    cells = cells_of(OLD)
    known = everything(new, cells)["rate"]
    for changed in (
        cells._replace(batch_index=cells.batch_index.new_full(cells.batch_index.shape, 3)),
        cells._replace(categorical=torch.stack([cells.categorical[:, 0], torch.full((24,), 3)], dim=1)),
    ):
        assert not torch.allclose(everything(new, changed)["rate"], known)
    # only columns of batches 2 and 3, and of categories 2 and 3 of the second covariate
    layers = {key: mask for key, mask in masks.items() if ".layers." in key}
    assert layers
    for key, mask in layers.items():
        assert mask.sum() == 4 * mask.shape[0], key


def test_columns_of_a_batch_stand_in_the_middle():
    class Net(torch.nn.Module):
        def __init__(self, sizes):
            super().__init__()
            self.net = FCLayers(2, 1, sizes, use_batch_norm=False)

    old, new = Net([2, 1, 3]), Net([3, 2, 3])
    state = {
        "net.layers.0.linear.weight": torch.arange(1.0, 8.0).unsqueeze(0),
        "net.layers.0.linear.bias": torch.ones(1),
    }
    widened, masks = widen(old, new, state)
    # two of the input, batches 3 4 and their mean, a covariate that had one category, and three that are all known
    expected = [1.0, 2.0, 3.0, 4.0, 3.5, 0.0, 0.0, 5.0, 6.0, 7.0]
    assert widened["net.layers.0.linear.weight"].tolist() == [expected]
    assert masks["net.layers.0.linear.weight"].tolist() == [[i in (4, 6) for i in range(10)]]
    assert masks.keys() == {"net.layers.0.linear.weight"}


@pytest.mark.parametrize("options", ["default", "by batch"])
@pytest.mark.parametrize("name", COUNT_VAES)
def test_one_batch_had_no_columns_and_those_of_its_categories_start_at_zero(name, options):
    old, new, masks, made = grown(name, ONE_BATCH, FROM_ONE, options_of(name, options))
    cells = cells_of(ONE_BATCH)
    before, after = everything(old, cells), everything(new, cells)
    for what, values in before.items():
        torch.testing.assert_close(after[what], values, **FLOAT64, msg=lambda text, what=what: f"{what}: {text}")
    weights = [key for key in masks if key.endswith("linear.weight")]
    assert weights
    for key in weights:
        n_new = NEW.n_batch - 1 + 1  # three more batches, one more category of the first covariate
        assert masks[key].sum() == n_new * len(masks[key])
        assert (made[key][masks[key]] == 0).all()


def test_new_parameters_start_at_the_mean_and_priors_at_what_the_data_say():
    old, new, masks, made = grown("scvi", OLD, NEW, {"dispersion": "gene-batch", "library": "latent"})
    theta = old.state_dict()["dispersion.log_theta"]
    torch.testing.assert_close(made["dispersion.log_theta"][2:], theta.mean(0).expand(2, -1))
    torch.testing.assert_close(made["dispersion.log_theta"][:2], theta, rtol=0, atol=0)
    assert not any(key.startswith("library.log") for key in masks)
    expected = torch.cat([old.library.log_means, new.library.log_means[2:]])
    torch.testing.assert_close(made["library.log_means"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("measured", [(BOTH, BOTH), (BOTH, ONE)], ids=["no critic before", "a critic that grows"])
def test_what_totalvi_has_for_each_batch_grows(measured):
    options = options_of("totalvi", "by batch")
    old = replace(OLD, proteins=proteins(*measured))
    new = replace(NEW, proteins=proteins(*measured, NONE, ONE))
    before, after, masks, made = grown("totalvi", old, new, options)
    state = before.state_dict()
    of_batches = ("background_mean", "background_log_scale", "log_efficiency", "protein_dispersion.log_theta")
    for key in of_batches:
        torch.testing.assert_close(made[key][:2], state[key], rtol=0, atol=0)
        torch.testing.assert_close(made[key][2:], state[key].mean(0).expand(2, -1))
        assert masks[key].tolist() == [[False] * 2] * 2 + [[True] * 2] * 2
    assert after.protein_batch_mask.tolist() == [*map(list, measured), [False, False], [True, False]]
    assert made["critic.output.weight"].shape[0] == 4
    if before.critic is not None:
        torch.testing.assert_close(made["critic.output.weight"][:2], state["critic.output.weight"], rtol=0, atol=0)
        assert masks["critic.output.weight"].sum(1).tolist() == [0, 0, 32, 32]


def test_a_single_batch_that_was_not_encoded_gets_columns_that_start_at_zero():
    no_covariates = {"n_cats_per_cov": (), "n_continuous_cov": 0}
    old, new, masks, made = grown("totalvi", replace(ONE_BATCH, **no_covariates), replace(NEW, **no_covariates), {})
    mask = masks["z_encoder.encoder.layers.0.linear.weight"]
    assert mask[0].tolist() == [False] * (9 + 2 + 1) + [True] * 3
    assert (made["z_encoder.encoder.layers.0.linear.weight"][:, -4:] == 0).all()
    cells = cells_of(ONE_BATCH)._replace(categorical=None, continuous=None)
    before, after = everything(old, cells), everything(new, cells)
    for what, values in before.items():
        torch.testing.assert_close(after[what], values, **FLOAT64, msg=lambda text, what=what: f"{what}: {text}")


def test_nothing_new_nothing_changed():
    old = build("scvi", OLD, {})
    state, masks = widen(old, build("scvi", OLD, {}), old.state_dict())
    assert masks == {}
    for key, value in old.state_dict().items():
        assert torch.equal(state[key], value)
