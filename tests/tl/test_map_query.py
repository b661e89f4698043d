from __future__ import annotations

import signal
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from _tolerances import FLOAT32

import scvi_ext as sx
from scvi_ext import models
from scvi_ext._contract import N_TRAIN, Capability
from scvi_ext.data.registry import Registry, read_fit

SMALL = {"n_hidden": 16, "n_latent": 4, "max_epochs": 3}
QUICK = {"max_epochs": 4, "progress": False}
OPTIONS = [
    {"encode_covariates": True, "n_layers": 2},
    {"batch_representation": "embedding"},
    {"library": "latent", "dispersion": "gene-batch"},
    {"latent_distribution": "ln", "reconstruction_loss": "nb"},
    {"adversarial_mixing": 3.0},
]
OF_ONE = [name for name in models.names() if Capability.JOINT not in models.get(name).capabilities]
MODELS = [name for name in OF_ONE if "n_latent" in models.get(name).config.__dataclass_fields__]
CASES = [*((name, {}) for name in MODELS), *(("scvi", options) for options in OPTIONS)]


def split(adata: ad.AnnData, **setup) -> tuple[ad.AnnData, ad.AnnData]:
    """Two batches that are set up, and the third one that is not."""
    new = (adata.obs["batch"] == "b2").to_numpy()
    reference, query = adata[~new].copy(), adata[new].copy()
    sx.pp.setup_anndata(reference, **{"batch_key": "batch"} | setup)
    return reference, query


_FITTED: list[tuple[ad.AnnData, ad.AnnData]] = []


@pytest.fixture
def pair(counts) -> tuple[ad.AnnData, ad.AnnData]:
    """A reference of two batches with a fit of scVI, and a query of a third one."""
    if not _FITTED:
        made = split(counts)
        sx.tl.fit(made[0], **SMALL)
        _FITTED.append(made)
    reference, query = _FITTED[0]
    return reference.copy(), query.copy()


def latent(adata: ad.AnnData, **options) -> np.ndarray:
    return sx.tl.get_latent(adata, copy=True, key_added="z", **options).obsm["z"]


def under_the_fit_of(query: ad.AnnData, reference: ad.AnnData) -> ad.AnnData:
    """The cells of the reference with the fit of the query."""
    cells = reference.copy()
    cells.uns = query.uns.copy()
    return cells


# ---- what stays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "options"), CASES, ids=str)
def test_cells_of_the_reference_are_as_before(counts, model, options):
    spec = models.get(model)
    proteins = {}
    if "protein" in spec.needs(spec.config(**options)):
        counts.obsm["protein"] = np.random.default_rng(0).poisson(5.0, (counts.n_obs, 4))
        proteins = {"protein_obsm_key": "protein"}
    reference, query = split(
        counts,
        **proteins,
        labels_key="cell_type",
        categorical_covariate_keys=["sex"],
        continuous_covariate_keys=["age"],
    )
    sx.tl.fit(reference, model, **SMALL | options)
    query.obs["sex"] = query.obs["sex"].where(np.arange(query.n_obs) % 4 > 0, "unknown")
    sx.tl.map_query(query, reference, **QUICK)
    cells = under_the_fit_of(query, reference)
    # other layers see no covariates or the same; of wider ones, products with zeros are added up in another order
    np.testing.assert_allclose(latent(cells, seed=0), latent(reference, seed=0), **FLOAT32)
    for adata in (cells, reference):
        sx.tl.get_normalized_expression(adata)
    name = f"{model}_normalized"
    np.testing.assert_allclose(cells.layers[name], reference.layers[name], rtol=1e-4)
    before, after = read_fit(reference), read_fit(query)
    registry = Registry.from_uns(after.setup)
    assert registry.batch_categories == ("b0", "b1", "b2")
    assert registry.covariate_categories == (("f", "m", "unknown"),)
    for key, array in before.state.items():
        if array.shape == after.state[key].shape and not key.startswith(("library.log", N_TRAIN)):
            np.testing.assert_array_equal(after.state[key], array, err_msg=key)


