"""The training loop."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._contract import CLASSIFICATION, Stream
from scvi_ext._errors import listing
from scvi_ext.data.joint import resident
from scvi_ext.data.sampler import epoch_order, some_of_each_label
from scvi_ext.engine.bar import progress_bar
from scvi_ext.engine.checkpoint import (
    Snapshot,
    generator_arrays,
    load_generators,
    load_module,
    load_optimizer,
    module_arrays,
    optimizer_arrays,
)
from scvi_ext.engine.device import arithmetic
from scvi_ext.engine.graph import make_runner
from scvi_ext.engine.guard import MAX_ROLLBACKS, NonFiniteEvent, find_culprits
from scvi_ext.engine.interrupt import deferred_interrupt
from scvi_ext.engine.step import TrainingStep, sums_of_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from scvi_ext.data.joint import JointStore
    from scvi_ext.data.store import CellStore
    from scvi_ext.engine.plan import Plan

_VALIDATION_CELLS = 1024  # per forward pass


@dataclass(frozen=True)
class Epochs:
    """Which cells make up an epoch, in which order."""

    plan: Plan
    store: CellStore | JointStore
    streams: Sequence[Stream]
    n_samples_per_label: int | None
    seed: int

    def cells(self, cells: np.ndarray) -> list[np.ndarray]:
        """Those of ``cells`` that belong to each stream."""
        return [self.store.cells_of(stream, cells) for stream in self.streams]

    def held_out(self, cells: np.ndarray) -> list[np.ndarray]:
        """The same of held-out cells: those of data sets that have fewer go round, as they do in training."""
        streams = self.cells(cells)
        most = max(map(len, streams))
        goes_round = [
            stream.dataset is not None and len(of) > 0 for stream, of in zip(self.streams, streams, strict=True)
        ]
        return [np.resize(of, most) if again else of for of, again in zip(streams, goes_round, strict=True)]

    def rows(self, train: np.ndarray, epoch: int) -> np.ndarray:
        """Positions of an epoch, (streams, steps, B)."""
        shape = (self.plan.steps_per_epoch, self.plan.batch_size)
        rows = []
        for i, (stream, cells) in enumerate(zip(self.streams, self.cells(train), strict=True)):
            if stream.labelled_only:
                cells = some_of_each_label(cells, self.store.labels, self.n_samples_per_label, self.seed, epoch)
            rows.append(epoch_order(cells, shape, self.seed, epoch, i))
        return np.stack(rows)


@dataclass
class Progress:
    """Where a run stands between two steps: everything that is not a tensor of the module or the optimiser."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)  # of the epoch under way
    lr_factor: float = 1.0  # lowered by the guard
    events: list[NonFiniteEvent] = field(default_factory=list)
    excluded: list[int] = field(default_factory=list)  # cells without a finite loss
    best_elbo: float = -np.inf  # of held-out cells; of a model without one, minus what their labels cost
    best_epoch: int = -1
    best_state: dict[str, np.ndarray] | None = None
    stop_reason: str = ""
    ctrl_c: bool = False  # whether the user asked to stop, even if the run was over anyway


