from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scanpy import logging as logg

from scvi_ext import models, results
from scvi_ext._contract import Capability, SavedFit
from scvi_ext._errors import ScviExtWarning, listing, number, unknown_keyword, whole_number
from scvi_ext._keys import UNS, valid_key
from scvi_ext.data.registry import (
    Registry,
    check_fit_matches_setup,
    differing_slots,
    read_fit,
    read_root,
    read_setup,
)
from scvi_ext.data.sampler import split_cells
from scvi_ext.data.store import CellStore
from scvi_ext.engine import fit as engine
from scvi_ext.engine.checkpoint import load_module, module_arrays
from scvi_ext.engine.device import check_precision, resolve_device, resolve_seed, seeded
from scvi_ext.engine.map_cells import map_cells
from scvi_ext.engine.plan import Plan, make_plan
from scvi_ext.fitted import columns_read, require
from scvi_ext.functional import fused
from scvi_ext.functional.calibration import fit_temperature

if TYPE_CHECKING:
    from typing import Any, Literal

    import torch
    from anndata import AnnData
    from torch import nn

    from scvi_ext._contract import ModelSpec
    from scvi_ext.engine.fit import Progress

# What scvi-tools calls these options.
_RENAMED = {
    "accelerator": "device",
    "batch_key": "an argument of pp.setup_anndata",
    "early_stopping_patience": "early_stopping=<number of epochs>",
    "gene_likelihood": "reconstruction_loss",
    "labels_key": "an argument of pp.setup_anndata",
    "layer": "an argument of pp.setup_anndata",
    "n_epochs": "max_epochs",
    "n_epochs_kl_warmup": "kl_warmup (a share of the steps)",
    "plan_kwargs": "lr, kl_warmup and weight_decay",
    "use_gpu": "device",
    "use_observed_lib_size": "library='observed' or library='latent'",
    "use_size_factor_key": "library='size_factor'",
}