def test_the_known_part_of_what_grows_stays_bit_for_bit(pair):
    reference, query = pair
    sx.tl.map_query(query, reference, **QUICK)
    before, after = read_fit(reference).state, read_fit(query).state
    key = "decoder.px_decoder.layers.0.linear.weight"
    np.testing.assert_array_equal(after[key][:, :-1], before[key])
    assert not np.allclose(after[key][:, -1], before[key][:, -2:].mean(1))
    np.testing.assert_array_equal(latent(under_the_fit_of(query, reference)), latent(reference))


def test_training_the_new_batch_raises_its_bound(pair):
    reference, query = pair
    bounds = {}
    for epochs in (0, 4, 40):
        sx.tl.map_query(query, reference, max_epochs=epochs, progress=False)
        bounds[epochs] = sx.tl.get_elbo(query, n_samples=20, seed=0)
    assert bounds[0] < bounds[4] < bounds[40]


def test_a_planted_batch_effect_is_found(make_counts):
    """The new batch is the first one with half of the genes doubled: decoded in it, they rise against the others."""
    adata = make_counts(1500)
    reference = adata[adata.obs["batch"] != "b2"].copy()
    query = adata[adata.obs["batch"] == "b0"].copy()
    doubled = np.arange(adata.n_vars) % 2 == 0
    query.X = sp.csr_matrix(query.X.toarray() * np.where(doubled, 2, 1), dtype=np.float32)
    query.obs["batch"] = "doubled"
    sx.pp.setup_anndata(reference, batch_key="batch")
    sx.tl.fit(reference, n_hidden=32, n_latent=5)
    differences = {}
    for epochs in (0, None):
        sx.tl.map_query(query, reference, max_epochs=epochs, progress=False)
        for batch in ("doubled", "b0"):
            sx.tl.get_normalized_expression(query, transform_batch=batch, key_added=batch)
        ratio = np.log2(query.layers["doubled"].mean(0) / query.layers["b0"].mean(0))
        differences[epochs] = ratio[doubled].mean() - ratio[~doubled].mean()
    # z takes up a part of the effect, so that less than one doubling is left to the batch
    assert abs(differences[0]) < 0.05
    assert 0.2 < differences[None] < 1


# ---- what is new ---------------------------------------------------------------------------------------------------


def test_without_anything_new_nothing_is_trained(pair, logged):
    reference, _ = pair
    query = reference[::2].copy()
    del query.uns["scvi_ext"]
    sx.tl.map_query(query, reference)
    assert "nothing is trained" in logged()
    fit = read_fit(query)
    for key, array in read_fit(reference).state.items():
        np.testing.assert_array_equal(fit.state[key], array)
    assert fit.status["stop_reason"] == "projected"
    np.testing.assert_array_equal(latent(query), latent(reference)[::2])


def test_a_projection_says_how_new_batches_are_decoded(pair, logged):
    reference, query = pair
    sx.tl.map_query(query, reference, max_epochs=0)
    assert "'b2'" in logged()
    assert "transform_batch" in logged()
    assert len(sx.get.history(query)) == 0
    trained = query.copy()
    sx.tl.map_query(trained, reference, **QUICK)
    np.testing.assert_array_equal(latent(query), latent(trained))  # batches are not encoded


def test_one_batch_by_name(pair):
    reference, query = pair
    with_column = sx.tl.map_query(query, reference, copy=True, **QUICK)
    del query.obs["batch"]
    with pytest.raises(KeyError, match="batch_name="):
        sx.tl.map_query(query, reference)
    assert "batch" not in query.obs
    sx.tl.map_query(query, reference, batch_name="b2", **QUICK)
    assert set(query.obs["batch"]) == {"b2"}
    for key, array in read_fit(with_column).state.items():
        np.testing.assert_array_equal(read_fit(query).state[key], array)
    sx.tl.map_query(query, reference, batch_name="b2", **QUICK)  # the column that was written does not stand in the way
    with pytest.raises(ValueError, match="leave out one"):
        sx.tl.map_query(query, reference, batch_name="other")


def test_a_known_batch_by_name(pair):
    reference, query = pair
    del query.obs["batch"]
    sx.tl.map_query(query, reference, batch_name="b1")
    assert read_fit(query).status["stop_reason"] == "projected"


