"""Differential expression against all pairs of posterior samples, planted truth, and what scanpy makes of it."""

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
from scvi_ext.tl import _pool

N_SAMPLES = 3000


def planted(n_cells=600, n_genes=60, seed=0) -> ad.AnnData:
    """Three groups of cells in two batches; genes 0 to 4 are four times as high in a, the last one is nowhere."""
    rng = np.random.default_rng(seed)
    profile = np.tile(rng.lognormal(0, 1, n_genes), (3, 1))
    profile[0, :5] *= 4
    profile[:, -1] = 0
    profile /= profile.sum(1, keepdims=True)
    group, batch = rng.integers(0, 3, n_cells), rng.integers(0, 2, n_cells)
    rate = profile[group] * rng.lognormal(6.5, 0.3, (n_cells, 1))
    rate[:, 10:20] *= 1 + 2 * batch[:, None]
    x = rng.poisson(rng.gamma(4, rate / 4)).astype(np.float32)
    obs = pd.DataFrame({"type": pd.Categorical(np.array(list("abc"))[group]), "batch": batch.astype(str)})
    obs.index = [f"cell{i}" for i in range(n_cells)]
    adata = ad.AnnData(sp.csr_matrix(x), obs=obs)
    adata.var_names = [f"gene{i}" for i in range(n_genes)]
    return adata


@pytest.fixture(scope="module")
def trained() -> ad.AnnData:
    adata = planted()
    with pytest.warns(sx.ScviExtWarning, match="zero in all cells"):
        sx.pp.setup_anndata(adata, batch_key="batch")
    # After 30 epochs the probabilities of what was planted are 0.93 to 0.99, and it takes luck to be sure of all of it.
    sx.tl.fit(adata, max_epochs=50, n_hidden=32, n_latent=4, progress=False, seed=0)
    return adata


@pytest.fixture
def adata(trained) -> ad.AnnData:
    return trained.copy()


def result(adata, *args, n_samples=N_SAMPLES, group=None, **options) -> pd.DataFrame:
    """The table of a comparison in the order of the genes."""
    changed = sx.tl.differential_expression(adata, *args, n_samples=n_samples, copy=True, **options)
    table = changed.uns["scvi_de"]["table"]
    return table if group is None else table[table["group"] == group].reset_index(drop=True)


def all_pairs(adata, one, other, pseudocount, **options) -> np.ndarray:
    """log2 fold changes of all pairs of samples of two sets of cells, (pairs, genes), by another way."""
    sides = []
    for seed, cells in enumerate((one, other)):
        values = sx.tl.get_normalized_expression(
            adata, library_size=1.0, n_samples=6, return_mean=False, indices=cells, seed=seed, **options
        )
        sides.append(np.log2(values.reshape(-1, adata.n_vars).astype(float) + pseudocount))
    rng = np.random.default_rng(0)
    n_pairs = 200_000
    return sides[0][rng.integers(len(sides[0]), size=n_pairs)] - sides[1][rng.integers(len(sides[1]), size=n_pairs)]


@pytest.mark.parametrize("options", [{}, {"transform_batch": "1"}])
def test_it_is_what_all_pairs_of_samples_say(adata, options):
    group = adata.obs["type"].to_numpy()
    table = result(adata, "type", group="a", n_samples=12_000, delta=0.3, pseudocount=1e-3, **options)
    change = all_pairs(adata, group == "a", group != "a", 1e-3, **options)
    standard_error = np.hypot(table["proba_mcse"], np.sqrt(0.25 / 1000))  # 200 cells and their samples on the other way
    for name, expected in (("proba_up", change >= 0.3), ("proba_down", change <= -0.3)):
        assert (abs(table[name] - expected.mean(0)) < N_STANDARD_ERRORS * standard_error).all()
    spread = change.std(0) / np.sqrt(1000)
    assert (abs(table["lfc_mean"] - change.mean(0)) < N_STANDARD_ERRORS * np.hypot(table["lfc_mcse"], spread)).all()
    np.testing.assert_allclose(table["lfc_sd"], change.std(0), rtol=0.15)  # of 1,200 samples, with heavy tails
    for name, q in (("median", 0.5), ("low", 0.025), ("high", 0.975)):
        off = abs(table[f"lfc_{name}"] - np.quantile(change, q, axis=0))
        assert (off < 0.5 * change.std(0) + 1 / 32).all()  # the width of a bin
        assert off.mean() < 0.1 * change.std(0).mean()