def fit(
    adata: AnnData,
    model: str = "scvi",
    *,
    key_added: str | None = None,
    init_from: str | None = None,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    train_size: float = 0.9,
    validation_size: float | None = None,
    early_stopping: bool | int = False,
    n_samples_per_label: int | None = None,
    lr: float | None = None,
    plan: Literal["auto", "scvi-tools"] = "auto",
    kl_warmup: float | None = None,
    weight_decay: float | None = None,
    device: str = "auto",
    precision: Literal["float32", "bf16"] = "float32",
    seed: int | None = None,
    checkpoint: bool = False,
    resume: bool = False,
    progress: bool | None = None,
    copy: bool = False,
    **model_params: Any,
) -> AnnData | None:
    """Train a model on the counts, and keep it inside ``adata``.

    Reads what :func:`~scvi_ext.pp.setup_anndata` registered. Logs the plan (epochs, steps, final KL weight, predicted
    time) at verbosity info before it starts, and shows a progress bar. Ctrl-C stops after the step under way: what has
    been trained is kept, can be used, and can be continued with ``resume=True``. Where a finished fit has that name
    already, it stays, and the interrupted one is called ``"<key_added>_interrupted"``.

    Parameters
    ----------
    adata
        Annotated data, set up.
    model
        Name of a model, see :func:`scvi_ext.models.show`.
    key_added
        Name of the fit, from which the slots of its read-outs are named; the name of the model by default.
    init_from
        Name of a fit to start from, of a model that is part of this one: a ``"scvi"`` fit for ``"scanvi"``. Its options
        and weights are taken over, and without ``kl_warmup`` the KL weight is 1 from the first step on. Labels may have
        been registered since. For a ``"classifier"`` it is the fit that it stands on, see :doc:`/user_guide/scanvi`.
    max_epochs
        Passes over the training cells; None takes the plan's.
    batch_size
        Cells per step; None takes the plan's, 128 or, with 15,000 training cells and more, 256.
    train_size, validation_size
        Shares of the cells to train on and to hold out; ``validation_size=None`` holds out the rest. Split by ``seed``.
    early_stopping
        Stop when the held-out ELBO has not improved for some epochs (a number, or True for the plan's) and restore the
        best state. By default the plan is carried out to its end.
    n_samples_per_label
        Of a model that learns labels: labelled cells of each label that an epoch draws, so that frequent ones do not
        drown the rare; None takes all.
    lr
        Learning rate (of ``plan="auto"``: its peak).
    plan
        ``"auto"``: one-cycle learning rate over few epochs. ``"scvi-tools"``: the schedule of that library.
    kl_warmup
        Share of the planned steps over which the weight of KL(q(z) || p(z)) rises from 0 to 1.
    weight_decay
        L2 penalty of Adam, 1e-6 by default.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    precision
        Of the inputs of matrix products while training: ``"float32"`` (on CUDA: TF32, 10 bits of mantissa), or
        ``"bf16"`` (7 bits) where the device has it. Likelihoods, sums and parameters are float32 in any case, and so is
        all that is read out later.
    seed
        Of initial weights, split, order of the cells, dropout and posterior samples; None takes ``settings.seed``.
        Global random generators are neither read nor changed.
    checkpoint
        Keep the state of optimiser and generators too (about twice the size of the weights). An interrupted run keeps
        it anyway.
    resume
        Go on with the fit ``key_added`` exactly where it stopped. All other options are those of that run.
    progress
        Show a bar; None shows it in terminals and notebooks.
    copy
        Return a copy instead of changing ``adata``.
    **model_params
        Options of the model, see :func:`scvi_ext.models.show`. Those with a value for each label (``y_prior``,
        ``labels_groups``) are given as a mapping from labels, or in the order of ``get.setup(adata)``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.uns["scvi_ext"]["fits"][key_added]``
        ``model``, ``config``, ``run``, ``setup``, ``var_names``, ``state`` (name -> array), ``history`` (one row per
        epoch: ELBO, reconstruction loss and KL terms per cell for training and held-out cells; higher ELBO is better),
        ``status``.

    Raises
    ------
    KeyError
        ``adata`` was not set up, or there is no fit to resume.
    TypeError
        Unknown keyword; scvi-tools' names are answered with ours.
    ValueError
        An option has an impossible value, would have no effect, or contradicts the run to resume.
    FloatingPointError
        The loss is not finite from the first epoch on, at any learning rate tried.
    KeyboardInterrupt
        After the fit was written, if Ctrl-C was pressed (and ``copy=False``).

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.get.history(adata)["elbo_train"].shape
    (2,)

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053. Svensson et al. (2020), Bioinformatics 36, 3418.
    """
    asked = {k: v for k, v in locals().items() if k in _RUN_ARGUMENTS and v != _DEFAULTS[k]} | model_params
    adata = adata.copy() if copy else adata
    target = resolve_device(device)
    if resume:
        fitted, module, store, plan_, resumed_from = _reopen(adata, key_added, model, asked)
    else:
        fitted, module, store, plan_ = _prepare(
            adata,
            model,
            model_params,
            key_added=key_added,
            plan={
                "name": plan,
                "batch_size": batch_size,
                "max_epochs": max_epochs,
                "lr": lr,
                "kl_warmup": kl_warmup,
                "weight_decay": weight_decay,
            },
            split={"train_size": train_size, "validation_size": validation_size},
            init_from=init_from,
            n_samples_per_label=n_samples_per_label,
            early_stopping=early_stopping,
            seed=resolve_seed(seed),
            checkpoint=checkpoint,
            precision=check_precision(precision, target),
        )
        resumed_from = None

    run, spec = fitted.run, models.get(fitted.model)
    train, validation = split_cells(store.n_cells, run["train_size"], run.get("validation_size"), run["seed"])
    with seeded(run["seed"] + 1, target):  # initial weights took run["seed"]
        start = logg.info(
            f"fitting {fitted.model} on {len(train)} cells x {store.n_genes} genes, {len(validation)} held out"
        )
        done, state_of_run = engine.fit(
            module,
            store,
            plan_,
            train=train,
            validation=validation,
            seed=run["seed"],
            device=target,
            streams=spec.streams,
            n_samples_per_label=run.get("n_samples_per_label"),
            precision=run.get("precision", "float32"),
            patience=run.get("patience"),
            resume=resumed_from,
            show_progress=progress,
            announce=lambda seconds, how: _log_plan(plan_, seconds, target, spec, module, how),
        )

    interrupted = done.stop_reason == "interrupted"
    if interrupted and not resume and _is_finished(adata, fitted.key):
        fitted = replace(fitted, key=f"{fitted.key}_interrupted")  # what was complete is not given up for it
    fitted = replace(
        fitted,
        state=module_arrays(module),
        history=_history(done),
        status=_status(done, plan_, store, target, run["seed"]) | _calibration(done, spec, module, store, validation),
        checkpoint=state_of_run if run["checkpoint"] or checkpoint or interrupted else None,
    )
    results.write_fit(adata, fitted)
    _report(done, fitted, store)
    logg.info(
        f"    {done.stop_reason} after {len(done.history)} epochs",
        time=start,
        deep=f"added\n    {fitted.key!r}, the fitted model (adata.uns[{UNS.root!r}][{UNS.fits!r}])",
    )
    if done.ctrl_c and not copy:
        raise KeyboardInterrupt
    return adata if copy else None


