"""A critic that watches z: batches mix, cell types stay, and everything else goes on as without one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

import scvi_ext as sx


def judged(adata, model, **options):
    """Mixing of batches among 30 neighbours, and silhouette of the cell types."""
    sx.tl.fit(adata, model, n_hidden=32, n_latent=5, seed=0, progress=False, **options)
    sx.tl.get_latent(adata)
    z = adata.obsm[f"X_{model}"]
    neighbors = sx.metrics.arrays.nearest_neighbors(z, 30)
    mixing = sx.metrics.arrays.entropy_batch_mixing(neighbors, adata.obs["batch"].to_numpy())
    return mixing, silhouette_score(z, adata.obs["cell_type"])


@pytest.mark.parametrize(("model", "n_cells"), [("scvi", 300), ("ldvae", 600)])
def test_batches_mix_better_and_cell_types_stay(make_counts, model, n_cells):
    adata = make_counts(n_cells, 200)
    sx.pp.setup_anndata(adata, batch_key="batch")
    mixing, silhouette = judged(adata, model)
    with_critic, of_types = judged(adata, model, adversarial_mixing=3)
    assert with_critic > mixing + 0.1
    assert of_types > silhouette - 0.02


def test_a_type_that_one_batch_has_alone_stays_a_type(make_counts):
    adata = make_counts(900, 200)
    adata = adata[(adata.obs["cell_type"] != "t2") | (adata.obs["batch"] == "b0")].copy()
    sx.pp.setup_anndata(adata, batch_key="batch")
    judged(adata, "scvi", adversarial_mixing=3)
    neighbors = sx.metrics.arrays.nearest_neighbors(adata.obsm["X_scvi"], 15)
    assert sx.metrics.arrays.knn_purity(neighbors, adata.obs["cell_type"].to_numpy()) > 0.98


def test_it_begins_as_the_fit_without(make_counts):
    """As long as the KL divergence has no weight, z is not told to mix: the critic learns, and nothing else notices."""
    adata = make_counts()
    sx.pp.setup_anndata(adata, batch_key="batch")
    options = {"n_hidden": 16, "n_latent": 4, "max_epochs": 1, "batch_size": 181, "progress": False}  # one step
    sx.tl.fit(adata, key_added="without", kl_warmup=1, **options)
    sx.tl.fit(adata, key_added="with", kl_warmup=1, adversarial_mixing=3, **options)
    without, with_ = (adata.uns["scvi_ext"]["fits"][key]["state"] for key in ("without", "with"))
    assert {name.split(".")[0] for name in with_.keys() - without.keys()} == {"critic"}
    for name, value in without.items():
        np.testing.assert_array_equal(with_[name], value, err_msg=name)


def test_the_fit_travels_with_its_critic(make_counts, tmp_path):
    adata = make_counts()
    sx.pp.setup_anndata(adata, batch_key="batch")
    sx.tl.fit(adata, adversarial_mixing=3, n_hidden=16, n_latent=4, max_epochs=3, progress=False)
    sx.io.write_model(adata, tmp_path / "model")
    other = make_counts()
    sx.io.read_model(tmp_path / "model", adata=other)
    for cells in (adata, other):
        sx.tl.get_latent(cells)
    np.testing.assert_array_equal(other.obsm["X_scvi"], adata.obsm["X_scvi"])


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "adversarial_mixing=-1 must be from 0 to 100."),
        (1e6, ValueError, "adversarial_mixing=1000000.0 must be from 0 to 100."),
        (10**400, ValueError, "must be from 0 to 100"),
        ("on", TypeError, "adversarial_mixing='on'"),
        (True, TypeError, "adversarial_mixing=True"),
    ],
)
def test_impossible_weights_change_nothing(registered, value, error, message):
    before = registered.copy()
    with pytest.raises(error, match=message):
        sx.tl.fit(registered, adversarial_mixing=value)
    assert registered.uns.keys() == before.uns.keys()


def test_there_must_be_batches_to_mix(counts):
    sx.pp.setup_anndata(counts)
    with pytest.raises(ValueError, match=r"^adversarial_mixing=3 has no effect: there is one batch"):
        sx.tl.fit(counts, adversarial_mixing=3)
