"""Write the reference values in ``cases/``: small models trained by scvi-tools on real counts, and what they give.

Needs scvi-tools beside this package: ``python tests/golden/make_golden.py``, for some cases with their names behind it.
Each case is a folder with ``model.pt`` as scvi-tools saves it, ``case.json`` (what it was made with) and
``expected.npz``: counts and columns of a few cells under ``x`` and ``obs.<column>``, the training history under
``history.<name>``, and for these cells, in evaluation mode and at the posterior mean, the quantities that the tests
compare.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scvi
import torch

import scvi_ext as sx

if TYPE_CHECKING:
    from anndata import AnnData

CASES = Path(__file__).parent / "cases"
N_TRAIN, N_KEPT, N_GENES = 60, 12, 40
SMALL = {"n_hidden": 16, "n_latent": 5}
SCVI, LinearSCVI, SCANVI = scvi.model.SCVI, scvi.model.LinearSCVI, scvi.model.SCANVI
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
}
COLUMNS = ["batch", "phase", "mito", "label", "size_factor"]
WITH_HISTORY = {"linear_scvi"}  # the others leave it out to stay small


def cells(seed: int) -> AnnData:
    """Some cells and the most widely detected genes, with columns of every kind."""
    adata = sx.datasets.pbmc68k_counts()
    rng = np.random.default_rng(seed)
    adata = adata[rng.choice(adata.n_obs, N_TRAIN, replace=False)].copy()
    detected = np.asarray((adata.X > 0).sum(0)).ravel()
    adata = adata[:, np.sort(np.argsort(-detected, kind="stable")[:N_GENES])].copy()
    adata.obs = adata.obs.assign(
        batch=rng.choice(["a", "b", "c"], N_TRAIN),
        phase=rng.choice([1, 2], N_TRAIN),  # whole numbers: categories need not be strings
        mito=rng.normal(size=N_TRAIN).astype("float32"),
        label=adata.obs["bulk_labels"].astype(str).str.split().str[0],
        size_factor=np.asarray(adata.X.sum(1)).ravel() / 100,
    )[COLUMNS]
    return adata


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


def main() -> None:
    asked = sys.argv[1:] or MODELS
    for seed, (name, (cls, setup, options)) in enumerate(MODELS.items()):
        if name not in asked:
            continue
        shutil.rmtree(CASES / name, ignore_errors=True)
        adata = cells(seed)
        scvi.settings.seed = seed
        cls.setup_anndata(adata, **setup)
        model = cls(adata, **SMALL | options)
        model.train(
            max_epochs=10,
            batch_size=32,
            check_val_every_n_epoch=2,
            accelerator="cpu",
            enable_progress_bar=False,
            logger=None if name in WITH_HISTORY else False,  # None is scvi-tools' own, in memory
        )
        arrays = expected(model)
        model.save(CASES / name)
        kept = adata[:N_KEPT]
        inputs = {f"obs.{column}": kept.obs[column].to_numpy() for column in COLUMNS}
        inputs["x"] = kept.X.toarray().astype("uint16")
        inputs |= {f"history.{k}": v.to_numpy(float).ravel() for k, v in model.history.items() if name in WITH_HISTORY}
        as_text = {k: v.astype(str) if v.dtype == object else v for k, v in inputs.items()}
        np.savez_compressed(CASES / name / "expected.npz", **arrays, **as_text)
        case = {"class": cls.__name__, "setup": setup, "options": SMALL | options, "scvi-tools": scvi.__version__}
        (CASES / name / "case.json").write_text(json.dumps(case, indent=1) + "\n")
        size = sum(file.stat().st_size for file in (CASES / name).iterdir())
        print(f"{name}: {size / 1024:.0f} KB, {sorted(arrays)}")


if __name__ == "__main__":
    main()
