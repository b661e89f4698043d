"""How good a representation is: numbers that need no model. The same as functions of arrays: ``metrics.arrays``."""

from scvi_ext.metrics._annotation_baselines import annotation_baselines
from scvi_ext.metrics._clustering_scores import clustering_scores
from scvi_ext.metrics._entropy_batch_mixing import entropy_batch_mixing
from scvi_ext.metrics._entropy_from_indices import entropy_from_indices
from scvi_ext.metrics._imputation_correlation import imputation_correlation
from scvi_ext.metrics._imputation_error import imputation_error
from scvi_ext.metrics._knn_purity import knn_purity
from scvi_ext.metrics._nn_overlap import nn_overlap
from scvi_ext.metrics._proximity_imputation import proximity_imputation
from scvi_ext.metrics._table import table
from scvi_ext.modalities import takes_mudata

__all__ = [
    "annotation_baselines",
    "clustering_scores",
    "entropy_batch_mixing",
    "entropy_from_indices",
    "imputation_correlation",
    "imputation_error",
    "knn_purity",
    "nn_overlap",
    "proximity_imputation",
    "table",
]

for _name in __all__:
    globals()[_name] = takes_mudata(globals()[_name], __name__)