def fit(
    module: nn.Module,
    store: CellStore | JointStore,
    plan: Plan,
    *,
    train: np.ndarray,
    validation: np.ndarray,
    seed: int,
    device: torch.device,
    streams: Sequence[Stream] = (Stream("cells"),),
    n_samples_per_label: int | None = None,
    precision: str = "float32",
    patience: int | None = None,
    resume: Mapping[str, np.ndarray] | None = None,
    show_progress: bool | None = None,
    announce: Callable[[float, str], None] = lambda seconds, how: None,
    after_epoch: Callable[[Mapping[str, float], float], bool] | None = None,
) -> tuple[Progress, dict[str, np.ndarray]]:
    """Train ``module`` in place.

    Call it inside :func:`~scvi_ext.engine.device.seeded`, so that torch's generators belong to the run.

    Parameters
    ----------
    module, store, plan
        What to train, on which cells, how.
    train, validation
        Positions of the cells.
    seed
        Of the order of the cells.
    device
        Where.
    streams
        The minibatches that the loss takes.
    n_samples_per_label
        Labelled cells of each label that a stream of labelled cells draws for an epoch; None takes all.
    precision
        ``"float32"`` or ``"bf16"``, see :func:`~scvi_ext.engine.device.arithmetic`.
    patience
        Epochs without a better held-out ELBO after which to stop; None trains to the end. With a number, the best
        state is the one that remains.
    resume
        Checkpoint of an earlier call with the same arguments.
    show_progress
        Whether to show a bar; None shows it where somebody can see it.
    announce
        Called once with the predicted seconds, and how a step is carried out where there is something to say.
    after_epoch
        Called with the row of the history and the share of the plan that is done; True gives the run up.

    Returns
    -------
    How the run went, and a checkpoint from which it can go on.
    """
    module.to(device).train()
    block = resident(store, device)
    step = TrainingStep(module, block, plan, precision, streams)
    epochs = Epochs(plan, store, streams, n_samples_per_label, seed)
    progress = Progress()
    if resume is not None:
        progress = load_checkpoint(module, step.optimizer, device, resume)
        step.sums.copy_(torch.tensor(progress.sums, dtype=torch.float64))
    with arithmetic(device, precision):
        step.begin_epoch(epochs.rows(train, 0), _schedule(plan, 0, 1.0), 0)
        run, how, seconds_per_step = make_runner(step)
        # A held-out cell costs about a third of a trained one: forward without backward.
        steps = (plan.n_steps - progress.step) * (1 + len(validation) / (3 * plan.batch_size * plan.steps_per_epoch))
        announce(seconds_per_step * steps, ", ".join(filter(None, (how, block.note))))
        _train(step, run, plan, epochs, progress, train, validation, patience, show_progress, after_epoch)
    progress.stop_reason = progress.stop_reason or "finished"
    progress.sums = step.sums.tolist()
    checkpoint = make_checkpoint(module, step.optimizer, device, progress)
    if progress.best_state is not None and progress.stop_reason != "interrupted":
        load_module(module, progress.best_state)
    module.eval()
    return progress, checkpoint


def _train(
    step: TrainingStep,
    run: Callable[[int], int],
    plan: Plan,
    epochs: Epochs,
    progress: Progress,
    train: np.ndarray,
    validation: np.ndarray,
    patience: int | None,
    show_progress: bool | None,
    after_epoch: Callable[[Mapping[str, float], float], bool] | None,
) -> None:
    """Carry out what is left of the plan."""
    module = step.module
    origin = module_arrays(module)
    train, validation = (np.setdiff1d(cells, progress.excluded) for cells in (train, validation))
    with (
        deferred_interrupt() as interrupt,
        progress_bar(plan.n_steps, "fit", "step", show_progress, done=progress.step) as bar,
    ):
        while progress.step < plan.n_steps and not progress.stop_reason:
            start = progress.step
            epoch, first = divmod(start, plan.steps_per_epoch)
            step.begin_epoch(epochs.rows(train, epoch), _schedule(plan, epoch, progress.lr_factor), first)
            snapshot, sums_before = Snapshot(module, step.optimizer), step.sums.clone()
            started = time.perf_counter()
            end = (epoch + 1) * plan.steps_per_epoch
            while progress.step < end and not interrupt.requested:
                done = run(end - progress.step)
                progress.step += done
                bar.update(done)
            if progress.step < end:
                if not (step.sums.isfinite().all() and _all_finite(module)):  # the guard looks when an epoch ends
                    snapshot.restore()
                    progress.step = start
                    step.sums.copy_(sums_before)
                progress.stop_reason = "interrupted"
                break

            held_out = _evaluate(step, epochs, validation, epoch)
            row = torch.cat([step.sums, held_out, _all_finite(module)]).tolist()  # the one host sync of the epoch
            seconds = time.perf_counter() - started
            if not np.isfinite(row).all() or not row[-1]:
                _roll_back(step, epochs, snapshot, progress, (train, validation), epoch, origin)
                progress.step = bar.n = start
                step.sums.copy_(sums_before)
                train, validation = (np.setdiff1d(cells, progress.excluded) for cells in (train, validation))
                continue
            step.sums.zero_()
            steps_per_second = (end - start) / seconds
            history = _history_row(row, step, plan, progress, epochs.held_out(validation), steps_per_second)
            progress.history.append(history)
            bar.set_postfix(_postfix(progress.history[-1]), refresh=False)
            if patience is not None and len(validation):
                _remember_best(module, progress, epoch, patience)
            if after_epoch is not None and after_epoch(history, progress.step / plan.n_steps):
                progress.stop_reason = progress.stop_reason or "pruned"
            if interrupt.requested and progress.step < plan.n_steps and not progress.stop_reason:
                progress.stop_reason = "interrupted"
        progress.ctrl_c = interrupt.requested


