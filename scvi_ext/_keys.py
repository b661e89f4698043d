"""Every AnnData slot name that is read or written, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnsKeys:
    """Layout of ``adata.uns["scvi_ext"]``."""

    root: str = "scvi_ext"
    format: str = "format"
    setup: str = "setup"
    fits: str = "fits"
    last_fit: str = "last_fit"
    corruptions: str = "corruptions"
    alignment: str = "alignment"
    modalities: str = "modalities"


@dataclass(frozen=True)
class FitKeys:
    """Slots that the read-outs of one fit write, derived from its key."""

    key: str

    @property
    def latent(self) -> str:
        return f"X_{self.key}"  # obsm, so that sc.pl.embedding(basis=key) finds it

    @property
    def z2(self) -> str:
        return f"X_{self.key}_z2"  # obsm

    @property
    def normalized(self) -> str:
        return f"{self.key}_normalized"  # layers, or obsm for a list of genes

    @property
    def mean(self) -> str:
        return f"{self.key}_mean"  # layers

    @property
    def dropout(self) -> str:
        return f"{self.key}_dropout"  # layers

    @property
    def dispersion(self) -> str:
        return f"{self.key}_dispersion"  # var, or layers

    @property
    def library_size(self) -> str:
        return f"{self.key}_library_size"  # obs

    @property
    def loadings(self) -> str:
        return f"{self.key}_loadings"  # varm

    @property
    def elbo(self) -> str:
        return f"{self.key}_elbo"  # obs

    @property
    def reconstruction_error(self) -> str:
        return f"{self.key}_reconstruction_error"  # obs

    @property
    def marginal_ll(self) -> str:
        return f"{self.key}_marginal_ll"  # obs

    @property
    def de(self) -> str:
        return f"{self.key}_de"  # uns

    @property
    def within_group_de(self) -> str:
        return f"{self.key}_within_group_de"  # uns

    @property
    def imputation(self) -> str:
        return f"{self.key}_imputation"  # uns

    @property
    def imputed(self) -> str:
        return f"{self.key}_imputed"  # obsm, a table of cells x genes

    @property
    def discriminator_confusion(self) -> str:
        return f"{self.key}_discriminator_confusion"  # uns

    @property
    def loss_magnitude(self) -> str:
        return f"{self.key}_loss_magnitude"  # uns

    @property
    def tuning(self) -> str:
        return f"{self.key}_tuning"  # uns

    @property
    def effective_sample_size(self) -> str:
        return f"{self.key}_effective_sample_size"  # obs

    @property
    def amortization_gap(self) -> str:
        return f"{self.key}_amortization_gap"  # obs

    @property
    def posterior_predictive(self) -> str:
        return f"{self.key}_posterior_predictive"  # a sample in layers or obsm, a check in uns

    @property
    def zero_inflation(self) -> str:
        return f"{self.key}_zero_inflation"  # var or varm: the stem of several names, see zero_inflation_slots

    @property
    def technical_zeros(self) -> str:
        return f"{self.key}_technical_zeros"  # layers

    @property
    def protein(self) -> str:
        return f"{self.key}_protein"  # obsm, as all tables of cells x proteins

    @property
    def protein_foreground(self) -> str:
        return f"{self.key}_protein_foreground"  # obsm

    @property
    def protein_background(self) -> str:
        return f"{self.key}_protein_background"  # obsm

    @property
    def correlation(self) -> str:
        return f"{self.key}_correlation"  # varp

    @property
    def protein_correlation(self) -> str:
        return f"{self.key}_protein_correlation"  # varm with genes, uns between proteins

    @property
    def drift(self) -> str:
        return f"{self.key}_drift"  # obs

    @property
    def drift_share(self) -> str:
        return f"{self.key}_drift_share"  # obs

    @property
    def prediction(self) -> str:
        return f"{self.key}_prediction"  # obs

    @property
    def confidence(self) -> str:
        return f"{self.key}_confidence"  # obs

    @property
    def probabilities(self) -> str:
        return f"{self.key}_probabilities"  # obsm, a table with one column for each label


UNS = UnsKeys()
IN_QUERY = "in_query"  # var: whether a gene was measured in a query, or zeros stand in for it
PROXIMITY = "proximity_imputed"  # obsm: a table of cells x genes, of no fit
METRICS = "scvi_ext_metrics"  # uns: a table of several representations, so of no single fit
ABSTAINED = "Unknown"  # obs: the prediction where confidence is too low, if no unlabelled category is registered
ANNOTATION = "scvi_ext_annotation"  # uns: a table of several classifiers
NONE = "None"  # of an option in a file: older versions of the formats have no None
FORMAT = 1  # of uns["scvi_ext"]; raised when a reader of this version could misread it


def valid_key(key: object) -> str:
    """``key``, if it can name a fit or a slot in every file format; else a ValueError."""
    if not isinstance(key, str) or key in ("", ".", "..") or "/" in key:
        msg = f"key_added={key!r} must be a name, not '.' or '..', and without '/' (h5ad and zarr take it for a path)."
        raise ValueError(msg)
    return key


ZERO_INFLATION = ("alpha", "beta", "probability", "called", "share")


def zero_inflation_slots(stem: str) -> dict[str, str]:
    """What is told of the zero inflation of each gene -> its slot in ``var``, or in ``varm`` by batch or label."""
    return {what: f"{stem}_{what}" for what in ZERO_INFLATION}


def of_proteins(slot: str) -> str:
    """Where the same of proteins stands: their names may be those of genes, so they have a slot of their own."""
    return f"{slot}_protein"


def column_name(name: str) -> str:
    """``name`` as a column of a table in ``obsm`` or ``varm``: h5ad and zarr take "/" for a path, so it becomes "|"."""
    return name.replace("/", "|")