def test_columns_of_other_names(pair):
    reference, query = pair
    expected = sx.tl.map_query(query, reference, copy=True, **QUICK)
    query.obs = query.obs.rename(columns={"batch": "sample"})
    query.layers["counts"], query.X = query.X, query.X.log1p()
    sx.tl.map_query(query, reference, batch_key="sample", layer="counts", **QUICK)
    np.testing.assert_array_equal(latent(query), latent(expected))
    assert sx.get.setup(query).set_index("field")["key"].to_dict() == {"counts": "counts", "batch": "sample"}


@pytest.mark.parametrize("batches", [[1, 2, 1], [True, False, True], pd.Categorical(["x", "y", "x"], ["z", "y", "x"])])
def test_any_kind_of_categories(pair, batches):
    reference, query = pair
    query = query[:3].copy()
    query.obs["batch"] = batches
    sx.tl.map_query(query, reference, **QUICK)
    names = [str(b) for b in pd.Categorical(batches).remove_unused_categories().categories]
    assert list(Registry.from_uns(read_fit(query).setup).batch_categories) == ["b0", "b1", *names]
    assert np.isfinite(latent(query)).all()


def test_a_single_cell(pair):
    reference, query = pair
    query = query[:1].copy()
    sx.tl.map_query(query, reference, **QUICK)
    sx.tl.get_normalized_expression(query, transform_batch="b0")
    assert np.isfinite(query.layers["scvi_normalized"]).all()


def test_labels_that_the_reference_does_not_know_are_said_and_count_as_none(counts, logged):
    reference, query = split(counts, labels_key="cell_type")
    sx.tl.fit(reference, "scanvi", **SMALL)
    query.obs["cell_type"] = query.obs["cell_type"].cat.rename_categories({"t1": "new type"})
    named = query.copy()
    sx.tl.map_query(named, reference, **QUICK)
    assert "'new type'" in logged()
    assert read_fit(named).status["unknown_labels"] == ["new type"]
    del query.obs["cell_type"]
    sx.tl.map_query(query, reference, **QUICK)
    np.testing.assert_array_equal(latent(query), latent(named))


def test_labels_are_transferred_with_the_confidence_of_the_reference(counts):
    reference, query = split(counts, labels_key="cell_type")
    sx.tl.fit(reference, "scanvi", **SMALL)
    sx.tl.map_query(query, reference, **QUICK)
    assert read_fit(query).status["temperature"] == read_fit(reference).status["temperature"]
    cells = under_the_fit_of(query, reference)
    for adata in (cells, reference, query):
        sx.tl.classify(adata)
    probabilities = "scanvi_probabilities"
    np.testing.assert_array_equal(cells.obsm[probabilities], reference.obsm[probabilities])
    assert set(query.obs["scanvi_prediction"]) <= {"t0", "t1", "t2"}


@pytest.mark.parametrize("classifies", ["counts", "z"])
def test_a_classifier_is_projected(counts, logged, classifies):
    reference, query = split(counts, labels_key="cell_type")
    around = {}
    if classifies == "z":
        sx.tl.fit(reference, **SMALL)
        around = {"init_from": "scvi", "classifies": "z"}
    sx.tl.fit(reference, "classifier", n_hidden=8, max_epochs=2, **around)
    sx.tl.map_query(query, reference)
    assert "nothing is trained" in logged()
    known = reference[:9].copy()
    for adata in (query, known):
        sx.tl.classify(adata)
    cells = under_the_fit_of(query, known)
    sx.tl.classify(cells)
    np.testing.assert_array_equal(cells.obsm["classifier_probabilities"], known.obsm["classifier_probabilities"])
    with pytest.raises(ValueError, match="freeze=False"):
        sx.tl.map_query(query, reference, freeze=False)


def test_labels_that_a_dispersion_needs(counts):
    reference, query = split(counts, labels_key="cell_type")
    sx.tl.fit(reference, dispersion="gene-label", **SMALL)
    sx.tl.map_query(query.copy(), reference, **QUICK)
    query.obs["cell_type"] = query.obs["cell_type"].cat.rename_categories({"t1": "new type"})
    with pytest.raises(ValueError, match="new type"):
        sx.tl.map_query(query, reference, **QUICK)


