"""The training plan: learning rate and KL weight as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scvi_ext._errors import number, one_of, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

PLANS = ("auto", "scvi-tools")

_RISE = 0.15  # share of the steps in which the one-cycle learning rate rises
_START, _END = 0.04, 0.001  # first and last learning rate of the cycle, relative to its peak
_BATCH_SIZE = 128


@dataclass(frozen=True)
class Plan:
    """How a module is trained. Everything that changes during training is a function of the step here."""

    name: str
    n_epochs: int
    steps_per_epoch: int
    batch_size: int
    lr: float  # constant, or peak of the cycle
    one_cycle: bool
    kl_warmup_steps: int
    kl_by_epoch: bool  # whether the KL weight rises once per epoch or with every step
    weight_decay: float
    patience: int  # epochs without improvement before early stopping
    beta2: float = 0.999  # of Adam: how slowly it forgets squared gradients

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.n_epochs * self.steps_per_epoch

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0): linear rise to the peak, then a cosine down (Smith 2018)."""
        if not self.one_cycle:
            return self.lr
        t = step / self.n_steps
        if t < _RISE:
            return self.lr * (_START + (1 - _START) * t / _RISE)
        cosine = 0.5 * (1 + math.cos(math.pi * (t - _RISE) / (1 - _RISE)))
        return self.lr * (_END + (1 - _END) * cosine)

    def kl_weight_at(self, step: int) -> float:
        """Weight of KL(q(z) || p(z)): a line from 0 to 1 over the warm-up, then 1."""
        if self.kl_by_epoch:
            step -= step % self.steps_per_epoch
        return 1.0 if step >= self.kl_warmup_steps else step / self.kl_warmup_steps

    @property
    def final_kl_weight(self) -> float:
        """KL weight of the last step."""
        return self.kl_weight_at(self.n_steps - 1)


def make_plan(
    name: str,
    *,
    n_cells: int,
    n_train: int,
    batch_size: int | None,
    max_epochs: int | None,
    lr: float | None,
    kl_warmup: float | None,
    weight_decay: float | None,
    peak_lr: float,
    effort: float,
    most_epochs: int = 40,
) -> Plan:
    """The plan for so many cells.

    Parameters
    ----------
    name
        ``"auto"``: a one-cycle learning rate over few epochs, KL warm-up over a share of the steps. ``"scvi-tools"``:
        the reference's schedule (constant 1e-3, min(400, 400 * 20000 / cells) epochs, KL warm-up over 400 epochs).
    n_cells, n_train
        All cells, and those trained on.
    batch_size, max_epochs, lr, kl_warmup, weight_decay
        Override the plan; ``kl_warmup`` is a share of the planned steps.
    peak_lr, effort, most_epochs
        Of the model, see :class:`~scvi_ext._contract.ModelSpec`.
    """
    one_of("plan", name, PLANS)
    if batch_size is not None and whole_number("batch_size", batch_size, 1) < 3:
        msg = f"batch_size={batch_size!r} must be 3 or more: batch normalisation needs a few cells."
        raise ValueError(msg)
    if max_epochs is not None:
        whole_number("max_epochs", max_epochs, 1)
    _check("lr", lr, lambda value: 0 < value < math.inf, "positive and finite")
    _check("kl_warmup", kl_warmup, lambda value: 0 <= value <= 1, "a share of the steps, from 0 to 1")
    _check("weight_decay", weight_decay, lambda value: 0 <= value < math.inf, "0 or more, and finite")
    passes = auto_epochs(n_train, batch_size or _BATCH_SIZE, effort, most_epochs)
    if batch_size is None and name == "auto":
        batch_size = auto_batch_size(n_train)
        # As many passes in fewer steps: each goes further, by the square root, as the noise of its gradient falls.
        peak_lr *= math.sqrt(batch_size / _BATCH_SIZE)
    batch_size = min(batch_size or _BATCH_SIZE, n_train)
    steps_per_epoch = math.ceil(n_train / batch_size)
    by_epoch = name == "scvi-tools" and kl_warmup is None
    if name == "auto":
        n_epochs = max_epochs or passes
        warmup = math.ceil((0.5 if kl_warmup is None else kl_warmup) * n_epochs * steps_per_epoch)
        default_lr, patience = peak_lr, max(5, n_epochs // 4)
    else:
        n_epochs = max_epochs or min(400, max(1, round(400 * 20_000 / n_cells)))
        warmup = 400 * steps_per_epoch if kl_warmup is None else math.ceil(kl_warmup * n_epochs * steps_per_epoch)
        default_lr, patience = 1e-3, 45
    return Plan(
        name=name,
        n_epochs=n_epochs,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        lr=float(lr or default_lr),
        one_cycle=name == "auto",
        # A warm-up of all steps would leave the last one just below 1.
        kl_warmup_steps=warmup if by_epoch else min(warmup, n_epochs * steps_per_epoch - 1),
        kl_by_epoch=by_epoch,
        weight_decay=1e-6 if weight_decay is None else float(weight_decay),
        patience=patience,
        # The usual 0.999 remembers 1,000 steps, as many as a short run has: the large gradients of its beginning would
        # hold it back to the end.
        beta2=0.97 if name == "auto" else 0.999,
    )


def auto_batch_size(n_train: int) -> int:
    """Cells per step: 128, and 256 where an epoch has steps enough. The larger minibatch takes a quarter less time."""
    return _BATCH_SIZE if n_train < 15_000 else 2 * _BATCH_SIZE


def auto_epochs(n_train: int, batch_size: int, effort: float, most_epochs: int = 40) -> int:
    """Epochs of the one-cycle plan: ``effort`` times the square root of the cells in steps, 4 to ``most_epochs``.

    Chosen on data sets from 700 to 20,000 cells: more steps fit the training cells better, and the held-out ones or the
    cell types worse; small data is learned by heart after some 40 passes. See the page on training.
    """
    steps_per_epoch = math.ceil(n_train / batch_size)
    return min(most_epochs, max(4, math.ceil(effort * math.sqrt(n_train) / steps_per_epoch)))


def _check(name: str, value: float | None, good: Callable[[float], bool], expected: str) -> None:
    if value is not None and not good(number(name, value)):
        msg = f"{name}={value!r} must be {expected}."
        raise ValueError(msg)
