"""A module that has been given room for new categories still says of the known ones what it said before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _tolerances import FLOAT32

from scvi_ext import models
from scvi_ext._contract import DataSummary, Minibatch
from scvi_ext.nn.layers import FCLayers
from scvi_ext.nn.surgery import widen

OLD = DataSummary(
    n_input=9,
    n_batch=2,
    n_labels=3,
    n_cats_per_cov=(3, 2),
    n_continuous_cov=1,
    library_log_means=(2.0, 2.5),
    library_log_vars=(0.3, 0.4),
)
NEW = replace(
    OLD, n_batch=4, n_cats_per_cov=(3, 4), library_log_means=(7.0, 7.0, 3.0, 3.5), library_log_vars=(9.0, 9.0, 0.5, 0.6)
)
ONE_BATCH = replace(OLD, n_batch=1, library_log_means=(2.0,), library_log_vars=(0.3,), n_cats_per_cov=(1, 2))
FROM_ONE = replace(NEW, n_cats_per_cov=(2, 2))
COUNT_VAES = [name for name in models.names() if "n_latent" in models.get(name).config.__dataclass_fields__]
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
        categorical=torch.stack([codes(k) for k in sizes.n_cats_per_cov], dim=1),
        continuous=torch.randn(n, sizes.n_continuous_cov, generator=rng),
    )


def everything(module, cells: Minibatch) -> dict[str, torch.Tensor]:
    noise = torch.zeros(len(cells.batch_index), module.n_noise)
    with torch.no_grad():
        qz, ql = posteriors = module.posteriors(cells)
        z, log_library = module.draw(cells, posteriors, noise)
        px = module.decode(module.transform_z(z), cells, log_library)
        loss = module.loss(cells, noise=noise)
    values = {"loc": qz.loc, "scale": qz.scale, **px._asdict(), **loss._asdict()}
    values |= {} if ql is None else {"library": ql.loc}
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", COUNT_VAES)
def test_known_categories_are_as_before_whatever_the_new_parameters_are(name, options):
    old, new, masks, _ = grown(name, OLD, NEW, options)
    assert masks
    cells = cells_of(OLD)
    before, after = everything(old, cells), everything(new, cells)
    assert before.keys() == after.keys()
    for what, values in before.items():
        torch.testing.assert_close(after[what], values, **FLOAT32, msg=lambda text, what=what: f"{what}: {text}")


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
    for key, mask in masks.items():
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


@pytest.mark.parametrize("options", [{}, {"dispersion": "gene-batch", "library": "latent"}], ids=str)
@pytest.mark.parametrize("name", COUNT_VAES)
def test_one_batch_had_no_columns_and_those_of_its_categories_start_at_zero(name, options):
    old, new, masks, made = grown(name, ONE_BATCH, FROM_ONE, options)
    cells = cells_of(ONE_BATCH)
    before, after = everything(old, cells), everything(new, cells)
    for what, values in before.items():
        torch.testing.assert_close(after[what], values, **FLOAT32, msg=lambda text, what=what: f"{what}: {text}")
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


def test_nothing_new_nothing_changed():
    old = build("scvi", OLD, {})
    state, masks = widen(old, build("scvi", OLD, {}), old.state_dict())
    assert masks == {}
    for key, value in old.state_dict().items():
        assert torch.equal(state[key], value)
