from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from _tolerances import FLOAT64

import scvi_ext as sx
from scvi_ext.metrics import arrays

N = 150
BY_NEIGHBORS = {"entropy_batch_mixing": "batch", "knn_purity": "cell_type"}
BY_COLUMN = {**BY_NEIGHBORS, "clustering_scores": "cell_type"}


@pytest.fixture
def cells() -> ad.AnnData:
    """150 cells of three types and three batches, with two representations and protein counts."""
    rng = np.random.default_rng(0)
    labels, batches = rng.integers(3, size=N), rng.integers(3, size=N)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical([f"b{i}" for i in batches]),
            "cell_type": pd.Categorical([f"t{i}" for i in labels], categories=["t2", "none", "t0", "t1"]),
        },
        index=[f"cell{i}" for i in range(N)],
    )
    x = rng.normal(size=(N, 4)) + 1.5 * np.eye(4)[labels] + 0.5 * np.eye(4)[batches]
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(2.0, (N, 5)).astype(np.float32)),
        obs=obs,
        obsm={
            "X_a": x,
            "X_b": (x + 0.3 * rng.normal(size=x.shape)).astype(np.float32),
            "protein": rng.poisson(np.exp(2 + 0.5 * x)),
        },
    )


@pytest.fixture(params=BY_COLUMN)
def name(request) -> str:
    return request.param


def value(adata: ad.AnnData, name: str, column: str | None = None, **options):
    options = {"use_rep": None if "neighbors_key" in options else "X_a"} | options
    return getattr(sx.metrics, name)(adata, column or BY_COLUMN[name], **options)


# ---- what is read --------------------------------------------------------------------------------------------------


def test_values_are_those_of_arrays(cells):
    x, batches, labels = cells.obsm["X_a"], cells.obs["batch"].to_numpy(), cells.obs["cell_type"].to_numpy()
    metrics = sx.metrics
    graph = arrays.nearest_neighbors(x, 50)
    mixing = metrics.entropy_batch_mixing(cells, "batch", use_rep="X_a")
    assert mixing == arrays.entropy_batch_mixing(graph, batches)
    pools = metrics.entropy_batch_mixing(cells, "batch", use_rep="X_a", n_pools=7, seed=3)
    assert pools == arrays.entropy_batch_mixing(graph, batches, n_pools=7, n_samples_per_pool=100, seed=3)
    purity = metrics.knn_purity(cells, "cell_type", use_rep="X_a")
    assert purity == arrays.knn_purity(arrays.nearest_neighbors(x, 30), labels)
    assert metrics.entropy_from_indices(cells, "cell_type") == arrays.entropy_from_indices(labels)
    for method in ("kmeans", "gmm"):
        scores = metrics.clustering_scores(cells, "cell_type", use_rep="X_a", method=method, n_init=4, seed=2)
        # Codes are in another order, so sums are too.
        assert scores == pytest.approx(arrays.clustering_scores(x, labels, method=method, n_init=4, seed=2), rel=1e-10)
    graphs = [arrays.nearest_neighbors(cells.obsm[rep], 20) for rep in ("X_a", "X_b")]
    overlap = metrics.nn_overlap(cells, use_rep="X_a", other_rep="X_b", n_neighbors=20)
    assert overlap == arrays.nn_overlap(*graphs)


def test_nothing_is_written(cells, name):
    before = cells.copy()
    value(cells, name)
    sx.metrics.nn_overlap(cells, use_rep="X_a", other_rep="X_b")
    for slot in ("obs", "obsm", "obsp", "uns"):
        assert set(getattr(cells, slot)) == set(getattr(before, slot))
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    np.testing.assert_array_equal(cells.obsm["X_a"], before.obsm["X_a"])


def test_views_tables_sparse_and_backed_representations(cells, name, tmp_path):
    expected = value(cells, name)
    cells.obsm["X_table"] = pd.DataFrame(cells.obsm["X_a"], index=cells.obs_names, columns=list("abcd"))
    cells.obsm["X_sparse"] = sp.csr_matrix(cells.obsm["X_a"])
    for rep in ("X_table", "X_sparse"):
        assert value(cells, name, use_rep=rep) == expected
    assert value(cells[:, :2], name) == expected
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert value(ad.read_h5ad(tmp_path / "cells.h5ad", backed="r"), name) == expected


def test_the_order_of_cells_does_not_matter(cells):
    shuffled = cells[np.random.default_rng(1).permutation(N)].copy()
    for name in BY_NEIGHBORS:
        assert value(shuffled, name) == pytest.approx(value(cells, name), rel=FLOAT64["rtol"])


