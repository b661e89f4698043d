"""What comes before a fit: everything is checked, cells are read, module and plan are made. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_ext import models
from scvi_ext._contract import N_TRAIN, Capability, SavedFit
from scvi_ext._errors import listing, number, unknown_keyword, whole_number
from scvi_ext._keys import valid_key
from scvi_ext.data.registry import Registry, check_fit_matches_setup, differing_slots, read_fit, read_setup
from scvi_ext.data.sampler import split_cells
from scvi_ext.data.store import CellStore
from scvi_ext.engine.checkpoint import load_module, module_arrays
from scvi_ext.engine.device import resolve_device, seeded
from scvi_ext.engine.plan import Plan, make_plan
from scvi_ext.fitted import columns_read, require

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from anndata import AnnData
    from torch import nn

    from scvi_ext._contract import ModelSpec

# What scvi-tools calls these options.
_RENAMED = {
    "accelerator": "device",
    "batch_key": "an argument of pp.setup_anndata",
    "early_stopping_patience": "early_stopping=<number of epochs>",
    "labels_key": "an argument of pp.setup_anndata",
    "layer": "an argument of pp.setup_anndata",
    "n_epochs": "max_epochs",
    "n_epochs_kl_warmup": "kl_warmup (a share of the steps)",
    "n_steps_kl_warmup": "kl_warmup (a share of the steps)",
    "override_missing_proteins": "protein_batch_mask=None, an argument of pp.setup_anndata",
    "plan_kwargs": "lr, kl_warmup and weight_decay",
    "unlabeled_category": "an argument of pp.setup_anndata",
    "use_gpu": "device",
    "use_labels_groups": "labels_groups",
    "use_observed_lib_size": "library='observed' or library='latent'",
    "use_size_factor_key": "library='size_factor'",
}
# The same of options that some models have, or have under one of these names.
_RENAMED_OPTIONS = {
    "dispersion": ("gene_dispersion",),
    "dropout_rate": ("dropout_rate_encoder",),
    "generative_distributions": ("reconstruction_losses",),
    "library": ("model_library_bools",),
    "model_library_size": ("model_library_bools",),
    "n_hidden": ("dim_hidden_encoder",),
    "n_layers": ("n_layers_encoder_shared",),
    "use_observed_lib_size": ("model_library_bools",),
    "empirical_protein_background_prior": ("protein_background",),
    "gene_dispersion": ("dispersion",),
    "gene_likelihood": ("reconstruction_loss", "reconstruction_loss_gene", "reconstruction_losses"),
    "n_layers_decoder": ("n_layers",),
    "pro_recons_weight": ("protein_weight",),
    "reconstruction_loss": ("reconstruction_loss_gene", "reconstruction_losses"),
}


def prepare(
    adata: AnnData,
    model: str,
    model_params: dict,
    *,
    keywords: Sequence[str],
    key_added: str | None,
    plan: dict,
    split: dict,
    init_from: str | None,
    n_samples_per_label: int | None,
    early_stopping: bool | int,
    seed: int,
    checkpoint: bool,
    precision: str,
) -> tuple[list[SavedFit], Any, CellStore, Plan]:
    """Check everything, read the cells, and build the module and the plan of a new fit. Writes nothing."""
    spec = models.get(model)
    registry = read_setup(adata)
    start = None if init_from is None else _start(adata, init_from, registry)
    encloses = start is not None and Capability.COUNTS not in spec.capabilities  # the fit becomes a part, as it is
    config = config_of(
        spec,
        model_params,
        registry.labels_categories,
        keywords,
        size_factors=registry.size_factor_key is not None,
        start=None if encloses else start,
    )
    frozen = {"model": start.model, "config": start.config} if encloses else None
    key = valid_key(spec.name if key_added is None else key_added)
    if encloses:
        require(Capability.COUNTS, start)
    needed = columns_read(spec.name, asdict(config), frozen)
    _check_needs(registry, needed, spec.name)
    registry = registry.read_by(needed)
    train, validation = split_cells(adata.n_obs, **split, seed=seed)
    # By name, so that genes that share one are refused here and not when the fit is used.
    genes = adata.var_names if start is None else start.var_names
    store = CellStore.from_adata(adata, registry, var_names=genes, columns=needed)
    _check_labels(spec, store, needed, train, n_samples_per_label)
    if plan["kl_warmup"] is not None and Capability.COUNTS not in spec.capabilities:
        msg = f"kl_warmup has no effect: the model {spec.name!r} has no KL divergence. Leave it out."
        raise ValueError(msg)
    if start is not None and plan["kl_warmup"] is None:
        plan = plan | {"kl_warmup": 0.0}  # the latent space is there already
    if all(stream.labelled_only for stream in spec.streams):
        train, validation = (cells[store.labels[cells] >= 0] for cells in (train, validation))
    pace = {"peak_lr": spec.peak_lr, "effort": spec.effort, "most_epochs": spec.most_epochs}
    plan_ = make_plan(n_cells=adata.n_obs, n_train=len(train), **pace, **plan)
    patience = patience_of(early_stopping, plan_, len(validation))
    with seeded(seed, resolve_device("cpu")):
        summary = replace(store.summary(registry), n_train=len(train))
        module = models.build(spec, config, summary, frozen)
    if start is not None:
        _take_over(module.frozen if encloses else module, start, spec)
    run = {
        "plan": asdict(plan_),
        **split,
        "seed": seed,
        "init_from": init_from,
        "n_samples_per_label": n_samples_per_label,
        "patience": patience,
        "checkpoint": checkpoint,
        "precision": precision,
    }
    fitted = SavedFit(
        key=key,
        model=spec.name,
        config=asdict(config),
        run=run,
        setup=registry.to_uns(),
        var_names=np.asarray(genes, dtype=object),
        state={},
        history=pd.DataFrame(),
        status={},
        frozen=frozen,
    )
    return [fitted], module, store, plan_


def reopen(
    adata: AnnData, key_added: str | None, model: str, asked: dict, kept: SavedFit | None = None
) -> tuple[list[SavedFit], Any, CellStore, Plan, dict[str, np.ndarray]]:
    """The same for a fit that goes on: the one inside ``adata``, or the one that was ``kept`` in a file."""
    key = model if key_added is None else key_added
    fitted = read_fit(adata, key) if kept is None else kept
    if fitted.key != key:
        msg = f"The checkpoint is of the fit {fitted.key!r}, not {key!r}: resume it under that name, key_added=..."
        raise ValueError(msg)
    check_fit_matches_setup(fitted, adata)
    if model != fitted.model:
        msg = f"Fit {fitted.key!r} is of the model {fitted.model!r}, not {model!r}: resume it as that."
        raise ValueError(msg)
    if asked:
        msg = f"resume=True goes on with the options of the run it continues; leave out {listing(asked)}."
        raise ValueError(msg)
    if fitted.checkpoint is None:
        msg = (
            f"Fit {fitted.key!r} was kept without a checkpoint, so it cannot go on. Fit again with checkpoint=True "
            "(an interrupted fit keeps one by itself; a mapped query is mapped again instead)."
        )
        raise ValueError(msg)
    registry = Registry.from_uns(fitted.setup)
    spec = models.get(fitted.model)
    config = spec.config(**fitted.config)
    columns = columns_read(fitted.model, fitted.config, fitted.frozen)
    store = CellStore.from_adata(adata, registry, var_names=fitted.var_names, columns=columns)
    if store.fingerprint() != fitted.status["data"]:
        msg = (
            f"Fit {fitted.key!r} was trained on other data: cells, counts or covariates of adata have changed since. "
            "Resume on the same cells in the same order, or fit anew."
        )
        raise ValueError(msg)
    with seeded(0, resolve_device("cpu")):  # a module draws initial weights, even if it is given others
        module = models.build(spec, config, store.summary(registry), fitted.frozen)
    return [fitted], module, store, Plan(**fitted.run["plan"]), dict(fitted.checkpoint)


def config_of(
    spec: ModelSpec,
    model_params: dict,
    names: Sequence[str],
    keywords: Sequence[str],
    *,
    size_factors: bool = False,
    start: SavedFit | None = None,
) -> Any:
    """The options of the model, those of the fit it starts from included.

    ``names`` are those of the labels, or of the data sets, for options with a value for each. ``keywords`` are the
    other arguments of tl.fit.
    """
    valid = {f.name for f in fields(spec.config)}
    for name in model_params:
        if name not in valid:
            renamed = next((ours for ours in _RENAMED_OPTIONS.get(name, ()) if ours in valid), _RENAMED.get(name))
            raise unknown_keyword(f"tl.fit(model={spec.name!r})", name, [*keywords, *valid], renamed)
    if start is not None:
        model_params = _options_of(start, valid) | model_params
        changed = [name for name in start.config.keys() & valid if model_params[name] != start.config[name]]
        if changed:
            found = ", ".join(f"{name}={start.config[name]!r}" for name in sorted(changed))
            msg = f"init_from={start.key!r} takes over the options of that fit, {found}: leave these out."
            raise ValueError(msg)
    elif size_factors and "library" in valid:
        model_params = {"library": "size_factor"} | model_params
    for field in fields(spec.config):
        value = model_params.get(field.name)
        if value is None and "None" in field.type:
            continue
        if "tuple" in field.type:
            model_params[field.name] = _by_name(field.name, value, names)
        elif field.default is None:
            whole_number(field.name, value, 1)
        elif field.name in model_params:
            _check_type(field.name, value, field.default)
    return spec.config(**model_params)


def _options_of(start: SavedFit, valid: set[str]) -> dict:
    return {name: value for name, value in start.config.items() if name in valid}


def _by_name(name: str, value: Any, names: Sequence[str]) -> tuple:
    """An option with a value for each label or data set, in their order."""
    if isinstance(value, Mapping | pd.Series):
        value = {str(key): of_key for key, of_key in value.items()}
        absent, unknown = sorted(set(names) - value.keys()), sorted(value.keys() - set(names))
        if absent or unknown:
            found = f"{listing(absent)} missing, {listing(unknown)} unknown"
            msg = f"{name} must name each of {listing(names)} once: {found}."
            raise ValueError(msg)
        return tuple(value[key] for key in names)
    if isinstance(value, str | set | frozenset) or not np.iterable(value):
        msg = f"{name}={value!r} is a {type(value).__name__}; a mapping from {listing(names)} to values is needed."
        raise TypeError(msg)
    return tuple(value)


def _start(adata: AnnData, init_from: str, registry: Registry) -> SavedFit:
    """The fit to start from, if it was trained on what is registered now; labels may have come since."""
    start = read_fit(adata, init_from)
    if start.joint is not None:
        msg = (
            f"init_from={init_from!r} joins the data sets {listing(start.joint['datasets'])}, and no model starts from "
            "that: name a fit of one data set."
        )
        raise ValueError(msg)
    trained = Registry.from_uns(start.setup)
    unlike = [name for name in differing_slots(trained, registry) if name not in ("labels_key", "unlabeled_category")]
    if trained.labels_key is not None:  # it has learned from labels: those of now must be the same
        unlike += ["labels_key", "labels_categories"]
    for name in (*unlike, "batch_categories", "covariate_categories"):
        if getattr(trained, name) != getattr(registry, name):
            msg = (
                f"init_from={init_from!r}: that fit was trained with {name}={getattr(trained, name)!r}, and "
                f"{getattr(registry, name)!r} is registered now. Set up as before, but for the labels."
            )
            raise ValueError(msg)
    return start


def _take_over(module: nn.Module, start: SavedFit, spec: ModelSpec) -> None:
    """Copy the weights of a fit into a module of which its model is a part."""
    state = module.state_dict()
    if any(name not in state or state[name].shape != array.shape for name, array in start.state.items()):
        msg = (
            f"init_from={start.key!r}: the model {start.model!r} of that fit, with its labels, is no part of "
            f"{spec.name!r}, so its weights cannot be taken over. Fit without init_from."
        )
        raise ValueError(msg)
    load_module(module, module_arrays(module) | {k: v for k, v in start.state.items() if k != N_TRAIN})


def _check_labels(
    spec: ModelSpec, store: CellStore, needed: frozenset[str], train: np.ndarray, n_samples_per_label: int | None
) -> None:
    learned = any(stream.labelled_only for stream in spec.streams)
    if n_samples_per_label is not None:
        whole_number("n_samples_per_label", n_samples_per_label, 1)
        if not learned:
            msg = f"n_samples_per_label has no effect: the model {spec.name!r} does not learn labels."
            raise ValueError(msg)
    if "labels" not in needed:
        return
    unlabelled = store.labels < 0
    if unlabelled.any() and not learned:
        msg = (
            f"{unlabelled.sum()} of {store.n_cells} cells have no label, and an option by label ('gene-label') needs "
            "one for every cell: leave these cells out, or take another option."
        )
        raise ValueError(msg)
    # Cells of a minibatch: one is enough beside others, three where they are all there is (batch normalisation).
    least = 3 if all(stream.labelled_only for stream in spec.streams) else 1
    n_known = int((~unlabelled[train]).sum())
    if learned and n_known < least:
        msg = (
            f"{n_known} of the {len(train)} training cells have a label ({(~unlabelled).sum()} of all {store.n_cells} "
            f"cells have one), and model {spec.name!r} needs {least} or more to learn from: label more cells, or take "
            "a larger train_size."
        )
        raise ValueError(msg)


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise a TypeError unless ``value`` is of the kind of the option's default. The model knows its least size."""
    if isinstance(default, bool | str):
        if not isinstance(value, type(default)):
            expected = "True or False" if isinstance(default, bool) else "a name"
            msg = f"{name}={value!r} is a {type(value).__name__}; {expected} is needed."
            raise TypeError(msg)
    elif isinstance(default, int):
        whole_number(name, value, 0)
    else:
        number(name, value)


def _check_needs(registry: Registry, needed: frozenset[str], model: str) -> None:
    keys = {"labels": "labels_key", "size_factor": "size_factor_key", "protein": "protein_obsm_key"}
    for column in sorted(needed & keys.keys()):
        if getattr(registry, keys[column]) is None:
            msg = (
                f"Model {model!r} with these options needs {keys[column]}, which is not registered: call "
                f"pp.setup_anndata(adata, {keys[column]}=...)."
            )
            raise ValueError(msg)


def patience_of(early_stopping: bool | int, plan: Plan, n_validation: int) -> int | None:
    if early_stopping is False:
        return None
    if early_stopping is not True and (not isinstance(early_stopping, int | np.integer) or early_stopping < 1):
        msg = f"early_stopping={early_stopping!r} must be True, False or a number of epochs, 1 or more."
        raise ValueError(msg)
    if n_validation == 0:
        msg = "early_stopping watches held-out cells, and there are none: choose a smaller train_size."
        raise ValueError(msg)
    return plan.patience if early_stopping is True else int(early_stopping)
