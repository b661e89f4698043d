from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from _tolerances import FLOAT64, N_STANDARD_ERRORS
from anndata import AnnData
from scipy.spatial.distance import cdist
from scipy.stats import entropy, gmean, spearmanr
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from scvi_ext.metrics import arrays


def points(n: int = 120, d: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def brute_neighbors(x: np.ndarray, k: int) -> list[np.ndarray]:
    distances = cdist(x, x)
    np.fill_diagonal(distances, np.inf)
    return list(np.argsort(distances, axis=1)[:, :k])


def rows(graph) -> list[set[int]]:
    return [set(graph.indices[a:b]) for a, b in zip(graph.indptr, graph.indptr[1:], strict=False)]


def entropy_of_scvi_05(neighbors: list[np.ndarray], batches: np.ndarray) -> float:
    """The rule of scVI 0.5 for batches 0 and 1, cell by cell."""
    total = 0.0
    for near in neighbors:
        f = np.mean(batches[near] == 1)
        if 0 < f < 1:
            total += -f * np.log(f) - (1 - f) * np.log(1 - f)
    return total / len(neighbors)


@pytest.fixture
def approximate(monkeypatch):
    monkeypatch.setattr(arrays, "EXACT_UP_TO", 1)


# ---- neighbours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3, 20])  # a tree, and all distances
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbors_are_those_of_all_distances(d, dtype):
    x = points(d=d).astype(dtype)
    graph = arrays.nearest_neighbors(x, 7)
    assert graph.shape == (120, 120)
    assert rows(graph) == [set(near) for near in brute_neighbors(x, 7)]
    i, j = graph.nonzero()
    # Of squares of float32 numbers of order one, subtracted.
    np.testing.assert_allclose(graph[i, j].A1, cdist(x, x)[i, j], rtol=1e-3)


def test_a_cell_is_not_its_own_neighbor_even_among_duplicates():
    x = np.repeat(points(6), 5, axis=0)
    graph = arrays.nearest_neighbors(x, 4)
    assert rows(graph) == [{5 * (i // 5) + j for j in range(5)} - {i} for i in range(30)]
    assert (graph.data == 0).all()
    assert rows(arrays.without_self(graph)) == rows(graph)
    assert rows(arrays.nearest(graph, 4)) == rows(graph)


def test_the_approximate_search_finds_nearly_all(approximate):
    x = np.r_[points(400, 5), np.zeros((20, 5))].astype(np.float32)  # more duplicates than neighbours
    graph = arrays.nearest_neighbors(x, 10, seed=3)
    assert (np.diff(graph.indptr) == 10).all()
    assert graph.diagonal().sum() == 0
    found = rows(graph)
    assert all(i not in near for i, near in enumerate(found))
    recall = np.mean([len(a & set(b)) / 10 for a, b in zip(found[:400], brute_neighbors(x, 10)[:400], strict=True)])
    assert recall > 0.95
    assert (graph != arrays.nearest_neighbors(x, 10, seed=3)).nnz == 0


def test_neighbors_that_cannot_be_found_are_refused():
    with pytest.raises(ValueError, match="n_neighbors=5 must be below the number of cells, which is 5"):
        arrays.nearest_neighbors(points(5), 5)
    with pytest.raises(ValueError, match="n_neighbors=0 must be 1 or more"):
        arrays.nearest_neighbors(points(5), 0)
    x = points(5)
    x[1:3, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 5 cells have values that are not finite"):
        arrays.nearest_neighbors(x, 2)


@pytest.mark.parametrize("k", [1, 3, 10, 50])
def test_the_nearest_of_a_graph(k):
    x = points()
    graph = arrays.nearest_neighbors(x, 10)
    shuffled = graph.tocoo()
    order = np.random.default_rng(0).permutation(graph.nnz)
    shuffled = sp.coo_matrix((shuffled.data[order], (shuffled.row[order], shuffled.col[order])), graph.shape)
    for form in (graph, shuffled, shuffled.tocsc(), sp.csr_array(graph)):
        assert rows(arrays.nearest(form, k)) == rows(arrays.nearest_neighbors(x, min(k, 10)))


def test_the_diagonal_of_a_graph_does_not_count():
    graph = arrays.nearest_neighbors(points(), 5)
    with_self = (graph + sp.identity(120)).tocsr()
    codes = np.arange(120) % 3
    assert rows(arrays.without_self(with_self)) == rows(graph)
    assert arrays.knn_purity(with_self, codes) == arrays.knn_purity(graph, codes)
    assert arrays.entropy_batch_mixing(with_self, codes) == arrays.entropy_batch_mixing(graph, codes)
    assert arrays.nn_overlap(with_self, graph)["spearman"] == pytest.approx(1)


def test_the_graph_of_scanpy_is_a_graph():
    adata = AnnData(obsm={"X_a": points()})
    sc.pp.neighbors(adata, n_neighbors=8, use_rep="X_a")  # itself and 7 others
    assert rows(arrays.without_self(adata.obsp["distances"])) == rows(arrays.nearest_neighbors(points(), 7))


# ---- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_for_two_batches_the_entropy_is_that_of_scvi_05(share):
    x, batches = points(200), (np.random.default_rng(1).random(200) < share).astype(int)
    x[:, 0] += 0.7 * batches
    value = arrays.entropy_batch_mixing(arrays.nearest_neighbors(x, 15), batches)
    assert value == pytest.approx(entropy_of_scvi_05(brute_neighbors(x, 15), batches), rel=FLOAT64["rtol"])


@pytest.mark.parametrize("n_batches", [2, 3, 7])
def test_the_entropy_for_any_number_of_batches(n_batches):
    x, batches = points(200), np.random.default_rng(1).integers(n_batches, size=200)
    expected = np.mean([entropy(np.bincount(batches[near])) for near in brute_neighbors(x, 15)])
    graph = arrays.nearest_neighbors(x, 15)
    for names in (batches, batches.astype(str), 10.0 * batches, np.array(list("abcdefg"), dtype=object)[batches]):
        assert arrays.entropy_batch_mixing(graph, names) == pytest.approx(expected, rel=FLOAT64["rtol"])


def test_the_entropy_is_zero_without_mixing():
    x, batches = points(90), np.arange(90) % 3
    graph = arrays.nearest_neighbors(x + 100 * batches[:, None], 29)
    assert arrays.entropy_batch_mixing(graph, batches) == 0
    assert arrays.entropy_batch_mixing(graph, np.zeros(90)) == 0
    assert str(arrays.entropy_batch_mixing(graph, batches)) == "0.0"  # without a sign


def test_the_entropy_of_perfect_mixing_is_the_logarithm_of_the_number_of_batches():
    everyone = sp.csr_matrix(np.ones((200, 200)))
    batches = np.arange(200) % 4
    closed_form = entropy([49, 50, 50, 50])  # a cell is not its own neighbour
    assert arrays.entropy_batch_mixing(everyone, batches) == pytest.approx(closed_form, rel=FLOAT64["rtol"])
    # Shares among 50 neighbours drawn at random are biased by (4 - 1) / (2 * 50) = 0.03.
    batches = np.random.default_rng(0).integers(4, size=1000)
    mixed = arrays.entropy_batch_mixing(arrays.nearest_neighbors(points(1000), 50), batches)
    assert np.log(4) - 0.06 < mixed < np.log(4)


def test_pools_estimate_the_mean_over_all_cells():
    x, batches = points(500), np.random.default_rng(1).integers(2, size=500)
    graph = arrays.nearest_neighbors(x, 5)
    whole = arrays.entropy_batch_mixing(graph, batches)
    spread = np.std([entropy(np.bincount(batches[near])) for near in brute_neighbors(x, 5)])
    values = [arrays.entropy_batch_mixing(graph, batches, n_pools=20, n_samples_per_pool=50, seed=s) for s in range(10)]
    assert len(set(values)) == 10
    assert abs(np.mean(values) - whole) < N_STANDARD_ERRORS * spread / np.sqrt(20 * 50 * 10)
    assert values[4] == arrays.entropy_batch_mixing(graph, batches, n_pools=20, n_samples_per_pool=50, seed=4)


def test_the_entropy_of_labels():
    labels = np.array(["a", "b", "b", "c", "c", "c"])
    expected = entropy([1, 2, 3])
    assert arrays.entropy_from_indices(labels) == pytest.approx(expected, rel=FLOAT64["rtol"])
    assert arrays.entropy_from_indices(labels[::-1]) == pytest.approx(expected, rel=FLOAT64["rtol"])
    assert str(arrays.entropy_from_indices([3, 3, 3])) == "0.0"
    assert arrays.entropy_from_indices(np.arange(8)) == pytest.approx(np.log(8), rel=FLOAT64["rtol"])


# ---- labels --------------------------------------------------------------------------------------------------------


def test_purity_is_a_mean_over_labels_of_means_over_cells():
    x, labels = points(200), np.random.default_rng(1).choice(4, p=[0.6, 0.3, 0.08, 0.02], size=200)
    x[:, 0] += labels
    shares = np.array([np.mean(labels[near] == labels[i]) for i, near in enumerate(brute_neighbors(x, 9))])
    expected = np.mean([shares[labels == label].mean() for label in np.unique(labels)])
    graph = arrays.nearest_neighbors(x, 9)
    for names in (labels, labels.astype(str), 3.0 * labels):
        assert arrays.knn_purity(graph, names) == pytest.approx(expected, rel=FLOAT64["rtol"])


def test_purity_of_separated_and_of_single_cells():
    x, labels = points(90), np.arange(90) % 3
    graph = arrays.nearest_neighbors(x + 100 * labels[:, None], 29)
    assert arrays.knn_purity(graph, labels) == 1
    assert arrays.knn_purity(graph, np.zeros(90)) == 1
    assert arrays.knn_purity(graph, np.arange(90)) == 0


def test_cells_without_neighbors_are_left_out():
    labels = np.array(["a", "a", "b", "c"])
    graph = sp.csr_matrix(([1.0, 1.0, 1.0], ([0, 0, 1], [1, 2, 0])), (4, 4))
    assert arrays.knn_purity(graph, labels) == pytest.approx((0.5 + 1) / 2)  # of label a only
    assert arrays.entropy_batch_mixing(graph, labels) == pytest.approx((np.log(2) + 0) / 2)


def test_graphs_and_values_must_fit():
    graph = arrays.nearest_neighbors(points(), 5)
    for function in (arrays.knn_purity, arrays.entropy_batch_mixing):
        with pytest.raises(ValueError, match=r"values of shape \(119,\) for 120 cells; one per cell is needed"):
            function(graph, np.zeros(119))
        with pytest.raises(ValueError, match="None of the 4 cells has a neighbour"):
            function(sp.identity(4), np.zeros(4))
        with pytest.raises(ValueError, match=r"has shape \(119, 120\); cells x cells is needed"):
            function(graph[1:], np.zeros(119))


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_clusters_that_are_far_apart_are_found(method):
    labels = np.random.default_rng(1).integers(5, size=300)
    x = points(300) + 100 * np.eye(5)[labels][:, :3] - 100 * (labels == 4)[:, None]
    scores = arrays.clustering_scores(x, labels, method=method)
    assert list(scores) == ["ASW", "NMI", "ARI", "UCA"]
    assert scores["ASW"] == pytest.approx(silhouette_score(x, labels), rel=FLOAT64["rtol"])
    assert [scores[name] for name in ("NMI", "ARI", "UCA")] == pytest.approx([1, 1, 1])
    assert all(type(score) is float for score in scores.values())


def test_scores_are_those_of_scikit_learn():
    x, labels = points(300), np.random.default_rng(1).integers(3, size=300)
    x[:, 0] += 4 * labels
    # Enough starts for the same optimum, whatever the seed.
    clusters = KMeans(3, n_init=50, random_state=5).fit_predict(x)
    scores = arrays.clustering_scores(x, labels.astype(str), n_init=50)
    assert scores["NMI"] == pytest.approx(normalized_mutual_info_score(labels, clusters), rel=FLOAT64["rtol"])
    assert scores["ARI"] == pytest.approx(adjusted_rand_score(labels, clusters), rel=FLOAT64["rtol"])
    accuracy = max(np.mean(np.array(order)[clusters] == labels) for order in permutations(range(3)))
    assert scores["UCA"] == pytest.approx(accuracy, rel=FLOAT64["rtol"])


def test_a_mixture_follows_clusters_of_different_width():
    labels = np.repeat([0, 1], 200)
    x = points(400, 2) * np.where(labels, 3.0, 0.3)[:, None] + 5.0 * labels[:, None]
    scores = {method: arrays.clustering_scores(x, labels, method=method)["ARI"] for method in ("kmeans", "gmm")}
    assert scores["kmeans"] < 0.85
    assert scores["gmm"] > 0.95


def test_more_starts_are_better_ones():
    labels = np.random.default_rng(1).integers(30, size=600)
    x = points(600, 2) + 20 * points(30, 2, seed=2)[labels]
    one, many = (arrays.clustering_scores(x, labels, n_init=n, seed=1)["ARI"] for n in (1, 50))
    assert many > one


def test_the_silhouette_of_many_cells_is_that_of_some(monkeypatch):
    labels = np.random.default_rng(1).integers(3, size=2000)
    x = points(2000) + 2 * labels[:, None]
    whole = arrays.clustering_scores(x, labels, n_init=1)["ASW"]
    monkeypatch.setattr(arrays, "SILHOUETTE_CELLS", 500)
    some = [arrays.clustering_scores(x, labels, n_init=1, seed=seed)["ASW"] for seed in (0, 1, 1)]
    assert some[0] != some[1] == some[2]
    # A silhouette has a standard deviation of 0.2 here; the means to the clusters add less than that.
    np.testing.assert_allclose(some, whole, atol=N_STANDARD_ERRORS * 0.4 / np.sqrt(500))


def test_scores_of_nothing_are_refused():
    with pytest.raises(ValueError, match="120 cells have 1 labels: at least two labels"):
        arrays.clustering_scores(points(), np.zeros(120))
    with pytest.raises(ValueError, match=r"120 cells have 120 labels: .* more cells than labels"):
        arrays.clustering_scores(points(), np.arange(120))
    with pytest.raises(ValueError, match="method='knn' is not one of 'gmm', 'kmeans'"):
        arrays.clustering_scores(points(), np.arange(120) % 2, method="knn")
    with pytest.raises(ValueError, match="n_init=0 must be 1 or more"):
        arrays.clustering_scores(points(), np.arange(120) % 2, n_init=0)


@pytest.mark.parametrize(("n_labels", "n_clusters"), [(4, 4), (3, 5), (5, 3)])
def test_accuracy_is_that_of_the_best_matching(n_labels, n_clusters):
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(n_labels, size=60), rng.integers(n_clusters, size=60)
    n = max(n_labels, n_clusters)
    best = max(np.mean(np.array(order)[clusters] == labels) for order in permutations(range(n)))
    names = np.array(list("abcde"))[labels]
    assert arrays.unsupervised_clustering_accuracy(names, clusters) == pytest.approx(best, rel=FLOAT64["rtol"])


# ---- two representations -------------------------------------------------------------------------------------------


def test_overlap_is_that_of_dense_vectors():
    graphs = [arrays.nearest_neighbors(points(60, seed=s), k) for s, k in ((0, 5), (1, 9))]
    graphs[1] = arrays.nearest_neighbors(points(60) + 0.5 * points(60, seed=1), 9)
    a, b = ((graph.toarray() > 0).ravel().astype(float) for graph in graphs)
    overlap = arrays.nn_overlap(*graphs)
    assert overlap["spearman"] == pytest.approx(spearmanr(a, b)[0], rel=FLOAT64["rtol"])
    assert overlap["fold_enrichment"] == pytest.approx((a * b).sum() * 60**2 / (a.sum() * b.sum()), rel=FLOAT64["rtol"])
    assert arrays.nn_overlap(*graphs[::-1]) == pytest.approx(overlap, rel=FLOAT64["rtol"])


def test_overlap_of_the_same_and_of_other_graphs():
    graph = arrays.nearest_neighbors(points(), 6)
    same = arrays.nn_overlap(graph, 3 * graph)
    assert same == pytest.approx({"spearman": 1.0, "fold_enrichment": 120 / 6})
    none = arrays.nn_overlap(sp.csr_matrix(np.eye(4, k=1)), sp.csr_matrix(np.eye(4, k=-1)))
    assert none == pytest.approx({"spearman": -9 / (3 * 13), "fold_enrichment": 0.0})


def test_overlap_of_many_cells_does_not_overflow():
    n = 200_000
    ahead = sp.eye_array(n, k=1, format="csr")
    overlap = arrays.nn_overlap(ahead, ahead)
    assert overlap == pytest.approx({"spearman": 1.0, "fold_enrichment": n**2 / (n - 1)})


def test_graphs_of_other_cells_are_not_compared():
    graph = arrays.nearest_neighbors(points(), 6)
    with pytest.raises(ValueError, match="The graphs have 120 and 119 cells"):
        arrays.nn_overlap(graph, graph[1:, 1:])
    with pytest.raises(ValueError, match="A graph has no neighbours at all"):
        arrays.nn_overlap(graph, sp.csr_matrix((120, 120)))


def test_centred_log_ratios():
    counts = np.random.default_rng(0).poisson(5.0, (30, 8))
    counts[3] = 0
    expected = np.log1p(counts / gmean(1 + counts, axis=1, keepdims=True))
    np.testing.assert_allclose(arrays.clr(counts), expected, **FLOAT64)
    assert not arrays.clr(counts)[3].any()
    with pytest.raises(ValueError, match="1 counts are negative"):
        arrays.clr([[1, -1]])


def test_global_generators_are_left_alone(approximate):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    x, labels = points(), np.arange(120) % 2
    graph = arrays.nearest_neighbors(x, 5)
    arrays.entropy_batch_mixing(graph, labels, n_pools=2)
    for method in ("kmeans", "gmm"):
        arrays.clustering_scores(x, labels, method=method, n_init=1, seed=2**40)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