def test_columns_fit_together(adata):
    table = result(adata, "type")
    assert len(table) == 3 * adata.n_vars
    np.testing.assert_allclose(table["proba_de"], table[["proba_up", "proba_down"]].max(axis=1))
    two = result(adata, "type", hypothesis="two")
    np.testing.assert_allclose(two["proba_de"], table["proba_up"] + table["proba_down"], atol=1e-12)
    assert (two["bayes_factor"] >= table["bayes_factor"] - 1e-12).all()
    assert ((table["lfc_low"] <= table["lfc_median"]) & (table["lfc_median"] <= table["lfc_high"])).all()
    assert table["proba_mcse"].between(0, 0.02).all()
    assert (table["delta"] == 0.25).all()
    for name, rows in table.groupby("group", observed=True):
        judged = rows[rows["reason"] == ""]
        assert (judged["is_de"] == (judged["fdr"] <= 0.05)).all(), name
        assert rows["pseudocount"].nunique() == 1


def test_numbers_of_the_counts_are_those_of_the_counts(adata):
    table = result(adata, "type", group="b", reference="c")
    x, group = adata.X.toarray().astype(float), adata.obs["type"].to_numpy()
    normalized = 1e4 * x / x.sum(1, keepdims=True)
    for number, name in ((1, "b"), (2, "c")):
        np.testing.assert_allclose(table[f"raw_mean{number}"], x[group == name].mean(0), rtol=1e-6)
        np.testing.assert_allclose(table[f"fraction{number}"], (x > 0)[group == name].mean(0), rtol=1e-6)
        np.testing.assert_allclose(table[f"raw_normalized_mean{number}"], normalized[group == name].mean(0), rtol=1e-5)
    assert (table["scale1"].sum(), table["scale2"].sum()) == pytest.approx((1, 1), abs=1e-3)


def test_planted_genes_are_called_and_go_up(adata):
    called = result(adata, "type", group="a", n_samples=12_000).query("is_de")
    assert set(called["gene"]) == {f"gene{i}" for i in range(5)}
    assert called["lfc_mean"].between(1.2, 2.4).all()  # log2 of 4, less the change of the sum and the pseudocount


def test_genes_without_counts_are_never_called(adata):
    for options in ({}, {"fdr_target": 0.999}, {"mode": "vanilla", "fdr_target": 0.999}, {"pseudocount": 1e-7}):
        table = result(adata, "type", **options)
        silent = table[table["gene"] == "gene59"]
        assert (silent["reason"] == "unexpressed").all()
        assert not silent["is_de"].any()
        assert (silent["fdr"] == 1).all()
    table = result(adata, "type", min_fraction=0.9, fdr_target=0.999)
    rare = (table[["fraction1", "fraction2"]].max(axis=1) < 0.9) & (table["gene"] != "gene59")
    assert rare.any()
    assert (table.loc[rare, "reason"] == "below min_fraction").all()
    assert not table.loc[rare, "is_de"].any()


def test_profiles_are_decoded_once_for_all_groups(adata):
    def n_decoded(**options):
        sx.tl.differential_expression(adata, "type", n_samples=N_SAMPLES, **options)
        return adata.uns["scvi_de"]["params"]["n_decoded"]

    assert n_decoded() == n_decoded(groups=["a"], reference="b") == n_decoded(batch_correction=True) == N_SAMPLES
    assert n_decoded(weights="importance") == 25 * N_SAMPLES


