"""Where a run stands, and the checkpoint from which it goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scvi_ext.engine.checkpoint import (
    generator_arrays,
    load_generators,
    load_module,
    load_optimizer,
    module_arrays,
    optimizer_arrays,
)
from scvi_ext.engine.guard import NonFiniteEvent

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from scvi_ext.engine.processes import LostProcessError


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
    terminated: bool = False  # whether the system did (SIGTERM)
    failure: OSError | LostProcessError | None = None  # what interrupted the run, if nobody did


def make_checkpoint(
    module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, progress: Progress
) -> dict[str, np.ndarray]:
    """Everything needed to go on exactly, as named arrays."""
    plain = asdict(replace(progress, failure=None))
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
    plain = _plain(checkpoint)
    # What held-out cells have said they would say again, after one epoch too many; all else may be tried again.
    ended = plain["stop_reason"] if plain["stop_reason"] == "early stopping" else ""
    plain["events"] = [
        NonFiniteEvent(**{k: tuple(v) if k != "epoch" else v for k, v in e.items()}) for e in plain["events"]
    ]
    return Progress(
        **plain | {"best_state": arrays("best.") or None, "stop_reason": ended, "ctrl_c": False, "terminated": False}
    )


def step_of(checkpoint: Mapping[str, np.ndarray]) -> int:
    """After how many steps it was made."""
    return _plain(checkpoint)["step"]


def _plain(checkpoint: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return json.loads(str(checkpoint["progress"][0]))
