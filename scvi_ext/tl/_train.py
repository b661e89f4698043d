"""A fit from its options to what is kept of it: prepared, trained, described. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_ext import models
from scvi_ext._contract import Capability
from scvi_ext._errors import first_line, warn
from scvi_ext.data.matrix import UnreadableRowsError
from scvi_ext.data.sampler import Blocks, split_cells
from scvi_ext.data.stream import order_of
from scvi_ext.engine import fit as engine
from scvi_ext.engine.checkpoint import module_arrays
from scvi_ext.engine.device import check_precision, resolve_seed, seeded
from scvi_ext.engine.map_cells import map_cells
from scvi_ext.engine.processes import ALONE
from scvi_ext.engine.progress import step_of
from scvi_ext.functional.calibration import fit_temperature
from scvi_ext.tl._prepare_fit import prepare
from scvi_ext.tl._prepare_joint import prepare_joint, split_joint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    import torch
    from anndata import AnnData
    from torch import nn

    from scvi_ext._contract import ModelSpec, SavedFit, Stream
    from scvi_ext.data.joint import JointStore
    from scvi_ext.data.store import CellStore
    from scvi_ext.engine.plan import Plan
    from scvi_ext.engine.processes import Team
    from scvi_ext.engine.progress import Progress
    from scvi_ext.tl._checkpoint import CheckpointFile


# Arguments of tl.fit that make a fit what it is, with their defaults, and those that do not.
OPTIONS = {
    "key_added": None,
    "init_from": None,
    "max_epochs": None,
    "batch_size": None,
    "train_size": 0.9,
    "validation_size": None,
    "early_stopping": False,
    "n_samples_per_label": None,
    "lr": None,
    "plan": "auto",
    "kl_warmup": None,
    "weight_decay": None,
    "device": "auto",
    "precision": "float32",
    "seed": None,
    "checkpoint": False,
}
_OF_CALL = ("resume", "progress", "copy")


@dataclass(frozen=True)
class Prepared:
    """What a fit starts from: a fit of each data set that is still empty, module, cells and plan."""

    fits: list[SavedFit]
    module: nn.Module
    store: CellStore | JointStore
    plan: Plan
    checkpoint: Mapping[str, np.ndarray] | None = None  # of a run that goes on

    @property
    def spec(self) -> ModelSpec:
        """The declaration of the model."""
        return models.get(self.fits[0].model)

    @property
    def step(self) -> int | None:
        """Where a run goes on; None of a new one."""
        return None if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def blocks(self) -> Blocks | None:
        """The order of cells that come block by block."""
        blocks = self.fits[0].run.get("blocks")
        return None if blocks is None else Blocks(**{name: int(value) for name, value in blocks.items()})

    @property
    def streams(self) -> Sequence[Stream]:
        """The minibatches that its loss takes."""
        return self.spec.streams if self.fits[0].joint is None else self.store.streams

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the cells that are trained on, and of those held out."""
        run = self.fits[0].run
        sizes = {"train_size": run["train_size"], "validation_size": run.get("validation_size")}
        if self.fits[0].joint is not None:
            return split_joint(self.store, sizes, run["seed"])
        return split_cells(self.store.n_cells, **sizes, seed=run["seed"])


def prepare_new(
    adata: AnnData | Mapping[str, AnnData],
    model: str,
    options: Mapping[str, Any],
    model_params: dict[str, Any],
    *,
    device: torch.device,
) -> Prepared:
    """Check everything about a new fit, with ``options`` as :func:`~scvi_ext.tl.fit` takes them, and read the cells."""
    options = OPTIONS | options
    several = isinstance(adata, Mapping)
    of_plan = ("batch_size", "max_epochs", "lr", "kl_warmup", "weight_decay")
    as_they_are = ("key_added", "init_from", "n_samples_per_label", "early_stopping", "checkpoint")
    start = Prepared(
        *(prepare_joint if several else prepare)(
            adata,
            model,
            model_params,
            keywords=[*OPTIONS, *_OF_CALL],
            plan={"name": options["plan"], **{name: options[name] for name in of_plan}},
            split={name: options[name] for name in ("train_size", "validation_size")},
            seed=resolve_seed(options["seed"]),
            precision=check_precision(options["precision"], device),
            **{name: options[name] for name in as_they_are},
        )
    )
    blocks = order_of(start.store, device)
    if blocks is None:
        return start
    return replace(start, fits=[replace(fitted, run={**fitted.run, "blocks": asdict(blocks)}) for fitted in start.fits])


