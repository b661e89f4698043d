from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from scvi_ext.data.sampler import Blocks, epoch_order, some_of_each_label, split_cells


@pytest.mark.parametrize("n_cells", [10, 128, 129, 5000])
@pytest.mark.parametrize("sizes", [(0.9, None), (1.0, None), (0.5, 0.25), (0.34, 0.1)])
def test_split_is_sorted_disjoint_and_of_the_sizes_asked_for(n_cells, sizes):
    train, validation = split_cells(n_cells, *sizes, seed=1)
    both = np.concatenate([train, validation])
    assert len(np.unique(both)) == len(both)
    assert both.min() >= 0
    assert both.max() < n_cells
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    assert abs(len(train) - sizes[0] * n_cells) < 1
    if sizes[1] is None:
        assert len(both) == n_cells
    else:
        assert abs(len(validation) - sizes[1] * n_cells) < 1


def test_three_cells_can_be_trained_on_but_then_none_is_held_out():
    train, validation = split_cells(3, 1.0, None, 0)
    assert (train.tolist(), validation.tolist()) == ([0, 1, 2], [])


@pytest.mark.parametrize("share", [0.1, 0.29, 0.57, 0.7, 0.9])
def test_round_shares_are_exact_despite_floating_point(share):
    # 0.29 * 100 is 28.999..., 0.57 * 100 is 56.99..., 0.1 * 3 is 0.300...04
    train, validation = split_cells(1000, share, None, 0)
    assert (len(train), len(validation)) == (round(1000 * share), 1000 - round(1000 * share))
    assert len(split_cells(1000, 1 - share, share, 0)[1]) == round(1000 * share)


def test_split_is_decided_by_the_seed_alone():
    one, again, other = (split_cells(500, 0.9, None, seed)[1] for seed in (4, 4, 5))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_the_same_cells_are_trained_on_whatever_is_held_out():
    np.testing.assert_array_equal(split_cells(500, 0.6, None, 0)[0], split_cells(500, 0.6, 0.1, 0)[0])


@pytest.mark.parametrize(
    ("n_cells", "train_size", "validation_size", "message"),
    [
        (100, 0, None, r"train_size=0 is a share of the cells: it must be above 0 and at most 1"),
        (100, 1.1, None, r"train_size=1.1 is a share"),
        (100, float("nan"), None, r"train_size=nan is a share"),
        (100, 90, None, r"train_size=90 is a share"),
        (100, 0.9, 0.2, r"validation_size=0.2 does not fit: train_size=0.9 leaves 0.1 of the cells"),
        (100, 0.9, -0.1, r"validation_size=-0.1 does not fit"),
        (2, 1.0, None, r"2 of 2 cells are left for training .*at least 3 are needed"),
        (20, 0.1, None, r"2 of 20 cells are left for training"),
    ],
)
def test_impossible_splits_are_refused(n_cells, train_size, validation_size, message):
    with pytest.raises(ValueError, match=message):
        split_cells(n_cells, train_size, validation_size, 0)


@pytest.mark.parametrize(
    ("n", "shape"),
    [(12, (3, 4)), (13, (4, 4)), (5, (1, 5)), (3, (1, 3)), (100, (1, 128)), (257, (3, 128))],
    ids=["exact", "last one wraps", "one batch", "smallest", "fewer cells than the batch", "wraps by almost a batch"],
)
def test_every_cell_comes_once_before_any_comes_again(n, shape):
    cells = np.arange(n) * 7 + 2
    order = epoch_order(cells, shape, seed=0, epoch=0)
    assert order.shape == shape
    flat = order.ravel()
    np.testing.assert_array_equal(np.sort(flat[:n]), cells)
    np.testing.assert_array_equal(flat[n:], np.resize(flat[:n], flat.size)[n:])


