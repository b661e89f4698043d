from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import issparse


@pytest.fixture(params=["h5ad", "zarr"])
def roundtrip(request, tmp_path):
    """Write an AnnData in one of the formats that scanpy users keep, and read it again."""

    def write_and_read(adata):
        path = tmp_path / f"adata.{request.param}"
        with warnings.catch_warnings():
            # anndata 0.12 announces here that it will write another version of zarr by default
            warnings.filterwarnings("ignore", message="Writing zarr v2 data", category=UserWarning)
            getattr(adata, f"write_{request.param}")(path)
        return getattr(anndata, f"read_{request.param}")(path)

    return write_and_read


@pytest.fixture(name="assert_same")
def assert_same_fixture():
    """Compare two AnnData, or two of the things that one holds: same values, types and names."""
    return assert_same


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, anndata.AnnData):
        for slot in ("X", "obs", "var"):
            assert_same(getattr(a, slot), getattr(b, slot))
        for slot in ("layers", "obsm", "varm", "uns"):
            assert_same(dict(getattr(a, slot)), dict(getattr(b, slot)))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    elif issparse(a):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a != b).nnz == 0
    else:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
