from __future__ import annotations

import copy
import json
from dataclasses import fields, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scvi_ext as sx
from scvi_ext import results
from scvi_ext._contract import SavedFit
from scvi_ext.data.registry import read_fit
from scvi_ext.io import _write_model

KEYS = {"scvi", "ldvae"}


@pytest.fixture
def folder(fitted, tmp_path) -> Path:
    sx.io.write_model(fitted, tmp_path / "model")
    return tmp_path / "model"


def assert_same_arrays(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        array = np.asarray(array)
        assert found[name].shape == array.shape, name
        if array.dtype.kind in "OUT":  # the kinds of text that files give back
            assert found[name].tolist() == array.tolist(), name
        else:
            assert found[name].dtype == array.dtype, name
            assert found[name].tobytes() == array.tobytes(), name  # bit for bit, NaN too


def assert_same_fit(found: SavedFit, expected: SavedFit) -> None:
    for field in fields(SavedFit):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name in ("state", "checkpoint") and other is not None:
            assert_same_arrays(one, other)
        elif field.name == "history":
            pd.testing.assert_frame_equal(one, other, check_exact=True, check_index_type=False)
        elif field.name == "setup":
            assert str(one) == str(other)
        elif field.name == "var_names":
            assert list(one) == list(other)
        else:
            assert one == other, field.name


def test_a_fit_comes_back_bit_for_bit(fitted, folder):
    assert {p.name for p in folder.iterdir()} == {"model.json", "model.safetensors"}
    assert_same_fit(sx.io.read_model(folder), read_fit(fitted))


def test_key_chooses_the_fit(fitted, tmp_path):
    sx.io.write_model(fitted, tmp_path / "model", "ldvae")
    assert sx.io.read_model(tmp_path / "model").model == "ldvae"
    with pytest.raises(KeyError, match="'scvi'"):
        sx.io.write_model(fitted, tmp_path / "other", "svci")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_travels_too(registered, tmp_path):
    sx.tl.fit(registered, n_hidden=8, n_latent=2, max_epochs=2, checkpoint=True)
    expected = read_fit(registered)
    kinds = {array.dtype.kind for array in expected.checkpoint.values()}
    assert {"f", "u"} < kinds  # optimiser, and generators as bytes; and text
    sx.io.write_model(registered, tmp_path / "model")
    assert_same_fit(sx.io.read_model(tmp_path / "model"), expected)


@pytest.mark.parametrize("write", ["write_h5ad", "write_zarr"])
def test_what_a_file_gave_back_is_written_just_the_same(registered, tmp_path, write):
    sx.tl.fit(registered, n_hidden=8, n_latent=2, max_epochs=2, checkpoint=True)
    expected = read_fit(registered)
    getattr(registered, write)(tmp_path / "file")
    back = {"write_h5ad": ad.read_h5ad, "write_zarr": ad.read_zarr}[write](tmp_path / "file")
    sx.io.write_model(back, tmp_path / "model")
    found = sx.io.read_model(tmp_path / "model")
    assert_same_fit(found, read_fit(back))
    assert_same_arrays(found.state, expected.state)


def test_numbers_that_json_does_not_have_come_back(fitted, tmp_path):
    history = pd.DataFrame(
        {
            "elbo": np.array([np.nan, np.inf, -np.inf, 1 / 3]),
            "single": np.array([0.1, np.nan, 1e-45, 3e38], dtype=np.float32),
            "steps": np.array([1, 2, 3, 2**62]),
            "text": ["a", "nan", "é", ""],
        },
        index=pd.Index([1, 2, 3, 7], name="epoch"),
    )
    fit = replace(read_fit(fitted), history=history, status={"loss": float("nan"), "list": [1.5, float("inf")]})
    results.write_fit(fitted, fit)
    sx.io.write_model(fitted, tmp_path / "model")
    text = (tmp_path / "model" / "model.json").read_text()
    json.loads(text, parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity
    found = sx.io.read_model(tmp_path / "model")
    pd.testing.assert_frame_equal(found.history, history, check_exact=True)
    assert np.isnan(found.status["loss"])
    assert found.status["list"] == [1.5, float("inf")]


def test_an_empty_history_comes_back(fitted, tmp_path):
    results.write_fit(fitted, replace(read_fit(fitted), history=pd.DataFrame()))
    sx.io.write_model(fitted, tmp_path / "model")
    assert sx.io.read_model(tmp_path / "model").history.empty


def test_the_order_of_numbers_in_memory_does_not_matter(fitted, tmp_path):
    fit = read_fit(fitted)
    state = {name: np.array(array, order="F") for name, array in fit.state.items()}
    assert any(not array.flags["C_CONTIGUOUS"] for array in state.values())
    results.write_fit(fitted, replace(fit, state=state))
    sx.io.write_model(fitted, tmp_path / "model")
    assert_same_arrays(sx.io.read_model(tmp_path / "model").state, fit.state)


def test_new_cells_in_another_order_of_genes(fitted, folder, make_counts):
    sx.tl.get_latent(fitted)
    new = make_counts(50, seed=8)
    more = ad.AnnData(np.ones((50, 2), np.float32), obs=new.obs, var=pd.DataFrame(index=["x", "y"]))
    shuffled = ad.concat([new, more], axis="var", merge="same")
    shuffled = shuffled[:, np.random.default_rng(0).permutation(shuffled.n_vars)].copy()
    for cells in (new, shuffled):
        assert sx.io.read_model(folder, cells) is None
        sx.tl.get_latent(cells)
    np.testing.assert_array_equal(shuffled.obsm["X_scvi"], new.obsm["X_scvi"])
    same = make_counts()
    sx.io.read_model(folder, same)
    sx.tl.get_latent(same)
    np.testing.assert_array_equal(same.obsm["X_scvi"], fitted.obsm["X_scvi"])


def test_a_model_is_read_beside_those_that_are_there(fitted, folder):
    sx.io.read_model(folder, fitted, key_added="again")
    assert fitted.uns["scvi_ext"]["fits"].keys() == KEYS | {"again"}
    assert fitted.uns["scvi_ext"]["last_fit"] == "again"
    sx.tl.get_latent(fitted, key="again")
    sx.tl.get_latent(fitted, key="scvi")
    np.testing.assert_array_equal(fitted.obsm["X_again"], fitted.obsm["X_scvi"])


def test_a_subset_with_fewer_batches_takes_the_model(folder, make_counts):
    subset = make_counts()
    subset = subset[subset.obs["batch"] == "b1"].copy()
    sx.pp.setup_anndata(subset, batch_key="batch")
    sx.io.read_model(folder, subset)
    sx.tl.get_latent(subset)
    assert subset.obsm["X_scvi"].shape == (subset.n_obs, 4)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda a: a[:, 1:].copy(), KeyError, "1 of the 60 genes.*'gene0'"),
        (lambda a: a.obs.pop("batch") is not None and a, KeyError, "'batch' is not in adata.obs"),
        (lambda a: sx.pp.setup_anndata(a, batch_key="sex", copy=True), ValueError, "batch_key='batch'"),
    ],
)
def test_an_adata_that_does_not_suit_is_refused_and_left_alone(counts, folder, spoil, error, message):
    spoiled = spoil(counts)
    before = copy.deepcopy(dict(spoiled.uns))
    with pytest.raises(error, match=message):
        sx.io.read_model(folder, spoiled)
    assert str(dict(spoiled.uns)) == str(before)


