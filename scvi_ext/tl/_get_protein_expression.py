from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import normalize

from scvi_ext.functional.proteins import background_mean, denoised, foreground_probability
from scvi_ext.tl._proteins import read_proteins

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import numpy as np
    from anndata import AnnData
    from torch import Tensor

    from scvi_ext._contract import Minibatch, ProteinExpression
    from scvi_ext.tl._proteins import Panel


def get_protein_expression(
    adata: AnnData,
    *,
    key: str | None = None,
    transform_batch: Any = None,
    protein_list: Sequence[str] | None = None,
    n_samples: int = 1,
    include_background: bool = False,
    sample_mixing: bool = False,
    scale: bool = False,
    return_mean: bool = True,
    indices: Sequence | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | np.ndarray | None:
    """Denoised proteins: the mean count that is foreground, at posterior samples; missing panels are imputed.

    In a batch that has not measured a protein, the decoder was never trained for it. There, the cell is decoded in the
    batches that have measured it, and their average taken; the log says where.

    Parameters
    ----------
    adata
        Annotated data that holds the fit of a model with proteins.
    key
        Which fit; the last one by default.
    transform_batch
        Batch to decode in, as if all cells had been measured there, or several, which are averaged. They must have
        measured the proteins. None: each cell's own, imputed as said above.
    protein_list
        Names of proteins; all by default.
    n_samples
        Posterior samples of z to average.
    include_background
        Whether the mean of the background, times its probability, is added.
    sample_mixing
        Whether a protein is foreground or background at random in each sample, instead of weighing both by their
        probabilities.
    scale
        Whether values are shares of what all proteins of the cell add up to, those outside ``protein_list`` too.
        (The isotype controls among them count as well.)
    return_mean
        False returns all samples instead of writing their mean.
    indices
        The cells: positions, mask or names. The others become NaN.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the samples.
    key_added
        Slot to write, ``"<key>_protein"`` by default.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.obsm["<key>_protein"]``
        DataFrame, float32, cells x proteins: counts, or shares with ``scale=True``. The background of each sample of z
        is its mean in closed form, but for shares, which have none: there it is drawn.
        A "/" in the name of a protein is "|" in its column.

    With ``return_mean=False``: float32 array, samples x cells x proteins, each with a background that is drawn, and
    nothing is written.

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
    >>> sx.tl.get_protein_expression(adata, protein_list=["protein_0", "protein_3"])
    >>> adata.obsm["totalvi_protein"].shape
    (400, 2)

    References
    ----------
    Gayoso et al. (2021), Nature Methods 18, 272.
    """
    draws_background = scale or not return_mean

    def sample(panel: Panel, z: Tensor, cells: Minibatch, noise: Tensor) -> Tensor:
        n_proteins = panel.measured.shape[1]
        of_background, of_mixing = noise[:, :n_proteins], noise[:, n_proteins:]

        def value(py: ProteinExpression, _: Minibatch) -> Tensor:
            background = background_mean(py, of_background if draws_background else None)
            foreground = foreground_probability(py, of_mixing if sample_mixing else None)
            return denoised(py, background, foreground, include_background)

        values = panel.mean(value, z, cells)
        return normalize(values, p=1, dim=-1) if scale else values

    return read_proteins(
        adata,
        sample,
        "protein",
        "denoised proteins",
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
        all_decoded=scale,
        more_noise=sample_mixing,
    )
