"""Differential expression of proteins: planted truth, all pairs of samples, and panels that are missing."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from _tolerances import N_STANDARD_ERRORS

import scvi_ext as sx
from scvi_ext.models.totalvi import TOTALVI
from scvi_ext.tl import _compare, _pool, _pool_proteins

N_SAMPLES = 3000
# The first two are names of genes. In batch 1, the last two were not measured.
PROTEINS = ["gene0", "gene7", "CD3", "CD19", "HLA-A/B", "IgG1", "IgG2", "CD4", "CD8"]
UP_IN_A = {"gene0", "CD3", "CD4"}
BACKGROUND = 8.0


def planted(n_cells=700, n_genes=40, seed=0) -> ad.AnnData:
    """Three types of cells in two batches; genes 0 to 4 and some proteins are foreground in a, another one in b."""
    rng = np.random.default_rng(seed)
    profile = np.tile(rng.lognormal(0, 1, n_genes), (3, 1))
    profile[0, :5] *= 4
    profile[1, 5:9] *= 4
    profile /= profile.sum(1, keepdims=True)
    group, batch = rng.integers(0, 3, n_cells), rng.integers(0, 2, n_cells)
    rate = profile[group] * rng.lognormal(6, 0.3, (n_cells, 1))
    x = rng.poisson(rng.gamma(4, rate / 4)).astype(np.float32)
    foreground = np.zeros((n_cells, len(PROTEINS)), bool)
    foreground[:, [name in UP_IN_A for name in PROTEINS]] = (group == 0)[:, None]
    foreground[:, PROTEINS.index("CD19")] = group == 1
    foreground[:, PROTEINS.index("HLA-A/B")] = True
    mean = BACKGROUND * np.where(foreground, 15, 1) * rng.lognormal(0, 0.2, foreground.shape)
    y = rng.poisson(rng.gamma(6, mean / 6))
    y[batch == 1, -2:] = 0
    obs = pd.DataFrame({"type": pd.Categorical(np.array(list("abc"))[group]), "batch": batch.astype(str)})
    obs.index = [f"cell{i}" for i in range(n_cells)]
    adata = ad.AnnData(sp.csr_matrix(x), obs=obs)
    adata.var_names = [f"gene{i}" for i in range(n_genes)]
    adata.obsm["protein"] = pd.DataFrame(y, obs.index, PROTEINS)
    return adata


@pytest.fixture(scope="module")
def trained() -> ad.AnnData:
    adata = planted()
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein")
    sx.tl.fit(adata, "totalvi", max_epochs=40, n_hidden=32, n_latent=5, progress=False, seed=0)
    return adata


@pytest.fixture
def adata(trained) -> ad.AnnData:
    return trained.copy()


def both(adata, *args, n_samples=N_SAMPLES, group=None, **options) -> pd.DataFrame:
    """The table of a comparison in the order of genes and proteins."""
    changed = sx.tl.differential_expression(adata, *args, n_samples=n_samples, copy=True, **options)
    table = changed.uns["totalvi_de"]["table"]
    return table if group is None else table[table["group"] == group].reset_index(drop=True)


def result(adata, *args, **options) -> pd.DataFrame:
    """The same of proteins, by their names."""
    table = both(adata, *args, **options)
    return table[table["feature_type"] == "protein"].set_index("gene")


def assert_alike(one, other):
    """Two tables are equal but for chance."""
    error = N_STANDARD_ERRORS * np.hypot(one["proba_mcse"], other["proba_mcse"]) + 1e-3  # masses are float32
    assert (abs(one["proba_up"] - other["proba_up"]) <= error).all()
    error = N_STANDARD_ERRORS * np.hypot(one["lfc_mcse"], other["lfc_mcse"]) + 1e-3
    assert (abs(one["lfc_mean"] - other["lfc_mean"]) <= error).all()


def test_planted_proteins_are_called_and_no_others(adata):
    a = result(adata, "type", group="a", n_samples=6000)
    assert set(a.query("is_de and lfc_mean > 0").index) == UP_IN_A
    assert not a.query("is_de and lfc_mean < 0").index.difference(["CD19"]).size
    b = result(adata, "type", group="b", n_samples=6000)
    assert set(b.query("is_de and lfc_mean > 0").index) == {"CD19"}
    for name in ("HLA-A/B", "IgG1", "IgG2"):
        assert not a.loc[name, "is_de"]
        assert not b.loc[name, "is_de"]


@pytest.mark.parametrize("options", [{}, {"protein_pseudocount": 0.1}, {"weights": "importance", "n_samples": 400}])
def test_where_nothing_changes_nothing_is_called(adata, options):
    halves = np.random.default_rng(0).permutation(adata.n_obs)
    assert not result(adata, idx1=halves[:350], **options)["is_de"].any()


def test_the_genes_are_the_same_with_and_without_proteins(adata, monkeypatch):
    for options in (
        {"permuted": True},
        {"batch_correction": True, "delta": None},
        {"weights": "importance", "n_samples": 300},
    ):
        table = both(adata, "type", **options)
        of_genes = table[table["feature_type"] == "gene"].reset_index(drop=True)
        with monkeypatch.context() as without:
            without.setattr(_pool, "ProteinPool", lambda *_: None)
            expected = both(adata, "type", **options)
        assert "feature_type" not in expected
        pd.testing.assert_frame_equal(of_genes[list(expected)], expected, check_exact=True)


@pytest.mark.parametrize(("pseudocount", "options"), [(5.0, {}), (0.5, {}), (2.0, {"transform_batch": "0"})], ids=str)
def test_it_is_what_all_pairs_of_samples_say(adata, pseudocount, options):
    group, of_first = adata.obs["type"].to_numpy(), adata.obs["batch"].to_numpy() == "0"
    found = result(adata, "type", group="a", n_samples=9000, delta=0.3, protein_pseudocount=pseudocount, **options)
    rng = np.random.default_rng(0)
    for proteins, chosen in ((PROTEINS[:7], np.ones(adata.n_obs, bool)), (PROTEINS[7:], of_first | bool(options))):
        sides = []
        for seed, cells in enumerate((group == "a", group != "a")):
            values = sx.tl.get_protein_expression(
                adata,
                protein_list=proteins,
                indices=cells & chosen,
                n_samples=6,
                return_mean=False,
                seed=seed,
                **options,
            )
            sides.append(np.log2(values.reshape(-1, len(proteins)).astype(float) + pseudocount))
        pairs = [side[rng.integers(len(side), size=100_000)] for side in sides]
        change, table = pairs[0] - pairs[1], found.loc[proteins]
        n_cells = (chosen & (group == "a")).sum()  # and their samples on the other way
        for name, beyond in (("proba_up", change >= 0.3), ("proba_down", change <= -0.3)):
            standard_error = np.hypot(table["proba_mcse"], np.sqrt(0.25 / n_cells))
            assert (abs(table[name] - beyond.mean(0)) < N_STANDARD_ERRORS * standard_error).all()
        standard_error = np.hypot(table["lfc_mcse"], change.std(0) / np.sqrt(n_cells))
        assert (abs(table["lfc_mean"] - change.mean(0)) < N_STANDARD_ERRORS * standard_error).all()


def test_the_pseudocount_is_the_mean_background_where_there_is_more_of_it(adata):
    table = result(adata, "type", group="a", n_samples=6000)
    sx.tl.get_protein_background(adata, n_samples=3)
    background = adata.obsm["totalvi_protein_background"].to_numpy()
    in_a = (adata.obs["type"] == "a").to_numpy()
    expected = np.fmax(np.nanmean(background[in_a], 0), np.nanmean(background[~in_a], 0))
    np.testing.assert_allclose(table["pseudocount"], expected, rtol=0.05)  # of a thousand draws, spread by a third
    assert table.loc[list(UP_IN_A), "pseudocount"].between(BACKGROUND / 2, BACKGROUND * 2).all()
    assert (result(adata, "type", protein_pseudocount=3)["pseudocount"] == 3).all()
    vanilla = result(adata, "type", mode="vanilla", group="a")
    assert (vanilla["pseudocount"] == 0).all()
    assert (vanilla.loc[list(UP_IN_A), "proba_up"] > 0.95).all()


def test_the_mean_foreground_is_that_of_the_cells(adata):
    table = result(adata, "type", groups=["a"], reference="b", transform_batch="0", n_samples=6000)
    sx.tl.get_protein_expression(adata, transform_batch="0", n_samples=5)
    of_cells = adata.obsm["totalvi_protein"].groupby(adata.obs["type"].to_numpy()).mean()
    for name, number in (("a", 1), ("b", 2)):
        of_columns = of_cells.loc[name].to_numpy()
        # Of 3,000 draws, whose background varies by about its own size where the foreground is small.
        np.testing.assert_allclose(table[f"scale{number}"], of_columns, rtol=0.15, atol=0.2)


def test_numbers_of_the_counts_are_those_of_cells_that_have_measured_them(adata):
    table = result(adata, "type", groups=["b"], reference="c")
    y, group = adata.obsm["protein"].to_numpy(float), adata.obs["type"].to_numpy()
    measured = np.ones(y.shape, bool)
    measured[adata.obs["batch"] == "1", -2:] = False
    share = 1e4 * y / y.sum(1, keepdims=True)
    for number, name in ((1, "b"), (2, "c")):
        weights = measured & (group == name)[:, None]
        np.testing.assert_array_equal(table[f"n_measured{number}"], weights.sum(0))
        for column, values in (("raw_mean", y), ("raw_normalized_mean", share), ("fraction", y > 0)):
            expected = (values * weights).sum(0) / weights.sum(0)
            np.testing.assert_allclose(table[f"{column}{number}"], expected, rtol=1e-10)
    genes = both(adata, "type", groups=["b"], reference="c").query("feature_type == 'gene'")
    assert (genes["n_measured1"] == (group == "b").sum()).all()


def test_what_is_said_of_batches_without_a_protein_is_never_asked(adata, monkeypatch):
    """A module that says something else there gives the same result."""
    asked = [{}, {"batch_correction": True}, {"transform_batch": ["1", "0"]}]
    expected = [result(adata, "type", permuted=True, **options) for options in asked]
    original = TOTALVI.decode_protein

    def nonsense(module, z, cells):
        py = original(module, z, cells)
        measured = module.protein_batch_mask[cells.batch_index]
        return py._replace(log_ratio=py.log_ratio + 5 * (~measured), mixing_logits=py.mixing_logits - 9 * (~measured))

    monkeypatch.setattr(TOTALVI, "decode_protein", nonsense)
    for options, table in zip(asked, expected, strict=True):
        pd.testing.assert_frame_equal(result(adata, "type", permuted=True, **options), table, check_exact=True)


def test_cells_of_batches_without_a_protein_are_left_out(adata):
    found = result(adata, "type", group="a", n_samples=9000, protein_pseudocount=5)
    first = result(adata, "type", group="a", n_samples=9000, protein_pseudocount=5, indices=adata.obs["batch"] == "0")
    assert_alike(found.loc[["CD4", "CD8"]], first.loc[["CD4", "CD8"]])
    assert (found.loc[["CD4", "CD8"], "proba_mcse"] > 0).all()


def test_decoded_in_given_batches_those_that_have_measured_a_protein_impute_it(adata):
    options = {"group": "a", "n_samples": 9000, "protein_pseudocount": 5}
    corrected, in_first = (
        result(adata, "type", **options, **o) for o in ({"batch_correction": True}, {"transform_batch": "0"})
    )
    assert_alike(corrected.loc[["CD4", "CD8"]], in_first.loc[["CD4", "CD8"]])
    # A group of cells without the panel alone.
    adata.obs["type"] = adata.obs["type"].astype(str)
    adata.obs.loc[(adata.obs["type"] == "a") & (adata.obs["batch"] == "1"), "type"] = "unseen a"
    imputed = result(adata, "type", groups=["unseen a"], reference="b", n_samples=6000, transform_batch="0")
    assert imputed.loc["CD4", "n_measured1"] == 0
    assert imputed.loc["CD4", "is_de"]
    assert abs(imputed.loc["CD8", "lfc_mean"]) < 1 < 2 < imputed.loc["CD4", "lfc_mean"]
    assert np.isnan(imputed.loc["CD4", "raw_mean1"])


@pytest.mark.parametrize(("by", "options"), [("unseen", {}), ("type", {"transform_batch": "1"})], ids=str)
def test_what_was_not_measured_is_not_judged(adata, by, options, logged):
    """In no cell of a side, in hardly any, or in none of the batches to decode in."""
    adata.obs["unseen"] = np.where(adata.obs["batch"] == "1", "no panel", "panel")
    adata.obs.iloc[np.flatnonzero(adata.obs["batch"] == "0")[0], adata.obs.columns.get_loc("unseen")] = "no panel"
    table = both(adata, by, permuted=True, **options)
    unknown = table["reason"] == "not measured"
    assert set(table[unknown]["gene"]) == {"CD4", "CD8"}
    assert (table[unknown][["proba_de", "lfc_mean", "pseudocount", "scale1", "proba_permuted"]].isna()).all(axis=None)
    assert not table[unknown]["is_de"].any()
    assert (table[unknown]["fdr"] == 1).all()
    assert table[~unknown].notna().all(axis=None)
    sx.tl.differential_expression(adata, by, n_samples=N_SAMPLES, **options)
    assert "2 proteins were not measured where some groups are decoded: 'CD4', 'CD8'" in logged()
    group = str(table["group"].iloc[0])
    ranked = sc.get.rank_genes_groups_df(adata, group=group, key="totalvi_de_protein")
    assert set(ranked["names"][-2:]) == {"CD4", "CD8"}
    assert np.isfinite(ranked["scores"]).all()
    sc.pl.rank_genes_groups(adata, key="totalvi_de_protein", show=False)
    shown = sx.pl.volcano(adata, group, key="totalvi_de_protein", show=False)
    assert sum(len(c.get_offsets()) for c in shown.collections) == len(PROTEINS) - 2
    plt.close("all")


def test_options_mean_the_same_for_proteins(adata):
    one = result(adata, "type")
    two = result(adata, "type", hypothesis="two")
    np.testing.assert_allclose(two["proba_de"], one["proba_up"] + one["proba_down"], atol=1e-12)
    for _, rows in one.groupby("group", observed=True):
        assert (rows["is_de"] == (rows["fdr"] <= 0.05)).all()
        falling = np.sort(rows["proba_de"])[::-1]
        np.testing.assert_allclose(np.sort(rows["fdr"]), np.cumsum(1 - falling) / np.arange(1, len(rows) + 1))
    vanilla = result(adata, "type", groups=["a"], reference="b", mode="vanilla", permuted=True)
    np.testing.assert_allclose(vanilla["proba_permuted"], 0.5, atol=1e-4)
    rare = result(adata, "type", min_fraction=1.0)
    assert (rare["reason"] == "below min_fraction").any()
    learned = both(adata, "type", group="a", delta=None)
    assert learned["delta"].nunique() == 1


def test_importance_weights_are_those_of_the_draws(adata):
    """All draws are of two cells, so that the weighted means are those of the cells."""
    cells = np.flatnonzero(adata.obs["batch"] == "0")[:2]
    table = result(adata, idx1=cells[:1], idx2=cells[1:], weights="importance", n_samples=800)
    plain = result(adata, idx1=cells[:1], idx2=cells[1:], n_samples=20_000)
    assert (table["scale1"] != plain["scale1"]).all()
    assert np.isfinite(table.select_dtypes("number").to_numpy()).all()
    assert (table["proba_mcse"] >= 0).all()


def test_results_do_not_depend_on_batch_size_or_rounds_and_only_on_the_seed(adata, monkeypatch):
    expected = result(adata, "type")
    pd.testing.assert_frame_equal(result(adata, "type"), expected)
    # sums of float32 masses in another order
    pd.testing.assert_frame_equal(result(adata, "type", batch_size=7), expected, rtol=1e-3, atol=1e-4)
    assert (result(adata, "type", seed=1)["lfc_mean"] != expected["lfc_mean"]).any()
    for options in ({}, {"batch_correction": True, "permuted": True}):
        expected = both(adata, "type", **options)
        with monkeypatch.context() as few:
            few.setattr(_pool, "_HISTOGRAM_BYTES", 4 * _pool_proteins.N_BINS * 3 * 2 * 2)
            few.setattr(_compare, "_CELLS_AT_ONCE", 100)
            pd.testing.assert_frame_equal(both(adata, "type", **options), expected, rtol=1e-12)


def test_within_groups_proteins_are_compared_too(adata):
    sx.tl.within_group_de(adata, "batch", condition="type", reference="b", tested="a", n_samples=N_SAMPLES)
    table = sx.get.de_df(adata, "0", key="totalvi_within_group_de_protein").set_index("gene")
    assert UP_IN_A <= set(table.query("is_de and lfc_mean > 0").index)
    without = sx.get.de_df(adata, "1", key="totalvi_within_group_de").query("feature_type == 'protein'")
    assert set(without[without["reason"] == "not measured"]["gene"]) == {"CD4", "CD8"}


def test_scanpy_reads_genes_and_proteins_from_slots_of_their_own(adata):
    sx.tl.differential_expression(adata, "type", n_samples=N_SAMPLES)
    for key, names in (("totalvi_de", adata.var_names), ("totalvi_de_protein", PROTEINS)):
        frame = sc.get.rank_genes_groups_df(adata, group="a", key=key)
        assert set(frame["names"]) == set(names)
        assert (np.diff(frame["scores"]) <= 0).all()
        assert adata.uns[key]["names"].dtype == adata.uns["totalvi_de"]["names"].dtype
        kind = "protein" if key.endswith("protein") else "gene"
        table = sx.get.de_df(adata, "a").query(f"feature_type == {kind!r}").set_index("gene").loc[frame["names"]]
        np.testing.assert_allclose(frame["pvals"], 1 - table["proba_de"])
        np.testing.assert_allclose(frame["pvals_adj"], table["fdr"])
    alone = sx.get.de_df(adata, "a", key="totalvi_de_protein")
    of_both = sx.get.de_df(adata, "a").query("feature_type == 'protein'").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, of_both)


def test_a_protein_that_is_called_like_a_gene_is_told_from_it(adata):
    sx.tl.differential_expression(adata, "type", n_samples=N_SAMPLES)
    table = sx.get.de_df(adata, "a")
    assert (table["gene"] == "gene7").sum() == 2
    assert not table.duplicated(["feature_type", "gene"]).any()
    gene, protein = (table[(table["gene"] == "gene7") & (table["feature_type"] == t)] for t in ("gene", "protein"))
    np.testing.assert_allclose(gene["raw_mean1"], adata[adata.obs["type"] == "a", "gene7"].X.mean(), rtol=1e-6)
    expected = adata.obsm["protein"].loc[adata.obs["type"] == "a", "gene7"].mean()
    np.testing.assert_allclose(protein["raw_mean1"], expected)
    ax = sx.pl.volcano(adata, "a", show=False)
    called = table[table["is_de"]]
    expected = {f"{r.gene} (protein)" if r.feature_type == "protein" else r.gene for r in called.itertuples()}
    assert {text.get_text() for text in ax.texts} == expected
    drawn = np.concatenate([c.get_offsets() for c in ax.collections])
    np.testing.assert_allclose(np.sort(drawn, 0), np.sort(table[["lfc_mean", "proba_de"]].to_numpy(), 0))
    alone = sx.pl.volcano(adata, "a", key="totalvi_de_protein", show=False)
    assert {text.get_text() for text in alone.texts} == set(called.query("feature_type == 'protein'")["gene"])
    plt.close("all")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::PendingDeprecationWarning")
@pytest.mark.parametrize(
    "draw",
    ["rank_genes_groups", "rank_genes_groups_dotplot", "rank_genes_groups_matrixplot", "rank_genes_groups_heatmap"],
)
def test_scanpy_draws_genes_and_proteins(adata, draw):
    sx.tl.differential_expression(adata, "type", n_samples=N_SAMPLES)
    proteins = ad.AnnData(adata.obsm["protein"], obs=adata.obs, uns={k: adata.uns[k] for k in ("totalvi_de_protein",)})
    options = {} if draw == "rank_genes_groups" else {"dendrogram": False}
    for shown, key in ((adata, "totalvi_de"), (proteins, "totalvi_de_protein")):
        getattr(sc.pl, draw)(shown, n_genes=3, key=key, show=False, **options)
        assert plt.gcf().axes
        plt.close("all")


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_the_result_travels_in_files(adata, kind, tmp_path):
    adata.obs["slashed"] = adata.obs["type"].astype(str).replace({"a": "CD4/CD8 T", "b": "None"})
    adata.obs.loc[(adata.obs["batch"] == "1") & (adata.obs["type"] == "c"), "slashed"] = "no panel"
    sx.tl.differential_expression(adata, "slashed", n_samples=N_SAMPLES, key_added="mine", protein_pseudocount=2)
    del adata.obsm["protein"]  # a table whose columns have a "/" cannot be written
    path = tmp_path / f"file.{kind}"
    getattr(adata, f"write_{kind}")(path)
    back = getattr(ad, f"read_{kind}")(path)
    for key in ("mine", "mine_protein"):
        pd.testing.assert_frame_equal(
            sx.get.de_df(back, key=key), sx.get.de_df(adata, key=key), check_dtype=False, check_categorical=False
        )
        frame, expected = (sc.get.rank_genes_groups_df(a, group="CD4/CD8 T", key=key) for a in (back, adata))
        pd.testing.assert_frame_equal(frame, expected, check_dtype=False)
    assert "totalvi_de_protein" not in back.uns


@pytest.mark.parametrize(
    ("setup", "options"),
    [
        ({}, {"latent_distribution": "ln"}),
        ({"batch_key": "batch"}, {"reconstruction_loss_gene": "zinb", "library": "latent", "protein_efficiency": True}),
        ({"batch_key": "batch", "labels_key": "type"}, {"protein_dispersion": "protein-label"}),
        ({"size_factor_key": "size"}, {"library": "size_factor"}),
    ],
    ids=str,
)
def test_every_kind_of_fit_can_be_asked(adata, setup, options):
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() / 500
    adata.obsm["protein"] = adata.obsm["protein"].to_numpy()  # without names
    sx.pp.setup_anndata(adata, protein_obsm_key="protein", **setup)
    sx.tl.fit(adata, "totalvi", max_epochs=1, n_hidden=8, n_latent=2, progress=False, **options)
    for asked in ({}, {"weights": "importance"}, {"mode": "vanilla"}):
        table = result(adata, "type", n_samples=400, **asked)
        assert set(table.index) == {f"protein_{i}" for i in range(len(PROTEINS))}
        assert np.isfinite(table.select_dtypes("number").to_numpy()).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"protein_pseudocount": 0}, ValueError, "protein_pseudocount=0 must be at least 0.00098"),
        ({"protein_pseudocount": np.inf}, ValueError, "protein_pseudocount=inf must be at least"),
        ({"protein_pseudocount": "auto"}, TypeError, "protein_pseudocount='auto' is a str"),
        ({"protein_pseudocount": 1, "mode": "vanilla"}, ValueError, "protein_pseudocount has no effect with mode="),
        ({"protein_pseudocount": 1, "key": "genes"}, ValueError, r"has no effect: fit 'genes' \('scvi'\) has no prot"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_written(adata, options, error, message):
    if "key" in options:
        sx.tl.fit(adata, max_epochs=1, n_hidden=8, progress=False, key_added="genes")
    before = set(adata.uns)
    with pytest.raises(error, match=message):
        sx.tl.differential_expression(adata, "type", **options)
    assert set(adata.uns) == before
