from __future__ import annotations

import pytest
import torch

from scvi_ext._contract import Minibatch
from scvi_ext.nn.covariates import Covariates

B, S, L = 6, 4, 3
CELLS = Minibatch(
    torch.ones(B, 2),
    torch.tensor([0, 1, 2, 2, 1, 0]),
    categorical=torch.tensor([[0, 1], [1, 0], [0, 2], [1, 1], [0, 0], [1, 2]]),
    continuous=torch.linspace(-1, 1, 2 * B).reshape(B, 2),
)
BARE = CELLS._replace(categorical=None, continuous=None)


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(S, B, L, generator=torch.Generator().manual_seed(0))


def test_one_hot(z):
    covariates = Covariates(3, (2, 3), 2, "one-hot")
    assert covariates.n_cat_list == [3, 2, 3]
    assert covariates.n_dense == 2
    assert [c.tolist() for c in covariates.codes(CELLS)] == [
        CELLS.batch_index.tolist(),
        CELLS.categorical[:, 0].tolist(),
        CELLS.categorical[:, 1].tolist(),
    ]
    assert torch.equal(covariates.append(z[0], CELLS), torch.cat([z[0], CELLS.continuous], 1))
    assert not list(covariates.parameters())


def test_embedding(z):
    torch.manual_seed(0)
    covariates = Covariates(3, (2, 3), 2, "embedding")
    assert covariates.n_cat_list == [2, 3]
    assert covariates.n_dense == 2 + 5
    assert len(covariates.codes(CELLS)) == 2
    embedded = covariates.batch_embedding.weight[CELLS.batch_index]
    assert torch.equal(covariates.append(z[0], CELLS), torch.cat([z[0], CELLS.continuous, embedded], 1))


@pytest.mark.parametrize("representation", ["one-hot", "embedding"])
def test_every_sample_gets_the_same_columns(z, representation):
    covariates = Covariates(3, (2, 3), 2, representation)
    together = covariates.append(z, CELLS)
    assert together.shape == (S, B, L + covariates.n_dense)
    assert torch.equal(together, torch.stack([covariates.append(sample, CELLS) for sample in z]))


def test_without_covariates_there_is_only_the_batch(z):
    covariates = Covariates(3, (), 0, "one-hot")
    assert covariates.append(z, BARE) is z
    assert covariates.n_cat_list == [3]
    assert len(covariates.codes(BARE)) == 1
