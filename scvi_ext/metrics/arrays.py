"""The metrics as functions of arrays: a latent space or a graph of neighbours in, a number out.

A graph of neighbours is a sparse matrix, cells x cells. What is stored in a row are the neighbours of that cell, at
their distances. Zeros that are stored count (a duplicate is a neighbour at distance 0), entries on the diagonal do not:
a cell is not its own neighbour. ``scanpy.pp.neighbors`` writes such a graph into ``obsp["distances"]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix, issparse
from scipy.special import entr
from scipy.stats import entropy, rankdata
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsRegressor, NearestNeighbors

from scvi_ext._errors import one_of, whole_number

if TYPE_CHECKING:
    from typing import Literal

    from numpy.typing import ArrayLike
    from scipy.sparse import sparray, spmatrix

# Cells. In 10 dimensions on one core an exact search takes 5 s for as many. For twice as many it takes 18 s, as long as
# pynndescent, which grows more slowly from there on.
EXACT_UP_TO = 50_000

# Cells. Silhouettes need all distances: 1 s for as many cells, with a standard error of the mean below 0.01.
SILHOUETTE_CELLS = 10_000

# Cells of a reference whose own distances are taken for those of all: a standard error of a share of 0.005 at most.
DRIFT_CELLS = 10_000


def nearest_neighbors(x: ArrayLike, n_neighbors: int, *, seed: int = 0) -> csr_matrix:
    """Find the nearest neighbours of every cell, by Euclidean distance.

    Up to ``EXACT_UP_TO`` cells the search is exact (scikit-learn: a tree in up to 15 dimensions, else all distances),
    above it is approximate (pynndescent).

    Parameters
    ----------
    x
        Cells x units, finite.
    n_neighbors
        Neighbours of a cell, itself not counted.
    seed
        Of the approximate search.

    Returns
    -------
    Graph of neighbours with ``n_neighbors`` entries in a row.

    Raises
    ------
    ValueError
        There are not as many other cells, or a value is not finite.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> arrays.nearest_neighbors([[0.0], [1.0], [3.0]], 1).toarray()
    array([[0., 1., 0.],
           [1., 0., 0.],
           [0., 2., 0.]])

    References
    ----------
    Dong et al. (2011), WWW, 577 (nearest neighbour descent).
    """
    x = np.asarray(x)
    n_cells = len(x)
    if whole_number("n_neighbors", n_neighbors, 1) >= n_cells:
        msg = f"n_neighbors={n_neighbors} must be below the number of cells, which is {n_cells}."
        raise ValueError(msg)
    if not np.isfinite(x).all():
        bad = (~np.isfinite(x)).any(axis=1).sum()
        msg = f"{bad} of {n_cells} cells have values that are not finite: leave them out."
        raise ValueError(msg)
    if n_cells <= EXACT_UP_TO:
        return NearestNeighbors(n_neighbors=n_neighbors, n_jobs=-1).fit(x).kneighbors_graph(mode="distance")
    from pynndescent import NNDescent  # takes seconds to import

    indices, distances = NNDescent(x, n_neighbors=n_neighbors + 1, random_state=_random_state(seed)).neighbor_graph
    # Among duplicates a cell can miss itself; where too few were found, the rest is -1.
    kept = (indices >= 0) & (indices != np.arange(n_cells)[:, None])
    kept &= np.cumsum(kept, axis=1) <= n_neighbors
    indptr = np.r_[0, np.cumsum(kept.sum(axis=1))]
    return csr_matrix((distances[kept], indices[kept], indptr), shape=(n_cells, n_cells))


def drift(x: ArrayLike, reference: ArrayLike, n_neighbors: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How far cells lie from the cells of a reference, as these lie from each other.

    What is compared is the Euclidean distance to the ``n_neighbors``-th nearest reference cell, itself not counted.

    Parameters
    ----------
    x, reference
        Cells x units, finite.
    n_neighbors
        Which neighbour: as many reference cells make a place a usual one.
    seed
        Of the ``DRIFT_CELLS`` reference cells that are taken for all, where there are more.

    Returns
    -------
    The distance of each cell in medians of the reference, and the share of reference cells whose own distance is as
    large, counting the cell among them: above 0, and of cells that are like the reference's evenly spread up to 1.

    Raises
    ------
    ValueError
        The reference has no more than ``n_neighbors`` cells, most of its distances are 0, or a value is not finite.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> ratio, share = arrays.drift([[1.2], [9.0]], [[0.0], [1.0], [2.0], [3.0]], 1)
    >>> ratio.round(3).tolist(), share.tolist()
    ([0.2, 6.0], [1.0, 0.2])

    References
    ----------
    Ramaswamy, Rastogi and Shim (2000), SIGMOD, 427 (outliers by the distance to the k-th neighbour).
    """
    x, reference = np.asarray(x), np.asarray(reference)
    if whole_number("n_neighbors", n_neighbors, 1) >= len(reference):
        msg = f"n_neighbors={n_neighbors} must be below the number of reference cells, which is {len(reference)}."
        raise ValueError(msg)
    if not (np.isfinite(x).all() and np.isfinite(reference).all()):
        msg = "Some cells have values that are not finite: leave them out."
        raise ValueError(msg)
    index = NearestNeighbors(n_jobs=-1).fit(reference)
    some = np.random.default_rng(seed).permutation(len(reference))[:DRIFT_CELLS]
    own = index.kneighbors(reference[some], n_neighbors + 1)[0][:, -1]  # the nearest is the cell itself
    found = index.kneighbors(x, n_neighbors)[0][:, -1]
    typical = np.median(own)
    if typical == 0:
        msg = f"Most reference cells coincide with {n_neighbors} others, so that there is no usual distance."
        raise ValueError(msg)
    as_large = len(own) - np.searchsorted(np.sort(own), found, side="left")
    return found / typical, (1 + as_large) / (1 + len(own))