def test_order_is_decided_by_seed_and_epoch():
    cells = np.arange(200)
    orders = [epoch_order(cells, (2, 100), seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    np.testing.assert_array_equal(orders[0], orders[3])
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert not np.array_equal(orders[i], orders[j])


def test_split_and_order_of_one_seed_are_unrelated():
    # If the first epoch followed the permutation of the split, training cells would come in its order.
    split = np.random.default_rng([0, 0]).permutation(1000)
    order = epoch_order(np.arange(1000), (1, 1000), seed=0, epoch=0).ravel()
    # correlation of independent permutations has standard deviation 0.03
    assert abs(np.corrcoef(split, order)[0, 1]) < 0.2


def test_a_shorter_stream_goes_round_and_each_cell_comes_as_often():
    cells = np.arange(10) + 3
    order = epoch_order(cells, (4, 8), seed=0, epoch=0, stream=1).ravel()
    for first in range(0, 30, 10):  # every round is an order of its own
        np.testing.assert_array_equal(np.sort(order[first : first + 10]), cells)
    assert not np.array_equal(order[:10], order[10:20])
    assert not np.array_equal(order[:10], epoch_order(cells, (1, 10), seed=0, epoch=0).ravel())


def test_some_of_each_label():
    labels = np.repeat([0, 1, 2, -1], [50, 4, 7, 20])
    cells = np.flatnonzero(labels >= 0)
    drawn = [some_of_each_label(cells, labels, 5, seed=0, epoch=epoch) for epoch in range(2)]
    for some in drawn:
        np.testing.assert_array_equal(np.bincount(labels[some]), [5, 4, 5])
        assert len(np.unique(some)) == len(some)
    assert not np.array_equal(*drawn)  # every epoch draws its own
    np.testing.assert_array_equal(some_of_each_label(cells, labels, None, 0, 0), cells)


# ---- orders of cells that are read block by block ------------------------------------------------------------------

# Cells, of which all but every seventh are trained on; cells of a step; blocks; cells of a chunk. Odd on purpose.
STREAMED = [
    (5000, 128, 4, 50),
    (5000, 128, 4, 7),
    (4999, 120, 3, 33),
    (1001, 6, 10, 1),
    (1001, 7, 10, 13),
    (997, 64, 100, 5),  # more blocks than steps
    (300, 16, 2, 1000),  # fewer cells than a chunk
    (60, 128, 3, 4),  # fewer cells than a step
    (8, 8, 1, 3),
    (5, 3, 2, 2),
    (640, 64, 5, 64),  # everything comes out even
]


def streamed(n_cells, batch_size, n_blocks, chunk, seed=0, epoch=0):
    """The positions of the cells, their order, and the step with which each block begins."""
    cells = np.flatnonzero(np.arange(n_cells) % 7 > 0)
    blocks = Blocks(n_blocks, chunk)
    steps = math.ceil(len(cells) / batch_size)
    return cells, epoch_order(cells, (steps, batch_size), seed, epoch, blocks=blocks), blocks.steps(steps)


@pytest.mark.parametrize("sizes", STREAMED, ids=str)
def test_of_blocks_every_cell_comes_once_and_the_last_step_is_filled_up(sizes):
    cells, order, bounds = streamed(*sizes)
    values, times = np.unique(order, return_counts=True)
    np.testing.assert_array_equal(values, cells)
    filled = order.size - len(cells)
    assert filled < sizes[1]
    assert times.sum() - len(cells) == filled
    if filled <= len(cells):
        assert times.max() <= 2
    again = values[times > 1]
    assert np.isin(again, order[bounds[-2] :]).all()  # what fills up comes in the last block
    assert (np.diff(bounds) > 0).all()
    assert (bounds[0], bounds[-1]) == (0, len(order))
    assert np.diff(bounds).max() - np.diff(bounds).min() <= 1  # blocks are alike, so that one has room for all


@pytest.mark.parametrize("sizes", STREAMED, ids=str)
def test_the_steps_of_a_block_need_the_cells_of_few_chunks(sizes):
    chunk = sizes[3]
    cells, order, bounds = streamed(*sizes)
    n_chunks = len(np.unique(cells // chunk))
    read = [len(np.unique(order[first:stop] // chunk)) for first, stop in pairwise(bounds)]
    # Chunks lie one after the other, and each end of a block cuts one in two. What fills up comes from the first ones,
    # which hold six of seven cells or, at the edge, fewer.
    filled = order.size - len(cells)
    of_filling = 0 if filled == 0 else math.ceil(filled / max(1, chunk * 6 // 7 - 1)) + 2
    assert sum(read) <= n_chunks + len(read) - 1 + min(of_filling, n_chunks)


def test_cells_of_a_block_are_mixed_and_blocks_are_not():
    cells = np.arange(4000)
    order = epoch_order(cells, (40, 100), 0, 0, blocks=Blocks(4, 50))
    chunks = [np.unique(order[first : first + 10] // 50) for first in range(0, 40, 10)]
    assert sorted(np.concatenate(chunks)) == list(range(80))
    # The step of 100 cells sees about as many of the 20 chunks of its block as 100 draws of cells would: 8 lanes of
    # 2.5 chunks, of each of which 12 cells are drawn.
    assert min(len(np.unique(step // 50)) for step in order) >= 14
    assert not np.array_equal(np.sort(order[0]), order[0])


def test_order_of_blocks_is_decided_by_seed_and_epoch():
    orders = [streamed(1001, 16, 5, 20, *of)[1] for of in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    np.testing.assert_array_equal(orders[0], orders[3])
    first = [frozenset(order[: len(order) // 5].ravel() // 20) for order in orders]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert not np.array_equal(orders[i], orders[j])
        assert first[i] != first[j]  # other chunks, not only another order within them


@pytest.mark.parametrize("n_processes", [2, 4, 8])
@pytest.mark.parametrize("sizes", [sizes for sizes in STREAMED if sizes[1] % 8 == 0 and sizes[0] > 60], ids=str)
def test_processes_read_other_chunks(sizes, n_processes):
    chunk, n_columns = sizes[3], sizes[1] // n_processes
    cells, order, bounds = streamed(*sizes)
    for first, stop in pairwise(bounds):
        processes = order[first:stop].reshape(stop - first, n_processes, n_columns).swapaxes(0, 1)
        chunks = [np.unique(of_one // chunk) for of_one in processes]
        # Each border between two processes cuts one chunk in two; what fills up the last step comes once more.
        allowed = n_processes - 1
        if stop == len(order) and order.size > len(cells):
            allowed += len(chunks[-1])
        assert sum(map(len, chunks)) <= len(np.unique(order[first:stop] // chunk)) + allowed
        assert stop == len(order) or len(np.unique(processes)) == processes.size


@pytest.mark.parametrize(("n_cells", "shape"), [(10, (4, 8)), (1, (3, 4)), (31, (16, 8)), (129, (4, 96))])
def test_of_blocks_a_shorter_stream_goes_round(n_cells, shape):
    cells = np.arange(n_cells) * 3 + 1
    orders = [epoch_order(cells, shape, 0, 0, stream, Blocks(2, 4)) for stream in (1, 2)]
    for order in orders:
        _, times = np.unique(order, return_counts=True)
        assert len(times) == n_cells
        assert times.max() - times.min() <= 1  # each as often as any other, or once more
    assert n_cells == 1 or not np.array_equal(*orders)


def test_orders_of_blocks_of_all_sizes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n_cells, batch_size = rng.integers(3, 400), rng.integers(2, 140)
        n_blocks, chunk = rng.integers(1, 12), rng.integers(1, 60)
        cells = np.sort(rng.choice(2 * n_cells, n_cells, replace=False))
        steps = math.ceil(n_cells / batch_size)
        order = epoch_order(cells, (steps, batch_size), 1, 2, blocks=Blocks(int(n_blocks), int(chunk)))
        values, times = np.unique(order, return_counts=True)
        np.testing.assert_array_equal(values, cells)
        assert times.max() <= math.ceil(order.size / n_cells)
        assert times.sum() - n_cells < batch_size
