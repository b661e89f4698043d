"""What a fit imputes is what it decodes at the changed entries, and scores are what a loop over them gives."""

from __future__ import annotations

import random

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from _tolerances import FLOAT32
from scipy import stats
from sklearn.neighbors import NearestNeighbors

import scvi_ext as sx
from scvi_ext.functional.imputation import error_measures, pooled_rates

METHODS = ["fit", "uncorrupted", "nearest cells", "gene mean", "no imputation"]


@pytest.fixture(scope="session")
def _scored() -> ad.AnnData:
    rng = np.random.default_rng(5)
    types, batch = rng.integers(3, size=150), np.arange(150) % 2
    profile = rng.gamma(0.5, 4.0, (3, 40))[types] * rng.lognormal(0, 0.4, (150, 1))
    x = rng.poisson(profile).astype(np.float32)
    x[:, 0] += 5  # no empty cell, also when corrupted
    adata = ad.AnnData(sp.csr_matrix(x))
    adata.var_names = [f"gene{i}" for i in range(40)]
    adata.obs_names = [f"cell{i}" for i in range(150)]
    adata.obs["batch"] = [f"b{i}" for i in batch]
    adata.obs["cell_type"] = [f"t{i}" for i in types]
    adata.obs["size"] = x.sum(1) / x.sum(1).mean()
    sx.pp.corrupt(adata, rate=0.5, method="binomial")
    sx.pp.setup_anndata(adata, layer="corrupted", batch_key="batch")
    sx.tl.fit(adata, max_epochs=4, n_hidden=16, n_latent=3)
    return adata


@pytest.fixture
def adata(_scored) -> ad.AnnData:
    """150 cells x 40 genes, half of the entries corrupted, with a fit to what is left."""
    return _scored.copy()


def imputed(adata: ad.AnnData, **options) -> np.ndarray:
    """What each method imputes, in the order of the entries, and the original in the first column."""
    scored = sx.tl.imputation_score(adata, copy=True, **options)
    table = sx.get.imputation_df(scored, options.get("key"), table="entries")
    return table.iloc[np.argsort(table.index.astype(int))].to_numpy()


def decoded(adata: ad.AnnData, layer: str | None, **options) -> np.ndarray:
    """Mean counts that the fit decodes, given the counts in ``layer``."""
    other = adata.copy()
    counts = adata.X if layer is None else adata.layers[layer]
    target = other.uns["scvi_ext"]["fits"]["scvi"]["setup"].get("layer")
    if target is None:
        other.X = counts
    else:
        other.layers[target] = counts
    sx.tl.get_likelihood_parameters(other, **options)
    return other.layers["scvi_mean"]


def layers(adata: ad.AnnData) -> tuple[np.ndarray, ...]:
    return tuple(m.toarray() if sp.issparse(m) else np.asarray(m) for m in (adata.X, adata.layers["corrupted"]))


# ---- what is imputed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [1, 3])
def test_the_fit_imputes_what_it_decodes(adata, n_samples):
    original, corrupted = layers(adata)
    changed = original != corrupted
    table = imputed(adata, n_samples=n_samples, seed=4)
    np.testing.assert_array_equal(table[:, 0], original[changed])
    for column, layer in ((1, "corrupted"), (2, None)):
        expected = decoded(adata, layer, n_samples=n_samples, seed=4)[changed]
        np.testing.assert_allclose(table[:, column], expected, **FLOAT32)


def test_a_fit_on_other_counts_is_given_the_corrupted_ones(adata):
    sx.pp.setup_anndata(adata, batch_key="batch")
    sx.tl.fit(adata, max_epochs=2, n_hidden=8, n_latent=3)
    original, corrupted = layers(adata)
    with pytest.warns(sx.ScviExtWarning, match=r"'scvi' was trained on adata\.X, not on adata\.layers\['corrupted'\]"):
        sx.tl.imputation_score(adata, key_added="leaked")
    assert adata.uns["leaked"]["params"]["fit_layer"] == "X"
    with pytest.warns(sx.ScviExtWarning, match="may have seen the originals"):
        table = imputed(adata)
    np.testing.assert_allclose(table[:, 1], decoded(adata, "corrupted")[original != corrupted], **FLOAT32)
    np.testing.assert_allclose(table[:, 2], decoded(adata, None)[original != corrupted], **FLOAT32)