def without_self(neighbors: spmatrix | sparray) -> csr_matrix:
    """A graph of neighbours in compressed rows, without entries on the diagonal.

    Parameters
    ----------
    neighbors
        Graph of neighbours.

    Returns
    -------
    Graph of neighbours.

    Raises
    ------
    ValueError
        The matrix is not square.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> arrays.without_self([[0.5, 2.0], [2.0, 0.5]]).nnz
    2
    """
    graph = csr_matrix(neighbors)
    if graph.shape[0] != graph.shape[1]:
        msg = f"A graph of neighbours has shape {graph.shape}; cells x cells is needed."
        raise ValueError(msg)
    rows = _rows(graph)
    other = rows != graph.indices
    if other.all():
        return graph
    indptr = np.r_[0, np.cumsum(np.bincount(rows[other], minlength=graph.shape[0]))]
    return csr_matrix((graph.data[other], graph.indices[other], indptr), shape=graph.shape)


def nearest(neighbors: spmatrix | sparray, n_neighbors: int) -> csr_matrix:
    """The nearest few of the neighbours in a graph.

    Parameters
    ----------
    neighbors
        Graph of neighbours.
    n_neighbors
        Neighbours of a cell to keep; a cell that has fewer keeps them all.

    Returns
    -------
    Graph of neighbours.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> graph = arrays.nearest_neighbors([[0.0], [1.0], [3.0]], 2)
    >>> arrays.nearest(graph, 1).indices
    array([1, 0, 1], dtype=int32)
    """
    whole_number("n_neighbors", n_neighbors, 1)
    graph = without_self(neighbors)
    order = np.lexsort((graph.data, _rows(graph)))
    kept = order[np.arange(graph.nnz) - np.repeat(graph.indptr[:-1], _degrees(graph)) < n_neighbors]
    indptr = np.r_[0, np.cumsum(np.minimum(_degrees(graph), n_neighbors))]
    return csr_matrix((graph.data[kept], graph.indices[kept], indptr), shape=graph.shape)


