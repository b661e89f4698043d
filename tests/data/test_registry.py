from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_ext._keys import FORMAT
from scvi_ext.data.registry import (
    Registry,
    check_fit_matches_setup,
    codes,
    read_fit,
    read_setup,
    stale_slots,
    used_categories,
)

FULL = Registry(
    layer="counts",
    batch_key="donor/run",
    labels_key="cell_type",
    unlabeled_category="unknown",
    size_factor_key="size",
    categorical_covariate_keys=("site/a", "sex"),
    continuous_covariate_keys=("age",),
    protein_obsm_key="proteins",
    protein_names=("CD3", "CD4/8"),
    batch_categories=("1", "2", "Zoë"),
    labels_categories=("B", "T"),
    covariate_categories=(("x",), ("f", "m")),
    missing_proteins=((), ("CD4/8",), ()),
)


def make_adata(registry: Registry = FULL) -> ad.AnnData:
    adata = ad.AnnData(np.ones((6, 4), dtype=np.float32))
    adata.uns["scvi_ext"] = {
        "format": FORMAT,
        "setup": registry.to_uns(),
        "fits": {"scvi": make_fit(registry), "other": make_fit(registry, n_latent=7)},
        "last_fit": "other",
    }
    return adata


def make_fit(registry: Registry, n_latent: int = 10) -> dict:
    return {
        "model": "scvi",
        "config": {
            "n_latent": np.int64(n_latent),
            "dropout_rate": np.float64(0.1),
            "log_variational": np.bool_(True),
            "dispersion": np.str_("gene"),
            "names": np.array(["a", "b"]),
            "layers": [np.int64(3), 4],
            "zero_d": np.array(2.5),
            "nested": {"seed": np.int32(1)},
        },
        "run": {"max_epochs": 3, "device": "cpu"},
        "setup": registry.to_uns(),
        "var_names": np.array([str(i) for i in range(4)]),
        "state": {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(5)},
        "history": pd.DataFrame({"elbo_train": [2.0, 1.0]}),
        "status": {"stopped": "max_epochs", "final": np.float32(1.0)},
    }


def through(adata: ad.AnnData, way: str, folder) -> ad.AnnData:
    match way:
        case "copy":
            return adata.copy()
        case "cells":
            return adata[[4, 1]]
        case "genes":
            return adata[:, ["2", "0"]].copy()
        case "concat":
            return ad.concat([adata], uns_merge="first")
        case "h5ad":
            adata.write_h5ad(folder / "a.h5ad")
            return ad.read_h5ad(folder / "a.h5ad")
        case "zarr":
            adata.write_zarr(folder / "a.zarr")
            return ad.read_zarr(folder / "a.zarr")


WAYS = ["copy", "cells", "genes", "concat", "h5ad", "zarr"]


@pytest.mark.parametrize("registry", [FULL, Registry(), Registry(batch_key="b", batch_categories=("only",))])
@pytest.mark.parametrize("way", WAYS)
def test_registry_survives(registry, way, tmp_path):
    assert read_setup(through(make_adata(registry), way, tmp_path)) == registry


def test_absent_is_left_out_and_keys_have_no_slash():
    assert Registry().to_uns() == {"counts": "X"}
    uns = FULL.to_uns()
    assert not any("/" in key for key in [*uns, *uns["covariate_categories"]])


def test_sizes_of_a_module():
    sizes = FULL.sizes(50)
    assert (sizes.n_input, sizes.n_batch, sizes.n_labels) == (50, 3, 2)
    assert (sizes.n_cats_per_cov, sizes.n_continuous_cov) == ((1, 2), 1)
    assert len(sizes.library_log_means) == len(sizes.library_log_vars) == sizes.n_batch
    assert Registry().sizes(50).n_batch == 1


