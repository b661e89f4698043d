from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_ext._errors import one_of
from scvi_ext.functional.proteins import background_mean, foreground_given_counts, foreground_probability
from scvi_ext.tl._proteins import efficiency, read_proteins

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Literal

    import numpy as np
    from anndata import AnnData
    from torch import Tensor

    from scvi_ext._contract import Minibatch
    from scvi_ext.tl._proteins import Panel


def get_protein_foreground(
    adata: AnnData,
    *,
    key: str | None = None,
    given: Literal["latent", "counts"] = "latent",
    transform_batch: Any = None,
    protein_list: Sequence[str] | None = None,
    n_samples: int = 1,
    return_mean: bool = True,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | np.ndarray | None:
    """Probability that a cell expresses a protein: that its count is foreground, not background.

    Parameters
    ----------
    adata
        Annotated data that holds the fit of a model with proteins.
    key
        Which fit; the last one by default.
    given
        ``"latent"``: of any cell with this z, what the paper calls 1 - pi; imputed from the batches that have measured
        a protein where the cell's own has not. ``"counts"``: of this very cell with its count of the protein, by Bayes'
        theorem, which tells single cells better from others like them; NaN where there is no count.
    transform_batch
        Batch to decode in, as if all cells had been measured there, or several, which are averaged. They must have
        measured the proteins. None: each cell's own, or those that have measured a protein. For ``"latent"`` only: a
        count has been seen in one batch.
    protein_list
        Names of proteins; all by default.
    n_samples
        Posterior samples of z, and for ``"counts"`` of the background, to average.
    return_mean
        False returns all samples instead of writing their mean.
    indices
        The cells: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples.
    key_added
        Slot to write, ``"<key>_protein_foreground"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.obsm["<key>_protein_foreground"]``
        DataFrame, float32, cells x proteins.
        A "/" in the name of a protein is "|" in its column.

    With ``return_mean=False``: float32 array, samples x cells x proteins, and nothing is written.

    Raises
    ------
    KeyError
        No such fit, or unknown proteins.
    ValueError
        A model without proteins, an unknown batch, one that has not measured a protein, or ``transform_batch`` with
        ``given="counts"``.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_iid(n_proteins=5)
    >>> sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein_expression")
    >>> sx.tl.fit(adata, "totalvi", max_epochs=2)
    >>> sx.tl.get_protein_foreground(adata)
    >>> adata.obsm["totalvi_protein_foreground"].shape
    (400, 5)

    References
    ----------
    Gayoso et al. (2021), Nature Methods 18, 272.
    """
    one_of("given", given, ["latent", "counts"])
    if given == "counts" and transform_batch is not None:
        msg = (
            f"transform_batch={transform_batch!r} has no meaning with given='counts': a count has been seen in one "
            "batch. Leave it out, or ask for given='latent'."
        )
        raise ValueError(msg)

    def given_latent(panel: Panel, z: Tensor, cells: Minibatch, _: Tensor) -> Tensor:
        return panel.mean(lambda py, _: foreground_probability(py), z, cells)

    def given_counts(panel: Panel, z: Tensor, cells: Minibatch, noise: Tensor) -> Tensor:
        module = panel.fitted.module
        py = module.decode_protein(z, cells)
        background = background_mean(py, noise) * efficiency(module, cells)
        measured = module.protein_batch_mask[cells.batch_index]
        return torch.where(measured, foreground_given_counts(cells.protein, py, background), torch.nan)

    return read_proteins(
        adata,
        given_latent if given == "latent" else given_counts,
        "protein_foreground",
        "probability of foreground",
        key=key,
        transform_batch=transform_batch,
        protein_list=protein_list,
        n_samples=n_samples,
        return_mean=return_mean,
        indices=indices,
        batch_size=batch_size,
        seed=seed,
        key_added=key_added,
        copy=copy,
        imputes=given == "latent",
    )
