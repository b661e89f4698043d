from __future__ import annotations

import copy
import io
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch

import scvi_ext as sx
from scvi_ext.data.registry import Registry, read_fit
from scvi_ext.io._scvi_tools import _translate
from scvi_ext.io._torch_archive import read_torch_archive

CASES = Path(__file__).parents[1] / "golden" / "cases"
COVARIATES = CASES / "scvi_nb_two_layers_covariates"


def cells(case: Path) -> ad.AnnData:
    """The cells of a golden case, three times over, not set up."""
    with np.load(case / "expected.npz") as file:
        obs = {name.removeprefix("obs."): np.tile(file[name], 3) for name in file.files if name.startswith("obs.")}
        x = np.tile(file["x"].astype(np.float32), (3, 1))
    genes = sx.io.read_scvi_tools(case).var_names
    return ad.AnnData(
        x, obs=pd.DataFrame(obs, index=[f"cell{i}" for i in range(len(x))]), var=pd.DataFrame(index=genes)
    )


@pytest.fixture
def adata() -> ad.AnnData:
    return cells(COVARIATES)


@pytest.fixture
def variant(tmp_path):
    """Write a golden case with something changed: ``variant(case, change)``, ``change`` edits the plain content."""

    def write(case: str, change) -> Path:
        content = read_torch_archive(CASES / case / "model.pt")
        content["attr_dict"]["history_"] = {}
        change(content)
        torch.save(content, tmp_path / "model.pt")
        return tmp_path

    return write


def options(content) -> dict:
    return content["attr_dict"]["init_params_"]["kwargs"].setdefault("kwargs", {})


def assert_untouched(adata: ad.AnnData, before: ad.AnnData) -> None:
    assert str(adata.uns) == str(before.uns)
    pd.testing.assert_frame_equal(adata.obs, before.obs)


# ---- what is read --------------------------------------------------------------------------------------------------


def test_setup_is_that_of_the_model():
    registry = Registry.from_uns(sx.io.read_scvi_tools(COVARIATES).setup)
    assert registry == Registry(
        batch_key="batch",
        categorical_covariate_keys=("phase",),
        continuous_covariate_keys=("mito",),
        batch_categories=("a", "b", "c"),
        covariate_categories=(("1", "2"),),  # numbers there, their strings here
    )


def test_labels_and_size_factors_are_registered():
    labels = Registry.from_uns(sx.io.read_scvi_tools(CASES / "scvi_zinb_gene_label").setup)
    assert labels.labels_key == "label"
    assert len(labels.labels_categories) > 1
    size = Registry.from_uns(sx.io.read_scvi_tools(CASES / "scvi_poisson_size_factor").setup)
    assert size.size_factor_key == "size_factor"
    assert size.labels_categories == ()


def test_a_model_without_batches_has_none():
    assert Registry.from_uns(sx.io.read_scvi_tools(CASES / "linear_scvi_zinb_bias").setup) == Registry()


def test_weights_are_float32_and_counters_whole():
    fit = sx.io.read_scvi_tools(COVARIATES)
    kinds = {array.dtype for array in fit.state.values()}
    assert kinds == {np.dtype("float32"), np.dtype("int64")}
    assert all(name.endswith("num_batches_tracked") for name, a in fit.state.items() if a.dtype == np.int64)


def test_parts_that_the_model_never_used_are_left_out():
    fit = sx.io.read_scvi_tools(CASES / "scvi_poisson_size_factor")
    unused = ("library", "dispersion", "decoder.px_r_decoder", "decoder.px_dropout_decoder")
    assert not any(name.startswith(unused) for name in fit.state)


