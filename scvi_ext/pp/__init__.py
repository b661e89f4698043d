"""Preparing an AnnData, files of one, or a MuData for a model."""

from __future__ import annotations

from scvi_ext.files import takes_files
from scvi_ext.modalities import takes_mudata

from ._align_query import align_query
from ._corrupt import corrupt
from ._restore import restore
from ._setup_anndata import setup_anndata
from ._setup_mudata import setup_mudata

corrupt, restore = (takes_mudata(function, __name__) for function in (corrupt, restore))
align_query, corrupt, restore, setup_anndata = (
    takes_files(function, __name__) for function in (align_query, corrupt, restore, setup_anndata)
)

__all__ = ["align_query", "corrupt", "restore", "setup_anndata", "setup_mudata"]
