from __future__ import annotations

import pytest
import torch
from _tolerances import FLOAT32
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from scvi_ext._contract import Minibatch
from scvi_ext.nn.encoders import Encoder, EncoderInput
from scvi_ext.nn.library import LatentLibrary, ObservedLibrary, SizeFactorLibrary, make_library

B, G = 6, 5
MEANS, VARS = (1.0, 2.5, 3.0), (0.2, 0.5, 1.5)


@pytest.fixture
def cells() -> Minibatch:
    x = torch.poisson(torch.full((B, G), 3.0), generator=torch.Generator().manual_seed(0))
    return Minibatch(x, torch.tensor([0, 1, 2, 2, 1, 0]), size_factor=torch.linspace(0.5, 2.0, B))


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(G, 1, n_hidden=4).eval()


def test_observed_is_the_log_of_the_sum(cells):
    library = ObservedLibrary()
    assert_close(library.point(cells), torch.log(cells.x.sum(1, keepdim=True)), **FLOAT32)
    assert library.posterior(cells, EncoderInput(cells.x)) is None
    assert torch.equal(library.kl(None, cells), torch.zeros(B))


def test_an_empty_cell_has_a_finite_library(cells):
    empty = cells._replace(x=torch.zeros(B, G))
    assert ObservedLibrary().point(empty).isfinite().all()


def test_size_factor_is_the_library(cells):
    library = SizeFactorLibrary()
    assert_close(library.point(cells), torch.log(cells.size_factor).reshape(B, 1), **FLOAT32)
    assert library.posterior(cells, EncoderInput(cells.x)) is None
    assert torch.equal(library.kl(None, cells), torch.zeros(B))


def test_latent_has_the_prior_of_each_cells_batch(cells):
    library = LatentLibrary(encoder(), MEANS, VARS)
    prior = library.prior(cells)
    assert_close(prior.loc.squeeze(1), torch.tensor(MEANS)[cells.batch_index], **FLOAT32)
    assert_close(prior.scale.squeeze(1) ** 2, torch.tensor(VARS)[cells.batch_index], **FLOAT32)
    q = library.posterior(cells, EncoderInput(cells.x))
    assert q.loc.shape == q.scale.shape == (B, 1)
    expected = kl_divergence(Normal(*q), Normal(*prior)).squeeze(1)
    assert_close(library.kl(q, cells), expected, **FLOAT32)


def test_the_prior_travels_with_the_weights():
    state = LatentLibrary(encoder(), MEANS, VARS).state_dict()
    other = LatentLibrary(encoder(), (0.0,) * 3, (0.0,) * 3)
    other.load_state_dict(state)
    assert_close(other.log_means, torch.tensor(MEANS), **FLOAT32)
    assert_close(other.log_vars, torch.tensor(VARS), **FLOAT32)


def test_latent_without_prior(cells):
    with pytest.raises(ValueError, match="A latent library needs a prior: build the module with library_log_means"):
        LatentLibrary(encoder(), (), ()).prior(cells)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("observed", ObservedLibrary), ("size_factor", SizeFactorLibrary), ("latent", LatentLibrary)],
)
def test_only_a_latent_library_has_parameters(kind, expected):
    library = make_library(kind, encoder, MEANS, VARS)
    assert type(library) is expected
    assert (len(list(library.parameters())) > 0) == (kind == "latent")


def test_a_latent_library_starts_at_the_mean_of_its_prior(cells):
    q = LatentLibrary(encoder(), MEANS, VARS).posterior(cells, EncoderInput(cells.x))
    assert_close(q.loc, torch.full((B, 1), sum(MEANS) / len(MEANS)), rtol=0, atol=1.0)
