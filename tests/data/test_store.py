from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_ext._contract import DataSummary, ProteinSummary
from scvi_ext.data.registry import Registry
from scvi_ext.data.store import MIN_LIBRARY_VARIANCE, CellStore, resolve_indices

N, G, P = 40, 12, 3
ALL = frozenset({"labels", "size_factor", "categorical", "continuous", "protein"})
REGISTRY = Registry(
    layer="counts",
    batch_key="batch",
    labels_key="label",
    unlabeled_category="?",
    size_factor_key="size",
    categorical_covariate_keys=("sex", "site"),
    continuous_covariate_keys=("age", "mito"),
    protein_obsm_key="protein",
    protein_names=("p0", "p1", "p2"),
    batch_categories=("y", "x"),
    labels_categories=("B", "T"),
    covariate_categories=(("f", "m"), ("1", "2", "3")),
)


@pytest.fixture
def adata() -> ad.AnnData:
    rng = np.random.default_rng(3)
    counts = rng.poisson(1.5, (N, G)) + 1
    obs = pd.DataFrame(
        {
            "batch": rng.choice(["x", "y"], N),
            "label": pd.Categorical(rng.choice(["T", "B", "?"], N)),
            "size": rng.uniform(0.5, 2.0, N),
            "sex": rng.choice(["f", "m"], N),
            "site": rng.integers(1, 4, N),
            "age": rng.integers(20, 80, N),
            "mito": rng.uniform(0, 1, N),
        },
        index=[f"c{i}" for i in range(N)],
    )
    return ad.AnnData(
        np.log1p(counts),
        obs=obs,
        var=pd.DataFrame(index=[f"g{i}" for i in range(G)]),
        layers={"counts": sp.csr_matrix(counts)},
        obsm={"protein": pd.DataFrame(rng.poisson(9.0, (N, P)), index=obs.index, columns=["p0", "p1", "p2"])},
    )


def counts_of(adata: ad.AnnData) -> np.ndarray:
    return adata.layers["counts"].toarray()


def test_columns(adata):
    store = CellStore.from_adata(adata, REGISTRY, columns=ALL)
    obs = adata.obs
    assert (store.n_cells, store.n_genes) == (N, G)
    assert type(store.counts) is sp.csr_matrix
    assert store.counts.dtype == np.float32
    np.testing.assert_array_equal(store.counts.toarray(), counts_of(adata))
    expected = {
        "batch_index": (obs["batch"] == "x").to_numpy(dtype=np.int64),
        "labels": obs["label"].map({"B": 0, "T": 1, "?": -1}).to_numpy(dtype=np.int64),
        "size_factor": obs["size"].to_numpy(dtype=np.float32),
        "categorical": np.column_stack([(obs["sex"] == "m").astype(np.int64), obs["site"] - 1]),
        "continuous": obs[["age", "mito"]].to_numpy(dtype=np.float32),
        "protein": adata.obsm["protein"].to_numpy(dtype=np.float32),
    }
    for name, values in expected.items():
        found = getattr(store, name)
        assert found.dtype == values.dtype, name
        assert found.shape == values.shape, name
        np.testing.assert_array_equal(found, values)
    assert store.obs_names.equals(adata.obs_names)


def test_only_the_columns_asked_for(adata):
    store = CellStore.from_adata(adata, REGISTRY, columns=frozenset({"labels"}))
    assert store.labels is not None
    assert all(getattr(store, name) is None for name in ALL - {"labels"})


def test_nothing_registered(adata):
    store = CellStore.from_adata(adata, Registry(layer="counts"), columns=ALL)
    assert all(getattr(store, name) is None for name in ALL)
    np.testing.assert_array_equal(store.batch_index, np.zeros(N, dtype=np.int64))


def test_chosen_cells_keep_their_order_in_every_column(adata):
    rows = np.random.default_rng(4).permutation(N)[:15]
    store = CellStore.from_adata(adata, REGISTRY, indices=rows, columns=ALL)
    whole = CellStore.from_adata(adata, REGISTRY, columns=ALL)
    np.testing.assert_array_equal(store.counts.toarray(), whole.counts.toarray()[rows])
    for name in ("batch_index", *ALL):
        np.testing.assert_array_equal(getattr(store, name), getattr(whole, name)[rows])
    assert list(store.obs_names) == [f"c{i}" for i in rows]


def test_genes_are_found_by_name(adata):
    shuffled = adata[:, np.random.default_rng(5).permutation(G)].copy()
    wanted = ["g7", "g0", "g11"]
    for source in (adata, shuffled, shuffled[3:9]):
        store = CellStore.from_adata(source, Registry(layer="counts"), var_names=wanted)
        expected = adata[source.obs_names, wanted].layers["counts"].toarray()
        np.testing.assert_array_equal(store.counts.toarray(), expected)
        assert store.counts.has_canonical_format


