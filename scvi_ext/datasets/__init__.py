"""Data to try models on: real counts, bundled or downloaded, and synthetic counts whose truth is known."""

from __future__ import annotations

from ._pbmc68k_counts import pbmc68k_counts
from ._pbmc_cite_seq import pbmc_cite_seq
from ._synthetic import (
    synthetic_cite,
    synthetic_corr,
    synthetic_iid,
    synthetic_random,
    synthetic_zero_inflated,
    synthetic_zi_corr,
)

__all__ = [
    "pbmc68k_counts",
    "pbmc_cite_seq",
    "synthetic_cite",
    "synthetic_corr",
    "synthetic_iid",
    "synthetic_random",
    "synthetic_zero_inflated",
    "synthetic_zi_corr",
]
