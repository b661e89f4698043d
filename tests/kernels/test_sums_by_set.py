"""Passes over all counts: sums over sets of cells, against a matrix product, and whether they are counts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scvi_ext.kernels.sparse import all_counts, sums_by_set


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n_cells", [1, 7, 200])
def test_they_are_products_with_the_members_of_the_sets(n_threads, n_cells):
    rng = np.random.default_rng(0)
    # zeros are stored too
    counts = sp.random(n_cells, 30, 0.3, "csr", np.float32, rng, lambda n: rng.integers(0, 5, n))
    sets, per_cell = rng.integers(0, 4, n_cells), rng.random(n_cells)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        found = sums_by_set(counts, sets, per_cell, 5)
    finally:
        torch.set_num_threads(before)
    members, dense = np.eye(5)[sets].T, counts.toarray().astype(float)
    expected = [members @ dense, members @ (dense * per_cell[:, None]), members @ (dense > 0)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_what_is_no_count_is_found_wherever_it_is(n_threads):
    counts, before = np.arange(101, dtype=np.float32), torch.get_num_threads()
    counts[:3] = 2**24, 0, -0.0
    try:
        torch.set_num_threads(n_threads)
        assert all_counts(counts, 2**24)
        assert all_counts(counts[:0], 2**24)
        for wrong in (np.nan, np.inf, -np.inf, -1, 0.5, 1e-40, 2**24 + 2):
            for place in (0, 49, 50, 100):
                values = counts.copy()
                values[place] = wrong
                assert not all_counts(values, 2**24), (wrong, place)
    finally:
        torch.set_num_threads(before)