def test_missing_genes_are_counted_and_named(adata):
    with pytest.raises(KeyError, match=r"7 of the 9 genes of the fit.*'h0', 'h1', 'h2', 'h3', 'h4' and 2 more"):
        CellStore.from_adata(adata, Registry(), var_names=["g0", "g1", *(f"h{i}" for i in range(7))])


def test_duplicate_genes_are_refused(adata):
    adata.var_names = ["g0", "g0", *adata.var_names[2:]]
    with pytest.raises(ValueError, match=r"1 names more than once: 'g0'.*var_names_make_unique"):
        CellStore.from_adata(adata, Registry(), var_names=["g0"])


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_backed_is_in_memory(adata, kind, tmp_path):
    adata.X = kind(counts_of(adata).astype(np.float32))
    registry = Registry(**{**vars(REGISTRY), "layer": None})
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    rows = np.random.default_rng(6).integers(0, N, 60)
    arguments = {"var_names": ["g9", "g2", "g3"], "indices": rows, "columns": ALL}
    ours = CellStore.from_adata(backed, registry, **arguments)
    assert ours.fingerprint() == CellStore.from_adata(adata, registry, **arguments).fingerprint()
    np.testing.assert_array_equal(ours.counts.toarray(), counts_of(adata)[rows][:, [9, 2, 3]])


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([3, 1, 1], [3, 1, 1]),
        (np.array([-1, 0], dtype=np.int32), [N - 1, 0]),
        (np.arange(N) < 2, [0, 1]),
        (slice(30, None, 5), [30, 35]),
        (["c9", "c2"], [9, 2]),
        (pd.Index(["c9", "c2"]), [9, 2]),
        (np.array(["c9"]), [9]),
        ("c9", [9]),
        (7, [7]),
        ([], []),
        (np.zeros(N, dtype=bool), []),
    ],
)
def test_indices(adata, indices, expected):
    rows = resolve_indices(adata, indices)
    assert rows.dtype == np.int64
    assert rows.tolist() == expected


def test_a_mask_may_be_a_column(adata):
    mask = adata.obs["sex"] == "f"
    assert resolve_indices(adata, mask).tolist() == np.flatnonzero(mask).tolist()
    assert resolve_indices(adata, None) is None


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, N, N + 3], IndexError, rf"2 row numbers outside 0 to {N - 1}, the first is {N}"),
        ([-N - 1], IndexError, "1 row numbers outside"),
        (np.ones(N - 1, dtype=bool), ValueError, rf"mask in indices has {N - 1} entries and adata has {N} cells"),
        (np.ones((2, 2), dtype=int), ValueError, r"shape \(2, 2\)"),
        (["c1", "d5"], KeyError, r"1 of 2 names in indices are not in adata\.obs_names: 'd5'"),
        ([0.5], TypeError, "dtype float64; row numbers, a mask"),
    ],
)
def test_bad_indices(adata, indices, error, message):
    with pytest.raises(error, match=message):
        resolve_indices(adata, indices)


def test_a_mask_in_another_order_is_refused(adata):
    with pytest.raises(ValueError, match=r"not adata\.obs_names in the same order"):
        resolve_indices(adata, (adata.obs["sex"] == "f").iloc[::-1])


def test_names_that_are_not_unique_are_refused(adata):
    adata.obs_names = ["c0", "c0", *adata.obs_names[2:]]
    with pytest.raises(ValueError, match="obs_names has duplicates"):
        resolve_indices(adata, ["c0"])
    assert resolve_indices(adata, [1]).tolist() == [1]


@pytest.mark.parametrize(
    ("column", "value", "error", "message"),
    [
        ("size", 0.0, ValueError, r"adata\.obs\['size'\] is not positive in 1 of 40 cells, first in 'c5'"),
        ("size", -1.0, ValueError, "is not positive"),
        ("size", np.inf, ValueError, "is missing, infinite or beyond float32"),
        ("mito", np.nan, ValueError, r"adata\.obs\['mito'\] is missing.*in 1 of 40 cells, first in 'c5'"),
        ("mito", 1e300, ValueError, "beyond float32"),
    ],
)
def test_bad_numbers(adata, column, value, error, message):
    adata.obs.loc["c5", column] = value
    with pytest.raises(error, match=message):
        CellStore.from_adata(adata, REGISTRY, columns=ALL)


def test_words_as_covariate(adata):
    adata.obs["mito"] = "high"
    with pytest.raises(TypeError, match=r"adata\.obs\['mito'\] has dtype .*; numbers are needed.*to_numeric"):
        CellStore.from_adata(adata, REGISTRY, columns=ALL)