def test_only_drawn_cells_are_encoded(adata, monkeypatch):
    seen = []
    original = _pool.replace

    def watched(instance, **changes):
        if "store" in changes:
            seen.append(changes["store"].n_cells)
        return original(instance, **changes)

    monkeypatch.setattr(_pool, "replace", watched)
    monkeypatch.setattr(_pool, "_CELLS_AT_ONCE", 128)  # so that memory does not grow with their number
    result(adata, "type", n_samples=300)
    assert seen == [128, 128, 44]


def test_two_sides_given_by_their_cells_are_the_same_as_two_groups(adata):
    group = adata.obs["type"].to_numpy()
    expected = result(adata, "type", groups=["a"], reference="b").drop(columns=["group", "reference"])
    for idx1, idx2 in (
        (group == "a", group == "b"),
        (np.flatnonzero(group == "a"), adata.obs_names[group == "b"]),
    ):
        found = result(adata, idx1=idx1, idx2=idx2)
        assert set(found["group"]) == {"idx1"}
        assert set(found["reference"]) == {"idx2"}
        pd.testing.assert_frame_equal(found.drop(columns=["group", "reference"]), expected)
    rest = result(adata, "type", groups="a").drop(columns=["group", "reference"])
    found = result(adata, idx1=group == "a").drop(columns=["group", "reference"])
    pd.testing.assert_frame_equal(found, rest)


def test_cells_without_a_group_take_no_part(adata):
    adata.obs["some"] = adata.obs["type"].where(np.arange(adata.n_obs) % 2 == 0)
    kept = adata[~adata.obs["some"].isna()].copy()
    pd.testing.assert_frame_equal(result(adata, "some"), result(kept, "type"))
    pd.testing.assert_frame_equal(result(adata, "type", indices=np.arange(0, adata.n_obs, 2)), result(kept, "type"))


def test_small_groups_are_left_out_but_stay_in_the_rest(adata):
    groups = adata.obs["type"].astype(str)
    groups.iloc[:3] = "tiny"
    adata.obs["with tiny"] = groups
    assert "tiny" in set(result(adata, "with tiny")["group"])
    assert "tiny" in set(result(adata, "with tiny", min_cells=3)["group"])
    table = result(adata, "with tiny", min_cells=4)
    assert set(table["group"]) == {"a", "b", "c"}
    assert set(result(adata, "with tiny", groups=["tiny"])["group"]) == {"tiny"}
    x = adata.X.toarray()
    np.testing.assert_allclose(
        table[table["group"] == "a"]["raw_mean2"], x[(groups != "a").to_numpy()].mean(0), rtol=1e-6
    )


def test_a_restriction_holds_for_both_sides(adata):
    found = result(adata, idx1=np.arange(10), indices=np.arange(5, 300))
    expected = result(adata, idx1=np.arange(5, 10), idx2=np.arange(10, 300))
    numbers = [column for column in found if column not in ("group", "reference")]
    pd.testing.assert_frame_equal(found[numbers], expected[numbers])


def test_a_few_cells_do_not_make_the_pseudocount(adata):
    """A gene that three cells do not have may well be expressed."""
    few, rest = adata.obs["type"].to_numpy() == "a", adata.obs["type"].to_numpy() != "a"
    whole = result(adata, idx1=few, idx2=rest)["pseudocount"].iloc[0]
    for n in (1, 3, 30):
        found = result(adata, idx1=np.flatnonzero(few)[:n], idx2=rest)["pseudocount"].iloc[0]
        assert found == pytest.approx(whole, rel=0.2)  # of draws of the rest alone
    both_few = result(adata, idx1=np.flatnonzero(few)[:30], idx2=np.flatnonzero(rest)[:60])["pseudocount"].iloc[0]
    assert both_few < 3 * whole
    assert (result(adata, "type", mode="vanilla")["pseudocount"] == 0).all()