def test_from_uns_reads_every_kind_of_string_array():
    names = ("a", "bc")
    for array in (np.array(names), np.array(names, dtype=object), pd.Categorical(names), list(names), pd.array(names)):
        assert Registry.from_uns({"batch_categories": array}).batch_categories == names
    for scalar in ("k", np.str_("k"), np.array("k")):
        assert Registry.from_uns({"batch_key": scalar}).batch_key == "k"
        assert type(Registry.from_uns({"batch_key": scalar}).batch_key) is str


def test_without_setup():
    with pytest.raises(KeyError, match=r"call scvi_ext\.pp\.setup_anndata\(adata\) first"):
        read_setup(ad.AnnData(np.ones((2, 2))))


def test_newer_format_is_refused():
    adata = make_adata()
    adata.uns["scvi_ext"]["format"] = FORMAT + 1
    for read in (read_setup, read_fit):
        with pytest.raises(ValueError, match=rf"format {FORMAT + 1}.*up to {FORMAT}.*update scvi_ext"):
            read(adata)


@pytest.mark.parametrize("way", WAYS)
def test_fit_survives_as_plain_python(way, tmp_path):
    fit = read_fit(through(make_adata(), way, tmp_path), "scvi")
    expected = {
        "n_latent": 10,
        "dropout_rate": 0.1,
        "log_variational": True,
        "dispersion": "gene",
        "names": ["a", "b"],
        "layers": [3, 4],
        "zero_d": 2.5,
        "nested": {"seed": 1},
    }
    assert fit.config == expected
    for name, value in expected.items():
        assert type(fit.config[name]) is type(value)
    assert type(fit.config["names"][0]) is str
    assert type(fit.config["layers"][0]) is int
    assert type(fit.status["final"]) is float
    assert fit.run == {"max_epochs": 3, "device": "cpu"}
    assert (fit.key, fit.model, fit.checkpoint) == ("scvi", "scvi", None)
    assert Registry.from_uns(fit.setup) == FULL
    assert list(fit.var_names) == ["0", "1", "2", "3"]
    assert all(type(value) is np.ndarray for value in fit.state.values())
    assert fit.state["steps"].shape == ()
    np.testing.assert_array_equal(fit.state["weight"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert list(fit.history["elbo_train"]) == [2.0, 1.0]


def test_last_fit_is_the_default():
    assert read_fit(make_adata()).key == "other"


def test_checkpoint_is_read():
    adata = make_adata()
    adata.uns["scvi_ext"]["fits"]["scvi"]["checkpoint"] = {"step": np.int64(3)}
    checkpoint = read_fit(adata, "scvi").checkpoint
    assert type(checkpoint["step"]) is np.ndarray
    assert checkpoint["step"] == 3


def test_unknown_fit_lists_those_there_are():
    with pytest.raises(KeyError, match=r"'scvy' is not in .*'scvi', 'other'.*Did you mean 'scvi'"):
        read_fit(make_adata(), "scvy")


def test_no_fit_says_what_to_call():
    with pytest.raises(KeyError, match=r"no fits: call scvi_ext\.tl\.fit\(adata\) first"):
        read_fit(ad.AnnData(np.ones((2, 2))))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", None),
        ("batch_key", "sample"),
        ("labels_key", "leiden"),
        ("unlabeled_category", None),
        ("size_factor_key", None),
        ("categorical_covariate_keys", ("site/a",)),
        ("continuous_covariate_keys", ("age", "mito")),
        ("protein_obsm_key", "adt"),
    ],
)
def test_fit_of_another_setup_is_refused_by_name(field, value):
    adata = make_adata()
    fit = read_fit(adata, "scvi")
    adata.uns["scvi_ext"]["setup"] = Registry(**{**vars(FULL), field: value}).to_uns()
    with pytest.raises(ValueError, match="The fit 'scvi' was trained with") as error:
        check_fit_matches_setup(fit, adata)
    for part in (f"{field}={getattr(FULL, field)!r}", f"{field}={value!r}", "setup_anndata", "tl.fit"):
        assert part in str(error.value)


