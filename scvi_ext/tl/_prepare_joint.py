"""What comes before a fit of several data sets: everything is checked, cells are read, module and plan are made."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_ext import models
from scvi_ext._contract import Capability, SavedFit
from scvi_ext._errors import listing, warn
from scvi_ext._keys import valid_key
from scvi_ext.data.joint import JointStore, describe, n_batches, sizes_of, summary_of, trained_together
from scvi_ext.data.registry import Registry, check_fit_matches_setup, read_fit, read_setup
from scvi_ext.data.sampler import split_cells
from scvi_ext.data.store import CellStore
from scvi_ext.engine.device import resolve_device, seeded
from scvi_ext.engine.plan import Plan, make_plan
from scvi_ext.tl._prepare_fit import config_of, patience_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from scvi_ext._contract import ModelSpec

_FEW_GENES = 10  # in common with other data sets: a type of cells takes about as many to be told


def check_datasets(datasets: object, spec: ModelSpec) -> None:
    """Raise unless the model takes what is given: several data sets by name, or an AnnData."""
    joins = Capability.JOINT in spec.capabilities
    if not isinstance(datasets, Mapping):
        if joins:
            msg = (
                f"Model {spec.name!r} joins several data sets: give a mapping from their names to AnnData, "
                f"tl.fit({{'rna': adata, 'spatial': other}}, model={spec.name!r})."
            )
            raise TypeError(msg)
        return
    if not joins:
        able = [name for name in models.names() if Capability.JOINT in models.get(name).capabilities]
        msg = (
            f"Model {spec.name!r} takes one AnnData, and {len(datasets)} data sets were given. Concatenate them, with "
            f"their names as the batch: anndata.concat(datasets, label='batch'); or take {listing(able)}."
        )
        raise TypeError(msg)
    if len(datasets) < 2:
        msg = f"{len(datasets)} data sets were given; two or more are joined. For one alone take model='scvi'."
        raise ValueError(msg)
    for name, adata in datasets.items():
        if not isinstance(name, str) or not name:
            msg = f"{name!r} names a data set; a name that is not empty is needed, as in {{'rna': adata}}."
            raise TypeError(msg)
        if not isinstance(adata, AnnData):
            msg = f"Data set {name!r} is a {type(adata).__name__}; an AnnData is needed."
            raise TypeError(msg)
    if len({id(adata) for adata in datasets.values()}) < len(datasets):
        msg = (
            "The same AnnData was given under two names, and results of one would replace those of the other: copy it."
        )
        raise ValueError(msg)


def prepare_joint(
    datasets: Mapping[str, AnnData],
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
) -> tuple[list[SavedFit], Any, JointStore, Plan]:
    """The same as for one AnnData, with a fit to be written into each."""
    spec = models.get(model)
    for option, value in {"init_from": init_from, "n_samples_per_label": n_samples_per_label}.items():
        if value is not None:
            msg = f"{option} has no effect on the model {model!r}: leave it out."
            raise ValueError(msg)
    key = valid_key(spec.name if key_added is None else key_added)
    names = tuple(datasets)
    config = config_of(spec, model_params, names, keywords)
    registries = [_registry(name, adata, spec) for name, adata in datasets.items()]
    store = _read(datasets, registries)
    _check_genes(store)
    config = _with_defaults(config, store)
    train, validation = split_joint(store, split, seed)
    largest = max(range(len(names)), key=lambda i: store.stores[i].n_cells)
    n_train = int((np.searchsorted(store.first, train, side="right") - 1 == largest).sum())
    pace = {"peak_lr": spec.peak_lr, "effort": spec.effort, "most_epochs": spec.most_epochs}
    plan_ = make_plan(n_cells=store.stores[largest].n_cells, n_train=n_train, **pace, **plan)
    patience = patience_of(early_stopping, plan_, len(validation))
    with seeded(seed, resolve_device("cpu")):
        module = models.build(spec, config, summary_of(store, registries))
    run = {
        "plan": asdict(plan_),
        **split,
        "seed": seed,
        "patience": patience,
        "checkpoint": checkpoint,
        "precision": precision,
    }
    joint = describe(store, registries)
    fits = [
        SavedFit(
            key=key,
            model=spec.name,
            config=asdict(config),
            run=run,
            setup=registry.to_uns(),
            var_names=np.asarray(part.var_names, dtype=object),
            state={},
            history=pd.DataFrame(),
            status={},
            joint=joint | {"dataset": name},
        )
        for name, registry, part in zip(names, registries, store.stores, strict=True)
    ]
    return fits, module, store, plan_


def reopen_joint(
    datasets: Mapping[str, AnnData], key_added: str | None, model: str, asked: dict
) -> tuple[list[SavedFit], Any, JointStore, Plan, dict[str, np.ndarray]]:
    """The same for a fit that goes on."""
    key = model if key_added is None else key_added
    fits = {}
    for name, adata in datasets.items():
        with _speaking_of(name):
            fits[name] = read_fit(adata, key)
    for fit in fits.values():
        if fit.model != model:
            msg = f"Fit {key!r} is of the model {fit.model!r}, not {model!r}: resume it as that."
            raise ValueError(msg)
    first = next(iter(fits.values()))
    known = list(first.joint["datasets"])
    if set(known) != set(datasets) or any(fit.joint["dataset"] != name for name, fit in fits.items()):
        msg = f"Fit {key!r} was made of the data sets {listing(known)}: give these, under the same names, to resume it."
        raise ValueError(msg)
    if asked:
        msg = f"resume=True goes on with the options of the run it continues; leave out {listing(asked)}."
        raise ValueError(msg)
    fits = {name: fits[name] for name in known}
    first = fits[known[0]]
    if not all(trained_together(fit, first) for fit in fits.values()):
        msg = f"The data sets hold different fits called {key!r}, which were not trained together. Fit all anew."
        raise ValueError(msg)
    if first.checkpoint is None:
        msg = (
            f"Fit {key!r} was kept without a checkpoint, so it cannot go on. Fit again with checkpoint=True (an "
            "interrupted fit keeps one by itself)."
        )
        raise ValueError(msg)
    for name, fit in fits.items():
        with _speaking_of(name):
            check_fit_matches_setup(fit, datasets[name])
    registries = [Registry.from_uns(fit.setup) for fit in fits.values()]
    store = _read({name: datasets[name] for name in known}, registries, [fit.var_names for fit in fits.values()])
    if store.fingerprint() != first.status["data"]:
        msg = (
            f"Fit {key!r} was trained on other data: cells or counts of a data set have changed since. Resume on the "
            "same cells in the same order, or fit anew."
        )
        raise ValueError(msg)
    spec = models.get(model)
    with seeded(0, resolve_device("cpu")):  # a module draws initial weights, even if it is given others
        module = models.build(spec, spec.config(**first.config), sizes_of(first))
    return list(fits.values()), module, store, Plan(**first.run["plan"]), dict(first.checkpoint)


def split_joint(store: JointStore, split: dict, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of training and validation cells, the same shares of each data set."""
    sides = []
    for name, part in zip(store.names, store.stores, strict=True):
        with _speaking_of(name):
            sides.append(split_cells(part.n_cells, **split, seed=seed))
    return tuple(
        np.concatenate([first + side[i] for first, side in zip(store.first, sides, strict=False)]) for i in (0, 1)
    )


