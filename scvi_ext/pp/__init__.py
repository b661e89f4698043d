"""Preparing an AnnData for a model."""

from __future__ import annotations

from ._corrupt import corrupt
from ._restore import restore
from ._setup_anndata import setup_anndata

__all__ = ["corrupt", "restore", "setup_anndata"]
