from __future__ import annotations

from copy import deepcopy

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scvi_ext as sx

# What each read-out of cells writes for the fit "scvi".
SLOTS = {
    "get_latent": [("obsm", "X_scvi")],
    "get_normalized_expression": [("layers", "scvi_normalized")],
    "get_likelihood_parameters": [("layers", "scvi_mean"), ("layers", "scvi_dropout"), ("var", "scvi_dispersion")],
    "get_library_size": [("obs", "scvi_library_size")],
    "get_elbo": [("obs", "scvi_elbo")],
    "get_reconstruction_error": [("obs", "scvi_reconstruction_error")],
    "get_marginal_ll": [("obs", "scvi_marginal_ll")],
}
MEANS = ("get_elbo", "get_reconstruction_error", "get_marginal_ll")  # return a number by default


def call(name: str, adata: ad.AnnData, **options) -> ad.AnnData | None:
    """The read-out, so that it writes one value per cell, with few samples."""
    if name in MEANS:
        options = {"return_mean": False} | options
    if name == "get_marginal_ll":
        options = {"n_mc_samples": 10} | options
    return getattr(sx.tl, name)(adata, **options)


def written(name: str, adata: ad.AnnData) -> np.ndarray:
    """What the read-out wrote for each cell, as one matrix."""
    slots = [np.asarray(getattr(adata, slot)[key]) for slot, key in SLOTS[name] if slot != "var"]
    return np.concatenate([values.reshape(adata.n_obs, -1) for values in slots], axis=1)


@pytest.fixture
def read():
    """``read(name, adata, **options)``: what a read-out writes for each cell; ``adata`` stays as it is."""

    def read(name: str, adata: ad.AnnData, **options) -> np.ndarray:
        return written(name, call(name, adata, copy=True, **options))

    return read


@pytest.fixture
def write():
    """``write(name, adata, **options)``: the read-out itself, so that it writes into ``adata``."""
    return call


@pytest.fixture(params=SLOTS)
def readout(request) -> str:
    """The name of a read-out; the test runs for all of them."""
    return request.param


@pytest.fixture
def with_genes():
    """``with_genes(adata, names)``: the same cells with these genes, unknown ones without counts."""

    def with_genes(adata: ad.AnnData, names: list[str]) -> ad.AnnData:
        position = {name: i for i, name in enumerate(adata.var_names)}
        x = adata.X.toarray()
        columns = [x[:, position[name]] if name in position else np.zeros(adata.n_obs, np.float32) for name in names]
        return ad.AnnData(
            np.stack(columns, axis=1),
            obs=adata.obs.copy(),
            var=pd.DataFrame(index=names),
            uns=deepcopy(dict(adata.uns)),
        )

    return with_genes
