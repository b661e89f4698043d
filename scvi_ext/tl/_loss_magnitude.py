from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scvi_ext.data.joint import position
from scvi_ext.functional.adversary import losses_by_cell
from scvi_ext.tl._datasets import table_of_datasets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

    from scvi_ext._contract import Minibatch
    from scvi_ext.engine.map_cells import Draws
    from scvi_ext.fitted import Fitted


def loss_magnitude(
    adata: AnnData | Mapping[str, AnnData],
    *,
    key: str | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | dict[str, AnnData] | None:
    """The parts of the loss of a joint fit in each data set, beside each other: which of them outweighs the others.

    Means over all cells of a data set, in nats and without any warm-up: the ELBO at one posterior sample each, losses
    of the critic and of fooling it at the blurred mean of z that it sees. The parts of the ELBO of each cell are
    in :func:`~scvi_ext.tl.get_reconstruction_error` and :func:`~scvi_ext.tl.get_elbo`.

    Parameters
    ----------
    adata
        Data sets by the names under which they were fitted, all or some, or one of them alone.
    key
        Which fit; the last one by default.
    batch_size
        Cells per forward pass; results do not depend on it.
    seed
        Of samples and noise.
    key_added
        Slot to write, ``"<key>_loss_magnitude"`` by default.
    copy
        Return copies instead of changing the data sets.

    Returns
    -------
    ``None``, or the changed copies. Sets in each of the data sets given

    ``adata.uns["<key>_loss_magnitude"]``
        DataFrame of float64 with a row for each of them. ``reconstruction_loss``, ``kl_z`` and ``kl_library`` are the
        parts of the negative ELBO. Of a fit with a critic, also ``fooling_loss``, what is paid for not misleading it,
        times ``kappa``, and ``critic_loss``, its own cross-entropy: log(D) of D data sets that it cannot tell.

    Raises
    ------
    KeyError
        No such fit.
    ValueError
        The fit is of one data set, or is not the same in all that was given.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> datasets = {"rna": adata, "spatial": adata[:, :60].copy()}
    >>> for part in datasets.values():
    ...     sx.pp.setup_anndata(part)
    >>> sx.tl.fit(datasets, "gimvi", max_epochs=2)
    >>> sx.tl.loss_magnitude(datasets)
    >>> datasets["rna"].uns["gimvi_loss_magnitude"].columns.tolist()
    ['reconstruction_loss', 'kl_z', 'kl_library', 'fooling_loss', 'critic_loss']

    References
    ----------
    Lopez et al. (2019), ICML Workshop on Computational Biology, arXiv:1905.02269.
    """

    def means(fitted: Fitted) -> dict[str, float]:
        module, own = fitted.module, position(fitted.fit)

        def parts(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
            noise = draws.normal(len(cells.x), module.n_noise)
            loss = module.loss(cells, noise=noise)
            columns = [loss.reconstruction, loss.kl_z, loss.kl_library]
            if module.critic is not None:
                z = module.watched(module.encode(cells), noise[:, : module.n_latent])
                of_critic, fooling = losses_by_cell(module.critic(z), own)
                columns += [module.kappa * fooling, of_critic]
            return (torch.stack(columns, dim=-1).double(),)

        total = sum(part.sum(axis=0) for _, (part,) in fitted.map(parts, batch_size=batch_size, seed=seed))
        return dict(zip(_PARTS, total / fitted.store.n_cells, strict=False))

    return table_of_datasets(adata, key, "loss_magnitude", means, key_added=key_added, copy=copy)


_PARTS = ("reconstruction_loss", "kl_z", "kl_library", "fooling_loss", "critic_loss")