@pytest.mark.parametrize("columns", [frozenset(), frozenset({"labels"}), frozenset({"protein"})])
def test_labels_and_proteins_that_a_fit_does_not_read_may_change(columns):
    read = FULL.read_by(columns)
    assert (read.labels_key, read.protein_obsm_key) == (
        FULL.labels_key if "labels" in columns else None,
        FULL.protein_obsm_key if "protein" in columns else None,
    )
    other = replace(FULL, labels_key="x", unlabeled_category=None, protein_obsm_key="y")
    expected = [*(["labels_key", "unlabeled_category"] if "labels" in columns else [])]
    expected += ["protein_obsm_key"] if "protein" in columns else []
    assert stale_slots(read, other) == expected


def test_other_categories_or_no_setup_are_fine():
    adata = make_adata()
    fit = read_fit(adata)
    adata.uns["scvi_ext"]["setup"] = Registry(**{**vars(FULL), "batch_categories": ("1",)}).to_uns()
    check_fit_matches_setup(fit, adata)
    del adata.uns["scvi_ext"]
    check_fit_matches_setup(fit, adata)


@pytest.mark.parametrize(
    "values",
    [
        ["b", "a", "b", "c"],
        pd.Categorical(["b", "a", "b", "c"], categories=["c", "b", "never", "a"]),
        pd.array(["b", "a", "b", "c"], dtype="string"),
    ],
)
def test_codes_are_positions_in_the_given_categories(values):
    obs = pd.DataFrame({"k": values})
    result = codes(obs, "k", ["a", "c", "b"])
    assert result.dtype == np.int64
    assert result.tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize(
    ("values", "categories"),
    [
        ([2, 10, 2], ("2", "10")),
        ([True, False, True], ("False", "True")),
        ([2.0, 10.0, 2.0], ("2.0", "10.0")),
        (pd.Categorical(["z", "a"], categories=["z", "never", "a"]), ("z", "a")),
    ],
)
def test_used_categories_keep_order_and_drop_unused(values, categories):
    obs = pd.DataFrame({"k": values})
    assert used_categories(obs, "k") == categories
    assert [categories[c] for c in codes(obs, "k", categories)] == [str(v) for v in values]


def test_unlabelled_is_minus_one():
    obs = pd.DataFrame({"k": ["T", "unknown", "B"]})
    assert codes(obs, "k", ["B", "T"], unlabeled="unknown").tolist() == [1, -1, 0]


def test_codes_names_missing_values():
    obs = pd.DataFrame({"k": ["a", None, np.nan, "a"]}, index=["c0", "c1", "c2", "c3"])
    with pytest.raises(ValueError, match=r"adata\.obs\['k'\] is missing in 2 of 4 cells, first in 'c1', 'c2'.*fillna"):
        codes(obs, "k", ["a"])


def test_codes_lists_unknown_and_known_categories():
    obs = pd.DataFrame({"k": pd.Categorical(["a", "x", "y", "x"], categories=["a", "x", "y", "never"])})
    with pytest.raises(ValueError, match=r"2 unknown categories in 3 of 4 cells: 'x', 'y'\. Known ones: 'a', 'b'"):
        codes(obs, "k", ["a", "b"])


def test_codes_without_the_column():
    with pytest.raises(KeyError, match=r"'donr' is not in adata\.obs, which has: 'donor'.*Did you mean 'donor'"):
        codes(pd.DataFrame({"donor": ["a"]}), "donr", ["a"])


def test_values_that_read_the_same_are_refused():
    obs = pd.DataFrame({"batch": pd.Series([1, "1", "a"], dtype=object)})
    with pytest.raises(ValueError, match=r"adata\.obs\['batch'\] has different values that read the same: '1'"):
        used_categories(obs, "batch")


def test_two_columns_of_one_name_are_refused():
    obs = pd.DataFrame([["a", "b"]], columns=["batch", "batch"])
    with pytest.raises(ValueError, match="2 columns called 'batch'"):
        used_categories(obs, "batch")
