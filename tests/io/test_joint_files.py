"""Models of several data sets in files: those of scvi-tools, and folders of our own."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scvi_ext as sx
from scvi_ext.data.registry import read_fit
from scvi_ext.io._torch_archive import read_torch_archive

CASE = Path(__file__).parents[1] / "golden" / "cases" / "gimvi_zinb_nb_layers_latent_library"
_FITTED: dict[str, ad.AnnData] = {}


@pytest.fixture
def cells() -> dict[str, ad.AnnData]:
    """The cells of a golden case, not set up."""
    found = {}
    with np.load(CASE / "expected.npz") as file:
        for name, fit in sx.io.read_scvi_tools(CASE).items():
            obs = pd.DataFrame({"batch": file[f"obs.batch.{name}"]})
            obs.index = [f"cell{i}" for i in range(len(obs))]
            found[name] = ad.AnnData(
                file[f"x.{name}"].astype(np.float32), obs=obs, var=pd.DataFrame(index=fit.var_names)
            )
    return found


@pytest.fixture
def variant(tmp_path):
    """Write the golden case with something changed: ``variant(change)``, ``change`` edits the plain content."""

    def write(change) -> Path:
        content = read_torch_archive(CASE / "model.pt")
        change(content)
        torch.save(content, tmp_path / "model.pt")
        return tmp_path

    return write


@pytest.fixture
def datasets(make_counts) -> dict[str, ad.AnnData]:
    """Two data sets with a fit that knows how to go on."""
    if not _FITTED:
        _FITTED.update({"rna": make_counts(90, seed=1), "spatial": make_counts(70, seed=2)[:, 10:25].copy()})
        for adata in _FITTED.values():
            sx.pp.setup_anndata(adata, batch_key="batch")
        sx.tl.fit(_FITTED, "gimvi", n_latent=3, max_epochs=2, checkpoint=True, progress=False)
    return {name: adata.copy() for name, adata in _FITTED.items()}


# ---- scvi-tools ----------------------------------------------------------------------------------------------------


def test_data_sets_have_the_names_that_are_given(cells):
    given = {"atlas": cells["seq"], "tissue": cells["spatial"]}
    assert sx.io.read_scvi_tools(CASE, given, key_added="mine") is None
    for name, adata in given.items():
        joint = read_fit(adata, "mine").joint
        assert list(joint["datasets"]) == ["atlas", "tissue"]
        assert joint["dataset"] == name
    sx.tl.loss_magnitude(given)
    sx.tl.impute(given["tissue"], decode_mode="atlas")
    assert given["tissue"].obsm["mine_imputed"].shape == (12, 10)


def test_one_of_the_two_can_be_read_alone(cells):
    sx.io.read_scvi_tools(CASE, {"spatial": cells["spatial"]})
    both = {name: adata.copy() for name, adata in cells.items()}
    for adata in both.values():
        adata.uns.clear()
    sx.io.read_scvi_tools(CASE, {name: both[name] for name in ("spatial", "seq")})  # found by these names, not by order
    for adata in (cells["spatial"], both["spatial"]):
        sx.tl.get_elbo(adata, return_mean=False)
    np.testing.assert_array_equal(cells["spatial"].obs["gimvi_elbo"], both["spatial"].obs["gimvi_elbo"])


def test_without_cells_the_fits_are_returned():
    fits = sx.io.read_scvi_tools(CASE, key_added="mine")
    assert list(fits) == ["seq", "spatial"]
    for name, fit in fits.items():
        assert fit.key == "mine"
        assert fit.joint["dataset"] == name
        assert fit.joint["batches"] == {"0": 3, "1": 3}
        assert len(fit.joint["genes"]) == 20
    np.testing.assert_array_equal(fits["spatial"].var_names, fits["seq"].var_names[fits["seq"].state["genes_1"]])


def test_cells_that_cannot_hold_it_are_refused_before_anything_is_written(cells):
    seq, spatial = cells.values()
    single = CASE.parent / "scvi_zinb"
    for path, adata, error, message in [
        (CASE, seq, TypeError, "give both by name"),
        (single, cells, TypeError, "of one AnnData, and a mapping was given"),
        (CASE, {"a": seq, "b": spatial, "c": spatial}, ValueError, "3 data sets were given"),
        (CASE, {"rna": seq}, ValueError, "1 data sets were given"),
        (CASE, {"seq": seq, "spatial": seq}, ValueError, "same AnnData was given under two names, 'seq', 'spatial'"),
        (CASE, {"seq": seq, "spatial": spatial[:, 1:].copy()}, KeyError, "1 of the 10 genes"),
        (CASE, {"seq": spatial, "spatial": seq}, KeyError, "10 of the 20 genes"),
    ]:
        with pytest.raises(error, match=message):
            sx.io.read_scvi_tools(path, adata)
    assert not seq.uns
    assert not spatial.uns


def test_batches_that_the_model_does_not_know_are_refused_before_anything_is_written(cells):
    spatial = cells["spatial"]
    spatial.obs["batch"] = "new"
    with pytest.raises(ValueError, match="unknown categories in 12 of 12 cells: 'new'"):
        sx.io.read_scvi_tools(CASE, cells)
    assert not any(adata.uns for adata in cells.values())


def test_options_that_do_not_exist_here_are_refused(variant):
    def dispersion(content):
        content["attr_dict"]["init_params_"]["kwargs"]["model_kwargs"]["dispersion"] = "gene-label"

    with pytest.raises(ValueError, match="dispersion='gene-label', an option that 'gimvi' does not have"):
        sx.io.read_scvi_tools(variant(dispersion))

    def unknown(content):
        content["attr_dict"]["init_params_"]["kwargs"]["model_kwargs"]["spice"] = 3

    with pytest.raises(ValueError, match="spice=3"):
        sx.io.read_scvi_tools(variant(unknown))


def test_defaults_of_their_module_are_kept_where_the_file_names_none(variant):
    def forget(content):
        for option in ("dim_hidden_decoder_individual", "dim_hidden_decoder_shared"):
            del content["attr_dict"]["init_params_"]["kwargs"]["model_kwargs"][option]
        weights = content["model_state_dict"]
        for name, array in list(weights.items()):
            wide = [64 if size in (6, 7) and "decoder.px" in name else size for size in array.shape]
            # The first of these layers sees five units of z and six batches.
            if name == "decoder.px_decoder_conditioned.fc_layers.Layer 0.0.weight":
                wide = [64, array.shape[1]]
            weights[name] = torch.as_tensor(np.resize(np.asarray(array), wide))

    config = sx.io.read_scvi_tools(variant(forget))["seq"].config
    assert config["dim_hidden_decoder_individual"] == config["dim_hidden_decoder_shared"] == 64
    assert config["dropout_rate_encoder"] == 0.2


def test_files_with_another_layout_are_refused(variant):
    def cut(content):
        del content["spatial_var_names"]

    with pytest.raises(ValueError, match="not laid out as scvi-tools"):
        sx.io.read_scvi_tools(variant(cut))

    def rename(content):
        for registry in content["attr_dict"]["registries_"]:
            registry["model_name"] = "DIAGVI"

    with pytest.raises(ValueError, match="of the class 'DIAGVI'"):
        sx.io.read_scvi_tools(variant(rename))


# ---- folders of our own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rna", "spatial"])
def test_a_folder_holds_what_one_data_set_needs(datasets, tmp_path, name):
    adata = datasets[name]
    sx.io.write_model(adata, tmp_path / "model")
    fit, back = read_fit(adata), sx.io.read_model(tmp_path / "model")
    assert list(back.joint["datasets"]) == ["rna", "spatial"]
    assert back.joint["dataset"] == name
    assert back.state.keys() == fit.state.keys()
    for part, array in back.state.items():
        np.testing.assert_array_equal(array, fit.state[part])
    new = adata.copy()
    new.uns.clear()
    sx.io.read_model(tmp_path / "model", new)
    gene_list = ["gene3", "gene12"]
    for part in (adata, new):
        sx.tl.get_latent(part)
        sx.tl.impute(part, gene_list=gene_list, decode_mode="rna")
    for slot in ("X_gimvi", "gimvi_imputed"):
        np.testing.assert_array_equal(new.obsm[slot], adata.obsm[slot])


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_what_was_read_from_folders_travels_on_and_can_be_resumed(datasets, tmp_path, suffix):
    read = {}
    for name, adata in datasets.items():
        sx.io.write_model(adata, tmp_path / name)
        new = adata.copy()
        new.uns.clear()
        sx.io.read_model(tmp_path / name, new)
        file = tmp_path / f"{name}.{suffix}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*zarr")  # of anndata, about its own next version
            new.write_h5ad(file) if suffix == "h5ad" else new.write_zarr(file)
            read[name] = ad.read_h5ad(file) if suffix == "h5ad" else ad.read_zarr(file)
    for parts in (datasets, read):
        sx.tl.fit(parts, "gimvi", resume=True, progress=False)
        sx.tl.discriminator_confusion(parts)
    np.testing.assert_array_equal(
        read["rna"].uns["gimvi_discriminator_confusion"], datasets["rna"].uns["gimvi_discriminator_confusion"]
    )


def test_reading_leaves_the_fits_of_other_data_sets_as_they_are(datasets, tmp_path):
    sx.io.write_model(datasets["rna"], tmp_path / "model")
    before = copy.deepcopy(datasets["spatial"].uns["scvi_ext"]["fits"]["gimvi"]["joint"])
    with pytest.raises(ValueError, match="already has a fit 'gimvi'"):
        sx.io.read_model(tmp_path / "model", datasets["rna"])
    with pytest.raises(KeyError, match="genes of the model are not in"):
        sx.io.read_model(tmp_path / "model", datasets["spatial"], key_added="other")
    with pytest.raises(TypeError, match=r"is a dict; .* one data set at a time"):
        sx.io.write_model(datasets, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    assert str(datasets["spatial"].uns["scvi_ext"]["fits"]["gimvi"]["joint"]) == str(before)