def entropy_batch_mixing(
    neighbors: spmatrix | sparray,
    batches: ArrayLike,
    *,
    n_pools: int | None = None,
    n_samples_per_pool: int = 100,
    seed: int = 0,
) -> float:
    r"""Entropy of the batches among the neighbours of a cell, averaged over cells.

    .. math::

        H = -\frac{1}{n} \sum_c \sum_b f_{cb} \ln f_{cb}, \qquad
        f_{cb} = \text{share of batch } b \text{ among the neighbours of cell } c

    Parameters
    ----------
    neighbors
        Graph of neighbours. Cells without any are left out.
    batches
        The batch of each cell: any values, one per cell.
    n_pools
        Draw as many pools of cells and average over these; None averages over all cells, which is what the pools
        estimate.
    n_samples_per_pool
        Cells in a pool, drawn with replacement.
    seed
        Of the pools.

    Returns
    -------
    Nats, from 0 (every cell among its own batch) to the logarithm of the number of batches (equal shares everywhere).

    Raises
    ------
    ValueError
        No cell has a neighbour, or there is not one value per cell.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> graph = arrays.nearest_neighbors([[0.0], [1.0], [2.0], [3.0]], 2)
    >>> arrays.entropy_batch_mixing(graph, ["a", "a", "a", "a"])
    0.0
    >>> round(arrays.entropy_batch_mixing(graph, ["a", "a", "b", "b"]), 4)
    0.6931

    References
    ----------
    Haghverdi et al. (2018), Nature Biotechnology 36, 421; pools as in Lopez et al. (2018), Nature Methods 15, 1053.
    """
    graph, codes = _graph_and_codes(neighbors, batches)
    one_hot = csr_matrix((np.ones(len(codes)), codes, np.arange(len(codes) + 1)))
    pattern = csr_matrix((np.ones(graph.nnz), graph.indices, graph.indptr), shape=graph.shape)
    counts = pattern @ one_hot
    shares = counts.data / _degrees(graph)[_rows(counts)]
    entropies = np.bincount(_rows(counts), weights=entr(shares), minlength=len(codes))[_degrees(graph) > 0]
    if n_pools is None:
        return float(entropies.mean())
    shape = (whole_number("n_pools", n_pools, 1), whole_number("n_samples_per_pool", n_samples_per_pool, 1))
    return float(entropies[np.random.default_rng(seed).integers(len(entropies), size=shape)].mean())


def entropy_from_indices(labels: ArrayLike) -> float:
    """Entropy of the shares of labels.

    Parameters
    ----------
    labels
        Any values, one per cell.

    Returns
    -------
    Nats, from 0 (one label) to the logarithm of the number of labels (equal shares).

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> round(arrays.entropy_from_indices(["a", "a", "b", "b"]), 4)
    0.6931
    """
    return float(entropy(np.unique(np.asarray(labels), return_counts=True)[1])) + 0.0  # no minus before a zero


def knn_purity(neighbors: spmatrix | sparray, labels: ArrayLike) -> float:
    """Share of a cell's neighbours that have its label, averaged over the cells of a label, then over labels.

    Parameters
    ----------
    neighbors
        Graph of neighbours. Cells without any are left out.
    labels
        The label of each cell: any values, one per cell.

    Returns
    -------
    From 0 to 1 (every cell among its own kind). Rare labels weigh as much as frequent ones.

    Raises
    ------
    ValueError
        No cell has a neighbour, or there is not one value per cell.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> graph = arrays.nearest_neighbors([[0.0], [1.0], [5.0], [6.0]], 1)
    >>> arrays.knn_purity(graph, ["a", "a", "b", "b"]), arrays.knn_purity(graph, ["a", "b", "a", "b"])
    (1.0, 0.0)
    """
    graph, codes = _graph_and_codes(neighbors, labels)
    rows, degrees = _rows(graph), _degrees(graph)
    same = np.bincount(rows, weights=codes[graph.indices] == codes[rows], minlength=len(codes))
    asked = degrees > 0
    shares, codes = same[asked] / degrees[asked], codes[asked]
    present = np.unique(codes)
    return float((np.bincount(codes, weights=shares)[present] / np.bincount(codes)[present]).mean())


