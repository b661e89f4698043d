"""Genes imputed by neighbours, and how well imputed genes follow the measured ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from _tolerances import FLOAT32, FLOAT64
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

import scvi_ext as sx
from scvi_ext.metrics import arrays

if TYPE_CHECKING:
    import anndata as ad


def by_brute_force(x: np.ndarray, expression: np.ndarray, x_new: np.ndarray, k: int) -> np.ndarray:
    distances = cdist(x_new, x)
    out = np.empty((len(x_new), expression.shape[1]))
    for i, row in enumerate(distances):
        near = np.argsort(row)[:k]
        out[i] = np.average(expression[near], axis=0, weights=1 / row[near])
    return out


@pytest.fixture
def datasets(make_counts) -> tuple[ad.AnnData, ad.AnnData, ad.AnnData]:
    """Cells with 20 genes, and two references with 60 and 30, half of these in common with nobody."""
    parts = [make_counts(n_cells=n, seed=n) for n in (30, 70, 50)]
    parts[2].var_names = [f"gene{i}" if i < 45 else f"other{i}" for i in range(60)]
    genes = [slice(0, 20), slice(0, 60), slice(30, 60)]
    rng = np.random.default_rng(0)
    parts = [part[:, own].copy() for part, own in zip(parts, genes, strict=True)]
    for part in parts:
        part.obsm["X_rep"] = rng.normal(size=(part.n_obs, 4))
    return tuple(parts)


@pytest.mark.parametrize("k", [1, 4, 70])
def test_it_is_the_mean_of_neighbours_weighted_by_the_inverse_of_distance(k):
    rng = np.random.default_rng(1)
    x, expression, x_new = rng.normal(size=(70, 3)), rng.gamma(1, 1, (70, 5)), rng.normal(size=(11, 3))
    found = arrays.proximity_imputation(x, expression, x_new, k)
    np.testing.assert_allclose(found, by_brute_force(x, expression, x_new, k), **FLOAT64)
    np.testing.assert_allclose(arrays.proximity_imputation(x, expression, x[:3], k), expression[:3], **FLOAT64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.ones((7, 2))}, "x has 2 units and x_new 3"),
        ({"x": np.ones(7)}, r"x has the shape \(7,\)"),
        ({"x": np.full((7, 3), np.inf)}, "7 of 7 cells have values of x that are not finite"),
        ({"expression": np.ones((6, 4))}, "x has 7 cells and expression 6"),
        ({"expression": np.ones(7)}, r"expression has the shape \(7,\)"),
        ({"expression": np.full((7, 4), np.nan)}, "values of expression that are not finite"),
        ({"x_new": np.array([[0.0, 1.0, np.nan]])}, "1 of 1 cells have values of x_new that are not finite"),
        ({"n_neighbors": 8}, "of 7 cells only is known: ask for fewer"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(changed, message):
    given = {"x": np.ones((7, 3)), "expression": np.ones((7, 4)), "x_new": np.ones((2, 3))}
    with pytest.raises(ValueError, match=message):
        arrays.proximity_imputation(**given | changed)


def test_arrays_may_be_sparse():
    rng = np.random.default_rng(0)
    x, x_new = rng.normal(size=(9, 2)), rng.normal(size=(5, 2))
    expression = rng.poisson(0.5, (9, 4)).astype(float)
    found = arrays.proximity_imputation(x, sp.csc_matrix(expression), x_new)
    np.testing.assert_array_equal(found, arrays.proximity_imputation(x, expression, x_new))
    found = arrays.imputation_correlation(expression + x[:, :1], sp.csr_array(expression))
    np.testing.assert_array_equal(found, arrays.imputation_correlation(expression + x[:, :1], expression))


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_genes_of_a_reference_that_are_missing_are_imputed(datasets, kind):
    adata, reference, _ = datasets
    expression = reference.X.toarray()
    reference.X = kind(expression)
    assert sx.metrics.proximity_imputation(adata, reference, use_rep="X_rep") is None
    table = adata.obsm["proximity_imputed"]
    assert list(table.columns) == list(reference.var_names[20:])
    assert (table.dtypes == np.float32).all()
    expected = by_brute_force(reference.obsm["X_rep"], expression[:, 20:], adata.obsm["X_rep"], 4)
    np.testing.assert_allclose(table, expected, **FLOAT32)


def test_a_gene_comes_from_all_references_that_have_it(datasets):
    adata, first, second = datasets
    genes = ["other50", "gene7", "gene33"]
    sx.metrics.proximity_imputation(adata, [first, second], use_rep="X_rep", gene_list=genes, n_neighbors=3)
    table = adata.obsm["proximity_imputed"]
    named = {"rna": first, "other": second}
    sx.metrics.proximity_imputation(adata, named, use_rep="X_rep", gene_list=genes, n_neighbors=3, key_added="by_name")
    np.testing.assert_array_equal(adata.obsm["by_name"], table)
    assert list(table.columns) == genes
    both = np.concatenate([first.obsm["X_rep"], second.obsm["X_rep"]])
    sources = {
        "other50": (second.obsm["X_rep"], second[:, "other50"].X.toarray()),
        "gene7": (first.obsm["X_rep"], first[:, "gene7"].X.toarray()),
        "gene33": (both, np.concatenate([part[:, "gene33"].X.toarray() for part in (first, second)])),
    }
    for gene, (x, expression) in sources.items():
        expected = by_brute_force(x, expression, adata.obsm["X_rep"], 3)
        np.testing.assert_allclose(table[[gene]], expected, **FLOAT32)


def test_a_layer_and_cells_without_a_place(datasets):
    adata, reference, _ = datasets
    reference.layers["log"] = reference.X.log1p()
    adata.obsm["X_rep"][[3, 5]] = np.nan
    reference.obsm["X_rep"][:10] = np.nan
    copy = sx.metrics.proximity_imputation(
        adata, reference, use_rep="X_rep", layer="log", gene_list="gene50", key_added="mine", copy=True
    )
    assert "mine" not in adata.obsm
    table = copy.obsm["mine"]
    assert np.flatnonzero(table["gene50"].isna()).tolist() == [3, 5]
    known, there = reference[10:], ~np.isin(np.arange(30), [3, 5])
    expression = known[:, "gene50"].layers["log"].toarray()
    expected = by_brute_force(known.obsm["X_rep"], expression, adata.obsm["X_rep"][there], 4)
    np.testing.assert_allclose(table[there], expected, **FLOAT32)


def test_the_latent_space_of_a_joint_fit_is_the_default(datasets, tmp_path):
    adata, reference, _ = datasets
    for part in (adata, reference):
        sx.pp.setup_anndata(part)
    sx.tl.fit({"spatial": adata, "rna": reference}, "gimvi", max_epochs=2, n_latent=3, progress=False)
    with pytest.raises(KeyError, match=r"call scvi_ext\.tl\.get_latent"):
        sx.metrics.proximity_imputation(adata, reference)
    sx.tl.get_latent(adata)
    with pytest.raises(KeyError, match=r"reference\.obsm"):
        sx.metrics.proximity_imputation(adata, reference)
    sx.tl.get_latent(reference)
    sx.metrics.proximity_imputation(adata, reference)
    expression = reference.X.toarray()[:, 20:]
    expected = by_brute_force(reference.obsm["X_gimvi"], expression, adata.obsm["X_gimvi"], 4)
    np.testing.assert_allclose(adata.obsm["proximity_imputed"], expected, rtol=1e-4, atol=1e-4)  # float32 latents
    saved = tmp_path / "reference.h5ad"
    reference.write_h5ad(saved)
    sx.metrics.proximity_imputation(adata, {"rna": sc.read_h5ad(saved)}, key_added="of_file")
    np.testing.assert_array_equal(adata.obsm["of_file"], adata.obsm["proximity_imputed"])
    sx.tl.fit({"spatial": adata.copy(), "rna": reference}, "gimvi", max_epochs=3, n_latent=3, progress=False)
    sx.tl.get_latent(reference)
    with pytest.raises(ValueError, match=r"adata and reference\['rna'\] hold different fits called 'gimvi'"):
        sx.metrics.proximity_imputation(adata, {"rna": reference})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gene_list": ["gene1", "CD3"]}, KeyError, "1 of 2 genes .*'CD3'"),
        ({"gene_list": []}, ValueError, "gene_list is empty"),
        ({"gene_list": ["gene1", "gene2", "gene1"]}, ValueError, "more than once: 'gene1'"),
        ({"n_neighbors": 71}, ValueError, r"40 genes \('gene20', .*in 70 cells only .* ask for fewer"),
        ({"n_neighbors": 0}, ValueError, "n_neighbors"),
        ({"use_rep": "X_pca"}, KeyError, "X_pca"),
        ({"layer": "counts"}, KeyError, r"'counts' is not in reference\.layers"),
        ({"key_added": "X_rep"}, ValueError, "where neighbours are searched"),
        ({"reference": None}, TypeError, "reference is a NoneType"),
        ({"reference": "rna.h5ad"}, TypeError, "reference is a str"),
        ({"reference": ["rna.h5ad"]}, TypeError, r"reference\[0\] is a str"),
        ({"reference": []}, ValueError, "reference is empty"),
        ({"reference": {}}, ValueError, "reference is empty"),
    ],
)
def test_what_cannot_be_imputed_is_refused(datasets, options, error, message):
    adata, reference, _ = datasets
    with pytest.raises(error, match=message):
        sx.metrics.proximity_imputation(adata, **{"reference": reference, "use_rep": "X_rep"} | options)
    assert set(adata.obsm) == {"X_rep"}


def test_a_reference_that_does_not_suit_is_called_by_its_name(datasets):
    adata, reference, other = datasets
    narrow, repeated, empty = (other.copy() for _ in range(3))
    narrow.obsm["X_rep"] = narrow.obsm["X_rep"][:, :3]
    repeated.var_names = [repeated.var_names[1], *repeated.var_names[1:]]
    empty.X = None
    for second, error, message in [
        (narrow, ValueError, r"reference\['b'\]\.obsm\['X_rep'\] has 3 units and adata\.obsm\['X_rep'\] 4"),
        (repeated, ValueError, r"reference\['b'\]\.var_names has 1 names more than once"),
        (empty, TypeError, r"reference\['b'\]\.X is None"),
        (adata, ValueError, r"reference\['b'\] is adata itself"),
    ]:
        for copy in (False, True):
            with pytest.raises(error, match=message):
                sx.metrics.proximity_imputation(adata, {"a": reference, "b": second}, use_rep="X_rep", copy=copy)
    assert set(adata.obsm) == {"X_rep"}


def test_correlation_is_that_of_scipy_gene_by_gene():
    rng = np.random.default_rng(2)
    imputed, measured = rng.gamma(1, 1, (40, 6)), rng.poisson(1.0, (40, 6))
    measured[:, 4] = 0
    found = arrays.imputation_correlation(imputed, measured)
    expected = [spearmanr(imputed[:, j], measured[:, j]).statistic for j in (0, 1, 2, 3, 5)]
    np.testing.assert_allclose(found[[0, 1, 2, 3, 5]], expected, **FLOAT64)
    assert np.isnan(found[4])
    imputed[3, 0] = np.nan
    one_nan = arrays.imputation_correlation(imputed, measured)
    assert np.isnan(one_nan[0])
    np.testing.assert_array_equal(one_nan[1:], found[1:])
    with pytest.raises(ValueError, match=r"measured has the shape \(40,\)"):
        arrays.imputation_correlation(imputed, measured[:, 0])
    with pytest.raises(ValueError, match="must be the same"):
        arrays.imputation_correlation(imputed, measured[:, :3])


def test_cells_and_genes_are_found_by_name(datasets):
    adata, reference, _ = datasets
    truth = reference[:30].copy()
    truth.obs_names = adata.obs_names
    truth.var_names = [f"HLA/{i}" if i == 40 else name for i, name in enumerate(truth.var_names)]
    values = np.random.default_rng(3).gamma(1, 1, (30, 3))
    adata.obsm["mine"] = pd.DataFrame(values, index=adata.obs_names, columns=["gene50", "unknown", "HLA|40"])
    adata.obsm["mine"].iloc[4] = np.nan
    there = np.arange(30) != 4
    shuffled = truth[np.random.default_rng(4).permutation(30), np.arange(60)[::-1]]
    found = sx.metrics.imputation_correlation(adata, shuffled, imputed_key="mine")
    assert list(found.index) == ["gene50", "HLA|40"]
    for j, gene in {0: "gene50", 2: "HLA/40"}.items():
        counts = truth[:, gene].X.toarray().ravel()
        expected = spearmanr(values[there, j], counts[there]).statistic
        np.testing.assert_allclose(found.iloc[min(j, 1)], expected, **FLOAT64)


def test_correlations_that_make_no_sense_are_refused(datasets):
    adata, reference, _ = datasets
    table = pd.DataFrame(np.ones((30, 1)), index=adata.obs_names, columns=["gene50"])
    adata.obsm["mine"], adata.obsm["nothing"] = table, table * np.nan
    adata.obsm["unknown"] = table.rename(columns={"gene50": "CD3"})
    for key, error, message in [
        ("absent", KeyError, "'absent' is not in adata.obsm"),
        ("X_rep", TypeError, "is a ndarray"),
        ("unknown", ValueError, "No gene of"),
        ("nothing", ValueError, "no cells"),
    ]:
        with pytest.raises(error, match=message):
            sx.metrics.imputation_correlation(adata, reference, imputed_key=key)
    with pytest.raises(KeyError, match=r"'log' is not in measured\.layers"):
        sx.metrics.imputation_correlation(adata, reference, imputed_key="mine", layer="log")
    reference.obs_names = [f"other{i}" for i in range(70)]
    with pytest.raises(KeyError, match="30 of the cells not at all"):
        sx.metrics.imputation_correlation(adata, reference, imputed_key="mine")
