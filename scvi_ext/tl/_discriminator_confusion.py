from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvi_ext.tl._datasets import check_critic, table_of_datasets

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws
    from scvi_ext.fitted import Fitted


def discriminator_confusion(
    adata: AnnData | Mapping[str, AnnData],
    *,
    key: str | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | dict[str, AnnData] | None:
    """What the critic of a joint fit takes the cells of each data set for: how well the latent space mixes them.

    The critic has learned to tell data sets from z, which was trained to leave it in the dark. Where it still can,
    data sets lie apart, and imputation from one to the other is not to be trusted. Cells are looked at as in
    training, at the mean of q(z | x) and a noise of standard deviation 0.5 around it.

    Parameters
    ----------
    adata
        Data sets by the names under which they were fitted, all or some, or one of them alone.
    key
        Which fit; the last one by default.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of the noise.
    key_added
        Slot to write, ``"<key>_discriminator_confusion"`` by default.
    copy
        Return copies instead of changing the data sets.

    Returns
    -------
    ``None``, or the changed copies. Sets in each of the data sets given

    ``adata.uns["<key>_discriminator_confusion"]``
        DataFrame of float64 with a row for each of them, and a column for each data set of the fit: the mean
        probability, over the cells of the row, of being of the column. Rows sum to 1; all entries alike is well mixed.

    Raises
    ------
    KeyError
        No such fit.
    ValueError
        The fit is of one data set, has no critic (``kappa=0``), or is not the same in all that was given.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> datasets = {"rna": adata, "spatial": adata[:, :60].copy()}
    >>> for part in datasets.values():
    ...     sx.pp.setup_anndata(part)
    >>> sx.tl.fit(datasets, "gimvi", max_epochs=2)
    >>> sx.tl.discriminator_confusion(datasets)
    >>> datasets["rna"].uns["gimvi_discriminator_confusion"].shape
    (2, 2)

    References
    ----------
    Lopez et al. (2019), ICML Workshop on Computational Biology, arXiv:1905.02269.
    """

    def mean_probabilities(fitted: Fitted) -> dict[str, float]:
        check_critic(fitted)
        module = fitted.module

        def probabilities(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
            noise = draws.normal(len(cells.x), module.n_noise)[:, : module.n_latent]  # the samples of other read-outs
            return (module.confusion(module.watched(module.encode(cells), noise)).double(),)

        parts = fitted.map(probabilities, batch_size=batch_size, seed=seed)
        means = np.concatenate([part for _, (part,) in parts]).mean(axis=0)
        return dict(zip(fitted.fit.joint["datasets"], means, strict=True))

    return table_of_datasets(adata, key, "discriminator_confusion", mean_probabilities, key_added=key_added, copy=copy)
