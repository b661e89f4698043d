"""Which proteins were measured where, and the start of their background."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from _tolerances import N_STANDARD_ERRORS

import scvi_ext as sx
from scvi_ext._errors import ScviExtWarning
from scvi_ext.data.proteins import background, missing_proteins
from scvi_ext.data.registry import Registry, read_setup
from scvi_ext.data.store import CellStore

NAMES, BATCHES = ("CD3", "CD4", "CD8", "CD19"), ("a", "b", "c")
BATCH_INDEX = np.arange(30) % 3
COLUMNS = frozenset({"protein"})


def counts(**zero: tuple[str, ...]) -> np.ndarray:
    """Counts of 1 to 9, shape (30, 4); of the batches that are named, those of these proteins are zero."""
    values = np.random.default_rng(0).integers(1, 10, (30, 4))
    for batch, names in zero.items():
        values[np.ix_(BATCH_INDEX == BATCHES.index(batch), np.isin(NAMES, names))] = 0
    return values


def missing(given: object = "auto", **zero: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return missing_proteins(counts(**zero), BATCH_INDEX, NAMES, BATCHES, given)


# ---- which were measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({}, ()),
        ({"b": ("CD4",)}, ((), ("CD4",), ())),
        ({"a": ("CD3", "CD19"), "b": ("CD3",)}, (("CD3", "CD19"), ("CD3",), ())),
        ({"c": NAMES}, ((), (), NAMES)),  # RNA alone
        ({"a": ("CD8",), "b": ("CD8",), "c": ("CD8",)}, ()),  # zero everywhere: that is a measurement
        ({"a": ("CD8", "CD3"), "b": ("CD8",), "c": ("CD8",)}, (("CD3",), (), ())),
    ],
    ids=str,
)
def test_what_is_zero_in_a_batch_and_not_in_others_was_not_measured(zero, expected):
    assert missing(**zero) == expected
    assert missing(None, **zero) == ()


def test_one_count_in_a_batch_is_a_measurement():
    values = counts(b=("CD4",))
    values[1, 1] = 1  # cell 1 is of batch b
    assert missing_proteins(values, BATCH_INDEX, NAMES, BATCHES, "auto") == ()


def test_without_batches_there_is_nothing_to_compare():
    values = counts(a=("CD4",), b=("CD4",), c=("CD4",))
    assert missing_proteins(values, np.zeros(30, dtype=int), NAMES, (), "auto") == ()


@pytest.mark.parametrize(
    "given",
    [
        {"b": ["CD3", "CD8", "CD19"]},
        {"b": np.array(["CD19", "CD3", "CD8"])},
        {"b": ("CD3", "CD8", "CD19"), "a": NAMES},
        {"b": [True, False, True, True]},
        {"b": np.array([True, False, True, True])},
        {"b": pd.Series([True, False, True, True]).to_numpy()},
        {"b": pd.Series([True, True, False, True], index=["CD19", "CD8", "CD4", "CD3"])},
        {"b": pd.Series([True, True, False, True], index=["CD19", "CD8", "CD4", "CD3"], dtype="boolean")},
        {"b": pd.Series(["CD19", "CD8", "CD3"])},
        {"b": {"CD19", "CD8", "CD3"}},
        {"b": pd.Index(["CD19", "CD8", "CD3"])},
        dict(pd.DataFrame({"b": [True, True, False, True]}, index=["CD19", "CD8", "CD4", "CD3"])),
    ],
    ids=lambda given: type(given["b"]).__name__,  # not the order of a set, which is another in each process
)
def test_a_mapping_says_what_was_measured(given):
    assert missing(given, b=("CD4",)) == ((), ("CD4",), ())
    # whatever the counts are
    assert missing(given, a=("CD3",), b=("CD4", "CD8")) == ((), ("CD4",), ())


def test_one_name_and_names_as_they_come():
    for given in ("CD3", iter(["CD3"]), {"CD3": None}.keys()):
        assert missing({"b": given}, b=NAMES[1:]) == ((), NAMES[1:], ())


def test_counts_that_are_ignored_are_told():
    # 10 cells in each batch
    message = r"are ignored: 10 entries of 'CD4' in batch 'b'; 18 entries of 'CD8', 'CD19' in batch 'c'\.$"
    values = counts(c=("CD3",))
    values[[2, 5], 2] = 0  # cells of batch c
    given = {"b": ["CD3", "CD8", "CD19"], "c": ["CD4"]}
    with pytest.warns(ScviExtWarning, match=message) as caught:
        found = missing_proteins(values, BATCH_INDEX, NAMES, BATCHES, given)
    assert len(caught) == 1
    assert found == ((), ("CD4",), ("CD3", "CD8", "CD19"))
    with pytest.warns(ScviExtWarning, match="ignored: 40 entries of 'CD3', 'CD4', 'CD8', 'CD19' in batch 'c'"):
        assert missing({"c": []}) == ((), (), NAMES)


def test_batches_may_be_numbers():
    given = {1: ["CD3"]}
    assert missing_proteins(counts(b=NAMES[1:]), BATCH_INDEX, NAMES, ("0", "1", "2"), given) == (
        (),
        ("CD4", "CD8", "CD19"),
        (),
    )


def test_a_mapping_that_hides_nothing():
    assert missing({}) == missing({"a": NAMES}) == ()


def test_a_batch_may_have_measured_none():
    assert missing({"c": []}, c=NAMES) == missing({"c": [False] * 4}, c=NAMES) == ((), (), NAMES)
    assert missing({"c": pd.Series(dtype=object)}, c=NAMES) == ((), (), NAMES)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"d": ["CD3"]}, KeyError, r"'d' is not in the batches of protein_batch_mask, which has: 'a', 'b', 'c'"),
        ({"a": ["CD3", "CD5"]}, KeyError, r"protein_batch_mask\['a'\] names proteins that do not exist: 'CD5'"),
        ({"a": [True, False]}, ValueError, r"protein_batch_mask\['a'\] has 2 entries; there are 4 proteins"),
        (
            dict.fromkeys(BATCHES, ("CD3", "CD4")),
            ValueError,
            "leaves proteins that were measured in no batch: 'CD8', 'CD19'. Drop them",
        ),
        ("all", ValueError, "protein_batch_mask='all' is not one of 'auto'"),
        (["CD3"], TypeError, "protein_batch_mask is a list; 'auto', None or a mapping from batches"),
        (np.ones((3, 4), bool), TypeError, "protein_batch_mask is a ndarray; .* is needed.$"),
        (pd.DataFrame({"a": [True] * 4}, NAMES), TypeError, r"is a DataFrame; .* proteins x batches: dict\(table\)"),
        ({"a": {"CD3": True}}, TypeError, r"protein_batch_mask\['a'\] is a dict; names of proteins, or a mask"),
        ({"a": None}, TypeError, r"protein_batch_mask\['a'\] is a NoneType; names"),
        ({"a": 3}, TypeError, r"protein_batch_mask\['a'\] is a int; names"),
        ({"a": pd.Series([True] * 4)}, ValueError, r"index '0', '1', '2' and 1 more is not the 4 proteins, 'CD3'"),
        ({"a": pd.Series([True] * 3, NAMES[:3])}, ValueError, r"index .* is not the 4 proteins, .*reindex it"),
        (
            {"a": pd.Series([True, None, True, True], NAMES, dtype="boolean")},
            ValueError,
            "is missing for 'CD4'; True or",
        ),
    ],
)
def test_impossible_masks(given, error, message):
    with pytest.raises(error, match=message):
        missing(given)


def test_a_mapping_without_batches_is_refused():
    with pytest.raises(ValueError, match="no batch_key is given: name the batches"):
        missing_proteins(counts(), np.zeros(30, dtype=int), NAMES, (), {"a": ["CD3"]})


# ---- where the background starts -------------------------------------------------------------------------------------


def planted(n: int = 900, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counts of two batches, whose log1p is a mixture; the codes; mean and deviation of the lower components (K, P)."""
    rng = np.random.default_rng(seed)
    batch_index = np.arange(2 * n) % 2
    loc, scale = np.array([[2.0, 3.0, 2.5], [2.6, 2.2, 3.3]]), np.array([[0.3, 0.4, 0.5], [0.5, 0.3, 0.35]])
    foreground = rng.random((2 * n, 3)) < np.array([0.2, 0.35, 0.5])
    logs = rng.normal(loc[batch_index], scale[batch_index]) + 2.8 * foreground
    return np.expm1(logs), batch_index, loc, scale