def test_nullable_numbers(adata):
    adata.obs["age"] = pd.array(adata.obs["age"], dtype="Int64")
    CellStore.from_adata(adata, REGISTRY, columns=ALL)
    adata.obs.loc["c1", "age"] = pd.NA
    with pytest.raises(ValueError, match="'age'] is missing"):
        CellStore.from_adata(adata, REGISTRY, columns=ALL)


def test_proteins_are_found_by_name(adata):
    whole = CellStore.from_adata(adata, REGISTRY, columns=ALL).protein
    adata.obsm["protein"] = adata.obsm["protein"][["p2", "p0", "p1"]].assign(extra=1)
    np.testing.assert_array_equal(CellStore.from_adata(adata, REGISTRY, columns=ALL).protein, whole)
    adata.obsm["protein"] = adata.obsm["protein"].drop(columns="p1")
    with pytest.raises(KeyError, match=r"lacks 1 of 3 proteins: 'p1'"):
        CellStore.from_adata(adata, REGISTRY, columns=ALL)


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix])
def test_proteins_without_names(adata, kind):
    values = adata.obsm["protein"].to_numpy()
    adata.obsm["protein"] = kind(values)
    np.testing.assert_array_equal(CellStore.from_adata(adata, REGISTRY, columns=ALL).protein, values)
    adata.obsm["protein"] = kind(values[:, :2])
    with pytest.raises(ValueError, match="has 2 columns; 3 proteins were registered"):
        CellStore.from_adata(adata, REGISTRY, columns=ALL)


def test_unknown_batch_is_refused(adata):
    adata.obs["batch"] = "z"
    with pytest.raises(ValueError, match=r"unknown categories in 40 of 40 cells: 'z'\. Known ones: 'y', 'x'"):
        CellStore.from_adata(adata, REGISTRY)


def test_summary(adata):
    store = CellStore.from_adata(adata, REGISTRY)
    library = np.log(counts_of(adata).sum(1))
    groups = [library[store.batch_index == batch] for batch in (0, 1)]
    assert store.summary(REGISTRY) == DataSummary(
        n_input=G,
        n_batch=2,
        n_labels=2,
        n_cats_per_cov=(2, 3),
        n_continuous_cov=2,
        library_log_means=tuple(float(group.mean()) for group in groups),
        library_log_vars=tuple(float(group.var()) for group in groups),
        proteins=ProteinSummary(P, ((True,) * P,) * 2, ((0.0,) * P,) * 2, ((1.0,) * P,) * 2),  # were not read
    )


def test_summary_of_odd_batches():
    counts = np.array([[3, 1], [10, 6], [0, 0], [5, 0], [7, 7]], dtype=np.float32)
    adata = ad.AnnData(counts, obs=pd.DataFrame({"b": ["two", "two", "two", "one", "empty"]}, index=list("abcde")))
    adata.X[4] = 0
    registry = Registry(batch_key="b", batch_categories=("two", "one", "empty"))
    summary = CellStore.from_adata(adata, registry).summary(registry)
    library = np.log([4.0, 16.0, 5.0])
    np.testing.assert_allclose(summary.library_log_means, [np.log(8), np.log(5), library.mean()], rtol=1e-12)
    np.testing.assert_allclose(
        summary.library_log_vars, [np.log(2) ** 2, MIN_LIBRARY_VARIANCE, library.var()], rtol=1e-12
    )


def test_summary_without_batches(adata):
    registry = Registry(layer="counts")
    summary = CellStore.from_adata(adata, registry).summary(registry)
    library = np.log(counts_of(adata).sum(1))
    assert (summary.n_batch, summary.n_labels, summary.n_cats_per_cov, summary.n_continuous_cov) == (1, 0, (), 0)
    np.testing.assert_allclose(summary.library_log_means, [library.mean()], rtol=1e-12)


def test_fingerprint_knows_the_data_and_not_its_storage(adata):
    first = CellStore.from_adata(adata, REGISTRY, columns=ALL).fingerprint()
    adata.layers["counts"] = counts_of(adata).astype(np.float64)
    assert CellStore.from_adata(adata, REGISTRY, columns=ALL).fingerprint() == first
    others = [CellStore.from_adata(adata, REGISTRY, columns=ALL, indices=np.arange(N)[::-1]).fingerprint()]
    others.append(CellStore.from_adata(adata, REGISTRY, columns=ALL - {"labels"}).fingerprint())
    adata.layers["counts"][0, 0] += 1
    others.append(CellStore.from_adata(adata, REGISTRY, columns=ALL).fingerprint())
    adata.layers["counts"][0, 0] -= 1
    adata.obs.loc["c1", "batch"] = "x" if adata.obs.loc["c1", "batch"] == "y" else "y"
    others.append(CellStore.from_adata(adata, REGISTRY, columns=ALL).fingerprint())
    assert len({first, *others}) == 5