def test_noise_is_not_called_however_few_the_draws(adata):
    halves = np.random.default_rng(0).permutation(adata.n_obs)
    for options in ({}, {"weights": "importance"}):
        table = result(adata, idx1=halves[:300], n_samples=50, **options)
        assert not table["is_de"].any()


def test_a_group_must_not_be_called_rest(adata):
    adata.obs["type"] = adata.obs["type"].cat.rename_categories({"c": "rest"})
    with pytest.raises(ValueError, match="has a group called 'rest'"):
        sx.tl.differential_expression(adata, "type")


def test_delta_is_not_learned_from_a_handful_of_genes(adata):
    few = adata[:, :5].copy()
    few = few[np.asarray(few.X.sum(1)).ravel() > 0].copy()
    sx.pp.setup_anndata(few, batch_key="batch")
    sx.tl.fit(few, max_epochs=1, n_hidden=8, progress=False)
    with pytest.raises(ValueError, match="delta=None learns from the genes, of which there are 5"):
        sx.tl.differential_expression(few, "type", delta=None)


def test_batches_are_taken_out_where_they_are_not_shared(adata):
    """Group and batch are confounded: without correction the genes of the batch differ, with it they do not."""
    chosen = ((adata.obs["type"] == "b") & (adata.obs["batch"] == "0")) | (
        (adata.obs["type"] == "c") & (adata.obs["batch"] == "1")
    )
    of_batch = slice(10, 20)
    options = {"groups": ["c"], "reference": "b", "indices": chosen, "n_samples": 6000}
    plain = result(adata, "type", **options)
    corrected = result(adata, "type", batch_correction=True, **options)
    in_one = result(adata, "type", transform_batch="0", **options)
    assert plain["lfc_mean"][of_batch].mean() > 0.8
    assert abs(corrected["lfc_mean"][of_batch]).mean() < 0.25 > abs(in_one["lfc_mean"][of_batch]).mean()
    both = result(adata, "type", transform_batch=["0", "1"], **options)
    pd.testing.assert_frame_equal(both, corrected)


def test_a_swap_of_the_sides_changes_the_sign(adata):
    one, other = (
        result(adata, "type", groups=[a], reference=b, pseudocount=1e-3, n_samples=20_000) for a, b in ("ab", "ba")
    )
    error = N_STANDARD_ERRORS * np.hypot(one["proba_mcse"], other["proba_mcse"])
    assert (abs(one["proba_up"] - other["proba_down"]) <= error + 1e-9).all()
    error = N_STANDARD_ERRORS * np.hypot(one["lfc_mcse"], other["lfc_mcse"])
    assert (abs(one["lfc_mean"] + other["lfc_mean"]) <= error).all()


def test_vanilla_asks_which_scale_is_larger(adata):
    table = result(adata, "type", group="a", mode="vanilla")
    np.testing.assert_allclose(table["proba_up"] + table["proba_down"], 1, atol=1e-4)  # float32 masses
    np.testing.assert_array_equal(table["proba_de"], table["proba_up"])
    np.testing.assert_allclose(
        table["bayes_factor"], np.log((table["proba_up"] + 1e-8) / (1 - table["proba_up"] + 1e-8))
    )
    assert table["proba_up"][:5].min() > 0.95


def test_permuted_pairs_show_no_direction(adata):
    table = result(adata, "type", groups=["a"], reference="b", permuted=True, hypothesis="two")
    assert (table["proba_permuted"][:5] < table["proba_de"][:5]).all()
    vanilla = result(adata, "type", groups=["a"], reference="b", permuted=True, mode="vanilla")
    np.testing.assert_allclose(vanilla["proba_permuted"], 0.5, atol=1e-4)  # both sides are one set, ties count half
    assert "proba_permuted" not in result(adata, "type")


