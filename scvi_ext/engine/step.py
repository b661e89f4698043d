"""One training step as work for a device: all that it reads and writes stays in place, so that it can be captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_ext._contract import CLASSIFICATION, ELBO, KL_GLOBAL
from scvi_ext.engine.device import autocast
from scvi_ext.engine.processes import ALONE
from scvi_ext.kernels.adam import Adam

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from torch import nn

    from scvi_ext._contract import Loss, Minibatch, Stream
    from scvi_ext.data.blocks import Block
    from scvi_ext.data.joint import JointBlock
    from scvi_ext.engine.plan import Plan
    from scvi_ext.engine.processes import Team

# Epsilon of Adam in every release of scVI; with the usual 1e-8 the held-out ELBO of the one-cycle plan is worse.
_ADAM_EPS = 0.01

_FIELDS = dict(
    zip(
        (*ELBO, KL_GLOBAL, CLASSIFICATION),
        ("reconstruction", "kl_z", "kl_library", "kl_global", "classification"),
        strict=True,
    )
)


class TrainingStep:
    """Gather, forward, backward, Adam, sums: call it once per step.

    Rows, learning rate and KL weight of an epoch lie in tensors of fixed size, and a cursor on the device tells which
    are next; nothing of a step depends on the host.

    Parameters
    ----------
    module, block, plan
        What to train, on which cells, how.
    precision
        ``"float32"`` or ``"bf16"``.
    streams
        The minibatches that the loss takes.
    team
        The processes that share each minibatch.
    """

    def __init__(
        self,
        module: nn.Module,
        block: Block | JointBlock,
        plan: Plan,
        precision: str,
        streams: Sequence[Stream],
        team: Team = ALONE,
    ):
        device = block.device
        self.module, self.block, self.precision, self.team = module, block, precision, team
        self.streams, self.parts = streams, parts_of(streams)
        self.sources = [block.of(stream) for stream in streams]
        shape = (len(streams), plan.steps_per_epoch, plan.batch_size // team.n)
        self.rows = torch.zeros(shape, dtype=torch.int64, device=device)
        self.schedule = torch.zeros((plan.steps_per_epoch, 2), device=device)  # learning rate, KL weight
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.lr = torch.tensor(plan.lr, device=device)
        self.sums = torch.zeros(len(self.parts), dtype=torch.float64, device=device)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        on_host = device.type == "cpu" and all(p.dtype == torch.float32 for p in self.parameters)
        adam = Adam if on_host else torch.optim.Adam
        self.optimizer = adam(
            self.parameters,
            lr=self.lr,
            betas=(0.9, plan.beta2),
            eps=_ADAM_EPS,
            weight_decay=plan.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.loss = self.loss_of(module)

    def loss_of(self, module: nn.Module) -> Callable[..., Loss]:
        """The loss of a module; on the processor the one that has made all gradients when it returns, if there is one.

        Such a loss has no total.
        """
        make = getattr(module, "loss_at_once", None)
        if make is None or self.block.device.type != "cpu" or self.team.n > 1:
            return module.loss
        return make(self.rows.shape[-1]) or module.loss

    def begin_epoch(self, schedule: np.ndarray, first: int) -> None:
        """Lay out an epoch: learning rate and KL weight (steps, 2), and which step is the next."""
        self.schedule.copy_(torch.from_numpy(schedule))
        self.cursor.fill_(first)

    def lay_out(self, rows: np.ndarray, start: int = 0) -> None:
        """Positions in the block (streams, steps, B) that the steps from ``start`` on take."""
        self.rows[:, start : start + rows.shape[1]].copy_(torch.from_numpy(rows))

    def __call__(self) -> None:
        """Do the next step of the epoch."""
        rows = self.rows.index_select(1, self.cursor).squeeze(1)
        lr, kl_weight = self.schedule.index_select(0, self.cursor).squeeze(0)
        self.lr.copy_(lr)
        for loss in self._losses(self.minibatches(rows), kl_weight):
            total = getattr(loss, "total", loss)
            if total is not None:
                for parameter in self.parameters:
                    parameter.grad = None
                total.backward()
            if self.team.n > 1:
                self.team.average([p.grad for p in self.parameters if p.grad is not None])
            self.optimizer.step()
        self.sums += sums_of_parts(loss, self.parts)
        self.cursor += 1

    def _losses(self, minibatches: Sequence[Minibatch], kl_weight: torch.Tensor) -> Iterator[torch.Tensor | Loss]:
        """What the optimiser takes a step for: the loss of the module, or all that it has in turn, the loss last."""
        in_turn = getattr(self.module, "losses", None)
        if in_turn is None:
            losses = (self.loss(*minibatches, kl_weight=kl_weight) for _ in range(1))
        else:
            losses = in_turn(*minibatches, kl_weight=kl_weight)
        while True:
            with autocast(self.block.device, self.precision):
                loss = next(losses, None)
            if loss is None:
                return
            yield loss

    def minibatches(self, rows: torch.Tensor) -> list[Minibatch]:
        """One for each stream; ``rows`` are positions, (streams, B)."""
        return [source.minibatch(of_stream) for source, of_stream in zip(self.sources, rows, strict=True)]


def parts_of(streams: Sequence[Stream]) -> tuple[str, ...]:
    """Names of the parts of the loss, each once."""
    return tuple(dict.fromkeys(part for stream in streams for part in stream.parts))


def per_cell(loss: Loss) -> torch.Tensor:
    """The loss of each cell: its negative ELBO, or where there is none what its label costs, shape (B,)."""
    return loss.classification if loss.reconstruction is None else -loss.elbo


def sums_of_parts(loss: Loss, parts: Sequence[str]) -> torch.Tensor:
    """Sums over cells of these parts of the loss, 0 where it has none, float64, on the device."""
    values = [getattr(loss, _FIELDS[part]) for part in parts]
    with torch.no_grad():
        if all(of_cells is not None and len(of_cells) == len(values[0]) for of_cells in values):
            return torch.stack(values).sum(1, dtype=torch.float64)
        zero = loss.total.new_zeros((), dtype=torch.float64)
        return torch.stack([zero if of_cells is None else of_cells.sum(dtype=torch.float64) for of_cells in values])