def test_the_lower_component_is_found():
    values, batch_index, loc, scale = planted()
    means, scales = background(values, batch_index, np.ones((2, 3), dtype=bool))
    assert means.shape == scales.shape == (2, 3)
    # at least 450 cells of each batch are background; the components lie 2.8 apart, so nearly none is mistaken
    error = scale / np.sqrt(0.4 * 900)
    assert (np.abs(means - loc) < N_STANDARD_ERRORS * error + 0.02).all()
    assert (np.abs(scales - scale) < N_STANDARD_ERRORS * error / np.sqrt(2) + 0.02).all()


def test_an_unmeasured_protein_has_the_means_over_the_batches_that_measured_it():
    values, batch_index, *_ = planted()
    batch_index = np.arange(len(values)) % 3
    values[batch_index == 2, 1] = 0
    mask = np.ones((3, 3), dtype=bool)
    mask[2, 1] = False
    found = background(values, batch_index, mask)
    for of in found:
        np.testing.assert_allclose(of[2, 1], of[:2, 1].mean(), rtol=1e-12)
    alone = background(values[batch_index != 2], batch_index[batch_index != 2], mask[:2])
    for a, b in zip(found, alone, strict=True):
        np.testing.assert_array_equal(a[:2], b)


def test_a_batch_without_cells_has_those_of_the_others():
    values, batch_index, *_ = planted()
    mask = np.ones((3, 3), dtype=bool)  # of the third batch there are no cells here
    for of in background(values, batch_index, mask):
        np.testing.assert_allclose(of[2], of[:2].mean(0), rtol=1e-12)