def test_importance_weights_are_those_of_the_draws(adata):
    """All samples of one cell: the weighted mean is the one that normalised expression has with the same draws."""
    idx1, idx2 = [0], [1]
    table = result(adata, idx1=idx1, idx2=idx2, weights="importance", n_samples=800)
    many = sx.tl.get_normalized_expression(
        adata, library_size=1.0, n_samples=10_000, weights="importance", indices=idx1, copy=True
    ).layers["scvi_normalized"][0]
    plain = result(adata, idx1=idx1, idx2=idx2, n_samples=20_000)
    exact = abs(table["scale1"] / many - 1)
    assert exact.mean() < 0.02  # 400 groups of 25 draws, each normalised by itself, which leaves a bias of order 1/25
    assert (table["scale1"] != plain["scale1"]).all()


def test_delta_is_learned_from_the_genes(adata):
    table = result(adata, "type", group="a", delta=None)
    assert table["delta"].nunique() == 1
    assert 0.1 <= table["delta"].iloc[0] < 2


def test_results_do_not_depend_on_batch_size_and_only_on_the_seed(adata):
    expected = result(adata, "type")
    state = np.random.get_state()[1].copy()
    pd.testing.assert_frame_equal(result(adata, "type"), expected)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    # sums of float32 masses in another order
    pd.testing.assert_frame_equal(result(adata, "type", batch_size=7), expected, rtol=1e-3, atol=1e-4)
    assert (result(adata, "type", seed=1)["lfc_mean"] != expected["lfc_mean"]).any()


def test_genes_in_several_rounds_give_the_same(adata, monkeypatch):
    for options in ({}, {"batch_correction": True, "delta": None}, {"weights": "importance", "permuted": True}):
        expected = result(adata, "type", **options)
        with monkeypatch.context() as few:
            few.setattr(_pool, "_HISTOGRAM_BYTES", 4 * 1537 * 3 * 7)
            pd.testing.assert_frame_equal(result(adata, "type", **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"library": "latent"},
        {"latent_distribution": "ln"},
        {"reconstruction_loss": "poisson"},
        {"dispersion": "gene-batch", "reconstruction_loss": "nb"},
        {"encode_covariates": True},
    ],
    ids=str,
)
def test_every_kind_of_fit_can_be_asked(options, adata):
    sx.tl.fit(adata, max_epochs=1, n_hidden=8, n_latent=2, progress=False, **options)
    for asked in ({}, {"batch_correction": True}, {"weights": "importance"}):
        table = result(adata, "type", n_samples=400, **asked)
        assert np.isfinite(table.select_dtypes("number").to_numpy()).all()


def test_scales_above_one_are_told_apart_where_there_is_a_size_factor(adata):
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() / 10_000
    with pytest.warns(sx.ScviExtWarning, match="zero in all cells"):
        sx.pp.setup_anndata(adata, size_factor_key="size")
    sx.tl.fit(adata, max_epochs=5, n_hidden=16, n_latent=3, progress=False)
    table = result(adata, "type", group="a")
    sx.tl.get_normalized_expression(adata, library_size=1.0, n_samples=5)
    of_type = (adata.obs["type"] == "a").to_numpy()
    expected = adata.layers["scvi_normalized"][of_type].mean(0)
    assert expected.max() > 5
    np.testing.assert_allclose(table["scale1"], expected, rtol=0.05)  # 1,000 draws of either


