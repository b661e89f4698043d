"""Preparing an AnnData for a model."""

from __future__ import annotations

from ._setup_anndata import setup_anndata

__all__ = ["setup_anndata"]