def test_values_of_a_column_are_only_told_apart(cells, name):
    expected = value(cells, name)
    codes = pd.factorize(cells.obs[BY_COLUMN[name]])[0]
    for names in (codes, codes.astype(str), codes / 2, pd.Categorical(codes), pd.array(codes, dtype="Int64")):
        cells.obs["names"] = names
        assert value(cells, name, "names") == pytest.approx(expected, rel=FLOAT64["rtol"])
    cells.obs["names"] = codes == 0
    cells.obs["strings"] = np.where(codes == 0, "yes", "no")
    assert value(cells, name, "names") == pytest.approx(value(cells, name, "strings"), rel=FLOAT64["rtol"])


def test_what_is_registered_is_the_default(fitted):
    sx.tl.get_latent(fitted)
    fitted.obs["batch2"] = fitted.obs["batch"]
    expected = sx.metrics.entropy_batch_mixing(fitted, "batch2", use_rep="X_scvi")
    assert sx.metrics.entropy_batch_mixing(fitted) == expected
    with pytest.raises(ValueError, match=r"No labels_key is registered: name a column of adata.obs, .* 'batch', "):
        sx.metrics.knn_purity(fitted)
    with pytest.raises(KeyError, match=r"'nope' is not in adata.obs, which has: 'batch', 'cell_type'"):
        sx.metrics.knn_purity(fitted, "nope")


def test_the_latent_space_of_the_last_fit_must_be_there(fitted, cells, name):
    with pytest.raises(KeyError, match=r"of the last fit, 'X_scvi', is not in adata.obsm: call scvi_ext.tl.get_latent"):
        value(fitted, name, use_rep=None)
    with pytest.raises(KeyError, match=r"There is no fit whose latent space .* use_rep=...: 'X_a', 'X_b', 'protein'"):
        value(cells, name, use_rep=None)
    with pytest.raises(KeyError, match=r"'X_c' is not in adata.obsm, which has: 'X_a', 'X_b', 'protein'"):
        value(cells, name, use_rep="X_c")


# ---- cells that take no part ---------------------------------------------------------------------------------------


def test_cells_without_a_value_take_no_part(cells, name, logged):
    column = BY_COLUMN[name]
    cells.obs.loc[cells.obs_names[::5], column] = np.nan
    cells.obsm["X_a"][1::10, 2] = np.nan
    rest = cells[cells.obs[column].notna() & ~np.isnan(cells.obsm["X_a"]).any(axis=1)].copy()
    assert value(cells, name) == pytest.approx(value(rest, name), rel=FLOAT64["rtol"])
    assert f"left out {N - len(rest)} of {N} cells, without a value of {column!r} (adata.obs) or" in logged()


def test_latents_of_some_cells(fitted):
    sx.tl.get_latent(fitted, indices=np.arange(0, 201, 2))
    some = fitted[::2].copy()
    assert sx.metrics.entropy_batch_mixing(fitted) == pytest.approx(
        sx.metrics.entropy_batch_mixing(some), rel=FLOAT64["rtol"]
    )


def test_unlabelled_cells_take_no_part(cells):
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.rename_categories({"t1": "unknown"})
    rest = cells[cells.obs["cell_type"] != "unknown"].copy()
    before = [value(cells, "knn_purity"), sx.metrics.entropy_from_indices(cells, "cell_type")]
    sx.pp.setup_anndata(cells, labels_key="cell_type", unlabeled_category="unknown")
    after = [sx.metrics.knn_purity(cells, use_rep="X_a"), sx.metrics.entropy_from_indices(cells)]
    assert after == pytest.approx([value(rest, "knn_purity"), sx.metrics.entropy_from_indices(rest, "cell_type")])
    assert before != pytest.approx(after)


def test_too_few_cells(cells, name):
    cells.obs["empty"] = np.nan
    with pytest.raises(ValueError, match=r"adata.obs\['empty'\] has no value in any of 150 cells"):
        value(cells, name, "empty")
    cells.obsm["X_a"][:] = np.nan
    with pytest.raises(ValueError, match=r"0 of 150 cells can be used|None of 150 cells can be used"):
        value(cells, name)
    for one in (cells[:1], cells[:1].copy()):
        with pytest.raises(ValueError, match=r"1 of 1 cells can be used: a single cell has no neighbours|1 cells have"):
            value(one, name, use_rep="X_b")


def test_three_cells(cells):
    few = cells[:3].copy()
    few.obs["batch"], few.obs["cell_type"] = ["b0", "b0", "b1"], ["t0", "t0", "t1"]
    # All others are neighbours: two cells with one of each batch, one with two of the other.
    assert value(few, "entropy_batch_mixing") == pytest.approx(2 / 3 * np.log(2))
    assert value(few, "knn_purity") == pytest.approx((1 / 2 + 0) / 2)


# ---- neighbours ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=BY_NEIGHBORS)
def by_neighbors(request) -> str:
    return request.param


