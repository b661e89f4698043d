"""Parity with scvi-tools where a model is of several data sets: its GIMVI, read by ``io.read_scvi_tools``."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _tolerances import LATENT_ATOL, REFERENCE_ATOL_OF_LARGEST, REFERENCE_RTOL

import scvi_ext as sx
from scvi_ext.data.blocks import Block
from scvi_ext.fitted import Fitted

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "golden"
DATASETS = ("seq", "spatial")
SMALL_CASES = sorted((HERE / "cases").glob("gimvi_*"))
CASES = [
    *(pytest.param(case, id=case.name) for case in SMALL_CASES),
    *(pytest.param(case, id=f"shared-{case.name}") for case in sorted(SHARED.glob("gimvi_*"))),
]


def read(case: Path) -> tuple[dict[str, ad.AnnData], dict[str, np.ndarray]]:
    """The data sets, with the model inside, and the reference values, as ``<name>.<data set>``."""
    with np.load(case / "expected.npz") as file:
        expected = {name: file[name] for name in file.files}
    if case not in SMALL_CASES:
        datasets = {name: ad.read_h5ad(case / f"adata_{name}.h5ad") for name in DATASETS}
        expected = {".".join(name.rsplit("_", 1)): values for name, values in expected.items()}
    else:
        datasets = {}
        for name, fit in sx.io.read_scvi_tools(case).items():
            obs = pd.DataFrame({column: expected[f"obs.{column}.{name}"] for column in ("batch", "label")})
            obs.index = [f"cell{i}" for i in range(len(obs))]
            x = expected[f"x.{name}"].astype(np.float32)
            datasets[name] = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=fit.var_names))
    sx.io.read_scvi_tools(case, datasets, key_added="imported")
    return datasets, expected


def assert_parity(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    atol = REFERENCE_ATOL_OF_LARGEST * np.abs(expected).max()
    np.testing.assert_allclose(
        np.broadcast_to(found, expected.shape), expected, rtol=REFERENCE_RTOL, atol=atol, err_msg=name
    )


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_read_out_is_reproduced(case, dataset):
    datasets, expected = read(case)
    adata = datasets[dataset]
    sx.tl.get_latent(adata)
    np.testing.assert_allclose(adata.obsm["X_imported"], expected[f"latent.{dataset}"], rtol=0, atol=LATENT_ATOL)
    for what, library_size in {"scale": 1, "rate": "latent"}.items():
        sx.tl.impute(adata, gene_list=list(datasets["seq"].var_names), library_size=library_size)
        assert_parity(adata.obsm["imported_imputed"].to_numpy(), expected[f"imputed_{what}.{dataset}"], what)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_posteriors_likelihoods_and_divergences_are_reproduced(case, dataset):
    datasets, expected = read(case)
    fitted = Fitted.open(datasets[dataset], "imported")
    block = Block(fitted.store, torch.device("cpu"))
    cells = block.minibatch(block.rows(np.arange(fitted.store.n_cells)))
    module = fitted.module
    with torch.no_grad():
        qz, ql = module.posteriors(cells)
        px = module.decode_joint(qz.loc, cells)
        loss = module.loss(cells, noise=torch.zeros(len(cells.x), module.n_noise))
    found = {
        "qz_mean": qz.loc,
        "qz_scale": qz.scale,
        "imputed_scale": px.scale,
        "imputed_rate": px.rate,
        "px_r": px.theta,
        "log_prob": -loss.reconstruction,
        "kl": loss.kl_z + loss.kl_library,
    }
    if ql is not None:
        found |= {"ql_mean": ql.loc, "ql_scale": ql.scale}
    if px.dropout_logits is not None:
        found["px_dropout"] = px.dropout_logits
    assert (f"ql_mean.{dataset}" in expected) == (ql is not None)
    for name, values in found.items():
        assert_parity(values.numpy(), expected[f"{name}.{dataset}"], name)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_options_are_those_of_the_reference(case):
    made = json.loads((case / "case.json").read_text())
    fits = sx.io.read_scvi_tools(case)
    assert list(fits) == list(DATASETS)
    renamed = {"generative_distributions": "reconstruction_losses", "model_library_size": "model_library_bools"}
    for fit in fits.values():
        assert fit.model == fit.key == "gimvi"
        assert fit.status["imported_from"] == f"scvi-tools {made['scvi-tools']}"
        for option, value in made["options"].items():
            assert fit.config[renamed.get(option, option)] == (tuple(value) if isinstance(value, list) else value)
        assert fit.config["kappa"] == 0
