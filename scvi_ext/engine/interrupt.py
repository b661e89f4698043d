"""Ctrl-C between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

TO_STOP = (signal.SIGINT, signal.SIGTERM)  # what users send, and what systems do


@dataclass
class Interrupt:
    """Whether somebody asked to stop, and whether it was the system (SIGTERM) rather than the user (Ctrl-C)."""

    requested: bool = False
    terminated: bool = False
    patient: bool = False  # whether nothing but this object hears of a signal, however often it comes
    before: dict[signal.Signals, Any] = field(default_factory=dict, repr=False)  # handlers that come back

    def __call__(self, signum: int, frame: object) -> None:
        """Handle a signal."""
        self.requested = True
        self.terminated |= signum == signal.SIGTERM
        if not self.patient:
            signal.signal(signum, self.before[signum])


@contextmanager
def deferred_interrupt(
    signals: tuple[signal.Signals, ...] = (signal.SIGINT,), *, patient: bool = False
) -> Iterator[Interrupt]:
    """Inside, a first one of these signals only sets ``requested``; a second one of a kind interrupts as usual.

    ``patient``: nor does a second one, in processes that ``torchrun`` has started: it passes on what they got already,
    and ends those that are left when one is lost. Where such a one is nested in another, there is one object for both.
    Python delivers signals to the main thread only; in any other one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Interrupt()
        return
    interrupt = Interrupt(patient=patient)
    interrupt.before |= {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in signals}
    for outer in interrupt.before.values():
        if patient and isinstance(outer, Interrupt) and outer.patient:
            yield outer
            return
    for signum in signals:
        signal.signal(signum, interrupt)
    try:
        yield interrupt
    finally:
        for signum in signals:
            signal.signal(signum, interrupt.before[signum])
