"""Read what is inside an AnnData."""

from scvi_ext.get._fits import fits
from scvi_ext.get._history import history
from scvi_ext.get._imputation_df import imputation_df
from scvi_ext.get._loadings_df import loadings_df
from scvi_ext.get._model import model
from scvi_ext.get._setup import setup

__all__ = ["fits", "history", "imputation_df", "loadings_df", "model", "setup"]