def test_history_has_a_row_per_epoch_and_the_sign_of_an_elbo():
    with np.load(CASES / "linear_scvi" / "expected.npz") as file:
        theirs = {name.removeprefix("history."): file[name] for name in file.files if name.startswith("history.")}
    history = sx.io.read_scvi_tools(CASES / "linear_scvi").history
    assert history.index.name == "epoch"
    assert history.index.tolist() == list(range(1, 11))
    assert set(history) == set(theirs)
    np.testing.assert_array_equal(history["elbo_train"], -theirs["elbo_train"])
    np.testing.assert_array_equal(history["reconstruction_loss_train"], theirs["reconstruction_loss_train"])
    # Held-out cells were looked at in every second epoch.
    assert history["elbo_validation"].notna().tolist() == [False, True] * 5
    np.testing.assert_array_equal(history["elbo_validation"].dropna(), -theirs["elbo_validation"])


@pytest.mark.parametrize("values", [[1.0, 2.0], np.array([1.0, 2.0], dtype=object), [np.float32(1), np.float32(2)]])
@pytest.mark.parametrize(
    "index", [pd.RangeIndex(2, name="epoch"), pd.Index([0, 4], name="epoch"), pd.Index([0, 4], dtype=object)]
)
def test_history_is_read_from_tables_of_the_pandas_at_hand(variant, values, index):
    table = pd.DataFrame({"elbo_train": values}, index=index)
    folder = variant("scvi_zinb", lambda c: c["attr_dict"].update(history_={"elbo_train": table}))
    history = sx.io.read_scvi_tools(folder).history
    assert history["elbo_train"].tolist() == [-1.0, -2.0]
    assert history.index.tolist() == [i + 1 for i in index]


def test_a_history_that_is_not_understood_is_left_out_with_a_warning(variant):
    good = pd.DataFrame({"elbo_train": [1.0]})
    tables = {"elbo_train": good, "odd": pd.DataFrame({"a": [1.0], "b": ["x"]})}
    folder = variant("scvi_zinb", lambda c: c["attr_dict"].update(history_=tables))
    with pytest.warns(sx.ScviExtWarning, match="'odd'"):
        fit = sx.io.read_scvi_tools(folder)
    assert list(fit.history) == ["elbo_train"]


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("var_activation", "softplus"),
        ("extra_decoder_kwargs", {"bias": False}),
        ("batch_embedding_kwargs", {"embedding_dim": 3}),
        ("something_new", True),
    ],
)
def test_an_option_that_does_not_exist_here_is_named(variant, option, value):
    folder = variant("scvi_zinb", lambda c: options(c).update({option: value}))
    with pytest.raises(ValueError, match=f"{option}="):
        sx.io.read_scvi_tools(folder)


@pytest.mark.parametrize(
    ("case", "given", "kept"),
    [
        ("scvi_zinb", {"deeply_inject_covariates": False}, {"deeply_inject_covariates": True}),
        ("linear_scvi", {"encode_covariates": True, "use_layer_norm": "both"}, {"encode_covariates": False}),
        ("scvi_zinb", {"extra_payload_autotune": True}, {}),
        ("scvi_zinb", {"var_activation": None, "extra_encoder_kwargs": {}}, {}),
    ],
)
def test_an_option_without_effect_there_is_left_out(variant, case, given, kept):
    plain = sx.io.read_scvi_tools(CASES / case)
    fit = sx.io.read_scvi_tools(variant(case, lambda c: options(c).update(given)))
    assert fit.config == dict(plain.config) | kept == dict(plain.config)
    assert fit.state.keys() == plain.state.keys()


def test_a_dispersion_that_a_poisson_model_never_used_is_left_out(variant):
    def change(content):
        content["attr_dict"]["init_params_"]["non_kwargs"]["dispersion"] = "gene-batch"
        content["model_state_dict"]["px_r"] = torch.zeros(40, 3)

    fit = sx.io.read_scvi_tools(variant("scvi_poisson_size_factor", change))
    assert fit.config["dispersion"] == "gene"
    assert "dispersion.log_theta" not in fit.state


