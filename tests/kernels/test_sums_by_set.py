"""Sums of counts over sets of cells, against a matrix product."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scvi_ext.kernels.sparse import sums_by_set


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
