from __future__ import annotations

import numpy as np
import pytest

from scvi_ext.data.sampler import epoch_order, some_of_each_label, split_cells


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
