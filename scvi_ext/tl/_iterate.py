"""What the read-outs share that can be iterated over."""

from __future__ import annotations


def check_iterate(iterate: bool, *, copy: bool, key_added: str | None) -> None:
    """Raise a ValueError where nothing is written, and a slot or a copy was asked for."""
    if iterate and (copy or key_added is not None):
        msg = "iterate=True returns an iterator and writes nothing: leave out copy and key_added."
        raise ValueError(msg)
