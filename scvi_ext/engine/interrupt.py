"""Ctrl-C between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Interrupt:
    """Whether somebody asked to stop, and whether it was the system (SIGTERM) rather than the user (Ctrl-C)."""

    requested: bool = False
    terminated: bool = False


@contextmanager
def deferred_interrupt(
    signals: tuple[signal.Signals, ...] = (signal.SIGINT,), *, patient: bool = False
) -> Iterator[Interrupt]:
    """Inside, a first one of these signals only sets ``requested``; a second one of a kind interrupts as usual.

    ``patient``: nor does a second one, in processes that ``torchrun`` has started: it passes on what they got already.
    Python delivers signals to the main thread only; in any other one this does nothing.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in signals}

    def handler(signum: int, frame: object) -> None:
        interrupt.requested = True
        interrupt.terminated |= signum == signal.SIGTERM
        if not patient:
            signal.signal(signum, before[signum])

    for signum in signals:
        signal.signal(signum, handler)
    try:
        yield interrupt
    finally:
        for signum in signals:
            signal.signal(signum, before[signum])
