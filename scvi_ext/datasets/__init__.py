"""Data to try models on: real counts, bundled or downloaded, and synthetic counts whose truth is known."""

from __future__ import annotations

from ._brain_large import brain_large
from ._cite_seq import cite_seq
from ._cortex import cortex
from ._from_url import from_url
from ._hemato import hemato
from ._loom import frontal_cortex_dropseq, prefrontal_cortex_starmap, retina
from ._pbmc import pbmc, purified_pbmc
from ._pbmc68k_counts import pbmc68k_counts
from ._pbmc_cite_seq import pbmc_cite_seq
from ._seqfish import seqfish, seqfish_plus
from ._smfish import smfish
from ._spatial_csv import breast_cancer, mouse_ob
from ._synthetic import (
    synthetic_cite,
    synthetic_corr,
    synthetic_iid,
    synthetic_random,
    synthetic_zero_inflated,
    synthetic_zi_corr,
)
from ._tenx import brain_small, dataset_10x

__all__ = [
    "brain_large",
    "brain_small",
    "breast_cancer",
    "cite_seq",
    "cortex",
    "dataset_10x",
    "from_url",
    "frontal_cortex_dropseq",
    "hemato",
    "mouse_ob",
    "pbmc",
    "pbmc68k_counts",
    "pbmc_cite_seq",
    "prefrontal_cortex_starmap",
    "purified_pbmc",
    "retina",
    "seqfish",
    "seqfish_plus",
    "smfish",
    "synthetic_cite",
    "synthetic_corr",
    "synthetic_iid",
    "synthetic_random",
    "synthetic_zero_inflated",
    "synthetic_zi_corr",
]
