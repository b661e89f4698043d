"""One training step as work for a device: all that it reads and writes stays in place, so that it can be captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_ext.engine.device import autocast
from scvi_ext.kernels.adam import Adam

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from scvi_ext._contract import Loss
    from scvi_ext.data.blocks import Block
    from scvi_ext.engine.plan import Plan

# Epsilon of Adam in every release of scVI; with the usual 1e-8 the held-out ELBO of the one-cycle plan is worse.
_ADAM_EPS = 0.01
PARTS = ("reconstruction_loss", "kl_z", "kl_library")


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
    """

    def __init__(self, module: nn.Module, block: Block, plan: Plan, precision: str):
        device = block.device
        self.module, self.block, self.precision = module, block, precision
        self.rows = torch.zeros((plan.steps_per_epoch, plan.batch_size), dtype=torch.int64, device=device)
        self.schedule = torch.zeros((plan.steps_per_epoch, 2), device=device)  # learning rate, KL weight
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.lr = torch.tensor(plan.lr, device=device)
        self.sums = torch.zeros(len(PARTS), dtype=torch.float64, device=device)
        self.parameters = list(module.parameters())
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

    def begin_epoch(self, rows: np.ndarray, schedule: np.ndarray, first: int) -> None:
        """Lay out an epoch: positions (steps, B), learning rate and KL weight (steps, 2); ``first`` step to do."""
        self.rows.copy_(torch.from_numpy(rows))
        self.schedule.copy_(torch.from_numpy(schedule))
        self.cursor.fill_(first)

    def __call__(self) -> None:
        """Do the next step of the epoch."""
        rows = self.rows.index_select(0, self.cursor).squeeze(0)
        lr, kl_weight = self.schedule.index_select(0, self.cursor).squeeze(0)
        self.lr.copy_(lr)
        with autocast(self.block.device, self.precision):
            loss = self.module.loss(self.block.minibatch(rows), kl_weight=kl_weight)
        for parameter in self.parameters:
            parameter.grad = None
        loss.total.backward()
        self.optimizer.step()
        self.sums += sums_of_parts(loss)
        self.cursor += 1


def sums_of_parts(loss: Loss) -> torch.Tensor:
    """Sums over cells of the parts of the negative ELBO, shape (3,), float64, on the device."""
    parts = torch.stack([loss.reconstruction.detach(), loss.kl_z.detach(), loss.kl_library.detach()])  # (3, B)
    return parts.sum(1, dtype=torch.float64)
