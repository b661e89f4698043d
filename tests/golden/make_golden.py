"""Write the reference values in ``cases/``: small models trained by scvi-tools on real counts, and what they give.

Needs scvi-tools beside this package: ``python tests/golden/make_golden.py``, for some cases with their names behind it.
Each case is a folder with ``model.pt`` as scvi-tools saves it, ``case.json`` (what it was made with) and
``expected.npz``: counts and columns of a few cells under ``x`` and ``obs.<column>``, the training history under
``history.<name>``, and for these cells, in evaluation mode and at the posterior mean, the quantities that the tests
compare. Where there are proteins, their counts are under ``protein``, and the log background is at its posterior mean
too. Cases of several data sets have all of that for each of them, as ``<name>.<data set>``, but for the history.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scvi
import torch
from torch.distributions import Normal, kl_divergence

import scvi_ext as sx

if TYPE_CHECKING:
    from anndata import AnnData

CASES = Path(__file__).parent / "cases"
N_TRAIN, N_KEPT, N_GENES, N_PROTEINS = 60, 12, 40, 5
SMALL = {"n_hidden": 16, "n_latent": 5}
SCVI, LinearSCVI, SCANVI = scvi.model.SCVI, scvi.model.LinearSCVI, scvi.model.SCANVI
TOTALVI, AUTOZI, GIMVI = scvi.model.TOTALVI, scvi.model.AUTOZI, scvi.external.GIMVI
WITH_PROTEINS = {"batch_key": "batch", "protein_expression_obsm_key": "protein"}
# One of the cell types plays the cells without a label.
PARTLY_LABELLED = {"batch_key": "batch", "labels_key": "label", "unlabeled_category": "Dendritic"}

# name -> class, arguments of setup_anndata, arguments of the model
MODELS = {
    "scvi_zinb": (SCVI, {"batch_key": "batch"}, {}),
    "scvi_nb_two_layers_covariates": (
        SCVI,
        {"batch_key": "batch", "categorical_covariate_keys": ["phase"], "continuous_covariate_keys": ["mito"]},
        {"gene_likelihood": "nb", "n_layers": 2, "encode_covariates": True},
    ),
    "scvi_poisson_size_factor": (
        SCVI,
        {"batch_key": "batch", "size_factor_key": "size_factor"},
        {"gene_likelihood": "poisson"},
    ),
    "scvi_nb_gene_batch_latent_library": (
        SCVI,
        {"batch_key": "batch"},
        {"gene_likelihood": "nb", "dispersion": "gene-batch", "use_observed_lib_size": False},
    ),
    "scvi_zinb_gene_label": (SCVI, {"batch_key": "batch", "labels_key": "label"}, {"dispersion": "gene-label"}),
    "scvi_zinb_gene_cell_logistic_normal": (
        SCVI,
        {"batch_key": "batch"},
        {"dispersion": "gene-cell", "latent_distribution": "ln"},
    ),
    "scvi_nb_embedding": (
        SCVI,
        {"batch_key": "batch", "categorical_covariate_keys": ["phase"], "continuous_covariate_keys": ["mito"]},
        {"gene_likelihood": "nb", "batch_representation": "embedding", "encode_covariates": True},
    ),
    "scvi_nb_layer_norm_shallow_covariates": (
        SCVI,
        {"batch_key": "batch"},
        {
            "gene_likelihood": "nb",
            "n_layers": 2,
            "use_layer_norm": "both",
            "use_batch_norm": "none",
            "deeply_inject_covariates": False,
        },
    ),
    "scvi_normal": (SCVI, {"batch_key": "batch"}, {"gene_likelihood": "normal"}),
    "linear_scvi": (LinearSCVI, {"batch_key": "batch"}, {}),
    "linear_scvi_zinb_bias": (
        LinearSCVI,
        {},
        {
            "gene_likelihood": "zinb",
            "use_observed_lib_size": True,
            "n_layers": 2,
            "use_batch_norm": False,
            "bias": True,
        },
    ),
    "scanvi_zinb": (SCANVI, PARTLY_LABELLED, {"n_hidden": 8}),
    "scanvi_nb_linear_classifier": (
        SCANVI,
        PARTLY_LABELLED,
        {"n_hidden": 8, "gene_likelihood": "nb", "linear_classifier": True, "dispersion": "gene-batch"},
    ),
    "totalvi_zinb_panels_latent_library_covariates": (
        TOTALVI,
        WITH_PROTEINS | {"categorical_covariate_keys": ["phase"], "continuous_covariate_keys": ["mito"]},
        {
            "n_hidden": 6,
            "n_layers_encoder": 1,
            "gene_likelihood": "zinb",
            "gene_dispersion": "gene-batch",
            "protein_dispersion": "protein-batch",
            "use_observed_lib_size": False,
        },
    ),
    "totalvi_nb_logistic_normal": (
        TOTALVI,
        WITH_PROTEINS,
        {"n_hidden": 6, "latent_distribution": "ln", "empirical_protein_background_prior": True},
    ),
    "autozi_gene_batch_latent_library": (
        AUTOZI,
        {"batch_key": "batch"},
        {
            "zero_inflation": "gene-batch",
            "alpha_prior": 0.3,
            "beta_prior": 0.6,
            "minimal_dropout": 0.05,
            "use_observed_lib_size": False,
        },
    ),
    "autozi_gene_label": (
        AUTOZI,
        {"labels_key": "label"},
        {"zero_inflation": "gene-label", "dispersion": "gene-label", "n_hidden": 12},
    ),
    "autozi_gene_learned_prior": (AUTOZI, {"batch_key": "batch"}, {"alpha_prior": None, "beta_prior": None}),
}
# name -> arguments of setup_anndata, arguments of the model, of two data sets
JOINT_MODELS = {
    "gimvi_zinb_nb_layers_latent_library": (
        {"batch_key": "batch"},
        {
            "model_library_size": [False, True],
            "n_layers_decoder_individual": 1,
            "n_layers_decoder_shared": 1,
            "dim_hidden_decoder_individual": 6,
            "dim_hidden_decoder_shared": 7,
        },
    ),
    "gimvi_nb_poisson_gene_cell": (
        {"labels_key": "label"},
        {
            "generative_distributions": ["nb", "poisson"],
            "model_library_size": [False, False],
            "dispersion": "gene-cell",
            "n_layers_encoder_shared": 2,
        },
    ),
}
# In the first of these a batch has not measured two of the proteins.
PANELS = {"totalvi_zinb_panels_latent_library_covariates": ("b", [1, 3])}
COLUMNS = ["batch", "phase", "mito", "label", "size_factor"]
WITH_HISTORY = {"linear_scvi"}  # the others leave it out to stay small


def cells(seed: int, n_genes: int = N_GENES) -> AnnData:
    """Some cells and the most widely detected genes, with columns of every kind."""
    adata = sx.datasets.pbmc68k_counts()
    rng = np.random.default_rng(seed)
    adata = adata[rng.choice(adata.n_obs, N_TRAIN, replace=False)].copy()
    detected = np.asarray((adata.X > 0).sum(0)).ravel()
    adata = adata[:, np.sort(np.argsort(-detected, kind="stable")[:n_genes])].copy()
    adata.obs = adata.obs.assign(
        batch=rng.choice(["a", "b", "c"], N_TRAIN),
        phase=rng.choice([1, 2], N_TRAIN),  # whole numbers: categories need not be strings
        mito=rng.normal(size=N_TRAIN).astype("float32"),
        label=adata.obs["bulk_labels"].astype(str).str.split().str[0],
        size_factor=np.asarray(adata.X.sum(1)).ravel() / 100,
    )[COLUMNS]
    return adata


def proteins(adata: AnnData, seed: int, missing: tuple[str, list[int]] | None) -> pd.DataFrame:
    """Counts that are background or foreground; zero where ``missing`` names a batch and proteins."""
    rng = np.random.default_rng(seed)
    mean = np.where(rng.random((N_TRAIN, N_PROTEINS)) < 0.3, 60.0, 4.0) * rng.lognormal(0, 0.3, (N_TRAIN, N_PROTEINS))
    counts = rng.poisson(mean)
    if missing is not None:
        batch, columns = missing
        counts[np.ix_(adata.obs["batch"] == batch, columns)] = 0
    return pd.DataFrame(counts, index=adata.obs_names, columns=[f"CD{i}" for i in range(N_PROTEINS)])


@torch.no_grad()
def expected_of_proteins(model: TOTALVI) -> dict[str, np.ndarray]:
    """The same for genes and proteins, whose background is taken at its posterior mean."""
    module = model.module.cpu().eval()
    first = np.arange(N_KEPT)
    tensors = next(iter(model._make_data_loader(model.adata, indices=first, batch_size=N_KEPT, shuffle=False)))
    inferred = module.inference(**module._get_inference_input(tensors))
    qz, ql = inferred["qz"], inferred["ql"]
    inferred["untran_z"] = qz.loc
    inferred["z"] = torch.softmax(qz.loc, -1) if module.latent_distribution == "ln" else qz.loc
    values = {"qz_mean": qz.loc, "qz_scale": qz.scale}
    if not module.use_observed_lib_size:
        inferred["library_gene"] = torch.exp(ql.loc)
        values |= {"ql_mean": ql.loc, "ql_scale": ql.scale}
    made = module.generative(**module._get_generative_input(tensors, inferred))
    px, py = made["px_"], made["py_"]
    py["rate_back"] = torch.exp(py["back_alpha"])
    py["rate_fore"] = py["rate_back"] * py["fore_scale"]
    batch = tensors["batch"].flatten().tolist()
    mask = module.protein_batch_mask
    measured = torch.ones(N_KEPT, N_PROTEINS) if mask is None else torch.tensor(np.stack([mask[str(b)] for b in batch]))
    of_genes, of_proteins = module.get_reconstruction_loss(
        tensors["X"], tensors["proteins"], px, py, measured.float(), made["per_batch_efficiency"]
    )
    kl_background = kl_divergence(Normal(py["back_alpha"], py["back_beta"]), inferred["back_mean_prior"])
    loss = module.loss(tensors, inferred, made)
    values |= {f"px_{name}": px[name] for name in ("scale", "rate", "r")}
    values |= {f"py_{name}": py[name] for name in ("back_alpha", "back_beta", "fore_scale", "mixing", "r")}
    if module.gene_likelihood == "zinb":
        values["px_dropout"] = px["dropout"]
    values |= {
        "log_prob": -of_genes,
        "log_prob_proteins": -of_proteins,
        "kl_z": loss.kl_local["kl_div_z"],
        "kl_l": loss.kl_local["kl_div_l_gene"],
        "kl_background": (measured * kl_background).sum(-1),
    }
    return {name: value.numpy() for name, value in values.items()} | {
        "latent": model.get_latent_representation(indices=first)
    }


@torch.no_grad()
def expected(model: SCVI | LinearSCVI | SCANVI) -> dict[str, np.ndarray]:
    """What the tests compare, for the first cells."""
    module = model.module.cpu().eval()
    first = np.arange(N_KEPT)
    tensors = next(iter(model._make_data_loader(model.adata, indices=first, batch_size=N_KEPT, shuffle=False)))
    inferred = module.inference(**module._get_inference_input(tensors))
    qz, ql = inferred["qz"], inferred["ql"]
    inferred["z"] = torch.softmax(qz.loc, -1) if module.latent_distribution == "ln" else qz.loc
    values = {"qz_mean": qz.loc, "qz_scale": qz.scale}
    if ql is not None:
        inferred["library"] = ql.loc
        values |= {"ql_mean": ql.loc, "ql_scale": ql.scale}
    generated = module.generative(**module._get_generative_input(tensors, inferred))
    px = generated["px"]
    for name in ("mu", "rate", "scale", "theta", "zi_logits"):
        value = getattr(px, name, None)
        if torch.is_tensor(value):
            values[f"px_{name}"] = value
    if module.gene_likelihood == "normal":  # whose own scale is a standard deviation
        values |= {"px_rate": px.loc, "px_scale": px.normal_mu, "px_theta": px.scale}
    values["log_prob"] = px.log_prob(tensors["X"]).sum(-1)
    if not isinstance(model, SCANVI):  # whose bound is another one, and takes samples of z2
        loss = module.loss(tensors, inferred, generated, kl_weight=1.0)
        values |= {
            "loss": loss.loss,
            "kl_z": loss.kl_local["kl_divergence_z"],
            "kl_l": loss.kl_local["kl_divergence_l"],
        }
    arrays = {name: value.numpy() for name, value in values.items()}
    if isinstance(model, LinearSCVI):
        arrays["loadings"] = model.get_loadings().to_numpy()
    if isinstance(model, SCANVI):
        probabilities = model.predict(indices=first, soft=True)
        arrays |= {"prediction_soft": probabilities, "prediction_columns": probabilities.columns.to_numpy(str)}
    return arrays | {"latent": model.get_latent_representation(indices=first)}


@torch.no_grad()
def expected_of_zero_inflation(model: AUTOZI) -> dict[str, np.ndarray]:
    """The same where zero inflation is uncertain: ``log_prob`` is at delta = 1/2, the logits are those of pi."""
    module = model.module.cpu().eval()
    first = np.arange(N_KEPT)
    tensors = next(iter(model._make_data_loader(model.adata, indices=first, batch_size=N_KEPT, shuffle=False)))
    inferred = module.inference(**module._get_inference_input(tensors))
    qz, ql = inferred["qz"], inferred["ql"]
    inferred["z"] = qz.loc
    values = {"qz_mean": qz.loc, "qz_scale": qz.scale}
    if ql is not None:
        inferred["library"] = ql.loc
        values |= {"ql_mean": ql.loc, "ql_scale": ql.scale}
    made = module.generative(**module._get_generative_input(tensors, inferred))
    px, x = made["px"], tensors["X"]
    half = torch.full_like(x, 0.5)
    loss = module.loss(tensors, inferred, made)
    values |= {
        "px_scale": px.scale,
        "px_rate": px.mu,
        "px_theta": px.theta,
        "px_pi_logits": px.zi_logits,
        "log_prob_half": -module.get_reconstruction_loss(x, px.mu, px.theta, px.zi_logits, half),
        "kl_z": loss.kl_local["kl_divergence_z"],
        "kl_l": loss.kl_local["kl_divergence_l"],
        "kl_global": module.compute_global_kl_divergence(),
    }
    arrays = {name: value.numpy() for name, value in values.items()} | model.get_alphas_betas()
    return arrays | {"latent": model.get_latent_representation(indices=first)}


@torch.no_grad()
def expected_of_datasets(model: GIMVI) -> dict[str, np.ndarray]:
    """The same of each data set; profiles and rates are those that are imputed."""
    module = model.module.cpu().eval()
    values = {}
    for mode, (name, adata) in enumerate(zip(model.adata_managers, model.adatas, strict=True)):
        loader = model._make_data_loader(adata, indices=np.arange(N_KEPT), batch_size=N_KEPT, shuffle=False)
        tensors = next(iter(loader))
        x, batch = tensors["X"], tensors["batch"]
        inferred = module.inference(x, mode)
        qz, ql = inferred["qz"], inferred["ql"]
        library = inferred["library"] if ql is None else ql.loc
        made = module.generative(qz.loc, library, batch, None, mode)
        loss = module.loss(tensors, inferred, made, mode)
        reconstruction, kl = loss.reconstruction_loss["reconstruction_loss"], loss.kl_local["kl_local"]
        of_one = {"qz_mean": qz.loc, "qz_scale": qz.scale, "log_prob": -reconstruction, "kl": kl}
        of_one |= {"latent": module.sample_from_posterior_z(x, mode, deterministic=True)}
        of_one |= {f"px_{part}": made[f"px_{part}"] for part in ("r", "dropout")}
        if ql is not None:
            of_one |= {"ql_mean": ql.loc, "ql_scale": ql.scale}
        values |= {f"{key}.{name}": value.numpy() for key, value in of_one.items()}
    for normalized, what in ((True, "scale"), (False, "rate")):
        imputed = model.get_imputed_values(normalized=normalized)
        values |= {
            f"imputed_{what}.{name}": of_one[:N_KEPT]
            for name, of_one in zip(model.adata_managers, imputed, strict=True)
        }
    return values


EXPECTED = {TOTALVI: expected_of_proteins, AUTOZI: expected_of_zero_inflation}


def make_joint(seed: int, name: str, setup: dict, options: dict) -> None:
    """A case of two data sets, the second of which has half of the genes in another order."""
    every = cells(seed, N_GENES // 2)
    panel = np.random.default_rng(seed).permutation(every.var_names)[: N_GENES // 4]
    seq, spatial = every[: N_TRAIN // 2].copy(), every[N_TRAIN // 2 :, panel].copy()
    scvi.settings.seed = seed
    for adata in (seq, spatial):
        GIMVI.setup_anndata(adata, **setup)
    model = GIMVI(seq, spatial, n_latent=5, dim_hidden_encoder=8, **options)
    model.train(max_epochs=10, batch_size=32, accelerator="cpu", enable_progress_bar=False, logger=False)
    model.history_ = None
    arrays = expected_of_datasets(model)
    model.save(CASES / name)
    for dataset, adata in zip(model.adata_managers, model.adatas, strict=True):
        kept = adata[:N_KEPT]
        arrays[f"x.{dataset}"] = kept.X.toarray().astype("uint16")
        for column in ("batch", "label"):
            arrays[f"obs.{column}.{dataset}"] = kept.obs[column].to_numpy(str)
    write_expected(name, GIMVI, arrays, setup, {"n_latent": 5, "dim_hidden_encoder": 8} | options)


def write_expected(name: str, cls: type, arrays: dict, setup: dict, options: dict) -> None:
    """What the tests compare, and what the case was made with, beside the model."""
    np.savez_compressed(CASES / name / "expected.npz", **arrays)
    case = {"class": cls.__name__, "setup": setup, "options": options, "scvi-tools": scvi.__version__}
    (CASES / name / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    size = sum(file.stat().st_size for file in (CASES / name).iterdir())
    print(f"{name}: {size / 1024:.0f} KB, {sorted(arrays)}")


def main() -> None:
    asked = sys.argv[1:] or [*MODELS, *JOINT_MODELS]
    for seed, (name, (setup, options)) in enumerate(JOINT_MODELS.items()):
        if name in asked:
            shutil.rmtree(CASES / name, ignore_errors=True)
            make_joint(seed, name, setup, options)
    for seed, (name, (cls, setup, options)) in enumerate(MODELS.items()):
        if name not in asked:
            continue
        shutil.rmtree(CASES / name, ignore_errors=True)
        adata = cells(seed, N_GENES // 2 if cls is TOTALVI else N_GENES)  # its networks are many
        if cls is TOTALVI:
            adata.obsm["protein"] = proteins(adata, seed, PANELS.get(name))
        scvi.settings.seed = seed
        cls.setup_anndata(adata, **setup)
        model = cls(adata, **SMALL | options)
        model.train(
            max_epochs=10,
            batch_size=32,
            check_val_every_n_epoch=2,
            accelerator="cpu",
            enable_progress_bar=False,
            # None is scvi-tools' own, in memory; TOTALVI does not train without one.
            logger=None if name in WITH_HISTORY or cls is TOTALVI else False,
        )
        if name not in WITH_HISTORY:
            model.history_ = None
        arrays = EXPECTED.get(cls, expected)(model)
        model.save(CASES / name)
        kept = adata[:N_KEPT]
        inputs = {f"obs.{column}": kept.obs[column].to_numpy() for column in COLUMNS}
        inputs["x"] = kept.X.toarray().astype("uint16")
        if cls is TOTALVI:
            inputs["protein"] = kept.obsm["protein"].to_numpy("uint16")
        if name in WITH_HISTORY:
            inputs |= {f"history.{k}": v.to_numpy(float).ravel() for k, v in model.history.items()}
        as_text = {k: v.astype(str) if v.dtype == object else v for k, v in inputs.items()}
        write_expected(name, cls, arrays | as_text, setup, SMALL | options)


if __name__ == "__main__":
    main()