_RUN_ARGUMENTS = {
    *("init_from", "max_epochs", "batch_size", "train_size", "validation_size", "early_stopping"),
    "n_samples_per_label",
    *("lr", "plan", "kl_warmup", "weight_decay", "precision", "seed"),
}
_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(fit).parameters.items()}


def _prepare(
    adata: AnnData,
    model: str,
    model_params: dict,
    *,
    key_added: str | None,
    plan: dict,
    split: dict,
    init_from: str | None,
    n_samples_per_label: int | None,
    early_stopping: bool | int,
    seed: int,
    checkpoint: bool,
    precision: str,
) -> tuple[SavedFit, Any, CellStore, Plan]:
    """Check everything, read the cells, and build the module and the plan of a new fit. Writes nothing."""
    spec = models.get(model)
    registry = read_setup(adata)
    start = None if init_from is None else _start(adata, init_from, registry)
    encloses = start is not None and Capability.COUNTS not in spec.capabilities  # the fit becomes a part, as it is
    config = _config(spec, registry, model_params, None if encloses else start)
    frozen = {"model": start.model, "config": start.config} if encloses else None
    key = valid_key(spec.name if key_added is None else key_added)
    if encloses:
        require(Capability.COUNTS, start)
    needed = columns_read(spec.name, asdict(config), frozen)
    _check_needs(registry, needed, spec.name)
    train, validation = split_cells(adata.n_obs, **split, seed=seed)
    # By name, so that genes that share one are refused here and not when the fit is used.
    genes = adata.var_names if start is None else start.var_names
    store = CellStore.from_adata(adata, registry, var_names=genes, columns=needed)
    _check_labels(spec, store, needed, train, n_samples_per_label)
    if start is not None and plan["kl_warmup"] is None:
        plan = plan | {"kl_warmup": 0.0}  # the latent space is there already
    if all(stream.labelled_only for stream in spec.streams):
        train = train[store.labels[train] >= 0]
    plan_ = make_plan(
        n_cells=adata.n_obs,
        n_train=len(train),
        peak_lr=spec.peak_lr,
        effort=spec.effort,
        **plan,
    )
    patience = _patience(early_stopping, plan_, len(validation))
    with seeded(seed, resolve_device("cpu")):
        module = models.build(spec, config, store.summary(registry), frozen)
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
    return fitted, module, store, plan_


def _reopen(
    adata: AnnData, key_added: str | None, model: str, asked: dict
) -> tuple[SavedFit, Any, CellStore, Plan, dict[str, np.ndarray]]:
    """The same for a fit that goes on."""
    fitted = read_fit(adata, model if key_added is None else key_added)
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
            "(an interrupted fit keeps one by itself)."
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
    return fitted, module, store, Plan(**fitted.run["plan"]), dict(fitted.checkpoint)