def test_unlabelled_cells_are_not_decoded_by_label(counts):
    counts.obs["cell_type"] = counts.obs["cell_type"].astype(str)
    reference, query = split(counts, labels_key="cell_type")
    sx.tl.fit(reference, dispersion="gene-label", **SMALL)
    fit = read_fit(reference)
    saved = replace(fit, setup=replace(Registry.from_uns(fit.setup), unlabeled_category="unknown").to_uns())
    query.obs.loc[query.obs_names[:2], "cell_type"] = "unknown"
    with pytest.raises(ValueError, match="max_epochs=0"):
        sx.tl.map_query(query, saved, **QUICK)
    sx.tl.map_query(query, saved, max_epochs=0)
    assert np.isfinite(latent(query)).all()


# ---- genes ---------------------------------------------------------------------------------------------------------


def test_the_order_of_genes_and_further_ones_do_not_matter(pair):
    reference, query = pair
    extra = query.copy()
    extra.var_names = [f"other{i}" for i in range(query.n_vars)]
    shuffled = ad.concat([query, extra], axis=1, merge="same")
    shuffled = shuffled[:, np.random.default_rng(0).permutation(shuffled.n_vars)].copy()
    for adata in (query, shuffled):
        sx.tl.map_query(adata, reference, **QUICK)
    np.testing.assert_array_equal(latent(shuffled), latent(query))
    for key, array in read_fit(query).state.items():
        np.testing.assert_array_equal(read_fit(shuffled).state[key], array)


def test_missing_genes_lead_to_the_alignment(pair):
    reference, query = pair
    short = query[:, 10:].copy()
    with pytest.raises(KeyError, match=r"10 of the 60 genes .*align_query"):
        sx.tl.map_query(short, reference)
    aligned = sx.pp.align_query(short, reference)
    sx.tl.map_query(aligned, reference, **QUICK)
    assert np.isfinite(latent(aligned)).all()
    everything = sx.pp.align_query(query[:, ::-1], reference)
    for adata in (everything, query):
        sx.tl.map_query(adata, reference, **QUICK)
    np.testing.assert_array_equal(latent(everything), latent(query))


def test_genes_of_the_same_name_are_refused(pair):
    reference, query = pair
    query.var_names = ["gene0", "gene0", *query.var_names[2:]]
    with pytest.raises(ValueError, match="more than once"):
        sx.tl.map_query(query, reference)


# ---- references ----------------------------------------------------------------------------------------------------


def test_every_kind_of_reference_is_the_same(pair, tmp_path):
    reference, query = pair
    sx.io.write_model(reference, tmp_path / "model")
    reference.write_h5ad(tmp_path / "reference.h5ad")
    reference.write_zarr(tmp_path / "reference.zarr")
    kinds = [reference, tmp_path / "model", str(tmp_path / "model"), sx.io.read_model(tmp_path / "model")]
    kinds += [tmp_path / "reference.h5ad", str(tmp_path / "reference.zarr")]
    found = [read_fit(sx.tl.map_query(query, kind, copy=True, **QUICK)).state for kind in kinds]
    for state in found[1:]:
        for key, array in found[0].items():
            np.testing.assert_array_equal(state[key], array)
    with pytest.raises(ValueError, match="several fits"):
        sx.tl.map_query(query, tmp_path / "model", key="scvi")
    with pytest.raises(TypeError, match="reference is a int"):
        sx.tl.map_query(query, 3)
    with pytest.raises(FileNotFoundError):
        sx.tl.map_query(query, tmp_path / "nothing")
    with pytest.raises(KeyError, match="other"):
        sx.tl.map_query(query, tmp_path / "reference.h5ad", key="other")
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.h5ad' does not exist"):
        sx.tl.map_query(query, tmp_path / "elsewhere.h5ad")


def test_a_model_of_scvi_tools(shared_data):
    case = shared_data.with_name("golden") / "scvi_zinb"
    query = ad.read_h5ad(case / "adata.h5ad")
    query.obs["batch"] = "new"
    sx.tl.map_query(query, case, **QUICK)
    assert Registry.from_uns(read_fit(query).setup).batch_categories[-1] == "new"
    assert np.isfinite(latent(query)).all()


def test_a_mapped_query_is_a_reference_in_turn(pair):
    reference, query = pair
    sx.tl.map_query(query, reference, **QUICK)
    third = query.copy()
    third.obs["batch"] = "b3"
    sx.tl.map_query(third, query, **QUICK)
    assert Registry.from_uns(read_fit(third).setup).batch_categories == ("b0", "b1", "b2", "b3")
    np.testing.assert_array_equal(latent(third), latent(query))


