"""Normalisation, ReLU and dropout in one kernel: against torch in float64, and against published random bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _tolerances import FLOAT32, N_STANDARD_ERRORS
from numba import njit
from torch.testing import assert_close

from scvi_ext.kernels import hidden
from scvi_ext.nn.layers import FCLayers

U8 = np.uint64


def norms(n):
    """The same normalisation twice, in float32 and in float64."""
    norm = torch.nn.BatchNorm1d(n, momentum=0.01, eps=0.001)
    with torch.no_grad():
        norm.weight.normal_(1, 0.5)
        norm.bias.normal_()
    exact = torch.nn.BatchNorm1d(n, momentum=0.01, eps=0.001).double()
    exact.load_state_dict(norm.state_dict())
    return norm, exact


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(2, 1), (5, 3), (37, 128), (130, 77)], ids=str)
def test_value_gradients_and_running_statistics(shape, p):
    torch.manual_seed(0)
    norm, exact = norms(shape[1])
    x = (3 * torch.randn(shape) + 5).requires_grad_()
    there, d_y = x.detach().double().requires_grad_(), torch.randn(shape)
    for _ in range(3):
        torch.manual_seed(1)
        y = hidden.activate(x, norm, p)
        torch.manual_seed(1)
        factors = hidden.dropout_factors(shape, p).double()
        expected = torch.relu(exact(there)) * factors
        assert_close(y.double(), expected, **FLOAT32)
    found = torch.autograd.grad(y, [x, norm.weight, norm.bias], d_y)
    expected = torch.autograd.grad(expected, [there, exact.weight, exact.bias], d_y.double())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= FLOAT32["rtol"] * max(float(b.abs().max()), 1.0)
    for a, b in zip(norm.buffers(), exact.buffers(), strict=True):
        assert_close(a, b.to(a.dtype), **FLOAT32)


def test_units_far_from_zero_keep_their_digits():
    torch.manual_seed(0)
    norm, exact = norms(4)
    x = 1e4 + torch.randn(50, 4)
    assert_close(hidden.activate(x, norm, 0.0).double(), torch.relu(exact(x.double())), **FLOAT32)


def test_what_is_not_a_number_shows():
    norm, _ = norms(3)
    x = torch.randn(6, 3)
    x[2, 1] = torch.nan
    y = hidden.activate(x, norm, 0.0)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


def test_everything_can_be_dropped():
    assert not hidden.dropout_factors((6, 5), 1.0).any()
    assert not hidden.activate(torch.randn(6, 3), norms(3)[0], 1.0).any()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_shares_and_sizes_of_what_is_dropped(p):
    torch.manual_seed(0)
    factors = hidden.dropout_factors((3, 301, 127), p)
    dropped = factors == 0
    assert_close(factors[~dropped], torch.full_like(factors[~dropped], 1 / (1 - p)))
    by_row, by_column, n = dropped.float().mean(-1), dropped.float().mean((0, 1)), dropped.numel()
    for share, size in ((dropped.float().mean(), n), (by_row, 127), (by_column, 3 * 301)):
        assert (share - p).abs().max() <= (N_STANDARD_ERRORS + 1) * (p * (1 - p) / size) ** 0.5
    other = hidden.dropout_factors((3, 301, 127), p) == 0  # the next draw has nothing to do with this one
    both = (dropped & other).float().mean()
    assert (both - p * p).abs() <= N_STANDARD_ERRORS * (p * p * (1 - p * p) / n) ** 0.5


def test_drops_belong_to_the_generator_and_to_places():
    found = []
    for n_columns in (5, 5, 8):
        torch.manual_seed(3)
        found.append(hidden.dropout_factors((6, n_columns), 0.5))
        state = torch.get_rng_state()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2][:, :5])
    torch.manual_seed(3)
    hidden.dropout_factors((600, 700), 0.5)
    assert torch.equal(state, torch.get_rng_state())  # so a run goes on alike, however large its layers


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_drops_do_not_depend_on_threads(n_threads):
    before = torch.get_num_threads()
    torch.manual_seed(0)
    expected = hidden.dropout_factors((33, 65), 0.3)
    torch.set_num_threads(n_threads)
    try:
        torch.manual_seed(0)
        assert torch.equal(hidden.dropout_factors((33, 65), 0.3), expected)
    finally:
        torch.set_num_threads(before)


# Known answers of Random123, of its file kat_vectors: counter, key, bits.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """Philox 4x32-10 in Python's own numbers."""
    a, b, c, d = counter
    key = list(key)
    for _ in range(10):
        ab, cd = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (cd >> 32) ^ b ^ key[0], cd & 0xFFFFFFFF, (ab >> 32) ^ d ^ key[1], ab & 0xFFFFFFFF
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "bits"), KNOWN)
def test_philox_has_the_published_answers(counter, key, bits):
    assert philox(counter, key) == bits


