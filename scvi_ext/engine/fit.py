"""The training loop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scvi_ext._bar import progress_bar
from scvi_ext._contract import CLASSIFICATION, Stream
from scvi_ext._errors import listing
from scvi_ext.data.matrix import UnreadableRowsError
from scvi_ext.data.sampler import epoch_order, some_of_each_label
from scvi_ext.data.stream import cells_of_run
from scvi_ext.engine.checkpoint import Snapshot, generator_arrays, load_generators, load_module, module_arrays
from scvi_ext.engine.device import arithmetic, keep_freed_memory
from scvi_ext.engine.graph import make_runner
from scvi_ext.engine.guard import MAX_ROLLBACKS, find_culprits
from scvi_ext.engine.interrupt import TO_STOP, deferred_interrupt
from scvi_ext.engine.processes import ALONE, LostProcessError, noticing_loss
from scvi_ext.engine.progress import Progress, load_checkpoint, make_checkpoint
from scvi_ext.engine.step import TrainingStep, sums_of_parts
from scvi_ext.functional.ranks import Ranks, training_as

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn
    from tqdm import tqdm

    from scvi_ext.data.joint import JointStore
    from scvi_ext.data.sampler import Blocks
    from scvi_ext.data.store import CellStore
    from scvi_ext.data.stream import Resident, Streamed
    from scvi_ext.engine.interrupt import Interrupt
    from scvi_ext.engine.plan import Plan
    from scvi_ext.engine.processes import Team

_VALIDATION_CELLS = {"cpu": 256, "cuda": 1024}  # per forward pass: what fits the cache, what fills the device
_ASK_EVERY = 32  # steps of several processes, after which they agree on whether somebody asked to stop


@dataclass(frozen=True)
class Epochs:
    """Which cells make up an epoch, in which order."""

    plan: Plan
    store: CellStore | JointStore
    streams: Sequence[Stream]
    n_samples_per_label: int | None
    seed: int
    blocks: Blocks | None = None

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
            rows.append(epoch_order(cells, shape, self.seed, epoch, i, self.blocks))
        return np.stack(rows)


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
    blocks: Blocks | None = None,
    team: Team = ALONE,
    show_progress: bool | None = None,
    announce: Callable[[float, str], None] = lambda seconds, how: None,
    after_epoch: Callable[[Mapping[str, float], float], bool] | None = None,
    keep: Callable[[Progress, Callable[[], dict[str, np.ndarray]]], None] | None = None,
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
    blocks
        The order of cells that are read from disk; None where all of them are in memory.
    team
        The processes that train it together, each with its part of every minibatch. All of them call this function,
        with the same arguments.
    show_progress
        Whether to show a bar; None shows it where somebody can see it.
    announce
        Called once with the predicted seconds, and how a step is carried out where there is something to say.
    after_epoch
        Called with the row of the history and the share of the plan that is done; True gives the run up.
    keep
        Called after each epoch with how far the run has come, and a function that makes a checkpoint of it.

    Returns
    -------
    How the run went, and a checkpoint from which it can go on. A run that a damaged file or the end of another process
    has interrupted tells so in ``failure``, which the caller raises when it has kept what was trained.
    """
    keep_freed_memory(device)
    module.to(device).train()
    shape = (plan.steps_per_epoch, plan.batch_size)
    source = cells_of_run(store, device, streams, (shape[0], shape[1] // team.n), blocks)
    step = TrainingStep(module, source.block, plan, precision, streams, team)
    epochs = Epochs(plan, store, streams, n_samples_per_label, seed, blocks)
    progress = Progress(sums=[0.0] * len(step.parts))
    if resume is not None:
        progress = load_checkpoint(module, step.optimizer, device, resume)
        if team.is_first:
            step.sums.copy_(torch.tensor(progress.sums, dtype=torch.float64))
    try:
        with noticing_loss(team), arithmetic(device, precision), training_as(team.ranks):
            step.begin_epoch(_schedule(plan, 0, 1.0), 0)
            step.lay_out(_agreed(team, lambda: source.first_piece(team.own(epochs.rows(train, 0)))))
            run, how, seconds_per_step = make_runner(step)
            # A held-out cell costs about a third of a trained one: forward without backward.
            steps = (plan.n_steps - progress.step) * (1 + len(validation) / (3 * math.prod(shape)))
            announce(seconds_per_step * steps, ", ".join(filter(None, (how, source.block.note))))
            loop = _Loop(step, source, run, plan, epochs, progress, train, validation, patience, after_epoch, keep)
            loop.carry_out(show_progress)
    finally:
        source.close()
    progress.stop_reason = progress.stop_reason or "finished"
    checkpoint = make_checkpoint(module, step.optimizer, device, progress)
    if progress.best_state is not None and progress.stop_reason != "interrupted":
        load_module(module, progress.best_state)
    module.eval()
    return progress, checkpoint


@dataclass
class _Start:
    """Where an epoch begins, or goes on: a place to return to."""

    step: int
    snapshot: Snapshot
    sums: torch.Tensor
    generators: dict[str, np.ndarray]  # of several processes

    def restore(self, loop: _Loop) -> None:
        """Return there."""
        self.snapshot.restore()
        loop.step.sums.copy_(self.sums)
        loop.progress.step = self.step


@dataclass
class _Loop:
    """What is left of a plan, epoch by epoch, on these cells."""

    step: TrainingStep
    source: Resident | Streamed
    run: Callable[[int], int]
    plan: Plan
    epochs: Epochs
    progress: Progress
    train: np.ndarray
    validation: np.ndarray
    patience: int | None
    after_epoch: Callable[[Mapping[str, float], float], bool] | None
    keep: Callable[[Progress, Callable[[], dict[str, np.ndarray]]], None] | None

    def carry_out(self, show_progress: bool | None) -> None:
        """Train to the end of the plan, or until there is a reason to stop."""
        plan, progress, team = self.plan, self.progress, self.step.team
        origin = module_arrays(self.step.module)
        self._leave_out(progress.excluded)
        with (
            deferred_interrupt(TO_STOP, patient=team.n > 1) as interrupt,
            progress_bar(plan.n_steps, "fit", "step", show_progress, done=progress.step) as bar,
        ):
            while (epoch := len(progress.history)) < plan.n_epochs and not progress.stop_reason:
                self._epoch(epoch, origin, interrupt, bar)
            # Whoever of several processes was asked: the others stop for the same reason.
            stopped = progress.stop_reason == "interrupted" and progress.failure is None
            progress.ctrl_c = interrupt.requested or stopped
            progress.terminated = team.any(interrupt.terminated) if stopped else interrupt.terminated

    def _epoch(self, epoch: int, origin: Mapping[str, np.ndarray], interrupt: Interrupt, bar: tqdm) -> None:
        """What is left of an epoch, and its row of the history; if that is not finite, back to its beginning."""
        step, progress, team = self.step, self.progress, self.step.team
        begin = epoch * self.plan.steps_per_epoch
        step.begin_epoch(_schedule(self.plan, epoch, progress.lr_factor), progress.step - begin)
        generators = generator_arrays(step.block.device) if team.n > 1 else {}
        start = _Start(progress.step, Snapshot(step.module, step.optimizer), step.sums.clone(), generators)
        started = time.perf_counter()
        row = None
        try:
            with noticing_loss(team):
                self._steps(team.own(self.epochs.rows(self.train, epoch)), begin, interrupt, bar)
                if progress.step == begin + self.plan.steps_per_epoch:
                    held_out = self._evaluate(epoch)
                    asked = step.sums.new_tensor([float(interrupt.requested)])
                    # The one host sync of the epoch.
                    row = team.sum(torch.cat([step.sums, held_out, _all_finite(step.module), asked])).tolist()
        except UnreadableRowsError as error:
            progress.failure = error
        except LostProcessError as error:
            # The others were in the middle of a step, and so was this one: back to where all were alike.
            start.restore(self)
            load_generators(step.block.device, generators)
            progress.stop_reason, progress.failure = "interrupted", error
            return
        if row is None:
            self._break_off(start)
            return
        asked = row.pop() > 0
        if not np.isfinite(row).all() or row[-1] < team.n:
            self._go_back(start, epoch, origin)
            bar.n = progress.step
            return
        step.sums.zero_()
        progress.sums = step.sums.tolist()
        steps_per_second = (progress.step - start.step) / (time.perf_counter() - started)
        held_out = self.epochs.held_out(self.validation)
        progress.history.append(_history_row(row, step, self.plan, progress, held_out, steps_per_second))
        bar.set_postfix(_postfix(progress.history[-1]), refresh=False)
        self._look_back(epoch, asked)

    def _break_off(self, start: _Start) -> None:
        """Stop between two steps of an epoch, or before its held-out cells were looked at."""
        step, progress = self.step, self.progress
        step.team.sum(step.sums)
        if step.sums.isfinite().all() and _all_finite(step.module):
            progress.sums = step.sums.tolist()
        else:  # which the guard would have found when the epoch ends
            start.restore(self)
        progress.stop_reason = "interrupted"

    def _go_back(self, start: _Start, epoch: int, origin: Mapping[str, np.ndarray]) -> None:
        """Return to the beginning of the epoch, and look who is to blame."""
        progress = self.progress
        start.restore(self)
        try:
            with training_as(Ranks()):
                _agreed(self.step.team, partial(_find_remedy, self, epoch, origin))
        except UnreadableRowsError as error:  # in the middle of it
            start.restore(self)
            progress.failure, progress.stop_reason = error, "interrupted"
        self._leave_out(progress.excluded)

    def _look_back(self, epoch: int, asked: bool) -> None:
        """After an epoch: whether it is the best, whether it is enough, and whether it is to be kept."""
        step, progress = self.step, self.progress
        if self.patience is not None and len(self.validation):
            _remember_best(step.module, progress, epoch, self.patience)
        done = progress.step / self.plan.n_steps
        if self.after_epoch is not None and self.after_epoch(progress.history[-1], done):
            progress.stop_reason = progress.stop_reason or "pruned"
        if asked and done < 1 and not progress.stop_reason:
            progress.stop_reason = "interrupted"
        if self.keep is not None:
            device = step.block.device
            self.keep(progress, lambda: make_checkpoint(step.module, step.optimizer, device, progress))

    def _leave_out(self, cells: Sequence[int]) -> None:
        self.train, self.validation = (np.setdiff1d(of, cells) for of in (self.train, self.validation))

    def _steps(self, rows: np.ndarray, begin: int, interrupt: Interrupt, bar: tqdm) -> None:
        """The steps of an epoch that are left, until somebody asks to stop; ``begin``: the first of all."""
        step, progress, team = self.step, self.progress, self.step.team
        pieces = self.source.pieces(rows, progress.step - begin)
        try:
            while (piece := _agreed(team, lambda: next(pieces, None))) is not None:
                start, stop, positions = piece
                step.lay_out(positions, start)
                while progress.step < begin + stop:
                    if team.n == 1 and interrupt.requested:
                        return
                    if team.n > 1 and progress.step % _ASK_EVERY == 0 and team.any(interrupt.requested):
                        return
                    done = self.run(begin + stop - progress.step)
                    progress.step += done
                    bar.update(done)
        finally:
            pieces.close()

    @torch.no_grad()
    def _evaluate(self, epoch: int) -> torch.Tensor:
        """The same sums for held-out cells, in evaluation mode, with draws of their own: training does not notice."""
        step, team = self.step, self.step.team
        module, device, total = step.module, step.block.device, torch.zeros_like(step.sums)
        streams = self.epochs.held_out(self.validation)
        if not any(map(len, streams)):
            return total
        n_passes = -(-max(map(len, streams)) // _VALIDATION_CELLS[device.type])
        passes = list(zip(*(np.array_split(cells, n_passes) for cells in streams), strict=True))
        mine = team.share(range(n_passes))

        def add_up() -> None:
            minibatches = self.source.minibatches([passes[i] for i in mine], keep=True)
            for i, cells in zip(mine, minibatches, strict=True):
                torch.manual_seed(hash((self.epochs.seed, epoch, i)) % 2**63)
                total.add_(sums_of_parts(module.loss(*cells), step.parts))

        module.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), training_as(Ranks()):
            _agreed(team, add_up)
        module.train()
        return total


def _agreed(team: Team, read: Callable[[], Any]) -> Any:
    """What ``read`` returns; an UnreadableRowsError in all processes if it raises one in any."""
    failure = found = None
    try:
        found = read()
    except UnreadableRowsError as error:
        failure = error
    if team.any(failure is not None):
        raise failure or UnreadableRowsError("Another process of this run could not read its cells: see its message.")
    return found


def _schedule(plan: Plan, epoch: int, lr_factor: float) -> np.ndarray:
    """Learning rate and KL weight of the steps of an epoch, shape (steps, 2)."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return np.array([(plan.lr_at(i) * lr_factor, plan.kl_weight_at(i)) for i in steps], dtype=np.float32)


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


def _find_remedy(loop: _Loop, epoch: int, origin: Mapping[str, np.ndarray]) -> None:
    """In the state before the epoch: leave out cells that cannot be modelled, or else halve the rate."""
    step, epochs, progress = loop.step, loop.epochs, loop.progress
    rows = np.concatenate([loop.train, loop.validation])
    event = find_culprits(step, loop.source, epochs.cells(rows), epoch, origin)
    store = epochs.store
    progress.events.append(event)
    progress.excluded = sorted({*progress.excluded, *event.cells})
    if len(rows) - len(event.cells) < 3:
        msg = "The loss is not finite for (almost) any cell, so nothing can be trained. Look at the counts."
        raise FloatingPointError(msg)
    left = epochs.cells(np.setdiff1d(loop.train, event.cells))
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
