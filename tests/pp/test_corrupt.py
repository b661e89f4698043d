"""Corrupting counts: what changes obeys its law, what does not is not touched, and the record says which is which."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

import scvi_ext as sx
from scvi_ext.data.corruption import changed_entries, read_corruption, read_layer
from scvi_ext.functional.corruption import CORRUPTIONS, _hypergeometric

METHODS = ("uniform", "binomial", "thinning")
FALSE_ALARM = 1e-6  # of a test of a law, for a correct program

method = pytest.mark.parametrize("method", METHODS)


def dense(values) -> np.ndarray:
    return values.toarray() if sp.issparse(values) else np.asarray(values)


def corrupted(adata: ad.AnnData, **options) -> np.ndarray:
    return dense(sx.pp.corrupt(adata, copy=True, **options).layers["corrupted"])


def check_law(draws, probabilities: np.ndarray) -> None:
    """Chi square of draws of 0, 1, ... against their probabilities; rare values count as one."""
    found, expected = np.bincount(draws, minlength=len(probabilities)), probabilities * len(draws)
    assert found[expected == 0].sum() == 0
    rare = expected < 10
    found, expected = (np.append(values[~rare], values[rare].sum()) for values in (found, expected))
    if expected[-1] < 10:
        assert found[-1] < 50  # P(Poisson(10) >= 50) = 2e-19
        found, expected = found[:-1], expected[:-1]
    assert len(found) == 1 or stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue > FALSE_ALARM


# ---- the laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.29, 1.0])
def test_uniform_changes_a_tenth_of_the_chosen_counts_to_zero(rate):
    counts = np.random.default_rng(0).integers(1, 9, 50_000)
    after = CORRUPTIONS["uniform"](counts, 10**6, rate, np.random.default_rng(1))
    changed = after != counts
    assert (after[changed] == 0).all()
    assert stats.binomtest(int(changed.sum()), int(rate * 50_000), 0.1).pvalue > FALSE_ALARM


def test_uniform_prefers_no_entry():
    counts = np.ones(20, int)
    rng = np.random.default_rng(0)
    lost = sum(CORRUPTIONS["uniform"](counts, 400, 0.5, rng) == 0 for _ in range(20_000))
    assert stats.chisquare(lost).pvalue > FALSE_ALARM  # a little conservative: 10 of 20 are chosen without replacement


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_binomial_is_the_law_of_a_draw_over_the_whole_matrix(rate):
    """Beside the plain way: choose among all positions, replace each by Binomial(x, 0.2)."""
    matrix = np.random.default_rng(0).poisson(0.7, (40, 30))
    non_zero = matrix[matrix > 0]
    rng = np.random.default_rng(1)
    ours, plain = [], []
    for _ in range(3000):
        after = CORRUPTIONS["binomial"](non_zero, matrix.size, rate, rng)
        ours.append([(after != non_zero).sum(), after.sum()])
        flat = matrix.ravel().copy()
        chosen = rng.permutation(flat.size)[: int(rate * flat.size)]
        flat[chosen] = rng.binomial(flat[chosen], 0.2)
        plain.append([(flat != matrix.ravel()).sum(), flat.sum()])
    for one, other in zip(np.transpose(ours), np.transpose(plain), strict=True):
        levels = np.unique(np.concatenate([one, other]), return_inverse=True)[1]
        bins = np.minimum(levels // max(1, (levels.max() + 1) // 15), 14)
        table = np.stack([np.bincount(bins[:3000], minlength=15), np.bincount(bins[3000:], minlength=15)])
        assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("marked", "n", "chosen"), [(30, 100, 20), (5, 1000, 500), (60, 70, 69), (10, 10, 4)])
def test_the_number_of_chosen_non_zeros_is_hypergeometric(marked, n, chosen):
    rng = np.random.default_rng(0)
    draws = [_hypergeometric(marked, n, chosen, rng) for _ in range(20_000)]
    check_law(draws, stats.hypergeom(n, marked, chosen).pmf(np.arange(marked + 1)))


def test_matrices_beyond_the_reach_of_numpy_are_possible():
    n, marked, chosen = 4 * 10**9, 10**8, 4 * 10**8
    law = stats.hypergeom(n, marked, chosen)
    found = [_hypergeometric(marked, n, chosen, np.random.default_rng(seed)) for seed in range(5)]
    assert np.all(np.abs(np.subtract(found, law.mean())) < 5.5 * law.std())
    assert len(set(found)) > 1


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_thinning_is_binomial(rate):
    counts = np.full(50_000, 6)
    after = CORRUPTIONS["thinning"](counts, 10**6, rate, np.random.default_rng(0))
    check_law(after, stats.binom(6, 1 - rate).pmf(np.arange(7)))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_left_and_what_was_lost_are_as_many_molecules_as_before(name):
    counts = np.random.default_rng(0).integers(1, 50, 1000)
    after = CORRUPTIONS[name](counts, 5000, 0.5, np.random.default_rng(0))
    assert after.dtype.kind == "i"
    assert ((0 <= after) & (after <= counts)).all()


# ---- the layer -----------------------------------------------------------------------------------------------------

KINDS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dense": np.asarray,
    "fortran": np.asfortranarray,
}


@method
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint16", "int8"])
def test_format_and_dtype_are_kept_and_do_not_matter(make_counts, method, kind, dtype):
    adata = make_counts(n_cells=60, n_genes=20, kind=np.asarray)
    expected = corrupted(adata, method=method, rate=0.5)
    adata.X = KINDS[kind](adata.X.astype(dtype))
    before = adata.X.copy()
    sx.pp.corrupt(adata, method=method, rate=0.5)
    layer = adata.layers["corrupted"]
    assert isinstance(layer, type(adata.X))
    assert layer.dtype == adata.X.dtype == dtype
    np.testing.assert_array_equal(dense(layer), expected)
    np.testing.assert_array_equal(dense(adata.X), dense(before))
    if sp.issparse(layer):
        assert layer.format == adata.X.format
        assert layer.has_canonical_format
        assert layer.nnz == np.count_nonzero(layer.data)
        for name in ("data", "indices", "indptr"):  # the source bit for bit, and nothing shared with it
            np.testing.assert_array_equal(getattr(adata.X, name), getattr(before, name))
            assert not np.shares_memory(getattr(layer, name), getattr(adata.X, name))


def test_zeros_that_are_stored_are_zeros(counts):
    plain = corrupted(counts, rate=0.5)
    x = counts.X.tolil()
    explicit = sp.csr_matrix(x)
    rows, columns = (explicit.toarray() == 0).nonzero()
    zeros = sp.csr_matrix((np.zeros(len(rows), np.float32), (rows, columns)), explicit.shape)
    explicit = sp.csr_matrix(
        (
            np.concatenate([explicit.tocoo().data, zeros.data]),
            (np.concatenate([explicit.tocoo().row, rows]), np.concatenate([explicit.tocoo().col, columns])),
        ),
        explicit.shape,
    )
    assert explicit.nnz == counts.n_obs * counts.n_vars
    counts.X = explicit
    np.testing.assert_array_equal(corrupted(counts, rate=0.5), plain)
    assert counts.X.nnz == counts.n_obs * counts.n_vars


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_counts_on_disk_are_read(make_counts, tmp_path, kind):
    adata = make_counts(kind=kind)
    expected = corrupted(adata, rate=0.5)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sx.pp.corrupt(backed, rate=0.5)
    layer = backed.layers["corrupted"]
    np.testing.assert_array_equal(dense(layer), expected)
    assert isinstance(layer, np.ndarray) if kind is np.asarray else layer.format == adata.X.format


def test_it_reads_a_layer(counts):
    counts.layers["counts"] = counts.X.copy()
    counts.X = np.log1p(counts.X.toarray())
    with pytest.raises(ValueError, match=r"adata\.X has no raw counts\.\n- .* are not integers"):
        sx.pp.corrupt(counts)
    sx.pp.corrupt(counts, layer="counts")
    record = counts.uns["scvi_ext"]["corruptions"]["corrupted"]
    assert record == {"method": "uniform", "rate": 0.1, "seed": 0, "layer": "counts"}


@method
def test_the_seed_decides(counts, method, monkeypatch):
    first = corrupted(counts, method=method, seed=3)
    np.testing.assert_array_equal(corrupted(counts, method=method, seed=3), first)
    assert (corrupted(counts, method=method, seed=4) != first).any()
    before = np.random.get_state()[1].copy()
    monkeypatch.setattr(sx.settings, "seed", 3)
    np.testing.assert_array_equal(corrupted(counts, method=method), first)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_views_and_copies(counts):
    copy = sx.pp.corrupt(counts, copy=True)
    assert "corrupted" in copy.layers
    assert not counts.uns
    assert not len(counts.layers)
    view = counts[20:90, 5:50]
    sx.pp.corrupt(view)
    assert not view.is_view
    assert view.layers["corrupted"].shape == (70, 45)
    assert not len(counts.layers)


def test_names_of_genes_may_repeat_and_setup_is_kept(registered):
    setup = sx.get.setup(registered)
    sx.pp.corrupt(registered)
    assert sx.get.setup(registered).equals(setup)
    registered.var_names = ["gene"] * registered.n_vars
    sx.pp.corrupt(registered, key_added="again")


def test_it_says_what_it_wrote(counts, logged):
    sx.pp.corrupt(counts, rate=0.5, method="thinning")
    changed = (counts.X != counts.layers["corrupted"]).nnz
    assert f"changed {changed} of {counts.X.nnz} counts" in logged()
    assert "'corrupted', corrupted counts (adata.layers)" in logged()


# ---- the record ----------------------------------------------------------------------------------------------------


def entries(adata: ad.AnnData, name: str = "corrupted"):
    record = read_corruption(adata, name)
    return changed_entries(read_layer(adata, record.layer), read_layer(adata, name), record)


@method
def test_changed_entries_are_where_the_layers_differ(counts, method):
    sx.pp.corrupt(counts, method=method, rate=0.3)
    before, after = dense(counts.X), dense(counts.layers["corrupted"])
    found = entries(counts)
    rows, columns = (before != after).nonzero()
    np.testing.assert_array_equal(found.cells, rows)
    np.testing.assert_array_equal(found.genes, columns)
    np.testing.assert_array_equal(found.original, before[rows, columns])
    np.testing.assert_array_equal(found.corrupted, after[rows, columns])


def test_the_record_survives_subsets_and_another_order(counts):
    sx.pp.corrupt(counts, rate=0.5, method="thinning")
    rng = np.random.default_rng(0)
    other = counts[rng.permutation(201)[:120], rng.permutation(60)[:33]].copy()
    expected = dense(other.X) != dense(other.layers["corrupted"])
    found = entries(other)
    assert len(found.cells) == expected.sum()
    assert expected[found.cells, found.genes].all()


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
@pytest.mark.parametrize("layer", [None, "counts"])
def test_the_record_survives_a_file(counts, tmp_path, form, layer):
    counts.layers["counts"] = counts.X
    sx.pp.corrupt(counts, layer=layer, seed=7, rate=0.25, method="binomial", key_added="worse")
    getattr(counts, f"write_{form}")(tmp_path / "a")
    again = getattr(ad, f"read_{form}")(tmp_path / "a")
    assert read_corruption(again, "worse") == read_corruption(counts, "worse")
    for one, other in zip(entries(again, "worse"), entries(counts, "worse"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_changes_of_the_originals_are_noticed(counts):
    sx.pp.corrupt(counts)
    raw = counts.X.copy()
    for change in (lambda x: x.log1p(), lambda x: x * 1.5, lambda x: -x, lambda x: x * np.nan, lambda x: x * np.inf):
        counts.X = change(raw)
        with pytest.raises(ValueError, match=r"^adata\.X held whole counts when pp\.corrupt was called"):
            entries(counts)
    for change in (lambda x: x * 0, lambda x: x * 2, lambda x: x.power(2)):
        counts.X = change(raw)
        with pytest.raises(
            ValueError, match=r"made by setting counts to zero in adata\.X, which is not what the two say"
        ):
            entries(counts)
    counts.X = counts.layers["corrupted"].copy()
    with pytest.raises(ValueError, match="agree in all 201 cells and 60 genes"):
        entries(counts)


def test_changes_of_the_corrupted_layer_are_noticed(counts):
    sx.pp.corrupt(counts, method="thinning")
    counts.layers["corrupted"] = counts.layers["corrupted"].log1p()
    with pytest.raises(ValueError, match=r"^adata\.layers\['corrupted'\] held whole counts"):
        entries(counts)
    counts.layers["corrupted"] = counts.X + 1 * (counts.X > 0)
    with pytest.raises(ValueError, match=r"was made by lowering counts of adata\.X"):
        entries(counts)
    counts.X = counts.X * np.nan
    counts.layers["corrupted"] = counts.X
    with pytest.raises(ValueError, match=r"^adata\.X and adata\.layers\['corrupted'\] held whole counts"):
        entries(counts)


def test_restoring_leaves_no_trace(counts):
    before = counts.copy()
    sx.pp.corrupt(counts)
    sx.pp.corrupt(counts, layer="corrupted", key_added="twice")
    sx.pp.restore(counts)
    assert list(counts.layers) == ["twice"]
    assert list(counts.uns["scvi_ext"]["corruptions"]) == ["twice"]
    restored = sx.pp.restore(counts, corruption="twice", copy=True)
    assert list(counts.layers) == ["twice"]
    assert dict(restored.uns) == {}
    assert not len(restored.layers)
    assert (restored.X != before.X).nnz == 0


def test_restoring_keeps_fits_and_setup(fitted):
    keys = set(fitted.uns["scvi_ext"])
    sx.pp.corrupt(fitted)
    sx.pp.restore(fitted)
    assert set(fitted.uns["scvi_ext"]) == keys


def test_restoring_the_layer_that_is_set_up_says_so(counts):
    sx.pp.corrupt(counts)
    sx.pp.corrupt(counts, key_added="other")
    sx.pp.setup_anndata(counts, layer="corrupted")
    sx.pp.restore(counts, corruption="other")
    with pytest.warns(
        sx.ScviExtWarning, match=r"set up to read adata\.layers\['corrupted'\].* pp\.setup_anndata again"
    ):
        sx.pp.restore(counts)
    with pytest.raises(KeyError, match=r"'corrupted', the layer that pp\.setup_anndata registered, is not in"):
        sx.tl.fit(counts, max_epochs=1)
    sx.pp.setup_anndata(counts)
    sx.tl.fit(counts, max_epochs=1, n_hidden=4, n_latent=2)


def test_fits_to_what_is_replaced_are_named(counts):
    sx.pp.corrupt(counts)
    sx.pp.setup_anndata(counts, layer="corrupted")
    sx.tl.fit(counts, max_epochs=1, n_hidden=4, n_latent=2)
    sx.pp.setup_anndata(counts)
    sx.tl.fit(counts, key_added="honest", max_epochs=1, n_hidden=4, n_latent=2)
    first = dense(counts.layers["corrupted"])
    with pytest.warns(sx.ScviExtWarning, match=r"earlier adata\.layers\['corrupted'\].*: 'scvi'\. Fit again"):
        sx.pp.corrupt(counts, seed=1)
    sx.pp.restore(counts)
    with pytest.warns(sx.ScviExtWarning, match=r"earlier adata\.layers\['corrupted'\].*: 'scvi'\. Fit again"):
        sx.pp.corrupt(counts)
    sx.pp.corrupt(counts)  # the same again
    sx.pp.corrupt(counts, seed=1, key_added="another")
    np.testing.assert_array_equal(dense(counts.layers["corrupted"]), first)


def test_what_is_on_disk_cannot_be_copied(counts, tmp_path):
    counts.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"backed, with copy=True.*adata\.to_memory\(\)"):
        sx.pp.corrupt(backed, copy=True)
    with pytest.raises(ValueError, match=r"a view of a backed AnnData.*adata\.to_memory\(\)"):
        sx.pp.corrupt(backed[:9])
    sx.pp.corrupt(backed)
    with pytest.raises(ValueError, match=r"backed, with copy=True.*adata\.to_memory\(\)"):
        sx.pp.restore(backed, copy=True)
    sx.pp.restore(backed)
    assert not backed.uns


def test_restoring_a_layer_that_was_deleted_removes_the_record(counts):
    sx.pp.corrupt(counts)
    del counts.layers["corrupted"]
    sx.pp.restore(counts)
    assert "scvi_ext" not in counts.uns


def test_a_corrupted_layer_is_replaced_and_no_other(counts):
    sx.pp.corrupt(counts)
    first = counts.layers["corrupted"].copy()
    sx.pp.corrupt(counts, seed=1)
    assert (counts.layers["corrupted"] != first).nnz
    counts.layers["mine"] = counts.X.copy()
    for name, message in {
        "mine": "exists and was not written by pp.corrupt",
        "corrupted": "holds the counts to corrupt",
    }.items():
        with pytest.raises(ValueError, match=rf"adata\.layers\['{name}'\] {message}: choose another name"):
            sx.pp.corrupt(counts, layer="corrupted", key_added=name)


# ---- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": 0}, ValueError, r"rate=0 must be above 0 and at most 1"),
        ({"rate": -0.1}, ValueError, r"rate=-0.1 must be above 0"),
        ({"rate": 1.1}, ValueError, r"rate=1.1 must be above 0 and at most 1"),
        ({"rate": float("nan")}, ValueError, r"rate=nan must be above 0"),
        ({"rate": 1.0, "method": "thinning"}, ValueError, r"rate=1.0 must be above 0 and below 1"),
        ({"rate": "0.1"}, TypeError, r"rate='0.1' is a str"),
        ({"rate": 1e-5}, ValueError, r"rate=1e-05 changes none of the \d+ counts of adata\.X"),
        ({"method": "binomal"}, ValueError, r"Did you mean 'binomial'\?"),
        ({"layer": "count"}, KeyError, r"'count' is not in adata\.layers"),
        ({"key_added": "a/b"}, ValueError, r"must be a name"),
        ({"seed": -1}, ValueError, r"seed=-1 must be 0 or more"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(counts, options, error, message):
    with pytest.raises(error, match=message):
        sx.pp.corrupt(counts, **options)
    assert not counts.uns
    assert not len(counts.layers)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "missing"), (-1, "negative"), (0.5, "not integers"), (np.inf, "infinite")]
)
def test_what_is_no_count_is_refused(counts, value, message):
    counts.X[3, 4] = value
    with pytest.raises(ValueError, match=rf"adata\.X has no raw counts.*\n- 1 entries.*{message}.*'cell3'.*'gene4'"):
        sx.pp.corrupt(counts)
    assert not counts.uns


def test_counts_at_one_depth_are_counts(counts):
    x = counts.X.toarray()
    x[:, 1] += x.sum(1).max() - x.sum(1)
    counts.X = x
    sx.pp.corrupt(counts)


@pytest.mark.parametrize("shape", [(1, 60), (3, 60), (201, 1)])
def test_few_cells_or_genes(make_counts, shape):
    adata = make_counts()[: shape[0], : shape[1]].copy()
    adata.X *= 100  # so that no cell loses everything
    sx.pp.corrupt(adata, rate=0.5, method="thinning")
    assert adata.layers["corrupted"].shape == shape


def test_a_matrix_without_counts_cannot_be_corrupted():
    for shape in ((5, 4), (0, 4), (5, 0)):
        with pytest.raises(ValueError, match=r"adata\.X has no counts above zero: there is nothing to corrupt"):
            sx.pp.corrupt(ad.AnnData(np.zeros(shape, np.float32)))


def test_cells_that_lose_everything_are_counted():
    adata = ad.AnnData(np.array([[1, 0, 0], [50, 40, 30], [0, 0, 0]], np.float32))
    with pytest.warns(sx.ScviExtWarning, match="1 of 3 cells have no counts left in adata.layers.'corrupted'"):
        sx.pp.corrupt(adata, rate=0.9, method="thinning", seed=1)
    kept = adata[adata.layers["corrupted"].sum(axis=1) > 0]
    assert kept.obs_names.tolist() == ["1"]


def test_what_was_never_corrupted_has_no_record(counts):
    with pytest.raises(KeyError, match=r"has no corruptions: call scvi_ext\.pp\.corrupt"):
        sx.pp.restore(counts)
    sx.pp.corrupt(counts)
    with pytest.raises(KeyError, match=r"'corrupt' is not in .* Did you mean 'corrupted'\?"):
        sx.pp.restore(counts, corruption="corrupt")
    with pytest.raises(TypeError, match="adata is a ndarray"):
        sx.pp.corrupt(np.ones((3, 3)))