def test_random_bits_are_those_of_philox():
    @njit
    def ours(row, column, seed):
        return hidden._philox(row, column, seed)

    rng = np.random.default_rng(0)
    for row, column in [(0, 0), (2**32 - 1, 2**32 - 1), *rng.integers(2**32, size=(50, 2)).tolist()]:
        seed = int(rng.integers(2**63))
        found = ours(U8(row), U8(column), U8(seed))
        assert tuple(map(int, found)) == philox((row, column, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))


def test_factors_are_made_of_the_bits_of_their_places():
    torch.manual_seed(5)
    factors = hidden.dropout_factors((7, 3), 0.25).numpy()
    torch.manual_seed(5)
    seed = torch.empty((), dtype=torch.int64).random_().item()
    for i in range(7):
        for j in range(3):
            bits = philox((i - i % 4, j, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[i % 4]
            assert factors[i, j] == (0 if bits < 0.25 * 2**32 else np.float32(1 / 0.75))


@pytest.mark.parametrize("options", [{}, {"use_layer_norm": True}, {"use_relu": False}, {"use_batch_norm": False}])
def test_layers_say_the_same_in_float64_which_has_no_kernel(options):
    torch.manual_seed(0)
    layers = FCLayers(6, 5, [3], n_layers=2, n_hidden=9, dropout_rate=0.3, **options)
    exact = FCLayers(6, 5, [3], n_layers=2, n_hidden=9, dropout_rate=0.3, **options).double()
    exact.load_state_dict(layers.state_dict())
    x, codes, found = torch.randn(20, 6), torch.randint(3, (20,)), []
    for module in (layers, exact):
        torch.manual_seed(1)
        y = module(x.to(module.layers[0].linear.weight.dtype), codes)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in module.parameters()), *module.buffers()])
    for a, b in zip(*found, strict=True):
        assert (a.double() - b).abs().max() <= 10 * FLOAT32["rtol"] * max(1.0, float(b.abs().max()))


def test_large_layers_are_left_to_torch_and_say_the_same(monkeypatch):
    torch.manual_seed(0)
    layers, x = FCLayers(6, 5, dropout_rate=0.3), torch.randn(20, 6)
    found = []
    for largest in (100, 99):
        monkeypatch.setattr(hidden, "_LARGEST", largest)
        assert hidden.takes(torch.randn(20, 5), layers.layers[0].batch_norm[0]) == (largest == 100)
        torch.manual_seed(1)
        found.append(layers(x))
    assert_close(*found, **FLOAT32)


def test_one_cell_is_refused_as_by_torch():
    layers = FCLayers(6, 5, dropout_rate=0.0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layers(torch.randn(1, 6))


def test_running_statistics_stay_where_the_normalisation_is_not_in_training():
    layers = FCLayers(6, 5, dropout_rate=0.0)
    layers.layers[0].batch_norm.eval()
    layers(torch.randn(8, 6))
    norm = layers.layers[0].batch_norm[0]
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(5))


def test_dropout_that_was_changed_or_turned_off_stays_so():
    torch.manual_seed(0)
    layers = FCLayers(6, 5, dropout_rate=0.5)
    x = torch.randn(200, 6)
    without = FCLayers(6, 5, dropout_rate=0.0)
    without.load_state_dict(layers.state_dict())
    layers.layers[0].rest[-1].p = 0.0
    assert torch.equal(layers(x), without(x))
    layers.layers[0].rest[-1].p = 0.5
    layers.layers[0].rest[-1].eval()
    assert torch.equal(layers(x), without(x))
