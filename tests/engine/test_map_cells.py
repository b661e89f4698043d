from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from scvi_ext._settings import settings
from scvi_ext.data.registry import read_setup
from scvi_ext.data.store import CellStore
from scvi_ext.engine import map_cells as engine
from scvi_ext.engine.map_cells import Draws, map_cells

CPU = torch.device("cpu")


@pytest.fixture
def store(registered):
    return CellStore.from_adata(registered, read_setup(registered))


def run(store, fn, **options):
    return list(map_cells(fn, nn.Identity(), store, device=CPU, **options))


def values(store, fn, **options):
    return np.concatenate([part for _, (part,) in run(store, fn, **options)])


def profile(cells, draws):
    return (cells.x.to_dense() + 100 * cells.batch_index[:, None],)


def noise(cells, draws):
    return (draws.normal(len(cells.x), 5, 3),)


@pytest.mark.parametrize("batch_size", [1, 7, 67, 201, 500, None])
def test_stretches_are_consecutive_and_cover_every_cell_in_order(store, batch_size):
    stretches = [rows for rows, _ in run(store, profile, batch_size=batch_size)]
    covered = np.concatenate([np.arange(store.n_cells)[rows] for rows in stretches])
    np.testing.assert_array_equal(covered, np.arange(store.n_cells))
    expected = store.counts.toarray() + 100 * store.batch_index[:, None]
    np.testing.assert_array_equal(values(store, profile, batch_size=batch_size), expected)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200])
def test_draws_do_not_depend_on_the_batch_size(store, batch_size):
    np.testing.assert_array_equal(values(store, noise, batch_size=batch_size), values(store, noise, batch_size=201))


@pytest.mark.parametrize("block_cells", [1, 50, 201])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_nothing_depends_on_the_size_of_a_block(store, monkeypatch, block_cells, batch_size):
    expected = values(store, profile), values(store, noise)
    monkeypatch.setattr(engine, "_BLOCK_CELLS", block_cells)
    found = run(store, profile, batch_size=batch_size)
    assert found[-1][0].stop == store.n_cells
    assert max(rows.stop - rows.start for rows, _ in found) <= min(block_cells, batch_size)
    np.testing.assert_array_equal(np.concatenate([part for _, (part,) in found]), expected[0])
    np.testing.assert_array_equal(values(store, noise, batch_size=batch_size), expected[1])


def test_draws_are_standard_normal_and_of_the_seed(store):
    one, again, other = (values(store, noise, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert np.abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1  # 3015 draws: standard deviation 0.018
    # mean and variance of 3015 draws have standard deviations 0.018 and 0.026
    assert abs(one.mean()) < 0.1
    assert abs(one.var() - 1) < 0.15


def test_draws_leave_the_generators_of_numpy_and_torch_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    Draws(0, CPU).normal(5, 2)
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


def streams(cells, draws):
    return (torch.tensor([rng.random() for rng in draws.streams(len(cells.x))]).unsqueeze(-1),)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200])
def test_every_cell_has_a_stream_of_its_own(store, monkeypatch, batch_size):
    expected = values(store, streams)
    assert len(np.unique(expected)) == store.n_cells
    assert not np.isin(expected, values(store, streams, seed=1)).any()
    assert not np.isin(expected, np.random.default_rng(0).random(1000).astype(np.float32)).any()
    monkeypatch.setattr(engine, "_BLOCK_CELLS", 50)
    np.testing.assert_array_equal(values(store, streams, batch_size=batch_size), expected)


def test_fn_sees_an_evaluated_module_and_no_gradients(store):
    module = nn.Dropout(0.5).train()

    def look(cells, draws):
        return (torch.tensor([torch.is_inference_mode_enabled(), module.training]),)

    (_, (state,)) = next(iter(map_cells(look, module, store, device=CPU)))
    assert state.tolist() == [True, False]
    assert not torch.is_inference_mode_enabled()


def test_batch_size_comes_from_the_settings_and_shrinks_with_what_a_cell_needs(store, monkeypatch):
    def sizes(**options):
        return [len(part) for _, (part,) in run(store, profile, **options)]

    monkeypatch.setattr(settings, "batch_size", 100)
    assert sizes() == [100, 100, 1]
    monkeypatch.setattr(engine, "_HOST_FLOATS", 60 * 30)
    assert max(sizes()) == 30
    assert max(sizes(floats_per_cell=180)) == 10
    assert max(sizes(floats_per_cell=10**9)) == 1
    assert max(sizes(floats_per_cell=180, batch_size=150)) == 150  # the user knows


@pytest.mark.parametrize("batch_size", [0, -3])
def test_an_impossible_batch_size_is_refused(store, batch_size):
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} must be 1 or more\."):
        run(store, profile, batch_size=batch_size)
