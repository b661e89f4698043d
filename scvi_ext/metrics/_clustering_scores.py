from __future__ import annotations

from typing import TYPE_CHECKING

from scanpy import logging as logg

from scvi_ext._errors import one_of, whole_number
from scvi_ext.engine.device import resolve_seed
from scvi_ext.metrics import arrays
from scvi_ext.metrics._cells import complete, leave_out, obs_codes, obs_key, rep_key, rep_values

if TYPE_CHECKING:
    from typing import Literal

    from anndata import AnnData


def clustering_scores(
    adata: AnnData,
    labels_key: str | None = None,
    *,
    method: Literal["kmeans", "gmm"] = "kmeans",
    use_rep: str | None = None,
    n_init: int = 10,
    seed: int | None = None,
) -> dict[str, float]:
    """How far labels stand apart in a representation, and how well clusters found there agree with them.

    Cells without a label or without values in the representation are left out, and the log says how many.

    Parameters
    ----------
    adata
        Annotated data.
    labels_key
        Column of ``obs``, the registered labels by default.
    method
        ``"kmeans"``, or ``"gmm"`` for a Gaussian mixture with full covariances. As many clusters as there are labels.
    use_rep
        Representation in ``obsm``, the latent space of the last fit by default.
    n_init
        Starts of the clustering, of which the best is taken.
    seed
        Of the starts, and of the cells that the silhouette is averaged over.

    Returns
    -------
    ``ASW``
        Silhouette of the labels, averaged over cells; from -1 to 1. Of more than 10,000 cells, 10,000 are drawn, and it
        is that of these.
    ``NMI``
        Normalised mutual information of labels and clusters, from 0 to 1.
    ``ARI``
        Adjusted Rand index of labels and clusters: 1 for the same, around 0 for unrelated ones.
    ``UCA``
        Unsupervised clustering accuracy: share of cells in the cluster of their label, under the best matching of
        clusters and labels.

    Raises
    ------
    KeyError
        No such column or representation, or no latent space to take by default.
    ValueError
        No labels are registered, fewer than two, or as many as cells; unknown method.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, labels_key="bulk_labels")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.get_latent(adata)
    >>> scores = sx.metrics.clustering_scores(adata)
    >>> list(scores)
    ['ASW', 'NMI', 'ARI', 'UCA']

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053.
    """
    one_of("method", method, ["kmeans", "gmm"])
    whole_number("n_init", n_init, 1)
    seed = resolve_seed(seed)
    key, use_rep = obs_key(adata, "labels_key", labels_key), rep_key(adata, use_rep)
    labels, values = obs_codes(adata, key), rep_values(adata, use_rep)
    start = logg.info(f"comparing {key!r} with clusters in {use_rep!r} (adata.obsm)")
    rows = leave_out((labels >= 0) & complete(values), f"a value of {key!r} (adata.obs) or {use_rep!r} (adata.obsm)")
    scores = arrays.clustering_scores(values[rows], labels[rows], method=method, n_init=n_init, seed=seed)
    drawn = f", the silhouette of {arrays.SILHOUETTE_CELLS} cells" if len(rows) > arrays.SILHOUETTE_CELLS else ""
    logg.info(f"    finished{drawn}", time=start)
    return scores
