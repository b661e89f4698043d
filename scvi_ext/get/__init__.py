"""Read what is inside an AnnData."""

from scvi_ext.files import takes_files
from scvi_ext.get._annotation_df import annotation_df
from scvi_ext.get._classification_df import classification_df
from scvi_ext.get._confusion_df import confusion_df
from scvi_ext.get._de_df import de_df
from scvi_ext.get._fits import fits
from scvi_ext.get._history import history
from scvi_ext.get._imputation_df import imputation_df
from scvi_ext.get._loadings_df import loadings_df
from scvi_ext.get._metrics_df import metrics_df
from scvi_ext.get._model import model
from scvi_ext.get._posterior_predictive import posterior_predictive
from scvi_ext.get._setup import setup
from scvi_ext.get._tuning_df import tuning_df, tuning_params
from scvi_ext.get._zero_inflation_df import zero_inflation_df
from scvi_ext.modalities import takes_mudata

__all__ = [
    "annotation_df",
    "classification_df",
    "confusion_df",
    "de_df",
    "fits",
    "history",
    "imputation_df",
    "loadings_df",
    "metrics_df",
    "model",
    "posterior_predictive",
    "setup",
    "tuning_df",
    "tuning_params",
    "zero_inflation_df",
]

for _name in __all__:
    globals()[_name] = takes_files(takes_mudata(globals()[_name], __name__), __name__)