def _config(spec: ModelSpec, registry: Registry, model_params: dict, start: SavedFit | None) -> Any:
    valid = {f.name for f in fields(spec.config)}
    for name in model_params:
        if name not in valid:
            own = [n for n in _DEFAULTS if n not in ("adata", "model", "model_params")]
            raise unknown_keyword(f"tl.fit(model={spec.name!r})", name, [*own, *valid], _RENAMED.get(name))
    if start is not None:
        model_params = _options_of(start, valid) | model_params
        changed = [name for name in start.config.keys() & valid if model_params[name] != start.config[name]]
        if changed:
            found = ", ".join(f"{name}={start.config[name]!r}" for name in sorted(changed))
            msg = f"init_from={start.key!r} takes over the options of that fit, {found}: leave these out."
            raise ValueError(msg)
    elif registry.size_factor_key is not None and "library" in valid:
        model_params = {"library": "size_factor"} | model_params
    for field in fields(spec.config):
        value = model_params.get(field.name)
        if value is None and field.default is None:
            continue
        if field.default is None:
            model_params[field.name] = _by_label(field.name, value, registry)
        elif field.name in model_params:
            _check_type(field.name, value, field.default)
    return spec.config(**model_params)


def _options_of(start: SavedFit, valid: set[str]) -> dict:
    return {name: value for name, value in start.config.items() if name in valid}


def _by_label(name: str, value: Any, registry: Registry) -> tuple:
    """An option with a value for each label, in the order of the labels."""
    labels = registry.labels_categories
    if isinstance(value, Mapping):
        value = {str(label): of_label for label, of_label in value.items()}
        absent, unknown = sorted(set(labels) - value.keys()), sorted(value.keys() - set(labels))
        if absent or unknown:
            msg = f"{name} must name every label once: {listing(absent)} missing, {listing(unknown)} unknown."
            raise ValueError(msg)
        return tuple(value[label] for label in labels)
    if isinstance(value, str) or not np.iterable(value):
        msg = f"{name}={value!r} is a {type(value).__name__}; a mapping from labels to values is needed."
        raise TypeError(msg)
    return tuple(value)


def _start(adata: AnnData, init_from: str, registry: Registry) -> SavedFit:
    """The fit to start from, if it was trained on what is registered now; labels may have come since."""
    start = read_fit(adata, init_from)
    trained = Registry.from_uns(start.setup)
    unlike = [name for name in differing_slots(trained, registry) if name not in ("labels_key", "unlabeled_category")]
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
    load_module(module, module_arrays(module) | dict(start.state))


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
            f"{unlabelled.sum()} of {store.n_cells} cells have no label, and dispersion='gene-label' needs one "
            "for every cell: leave these cells out, or take another dispersion."
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


def _calibration(
    done: Progress, spec: ModelSpec, module: nn.Module, store: CellStore, held_out: np.ndarray
) -> dict[str, Any]:
    """The temperature of the classifier, fitted to held-out cells with a label (1 where there is none)."""
    if Capability.LABELS not in spec.capabilities:
        return {}
    cells = np.setdiff1d(held_out[store.labels[held_out] >= 0], done.excluded)
    labelled = store.take(cells)
    device = next(module.parameters()).device
    parts = map_cells(lambda cells, draws: (module.encode_label(cells),), module, labelled, device=device)
    log_qy = [log_qy for _, (log_qy,) in parts]
    temperature = fit_temperature(np.concatenate(log_qy), labelled.labels) if log_qy else 1.0
    return {"temperature": temperature, "n_calibration": len(cells)}


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise a TypeError unless ``value`` is of the kind of the option's default."""
    if isinstance(default, bool | str):
        if not isinstance(value, type(default)):
            expected = "True or False" if isinstance(default, bool) else "a name"
            msg = f"{name}={value!r} is a {type(value).__name__}; {expected} is needed."
            raise TypeError(msg)
    elif isinstance(default, int):
        whole_number(name, value, 1)
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


