"""Pictures."""

from scvi_ext.pl._confusion import confusion
from scvi_ext.pl._history import history
from scvi_ext.pl._imputation import imputation
from scvi_ext.pl._loadings import loadings
from scvi_ext.pl._metrics import metrics
from scvi_ext.pl._posterior_predictive import posterior_predictive
from scvi_ext.pl._tuning import tuning
from scvi_ext.pl._volcano import volcano
from scvi_ext.pl._zero_inflation import zero_inflation

__all__ = [
    "confusion",
    "history",
    "imputation",
    "loadings",
    "metrics",
    "posterior_predictive",
    "tuning",
    "volcano",
    "zero_inflation",
]