@pytest.mark.parametrize("n_cells", [1, 2, 3])
def test_few_cells_and_cells_without_counts(n_cells):
    for values in (np.zeros((n_cells, 2)), np.full((n_cells, 2), 7.0), np.arange(2.0 * n_cells).reshape(-1, 2)):
        means, scales = background(values, np.zeros(n_cells, dtype=int), np.ones((1, 2), dtype=bool))
        assert np.isfinite(means).all()
        assert (scales >= 0.1).all()
        assert (means >= np.log1p(values).min() - 1e-6).all()
        assert (means <= np.log1p(values).max() + 1e-6).all()


def test_it_does_not_depend_on_how_many_more_cells_there_are_of_the_same():
    values, batch_index, *_ = planted(300)
    mask = np.ones((2, 3), dtype=bool)
    for a, b in zip(
        background(values, batch_index, mask),
        background(np.tile(values, (2, 1)), np.tile(batch_index, 2), mask),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ---- what is registered and read -------------------------------------------------------------------------------------


def table(kind: type = pd.DataFrame, **zero: tuple[str, ...]) -> ad.AnnData:
    rng = np.random.default_rng(2)
    obs = pd.DataFrame({"batch": np.array(BATCHES)[BATCH_INDEX]}, index=[f"c{i}" for i in range(30)])
    adata = ad.AnnData(rng.poisson(2.0, (30, 6)).astype(np.float32) + 1, obs=obs)
    values = counts(**zero)
    adata.obsm["protein"] = pd.DataFrame(values, obs.index, NAMES) if kind is pd.DataFrame else kind(values)
    adata.uns["names"] = np.array(NAMES)
    return adata


def through(adata: ad.AnnData, way: str, folder) -> ad.AnnData:
    if way == "copy":
        return adata.copy()
    getattr(adata, f"write_{way}")(folder / f"a.{way}")
    return getattr(ad, f"read_{way}")(folder / f"a.{way}")


@pytest.mark.parametrize("way", ["copy", "h5ad", "zarr"])
@pytest.mark.parametrize("zero", [{}, {"b": ("CD4",)}, {"c": NAMES, "a": ("CD8", "CD3")}], ids=str)
def test_the_panels_survive(zero, way, tmp_path):
    adata = table(**zero)
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein")
    registry = read_setup(adata)
    expected = tuple(tuple(n for n in NAMES if n in zero.get(batch, ())) for batch in BATCHES)
    assert registry.missing_proteins == (expected if zero else ())
    assert ("missing_proteins" in registry.to_uns()) == bool(zero)
    again = through(adata, way, tmp_path)
    assert read_setup(again) == registry
    np.testing.assert_array_equal(
        CellStore.from_adata(again, registry, columns=COLUMNS).protein, adata.obsm["protein"].to_numpy()
    )


def test_names_with_a_slash_survive(tmp_path):
    adata = table(b=("CD4",))
    adata.obsm["protein"].columns = ["CD3/e", "CD4/8", "a b", "Zoë"]
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein")
    assert read_setup(through(adata, "copy", tmp_path)).missing_proteins == ((), ("CD4/8",), ())
    registry = Registry.from_uns(read_setup(adata).to_uns())
    assert registry.sizes(6).proteins.protein_batch_mask[1] == (True, False, True, True)


def test_a_setup_of_before_has_measured_everything():
    adata = table(b=("CD4",))
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein")
    old = {key: value for key, value in read_setup(adata).to_uns().items() if key != "missing_proteins"}
    registry = Registry.from_uns(old)
    assert registry.missing_proteins == ()
    assert registry.sizes(6).proteins.protein_batch_mask == ((True,) * 4,) * 3


def test_a_model_without_proteins_sees_none_of_it():
    adata = table(b=("CD4",))
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein")
    seen = read_setup(adata).read_by(frozenset())
    assert (seen.protein_obsm_key, seen.protein_names, seen.missing_proteins) == (None, (), ())
    assert seen.sizes(6).proteins is None
    assert read_setup(adata).read_by(COLUMNS) == read_setup(adata).read_by(frozenset({"protein"}))


@pytest.mark.parametrize("kind", [pd.DataFrame, np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("given", ["auto", None, {"a": ["CD3"]}], ids=str)
@pytest.mark.filterwarnings("ignore:protein_batch_mask says of proteins")
def test_a_summary_has_the_panels_and_where_the_background_starts(kind, given):
    adata = table(kind, b=("CD4",))
    names = {} if kind is pd.DataFrame else {"protein_names_uns_key": "names"}
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein", protein_batch_mask=given, **names)
    registry = read_setup(adata)
    store = CellStore.from_adata(adata, registry, columns=COLUMNS)
    summary = store.summary(registry).proteins
    mask = np.ones((3, 4), dtype=bool)
    if given == "auto":
        mask[1, 1] = False
    elif given is not None:
        mask[0, 1:] = False
    assert summary.n_proteins == 4
    np.testing.assert_array_equal(summary.protein_batch_mask, mask)
    means, scales = background(counts(b=("CD4",)), BATCH_INDEX, mask)
    np.testing.assert_allclose(summary.background_means, means, rtol=1e-6)  # the store has float32
    np.testing.assert_allclose(summary.background_scales, scales, rtol=1e-6)
    assert isinstance(hash(summary), int)  # tuples all the way down, as in a frozen dataclass


def test_a_summary_without_the_column_leaves_the_start_open():
    adata = table()
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein")
    registry = read_setup(adata)
    found = CellStore.from_adata(adata, registry).summary(registry).proteins
    assert found == registry.sizes(6).proteins
    assert found.background_means == ((0.0,) * 4,) * 3


def test_the_mask_of_cells_of_one_batch_is_that_of_all():
    """Some of the cells are trained on or read out: what was measured does not depend on which."""
    adata = table(b=("CD4",))
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="protein")
    registry = read_setup(adata)
    whole = CellStore.from_adata(adata, registry, columns=COLUMNS).summary(registry).proteins
    part = CellStore.from_adata(adata, registry, columns=COLUMNS, indices=BATCH_INDEX == 1).summary(registry).proteins
    assert part.protein_batch_mask == whole.protein_batch_mask
    assert np.isfinite(part.background_means).all()