def test_the_number_of_neighbors(cells, by_neighbors, logged):
    assert value(cells, by_neighbors, n_neighbors=5) != value(cells, by_neighbors)
    default = {"entropy_batch_mixing": 50, "knn_purity": 30}[by_neighbors]
    assert value(cells, by_neighbors, n_neighbors=default) == value(cells, by_neighbors)
    assert value(cells[:20], by_neighbors) == value(cells[:20], by_neighbors, n_neighbors=19)
    with pytest.raises(ValueError, match=r"n_neighbors=150 must be below the number of cells that can be used, .* 150"):
        value(cells, by_neighbors, n_neighbors=150)
    with pytest.raises(TypeError, match=r"n_neighbors=5.0 is a float"):
        value(cells, by_neighbors, n_neighbors=5.0)
    said = logged()
    assert f"{default} neighbours of each of 150 cells in 'X_a' (adata.obsm), exact search" in said
    assert "19 neighbours of each of 20 cells" in said


def test_the_log_says_when_the_search_is_approximate(cells, by_neighbors, logged, monkeypatch):
    monkeypatch.setattr(arrays, "EXACT_UP_TO", 1)
    seeds = []
    exact = arrays.without_self(np.ones((N, N)))
    monkeypatch.setattr(arrays, "nearest_neighbors", lambda x, n_neighbors, *, seed: seeds.append(seed) or exact)
    value(cells, by_neighbors, seed=5)
    assert seeds == [5]
    assert "approximate search by pynndescent" in logged()


@pytest.mark.parametrize("with_self", [False, True])  # scanpy stores the cell itself if pynndescent has searched
def test_the_graph_of_scanpy_is_used(cells, by_neighbors, logged, with_self):
    sc.pp.neighbors(cells, n_neighbors=16, use_rep="X_a", key_added="graph")
    if with_self:
        rows, columns = cells.obsp["graph_distances"].nonzero()
        entries = (np.r_[cells.obsp["graph_distances"].data, np.zeros(N)], (np.r_[rows, :N], np.r_[columns, :N]))
        cells.obsp["graph_distances"] = sp.csr_matrix(entries)
    expected = value(cells, by_neighbors, n_neighbors=15)
    assert value(cells, by_neighbors, neighbors_key="graph") == pytest.approx(expected, rel=FLOAT64["rtol"])
    assert "15 neighbours of each of 150 cells, from 'graph_distances' (adata.obsp)" in logged()
    expected = value(cells, by_neighbors, n_neighbors=6)
    few = value(cells, by_neighbors, neighbors_key="graph", n_neighbors=6)
    assert few == pytest.approx(expected, rel=FLOAT64["rtol"])
    with pytest.raises(ValueError, match=r"n_neighbors=16, but 'graph_distances' .* holds 15 neighbours .*=17"):
        value(cells, by_neighbors, neighbors_key="graph", n_neighbors=16)


def test_a_graph_among_cells_that_have_a_value(cells):
    sc.pp.neighbors(cells, n_neighbors=16, use_rep="X_a")
    cells.obs.loc[cells.obs_names[::4], "cell_type"] = np.nan
    known = cells.obs["cell_type"].notna().to_numpy()
    labels = cells.obs["cell_type"].astype(object).to_numpy()
    graph = cells.obsp["distances"]
    near = [[j for j in graph.indices[graph.indptr[i] : graph.indptr[i + 1]] if known[j]] for i in range(N)]
    shares = pd.Series({i: np.mean(labels[near[i]] == labels[i]) for i in range(N) if known[i] and near[i]})
    expected = shares.groupby(labels[shares.index]).mean().mean()
    assert value(cells, "knn_purity", neighbors_key="neighbors") == pytest.approx(expected, rel=FLOAT64["rtol"])


def test_a_graph_of_a_subset_has_fewer_neighbors(cells, logged):
    sc.pp.neighbors(cells, n_neighbors=16, use_rep="X_a")
    some = cells[::3].copy()
    assert 0 < value(some, "entropy_batch_mixing", neighbors_key="neighbors") < np.log(3)
    held = np.diff(some.obsp["distances"].indptr)
    assert f"{held.min()} to {held.max()} neighbours of each of 50 cells" in logged()
    with pytest.raises(ValueError, match=f"holds {held.min()} to {held.max()} neighbours"):
        value(some, "entropy_batch_mixing", neighbors_key="neighbors", n_neighbors=15)


