from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scvi_ext as sx
from scvi_ext.data.registry import read_fit

SMALL = {"n_hidden": 4, "n_latent": 2, "max_epochs": 1}
_FITTED: list[ad.AnnData] = []


@pytest.fixture
def reference(counts) -> ad.AnnData:
    """201 cells x 60 genes with a fit."""
    if not _FITTED:
        sx.pp.setup_anndata(counts)
        sx.tl.fit(counts, **SMALL)
        _FITTED.append(counts)
    return _FITTED[0].copy()


@pytest.fixture
def query(make_counts) -> ad.AnnData:
    """Cells with 50 of these genes in another order, 7 others between them, and something in every slot."""
    adata = make_counts(20, 67, seed=5)
    adata.var_names = [*(f"gene{i}" for i in range(10, 60)), *(f"other{i}" for i in range(17))]
    adata = adata[:, np.random.default_rng(0).permutation(57)].copy()
    adata.layers["doubled"] = adata.X * 2
    adata.obsm["X_umap"] = np.arange(40.0).reshape(20, 2)
    adata.obsp["connectivities"] = sp.eye(20, format="csr")
    adata.varm["loadings"] = np.ones((57, 2))
    adata.uns["notes"] = {"a": np.arange(3)}
    adata.var["highly_variable"] = np.arange(57) % 2 == 0
    adata.var["n_cells"] = np.arange(57)
    adata.var["biotype"] = pd.Categorical(["coding"] * 57)
    adata.var["gene_ids"] = [f"id{i}" for i in range(57)]
    return adata


def test_columns_are_those_of_the_names_and_zeros(reference, query):
    aligned = sx.pp.align_query(query, reference)
    assert list(aligned.var_names) == list(reference.var_names)
    for gene in reference.var_names:
        found = aligned[:, gene].X.toarray().ravel()
        expected = query[:, gene].X.toarray().ravel() if gene in query.var_names else np.zeros(20)
        np.testing.assert_array_equal(found, expected)
        assert aligned.var.loc[gene, "in_query"] == (gene in query.var_names)
    np.testing.assert_array_equal(aligned.layers["doubled"].toarray(), 2 * aligned.X.toarray())
    assert aligned.var["in_query"].dtype == bool


def test_the_report_can_be_read_back(reference, query, logged, tmp_path):
    aligned = sx.pp.align_query(query, reference)
    aligned.write_h5ad(tmp_path / "a.h5ad")
    aligned.write_zarr(tmp_path / "a.zarr")
    for adata in (aligned, ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        report = adata.uns["scvi_ext"]["alignment"]
        assert (report["n_genes"], report["n_found"]) == (60, 50)
        assert report["coverage"] == pytest.approx(50 / 60)
        assert list(report["missing"]) == [f"gene{i}" for i in range(10)]
        assert sorted(report["ignored"]) == sorted(f"other{i}" for i in range(7))
        assert adata.var["in_query"].sum() == 50
    for said in ("found 50 (83.3%)", "'gene0'", "'other0'", "10 genes that the query lacks"):
        assert said in logged()


def test_all_genes_are_found_in_silence(reference, query, logged, tmp_path):
    same = reference[:, ::-1].copy()
    del same.uns["scvi_ext"]
    aligned = sx.pp.align_query(same, reference)
    assert "lacks" not in logged()
    np.testing.assert_array_equal(aligned.X.toarray(), reference.X.toarray())
    aligned.write_h5ad(tmp_path / "a.h5ad")
    assert len(ad.read_h5ad(tmp_path / "a.h5ad").uns["scvi_ext"]["alignment"]["missing"]) == 0


def test_what_does_not_depend_on_genes_is_kept_as_a_copy(reference, query):
    query.raw = query
    before = query.copy()
    aligned = sx.pp.align_query(query, reference)
    pd.testing.assert_frame_equal(aligned.obs, query.obs)
    np.testing.assert_array_equal(aligned.obsm["X_umap"], query.obsm["X_umap"])
    assert (aligned.obsp["connectivities"] != query.obsp["connectivities"]).nnz == 0
    assert list(aligned.raw.var_names) == list(query.raw.var_names)
    np.testing.assert_array_equal(aligned.raw.X.toarray(), query.raw.X.toarray())
    assert not aligned.varm.keys()
    aligned.obs["batch"], aligned.obsm["X_umap"][:], aligned.uns["notes"]["a"][:] = "x", 0, 0
    aligned.X.data[:] = 0
    pd.testing.assert_frame_equal(query.obs, before.obs)
    np.testing.assert_array_equal(query.obsm["X_umap"], before.obsm["X_umap"])
    np.testing.assert_array_equal(query.uns["notes"]["a"], before.uns["notes"]["a"])
    np.testing.assert_array_equal(query.X.toarray(), before.X.toarray())
    assert "scvi_ext" not in query.uns


def test_annotations_of_genes_keep_their_kind(reference, query, tmp_path):
    aligned = sx.pp.align_query(query, reference)
    found = aligned.var["in_query"].to_numpy()
    assert aligned.var["highly_variable"].dtype == bool  # as scanpy needs it to choose genes by
    assert not aligned.var.loc[~found, "highly_variable"].any()
    for name in ("highly_variable", "n_cells", "gene_ids", "biotype"):
        assert name == "highly_variable" or aligned.var[name].isna().to_numpy().tolist() == (~found).tolist()
        for gene in reference.var_names[found]:
            assert aligned.var.loc[gene, name] == query.var.loc[gene, name]
    aligned.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").var["n_cells"].sum() == aligned.var["n_cells"].sum()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32", "uint16", "bool"])