def train(
    start: Prepared,
    device: torch.device,
    *,
    keep_checkpoint: bool = False,
    file: CheckpointFile | None = None,
    team: Team = ALONE,
    show_progress: bool | None = None,
    announce: Callable[[float, str], None] = lambda seconds, how: None,
    after_epoch: Callable[[Mapping[str, float], float], bool] | None = None,
) -> tuple[Progress, list[SavedFit]]:
    """Train the module; how that went, and the fits as they are now. For callbacks see the engine.

    ``file``: where the run is kept meanwhile. What interrupted it, if nobody did, is in the progress.
    """
    module, store, plan, run = start.module, start.store, start.plan, start.fits[0].run
    train, validation = start.split()

    def keep(progress: Progress, make_checkpoint: Callable[[], dict[str, np.ndarray]]) -> None:
        if file.due:
            unfinished = replace(progress, stop_reason="interrupted")
            _write(file, _learned(start, unfinished, module_arrays(module), device, make_checkpoint())[0])

    with seeded(run["seed"] + 1, device):  # initial weights took run["seed"]
        done, state_of_run = engine.fit(
            module,
            store,
            plan,
            train=train,
            validation=validation,
            seed=run["seed"],
            device=device,
            streams=start.streams,
            n_samples_per_label=run.get("n_samples_per_label"),
            precision=run.get("precision", "float32"),
            patience=run.get("patience"),
            resume=start.checkpoint,
            blocks=start.blocks,
            team=team,
            show_progress=show_progress,
            announce=announce,
            after_epoch=after_epoch,
            keep=keep if file is not None and team.is_first else None,
        )
    calibration = {}
    if done.failure is None:
        try:
            calibration = _calibration(done, start, validation)
        except UnreadableRowsError as error:  # what was trained is not lost for that: it goes on with this
            done.failure, done.stop_reason = error, "interrupted"
    interrupted = done.stop_reason == "interrupted"
    fits = _learned(start, done, module_arrays(module), device, state_of_run, calibration)
    # Of processes that have lost one of them, any may be the last to know: what they write is the same.
    if file is not None and (team.is_first or done.failure is not None):
        _write(file, fits[0])
    keeps = keep_checkpoint or run["checkpoint"] or interrupted
    return done, fits if keeps else [replace(fitted, checkpoint=None) for fitted in fits]


def _write(file: CheckpointFile, fitted: SavedFit) -> None:
    """Keep a run in its file; where that fails, it is in memory all the same, and goes on."""
    try:
        file.write(fitted)
    except OSError as error:
        warn(
            f"checkpoint={str(file.path)!r} could not be written ({first_line(error)}): the run goes on, and step "
            f"{fitted.status['steps']} of it is in memory only. Make room, or see to the folder."
        )


def _learned(
    start: Prepared,
    done: Progress,
    state: dict[str, np.ndarray],
    device: torch.device,
    checkpoint: dict[str, np.ndarray],
    calibration: Mapping[str, Any] = MappingProxyType({}),
) -> list[SavedFit]:
    """The fits with what has been learned."""
    status = {**_status(done, start, device), **calibration}
    learned = {"state": state, "history": _history(done), "status": status, "checkpoint": checkpoint}
    return [replace(fitted, **learned) for fitted in start.fits]


def _calibration(done: Progress, start: Prepared, held_out: np.ndarray) -> dict[str, Any]:
    """The temperature of the classifier, fitted to held-out cells with a label (1 where there is none)."""
    if Capability.LABELS not in start.spec.capabilities:
        return {}
    module, store = start.module, start.store
    cells = np.setdiff1d(held_out[store.labels[held_out] >= 0], done.excluded)
    labelled = store.take(cells)
    device = next(module.parameters()).device
    parts = map_cells(lambda cells, draws: (module.encode_label(cells),), module, labelled, device=device)
    log_qy = [log_qy for _, (log_qy,) in parts]
    temperature = fit_temperature(np.concatenate(log_qy), labelled.labels) if log_qy else 1.0
    return {"temperature": temperature, "n_calibration": len(cells)}


def _history(done: Progress) -> pd.DataFrame:
    history = pd.DataFrame(done.history)
    history.index = pd.RangeIndex(1, len(history) + 1, name="epoch")
    return history


def _status(done: Progress, start: Prepared, device: torch.device) -> dict[str, Any]:
    store = start.store
    suspects = sorted({i for event in done.events for i in event.suspects})
    genes = sorted({i for event in done.events for i in event.genes})
    return {
        "steps": done.step,
        "epochs": len(done.history),
        "stop_reason": done.stop_reason,
        "kl_weight_final": start.plan.kl_weight_at(max(done.step - 1, 0)),
        "best_epoch": done.best_epoch + 1 if done.best_state is not None else None,
        "non_finite_events": len(done.events),
        "non_finite_cells": _names(store.obs_names, done.excluded),
        "non_finite_suspects": _names(store.obs_names, suspects),
        "non_finite_genes": _names(store.var_names, genes),
        "device": str(device),
        "seed": start.fits[0].run["seed"],
        "data": store.fingerprint(),
        "versions": {name: version(name) for name in ("scvi-ext", "torch", "anndata", "numpy")},
    }


def _names(names: Any, positions: list[int]) -> list[str] | None:
    return [str(names[i]) for i in positions] or None