def test_graphs_that_cannot_be_used(cells, by_neighbors):
    with pytest.raises(KeyError, match=r"'neighbors' is not in adata.uns, which has: none"):
        value(cells, by_neighbors, neighbors_key="neighbors")
    cells.uns["other"] = {"a": 1}
    with pytest.raises(ValueError, match=r"adata.uns\['other'\] has no 'distances_key': it is not what scanpy"):
        value(cells, by_neighbors, neighbors_key="other")
    sc.pp.neighbors(cells, n_neighbors=5, use_rep="X_a")
    with pytest.raises(ValueError, match="use_rep='X_a' has no effect beside neighbors_key='neighbors'"):
        value(cells, by_neighbors, neighbors_key="neighbors", use_rep="X_a")
    del cells.obsp["distances"]
    with pytest.raises(KeyError, match=r"'distances' is not in adata.obsp, which has: 'connectivities'"):
        value(cells, by_neighbors, neighbors_key="neighbors")


# ---- options -------------------------------------------------------------------------------------------------------


def test_pools_have_a_size_of_their_own(cells):
    with pytest.raises(ValueError, match="n_samples_per_pool=10 has no effect: there are no pools without n_pools"):
        value(cells, "entropy_batch_mixing", n_samples_per_pool=10)
    for option in ("n_pools", "n_samples_per_pool"):
        with pytest.raises(ValueError, match=f"{option}=0 must be 1 or more"):
            value(cells, "entropy_batch_mixing", **{"n_pools": 2, option: 0})
    few, many = (value(cells, "entropy_batch_mixing", n_pools=50, n_samples_per_pool=n) for n in (1, 1000))
    assert few != many
    assert many == pytest.approx(value(cells, "entropy_batch_mixing"), rel=0.02)


def test_the_seed_of_the_settings(cells, monkeypatch):
    expected = value(cells, "entropy_batch_mixing", n_pools=2, seed=7)
    assert value(cells, "entropy_batch_mixing", n_pools=2) != expected
    monkeypatch.setattr(sx.settings, "seed", 7)
    assert value(cells, "entropy_batch_mixing", n_pools=2) == expected


def test_wrong_options_are_refused_before_anything_is_computed(cells, name, logged):
    with pytest.raises(TypeError, match="seed='a' is a str"):
        value(cells, name, seed="a")
    with pytest.raises(TypeError, match="adata is a list"):
        value([], name)
    with pytest.raises(ValueError, match="method='knn' is not one of"):
        value(cells, "clustering_scores", method="knn")
    with pytest.raises(ValueError, match="n_init=0 must be 1 or more"):
        value(cells, "clustering_scores", n_init=0)
    assert logged() == ""


# ---- two representations -------------------------------------------------------------------------------------------


def test_overlap_with_proteins(cells):
    plain = sx.metrics.nn_overlap(cells, use_rep="X_a", other_rep="protein", n_neighbors=10)
    logs = sx.metrics.nn_overlap(cells, use_rep="X_a", other_rep="protein", other_transform="clr", n_neighbors=10)
    assert plain != logs
    cells.obsm["clr"] = arrays.clr(cells.obsm["protein"])
    assert sx.metrics.nn_overlap(cells, use_rep="X_a", other_rep="clr", n_neighbors=10) == logs
    with pytest.raises(KeyError, match=r"No proteins are registered: name the representation .* other_rep"):
        sx.metrics.nn_overlap(cells, use_rep="X_a")
    sx.pp.setup_anndata(cells, protein_obsm_key="protein")
    assert sx.metrics.nn_overlap(cells, use_rep="X_a", n_neighbors=10) == plain


def test_overlap_leaves_out_cells_without_values(cells, logged):
    cells.obsm["X_a"][:10, 0] = np.nan
    cells.obsm["X_b"][5:20, 1] = np.nan
    expected = sx.metrics.nn_overlap(cells[20:].copy(), use_rep="X_a", other_rep="X_b")
    assert sx.metrics.nn_overlap(cells, use_rep="X_a", other_rep="X_b") == expected
    assert "left out 20 of 150 cells, without values in both" in logged()
    assert "100 neighbours of each of 130 cells in 'X_b' (adata.obsm), exact search" in logged()


def test_overlap_that_means_nothing_is_refused(cells):
    with pytest.raises(ValueError, match="use_rep and other_rep are both 'X_a'"):
        sx.metrics.nn_overlap(cells, use_rep="X_a", other_rep="X_a")
    with pytest.raises(KeyError, match=r"'X_c' is not in adata.obsm"):
        sx.metrics.nn_overlap(cells, use_rep="X_a", other_rep="X_c")
    with pytest.raises(ValueError, match="other_transform='log' is not one of 'clr'"):
        sx.metrics.nn_overlap(cells, use_rep="X_a", other_rep="X_b", other_transform="log")
    with pytest.raises(ValueError, match="counts are negative"):
        sx.metrics.nn_overlap(cells, use_rep="X_a", other_rep="X_b", other_transform="clr")
