"""Pictures."""

from scvi_ext.pl._history import history
from scvi_ext.pl._loadings import loadings

__all__ = ["history", "loadings"]
