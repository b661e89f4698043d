"""The state of a run as named arrays: what is needed to go on exactly, and to step back."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


def module_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """Parameters and buffers of a module, copied to the host."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()}


def load_module(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into the module's own tensors."""
    module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})


class Snapshot:
    """A copy of module and optimiser on their device, to return to."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.optimizer = module, optimizer
        self.tensors = [t.clone() for t in self._live()]

    def _live(self) -> list[torch.Tensor]:
        states = [s for p in self.optimizer.param_groups[0]["params"] for s in self.optimizer.state[p].values()]
        return [*self.module.state_dict().values(), *states]

    @torch.no_grad()
    def restore(self) -> None:
        """Copy everything back, into the same memory; optimiser state that did not exist yet starts from zero."""
        for tensor, saved in zip_longest(self._live(), self.tensors):
            if saved is None:
                tensor.zero_()
            else:
                tensor.copy_(saved)


def optimizer_arrays(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """State of the optimiser under ``optimizer.<parameter>.<name>``."""
    return {
        f"optimizer.{name}.{entry}": value.detach().cpu().numpy().copy()
        for name, parameter in module.named_parameters()
        for entry, value in optimizer.state[parameter].items()
    }


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, arrays: Mapping[str, np.ndarray]) -> None:
    """The inverse of :func:`optimizer_arrays`."""
    for name, parameter in module.named_parameters():
        prefix = f"optimizer.{name}."
        entries = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        optimizer.state[parameter] = {entry: _like(parameter, array) for entry, array in entries.items()}


def _like(parameter: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    """``array`` on the device, in the precision and, if it has its shape, in the memory layout of a parameter.

    Single numbers come back from files in double precision, and everything row by row; fused Adam goes through memory.
    """
    values = torch.from_numpy(np.array(array)).to(parameter.device, parameter.dtype)
    return torch.empty_like(parameter.detach()).copy_(values) if values.shape == parameter.shape else values


def generator_arrays(device: torch.device) -> dict[str, np.ndarray]:
    """State of torch's generators on the host and on ``device``."""
    arrays = {"generator.cpu": torch.get_rng_state().numpy().copy()}
    if device.type == "cuda":
        arrays["generator.cuda"] = torch.cuda.get_rng_state(device).numpy().copy()
    return arrays


def load_generators(device: torch.device, arrays: Mapping[str, np.ndarray]) -> None:
    """The inverse of :func:`generator_arrays`."""
    torch.set_rng_state(torch.from_numpy(np.array(arrays["generator.cpu"])))
    if device.type == "cuda" and "generator.cuda" in arrays:
        torch.cuda.set_rng_state(torch.from_numpy(np.array(arrays["generator.cuda"])), device)
