"""Preparing an AnnData for a model."""

from __future__ import annotations

from ._align_query import align_query
from ._corrupt import corrupt
from ._restore import restore
from ._setup_anndata import setup_anndata

__all__ = ["align_query", "corrupt", "restore", "setup_anndata"]