def _registry(name: str, adata: AnnData, spec: ModelSpec) -> Registry:
    with _speaking_of(name):
        registry = read_setup(adata).read_by(frozenset())
    unused = {
        "size_factor_key": registry.size_factor_key,
        "categorical_covariate_keys": registry.categorical_covariate_keys,
        "continuous_covariate_keys": registry.continuous_covariate_keys,
    }
    for slot, value in unused.items():
        if value:
            msg = (
                f"Data set {name!r} was set up with {slot}={value!r}, and model {spec.name!r} knows batches only: call "
                "pp.setup_anndata without it."
            )
            raise ValueError(msg)
    return registry


def _read(
    datasets: Mapping[str, AnnData], registries: Sequence[Registry], genes: Sequence[np.ndarray] | None = None
) -> JointStore:
    """The cells of all data sets, their batches numbered through."""
    stores, first = [], 0
    for i, ((name, adata), registry) in enumerate(zip(datasets.items(), registries, strict=True)):
        # By name, so that genes that share one are refused here and not when the fit is used.
        var_names = adata.var_names if genes is None else genes[i]
        with _speaking_of(name):
            store = CellStore.from_adata(adata, registry, var_names=var_names)
        stores.append(replace(store, batch_index=store.batch_index + first))
        first += n_batches(registry)
    return JointStore(tuple(datasets), tuple(stores))


@contextmanager
def _speaking_of(name: str) -> Iterator[None]:
    """Inside, what goes wrong says of which data set: there, it is called adata."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        msg = f"Data set {name!r}: {error.args[0]}"
        raise type(error)(msg) from error


def _check_genes(store: JointStore) -> None:
    """Raise a ValueError unless genes in common lead from each data set to every other; warn where they are few."""
    sets = dict(zip(store.names, (set(part.var_names) for part in store.stores), strict=True))
    joined, *rest = store.names
    joined, known = [joined], set(sets[joined])
    while near := [name for name in rest if sets[name] & known]:
        joined += near
        known = known.union(*(sets[name] for name in near))
        rest = [name for name in rest if name not in near]
    if rest:
        others = set().union(*(sets[name] for name in rest))
        msg = (
            f"The data sets {listing(rest)} have no gene in common with {listing(joined)}: they have "
            f"{listing(sorted(others), 3)} there, and {listing(sorted(known), 3)} here. Genes are matched by name: use "
            "the same kind of names."
        )
        raise ValueError(msg)
    for name, genes in sets.items():
        n_common = len(genes & set().union(*(sets[other] for other in sets if other != name)))
        if n_common < _FEW_GENES:
            warn(
                f"Data set {name!r} has {n_common} of its {len(genes)} genes in common with others, which says little "
                "of how its cells lie among theirs: do not take the overlap that the critic makes for a fact."
            )


def _with_defaults(config: Any, store: JointStore) -> Any:
    """The same likelihood and library for every data set where none were named."""
    if config.reconstruction_losses is None:
        config = replace(config, reconstruction_losses=("nb",) * len(store.stores))
    if config.model_library_bools is None:
        config = replace(config, model_library_bools=(False,) * len(store.stores))
    return config