def clustering_scores(
    latent: ArrayLike,
    labels: ArrayLike,
    *,
    method: Literal["kmeans", "gmm"] = "kmeans",
    n_init: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """How well labels stand apart in a latent space, and how well clusters found there agree with them.

    Parameters
    ----------
    latent
        Cells x units, finite.
    labels
        The label of each cell: any values, one per cell.
    method
        ``"kmeans"``, or ``"gmm"`` for a Gaussian mixture with full covariances. As many clusters as there are labels.
    n_init
        Starts of the clustering, of which the best is taken.
    seed
        Of the starts, and of the cells that the silhouette is averaged over.

    Returns
    -------
    ``ASW``
        Silhouette of the labels, averaged over cells; from -1 to 1. Of more than ``SILHOUETTE_CELLS`` cells, as many
        are drawn, and it is that of these.
    ``NMI``
        Normalised mutual information (arithmetic mean) of labels and clusters, from 0 to 1.
    ``ARI``
        Adjusted Rand index of labels and clusters, 1 for the same, around 0 for unrelated ones.
    ``UCA``
        Accuracy of the clusters as labels, see :func:`unsupervised_clustering_accuracy`.

    Raises
    ------
    ValueError
        Unknown method, fewer than two labels, or no two cells of the same label.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> arrays.clustering_scores([[0.0], [1.0], [50.0], [51.0]], ["a", "a", "b", "b"])
    {'ASW': 0.97..., 'NMI': 1.0, 'ARI': 1.0, 'UCA': 1.0}

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053.
    """
    one_of("method", method, ["kmeans", "gmm"])
    whole_number("n_init", n_init, 1)
    latent, codes = np.asarray(latent), _codes(labels, len(latent))
    n_labels = len(np.unique(codes))
    if not 2 <= n_labels < len(codes):
        msg = f"{len(codes)} cells have {n_labels} labels: at least two labels, and more cells than labels, are needed."
        raise ValueError(msg)
    random_state = _random_state(seed)
    clustering = (KMeans if method == "kmeans" else GaussianMixture)(n_labels, n_init=n_init, random_state=random_state)
    clusters = clustering.fit_predict(latent)
    drawn = SILHOUETTE_CELLS if len(codes) > SILHOUETTE_CELLS else None
    scores = {
        "ASW": silhouette_score(latent, codes, sample_size=drawn, random_state=random_state),
        "NMI": normalized_mutual_info_score(codes, clusters),
        "ARI": adjusted_rand_score(codes, clusters),
        "UCA": unsupervised_clustering_accuracy(codes, clusters),
    }
    return {name: float(score) for name, score in scores.items()}


def unsupervised_clustering_accuracy(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Share of cells whose cluster is the one of their label, under the best matching of clusters and labels.

    Parameters
    ----------
    labels, clusters
        Any values, one per cell. There can be more of one than of the other; some then have no partner.

    Returns
    -------
    From 0 to 1.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> arrays.unsupervised_clustering_accuracy(["a", "a", "b", "b"], [1, 1, 0, 1])
    0.75

    References
    ----------
    Kuhn (1955), Naval Research Logistics Quarterly 2, 83 (the matching).
    """
    table = contingency_matrix(np.asarray(labels), np.asarray(clusters))
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / table.sum())


def nn_overlap(neighbors: spmatrix | sparray, other: spmatrix | sparray) -> dict[str, float]:
    r"""How far two graphs of neighbours agree, over all pairs of cells.

    A graph is a vector of :math:`n^2` zeros and ones. Ranks of such a vector are a linear function of it, so Spearman's
    correlation of two of them is Pearson's, and with :math:`a`, :math:`b` neighbours in all and :math:`c` in common

    .. math::

        \rho = \frac{n^2 c - a b}{\sqrt{a (n^2 - a)\, b (n^2 - b)}}, \qquad
        \text{fold enrichment} = \frac{n^2 c}{a b}

    Parameters
    ----------
    neighbors, other
        Graphs of neighbours of the same cells.

    Returns
    -------
    ``spearman``
        1 for the same graph, around 0 for unrelated ones.
    ``fold_enrichment``
        Common neighbours, of those expected of unrelated graphs.

    Raises
    ------
    ValueError
        A graph is empty, or they have different cells.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> graph = arrays.nearest_neighbors([[0.0], [1.0], [5.0], [6.0]], 1)
    >>> arrays.nn_overlap(graph, graph)
    {'spearman': 1.0, 'fold_enrichment': 4.0}

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053.
    """
    graphs = [without_self(graph) for graph in (neighbors, other)]
    if graphs[0].shape != graphs[1].shape:
        msg = f"The graphs have {graphs[0].shape[0]} and {graphs[1].shape[0]} cells; the same ones are needed."
        raise ValueError(msg)
    a, b = (graph.nnz for graph in graphs)
    if a == 0 or b == 0:
        msg = "A graph has no neighbours at all; nothing can be compared with it."
        raise ValueError(msg)
    pairs = [csr_matrix((np.ones(graph.nnz), graph.indices, graph.indptr), shape=graph.shape) for graph in graphs]
    common, n2 = pairs[0].multiply(pairs[1]).nnz, graphs[0].shape[0] ** 2
    # Whole numbers of Python: n^4 does not fit into 64 bits.
    spread = (float(a * (n2 - a)) * float(b * (n2 - b))) ** 0.5
    return {"spearman": (n2 * common - a * b) / spread, "fold_enrichment": n2 * common / (a * b)}


def proximity_imputation(x: ArrayLike, expression: ArrayLike, x_new: ArrayLike, n_neighbors: int = 4) -> np.ndarray:
    """Impute the expression of cells by the mean of their nearest neighbours, weighted by the inverse of distances.

    What a model that imputes must beat, if it is to be of use.

    Parameters
    ----------
    x
        Where cells with known expression lie, cells x units, finite.
    expression
        Of these cells, cells x genes, finite. A sparse matrix is made dense.
    x_new
        Where the others lie, cells x units, finite.
    n_neighbors
        Of each of the others. One at distance 0 decides alone.

    Returns
    -------
    float64, others x genes.

    Raises
    ------
    ValueError
        Fewer cells than ``n_neighbors``, numbers of units or cells that do not fit together, no matrix, or values that
        are not finite.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> arrays.proximity_imputation([[0.0], [3.0], [9.0]], [[0.0], [6.0], [50.0]], [[1.0]], n_neighbors=2)
    array([[2.]])

    References
    ----------
    Lopez et al. (2019), ICML Workshop on Computational Biology, arXiv:1905.02269.
    """
    given = {"x": x, "expression": expression, "x_new": x_new}
    x, expression, x_new = (_matrix(name, values) for name, values in given.items())
    for name, values in zip(given, (x, expression, x_new), strict=True):
        bad = (~np.isfinite(values)).any(axis=1).sum()
        if bad:
            msg = f"{bad} of {len(values)} cells have values of {name} that are not finite: leave them out."
            raise ValueError(msg)
    if x.shape[1] != x_new.shape[1]:
        msg = f"x has {x.shape[1]} units and x_new {x_new.shape[1]}; both must lie in the same space."
        raise ValueError(msg)
    if len(x) != len(expression):
        msg = f"x has {len(x)} cells and expression {len(expression)}; the same ones are needed, in the same order."
        raise ValueError(msg)
    if whole_number("n_neighbors", n_neighbors, 1) > len(x):
        msg = f"n_neighbors={n_neighbors}, but the expression of {len(x)} cells only is known: ask for fewer."
        raise ValueError(msg)
    neighbors = KNeighborsRegressor(n_neighbors, weights="distance")
    return neighbors.fit(x, expression).predict(x_new)


def imputation_correlation(imputed: ArrayLike, measured: ArrayLike) -> np.ndarray:
    """Spearman's correlation over cells of what was imputed with what was measured, of each gene.

    Parameters
    ----------
    imputed, measured
        Cells x genes. A sparse matrix is made dense.

    Returns
    -------
    float64, one for each gene; NaN where either is the same in all cells, or NaN in any of them.

    Raises
    ------
    ValueError
        They have different cells or genes, or are no matrices.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> arrays.imputation_correlation([[0.1, 5], [0.2, 4], [0.9, 3]], [[0, 1], [1, 2], [7, 3]])
    array([ 1., -1.])
    """
    imputed, measured = _matrix("imputed", imputed), _matrix("measured", measured)
    if imputed.shape != measured.shape:
        msg = f"{imputed.shape} values were imputed and {measured.shape} measured; cells and genes must be the same."
        raise ValueError(msg)
    ranks = [rankdata(values, axis=0) for values in (imputed, measured)]
    a, b = (of_one - of_one.mean(axis=0) for of_one in ranks)
    spread = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.divide((a * b).sum(axis=0), spread, out=np.full(len(spread), np.nan), where=spread > 0)


def clr(counts: ArrayLike) -> np.ndarray:
    r"""Centred log-ratios of the counts of each cell, the usual scale of surface proteins.

    .. math::

        \ln\left(1 + \frac{x_{cp}}{g_c}\right), \qquad \ln g_c = \frac{1}{P} \sum_p \ln (1 + x_{cp})

    Parameters
    ----------
    counts
        Cells x proteins.

    Returns
    -------
    float64, cells x proteins.

    Raises
    ------
    ValueError
        A count is negative.

    Examples
    --------
    >>> from scvi_ext.metrics import arrays
    >>> arrays.clr([[0, 3, 0, 3]]).round(3)
    array([[0.   , 0.916, 0.   , 0.916]])

    References
    ----------
    Stoeckius et al. (2017), Nature Methods 14, 865.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if (counts < 0).any():
        msg = f"{(counts < 0).sum()} counts are negative; centred log-ratios are of counts."
        raise ValueError(msg)
    return np.log1p(counts / np.exp(np.log1p(counts).mean(axis=1, keepdims=True)))


def _random_state(seed: int) -> int:
    """A seed of any size, as one that scikit-learn and pynndescent take."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _matrix(name: str, values: ArrayLike | spmatrix | sparray) -> np.ndarray:
    """``values`` as a dense matrix of float64; else a ValueError."""
    values = np.asarray(values.toarray() if issparse(values) else values, dtype=np.float64)
    if values.ndim != 2:
        msg = f"{name} has the shape {values.shape}; a matrix is needed, with a row for each cell."
        raise ValueError(msg)
    return values


def _degrees(graph: csr_matrix) -> np.ndarray:
    return np.diff(graph.indptr)


def _rows(graph: csr_matrix) -> np.ndarray:
    """The row of each entry."""
    return np.repeat(np.arange(graph.shape[0]), _degrees(graph))


def _codes(values: ArrayLike, n_cells: int) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (n_cells,):
        msg = f"There are values of shape {values.shape} for {n_cells} cells; one per cell is needed."
        raise ValueError(msg)
    return np.unique(values, return_inverse=True)[1]


def _graph_and_codes(neighbors: spmatrix | sparray, values: ArrayLike) -> tuple[csr_matrix, np.ndarray]:
    graph = without_self(neighbors)
    if graph.nnz == 0:
        msg = f"None of the {graph.shape[0]} cells has a neighbour: there is nothing to average."
        raise ValueError(msg)
    return graph, _codes(values, graph.shape[0])
