"""How far long work has come."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from scvi_ext._torchrun import rank

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(
    total: int | None, name: str, unit: str, show: bool | None, *, done: int = 0, **options: object
) -> tqdm:
    """A bar; ``show=None`` shows it in terminals and notebooks, and of several processes in the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm.auto warns where a notebook lacks widgets, and falls back to text
        from tqdm.auto import tqdm
    hidden = None if rank() == 0 else True
    return tqdm(
        total=total, initial=done, desc=name, unit=unit, disable=hidden if show is None else not show, **options
    )