def test_a_dispersion_per_label_without_labels_is_one_per_gene(variant):
    def change(content):
        content["attr_dict"]["init_params_"]["non_kwargs"]["dispersion"] = "gene-label"
        content["model_state_dict"]["px_r"] = torch.arange(40.0).reshape(40, 1)

    fit = sx.io.read_scvi_tools(variant("scvi_zinb", change))
    assert fit.config["dispersion"] == "gene"
    np.testing.assert_array_equal(fit.state["dispersion.log_theta"], np.arange(40))


def test_the_unlabeled_category_is_no_label():
    fit = sx.io.read_scvi_tools(CASES / "scanvi_zinb")
    registry = Registry.from_uns(fit.setup)
    assert registry.unlabeled_category == "Dendritic"
    assert "Dendritic" not in registry.labels_categories
    assert len(registry.labels_categories) == len(fit.state["classifier.output.bias"])
    np.testing.assert_allclose(np.exp(fit.state["log_y_prior"]).sum(), 1, rtol=1e-6)


def test_a_prior_of_labels_comes_along(variant):
    n = len(sx.io.read_scvi_tools(CASES / "scanvi_zinb").state["log_y_prior"])
    prior = np.arange(1.0, n + 1) / np.arange(1.0, n + 1).sum()

    def change(content):
        options(content)["y_prior"] = torch.tensor(prior).reshape(1, -1)
        options(content)["labels_groups"] = list(range(n))  # without use_labels_groups nobody looks at them
        content["model_state_dict"]["y_prior"] = torch.tensor(prior, dtype=torch.float32).reshape(1, -1)

    file = variant("scanvi_zinb", change) / "model.pt"
    fit = _translate(read_torch_archive(file), file)
    np.testing.assert_allclose(fit.config["y_prior"], prior, rtol=1e-6)
    np.testing.assert_allclose(np.exp(fit.state["log_y_prior"]), prior, rtol=1e-6)
    assert fit.config["labels_groups"] is None


@pytest.mark.parametrize("option", [{"use_labels_groups": True}, {"classifier_parameters": {"n_hidden": 4}}], ids=str)
def test_options_of_scanvi_without_a_counterpart_are_refused(variant, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        sx.io.read_scvi_tools(variant("scanvi_zinb", lambda content: options(content).update(option)))


def test_a_model_of_scanvi_takes_a_query():
    query = cells(CASES / "scanvi_zinb")
    query.obs = query.obs.drop(columns="label").assign(batch="new")
    sx.tl.map_query(query, CASES / "scanvi_zinb", max_epochs=2, progress=False)
    sx.tl.classify(query)
    known = read_fit(query).setup["labels_categories"]
    assert set(query.obs["scanvi_prediction"]) <= set(known)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_another_class_is_named_with_those_that_can_be_read(variant):
    folder = variant("scvi_zinb", lambda c: c["attr_dict"]["registry_"].update(model_name="PEAKVI"))
    with pytest.raises(ValueError, match=r"'PEAKVI'.*'LinearSCVI', 'SCANVI', 'SCVI', 'TOTALVI'"):
        sx.io.read_scvi_tools(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("attr_dict"),
        lambda c: c.pop("var_names"),
        lambda c: c.pop("model_state_dict"),
        lambda c: c["attr_dict"].pop("registry_"),
        lambda c: c["attr_dict"].pop("init_params_"),
        lambda c: c["attr_dict"]["registry_"].pop("setup_args"),
        lambda c: c["attr_dict"]["registry_"]["field_registries"].pop("batch"),
        lambda c: c.update(attr_dict=[1, 2]),
        lambda c: c["model_state_dict"].update({"px_r": "text"}),
    ],
)
def test_a_file_of_another_layout_is_reported(variant, change):
    with pytest.raises(ValueError, match="is not laid out as scvi-tools"):
        sx.io.read_scvi_tools(variant("scvi_zinb", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("px_r"), r"missing: 'dispersion.log_theta'"),
        (lambda state: state.update(more=np.zeros(2)), r"unexpected: 'more'"),
        (lambda state: state.update(px_r=np.zeros(39)), r"another shape: 'dispersion.log_theta'"),
        (lambda state: state.pop("z_encoder.mean_encoder.bias"), r"missing: 'z_encoder.mean_encoder.bias'"),
    ],
)
def test_weights_that_do_not_fit_are_named(variant, change, message):
    folder = variant("scvi_zinb", lambda c: change(c["model_state_dict"]))
    with pytest.raises(ValueError, match=message):
        sx.io.read_scvi_tools(folder)


