from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext.functional.proteins import background_mean
from scvi_ext.tl._proteins import read_proteins

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import numpy as np
    from anndata import AnnData
    from torch import Tensor

    from scvi_ext._contract import Minibatch
    from scvi_ext.tl._proteins import Panel


def get_protein_background(
    adata: AnnData,
    *,
    key: str | None = None,
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
    """Background of proteins: the mean count of a cell that does not express them, mostly ambient antibody.

    Where a batch has not measured a protein, it is the average over those that have.

    Parameters
    ----------
    adata
        Annotated data that holds the fit of a model with proteins.
    key
        Which fit; the last one by default.
    transform_batch
        Batch to decode in, as if all cells had been measured there, or several, which are averaged. They must have
        measured the proteins. None: each cell's own, or those that have measured a protein.
    protein_list
        Names of proteins; all by default.
    n_samples
        Posterior samples of z to average.
    return_mean
        False returns all samples instead of writing their mean.
    indices
        The cells: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples.
    key_added
        Slot to write, ``"<key>_protein_background"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.obsm["<key>_protein_background"]``
        DataFrame, float32, cells x proteins, in counts; at each sample of z the mean of the background in closed form.
        A "/" in the name of a protein is "|" in its column.

    With ``return_mean=False``: float32 array, samples x cells x proteins, draws of the background, and nothing is
    written.

    Raises
    ------
    KeyError
        No such fit, or unknown proteins.
    ValueError
        A model without proteins, an unknown batch, or one that has not measured a protein.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.synthetic_iid(n_proteins=5)
    >>> sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein_expression")
    >>> sx.tl.fit(adata, "totalvi", max_epochs=2)
    >>> sx.tl.get_protein_background(adata)
    >>> adata.obsm["totalvi_protein_background"].shape
    (400, 5)

    References
    ----------
    Gayoso et al. (2021), Nature Methods 18, 272.
    """

    def sample(panel: Panel, z: Tensor, cells: Minibatch, noise: Tensor) -> Tensor:
        return panel.mean(lambda py, _: background_mean(py, None if return_mean else noise), z, cells)

    return read_proteins(
        adata,
        sample,
        "protein_background",
        "background of proteins",
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
    )
