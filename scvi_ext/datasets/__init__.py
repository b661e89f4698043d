"""Data to try models on: real counts that work offline, and synthetic counts whose truth is known."""

from __future__ import annotations

from ._pbmc68k_counts import pbmc68k_counts
from ._synthetic import synthetic_cite, synthetic_corr, synthetic_iid, synthetic_random, synthetic_zi_corr

__all__ = [
    "pbmc68k_counts",
    "synthetic_cite",
    "synthetic_corr",
    "synthetic_iid",
    "synthetic_random",
    "synthetic_zi_corr",
]
