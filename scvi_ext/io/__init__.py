"""Files: counts that stay on disk, models in folders of our own, and models trained with scvi-tools."""

from __future__ import annotations

from scvi_ext.files import takes_files
from scvi_ext.modalities import takes_mudata

from ._read_backed import read_backed
from ._read_model import read_model
from ._scvi_tools import read_scvi_tools
from ._write_model import write_model

write_model = takes_files(takes_mudata(write_model, __name__), __name__)

__all__ = ["read_backed", "read_model", "read_scvi_tools", "write_model"]