class MakesAFolder:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "hide",
    [
        lambda content, evil: content.update(more=evil),
        lambda content, evil: content["model_state_dict"].update(px_r=evil),
        lambda content, evil: content["attr_dict"]["history_"].update(elbo_train=evil),
        lambda content, evil: content.update(var_names=np.array([evil], dtype=object)),
    ],
)
def test_a_model_with_a_program_inside_executes_nothing(variant, adata, tmp_path, hide):
    marker = tmp_path / "executed"
    folder = variant("scvi_zinb", lambda content: hide(content, MakesAFolder(marker)))
    with pytest.raises(ValueError, match=rf"'{os.name}\.mkdir'.*nothing in it was executed"):
        sx.io.read_scvi_tools(folder, adata)
    assert not marker.exists()
    assert "scvi_ext" not in adata.uns


def test_a_missing_file_is_reported_with_what_is_there(tmp_path):
    (tmp_path / "my_model.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"'my_model\.pt'.*prefix="):
        sx.io.read_scvi_tools(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        sx.io.read_scvi_tools(tmp_path / "nothing")


def test_files_with_a_prefix_and_single_files_are_read(tmp_path):
    content = (CASES / "scvi_zinb" / "model.pt").read_bytes()
    (tmp_path / "my_model.pt").write_bytes(content)
    expected = sx.io.read_scvi_tools(CASES / "scvi_zinb").state
    for fit in (
        sx.io.read_scvi_tools(tmp_path, prefix="my_"),
        sx.io.read_scvi_tools(str(tmp_path / "my_model.pt")),
    ):
        assert fit.state.keys() == expected.keys()
    with pytest.raises(ValueError, match="prefix='my_' has no effect"):
        sx.io.read_scvi_tools(tmp_path / "my_model.pt", prefix="my_")


def test_reading_leaves_the_global_random_state_alone(adata):
    before = torch.get_rng_state()
    sx.io.read_scvi_tools(COVARIATES, adata)
    assert torch.equal(torch.get_rng_state(), before)


# ---- into an AnnData -----------------------------------------------------------------------------------------------


def test_a_model_is_put_into_adata_and_used(adata):
    assert sx.io.read_scvi_tools(COVARIATES, adata) is None
    assert Registry.from_uns(adata.uns["scvi_ext"]["setup"]).batch_key == "batch"
    assert adata.uns["scvi_ext"]["last_fit"] == "scvi"
    sx.tl.get_latent(adata)
    assert adata.obsm["X_scvi"].shape == (adata.n_obs, 5)


def test_genes_are_found_by_name(adata):
    rng = np.random.default_rng(0)
    more = ad.AnnData(np.ones((adata.n_obs, 3), np.float32), obs=adata.obs, var=pd.DataFrame(index=["x", "y", "z"]))
    wider = ad.concat([adata, more], axis="var", merge="same")
    shuffled = wider[:, rng.permutation(wider.n_vars)].copy()
    for cells_ in (adata, shuffled):
        sx.io.read_scvi_tools(COVARIATES, cells_)
        sx.tl.get_latent(cells_)
    np.testing.assert_array_equal(shuffled.obsm["X_scvi"], adata.obsm["X_scvi"])


def test_a_view_becomes_an_anndata_of_its_own(adata):
    view = adata[:5]
    sx.io.read_scvi_tools(COVARIATES, view)
    assert not view.is_view
    assert "scvi_ext" not in adata.uns


@pytest.mark.parametrize("write", ["write_h5ad", "write_zarr"])
def test_the_model_travels_on(adata, tmp_path, write):
    sx.io.read_scvi_tools(COVARIATES, adata)
    sx.tl.get_latent(adata)
    getattr(adata, write)(tmp_path / "file")
    back = {"write_h5ad": ad.read_h5ad, "write_zarr": ad.read_zarr}[write](tmp_path / "file")
    expected = back.obsm.pop("X_scvi")
    sx.tl.get_latent(back)
    np.testing.assert_array_equal(back.obsm["X_scvi"], expected)


def test_key_added_names_the_fit(adata):
    sx.io.read_scvi_tools(COVARIATES, adata, key_added="theirs")
    assert list(adata.uns["scvi_ext"]["fits"]) == ["theirs"]
    assert read_fit(adata).key == "theirs"
    with pytest.raises(ValueError, match="without '/'"):
        sx.io.read_scvi_tools(COVARIATES, adata, key_added="a/b")


def test_a_setup_that_agrees_is_kept(adata):
    sx.pp.setup_anndata(
        adata,
        batch_key="batch",
        categorical_covariate_keys=["phase"],
        continuous_covariate_keys=["mito"],
    )
    before = copy.deepcopy(adata.uns["scvi_ext"]["setup"])
    sx.io.read_scvi_tools(COVARIATES, adata)
    assert str(adata.uns["scvi_ext"]["setup"]) == str(before)


def _repeat_a_gene(adata: ad.AnnData) -> ad.AnnData:
    adata.var_names = [adata.var_names[1], *adata.var_names[1:]]
    return adata


def _without(adata: ad.AnnData, column: str) -> ad.AnnData:
    del adata.obs[column]
    return adata


def _set_up(adata: ad.AnnData, **arguments) -> ad.AnnData:
    sx.pp.setup_anndata(adata, **arguments)
    return adata


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda a: a[:, :-2].copy(), KeyError, "2 of the 40 genes"),
        (_repeat_a_gene, ValueError, "more than once"),
        (lambda a: _without(a, "batch"), KeyError, "'batch' is not in adata.obs"),
        (lambda a: _without(a, "mito"), KeyError, "'mito' is not in adata.obs"),
        (lambda a: _set_up(a, batch_key="phase"), ValueError, "batch_key='batch'.*batch_key='phase'"),
        (lambda a: _set_up(a), ValueError, "batch_key='batch'.*batch_key=None"),
    ],
)
def test_an_adata_that_does_not_suit_is_refused_and_left_alone(adata, spoil, error, message):
    spoiled = spoil(adata)
    before = copy.deepcopy(spoiled)
    with pytest.raises(error, match=message):
        sx.io.read_scvi_tools(COVARIATES, spoiled)
    assert_untouched(spoiled, before)


