"""What ``torchrun`` tells the processes that it starts, by environment variables."""

from __future__ import annotations

import os


def n_processes() -> int:
    """How many it has started, on all machines; 1 where it has not started this one."""
    return _number("WORLD_SIZE", 1) if os.environ.get("RANK") else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0)


def local_rank() -> int | None:
    """Which of those of its machine this is, from 0; None where nobody has said it."""
    return _number("LOCAL_RANK", None)


def n_on_this_machine() -> int:
    """How many of them share this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, otherwise: int | None) -> int | None:
    text = os.environ.get(name)
    if not text:
        return otherwise
    if not text.isdecimal():
        msg = f"The environment variable {name} is {text!r}, which is no number of processes: start them by torchrun."
        raise ValueError(msg)
    return int(text)
