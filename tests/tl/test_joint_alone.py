"""What a joint fit says of one of its data sets, from that AnnData alone."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from _tolerances import FLOAT32
from torch.distributions import NegativeBinomial

import scvi_ext as sx
from scvi_ext.data.blocks import Block
from scvi_ext.fitted import Fitted

QUICK = {"max_epochs": 3, "dim_hidden_encoder": 8, "n_latent": 4}
_FITTED: dict[str, ad.AnnData] = {}


@pytest.fixture
def joint(make_counts) -> dict[str, ad.AnnData]:
    """Two data sets with zero inflation, the second with a latent library, and a fit that has the name "scvi"."""
    if not _FITTED:
        rna, spatial = make_counts()[:, 5:].copy(), make_counts(n_cells=90, seed=5)[:, 19::-1].copy()
        sx.pp.setup_anndata(rna, batch_key="batch")
        sx.pp.setup_anndata(spatial, batch_key="sex")
        made = {"rna": rna, "spatial": spatial}
        options = QUICK | {"n_layers_decoder_individual": 1, "reconstruction_losses": ("zinb", "zinb")}
        sx.tl.fit(made, "gimvi", key_added="scvi", model_library_bools={"rna": False, "spatial": True}, **options)
        _FITTED.update(made)
    return {name: adata.copy() for name, adata in _FITTED.items()}


@pytest.fixture(params=["rna", "spatial"])
def dataset(request, joint) -> ad.AnnData:
    return joint[request.param]


@pytest.fixture
def inflated_or_not(joint) -> dict[str, ad.AnnData]:
    """The same with a fit in which only the first has technical zeros."""
    options = QUICK | {"max_epochs": 1, "reconstruction_losses": {"rna": "zinb", "spatial": "nb"}}
    sx.tl.fit(joint, "gimvi", key_added="scvi", **options)
    return joint


def of_all_cells(adata: ad.AnnData) -> tuple:
    """The module, and all cells of the data set as one minibatch."""
    fitted = Fitted.open(adata, "scvi")
    block = Block(fitted.store, torch.device("cpu"))
    return fitted.module.requires_grad_(False), block.minibatch(block.rows(np.arange(adata.n_obs)))


# ---- laws of every read-out ----------------------------------------------------------------------------------------


def test_minibatches_do_not_change_results(dataset, read, readout):
    whole = read(readout, dataset)
    assert len(whole) == dataset.n_obs
    np.testing.assert_allclose(read(readout, dataset, batch_size=17), whole, **FLOAT32)


def test_cells_do_not_depend_on_each_other(dataset, read):
    rows = [40, 3, 77]
    for readout in ("get_latent", "get_library_size"):  # others draw
        np.testing.assert_allclose(read(readout, dataset[rows].copy()), read(readout, dataset)[rows], **FLOAT32)


def test_genes_are_found_by_name(dataset, read, write, readout):
    order = np.random.default_rng(0).permutation(dataset.n_vars)
    other = dataset[:, order].copy()
    genes = read(readout, other)
    whole = read(readout, dataset)
    if genes.shape[1] > dataset.n_vars:  # several layers, side by side
        blocks = [genes[:, i : i + dataset.n_vars] for i in range(0, genes.shape[1], dataset.n_vars)]
        genes = np.concatenate([block[:, np.argsort(order)] for block in blocks], axis=1)
    elif genes.shape[1] == dataset.n_vars:
        genes = genes[:, np.argsort(order)]
    np.testing.assert_allclose(genes, whole, **FLOAT32)


def test_each_data_set_travels_alone(joint, read, tmp_path):
    for (name, adata), kind in zip(joint.items(), ("h5ad", "zarr"), strict=True):
        path = tmp_path / f"{name}.{kind}"
        getattr(adata, f"write_{kind}")(path)
        found = getattr(ad, f"read_{kind}")(path)
        for readout in ("get_latent", "get_normalized_expression", "get_elbo"):
            np.testing.assert_array_equal(read(readout, found), read(readout, adata))
        assert list(found.uns["scvi_ext"]["fits"]["scvi"]["joint"]["datasets"]) == ["rna", "spatial"]
        getattr(found, f"write_{kind}")(tmp_path / f"again.{kind}")  # what was read can be written


# ---- values --------------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_data_set(joint, read):
    for mode, adata in enumerate(joint.values()):
        module, cells = of_all_cells(adata)
        expected = module.encoder.posterior(cells.x.log1p(), mode).loc
        np.testing.assert_allclose(read("get_latent", adata), expected, **FLOAT32)


def test_batches_are_numbered_through_all_data_sets(joint):
    first = 0
    for adata, key in zip(joint.values(), ("batch", "sex"), strict=True):
        _, cells = of_all_cells(adata)
        codes = adata.obs[key].astype("category").cat.codes.to_numpy()
        np.testing.assert_array_equal(cells.batch_index, codes + first)
        first += codes.max() + 1


def test_normalized_expression_is_of_the_genes_of_the_data_set(joint, read):
    for mode, adata in enumerate(joint.values()):
        found = read("get_normalized_expression", adata, library_size=1.0, n_samples=100)
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
        module, cells = of_all_cells(adata)
        genes = adata.uns["scvi_ext"]["fits"]["scvi"]["joint"]["positions"][str(mode)]
        torch.manual_seed(0)
        posteriors = module.posteriors(cells)
        draws = (module.draw(cells, posteriors)[0] for _ in range(100))
        scales = torch.stack([module.decode_joint(z, cells).scale[:, genes] for z in draws]).numpy()
        # Means of 100 draws each: sqrt(2) standard errors apart, and 7 of these once in 10^11.
        standard_error = np.sqrt(2) * scales.std(0, ddof=1) / 10
        assert (np.abs(found - scales.mean(0)) < 7 * standard_error).all()


def test_counterfactual_batches_are_those_of_the_data_set(joint, read):
    for adata, key, other in zip(joint.values(), ("batch", "sex"), ("f", "b0"), strict=True):
        own = read("get_normalized_expression", adata)
        for batch in adata.obs[key].unique():
            there = read("get_normalized_expression", adata, transform_batch=batch)
            here = (adata.obs[key] == batch).to_numpy()
            np.testing.assert_allclose(there[here], own[here], **FLOAT32)
            assert not np.allclose(there[~here], own[~here], **FLOAT32)
        with pytest.raises(ValueError, match=f"transform_batch='{other}' is not one of"):
            read("get_normalized_expression", adata, transform_batch=other)


def test_likelihood_parameters_are_those_of_the_likelihood_of_the_data_set(inflated_or_not, write):
    joint = inflated_or_not
    for adata in joint.values():
        write("get_likelihood_parameters", adata)
    assert set(joint["rna"].layers) == {"scvi_mean", "scvi_dispersion", "scvi_dropout"}
    assert set(joint["spatial"].layers) == {"scvi_mean", "scvi_dispersion"}
    for adata in joint.values():
        module, cells = of_all_cells(adata)
        px = module.decode(module.encode(cells).loc, cells)
        np.testing.assert_allclose(adata.layers["scvi_dispersion"], px.theta, **FLOAT32)


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
def test_a_data_set_without_dispersion_is_given_none(joint, write, dispersion):
    options = QUICK | {"max_epochs": 1, "reconstruction_losses": {"rna": "poisson", "spatial": "zinb"}}
    sx.tl.fit(joint, "gimvi", key_added="scvi", dispersion=dispersion, **options)
    for adata in joint.values():
        write("get_likelihood_parameters", adata)
    assert set(joint["rna"].layers) == {"scvi_mean"}
    assert "scvi_dispersion" not in joint["rna"].var
    spatial = joint["spatial"]
    assert ("scvi_dispersion" in spatial.var) == (dispersion == "gene")
    assert ("scvi_dispersion" in spatial.layers) == (dispersion != "gene")
    if dispersion == "gene":
        module, cells = of_all_cells(spatial)
        px = module.decode(module.encode(cells).loc, cells)
        np.testing.assert_allclose(spatial.var["scvi_dispersion"], px.theta, **FLOAT32)


def test_reconstruction_error_is_of_the_likelihood_of_the_data_set(inflated_or_not, read):
    spatial = inflated_or_not["spatial"]
    module, cells = of_all_cells(spatial)
    found = np.mean([read("get_reconstruction_error", spatial, seed=s, n_samples=20) for s in range(5)], axis=0)
    torch.manual_seed(0)
    posteriors = module.posteriors(cells)
    errors = []
    for _ in range(100):
        z, log_library = module.draw(cells, posteriors)
        px = module.decode(z, cells, log_library)
        p = NegativeBinomial(px.theta, logits=torch.log(px.rate) - torch.log(px.theta))
        errors.append(-p.log_prob(cells.x.to_dense()).sum(-1))
    errors = torch.stack(errors).numpy()
    # Means of 100 draws each, of every cell: sqrt(2) standard errors apart, and 6 of these once in 10^9.
    standard_error = errors.std(0, ddof=1) / 10
    assert (np.abs(found.ravel() - errors.mean(0)) < 6 * np.sqrt(2) * standard_error + 1e-3).all()


def test_library_size_is_the_total_or_the_posterior_mean(joint, read):
    total = np.asarray(joint["rna"].X.sum(1)).ravel()
    np.testing.assert_allclose(read("get_library_size", joint["rna"]).ravel(), total, rtol=1e-5)
    module, cells = of_all_cells(joint["spatial"])
    ql = module.encode_library(cells)
    found = read("get_library_size", joint["spatial"]).ravel()
    candidates = [torch.exp(ql.loc), torch.exp(ql.loc + ql.scale**2 / 2)]
    assert any(np.allclose(found, c.ravel(), rtol=1e-4) for c in candidates)


def test_evidence_is_above_the_elbo(dataset):
    elbo = sx.tl.get_elbo(dataset, n_samples=20)
    assert sx.tl.get_marginal_ll(dataset, n_mc_samples=100) > elbo
    assert np.isfinite(elbo)


# ---- every other function of tl: it works on the AnnData alone, or refuses and writes nothing ------------------------

WORKS = {
    "amortization_gap": {"n_paths": 1, "max_epochs": 2, "return_mean": False},
    "denoised_samples": {"n_samples": 2},
    "differential_expression": {"groupby": "cell_type"},
    "feature_correlation": {"n_samples": 2},
    "get_importance_weights": {"n_samples": 5, "return_weights": False},
    "posterior_predictive_check": {"n_samples": 2},
    "posterior_predictive_sample": {},
    "within_group_de": {"groupby": "cell_type", "condition": "sex"},
}
REFUSES = {
    "classify": "has no 'encode_label'; models that have it: ",
    "get_loadings": "has no 'get_loadings'; models that have it: 'ldvae'",
    "get_protein_background": "has no 'decode_protein'; models that have it: 'totalvi'",
    "get_protein_expression": "has no 'decode_protein'; models that have it: 'totalvi'",
    "get_protein_foreground": "has no 'decode_protein'; models that have it: 'totalvi'",
    "get_zero_inflation": "has no 'zero_inflation_posterior'; models that have it: 'autozi'",
}
# Tested above, in test_fit_joint, in test_tune, or below; and those that are there for joint fits.
TESTED = {
    *("get_elbo", "get_latent", "get_library_size", "get_likelihood_parameters", "get_marginal_ll", "fit"),
    *("get_normalized_expression", "get_reconstruction_error", "map_query", "get_drift", "imputation_score"),
    *("get_technical_zeros", "tune"),
}
FOR_JOINT_FITS = {"impute", "discriminator_confusion", "loss_magnitude"}


def test_every_function_is_tried():
    assert set(sx.tl.__all__) <= {*WORKS, *REFUSES, *TESTED, *FOR_JOINT_FITS}


@pytest.mark.filterwarnings("ignore::scvi_ext.ScviExtWarning")  # of few epochs, few samples
@pytest.mark.parametrize("name", WORKS)
def test_it_works_on_each_data_set_alone(dataset, name):
    found = getattr(sx.tl, name)(dataset, **WORKS[name])
    values = [as_array(table) for slot in ("obs", "layers", "varm", "varp") for table in found_in(dataset, slot)]
    values += [found] if isinstance(found, np.ndarray) else []
    for value in values:
        assert np.isfinite(value).all()


def as_array(table: object) -> np.ndarray:
    return table.toarray() if sp.issparse(table) else np.asarray(table)


def found_in(adata: ad.AnnData, slot: str) -> list:
    written = getattr(adata, slot)
    return [written[key] for key in written.keys() if str(key).startswith("scvi")]


@pytest.mark.parametrize("name", REFUSES)
def test_it_is_refused_before_anything_is_written(dataset, name):
    before = repr(dataset)
    with pytest.raises(ValueError, match=REFUSES[name]):
        getattr(sx.tl, name)(dataset)
    assert repr(dataset) == before


def test_technical_zeros_are_of_a_data_set_that_has_them(inflated_or_not):
    joint = inflated_or_not
    sx.tl.get_technical_zeros(joint["rna"])
    zeros = joint["rna"].X.toarray() == 0
    assert ((joint["rna"].layers["scvi_technical_zeros"] > 0) == zeros).all()
    with pytest.raises(ValueError, match="The likelihood of fit 'scvi' knows no technical zeros"):
        sx.tl.get_technical_zeros(joint["spatial"])
    assert not joint["spatial"].layers


def test_cells_are_not_mapped_onto_a_joint_fit(joint, make_counts):
    query = make_counts(seed=9)
    before = repr(query)
    for reference in joint.values():
        with pytest.raises(ValueError, match="Fit 'scvi' joins the data sets 'rna', 'spatial', and cells cannot be"):
            sx.tl.map_query(query, reference, key_added="mapped")
    assert repr(query) == before


@pytest.mark.parametrize("model", ["scvi", "scanvi", "classifier"])
def test_no_model_starts_from_a_joint_fit(joint, model):
    with pytest.raises(ValueError, match="init_from='scvi' joins the data sets 'rna', 'spatial', and no model starts"):
        sx.tl.fit(joint["rna"], model, init_from="scvi", key_added="new")
    assert list(joint["rna"].uns["scvi_ext"]["fits"]) == ["scvi"]


def test_drift_compares_data_sets_only_where_their_genes_are_the_same(joint):
    with pytest.raises(ValueError, match="does not have the weights of fit 'scvi' of the reference"):
        sx.tl.get_drift(joint["spatial"], joint["rna"])
    half = joint["rna"][::2].copy()
    sx.tl.get_drift(half, joint["rna"], n_neighbors=5)
    assert np.isfinite(half.obs["scvi_drift"]).all()


def test_imputation_of_corrupted_counts(make_counts):
    rna, spatial = make_counts()[:, 5:].copy(), make_counts(n_cells=90, seed=5)[:, :20].copy()
    sx.pp.corrupt(rna, seed=0)
    sx.pp.setup_anndata(rna, layer="corrupted", batch_key="batch")
    sx.pp.setup_anndata(spatial)
    sx.tl.fit({"rna": rna, "spatial": spatial}, "gimvi", **QUICK)
    sx.tl.imputation_score(rna)
    assert np.isfinite(sx.get.imputation_df(rna).select_dtypes("number").to_numpy()).all()


def test_tables_of_fits_and_the_module(joint, dataset):
    assert sx.get.fits(dataset).loc["scvi", "model"] == "gimvi"
    module = sx.get.model(dataset)
    assert module.mode == list(joint).index(dataset.uns["scvi_ext"]["fits"]["scvi"]["joint"]["dataset"])


def test_changed_setup_is_noticed(joint):
    sx.pp.setup_anndata(joint["spatial"])  # without its batches
    with pytest.raises(ValueError, match=r"The fit 'scvi' was trained with batch_key='sex'"):
        sx.tl.get_latent(joint["spatial"])
    sx.tl.get_latent(joint["rna"])


def test_a_gene_that_was_lost_is_noticed(joint):
    with pytest.raises(KeyError, match=r"1 of the 20 genes of the fit are not in adata\.var_names"):
        sx.tl.get_latent(joint["spatial"][:, 1:].copy())


def test_differential_expression_names_the_batches_of_the_data_set(joint):
    """Codes are numbered through all data sets, names are not."""
    for adata, key in zip(joint.values(), ("batch", "sex"), strict=True):
        names = sorted(map(str, adata.obs[key].unique()))
        for batch in names:
            sx.tl.differential_expression(adata, "cell_type", transform_batch=batch, n_samples=300)
            assert adata.uns["scvi_de"]["params"]["batches"].tolist() == [batch]
        sx.tl.differential_expression(adata, "cell_type", batch_correction=True, n_samples=300)
        assert adata.uns["scvi_de"]["params"]["batches"].tolist() == names


def test_a_batch_without_effect_on_the_profile_is_refused(joint):
    sx.tl.fit(joint, "gimvi", key_added="blind", max_epochs=1, progress=False)
    adata = joint["spatial"]
    batch = str(adata.obs["sex"].iloc[0])
    with pytest.raises(ValueError, match="profile of genes does not depend on the batch"):
        sx.tl.get_normalized_expression(adata, transform_batch=batch)
    with pytest.raises(ValueError, match="profile of genes does not depend on the batch"):
        sx.tl.differential_expression(adata, "cell_type", batch_correction=True)


def test_data_sets_of_different_fits_are_not_mixed(joint):
    other = sx.tl.fit(joint, "gimvi", key_added="other", max_epochs=2, kappa=0.5, progress=False, copy=True)
    sx.tl.fit(joint, "gimvi", key_added="other", max_epochs=2, progress=False)
    for read in (sx.tl.loss_magnitude, sx.tl.discriminator_confusion):
        with pytest.raises(ValueError, match="were not trained together"):
            read({"rna": joint["rna"], "spatial": other["spatial"]})