def test_scanpy_reads_the_result(adata):
    sx.tl.differential_expression(adata, "type", n_samples=N_SAMPLES)
    expected = sc.tl.rank_genes_groups(sc.pp.log1p(adata, copy=True), "type", copy=True).uns["rank_genes_groups"]
    found = adata.uns["scvi_de"]
    for name in ("names", "scores", "logfoldchanges", "pvals", "pvals_adj"):
        assert found[name].dtype == expected[name].dtype
    assert set(expected["params"]) - {"corr_method", "layer"} <= set(found["params"])
    frame = sc.get.rank_genes_groups_df(adata, group="a", key="scvi_de")
    assert set(frame["names"][:5]) == {f"gene{i}" for i in range(5)}
    assert (np.diff(frame["scores"]) <= 0).all()
    table = sx.get.de_df(adata, "a").set_index("gene").loc[frame["names"]]
    np.testing.assert_allclose(frame["pvals"], 1 - table["proba_de"])
    np.testing.assert_allclose(frame["pvals_adj"], table["fdr"])
    np.testing.assert_allclose(frame["logfoldchanges"], table["lfc_mean"], rtol=1e-6)
    several = sc.get.rank_genes_groups_df(adata, group=None, key="scvi_de", pval_cutoff=0.05)
    assert (several["pvals_adj"] < 0.05).all()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::PendingDeprecationWarning")
@pytest.mark.parametrize(
    "draw",
    ["rank_genes_groups", "rank_genes_groups_dotplot", "rank_genes_groups_matrixplot", "rank_genes_groups_heatmap"],
)
def test_scanpy_draws_the_result(adata, draw):
    sx.tl.differential_expression(adata, "type", n_samples=N_SAMPLES)
    sx.tl.get_latent(adata)
    sc.tl.dendrogram(adata, "type", use_rep="X_scvi")
    getattr(sc.pl, draw)(adata, n_genes=3, key="scvi_de", show=False)
    assert plt.gcf().axes
    if "plot" in draw:
        getattr(sc.pl, draw)(adata, n_genes=3, key="scvi_de", values_to_plot="logfoldchanges", show=False)
    plt.close("all")


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_the_result_travels_in_files(adata, kind, tmp_path):
    adata.obs["slashed"] = adata.obs["type"].astype(str).replace({"a": "CD4/CD8 T", "b": "None"})
    sx.tl.differential_expression(adata, "slashed", batch_correction=True, permuted=True, n_samples=N_SAMPLES)
    sx.tl.within_group_de(adata, "slashed", condition="batch", n_samples=N_SAMPLES)
    path = tmp_path / f"file.{kind}"
    getattr(adata, f"write_{kind}")(path)
    back = getattr(ad, f"read_{kind}")(path)
    for key in ("scvi_de", "scvi_within_group_de"):
        pd.testing.assert_frame_equal(
            sx.get.de_df(back, key=key), sx.get.de_df(adata, key=key), check_dtype=False, check_categorical=False
        )
        frame = sc.get.rank_genes_groups_df(back, group="CD4/CD8 T", key=key)
        expected = sc.get.rank_genes_groups_df(adata, group="CD4/CD8 T", key=key)
        pd.testing.assert_frame_equal(frame, expected, check_dtype=False)


def test_within_groups_is_a_comparison_of_two_conditions_in_each(adata):
    sx.tl.within_group_de(adata, "type", condition="batch", n_samples=12_000)
    table = sx.get.de_df(adata, key="scvi_within_group_de")
    assert set(table["group"]) == {"a", "b", "c"}
    assert set(table["reference"]) == {"batch = 0"}
    genes = table["gene"].isin([f"gene{i}" for i in range(10, 20)])
    assert (table[genes].groupby("group", observed=True)["lfc_mean"].mean() > 0.7).all()
    assert table[genes]["is_de"].mean() > 0.7
    turned = sx.tl.within_group_de(
        adata, "type", condition="batch", reference="1", indices=adata.obs["type"] == "a", n_samples=12_000, copy=True
    )
    assert turned.uns["scvi_within_group_de"]["params"]["tested"] == "0"
    a = turned.uns["scvi_within_group_de"]["table"]
    of_type, batch = adata.obs["type"].to_numpy() == "a", adata.obs["batch"].to_numpy()
    expected = result(adata, idx1=of_type & (batch == "0"), idx2=of_type & (batch == "1"), n_samples=12_000)
    pd.testing.assert_frame_equal(a.drop(columns=["group", "reference"]), expected.drop(columns=["group", "reference"]))


