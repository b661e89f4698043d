from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import scvi_ext as sx

COLUMNS = ["model", "genes", "parameters", "epochs", "stop_reason", "elbo_validation", "resumable", "last"]


def test_fits_is_a_table_with_one_row_per_fit(fitted):
    sx.tl.fit(fitted, key_added="a", n_hidden=8, n_latent=2, max_epochs=5, train_size=1.0, checkpoint=True)
    table = sx.get.fits(fitted)
    assert list(table.index) == ["a", "ldvae", "scvi"]
    assert table.index.name == "key"
    assert list(table.columns) == COLUMNS
    assert table["model"].tolist() == ["scvi", "ldvae", "scvi"]
    assert table["genes"].tolist() == [60, 60, 60]
    assert table["epochs"].tolist() == [5, 3, 3]
    assert table["resumable"].tolist() == [True, False, False]
    assert table["last"].tolist() == [True, False, False]
    assert np.isnan(table.loc["a", "elbo_validation"])
    assert table.loc["scvi", "elbo_validation"] == sx.get.history(fitted, "scvi")["elbo_validation"].iloc[-1]
    for key in table.index:
        tensors = sx.get.model(fitted, key).state_dict().values()
        assert table.loc[key, "parameters"] == sum(tensor.numel() for tensor in tensors)


def test_fits_is_empty_where_nothing_is_fitted(counts, registered):
    for adata in (counts, registered):
        table = sx.get.fits(adata)
        assert table.empty
        assert list(table.columns) == COLUMNS


def test_history_is_a_copy(fitted):
    sx.get.history(fitted)["elbo_train"] = 0
    assert (sx.get.history(fitted)["elbo_train"] < 0).all()
    assert sx.get.history(fitted, "ldvae").shape == sx.get.history(fitted).shape
    assert sx.get.history(fitted).index.tolist() == [1, 2, 3]
    assert sx.get.history(fitted).index.name == "epoch"


def test_loadings_are_those_that_are_written(fitted):
    table = sx.get.loadings_df(fitted, "ldvae")
    assert list(table.columns) == ["Z_0", "Z_1", "Z_2", "Z_3"]
    assert table.index.equals(fitted.var_names)
    assert (table.dtypes == np.float32).all()
    sx.tl.get_loadings(fitted, key="ldvae")
    np.testing.assert_array_equal(table, fitted.varm["ldvae_loadings"])
    with pytest.raises(
        ValueError, match="not possible with a 'scvi' fit, which has no 'get_loadings'; models that have it: 'ldvae'"
    ):
        sx.get.loadings_df(fitted)


def test_model_is_the_module_ready_to_be_used(fitted):
    module = sx.get.model(fitted)
    assert isinstance(module, sx.models.VAE)
    assert isinstance(sx.get.model(fitted, "ldvae"), sx.models.LDVAE)
    assert not module.training
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    saved = fitted.uns["scvi_ext"]["fits"]["scvi"]["state"]
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(tensor, saved[name])
    module(torch.ones(5, 60), batch_index=torch.zeros(5))


def test_changing_the_module_does_not_change_the_fit(fitted):
    with torch.no_grad():
        for parameter in sx.get.model(fitted).parameters():
            parameter.zero_()
    assert np.abs(fitted.uns["scvi_ext"]["fits"]["scvi"]["state"]["z_encoder.mean_encoder.weight"]).max() > 0


def test_the_module_can_be_trained_further(fitted):
    module = sx.get.model(fitted).train()
    loss = sum(part.sum() for part in module(torch.ones(5, 60), batch_index=torch.zeros(5)))
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_setup_is_a_table(registered):
    table = sx.get.setup(registered)
    assert table[["field", "slot", "key"]].to_numpy().tolist() == [["counts", "X", "X"], ["batch", "obs", "batch"]]
    assert table["n_categories"].tolist() == [pd.NA, 3]
    assert table["categories"].tolist() == ["", "b0, b1, b2"]


@pytest.mark.parametrize("read", [sx.get.history, sx.get.model, sx.get.loadings_df], ids=lambda f: f.__name__)
def test_an_unknown_fit_is_refused_with_those_there_are(fitted, registered, read):
    with pytest.raises(KeyError, match=r"'nope' is not in .*which has: 'ldvae', 'scvi'"):
        read(fitted, "nope")
    with pytest.raises(KeyError, match="has no fits: call"):
        read(registered)


@pytest.mark.parametrize(
    "read", [sx.get.history, sx.get.model, sx.get.setup, sx.get.fits, lambda a: sx.get.loadings_df(a, "ldvae")]
)
def test_reading_changes_nothing(fitted, read):
    before = fitted.copy()
    read(fitted)
    assert before.uns["scvi_ext"].keys() == fitted.uns["scvi_ext"].keys()
    assert set(fitted.obsm) == set(fitted.layers) == set(fitted.varm) == set()
    pd.testing.assert_frame_equal(before.obs, fitted.obs)