# ---- what is refused -----------------------------------------------------------------------------------------------


def untouched(query: ad.AnnData, before: ad.AnnData) -> bool:
    return "scvi_ext" not in query.uns and list(query.obs) == list(before.obs)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q: setattr(q, "X", q.X.log1p()), ValueError, "not raw counts"),
        (lambda q: setattr(q, "X", q.X.multiply(1e4 / q.X.sum(1)).tocsr()), ValueError, "not raw counts"),
        (lambda q: setattr(q, "obs", q.obs.assign(batch=[None, *q.obs["batch"][1:]])), ValueError, "missing in 1 of"),
        (lambda q: setattr(q, "obs", q.obs.drop(columns="batch")), KeyError, "batch_key="),
    ],
    ids=["logged", "scaled", "no batch", "no column"],
)
def test_what_cannot_be_mapped_is_refused_and_nothing_is_written(pair, change, error, match):
    reference, query = pair
    change(query)
    before = query.copy()
    with pytest.raises(error, match=match):
        sx.tl.map_query(query, reference)
    assert untouched(query, before)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"batch_key": "batch", "batch_name": "b"}, ValueError, "leave out one"),
        ({"batch_name": 3}, TypeError, "a name is needed"),
        ({"layer": "nothing"}, KeyError, "layer=..."),
        ({"labels_key": "nothing"}, KeyError, "nothing"),
        ({"max_epochs": -1}, ValueError, "max_epochs"),
        ({"freeze": False, "max_epochs": 0}, ValueError, "freeze=False"),
        ({"check": "no"}, ValueError, "check"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"key": "nothing"}, KeyError, "nothing"),
        ({"key_added": "a/b"}, ValueError, "without '/'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(pair, options, error, match):
    reference, query = pair
    before = query.copy()
    with pytest.raises(error, match=match):
        sx.tl.map_query(query, reference, **options)
    assert untouched(query, before)


def test_what_is_no_query_is_refused(pair):
    reference, query = pair
    with pytest.raises(TypeError, match="an AnnData is needed"):
        sx.tl.map_query(query.X, reference)
    with pytest.raises(ValueError, match="no cells"):
        sx.tl.map_query(query[:0].copy(), reference)


def test_a_reference_without_batches_has_no_place_for_one(counts):
    sx.pp.setup_anndata(counts)
    sx.tl.fit(counts, **SMALL)
    query = counts[:20].copy()
    del query.uns["scvi_ext"]
    with pytest.raises(ValueError, match="without batches"):
        sx.tl.map_query(query, counts, batch_name="new")
    sx.tl.map_query(query, counts)
    np.testing.assert_array_equal(latent(query), latent(counts)[:20])


def test_cells_without_counts_of_these_genes_are_named(pair):
    reference, query = pair
    query = sx.pp.align_query(query, reference)
    more = query.copy()
    more.X = sp.csr_matrix(more.X.toarray() * (np.arange(more.n_obs) != 3)[:, None])
    other = ad.AnnData(np.ones((more.n_obs, 1), np.float32), more.obs, pd.DataFrame(index=["other"]))
    more = ad.concat([more, other], axis=1, merge="same")
    with pytest.raises(ValueError, match=query.obs_names[3]):
        sx.tl.map_query(more, reference)


def test_estimated_counts_can_be_mapped_when_asked_for(pair):
    reference, query = pair
    query.X = query.X * 0.9
    with pytest.warns(sx.ScviExtWarning, match="not integers"):
        sx.tl.map_query(query, reference, check="warn", **QUICK)
    assert np.isfinite(latent(query)).all()


def test_own_fits_are_not_given_up(pair):
    reference, query = pair
    sx.pp.setup_anndata(query)
    sx.tl.fit(query, **SMALL)
    with pytest.raises(ValueError, match="key_added"):
        sx.tl.map_query(query, reference)
    with pytest.raises(ValueError, match="key_added"):
        sx.tl.map_query(reference, reference)
    sx.tl.map_query(query, reference, key_added="mapped", **QUICK)
    sx.tl.map_query(query, reference, key_added="mapped", **QUICK)
    assert list(sx.get.fits(query).index) == ["mapped", "scvi"]


# ---- how it is done ------------------------------------------------------------------------------------------------


def test_kinds_of_matrices_and_views(pair):
    reference, query = pair
    expected = latent(sx.tl.map_query(query, reference, copy=True, **QUICK))
    for kind in (np.asarray, sp.csc_matrix):
        other = query.copy()
        other.X = kind(query.X.toarray()).astype(np.int64 if kind is np.asarray else np.float64)
        sx.tl.map_query(other, reference, **QUICK)
        np.testing.assert_array_equal(latent(other), expected)
    whole = ad.concat([query, query], index_unique="-")
    view = whole[: query.n_obs]
    sx.tl.map_query(view, reference, **QUICK)
    np.testing.assert_array_equal(latent(view), expected)
    assert "scvi_ext" not in whole.uns


def test_backed(pair, tmp_path):
    reference, query = pair
    expected = latent(sx.tl.map_query(query, reference, copy=True, **QUICK))
    query.write_h5ad(tmp_path / "query.h5ad")
    backed = ad.read_h5ad(tmp_path / "query.h5ad", backed="r")
    sx.tl.map_query(backed, reference, **QUICK)
    sx.tl.get_latent(backed)
    np.testing.assert_array_equal(backed.obsm["X_scvi"], expected)
    backed.file.close()


@pytest.mark.parametrize("epochs", [0, 2])
def test_it_travels(pair, tmp_path, epochs):
    reference, query = pair
    sx.tl.map_query(query, reference, max_epochs=epochs, progress=False)
    expected = latent(query)
    query.write_h5ad(tmp_path / "a.h5ad")
    query.write_zarr(tmp_path / "a.zarr")
    for again in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        np.testing.assert_array_equal(latent(again), expected)
        assert list(sx.get.fits(again)["stop_reason"]) == ["projected" if epochs == 0 else "finished"]
    sx.io.write_model(query, tmp_path / "model")
    assert sx.io.read_model(tmp_path / "model").status["new_batches"] == ["b2"]


def test_the_seed_decides_and_nothing_global_does(pair):
    reference, query = pair
    states = []
    for seed in (1, 1, 2):
        generators = np.random.get_state()[1].copy(), torch.get_rng_state()
        states.append(read_fit(sx.tl.map_query(query, reference, seed=seed, copy=True, **QUICK)).state)
        np.testing.assert_array_equal(np.random.get_state()[1], generators[0])
        assert torch.equal(torch.get_rng_state(), generators[1])
        np.random.default_rng().normal()
        torch.rand(3)
    key = "decoder.px_decoder.layers.0.linear.weight"
    np.testing.assert_array_equal(states[0][key], states[1][key])
    assert not np.array_equal(states[0][key], states[2][key])


def test_without_freezing_everything_is_trained(pair):
    reference, query = pair
    sx.tl.map_query(query, reference, freeze=False, **QUICK)
    before, after = read_fit(reference).state, read_fit(query).state
    assert not np.allclose(before["z_encoder.mean_encoder.weight"], after["z_encoder.mean_encoder.weight"])
    assert not np.allclose(latent(under_the_fit_of(query, reference)), latent(reference))


def test_the_setup_is_that_of_the_query(pair, logged):
    reference, query = pair
    sx.pp.setup_anndata(query, labels_key="cell_type")
    sx.tl.fit(query, key_added="own", **SMALL)
    sx.tl.map_query(query, reference, **QUICK)
    assert "'own'" in logged()
    table = sx.get.setup(query).set_index("field")
    assert table.loc["batch", "n_categories"] == 1
    sx.tl.get_latent(query)
    sx.tl.fit(query, key_added="again", **SMALL)
    assert Registry.from_uns(read_fit(query, "again").setup).batch_categories == ("b2",)


def test_an_interrupt_keeps_what_was_trained(pair, monkeypatch):
    from scvi_ext.engine.step import TrainingStep

    reference, query = pair
    step, calls = TrainingStep.__call__, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        step(self)

    monkeypatch.setattr(TrainingStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sx.tl.map_query(query, reference, max_epochs=30, progress=False)
    assert read_fit(query).status["stop_reason"] == "interrupted"
    assert np.isfinite(latent(query)).all()
