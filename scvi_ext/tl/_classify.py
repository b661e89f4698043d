from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._contract import Capability
from scvi_ext._errors import listing, number
from scvi_ext._keys import ABSTAINED, FitKeys, column_name, valid_key
from scvi_ext.fitted import Fitted
from scvi_ext.functional.calibration import tempered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_FEW = 30  # cells: the temperature that they give is known to about a factor of 1.5 only


def classify(
    adata: AnnData,
    *,
    key: str | None = None,
    min_confidence: float = 0.0,
    calibrated: bool = True,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Predict the label of every cell, with a confidence that can be read as a share of right predictions.

    Reads a fit of a model that learns labels (``"scanvi"``, ``"vaec"``, ``"classifier"``). Its probabilities are
    calibrated (Guo et al. 2017): raised to the power 1 / T and normalised, with the temperature T that ``tl.fit`` has
    fitted to labelled cells that it had held out. Labels of ``adata`` are not read, and need not be there.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    min_confidence
        Abstain where the confidence is below this probability: the prediction is then the ``unlabeled_category`` of the
        setup, or ``"Unknown"``.
    calibrated
        False: the probabilities as the classifier gives them. They are mostly too close to 0 and 1.
    indices
        The cells: positions, mask or names. The others are left without a prediction.
    batch_size
        Cells per forward pass; results do not depend on it.
    key_added
        First part of the names of the slots, the name of the fit by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.obs["<key>_prediction"]``
        Categorical: the most probable label.
    ``adata.obs["<key>_confidence"]``
        float32: its probability.
    ``adata.obsm["<key>_probabilities"]``
        Table, float32, cells x labels: all probabilities. They sum to 1. A "/" in a label, which h5ad does not allow in
        the name of a column, is "|" there.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        The model does not learn labels, or ``min_confidence`` is no probability.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, labels_key="bulk_labels")
    >>> sx.tl.fit(adata, "scanvi", max_epochs=2)
    >>> sx.tl.classify(adata)
    >>> adata.obsm["scanvi_probabilities"].shape
    (700, 10)

    References
    ----------
    Xu et al. (2021), Molecular Systems Biology 17, e9620. Guo et al. (2017), On calibration of modern neural networks,
    ICML.
    """
    if not 0 <= number("min_confidence", min_confidence) <= 1:
        msg = f"min_confidence={min_confidence!r} is a probability: it must be from 0 to 1."
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices, decodes=False, capability=Capability.LABELS)
    keys = fitted.keys if key_added is None else FitKeys(valid_key(key_added))
    prediction, confidence = (fitted.slot("obs", name, None) for name in (keys.prediction, keys.confidence))
    probabilities = fitted.slot("obsm", keys.probabilities, None)
    labels, module = list(fitted.registry.labels_categories), fitted.module
    _check_names(labels, adata.obs_names.name)
    temperature = float(fitted.fit.status.get("temperature", 1.0)) if calibrated else 1.0

    start = logg.info(f"predicting {len(labels)} labels by fit {fitted.fit.key!r}, at temperature {temperature:.3g}")
    parts = fitted.map(lambda cells, draws: (module.encode_label(cells),), batch_size=batch_size, seed=0)
    log_qy = tempered(np.concatenate([log_qy for _, (log_qy,) in parts]), temperature)
    n_calibration = fitted.fit.status.get("n_calibration", _FEW)
    if calibrated and n_calibration < _FEW:
        logg.warning(
            f"the confidence is calibrated on {n_calibration} held-out cells with a label, which is too few to rely on "
            "it: label more cells, or hold out more of them, tl.fit(train_size=...)."
        )
    best, highest = log_qy.argmax(1), np.exp(log_qy.max(1)).astype(np.float32)  # compared as it is written
    abstained = highest < min_confidence
    categories = labels
    if min_confidence > 0:
        none = fitted.registry.unlabeled_category or ABSTAINED
        categories = [*labels, *([none] if none not in labels else [])]
        best = np.where(abstained, categories.index(none), best)
    results.write_obs_categories(adata, prediction, best, categories, fitted.rows)
    results.write_obs(adata, confidence, highest, fitted.rows)
    results.write_obsm(adata, probabilities, np.exp(log_qy).astype(np.float32), fitted.rows, labels)
    without = f", {abstained.sum()} of {len(best)} cells are below {min_confidence:g}" if min_confidence else ""
    logg.info(
        f"    finished{without}",
        time=start,
        deep=f"added\n    {prediction!r} and {confidence!r}, the most probable label and its probability (adata.obs)\n"
        f"    {probabilities!r}, the probability of every label (adata.obsm)",
    )
    return adata if copy else None


def _check_names(labels: list[str], index_name: object) -> None:
    """Raise a ValueError for labels that cannot be columns of one table, or not of one in a file."""
    columns = [column_name(label) for label in labels]
    bad = [label for label, name in zip(labels, columns, strict=True) if columns.count(name) > 1]
    bad += [name for name in columns if name in ("", ".", "..", "_index", index_name)]
    if bad:
        msg = (
            f"These labels cannot be names of columns in a file, or not beside each other ('/' becomes '|'): "
            f"{listing(bad)}. Rename them and fit again."
        )
        raise ValueError(msg)
