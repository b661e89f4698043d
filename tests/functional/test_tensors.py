from __future__ import annotations

import math

import pytest
import torch
from _tolerances import FLOAT64
from torch.testing import assert_close

from scvi_ext.functional.tensors import broadcast_labels, enumerate_discrete, iterate, logsumexp, one_hot

EYE = torch.eye(3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_hot(dtype, shape):
    codes = torch.tensor([2, 0, 0, 1])
    indicators = one_hot(codes.reshape(shape).to(dtype), 3)
    assert indicators.dtype == torch.float32
    assert torch.equal(indicators, EYE[codes])


def test_one_hot_leaves_room_for_absent_categories():
    assert torch.equal(one_hot(torch.tensor([0, 1]), 3), EYE[:2])


@pytest.mark.parametrize("code", [3, -1])
def test_one_hot_refuses_what_is_no_code(code):
    with pytest.raises(RuntimeError, match="out of bounds"):
        one_hot(torch.tensor([code]), 3)


def test_enumerate_discrete_goes_label_by_label():
    labels = enumerate_discrete(torch.zeros(2, 7), 3)
    assert torch.equal(labels, EYE[[0, 0, 1, 1, 2, 2]])


def test_known_labels_are_encoded_and_nothing_is_repeated():
    x, z = torch.randn(4, 2), torch.randn(4, 5)
    y, *others = broadcast_labels(torch.tensor([[2], [0], [0], [1]]), x, None, z, n_broadcast=3)
    assert torch.equal(y, EYE[[2, 0, 0, 1]])
    assert others[0] is x
    assert others[1] is None
    assert others[2] is z


def test_unknown_labels_are_enumerated_for_every_cell():
    x, codes = torch.randn(2, 4), torch.tensor([7, 8])
    y, xs, nothing, repeated = broadcast_labels(None, x, None, codes, n_broadcast=3)
    assert torch.equal(y, EYE[[0, 0, 1, 1, 2, 2]])
    assert torch.equal(xs, torch.cat([x, x, x]))
    assert nothing is None
    assert torch.equal(repeated, torch.tensor([7, 8, 7, 8, 7, 8]))


def test_both_branches_give_the_same_type():
    x = torch.randn(2, 4)
    known, unknown = (broadcast_labels(y, x, n_broadcast=3)[0] for y in (torch.tensor([0, 2]), None))
    assert known.dtype == unknown.dtype == torch.float32


def test_broadcast_labels_needs_a_tensor_that_tells_the_number_of_cells():
    with pytest.raises(ValueError, match="broadcast_labels needs at least one tensor besides y"):
        broadcast_labels(None, n_broadcast=3)


def test_iterate_reaches_into_nested_lists_and_tuples():
    assert iterate([1, (2, [3, None]), None], lambda v: 10 * v) == [10, (20, [30, None]), None]
    assert iterate(4, lambda v: 10 * v) == 40
    assert iterate(None, lambda v: 10 * v) is None


def test_logsumexp():
    values = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    naive = torch.log(torch.exp(values).sum(1))
    assert_close(logsumexp(values, 1), naive, **FLOAT64)
    assert_close(logsumexp(values, dim=1, keepdim=True), naive.unsqueeze(1), **FLOAT64)
    assert_close(logsumexp(values, (0, 2)), torch.log(torch.exp(values).sum((0, 2))), **FLOAT64)
    out = torch.empty(4, 6, dtype=torch.float64)
    assert logsumexp(values, 1, out=out) is out
    assert_close(out, naive, **FLOAT64)


@pytest.mark.parametrize("offset", [1e5, -1e5])
def test_logsumexp_does_not_overflow_or_vanish(offset):
    values = torch.tensor([offset, offset], dtype=torch.float64)
    assert_close(logsumexp(values, 0).item(), offset + math.log(2), **FLOAT64)


def test_logsumexp_of_impossible_entries():
    assert logsumexp(torch.tensor([-math.inf, 3.0]), 0) == 3
    assert logsumexp(torch.tensor([-math.inf, -math.inf]), 0) == -math.inf
