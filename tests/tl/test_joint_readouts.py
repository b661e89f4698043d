"""Read-outs of a fit of several data sets: imputed genes, what the critic takes cells for, parts of the loss."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pytest
import torch
from _tolerances import FLOAT32
from scipy.special import logsumexp

import scvi_ext as sx
from scvi_ext.data.blocks import Block
from scvi_ext.fitted import Fitted

TINY = {"n_latent": 4, "dim_hidden_encoder": 16, "max_epochs": 3, "progress": False}
GENES = {"a": slice(0, 45), "b": slice(20, 60), "c": slice(25, 35)}  # no data set has all of 60
CONFUSION, MAGNITUDE = "gimvi_discriminator_confusion", "gimvi_loss_magnitude"
_FITTED: dict[str, ad.AnnData] = {}


def fit(make_counts, **options) -> dict[str, ad.AnnData]:
    datasets = {}
    for seed, (name, genes) in enumerate(GENES.items()):
        datasets[name] = make_counts(n_cells=60 + 20 * seed, seed=seed)[:, genes].copy()
        sx.pp.setup_anndata(datasets[name], batch_key="batch", check="warn")
    sx.tl.fit(datasets, "gimvi", **TINY | options)
    return datasets


@pytest.fixture
def datasets(make_counts) -> dict[str, ad.AnnData]:
    """Three data sets with a fit, one of them with a latent library."""
    if not _FITTED:
        _FITTED.update(fit(make_counts, model_library_bools={"a": True, "b": False, "c": False}))
    return {name: adata.copy() for name, adata in _FITTED.items()}


def all_genes() -> list[str]:
    return [f"gene{i}" for i in range(60)]


def profile(adata: ad.AnnData, decode_mode: str) -> np.ndarray:
    """The decoder at the mean of z, normalised over the genes of a data set, from the weights alone.

    Its layer has a batch normalisation of each data set: that of the one that cells are decoded as.
    """
    sx.tl.get_latent(adata)
    state = adata.uns["scvi_ext"]["fits"]["gimvi"]["state"]
    layer = "decoder.px_decoder_final.layers.0"
    norm = f"{layer}.batch_norm.{list(GENES).index(decode_mode)}"
    z = adata.obsm["X_gimvi"].astype(np.float64)
    h = z @ state[f"{layer}.linear.weight"].T + state[f"{layer}.linear.bias"]
    h = (h - state[f"{norm}.running_mean"]) / np.sqrt(state[f"{norm}.running_var"] + 1e-3)
    h = np.maximum(h * state[f"{norm}.weight"] + state[f"{norm}.bias"], 0)
    logits = h @ state["decoder.px_scale_decoder.weight"].T + state["decoder.px_scale_decoder.bias"]
    return np.exp(logits - logsumexp(logits[:, GENES[decode_mode]], axis=1, keepdims=True))


# ---- imputation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENES)
def test_it_imputes_what_was_not_measured(datasets, name):
    adata = datasets[name]
    before = adata.copy()
    assert sx.tl.impute(adata) is None
    table = adata.obsm["gimvi_imputed"]
    assert list(table.columns) == [gene for gene in all_genes() if gene not in adata.var_names]
    assert (table.dtypes == np.float32).all()
    assert table.index.equals(adata.obs_names)
    assert set(adata.obsm) == {"gimvi_imputed"}
    assert list(adata.uns) == list(before.uns)
    assert (adata.X != before.X).nnz == 0


@pytest.mark.parametrize("name", GENES)
@pytest.mark.parametrize("decode_mode", [None, *GENES])
def test_it_is_the_profile_at_the_mean_of_z(datasets, name, decode_mode):
    adata = datasets[name]
    sx.tl.impute(adata, gene_list=all_genes(), decode_mode=decode_mode, library_size=1)
    expected = profile(adata, decode_mode or name)
    found = adata.obsm["gimvi_imputed"]
    np.testing.assert_allclose(found, expected, **FLOAT32)
    np.testing.assert_allclose(found.iloc[:, GENES[decode_mode or name]].sum(axis=1), 1, **FLOAT32)


def test_counts_are_at_the_depth_of_the_cell_or_at_one_for_all(datasets):
    for name in ("b", "c"):
        adata = datasets[name]
        sx.tl.impute(adata, gene_list=["gene0"])
        sx.tl.impute(adata, gene_list=["gene0"], library_size="latent", key_added="rate")
        scale = profile(adata, name)[:, :1]
        np.testing.assert_allclose(adata.obsm["gimvi_imputed"], 1e4 * scale, **FLOAT32)
        np.testing.assert_allclose(adata.obsm["rate"], np.asarray(adata.X.sum(1)) * scale, **FLOAT32)


def test_a_latent_library_is_taken_at_its_mean(datasets):
    adata = datasets["a"]
    sx.tl.impute(adata, gene_list=["gene50"], library_size="latent")
    fitted = Fitted.open(adata, "gimvi")
    block = Block(fitted.store, torch.device("cpu"))
    with torch.no_grad():
        ql = fitted.module.encode_library(block.minibatch(block.rows(np.arange(adata.n_obs))))
    expected = np.exp(ql.loc.numpy()) * profile(adata, "a")[:, [50]]
    np.testing.assert_allclose(adata.obsm["gimvi_imputed"], expected, **FLOAT32)


@pytest.mark.parametrize("library_size", [1e4, "latent"])
def test_samples_are_those_of_the_normalised_expression(datasets, library_size):
    adata = datasets["a"]
    options = {"gene_list": ["gene3", "gene30"], "library_size": library_size, "n_samples": 3, "seed": 5}
    sx.tl.impute(adata, **options)
    sx.tl.get_normalized_expression(adata, **options)
    np.testing.assert_allclose(adata.obsm["gimvi_imputed"], adata.obsm["gimvi_normalized"], **FLOAT32)
    other = sx.tl.impute(adata, **options | {"seed": 6}, copy=True).obsm["gimvi_imputed"]
    assert not np.allclose(other, adata.obsm["gimvi_imputed"])


def test_where_the_decoder_sees_the_batch_those_of_the_other_data_set_are_averaged(make_counts):
    adata = fit(make_counts, n_layers_decoder_individual=1, n_layers_decoder_shared=1)["c"]
    sx.tl.impute(adata, decode_mode="a", library_size=1)
    fitted = Fitted.open(adata, "gimvi")
    block = Block(fitted.store, torch.device("cpu"))
    cells = block.minibatch(block.rows(np.arange(adata.n_obs)))
    with torch.no_grad():
        z = fitted.module.encode(cells).loc
        scales = [
            fitted.module.decode_joint(z, cells._replace(batch_index=torch.full((adata.n_obs,), batch)), 0).scale
            for batch in range(3)  # of the first data set; those of this one are 6, 7 and 8
        ]
    assert cells.batch_index.min() == 6
    assert not np.allclose(scales[0], scales[1])
    unmeasured = ~np.isin(fitted.fit.joint["genes"], adata.var_names)
    np.testing.assert_allclose(adata.obsm["gimvi_imputed"], torch.stack(scales).mean(0)[:, unmeasured], **FLOAT32)


@pytest.mark.parametrize("n_samples", [0, 2])
def test_neither_batch_size_nor_company_nor_order_matter(datasets, n_samples):
    adata = datasets["b"]
    expected = sx.tl.impute(adata, n_samples=n_samples, copy=True).obsm["gimvi_imputed"]
    in_small = sx.tl.impute(adata, n_samples=n_samples, batch_size=7, copy=True).obsm["gimvi_imputed"]
    np.testing.assert_allclose(in_small, expected, **FLOAT32)
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)]
    of_view = sx.tl.impute(shuffled, n_samples=n_samples, copy=True).obsm["gimvi_imputed"]
    np.testing.assert_allclose(of_view, expected, **FLOAT32)
    if not n_samples:  # samples are drawn in the order of the cells
        alone = sx.tl.impute(adata[[11]], copy=True).obsm["gimvi_imputed"]
        np.testing.assert_allclose(alone, expected.iloc[[11]], **FLOAT32)


def test_cells_that_were_not_asked_for_are_nan(datasets):
    adata = datasets["b"]
    every = sx.tl.impute(adata, copy=True).obsm["gimvi_imputed"]
    sx.tl.impute(adata, indices=[3, 1])
    table = adata.obsm["gimvi_imputed"]
    np.testing.assert_allclose(table.iloc[[3, 1]], every.iloc[[3, 1]], **FLOAT32)
    assert table.drop(index=table.index[[3, 1]]).isna().all(axis=None)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_a_data_set_and_what_was_imputed_travel_alone(datasets, tmp_path, suffix):
    adata, file = datasets["c"], tmp_path / f"c.{suffix}"
    sx.tl.impute(adata)
    sx.tl.discriminator_confusion(adata)
    sx.tl.loss_magnitude(adata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*zarr")  # of anndata, about its own next version
        adata.write_h5ad(file) if suffix == "h5ad" else adata.write_zarr(file)
        back = ad.read_h5ad(file) if suffix == "h5ad" else ad.read_zarr(file)
    np.testing.assert_array_equal(back.obsm["gimvi_imputed"], adata.obsm["gimvi_imputed"])
    assert list(back.obsm["gimvi_imputed"]) == list(adata.obsm["gimvi_imputed"])
    for slot in (CONFUSION, MAGNITUDE):
        np.testing.assert_array_equal(back.uns[slot], adata.uns[slot])
        assert list(back.uns[slot]) == list(adata.uns[slot])
    sx.tl.impute(back, key_added="again")
    np.testing.assert_array_equal(back.obsm["again"], adata.obsm["gimvi_imputed"])


def test_it_says_what_it_wrote(datasets, logged):
    sx.tl.impute(datasets["b"], key_added="mine")
    assert "imputing 20 genes from fit 'gimvi'" in logged()
    assert "'mine', imputed expression (adata.obsm)" in logged()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decode_mode": "d"}, ValueError, "decode_mode='d' is not a data set .*'a', 'b', 'c'"),
        ({"gene_list": ["gene0", "CD3"]}, KeyError, "1 of the 2 genes .*'CD3'"),
        ({"gene_list": []}, ValueError, "is empty"),
        ({"library_size": 0}, ValueError, "must be positive"),
        ({"library_size": "observed"}, ValueError, "latent"),
        ({"library_size": np.ones(120)}, TypeError, r"^library_size=array.{5,30} is a ndarray; a number is needed"),
        ({"n_samples": -1}, ValueError, "must be 0 or more"),
        ({"key_added": "a/b"}, ValueError, "without '/'"),
        ({"key": "scvi"}, KeyError, "'scvi' is not in"),
    ],
)
def test_what_cannot_be_imputed_is_refused_before_anything_is_written(datasets, options, error, message):
    before = datasets["a"].copy()
    with pytest.raises(error, match=message):
        sx.tl.impute(datasets["a"], **options)
    assert set(datasets["a"].obsm) == set(before.obsm)


def test_data_sets_are_imputed_one_at_a_time(datasets):
    for copy in (False, True):
        with pytest.raises(TypeError, match=r"is a dict; .* one data set at a time"):
            sx.tl.impute(datasets, copy=copy)


def test_the_seed_is_of_samples_alone(datasets):
    first, other = (sx.tl.impute(datasets["b"], seed=seed, copy=True).obsm["gimvi_imputed"] for seed in (1, 2))
    np.testing.assert_array_equal(first, other)


def test_global_generators_are_left_alone(datasets):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    for ask in (sx.tl.discriminator_confusion, sx.tl.loss_magnitude):
        ask(datasets)
    for ask in (sx.tl.impute, sx.tl.get_elbo, sx.tl.get_reconstruction_error, sx.tl.get_marginal_ll):
        ask(datasets["a"])
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


def test_a_fit_of_one_data_set_has_nothing_to_impute_from(fitted):
    for function in (sx.tl.impute, sx.tl.discriminator_confusion, sx.tl.loss_magnitude):
        with pytest.raises(ValueError, match="models that have it: 'gimvi'"):
            function(fitted)


def test_where_all_genes_were_measured_they_must_be_named(make_counts):
    whole = make_counts(n_cells=60, seed=1)
    datasets = {"rna": whole, "spatial": make_counts(n_cells=60, seed=2)[:, :20].copy()}
    for adata in datasets.values():
        sx.pp.setup_anndata(adata)
    sx.tl.fit(datasets, "gimvi", **TINY)
    with pytest.raises(ValueError, match="'rna' has measured all genes"):
        sx.tl.impute(whole)
    sx.tl.impute(whole, gene_list="gene7", decode_mode="spatial")
    assert whole.obsm["gimvi_imputed"].shape == (60, 1)


# ---- what the critic takes cells for, and parts of the loss --------------------------------------------------------


def test_confusion_is_the_mean_of_what_the_critic_says_of_blurred_means(datasets):
    sx.tl.discriminator_confusion(datasets, seed=3)
    table = datasets["a"].uns[CONFUSION]
    assert list(table.index) == list(table.columns) == list(GENES)
    np.testing.assert_allclose(table.sum(axis=1), 1, **FLOAT32)
    for name, adata in datasets.items():
        np.testing.assert_array_equal(adata.uns[CONFUSION], table)
        fitted = Fitted.open(adata, "gimvi")
        block = Block(fitted.store, torch.device("cpu"))
        noise = np.random.default_rng(3).standard_normal((adata.n_obs, 5), dtype=np.float32)[:, :4]
        with torch.no_grad():
            qz = fitted.module.encode(block.minibatch(block.rows(np.arange(adata.n_obs))))
            expected = fitted.module.confusion(qz.loc + 0.5 * torch.from_numpy(noise)).mean(0)
        np.testing.assert_allclose(table.loc[name], expected, **FLOAT32)


def test_parts_of_the_loss_are_those_of_other_read_outs(datasets):
    sx.tl.loss_magnitude(datasets, seed=3)
    sx.tl.discriminator_confusion(datasets, seed=3)
    for name, adata in datasets.items():
        row = adata.uns[MAGNITUDE].loc[name]
        np.testing.assert_allclose(row["reconstruction_loss"], sx.tl.get_reconstruction_error(adata, seed=3), **FLOAT32)
        elbo = row[["reconstruction_loss", "kl_z", "kl_library"]].sum()
        np.testing.assert_allclose(elbo, -sx.tl.get_elbo(adata, seed=3), **FLOAT32)
        assert (row["kl_library"] > 0) == (name == "a")
        # Jensen: the mean of -log p is not below -log of the mean.
        assert row["critic_loss"] >= -np.log(adata.uns[CONFUSION].loc[name, name]) - 1e-6
        others = adata.uns[CONFUSION].loc[name].drop(name)
        assert row["fooling_loss"] >= -np.log(others).mean() - 1e-6


@pytest.mark.parametrize("function", ["discriminator_confusion", "loss_magnitude"])
def test_data_sets_can_be_asked_together_or_alone(datasets, function, logged):
    slot, ask = f"gimvi_{function}", getattr(sx.tl, function)
    whole = ask(datasets, copy=True)
    assert list(whole) == list(datasets)
    assert all(slot not in adata.uns for adata in datasets.values())
    assert f"'{slot}', {function.replace('_', ' ')} (adata.uns)" in logged()
    expected = whole["a"].uns[slot]
    alone = ask(datasets["b"], copy=True).uns[slot]
    np.testing.assert_array_equal(alone, expected.loc[["b"]])
    two = ask({name: datasets[name] for name in ("c", "a")}, copy=True)["c"].uns[slot]
    np.testing.assert_array_equal(two, expected.loc[["c", "a"]])
    in_small = ask(datasets, batch_size=7, copy=True)["a"].uns[slot]
    np.testing.assert_allclose(in_small, expected, **FLOAT32)
    ask(datasets["a"], key_added="mine")
    assert "mine" in datasets["a"].uns
    assert slot not in datasets["a"].uns


@pytest.mark.parametrize("function", ["discriminator_confusion", "loss_magnitude"])
def test_data_sets_of_different_fits_are_refused(datasets, make_counts, fitted, function):
    ask = getattr(sx.tl, function)
    with pytest.raises(ValueError, match="that of 'b'"):
        ask({"a": datasets["a"], "c": datasets["b"]})
    with pytest.raises(ValueError, match="no fit of several data sets"):
        ask({"a": datasets["a"], "b": fitted})
    with pytest.raises(ValueError, match="no data sets"):
        ask({})
    with pytest.raises(TypeError, match="'b' is a int"):
        ask({"a": datasets["a"], "b": 5})
    again = fit(make_counts, seed=9)
    with pytest.raises(ValueError, match="were not trained together"):
        ask({"a": datasets["a"], "b": again["b"]})
    assert not {CONFUSION, MAGNITUDE} & set(datasets["a"].uns)


def test_without_a_critic_there_is_no_confusion(make_counts):
    datasets = fit(make_counts, kappa=0)
    with pytest.raises(ValueError, match="has no critic"):
        sx.tl.discriminator_confusion(datasets)
    sx.tl.loss_magnitude(datasets)
    assert list(datasets["a"].uns[MAGNITUDE]) == ["reconstruction_loss", "kl_z", "kl_library"]