@pytest.mark.parametrize("key", ["batch", "phase"])
def test_categories_that_the_model_does_not_know_are_refused(adata, key):
    fewer = adata[adata.obs[key] == adata.obs[key].iloc[0]].copy()
    sx.io.read_scvi_tools(COVARIATES, fewer)
    sx.tl.get_latent(fewer)
    adata.obs[key] = ["new", *adata.obs[key].astype(str)[1:]]
    before = copy.deepcopy(adata)
    with pytest.raises(ValueError, match=rf"obs\['{key}'\] has 1 unknown categories in 1 of .*'new'"):
        sx.io.read_scvi_tools(COVARIATES, adata)
    assert_untouched(adata, before)


def test_an_adata_without_raw_counts_is_refused(adata):
    adata.X = np.log1p(adata.X)
    before = copy.deepcopy(adata)
    with pytest.raises(ValueError, match="not raw counts"):
        sx.io.read_scvi_tools(COVARIATES, adata)
    assert_untouched(adata, before)


def test_what_was_written_is_logged(adata):
    log = io.StringIO()
    settings = sc.settings.verbosity, sc.settings.logfile
    sc.settings.verbosity, sc.settings.logfile = "hint", log
    try:
        sx.io.read_scvi_tools(COVARIATES, adata)
    finally:
        sc.settings.verbosity, sc.settings.logfile = settings
    assert "'scvi', the fitted model (adata.uns['scvi_ext']['fits'])" in log.getvalue()
    assert "'setup'" in log.getvalue()


