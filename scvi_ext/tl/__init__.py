"""Fit a model, and read out what it has learned."""

from scvi_ext.files import takes_files
from scvi_ext.modalities import takes_mudata
from scvi_ext.tl._amortization_gap import amortization_gap
from scvi_ext.tl._classify import classify
from scvi_ext.tl._denoised_samples import denoised_samples
from scvi_ext.tl._differential_expression import differential_expression
from scvi_ext.tl._discriminator_confusion import discriminator_confusion
from scvi_ext.tl._feature_correlation import feature_correlation
from scvi_ext.tl._fit import fit
from scvi_ext.tl._get_drift import get_drift
from scvi_ext.tl._get_elbo import get_elbo
from scvi_ext.tl._get_importance_weights import get_importance_weights
from scvi_ext.tl._get_latent import get_latent
from scvi_ext.tl._get_library_size import get_library_size
from scvi_ext.tl._get_likelihood_parameters import get_likelihood_parameters
from scvi_ext.tl._get_loadings import get_loadings
from scvi_ext.tl._get_marginal_ll import get_marginal_ll
from scvi_ext.tl._get_normalized_expression import get_normalized_expression
from scvi_ext.tl._get_protein_background import get_protein_background
from scvi_ext.tl._get_protein_expression import get_protein_expression
from scvi_ext.tl._get_protein_foreground import get_protein_foreground
from scvi_ext.tl._get_reconstruction_error import get_reconstruction_error
from scvi_ext.tl._get_technical_zeros import get_technical_zeros
from scvi_ext.tl._get_zero_inflation import get_zero_inflation
from scvi_ext.tl._imputation_score import imputation_score
from scvi_ext.tl._impute import impute
from scvi_ext.tl._loss_magnitude import loss_magnitude
from scvi_ext.tl._map_query import map_query
from scvi_ext.tl._posterior_predictive_check import posterior_predictive_check
from scvi_ext.tl._posterior_predictive_sample import posterior_predictive_sample
from scvi_ext.tl._tune import tune
from scvi_ext.tl._within_group_de import within_group_de

__all__ = [
    "amortization_gap",
    "classify",
    "denoised_samples",
    "differential_expression",
    "discriminator_confusion",
    "feature_correlation",
    "fit",
    "get_drift",
    "get_elbo",
    "get_importance_weights",
    "get_latent",
    "get_library_size",
    "get_likelihood_parameters",
    "get_loadings",
    "get_marginal_ll",
    "get_normalized_expression",
    "get_protein_background",
    "get_protein_expression",
    "get_protein_foreground",
    "get_reconstruction_error",
    "get_technical_zeros",
    "get_zero_inflation",
    "imputation_score",
    "impute",
    "loss_magnitude",
    "map_query",
    "posterior_predictive_check",
    "posterior_predictive_sample",
    "tune",
    "within_group_de",
]

for _name in __all__:
    globals()[_name] = takes_files(takes_mudata(globals()[_name], __name__), __name__, together=_name == "fit")
