"""How steps are run: one by one, or on CUDA as a graph that is captured once and replayed without the host."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from scvi_ext._errors import first_line
from scvi_ext.engine.checkpoint import Snapshot, generator_arrays, load_generators

if TYPE_CHECKING:
    from collections.abc import Callable

    from scvi_ext.engine.step import TrainingStep

    Runner = Callable[[int], int]

_REHEARSALS = 3  # steps before a capture or a measurement: libraries set themselves up, Adam makes its state
_UNROLLED = 8  # steps in one graph: a launch costs the host some 10 us, about a tenth of a step


def make_runner(step: TrainingStep) -> tuple[Runner, str, float]:
    """How to run the steps, a sentence about it, and about how many seconds one takes.

    A runner is called with the number of steps that are left, does at least one of them, and returns how many it did.
    ``step`` must be at the beginning of an epoch; its state and the random generators are left as they were.
    """
    generators = generator_arrays(step.block.device)
    try:
        if step.block.device.type != "cuda":
            return _one_by_one(step), "", _seconds(_rehearsal(step))
        snapshot, sums, cursor = Snapshot(step.module, step.optimizer), step.sums.clone(), step.cursor.clone()
        try:
            return _captured(step)
        except RuntimeError as error:  # torch names the operation that cannot be captured
            reason = f"step by step, because a step cannot be captured: {first_line(error)}"
            return _one_by_one(step), reason, _seconds(_rehearsal(step))
        finally:
            torch.cuda.synchronize(step.block.device)
            step.optimizer.zero_grad(set_to_none=True)
            snapshot.restore()
            step.sums.copy_(sums)
            step.cursor.copy_(cursor)
    finally:
        load_generators(step.block.device, generators)


def _one_by_one(step: TrainingStep) -> Runner:
    def run(left: int) -> int:
        step()
        return 1

    return run


def _captured(step: TrainingStep) -> tuple[Runner, str, float]:
    """Capture one step, and several in a row; both share their memory, since they never run at the same time."""
    device = step.block.device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_REHEARSALS):
            step.cursor.zero_()
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    step.optimizer.zero_grad(set_to_none=True)  # gradients then belong to the memory of the graphs

    one, several = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(several):
        for _ in range(_UNROLLED):
            step()
    with torch.cuda.graph(one, pool=several.pool()):
        step()

    def run(left: int) -> int:
        if left >= _UNROLLED:
            several.replay()
            return _UNROLLED
        one.replay()
        return 1

    def replay() -> None:
        step.cursor.zero_()
        one.replay()
        torch.cuda.synchronize(device)

    return run, f"{_UNROLLED} steps per CUDA graph", _seconds(replay)


def _rehearsal(step: TrainingStep) -> Callable[[], None]:
    """Forward and backward of one minibatch on a copy of the module."""
    loss = step.loss_of(copy.deepcopy(step.module))

    def rehearse() -> None:
        total = loss(*step.minibatches(step.rows[:, 0])).total
        if total is not None:
            total.backward()
        if step.block.device.type == "cuda":
            torch.cuda.synchronize(step.block.device)

    return rehearse


def _seconds(run: Callable[[], None]) -> float:
    """The fastest of a few calls."""
    seconds = []
    for _ in range(_REHEARSALS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return float(np.min(seconds))
