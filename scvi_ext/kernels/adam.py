"""Adam on the processor (numba): one pass over the memory of all parameters."""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import carray, prange, types
from numba.extending import intrinsic

from scvi_ext.kernels.compiler import arrays, in_parallel, kernel, parallel, widest_vectors

if TYPE_CHECKING:
    from torch import Tensor

f4 = np.float32
_STATE = ("exp_avg", "exp_avg_sq", "step")


class Adam(torch.optim.Adam):
    """``torch.optim.Adam`` for float32 parameters in host memory, with the same state: Kingma & Ba (2015), algorithm 1.

    The fused one of torch goes from tensor to tensor, and takes twice as long for the parameters of a small network.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        group = self.param_groups[0]
        moved = [p for p in group["params"] if p.grad is not None]
        places = self._places(moved, [self.state[p] for p in moved])
        gradients = [_laid_out_like(p.grad, stride) for p, stride in zip(moved, places.strides, strict=True)]
        places.addresses[1] = [gradient.data_ptr() for gradient in gradients]
        in_parallel(
            _step_in_parts,
            places.addresses,
            places.sizes,
            *arrays(torch.as_tensor(group["lr"]).reshape(1)),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
        )

    # Torch would wrap it for its profiler and for hooks, which nobody has here.
    step.hooked = True

    def _places(self, moved: list[Tensor], states: list[dict[str, Tensor]]) -> _Places:
        """Where everything lies, which is looked up again only when it is elsewhere."""
        known = self.__dict__.get("_known")
        if known is None or not known.hold(moved, states):
            for p, state in zip(moved, states, strict=True):
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            known = self.__dict__["_known"] = _Places(moved, states)
        return known


class _Places:
    """Addresses (5, parameters) of parameters, gradients (to be filled in), both moments and numbers of steps.

    It keeps what lies there, so that no other tensor can.
    """

    def __init__(self, moved: list[Tensor], states: list[dict[str, Tensor]]):
        self.moved, self.states = moved, states
        self.tensors = [moved, moved, *([state[name] for state in states] for name in _STATE)]
        self.addresses = np.array([[t.data_ptr() for t in column] for column in self.tensors])
        self.sizes = np.array([p.numel() for p in moved])
        self.strides = [p.stride() for p in moved]

    def hold(self, moved: list[Tensor], states: list[dict[str, Tensor]]) -> bool:
        """Whether these are the same parameters and states."""
        return len(moved) == len(self.moved) and all(map(is_, moved, self.moved)) and all(map(is_, states, self.states))


def _laid_out_like(gradient: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The gradient with its entries in the order in which those of a parameter of this stride lie in memory."""
    if gradient.stride() == stride:
        return gradient
    return torch.empty_strided(gradient.shape, stride).copy_(gradient)


# ---- kernels ------------------------------------------------------------------------------------------------------


@intrinsic
def _at(typing_context, address):
    """The float32 numbers from an address on."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@kernel
def _move(p, g, m, v, rate, unbiased, b1, b2, eps, decay):
    widest_vectors()
    one = f4(1)
    for i in range(p.size):
        gradient = g[i] + decay * p[i]
        mean = m[i] + (one - b1) * (gradient - m[i])
        square = b2 * v[i] + (one - b2) * gradient * gradient
        m[i], v[i] = mean, square
        p[i] -= rate * mean / (np.sqrt(square) * unbiased + eps)


@kernel
def _step(begin, end, addresses, sizes, scales, beta1, beta2, eps, weight_decay):
    """Entries from ``begin`` to ``end`` of all parameters laid end to end."""
    before = 0
    for k in range(sizes.size):
        n = sizes[k]
        first, last = max(begin - before, 0), min(end - before, n)
        if first < last:
            p, g = carray(_at(addresses[0, k]), n)[first:last], carray(_at(addresses[1, k]), n)[first:last]
            m, v = carray(_at(addresses[2, k]), n)[first:last], carray(_at(addresses[3, k]), n)[first:last]
            _move(p, g, m, v, scales[0, k], scales[1, k], f4(beta1), f4(beta2), f4(eps), f4(weight_decay))
        before += n


@parallel
def _step_in_parts(parts, addresses, sizes, lr, beta1, beta2, eps, weight_decay):
    scales = np.empty((2, sizes.size), np.float32)
    for k in range(sizes.size):
        step = carray(_at(addresses[4, k]), 1)
        step[0] += f4(1)
        scales[0, k] = lr[0] / (1 - beta1 ** step[0])
        scales[1, k] = 1 / np.sqrt(1 - beta2 ** step[0])
    total = sizes.sum()
    for part in prange(parts):
        begin, end = part * total // parts, (part + 1) * total // parts
        _step(begin, end, addresses, sizes, scales, beta1, beta2, eps, weight_decay)