def _schedule(plan: Plan, epoch: int, lr_factor: float) -> np.ndarray:
    """Learning rate and KL weight of the steps of an epoch, shape (steps, 2)."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return np.array([(plan.lr_at(i) * lr_factor, plan.kl_weight_at(i)) for i in steps], dtype=np.float32)


@torch.no_grad()
def _evaluate(step: TrainingStep, epochs: Epochs, held_out: np.ndarray, epoch: int) -> torch.Tensor:
    """The same sums for held-out cells, in evaluation mode, with draws of their own: training does not notice."""
    module, block = step.module, step.block
    total = torch.zeros_like(step.sums)
    streams = epochs.held_out(held_out)
    if not any(map(len, streams)):
        return total
    n_passes = -(-max(map(len, streams)) // _VALIDATION_CELLS)
    passes = zip(*(np.array_split(cells, n_passes) for cells in streams), strict=True)
    module.eval()
    with torch.random.fork_rng(devices=[block.device] if block.device.type == "cuda" else []):
        torch.manual_seed(hash((epochs.seed, epoch)) % 2**63)
        for rows in passes:
            minibatches = (
                source.minibatch(r) if len(r) else None for source, r in zip(step.sources, rows, strict=True)
            )
            total += sums_of_parts(module.loss(*minibatches), step.parts)
    module.train()
    return total


def _all_finite(module: nn.Module) -> torch.Tensor:
    """1 if every parameter and buffer is finite, else 0, as a tensor of shape (1,) on the device."""
    return torch.stack([t.isfinite().all() for t in module.state_dict().values()]).all().double().reshape(1)


def _history_row(
    row: list[float],
    step: TrainingStep,
    plan: Plan,
    progress: Progress,
    held_out: Sequence[np.ndarray],
    steps_per_second: float,
) -> dict[str, float]:
    parts, streams = step.parts, step.streams
    sources = {part: [i for i, stream in enumerate(streams) if part in stream.parts] for part in parts}
    n_trained = {part: plan.steps_per_epoch * plan.batch_size * len(of) for part, of in sources.items()}
    n_held_out = {part: sum(len(held_out[i]) for i in of) for part, of in sources.items()}
    last = progress.step - 1
    history = _means(row[: len(parts)], parts, n_trained, "train")
    history |= _means(row[len(parts) : 2 * len(parts)], parts, n_held_out, "validation")
    if parts[0] != CLASSIFICATION:
        history["kl_weight"] = plan.kl_weight_at(last)
    history["lr"] = plan.lr_at(last) * progress.lr_factor
    history["cells_per_second"] = steps_per_second * plan.batch_size * len(sources[parts[0]])
    return history


def _means(sums: list[float], parts: Sequence[str], n_cells: Mapping[str, int], cells: str) -> dict[str, float]:
    """Means per cell of the parts that have cells, and first of all the ELBO where there is one."""
    means = {part: value / n_cells[part] for part, value in zip(parts, sums, strict=True) if n_cells[part]}
    of_elbo = [mean for part, mean in means.items() if part != CLASSIFICATION]
    elbo = {"elbo": -sum(of_elbo)} if of_elbo else {}
    return {f"{name}_{cells}": value for name, value in (elbo | means).items()}


def _postfix(row: dict[str, float]) -> dict[str, str]:
    shown = {name: f"{row[name]:.1f}" for name in ("elbo_train", "elbo_validation") if name in row}
    cost = f"{CLASSIFICATION}_train"
    shown |= {cost: f"{row[cost]:.3f}"} if cost in row else {}
    return shown | {"cells/s": f"{row['cells_per_second']:,.0f}"}


def _remember_best(module: nn.Module, progress: Progress, epoch: int, patience: int) -> None:
    row = progress.history[-1]
    elbo = row["elbo_validation"] if "elbo_validation" in row else -row[f"{CLASSIFICATION}_validation"]
    if elbo > progress.best_elbo:
        progress.best_elbo, progress.best_epoch, progress.best_state = elbo, epoch, module_arrays(module)
    elif epoch - progress.best_epoch >= patience:
        progress.stop_reason = "early stopping"


def _roll_back(
    step: TrainingStep,
    epochs: Epochs,
    snapshot: Snapshot,
    progress: Progress,
    cells: tuple[np.ndarray, np.ndarray],
    epoch: int,
    origin: Mapping[str, np.ndarray],
) -> None:
    """Return to the state before the epoch; leave out cells that cannot be modelled, or else halve the rate.

    ``cells`` are those that are trained on, and those that are held out.
    """
    snapshot.restore()
    rows = np.concatenate(cells)
    event = find_culprits(step, epochs.cells(rows), epoch, origin)
    store = epochs.store
    progress.events.append(event)
    progress.excluded = sorted({*progress.excluded, *event.cells})
    if len(rows) - len(event.cells) < 3:
        msg = "The loss is not finite for (almost) any cell, so nothing can be trained. Look at the counts."
        raise FloatingPointError(msg)
    left = epochs.cells(np.setdiff1d(cells[0], event.cells))
    emptied = [stream.name for stream, of_stream in zip(step.streams, left, strict=True) if not len(of_stream)]
    if emptied:
        msg = (
            f"The loss is not finite for any of the training cells called {listing(emptied)}, so nothing can be "
            "learned from them. Look at their counts."
        )
        raise FloatingPointError(msg)
    if len(progress.events) > MAX_ROLLBACKS:
        if not progress.history:
            msg = (
                f"The loss was not finite in any of {len(progress.events)} attempts at the first epoch, the last one "
                f"at {progress.lr_factor:.3g} of the planned learning rate. Cells with the largest loss: "
                f"{listing(store.obs_names[list(event.suspects)], 5)}; genes with the largest counts there: "
                f"{listing(store.var_names[list(event.genes)], 5)}."
            )
            raise FloatingPointError(msg)
        progress.stop_reason = "non-finite loss"
    elif not event.cells:
        progress.lr_factor /= 2


# ---- the checkpoint: progress beside the state of module, optimiser and generators
# -------------------------------------


def make_checkpoint(
    module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, progress: Progress
) -> dict[str, np.ndarray]:
    """Everything needed to go on exactly, as named arrays."""
    plain = asdict(progress)
    best = plain.pop("best_state") or {}
    return {
        **{f"module.{name}": array for name, array in module_arrays(module).items()},
        **{f"best.{name}": array for name, array in best.items()},
        **optimizer_arrays(module, optimizer),
        **generator_arrays(device),
        "progress": np.asarray([json.dumps(plain)]),
    }


def load_checkpoint(
    module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, checkpoint: Mapping[str, np.ndarray]
) -> Progress:
    """The inverse of :func:`make_checkpoint`."""

    def arrays(prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): array for key, array in checkpoint.items() if key.startswith(prefix)}

    load_module(module, arrays("module."))
    load_optimizer(module, optimizer, checkpoint)
    load_generators(device, checkpoint)
    plain = json.loads(str(checkpoint["progress"][0]))
    plain["events"] = [
        NonFiniteEvent(**{k: tuple(v) if k != "epoch" else v for k, v in e.items()}) for e in plain["events"]
    ]
    return Progress(**plain | {"best_state": arrays("best.") or None, "stop_reason": "", "ctrl_c": False})