# ---- writing over what is there ------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_when_asked(fitted, folder):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        sx.io.write_model(fitted, folder, "ldvae")
    assert sx.io.read_model(folder).model == "scvi"
    sx.io.write_model(fitted, folder, "ldvae", overwrite=True)
    assert sx.io.read_model(folder).model == "ldvae"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_something_else_is_never_replaced(fitted, folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"'notes\.txt'"):
        sx.io.write_model(fitted, folder, overwrite=True)
    file = folder.parent / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is not the folder of a model"):
        sx.io.write_model(fitted, file, overwrite=True)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("stage", ["json", "rename"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_model(fitted, folder, monkeypatch, stage, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        if stage == "json":
            patched.setattr(_write_model.json, "dumps", fail)
        else:
            rename = Path.rename
            patched.setattr(Path, "rename", lambda a, b: fail() if a.name == "new" else rename(a, b))
        with pytest.raises(error):
            sx.io.write_model(fitted, folder, "ldvae", overwrite=True)
        with pytest.raises(error):
            sx.io.write_model(fitted, folder.parent / "other", "ldvae")
    assert sx.io.read_model(folder).model == "scvi"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_folders_above_are_made(fitted, tmp_path):
    sx.io.write_model(fitted, str(tmp_path / "a" / "b"))
    assert sx.io.read_model(str(tmp_path / "a" / "b")).model == "scvi"


# ---- damaged folders -----------------------------------------------------------------------------------------------


def edited(folder: Path, change) -> Path:
    document = json.loads((folder / "model.json").read_text())
    change(document)
    (folder / "model.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        sx.io.read_model(folder)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder that write_model wrote"):
        sx.io.read_model(tmp_path / "nothing")


@pytest.mark.parametrize("position", [100, -1])
def test_one_changed_byte_is_noticed(folder, position):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[position] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        sx.io.read_model(folder)


def test_the_weights_of_another_model_are_noticed(fitted, folder, tmp_path):
    sx.io.write_model(fitted, tmp_path / "other", "ldvae")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="another model"):
        sx.io.read_model(folder)


def test_a_cut_off_document_is_noticed(folder):
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="not complete JSON"):
        sx.io.read_model(folder)


@pytest.mark.parametrize("found", [2, None, "1", [1]])
def test_another_format_is_refused(folder, found):
    edited(folder, lambda document: document.update(format=found))
    with pytest.raises(ValueError, match=r"reads formats up to 1.*update scvi_ext"):
        sx.io.read_model(folder)


@pytest.mark.parametrize(
    "entry", ["key", "model", "config", "run", "setup", "var_names", "status", "history", "text", "has_checkpoint"]
)
def test_a_missing_entry_is_named(folder, entry):
    edited(folder, lambda document: document.pop(entry))
    with pytest.raises(ValueError, match=f"incomplete or was changed.*{entry}"):
        sx.io.read_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["config"].update(n_hidden=7), "another shape: 'decoder"),
        (lambda d: d["config"].update(reconstruction_loss="nb"), "unexpected: 'decoder.px_dropout_decoder"),
        (lambda d: d["config"].update(new_option=1), "'new_option'.*update scvi_ext"),
        (lambda d: d["var_names"].pop(), "59 genes"),
        (lambda d: d["setup"]["batch_categories"].append("b9"), "4 batches"),
        (lambda d: d.update(model="totalvi_2"), "model='totalvi_2' is not one of"),
        (lambda d: d.update(setup=3), "incomplete or was changed"),
    ],
)
def test_a_document_that_does_not_fit_the_weights_is_refused(folder, change, message):
    edited(folder, change)
    with pytest.raises(ValueError, match=message):
        sx.io.read_model(folder)


def test_nothing_in_a_folder_is_a_pickle(folder, monkeypatch):
    import pickle

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("a pickle was read"))
    sx.io.read_model(folder)