def test_views_and_copies(adata):
    view = adata[adata.obs["type"] != "c"]
    sx.tl.differential_expression(view, "type", n_samples=N_SAMPLES)
    assert set(sx.get.de_df(view)["group"]) == {"a", "b"}
    assert "scvi_de" not in adata.uns
    copied = sx.tl.differential_expression(adata, "type", n_samples=N_SAMPLES, key_added="other", copy=True)
    assert "other" in copied.uns
    assert "other" not in adata.uns


@pytest.mark.parametrize("values", [[0, 1, 2], [True, False, True], [0.5, 1.5, 2.5]], ids=str)
def test_groups_of_any_kind_are_named_by_their_text(adata, values):
    adata.obs["kind"] = np.array(values)[adata.obs["type"].cat.codes]
    table = result(adata, "kind", n_samples=400)
    assert set(table["group"]) == {str(v) for v in values}
    assert set(result(adata, "kind", groups=[str(values[0])], n_samples=400)["group"]) == {str(values[0])}
    first, second, *_ = sorted(set(values))
    pair = result(adata, "kind", groups=first, reference=second, n_samples=400)
    assert set(pair["reference"]) == {str(second)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"Give either groupby, a column of adata\.obs, or idx1"),
        ({"groupby": "type", "idx1": [0]}, ValueError, "Give either groupby"),
        ({"groupby": "type", "idx2": [0]}, ValueError, "idx2 has no effect with groupby"),
        ({"idx1": [0], "reference": "a"}, ValueError, "have no effect with idx1"),
        ({"idx1": [0, 1], "idx2": [1, 2]}, ValueError, "share 1 cells"),
        ({"idx1": [], "idx2": [1, 2]}, ValueError, "There are no cells in idx1"),
        ({"idx1": slice(None)}, ValueError, r"There are no cells in idx2 \(all cells but idx1\)"),
        ({"idx1": [0], "idx2": [1], "indices": [1, 2]}, ValueError, "There are no cells in idx1"),
        ({"groupby": ["type"]}, TypeError, "the name of a column of adata.obs is needed"),
        ({"groupby": "type", "groups": None}, KeyError, "'None' is not in"),
        ({"groupby": "type", "batch_correction": "yes"}, TypeError, "batch_correction='yes' is a str"),
        ({"groupby": "type", "permuted": 1}, TypeError, "permuted=1 is a int"),
        ({"groupby": "type", "mode": "vanilla", "pseudocount": 1e-3}, ValueError, "pseudocount has no effect"),
        ({"groupby": "typ"}, KeyError, "typ"),
        ({"groupby": "type", "groups": ["d"]}, KeyError, "'d' is not in"),
        ({"groupby": "type", "reference": "d"}, KeyError, "'d' is not in"),
        ({"groupby": "type", "groups": ["a"], "reference": "a"}, ValueError, "There is nothing to compare"),
        ({"groupby": "type", "groups": ["a", "a"]}, ValueError, "There is nothing to compare"),
        ({"groupby": "type", "groups": []}, ValueError, "There is nothing to compare"),
        ({"groupby": "type", "min_cells": 10_000}, ValueError, "groups='all' needs 10000 cells"),
        ({"groupby": "type", "mode": "changed"}, ValueError, "Did you mean 'change'"),
        ({"groupby": "type", "mode": "vanilla", "delta": 0.5}, ValueError, "delta has no effect with mode='vanilla'"),
        ({"groupby": "type", "delta": 0}, ValueError, "delta=0 must be positive"),
        ({"groupby": "type", "delta": "auto"}, TypeError, "delta='auto' is a str"),
        ({"groupby": "type", "pseudocount": 0.0}, ValueError, "pseudocount=0.0 must be at least"),
        ({"groupby": "type", "fdr_target": 5}, ValueError, "fdr_target=5 must lie between 0 and 1"),
        ({"groupby": "type", "min_fraction": -1}, ValueError, "must be a share of cells"),
        (
            {"groupby": "type", "n_samples": 20},
            ValueError,
            "leaves 6 draws for each of 3 sets of cells: take 75 or more",
        ),
        (
            {"groupby": "type", "batch_correction": True, "transform_batch": "0"},
            ValueError,
            "leave out transform_batch",
        ),
        ({"groupby": "type", "transform_batch": "x"}, ValueError, "transform_batch='x'"),
        ({"groupby": "type", "key": "none"}, KeyError, "none"),
        ({"groupby": "type", "key_added": "scvi_ext"}, ValueError, "choose another name"),
        ({"groupby": "type", "key_added": "a/b"}, ValueError, "without '/'"),
        ({"groupby": "type", "weights": "uniform"}, ValueError, "weights='uniform'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_written(adata, options, error, message):
    before = set(adata.uns)
    with pytest.raises(error, match=message):
        sx.tl.differential_expression(adata, **options)
    assert set(adata.uns) == before


def test_conditions_must_be_clear(adata):
    with pytest.raises(ValueError, match="name two different ones"):
        sx.tl.within_group_de(adata, "batch", condition="type")
    with pytest.raises(KeyError, match="'d' is not in"):
        sx.tl.within_group_de(adata, "batch", condition="type", reference="d")
    with pytest.raises(ValueError, match="name two different ones"):
        sx.tl.within_group_de(adata, "type", condition="batch", reference="0", tested="0")
    with pytest.raises(ValueError, match="lower min_cells"):
        sx.tl.within_group_de(adata, "type", condition="batch", min_cells=10_000)


def test_batch_correction_needs_batches(adata):
    with pytest.warns(sx.ScviExtWarning, match="zero in all cells"):
        sx.pp.setup_anndata(adata)
    sx.tl.fit(adata, max_epochs=1, n_hidden=8, progress=False)
    with pytest.raises(ValueError, match="knows one batch only"):
        sx.tl.differential_expression(adata, "type", batch_correction=True)


def test_the_table_is_found_by_name(adata):
    with pytest.raises(KeyError, match="'scvi_de' is not in"):
        sx.get.de_df(adata)
    sx.tl.differential_expression(adata, "type", n_samples=N_SAMPLES)
    with pytest.raises(KeyError, match="'d' is not in"):
        sx.get.de_df(adata, "d")
    called = sx.get.de_df(adata, only_called=True)
    assert called["is_de"].all()
    assert len(called) == adata.uns["scvi_de"]["table"]["is_de"].sum() > 0
    for _, rows in sx.get.de_df(adata).groupby("group", observed=True):
        assert (np.diff(rows["proba_de"]) <= 0).all()
    with pytest.raises(ValueError, match="There are 3 groups, and a volcano shows one"):
        sx.pl.volcano(adata)
    with pytest.raises(ValueError, match="n_names=-1 must be 0 or more"):
        sx.pl.volcano(adata, "a", n_names=-1)


def test_a_volcano_shows_every_gene_and_names_those_that_are_called(adata):
    sx.tl.differential_expression(adata, "type", n_samples=N_SAMPLES)
    ax = sx.pl.volcano(adata, "a", show=False)
    drawn = np.concatenate([c.get_offsets() for c in ax.collections])
    table = sx.get.de_df(adata, "a")
    expected = table[["lfc_mean", "proba_de"]].to_numpy()
    np.testing.assert_allclose(np.sort(drawn, 0), np.sort(expected, 0))
    assert {text.get_text() for text in ax.texts} == set(table.query("is_de")["gene"])
    _, other = plt.subplots()
    assert sx.pl.volcano(adata, "a", n_names=2, ax=other, show=False) is other
    assert len(other.texts) == 2
    plt.close("all")
