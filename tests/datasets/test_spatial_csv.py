"""The parser on a small table like those of the authors: spots x genes, a spot named by its place."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pandas as pd
import pytest

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._spatial_csv")

SPOTS = ["17.907x4.967", "18.965x5.003", "16.98x10", "20x31.1"]
X = np.array([[1, 1, 0], [7, 0, 1], [5, 0, 29], [0, 2, 0]])
both = pytest.mark.parametrize(
    ("function", "name"), [(sx.datasets.breast_cancer, "_BREAST_CANCER"), (sx.datasets.mouse_ob, "_MOUSE_OB")]
)


def table(x=X, spots=SPOTS, genes=("GAPDH", "USP4", "NA")) -> bytes:
    return pd.DataFrame(x, index=spots, columns=list(genes)).to_csv(sep="\t").encode()


@both
def test_counts_and_places(function, name, offer, roundtrip, assert_same):
    offer(module, name, table(), (4, 3))
    adata = function()
    np.testing.assert_array_equal(adata.X.toarray(), X)
    assert (adata.X.format, adata.X.dtype) == ("csr", np.float32)
    assert list(adata.obs_names) == SPOTS
    assert list(adata.var_names) == ["GAPDH", "USP4", "NA"]
    places = [[17.907, 4.967], [18.965, 5.003], [16.98, 10], [20, 31.1]]
    np.testing.assert_array_equal(adata.obsm["spatial"], places)  # as Python reads them
    assert_same(roundtrip(adata), adata)
    sx.pp.setup_anndata(adata)


@both
def test_spots_without_counts_are_left_out(function, name, offer):
    offer(module, name, table(X * [[1], [0], [1], [1]]))
    adata = function()
    assert list(adata.obs_names) == [SPOTS[0], *SPOTS[2:]]
    np.testing.assert_array_equal(adata.obsm["spatial"][1], [16.98, 10])
    sx.pp.setup_anndata(adata)


@both
def test_spots_with_other_names(function, name, offer):
    offer(module, name, table(spots=["17.907x4.967", "spot 2", "16.98_10", "20x31.1"]))
    with pytest.raises(ValueError, match=r"not named by x and y, like '16.92x9.015': 'spot 2', '16.98_10'"):
        function()


def test_another_number_of_spots(offer):
    offer(module, "_MOUSE_OB", table(), (262, 16218))
    with pytest.raises(ValueError, match="has 4 cells and 3 genes, expected 262 cells and 16218 genes"):
        sx.datasets.mouse_ob()