@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array], ids=lambda k: k.__name__)
def test_matrices_stay_what_they_are(reference, query, kind, dtype):
    expected = sx.pp.align_query(query, reference).X.toarray().astype(dtype)
    query.X = kind(query.X.toarray().astype(dtype))
    found = sx.pp.align_query(query, reference).X
    assert type(found) is type(query.X)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.toarray() if sp.issparse(found) else found, expected)


def test_views_and_files(reference, query, tmp_path):
    expected = sx.pp.align_query(query[5:15].copy(), reference).X.toarray()
    aligned = sx.pp.align_query(query[5:15], reference)
    assert not aligned.is_view
    np.testing.assert_array_equal(aligned.X.toarray(), expected)
    query.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    for aligned in (sx.pp.align_query(backed[5:15], reference), sx.pp.align_query(backed, reference)[5:15]):
        assert not aligned.isbacked
        np.testing.assert_array_equal(aligned.X.toarray(), expected)
    backed.file.close()


def test_zeros_of_an_earlier_alignment_are_still_missing(reference, query):
    once = sx.pp.align_query(query, reference)
    twice = sx.pp.align_query(once, reference)
    np.testing.assert_array_equal(twice.var["in_query"], once.var["in_query"])
    assert twice.uns["scvi_ext"]["alignment"]["n_found"] == 50
    with pytest.raises(ValueError, match="50 of the 60"):
        sx.pp.align_query(once, reference, min_coverage=0.9)


def test_every_kind_of_reference(reference, query, tmp_path):
    sx.io.write_model(reference, tmp_path / "model")
    expected = sx.pp.align_query(query, reference).X.toarray()
    for kind in (tmp_path / "model", str(tmp_path / "model"), read_fit(reference)):
        np.testing.assert_array_equal(sx.pp.align_query(query, kind).X.toarray(), expected)
    with pytest.raises(KeyError, match="nothing"):
        sx.pp.align_query(query, reference, key="nothing")


# ---- what is refused, and what is said of names --------------------------------------------------------------------


def test_too_few_genes_are_refused(reference, query):
    with pytest.raises(ValueError, match=r"50 of the 60 genes .* \(83%\), and min_coverage=0.9 .*'gene0'.*rename"):
        sx.pp.align_query(query, reference, min_coverage=0.9)
    query.var_names = [f"x{i}" for i in range(57)]
    with pytest.raises(ValueError, match=r"0 of the 60 genes"):
        sx.pp.align_query(query, reference, min_coverage=0)


@pytest.mark.parametrize(
    ("theirs", "ours", "match"),
    [
        ("ENSG{:011d}", "SYMBOL{}", r"reference names its genes by Ensembl ids"),
        ("SYMBOL{}", "ENSMUSG{:011d}", r"query names its genes by Ensembl ids"),
        ("ENSG{:011d}", "ENSG{:011d}.7", r"60 would be found.*versions"),
        ("CD{}", "Cd{}", r"60 would be found.*upper and lower case.*homologues"),
        ("GENE{}", "hg19_GENE{}", r"60 would be found.*genome"),
        ("GENE{}", "GENE{} ", r"60 would be found.*blanks"),
    ],
)
def test_classic_causes_are_named(reference, theirs, ours, match):
    names = np.array([theirs.format(i) for i in range(60)])
    query = reference[:10].copy()
    query.var_names = [ours.format(i) for i in range(60)]
    with pytest.raises(ValueError, match=match):
        sx.pp.align_query(query, replace(read_fit(reference), var_names=names))


def test_a_column_or_raw_with_the_right_names_is_named(reference):
    query = reference[:10].copy()
    query.var["symbol"] = pd.Categorical(query.var_names)
    query.var_names = [f"id{i}" for i in range(60)]
    with pytest.raises(ValueError, match=r"adata.var\['symbol'\] has 60 of them"):
        sx.pp.align_query(query, reference)
    query.var_names = query.var["symbol"].astype(str)
    assert sx.pp.align_query(query, reference).var["in_query"].all()
    variable = reference[:10].copy()
    variable.raw = variable
    variable = variable[:, :12].copy()
    with pytest.raises(ValueError, match=r"adata.raw has 60 of them"):
        sx.pp.align_query(variable, reference)


@pytest.mark.parametrize(
    ("options", "error"), [({"min_coverage": 1.2}, ValueError), ({"min_coverage": "all"}, TypeError)], ids=str
)
def test_options_that_make_no_sense(reference, query, options, error):
    with pytest.raises(error, match="min_coverage"):
        sx.pp.align_query(query, reference, **options)


def test_what_is_no_query_is_refused(reference, query):
    with pytest.raises(TypeError, match="an AnnData is needed"):
        sx.pp.align_query(query.X, reference)
    query.var_names = ["gene0", "gene0", *query.var_names[2:]]
    with pytest.raises(ValueError, match="more than once"):
        sx.pp.align_query(query, reference)