# ---- AutoZI ------------------------------------------------------------------------------------------------------


def test_the_prior_is_that_of_the_weights(variant):
    """Of genes, scvi-tools puts alpha in the place of beta, whatever was asked for."""

    def ask(content, alpha, beta):
        content["attr_dict"]["init_params_"]["non_kwargs"].update(alpha_prior=alpha, beta_prior=beta)
        content["model_state_dict"].update(alpha_prior_logit=torch.logit(torch.tensor([0.3])))
        content["model_state_dict"].update(beta_prior_logit=torch.logit(torch.tensor([0.3])))

    with pytest.warns(sx.ScviExtWarning, match=r"alpha_prior=0.3, beta_prior=0.7, but its weights .* beta_prior=0.3:"):
        fit = sx.io.read_scvi_tools(variant("autozi_gene_learned_prior", lambda c: ask(c, 0.3, 0.7)))
    assert (fit.config["alpha_prior"], fit.config["beta_prior"]) == (0.3, 0.3)
    with pytest.warns(sx.ScviExtWarning, match=r"alpha_prior=0.3, beta_prior=None, but its weights"):
        fit = sx.io.read_scvi_tools(variant("autozi_gene_learned_prior", lambda c: ask(c, 0.3, None)))
    assert fit.config["beta_prior"] == 0.3
    fit = sx.io.read_scvi_tools(variant("autozi_gene_learned_prior", lambda c: ask(c, 0.3, 0.3)))
    assert (fit.config["alpha_prior"], fit.config["beta_prior"]) == (0.3, 0.3)


def test_a_learned_prior_stays_one():
    fit = sx.io.read_scvi_tools(CASES / "autozi_gene_learned_prior")
    assert fit.config["alpha_prior"] is fit.config["beta_prior"] is None


def test_zero_inflation_by_label_without_labels_is_that_of_genes(variant):
    def change(content):
        content["attr_dict"]["init_params_"]["non_kwargs"]["zero_inflation"] = "gene-label"
        for name in ("alpha", "beta"):
            logits = content["model_state_dict"][f"{name}_posterior_logit"]
            content["model_state_dict"][f"{name}_posterior_logit"] = torch.tensor(logits).reshape(-1, 1)

    fit = sx.io.read_scvi_tools(variant("autozi_gene_learned_prior", change))
    expected = sx.io.read_scvi_tools(CASES / "autozi_gene_learned_prior")
    assert fit.config["zero_inflation"] == "gene"
    np.testing.assert_array_equal(fit.state["alpha_posterior_logit"], expected.state["alpha_posterior_logit"])


def test_the_cells_that_were_trained_on_share_the_divergence(variant):
    assert sx.io.read_scvi_tools(CASES / "autozi_gene_label").state["n_train"] == 54  # 60, of which 6 were held out
    with pytest.warns(sx.ScviExtWarning, match="does not say how many cells the model was trained on"):
        fit = sx.io.read_scvi_tools(
            variant("autozi_gene_label", lambda c: c["attr_dict"].update(train_indices_=None, is_trained_=False))
        )
    assert fit.state["n_train"] == 1


def test_zero_inflation_of_an_imported_fit_is_read_out():
    case = CASES / "autozi_gene_batch_latent_library"
    adata = cells(case)
    sx.io.read_scvi_tools(case, adata)
    sx.tl.get_zero_inflation(adata)
    with np.load(case / "expected.npz") as file:
        alpha = file["alpha_posterior"]
    assert list(adata.varm["autozi_zero_inflation_alpha"]) == ["a", "b", "c"]
    np.testing.assert_allclose(adata.varm["autozi_zero_inflation_alpha"], alpha, rtol=1e-6)  # float32