def _patience(early_stopping: bool | int, plan: Plan, n_validation: int) -> int | None:
    if early_stopping is False:
        return None
    if early_stopping is not True and (not isinstance(early_stopping, int | np.integer) or early_stopping < 1):
        msg = f"early_stopping={early_stopping!r} must be True, False or a number of epochs, 1 or more."
        raise ValueError(msg)
    if n_validation == 0:
        msg = "early_stopping watches held-out cells, and there are none: choose a smaller train_size."
        raise ValueError(msg)
    return plan.patience if early_stopping is True else int(early_stopping)


def _log_plan(plan: Plan, seconds: float, device: torch.device, spec: ModelSpec, module: nn.Module, how: str) -> None:
    generates = Capability.COUNTS in spec.capabilities
    if generates:
        kernel = fused.choose(module.reconstruction_loss, device.type, next(module.parameters()).dtype)[1]
        how = ", ".join(filter(None, (kernel, how)))
    schedule = f"one cycle with peak {plan.lr:g}" if plan.one_cycle else f"constant {plan.lr:g}"
    kl_weight = f", final KL weight {plan.final_kl_weight:.3g}" if generates else ""
    logg.info(
        f"    plan {plan.name!r}: {plan.n_epochs} epochs of {plan.steps_per_epoch} steps of {plan.batch_size} cells, "
        f"learning rate {schedule}{kl_weight}\n"
        f"    about {_duration(seconds)} on {device}{f', {how}' if how else ''}"
    )
    if generates and plan.final_kl_weight < 1:
        warnings.warn(
            f"The KL weight ends at {plan.final_kl_weight:.3g}, not 1, so the prior of z is not fully enforced. "
            "Use plan='auto', or give kl_warmup.",
            ScviExtWarning,
            stacklevel=4,
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _is_finished(adata: AnnData, key: str) -> bool:
    fits = read_root(adata).get(UNS.fits, {})
    return key in fits and read_fit(adata, key).status.get("stop_reason") != "interrupted"


def _history(done: Progress) -> pd.DataFrame:
    history = pd.DataFrame(done.history)
    history.index = pd.RangeIndex(1, len(history) + 1, name="epoch")
    return history


def _status(done: Progress, plan: Plan, store: CellStore, device: object, seed: int) -> dict[str, Any]:
    suspects = sorted({i for event in done.events for i in event.suspects})
    genes = sorted({i for event in done.events for i in event.genes})
    return {
        "steps": done.step,
        "epochs": len(done.history),
        "stop_reason": done.stop_reason,
        "kl_weight_final": plan.kl_weight_at(max(done.step - 1, 0)),
        "best_epoch": done.best_epoch + 1 if done.best_state is not None else None,
        "non_finite_events": len(done.events),
        "non_finite_cells": _names(store.obs_names, done.excluded),
        "non_finite_suspects": _names(store.obs_names, suspects),
        "non_finite_genes": _names(store.var_names, genes),
        "device": str(device),
        "seed": seed,
        "data": store.fingerprint(),
        "versions": {name: version(name) for name in ("scvi-ext", "torch", "anndata", "numpy")},
    }


def _names(names: Any, positions: list[int]) -> list[str] | None:
    return [str(names[i]) for i in positions] or None


def _report(done: Progress, fitted: SavedFit, store: CellStore) -> None:
    """Say aloud what a user must know about the run."""
    if done.stop_reason == "interrupted":
        logg.warning(
            f"interrupted at step {done.step}; what was trained is kept as {fitted.key!r}. "
            f"Go on with tl.fit(adata, {fitted.model!r}, key_added={fitted.key!r}, resume=True)."
        )
    if done.events:
        last = done.events[-1]
        who = (
            f"left out cells without a finite loss: {listing(store.obs_names[list(done.excluded)])}"
            if done.excluded
            else "lowered the learning rate; cells with the largest loss: "
            f"{listing(store.obs_names[list(last.suspects)], 5)}"
        )
        warnings.warn(
            f"The loss was not finite {len(done.events)} times; each time the last good state was restored, and "
            f"the fit {who}. "
            f"Genes with the most extreme counts there: {listing(store.var_names[list(last.genes)], 5)}.",
            ScviExtWarning,
            stacklevel=3,
        )
