"""Parity with scvi-tools: its trained models, read by ``io.read_scvi_tools``, give its numbers.

The cases beside this file are small (see ``make_golden.py``). Larger ones are used where they are at hand.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _tolerances import LATENT_ATOL, N_STANDARD_ERRORS, REFERENCE_ATOL_OF_LARGEST, REFERENCE_RTOL
from scipy.special import logsumexp

import scvi_ext as sx
from scvi_ext import models
from scvi_ext._contract import Capability, Expression
from scvi_ext._keys import column_name
from scvi_ext.data.blocks import Block
from scvi_ext.fitted import Fitted
from scvi_ext.functional.divergences import kl_standard_normal
from scvi_ext.functional.evidence import log_weights_of_all

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "golden"
MODELS = {"AUTOZI": "autozi", "SCVI": "scvi", "LinearSCVI": "ldvae", "SCANVI": "scanvi", "TOTALVI": "totalvi"}
MC_SAMPLES = 5000  # of the mean of a logistic normal, in the reference and by default here
# Inputs, what other tests compare, and of proteins what depends on a random background.
NOT_COMPARED = re.compile(
    r"x|batch|labels|proteins?|latent|marginal_ll_100|obs\..*|history\..*|prediction_.*|py_rate_back|py_rate_fore|py_scale"
)
# The reference has these parts of totalVI, and saves what they say, also where the model makes no use of them.
ALSO_WHERE_UNUSED = {"px_dropout", "ql_mean"}


def _shared_cases() -> list[Path]:
    cases = [path.parent for path in sorted(SHARED.glob("*/case.json"))]
    return [case for case in cases if json.loads((case / "case.json").read_text())["model"] in MODELS]


SMALL_CASES = [
    case
    for case in sorted((HERE / "cases").iterdir())
    if json.loads((case / "case.json").read_text())["class"] in MODELS  # others: test_golden_joint.py
]
CASES = [
    *(pytest.param(case, id=case.name) for case in SMALL_CASES),
    *(pytest.param(case, id=f"shared-{case.name}") for case in _shared_cases()),
]


def read(case: Path) -> tuple[ad.AnnData, dict[str, np.ndarray]]:
    """The cells, with the model inside, and the reference values."""
    with np.load(case / "expected.npz") as file:
        expected = {name.replace("kl_kl_divergence_", "kl_"): file[name] for name in file.files}
    if (case / "adata.h5ad").exists():
        adata = ad.read_h5ad(case / "adata.h5ad")
    else:
        columns = {name.removeprefix("obs."): values for name, values in expected.items() if name.startswith("obs.")}
        adata = ad.AnnData(expected["x"].astype(np.float32), obs=pd.DataFrame(columns).set_index(_names(expected["x"])))
        adata.var_names = sx.io.read_scvi_tools(case).var_names
        if "protein" in expected:
            names = sx.io.read_scvi_tools(case).setup["protein_names"]
            adata.obsm["protein"] = pd.DataFrame(expected["protein"], index=adata.obs_names, columns=names)
    sx.io.read_scvi_tools(case, adata, key_added="imported")
    return adata, expected


def _names(x: np.ndarray) -> pd.Index:
    return pd.Index([f"cell{i}" for i in range(len(x))])


def at_posterior_mean(adata: ad.AnnData) -> dict[str, torch.Tensor | None]:
    """Every quantity of the reference, from our module; None for what it does not have."""
    fitted = Fitted.open(adata, "imported")
    block = Block(fitted.store, torch.device("cpu"))
    cells = block.minibatch(block.rows(np.arange(adata.n_obs)))
    module = fitted.module.eval()
    noise = torch.zeros(adata.n_obs, module.n_noise)
    with torch.no_grad():
        qz, ql = module.posteriors(cells)
        z, log_library = module.draw(cells, (qz, ql), noise)
        px = module.decode(module.transform_z(z), cells, log_library)
        loss = module.loss(cells, kl_weight=1.0, noise=noise)
        values = {
            "qz_mean": qz.loc,
            "qz_scale": qz.scale,
            "px_scale": px.scale,
            "px_rate": px.rate,
            "px_mu": px.rate,
            "px_mean": px.rate if px.dropout_logits is None else px.rate * torch.sigmoid(-px.dropout_logits),
            "px_theta": px.theta,
            "px_zi_logits": px.dropout_logits,
            "log_prob": module.log_likelihood(cells.x, px),
            "loss": loss.total,
            "kl_z": loss.kl_z,
            "kl_l": loss.kl_library,
            "klg_kl_global": torch.zeros(()),  # these models have none
            "ql_mean": None if ql is None else ql.loc,
            "ql_scale": None if ql is None else ql.scale,
        }
        if Capability.PROTEIN in models.get(fitted.fit.model).capabilities:
            py = module.decode_protein(module.transform_z(z), cells)
            values |= {
                "px_r": px.theta,
                "px_dropout": px.dropout_logits,
                "py_back_alpha": py.background.loc,
                "py_back_beta": py.background.scale,
                "py_fore_scale": torch.exp(py.log_ratio),
                "py_mixing": py.mixing_logits,
                "py_r": py.theta,
                "log_prob_proteins": module.log_py(py, cells, py.background.loc),
                "kl_z": kl_standard_normal(qz),
                "kl_background": loss.kl_z - kl_standard_normal(qz),
            }
        if Capability.ZERO_INFLATION in models.get(fitted.fit.model).capabilities:
            values |= module.get_alphas_betas(as_numpy=False) | {"kl_global": module.compute_global_kl_divergence()}
            values["px_pi_logits"] = decoded_with_delta(module, qz.loc, cells, log_library, -math.inf).dropout_logits
            values["log_prob_half"] = module.log_likelihood(
                cells.x, decoded_with_delta(module, qz.loc, cells, log_library, 0.0)
            )
        if hasattr(module, "get_loadings"):
            values["loadings"] = module.get_loadings()
    return values


def decoded_with_delta(module, z, cells, log_library, logit: float) -> Expression:
    """What the decoder says where delta is this of all genes."""
    return module.decode(z, cells, log_library, torch.full_like(module.alpha_posterior_logit, logit))


def assert_parity(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    atol = REFERENCE_ATOL_OF_LARGEST * np.abs(expected).max()
    np.testing.assert_allclose(
        np.broadcast_to(found, expected.shape), expected, rtol=REFERENCE_RTOL, atol=atol, err_msg=name
    )


@pytest.mark.parametrize("case", CASES)
def test_reference_values_are_reproduced(case):
    adata, expected = read(case)
    found = at_posterior_mean(adata)
    compared = [name for name in expected if not NOT_COMPARED.fullmatch(name)]
    assert {"qz_mean", "qz_scale"} <= set(compared)
    if "py_mixing" in expected:
        assert {"px_scale", "px_rate", "px_r", "py_back_alpha", "py_back_beta", "py_fore_scale"} <= set(compared)
        if case in SMALL_CASES:
            assert {"log_prob", "log_prob_proteins", "kl_z", "kl_l", "kl_background"} <= set(compared)
    elif "alpha_posterior" in expected:
        of_delta = {f"{name}_{of}" for name in ("alpha", "beta") for of in ("prior", "posterior")}
        assert of_delta | {"kl_global"} <= set(compared)
        if case in SMALL_CASES:
            assert {"px_pi_logits", "log_prob_half", "kl_z", "kl_l"} <= set(compared)
    elif "prediction_soft" in expected:  # the bound of SCANVI is another one there: see models/scanvi.py
        assert "log_prob" in compared
    else:
        assert {"log_prob", "loss", "kl_z", "kl_l"} <= set(compared)
    for name in compared:
        if found[name] is None:
            assert name in ALSO_WHERE_UNUSED
        else:
            assert_parity(found[name].numpy(), expected[name], name)


@pytest.mark.parametrize("case", CASES)
def test_latent_representation_is_reproduced(case):
    adata, expected = read(case)
    sx.tl.get_latent(adata, key="imported", mc_samples=MC_SAMPLES, seed=0)
    found = adata.obsm["X_imported"]
    fitted = Fitted.open(adata, "imported")
    if fitted.module.latent_distribution == "normal":
        np.testing.assert_allclose(found, expected["latent"], rtol=0, atol=LATENT_ATOL)
        return
    draws = np.random.default_rng(0).standard_normal((2000, *found.shape))
    samples = torch.softmax(torch.from_numpy(expected["qz_mean"] + expected["qz_scale"] * draws), -1).numpy()
    of_difference = samples.std(0) * np.sqrt(2 / MC_SAMPLES)  # both are means of as many draws
    assert (np.abs(found - expected["latent"]) < N_STANDARD_ERRORS * of_difference).all()


@pytest.mark.parametrize("case", [case for case in CASES if "shared-autozi" in case.id])
def test_the_evidence_of_all_cells_is_reproduced_as_far_as_samples_go(case):
    """The logarithm of a mean of 100 weights: as many of 600 of ours, over and over, tell how far it may be off."""
    adata, expected = read(case)
    fitted = Fitted.open(adata, "imported")
    block = Block(fitted.store, torch.device("cpu"))
    cells = block.minibatch(block.rows(np.arange(adata.n_obs)))
    module, rng = fitted.module.eval(), np.random.default_rng(0)
    torch.manual_seed(0)
    with torch.no_grad():
        shared = [module.draw_shared(rng) for _ in range(600)]
        log_weights = log_weights_of_all(module, cells, None, shared).numpy()
        log_weights += [module.log_weight_shared(draw).item() for draw in shared]
    estimates = logsumexp(rng.choice(log_weights, (1000, 100)), axis=1) / adata.n_obs - np.log(100) / adata.n_obs
    assert abs(estimates.mean() - expected["marginal_ll_100"]) < N_STANDARD_ERRORS * estimates.std()


@pytest.mark.parametrize("case", [case for case in CASES if "scanvi" in case.id])
def test_probabilities_of_labels_are_reproduced(case):
    adata, expected = read(case)
    sx.tl.classify(adata, key="imported")
    found = adata.obsm["imported_probabilities"]
    assert list(found.columns) == [column_name(str(label)) for label in expected["prediction_columns"]]
    assert_parity(found.to_numpy(), expected["prediction_soft"], "prediction_soft")


def test_the_loss_weights_only_the_kl_of_z():
    adata, expected = read(HERE / "cases" / "linear_scvi")
    fitted = Fitted.open(adata, "imported")
    block = Block(fitted.store, torch.device("cpu"))
    cells = block.minibatch(block.rows(np.arange(adata.n_obs)))
    noise = torch.zeros(adata.n_obs, fitted.module.n_noise)
    with torch.no_grad():
        loss = fitted.module.loss(cells, kl_weight=0.25, noise=noise)
    reference = np.mean(-expected["log_prob"] + expected["kl_l"] + 0.25 * expected["kl_z"])
    assert_parity(loss.total.numpy(), reference, "loss")


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_options_are_those_of_the_reference(case):
    made = json.loads((case / "case.json").read_text())
    fit = sx.io.read_scvi_tools(case)
    assert fit.model == fit.key == MODELS[made["class"]]
    assert fit.status["imported_from"] == f"scvi-tools {made['scvi-tools']}"
    renamed = {"gene_likelihood": "reconstruction_loss"}
    if fit.model == "totalvi":
        renamed = {"gene_likelihood": "reconstruction_loss_gene"}
        assert fit.config["protein_efficiency"]  # which they always have
    elsewhere = {"use_observed_lib_size", "use_batch_norm", "empirical_protein_background_prior"}
    for option, value in made["options"].items():
        if option not in elsewhere:
            assert fit.config[renamed.get(option, option)] == value
    observed = made["options"].get("use_observed_lib_size", made["class"] != "LinearSCVI")
    library = "size_factor" if "size_factor_key" in made["setup"] else "observed" if observed else "latent"
    assert fit.config["library"] == library


def test_proteins_that_a_batch_has_not_measured_are_read():
    fit = sx.io.read_scvi_tools(HERE / "cases" / "totalvi_zinb_panels_latent_library_covariates")
    batches, names = list(fit.setup["batch_categories"]), list(fit.setup["protein_names"])
    expected = np.ones((3, 5), dtype=bool)
    expected[np.ix_([batches.index("b")], [1, 3])] = False
    np.testing.assert_array_equal(fit.state["protein_batch_mask"], expected)
    missing = fit.setup["missing_proteins"]
    assert {k: list(v) for k, v in missing.items()} == {"0": [], "1": [names[1], names[3]], "2": []}


def test_small_cases_stay_small():
    for case in (HERE / "cases").iterdir():
        assert sum(file.stat().st_size for file in case.iterdir()) < 60_000, case.name
