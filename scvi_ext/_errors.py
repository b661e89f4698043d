"""The shapes of our error messages: what was found, what was expected, what to do."""

from __future__ import annotations

import math
import reprlib
import sys
import warnings
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def first_line(error: Exception) -> str:
    """What an error of a library says, without the pages that may follow."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class ScviExtWarning(UserWarning):
    """Category of every warning of this package, so that it can be silenced or raised alone."""


def warn(message: str) -> None:
    """Warn in the name of the line outside this package that called it, however deep inside the reason was found."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "scvi_ext":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ScviExtWarning, stacklevel=level)


def listing(values: Iterable, limit: int = 10) -> str:
    """``'a', 'b', 'c' and 7 more``."""
    values = [repr(str(v)) for v in values]
    if not values:
        return "none"
    more = len(values) - limit
    return ", ".join(values[:limit]) + (f" and {more} more" if more > 0 else "")


def _hint(value: object, choices: list[str]) -> str:
    by_lower = {choice.lower(): choice for choice in choices}
    close = get_close_matches(str(value).lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    choices = sorted(choices)
    if value not in choices:
        msg = f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.{_hint(value, choices)}"
        raise ValueError(msg)


def missing_key(slot: str, key: str, available: Iterable, role: str = "") -> KeyError:
    """A KeyError for a slot entry that does not exist, with those that do; ``role``: what it is, if that is known."""
    available = [str(a) for a in available]
    named = f"{key!r}, {role}," if role else repr(key)
    return KeyError(f"{named} is not in {slot}, which has: {listing(available)}.{_hint(key, available)}")


def no_cells() -> ValueError:
    """A ValueError for a question about no cells at all."""
    return ValueError("There are no cells to compute anything for: adata, or what indices choose of it, is empty.")


def unknown_keyword(function: str, name: str, valid: Iterable[str], renamed: str | None = None) -> TypeError:
    """A TypeError for a keyword that does not exist, with the right one or all valid ones."""
    valid = sorted(valid)
    if renamed:
        return TypeError(f"{function} has no keyword {name!r}: it is called {renamed} here.")
    return TypeError(f"{function} has no keyword {name!r}.{_hint(name, valid)} Valid ones: {', '.join(valid)}.")


def needs_capability(method: str, model: str, able: Iterable[str]) -> ValueError:
    """A ValueError for a read-out that the fitted model does not have; ``method`` of the module would do it."""
    return ValueError(
        f"This is not possible with a {model!r} fit, which has no {str(method)!r}; models that have it: "
        f"{listing(sorted(able))}. Name another fit: key=..."
    )


def _in_short(value: object) -> str:
    """Its representation on one line, without the middle of a long one (an array)."""
    return " ".join(reprlib.repr(value).split())


def whole_number(name: str, value: object, least: int) -> int:
    """``value`` as an int, if it is a whole number that is large enough; else a TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{name}={_in_short(value)} is a {type(value).__name__}; a whole number is needed."
        raise TypeError(msg)
    if value < least:
        msg = f"{name}={value!r} must be {least} or more."
        raise ValueError(msg)
    return int(value)


def number(name: str, value: object) -> float:
    """``value``, if it is a number; else a TypeError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        msg = f"{name}={_in_short(value)} is a {type(value).__name__}; a number is needed."
        raise TypeError(msg)
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if value > 0 else -math.inf