def test_the_gene_mean_is_that_of_all_cells_at_the_size_of_the_cell(adata):
    original, corrupted = layers(adata)
    expected = np.outer(corrupted.sum(1), corrupted.sum(0) / corrupted.sum())
    np.testing.assert_allclose(imputed(adata)[:, 4], expected[original != corrupted], **FLOAT32)


def test_the_nearest_cells_are_those_of_a_plain_search(adata):
    original, corrupted = layers(adata)
    totals = corrupted.sum(1, keepdims=True)
    normalized = np.log1p(corrupted / totals * np.median(totals))
    centred = normalized - normalized.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    nearest = NearestNeighbors(n_neighbors=15).fit((u * s)[:, :39]).kneighbors(return_distance=False)
    pooled = corrupted[nearest].sum(1)
    expected = totals * pooled / pooled.sum(1, keepdims=True)
    table = imputed(adata)[:, 3]
    agree = np.isclose(table, expected[original != corrupted], **FLOAT32)
    assert agree.mean() > 0.98  # roundings can exchange two neighbours at nearly equal distance


def test_without_imputation_the_corrupted_count_stays(adata):
    original, corrupted = layers(adata)
    np.testing.assert_array_equal(imputed(adata)[:, 5], corrupted[original != corrupted])


def test_pools_may_be_of_any_cells():
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (30, 9))
    pools = rng.random((12, 30)) < 0.2
    pools[3] = False
    libraries = rng.integers(1, 50, 12).astype(float)
    cells, genes = (rng.random((12, 9)) < 0.3).nonzero()
    found = pooled_rates(sp.csr_matrix(counts), sp.csr_matrix(pools.astype(float)), libraries, cells, genes)
    pooled = pools.astype(float) @ counts
    expected = libraries[:, None] * pooled / np.maximum(pooled.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(found, expected[cells, genes], rtol=1e-12)
    assert (found[cells == 3] == 0).all()


def test_cells_are_pooled_in_stretches(adata, monkeypatch):
    expected = imputed(adata)
    monkeypatch.setattr("scvi_ext.functional.imputation._CHUNK_FLOATS", 40 * 7)
    np.testing.assert_array_equal(imputed(adata), expected)


def test_thinning_is_made_up_for_by_depth(adata):
    with pytest.warns(sx.ScviExtWarning, match=r"earlier adata\.layers\['corrupted'\].*: 'scvi'"):
        sx.pp.corrupt(adata, rate=0.75, method="thinning")
    original, corrupted = layers(adata)
    changed = original != corrupted
    table = imputed(adata)
    np.testing.assert_allclose(table[:, 1], 4 * decoded(adata, "corrupted")[changed], **FLOAT32)
    np.testing.assert_allclose(table[:, 2], decoded(adata, None)[changed], **FLOAT32)
    np.testing.assert_allclose(table[:, 5], 4 * corrupted[changed], **FLOAT32)
    gene_mean = np.outer(corrupted.sum(1), corrupted.sum(0) / corrupted.sum())
    np.testing.assert_allclose(table[:, 4], 4 * gene_mean[changed], **FLOAT32)


# ---- scores --------------------------------------------------------------------------------------------------------


def brute_force(error: np.ndarray, cells: np.ndarray, genes: np.ndarray) -> dict[str, float]:
    return {
        "median": np.median(error),
        "mean": np.mean(error),
        "median_per_cell": np.mean([np.median(error[cells == c]) for c in set(cells)]),
        "median_per_gene": np.mean([np.median(error[genes == g]) for g in set(genes)]),
    }


def test_scores_are_those_of_a_loop(adata):
    sx.tl.imputation_score(adata)
    original, corrupted = layers(adata)
    cells, genes = (original != corrupted).nonzero()
    scores, by_gene = sx.get.imputation_df(adata), sx.get.imputation_df(adata, table="genes")
    table = imputed(adata)
    assert scores.index.tolist() == METHODS
    for i, method in enumerate(METHODS):
        error = np.abs(table[:, 0].astype(float) - table[:, i + 1])
        for name, value in brute_force(error, cells, genes).items():
            assert scores.loc[method, name] == pytest.approx(value, rel=1e-6)  # entries are kept as float32
        medians = [np.median(error[genes == g]) for g in np.unique(genes)]
        np.testing.assert_allclose(by_gene[method], medians, **FLOAT32)
    assert by_gene.index.tolist() == [f"gene{g}" for g in np.unique(genes)]
    np.testing.assert_array_equal(by_gene["n_entries"], np.unique(genes, return_counts=True)[1])


def test_measures_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    original, found = rng.poisson(3, 500), rng.gamma(3, 1, 500)
    cells, genes = rng.integers(40, size=500), rng.integers(10**6, size=500)
    expected = brute_force(np.abs(original - found), cells, genes)
    for order in (slice(None), rng.permutation(500)):
        measures = error_measures(original[order], found[order], cells[order], genes[order])
        assert measures == pytest.approx(expected, rel=1e-12)
    one = error_measures(original[:1], found[:1], cells[:1], genes[:1])
    assert set(one.values()) == {abs(original[0] - found[0])}


def test_the_truth_is_recovered_where_it_can_be(adata):
    """Counts of three types: what knows the types is nearer to the truth than what does not."""
    scores = sx.get.imputation_df(sx.tl.imputation_score(adata, copy=True))
    assert (scores.loc["nearest cells"] < scores.loc["gene mean"]).all()
    assert (scores.loc["nearest cells"] < scores.loc["no imputation"]).all()


def test_minibatches_without_a_changed_entry_lose_nothing(adata):
    """In scVI 0.5.0 they did."""
    corrupted = adata.X.copy().tolil()
    for cell in (3, 77, 149):
        gene = adata.X[cell].indices[-1]
        corrupted[cell, gene] = 0
    adata.layers["corrupted"] = corrupted.tocsr()
    expected = imputed(adata)
    assert len(expected) == 3
    for batch_size in (1, 10, 75, 150):
        np.testing.assert_allclose(imputed(adata, batch_size=batch_size), expected, **FLOAT32)


def test_only_a_sample_of_many_entries_is_kept(adata, monkeypatch):
    sx.tl.imputation_score(adata)
    monkeypatch.setattr("scvi_ext.tl._imputation_score._KEPT_ENTRIES", 50)
    sx.tl.imputation_score(adata, key_added="few")
    table = sx.get.imputation_df(adata, slot="few", table="entries")
    assert len(table) == 50
    assert sx.get.imputation_df(adata, slot="few").equals(sx.get.imputation_df(adata))
    assert adata.uns["few"]["params"]["n_entries"] > 50
    everything = sx.get.imputation_df(adata, table="entries")
    assert table.equals(everything.loc[table.index])


# ---- the same cells in another shape -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [sp.csc_matrix, sp.csr_array, lambda m: m.toarray(), lambda m: m.astype(np.int64)])
def test_the_format_does_not_matter(adata, kind):
    expected = imputed(adata)
    adata.X = kind(adata.X)
    adata.layers["corrupted"] = kind(adata.layers["corrupted"])
    np.testing.assert_array_equal(imputed(adata), expected)


def test_counts_on_disk_are_read(adata, tmp_path):
    expected = imputed(adata)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sx.tl.imputation_score(backed)
    found = sx.get.imputation_df(backed, table="entries")
    np.testing.assert_array_equal(found.iloc[np.argsort(found.index.astype(int))], expected)


def test_genes_are_found_by_name(adata):
    def by_gene(adata):
        table = sx.get.imputation_df(sx.tl.imputation_score(adata, copy=True), table="genes")
        return table.drop(columns="nearest cells").sort_index()  # roundings of another order of genes

    expected = by_gene(adata)
    other = adata[:, np.random.default_rng(0).permutation(40)].copy()
    np.testing.assert_allclose(by_gene(other), expected, **FLOAT32)
    more = ad.concat([other, other[:, :5].copy()], axis=1, merge="first", uns_merge="first", index_unique="-")
    more.var_names = [*other.var_names, *[f"new{i}" for i in range(5)]]
    np.testing.assert_allclose(by_gene(more), expected, **FLOAT32)
    assert not by_gene(more).index.str.startswith("new").any()


def test_cells_may_be_chosen_in_any_order(adata):
    original, corrupted = layers(adata)
    rows = np.array([140, 3, 77, 4])
    found = imputed(adata, indices=rows)
    changed = (original != corrupted)[rows]
    np.testing.assert_array_equal(found[:, 0], original[rows][changed])
    # Baselines learn from all cells, whoever is asked about.
    gene_mean = np.outer(corrupted.sum(1), corrupted.sum(0) / corrupted.sum())
    np.testing.assert_allclose(found[:, 4], gene_mean[rows][changed], **FLOAT32)
    whole, where = np.zeros(adata.shape), (original != corrupted)
    whole[where] = imputed(adata)[:, 3]
    np.testing.assert_allclose(found[:, 3], whole[rows][changed], **FLOAT32)


def test_a_subset_is_scored_as_its_cells_are(adata):
    part = adata[30:90].copy()
    sx.tl.imputation_score(part, baselines=False)
    expected = imputed(adata, indices=range(30, 90), baselines=False)
    np.testing.assert_allclose(imputed(part, baselines=False), expected, **FLOAT32)
    view = adata[30:90]
    sx.tl.imputation_score(view, baselines=False)
    assert sx.get.imputation_df(view).equals(sx.get.imputation_df(part))
    assert "scvi_imputation" not in adata.uns


@pytest.mark.parametrize("shape", [(3, 40), (1, 40)])
def test_few_cells(adata, shape):
    few = adata[: shape[0]].copy()
    sx.tl.imputation_score(few, baselines=shape[0] > 1)
    assert np.isfinite(sx.get.imputation_df(few).to_numpy()).all()
    if shape[0] == 1:
        with pytest.raises(ValueError, match="Baselines take 3 cells and 2 genes at least, and there are 1 and 40"):
            sx.tl.imputation_score(few)


def test_an_empty_cell_is_no_obstacle(adata):
    x = adata.layers["corrupted"].toarray()
    x[5] = 0
    adata.layers["corrupted"] = sp.csr_matrix(x)
    table = imputed(adata)
    assert np.isfinite(table).all()


# ---- any model -----------------------------------------------------------------------------------------------------

OPTIONS = [
    *({"reconstruction_loss": name} for name in ("nb", "poisson", "normal", "bernoulli")),
    *({"dispersion": name} for name in ("gene-batch", "gene-label", "gene-cell")),
    {"latent_distribution": "ln"},
    {"library": "latent"},
    {"library": "size_factor"},
    {"model": "ldvae"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_every_fit_can_be_scored(adata, options):
    sx.pp.setup_anndata(adata, layer="corrupted", batch_key="batch", labels_key="cell_type", size_factor_key="size")
    sx.tl.fit(adata, max_epochs=1, n_hidden=8, n_latent=3, key_added="scvi", **options)
    original, corrupted = layers(adata)
    table = imputed(adata, baselines=False)
    expected = decoded(adata, "corrupted")[original != corrupted]
    np.testing.assert_allclose(table[:, 1], expected, **FLOAT32)


# ---- manners -------------------------------------------------------------------------------------------------------


def test_it_writes_one_slot_and_says_so(adata, logged):
    before = {name: set(getattr(adata, name).keys()) for name in ("obs", "var", "obsm", "varm", "layers", "uns")}
    x, layer = adata.X.copy(), adata.layers["corrupted"].copy()
    assert sx.tl.imputation_score(adata) is None
    after = {name: set(getattr(adata, name).keys()) for name in before}
    assert after.pop("uns") - before.pop("uns") == {"scvi_imputation"}
    assert after == before
    assert (adata.X != x).nnz == (adata.layers["corrupted"] != layer).nnz == 0
    assert "'scvi_imputation', errors of imputed counts (adata.uns)" in logged()
    assert adata.uns["scvi_imputation"]["params"] == {
        "key": "scvi",
        "fit_layer": "corrupted",
        "corruption": "corrupted",
        "method": "binomial",
        "rate": 0.5,
        "corruption_seed": 0,
        "n_entries": (adata.X != adata.layers["corrupted"]).nnz,
        "n_samples": 1,
        "seed": 0,
    }


def test_a_copy_is_written_to(adata):
    copy = sx.tl.imputation_score(adata, copy=True)
    assert "scvi_imputation" in copy.uns
    assert "scvi_imputation" not in adata.uns


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_tables_survive_a_file(adata, tmp_path, form):
    sx.tl.imputation_score(adata)
    getattr(adata, f"write_{form}")(tmp_path / "a")
    again = getattr(ad, f"read_{form}")(tmp_path / "a")
    for table in ("scores", "genes", "entries"):
        assert sx.get.imputation_df(again, table=table).equals(sx.get.imputation_df(adata, table=table))
    sx.tl.imputation_score(again)
    assert sx.get.imputation_df(again).equals(sx.get.imputation_df(adata))


def test_the_seed_decides_and_global_generators_do_not(adata):
    def states():
        return [*np.random.get_state()[1], *torch.get_rng_state(), *random.getstate()[1]]

    before = states()
    first = imputed(adata, seed=1)
    assert states() == before
    np.testing.assert_array_equal(imputed(adata, seed=1), first)
    assert (imputed(adata, seed=2)[:, 1] != first[:, 1]).any()


def test_baselines_can_be_left_out(adata):
    sx.tl.imputation_score(adata, baselines=False)
    assert sx.get.imputation_df(adata).index.tolist() == ["fit"]
    assert sx.get.imputation_df(adata, table="genes").columns.tolist() == ["n_entries", "fit"]


def test_more_samples_bring_it_closer_to_the_mean(adata):
    mean = imputed(adata, n_samples=200, baselines=False)[:, 1]
    one, many = (np.abs(imputed(adata, n_samples=n, seed=1, baselines=False)[:, 1] - mean).mean() for n in (1, 50))
    assert many < one / 3  # by sqrt(50) = 7 if there were no error in the mean of 200


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"corruption": "corrupt"}, KeyError, r"'corrupt' is not in .* Did you mean 'corrupted'\?"),
        ({"key": "scvo"}, KeyError, r"'scvo' is not in"),
        ({"n_samples": 0}, ValueError, r"n_samples=0 must be 1 or more"),
        ({"batch_size": 0}, ValueError, r"batch_size=0 must be 1 or more"),
        ({"seed": -1}, ValueError, r"seed=-1 must be 0 or more"),
        ({"indices": []}, ValueError, r"There are no cells"),
        ({"key_added": "a/b"}, ValueError, r"must be a name"),
        ({"key_added": "scvi_ext"}, ValueError, r"choose another name"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(adata, options, error, message):
    with pytest.raises(error, match=message):
        sx.tl.imputation_score(adata, **options)
    assert set(adata.uns) == {"scvi_ext"}


def test_what_cannot_be_scored_is_refused(adata):
    other = adata.copy()
    other.X = other.X.log1p()
    with pytest.raises(ValueError, match=r"adata\.X held whole counts when pp\.corrupt was called"):
        sx.tl.imputation_score(other)
    same = (adata.X != adata.layers["corrupted"]).toarray()
    unchanged = int(np.argmin(same.sum(1)))
    x = adata.layers["corrupted"].tolil()
    x[unchanged] = adata.X[unchanged]
    other = adata.copy()
    other.layers["corrupted"] = x.tocsr()
    with pytest.raises(ValueError, match="agree in all 1 cells and 40 genes"):
        sx.tl.imputation_score(other, indices=[unchanged])
    with pytest.warns(sx.ScviExtWarning, match=r"pp\.setup_anndata again"):
        sx.pp.restore(adata)
    with pytest.raises(KeyError, match=r"has no corruptions: call scvi_ext\.pp\.corrupt"):
        sx.tl.imputation_score(adata)
    assert "scvi_imputation" not in adata.uns


def test_get_finds_what_was_written(adata):
    with pytest.raises(KeyError, match=r"has no 'scvi_imputation': call scvi_ext\.tl\.imputation_score"):
        sx.get.imputation_df(adata)
    sx.tl.imputation_score(adata, baselines=False)
    table = sx.get.imputation_df(adata)
    table.iloc[:] = 0
    assert (sx.get.imputation_df(adata) > 0).all(axis=None)
    with pytest.raises(ValueError, match=r"key='scvi' has no effect beside slot='mine'"):
        sx.get.imputation_df(adata, "scvi", slot="mine")
    with pytest.raises(ValueError, match=r"table='score' is not one of"):
        sx.get.imputation_df(adata, table="score")
    adata.uns["mine"] = np.arange(3)
    for slot in ("scvi_ext", "mine"):
        with pytest.raises(KeyError, match=rf"adata\.uns\['{slot}'\] has no errors of imputed counts"):
            sx.get.imputation_df(adata, slot=slot)


@pytest.mark.parametrize("name", ["get_normalized_expression", "posterior_predictive_sample"])
def test_no_readout_writes_over_original_or_corrupted_counts(adata, name):
    adata.layers["raw"] = adata.X.copy()
    sx.pp.corrupt(adata, layer="raw", key_added="other")
    for layer in ("raw", "other"):
        before = adata.layers[layer].copy()
        with pytest.raises(ValueError, match=rf"adata\.layers\['{layer}'\] holds original or corrupted counts"):
            getattr(sx.tl, name)(adata, key_added=layer)
        assert (adata.layers[layer] != before).nnz == 0
    sx.tl.get_latent(adata, key_added="raw")  # obsm has names of its own


def test_the_correlation_of_what_is_imputed_with_the_truth_is_positive(adata):
    table = imputed(adata)
    for column in range(1, 5):
        assert stats.spearmanr(table[:, 0], table[:, column]).pvalue < 1e-6
        assert stats.spearmanr(table[:, 0], table[:, column]).statistic > 0
