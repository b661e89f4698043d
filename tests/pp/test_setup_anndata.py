from __future__ import annotations

import inspect
import io
import random
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from scvi_ext._errors import ScviExtWarning
from scvi_ext._keys import FORMAT
from scvi_ext.data.registry import Registry, codes, read_setup
from scvi_ext.data.store import CellStore
from scvi_ext.get._setup import setup
from scvi_ext.pp import setup_anndata

N, G, P = 60, 15, 4


def make_adata(kind=sp.csr_matrix) -> ad.AnnData:
    rng = np.random.default_rng(7)
    counts = rng.poisson(rng.gamma(2.0, 1.0, G) * rng.lognormal(0, 0.4, (N, 1))).astype(np.float32)
    counts[:, 0] += 1
    counts[0] += 1
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(rng.choice(["d2", "d1"], N), categories=["d2", "unused", "d1"]),
            "cell_type": rng.choice(["T", "B", "NK", "unknown"], N),
            "size": rng.uniform(0.5, 2.0, N),
            "sex": rng.choice(["f", "m"], N),
            "site": rng.integers(1, 4, N),
            "age": rng.integers(20, 80, N),
            "mito": rng.uniform(0, 1, N),
        },
        index=[f"c{i}" for i in range(N)],
    )
    proteins = pd.DataFrame(rng.poisson(20.0, (N, P)), index=obs.index, columns=[f"CD{i}" for i in range(P)])
    return ad.AnnData(
        kind(counts),
        obs=obs,
        var=pd.DataFrame(index=[f"g{i}" for i in range(G)]),
        layers={"counts": kind(counts)},
        obsm={"protein": proteins},
    )


@pytest.fixture
def adata() -> ad.AnnData:
    return make_adata()


@pytest.fixture
def log():
    """What scanpy logs, down to hints."""
    stream, old = io.StringIO(), (sc.settings.logfile, int(sc.settings.verbosity))
    sc.settings.logfile, sc.settings.verbosity = stream, 3
    yield stream
    sc.settings.logfile, sc.settings.verbosity = old


EVERYTHING = {
    "layer": "counts",
    "batch_key": "donor",
    "labels_key": "cell_type",
    "unlabeled_category": "unknown",
    "size_factor_key": "size",
    "categorical_covariate_keys": ["sex", "site"],
    "continuous_covariate_keys": ["age", "mito"],
    "protein_obsm_key": "protein",
}
REGISTERED = Registry(
    audit="clean",
    layer="counts",
    batch_key="donor",
    labels_key="cell_type",
    unlabeled_category="unknown",
    size_factor_key="size",
    categorical_covariate_keys=("sex", "site"),
    continuous_covariate_keys=("age", "mito"),
    protein_obsm_key="protein",
    protein_names=("CD0", "CD1", "CD2", "CD3"),
    batch_categories=("d2", "d1"),
    labels_categories=("B", "NK", "T"),
    covariate_categories=(("f", "m"), ("1", "2", "3")),
)


def refused(adata, error, match, **arguments):
    """The call raises, and nothing has been written."""
    before = repr(adata.uns)
    with pytest.raises(error, match=match):
        setup_anndata(adata, **arguments)
    assert repr(adata.uns) == before


def test_everything_is_registered(adata):
    assert setup_anndata(adata, **EVERYTHING) is None
    assert read_setup(adata) == REGISTERED
    assert adata.uns["scvi_ext"]["format"] == FORMAT


def test_nothing_but_counts(adata):
    setup_anndata(adata)
    assert read_setup(adata) == Registry(audit="clean")


def test_only_uns_is_written(adata):
    before = adata.copy()
    setup_anndata(adata, **EVERYTHING)
    assert set(adata.uns) == {"scvi_ext"}
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    pd.testing.assert_frame_equal(adata.obsm["protein"], before.obsm["protein"])
    assert list(adata.obs["donor"].cat.categories) == ["d2", "unused", "d1"]
    for found, expected in ((adata.X, before.X), (adata.layers["counts"], before.layers["counts"])):
        np.testing.assert_array_equal(found.toarray(), expected.toarray())
    assert (set(adata.obsm), set(adata.varm), set(adata.obsp)) == ({"protein"}, set(), set())


def test_global_random_state_is_untouched(adata):
    np.random.seed(3)
    random.seed(3)
    state = np.random.get_state()[1].copy(), random.getstate()
    setup_anndata(adata, **EVERYTHING)
    np.testing.assert_array_equal(np.random.get_state()[1], state[0])
    assert random.getstate() == state[1]


def test_copy_leaves_the_original_alone(adata):
    made = setup_anndata(adata, batch_key="donor", copy=True)
    assert read_setup(made).batch_key == "donor"
    assert "scvi_ext" not in adata.uns


def test_again_replaces(adata):
    setup_anndata(adata, **EVERYTHING)
    setup_anndata(adata, batch_key="sex")
    assert read_setup(adata) == Registry(batch_key="sex", batch_categories=("f", "m"), audit="clean")


def test_again_names_the_fits_that_no_longer_match(adata, log):
    setup_anndata(adata, batch_key="donor")
    setups = {"old": Registry(batch_key="donor"), "new": Registry(batch_key="sex")}
    adata.uns["scvi_ext"]["fits"] = {key: {"setup": registry.to_uns()} for key, registry in setups.items()}
    setup_anndata(adata, batch_key="sex")
    logged = log.getvalue()
    assert "fits that were trained on other slots than are registered now: 'old'." in logged
    assert "'new'" not in logged
    assert set(adata.uns["scvi_ext"]["fits"]) == {"old", "new"}


def test_it_logs_what_was_registered(adata, log):
    setup_anndata(adata, **EVERYTHING)
    logged = log.getvalue()
    for part in (
        "registered 60 cells x 15 genes from layer 'counts', 2 batches ('donor'), 3 labels ('cell_type')",
        "size factors ('size'), covariates ('sex', 'site', 'age', 'mito'), 4 proteins ('protein')",
        "added\n    'scvi_ext'",
        "(adata.uns)",
    ):
        assert part in logged


@pytest.mark.parametrize(
    "kind",
    [
        np.asarray,
        sp.csr_matrix,
        sp.csc_matrix,
        sp.csr_array,
        lambda x: x.astype(np.int64),
        lambda x: sp.csr_matrix(x.astype(np.float64)),
    ],
)
def test_kinds_of_counts(kind):
    adata = make_adata(kind)
    setup_anndata(adata, **EVERYTHING)
    assert read_setup(adata) == REGISTERED
    bad = make_adata(np.asarray)
    bad.X = np.log1p(bad.X)
    bad.X[3:] = make_adata(np.asarray).X[3:]
    bad.X = sp.csc_matrix(bad.X) if kind is sp.csc_matrix else bad.X
    refused(bad, ValueError, "in 3 of 60 cells are not integers")


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_backed(kind, tmp_path):
    make_adata(kind).write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    setup_anndata(backed, batch_key="donor")
    assert read_setup(backed).batch_categories == ("d2", "d1")
    assert backed.isbacked
    refused(backed, ValueError, r"backed, with copy=True.*adata\.to_memory\(\)", copy=True)
    refused(backed[:30], ValueError, r"a view of a backed AnnData.*adata\.to_memory\(\)")


def test_view_becomes_an_anndata_of_its_own(adata):
    view = adata[adata.obs["donor"] == "d1", ["g3", "g0"]]
    setup_anndata(view, batch_key="donor")
    assert not view.is_view
    assert read_setup(view).batch_categories == ("d1",)
    assert "scvi_ext" not in adata.uns


@pytest.mark.parametrize("way", ["copy", "subset", "concat", "h5ad", "zarr"])
def test_survives(adata, way, tmp_path):
    setup_anndata(adata, **EVERYTHING)
    columns = frozenset({"labels", "size_factor", "categorical", "continuous", "protein"})
    rows, genes = np.random.default_rng(0).permutation(N)[:20], ["g4", "g1", "g9"]
    expected = CellStore.from_adata(adata, REGISTERED, var_names=genes, indices=rows, columns=columns).fingerprint()
    match way:
        case "copy":
            other = adata.copy()
        case "subset":
            other, rows = adata[rows, ["g9", "g1", "g4"]], None
        case "concat":
            other = ad.concat([adata], uns_merge="first", join="outer")
        case "h5ad":
            adata.write_h5ad(tmp_path / "a.h5ad")
            other = ad.read_h5ad(tmp_path / "a.h5ad")
        case "zarr":
            adata.write_zarr(tmp_path / "a.zarr")
            other = ad.read_zarr(tmp_path / "a.zarr")
    assert read_setup(other) == REGISTERED
    store = CellStore.from_adata(other, read_setup(other), var_names=genes, indices=rows, columns=columns)
    assert store.fingerprint() == expected


def test_unused_categories_do_not_exist_for_the_models(adata):
    setup_anndata(adata, batch_key="donor")
    registry = read_setup(adata)
    assert registry.batch_categories == ("d2", "d1")
    assert set(codes(adata.obs, "donor", registry.batch_categories)) == {0, 1}


def test_one_covariate_may_be_a_string(adata):
    setup_anndata(adata, categorical_covariate_keys="sex", continuous_covariate_keys="age")
    assert read_setup(adata).categorical_covariate_keys == ("sex",)
    assert read_setup(adata).continuous_covariate_keys == ("age",)


@pytest.mark.parametrize("name", ["batch_key", "labels_key", "size_factor_key"])
def test_missing_column(adata, name):
    refused(adata, KeyError, r"'doner' is not in adata\.obs.*Did you mean 'donor'", **{name: "doner"})


@pytest.mark.parametrize("name", ["categorical_covariate_keys", "continuous_covariate_keys"])
def test_missing_covariate(adata, name):
    refused(adata, KeyError, r"'sx' is not in adata\.obs.*Did you mean 'sex'", **{name: ["sx"]})


def test_missing_layer(adata):
    refused(adata, KeyError, r"'count' is not in adata\.layers, which has: 'counts'", layer="count")


def test_missing_protein(adata):
    refused(adata, KeyError, r"'proteins' is not in adata\.obsm, which has: 'protein'", protein_obsm_key="proteins")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_key": "sex", "categorical_covariate_keys": ["sex"]}, "both in batch_key and in categorical_covariate"),
        ({"batch_key": "sex", "labels_key": "sex"}, "both in batch_key and in labels_key"),
        ({"categorical_covariate_keys": ["sex", "sex"]}, "twice in categorical_covariate_keys"),
        (
            {"categorical_covariate_keys": ["age"], "continuous_covariate_keys": ["age"]},
            "both in categorical_covariate_keys and in continuous_covariate_keys",
        ),
        ({"size_factor_key": "size", "continuous_covariate_keys": ["size"]}, "both in size_factor_key and in"),
    ],
)
def test_one_role_per_column(adata, arguments, message):
    refused(adata, ValueError, message, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_key": ["donor"]}, r"batch_key=\['donor'\] is a list; the name of one column"),
        ({"labels_key": 3}, "labels_key=3 is a int; the name of one column"),
        ({"categorical_covariate_keys": [1]}, "categorical_covariate_keys holds 1, a int; names of columns"),
    ],
)
def test_wrong_kinds_of_keys(adata, arguments, message):
    refused(adata, TypeError, message, **arguments)


def test_keyword_of_scvi_tools(adata):
    message = "no keyword 'protein_expression_obsm_key': it is called protein_obsm_key here"
    refused(adata, TypeError, message, protein_expression_obsm_key="protein")


def test_unknown_keyword_lists_all(adata):
    with pytest.raises(TypeError, match=r"no keyword 'label_key'\. Did you mean 'labels_key'") as error:
        setup_anndata(adata, label_key="cell_type")
    for name, parameter in inspect.signature(setup_anndata).parameters.items():
        assert (name in str(error.value)) == (parameter.kind is parameter.KEYWORD_ONLY)


def test_bad_check(adata):
    refused(adata, ValueError, "check='warning' is not one of 'error', 'warn'", check="warning")


@pytest.mark.parametrize("name", ["batch_key", "categorical_covariate_keys"])
def test_missing_category(adata, name):
    adata.obs["run"] = ["a", None, *["a"] * (N - 3), None]
    message = r"adata\.obs\['run'\] is missing in 2 of 60 cells, first in 'c1', 'c59'.*fillna\('unknown'\)\."
    refused(adata, ValueError, message, **{name: "run"})


def test_missing_label_points_to_unlabeled_category(adata):
    adata.obs.loc["c4", "cell_type"] = np.nan
    message = r"missing in 1 of 60 cells.*fillna\('unknown'\) and pass unlabeled_category='unknown'"
    refused(adata, ValueError, message, labels_key="cell_type")
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("string").fillna("unknown")
    setup_anndata(adata, labels_key="cell_type", unlabeled_category="unknown")
    assert read_setup(adata).labels_categories == ("B", "NK", "T")


def test_unlabeled_category_without_labels(adata):
    refused(adata, ValueError, "unlabeled_category='x' is given without labels_key", unlabeled_category="x")


def test_unlabeled_category_that_does_not_occur(adata):
    message = "unlabeled_category='Unknown' is not one of 'B', 'NK', 'T', 'unknown'. Did you mean 'unknown'"
    refused(adata, ValueError, message, labels_key="cell_type", unlabeled_category="Unknown")


def test_all_cells_unlabelled(adata):
    adata.obs["cell_type"] = "unknown"
    message = r"All cells have the unlabeled_category 'unknown' in adata\.obs\['cell_type'\]"
    refused(adata, ValueError, message, labels_key="cell_type", unlabeled_category="unknown")


def test_measurement_as_batch():
    rng = np.random.default_rng(0)
    adata = ad.AnnData(rng.poisson(3.0, (150, 5)) + 1, obs=pd.DataFrame({"mito": rng.uniform(size=150)}).rename(str))
    message = r"adata\.obs\['mito'\] has dtype float64 and 150 different values: it looks continuous"
    for arguments in ({"batch_key": "mito"}, {"labels_key": "mito"}, {"categorical_covariate_keys": ["mito"]}):
        refused(adata, ValueError, message, **arguments)
    adata.obs["run"] = np.arange(150) % 2 + 1.0
    setup_anndata(adata, batch_key="run")
    assert read_setup(adata).batch_categories == ("1.0", "2.0")


def test_small_batches_are_named(adata):
    adata.obs["run"] = ["tiny", "tiny", "one", *["big"] * (N - 3)]
    message = r"2 of 3 batches in adata\.obs\['run'\] have fewer than 3 cells: 'one', 'tiny'"
    with pytest.warns(ScviExtWarning, match=message) as caught:
        setup_anndata(adata, batch_key="run")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("column", "value", "error", "message"),
    [
        ("size", 0.0, ValueError, "'size'] is not positive in 1 of 60 cells, first in 'c5'"),
        ("size", np.nan, ValueError, "'size'] is missing, infinite"),
        ("mito", np.inf, ValueError, "'mito'] is missing, infinite"),
    ],
)
def test_bad_numbers(adata, column, value, error, message):
    adata.obs.loc["c5", column] = value
    refused(adata, error, message, size_factor_key="size", continuous_covariate_keys=["mito"])


def test_words_as_numbers(adata):
    refused(adata, TypeError, r"'sex'\] has dtype .*; numbers are needed", continuous_covariate_keys=["sex"])
    refused(adata, TypeError, r"'donor'\] has dtype category; numbers are needed", size_factor_key="donor")


def test_array_of_proteins(adata):
    values = adata.obsm["protein"].to_numpy()
    adata.uns["names"] = np.array(["a", "b", "c", "d"])
    for kind in (np.asarray, sp.csr_matrix):
        adata.obsm["protein"] = kind(values)
        setup_anndata(adata, protein_obsm_key="protein")
        assert read_setup(adata).protein_names == ("protein_0", "protein_1", "protein_2", "protein_3")
        setup_anndata(adata, protein_obsm_key="protein", protein_names_uns_key="names")
        assert read_setup(adata).protein_names == ("a", "b", "c", "d")
        assert read_setup(adata).protein_names_uns_key == "names"


def test_protein_names_that_do_not_fit(adata):
    arguments = {"protein_obsm_key": "protein", "protein_names_uns_key": "names"}
    adata.uns["names"] = ["a", "b", "a"]
    refused(adata, ValueError, "is a table with names of its own: leave out protein_names_uns_key", **arguments)
    adata.obsm["protein"] = adata.obsm["protein"].to_numpy()
    refused(adata, ValueError, "has 4 proteins and there are 3 names", **arguments)
    adata.uns["names"] = ["a", "b", "a", "c"]
    refused(adata, ValueError, "have names more than once: 'a'", **arguments)
    del adata.uns["names"]
    refused(adata, KeyError, r"'names', the names of the proteins in .* is not in adata\.uns", **arguments)
    adata.obsm["protein"] = np.ones((N, 0))
    refused(adata, ValueError, r"adata\.obsm\['protein'\] has no proteins", protein_obsm_key="protein")
    refused(adata, ValueError, "given without protein_obsm_key", protein_names_uns_key="names")


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "are missing"), (-1.0, "are negative"), (0.5, "are not integers")]
)
def test_bad_proteins_are_named(adata, value, message):
    adata.obsm["protein"] = adata.obsm["protein"].astype(float)
    adata.obsm["protein"].loc["c8", "CD2"] = value
    match = rf"adata\.obsm\['protein'\]: 1 entries in 1 of 60 cells {message}.*first cell 'c8', protein 'CD2'"
    refused(adata, ValueError, match, protein_obsm_key="protein")


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, r"are missing \(NaN\)"), (-1, "are negative"), (np.inf, "are infinite")]
)
def test_proteins_that_no_estimate_can_be_are_refused_with_a_warning_only_too(adata, value, message):
    adata.obsm["protein"] = adata.obsm["protein"] * 0.75
    adata.obsm["protein"].loc["c8", "CD2"] = value
    match = rf"(?s)check='warn' does not make them so\.\n- adata\.obsm\['protein'\]: 1 entries [^\n]*{message}[^\n]*$"
    refused(adata, ValueError, match, protein_obsm_key="protein", check="warn")
    adata.obsm["protein"].loc["c8", "CD2"] = 2.5
    with pytest.warns(ScviExtWarning, match="look normalised or estimated"):
        setup_anndata(adata, protein_obsm_key="protein", check="warn")


def clr(proteins: pd.DataFrame) -> pd.DataFrame:
    return np.log1p(proteins.div(np.exp(np.log1p(proteins).mean(axis=1)), axis=0))


@pytest.mark.parametrize("kind", [None, np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (clr, r"in 4 of 4 proteins: {0}, .*log-transformed or normalised \(log1p, CLR\)"),
        (np.log1p, r"in 4 of 4 proteins: {0}, .*\(log1p, CLR\): pass the raw counts\."),
        (lambda p: p - p.mean(), r"are negative, in 4 of 4 proteins: {0}, .*Centred, scaled .*\(CLR, DSB\)"),
        (lambda p: np.rint(p.div(p.sum(axis=1), axis=0) * 1e6), "The sums over proteins of 60 cells hardly vary"),
    ],
)
def test_normalised_proteins_are_refused_however_they_are_stored(adata, transform, message, kind):
    table = transform(adata.obsm["protein"])
    adata.obsm["protein"] = table if kind is None else kind(table.to_numpy())
    names = [f"CD{i}" if kind is None else f"protein_{i}" for i in range(3)]
    listed = f"{', '.join(map(repr, names))} and 1 more"
    refused(adata, ValueError, message.format(listed), protein_obsm_key="protein")


def test_nan_of_a_batch_that_has_not_measured_a_protein(adata):
    table = adata.obsm["protein"].astype(float)
    of_d1 = (adata.obs["donor"] == "d1").to_numpy()
    table.loc[of_d1, ["CD1", "CD2"]] = np.nan
    adata.obsm["protein"] = table
    n = of_d1.sum()
    message = (
        rf"{2 * n} entries in {n} of 60 cells are missing \(NaN\) \(cells: {n} of {n} in 'd1'\), in 2 of 4 proteins: "
        r"'CD1', 'CD2', first cell .*also where a batch has not measured a protein \(protein_batch_mask='auto' finds"
    )
    refused(adata, ValueError, message, protein_obsm_key="protein", batch_key="donor")
    adata.obsm["protein"] = table.fillna(0)
    setup_anndata(adata, protein_obsm_key="protein", batch_key="donor")
    measured = dict(zip(read_setup(adata).batch_categories, read_setup(adata).missing_proteins, strict=True))
    assert measured == {"d2": (), "d1": ("CD1", "CD2")}


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32", "Int64", "Float64", pd.SparseDtype(int)])
def test_proteins_of_any_number_pass(adata, dtype):
    adata.obsm["protein"] = adata.obsm["protein"].astype(dtype)
    setup_anndata(adata, protein_obsm_key="protein")
    proteins = CellStore.from_adata(adata, read_setup(adata), columns=frozenset({"protein"})).protein
    assert proteins.dtype == np.float32
    np.testing.assert_array_equal(proteins, adata.obsm["protein"].to_numpy(np.float32))


def test_proteins_of_several_types(adata):
    adata.obsm["protein"]["CD1"] = adata.obsm["protein"]["CD1"].astype("Int64")
    adata.obsm["protein"]["CD2"] = adata.obsm["protein"]["CD2"] > 20
    setup_anndata(adata, protein_obsm_key="protein")
    adata.obsm["protein"].loc["c3", "CD1"] = pd.NA
    refused_match = r"1 entries in 1 of 60 cells are missing \(NaN\), in 1 of 4 proteins: 'CD1', first cell 'c3'"
    with pytest.raises(ValueError, match=refused_match):
        setup_anndata(adata, protein_obsm_key="protein")


@pytest.mark.parametrize("dtype", [str, object, "category"])
def test_proteins_that_are_words(adata, dtype):
    adata.obsm["protein"]["CD2"] = adata.obsm["protein"]["CD2"].astype(dtype)
    message = r"adata\.obsm\['protein'\] has 1 proteins that are not numbers: 'CD2 \((object|str|category)\)'.*astype"
    refused(adata, TypeError, message, protein_obsm_key="protein")


def test_proteins_of_three_dimensions(adata):
    adata.obsm["protein"] = np.ones((N, 2, 2))
    refused(adata, ValueError, r"has shape \(60, 2, 2\); cells x proteins are needed", protein_obsm_key="protein")


def test_names_of_proteins(adata):
    adata.obsm["protein"].columns = range(P)
    setup_anndata(adata, protein_obsm_key="protein")
    assert read_setup(adata).protein_names == ("0", "1", "2", "3")
    adata.obsm["protein"].columns = ["g0", "g1", "IgG1 control", "CD4/8"]  # like genes, isotype controls
    setup_anndata(adata, protein_obsm_key="protein")
    assert read_setup(adata).protein_names == ("g0", "g1", "IgG1 control", "CD4/8")
    adata.obsm["protein"].columns = [1, "1", "a", "b"]
    refused_match = r"The proteins in adata\.obsm\['protein'\] have names more than once: '1'"
    with pytest.raises(ValueError, match=refused_match):
        setup_anndata(adata, protein_obsm_key="protein")


def test_names_that_are_the_same_in_tables(adata):
    names = ["CD3", "CD4/8", "CD19", "CD4|8"]
    message = r"\['protein'\] include 'CD4/8', 'CD4\|8', which are called the same in tables of results: .*Rename them"
    adata.obsm["protein"].columns = names
    refused(adata, ValueError, message, protein_obsm_key="protein")
    adata.obsm["protein"], adata.uns["names"] = adata.obsm["protein"].to_numpy(), np.array(names)
    refused(adata, ValueError, message, protein_obsm_key="protein", protein_names_uns_key="names")


def test_proteins_that_are_rare(adata):
    """A few counts in all are counts: their sums are nearly all one, and no sign of scaling."""
    rare = {"CD1": np.arange(N) != 4, "CD2": np.arange(N) == 7}
    adata.obsm["protein"] = pd.DataFrame(rare, index=adata.obs_names)
    setup_anndata(adata, protein_obsm_key="protein")
    adata.obsm["protein"]["CD3"] = 0
    with pytest.warns(ScviExtWarning, match=r"1 of 3 proteins are zero in all cells: 'CD3'\. A model learns nothing"):
        setup_anndata(adata, protein_obsm_key="protein")


def test_cells_without_a_protein_count_are_told_of(adata):
    """Cells of genes alone, among others: their zeros would be taken for measurements."""
    adata.obs["run"] = np.array(["a", "b", "genes alone"])[np.arange(N) // 20]
    adata.obsm["protein"].iloc[[0, 20, 21]] = 0  # 1 of 20 cells is 5 %, 2 are more
    adata.obsm["protein"].iloc[40:] = 0
    advice = r"\. If their proteins were not measured, make them a batch of their own \(batch_key\)"
    with pytest.warns(ScviExtWarning, match=rf"protein count: 2 of 20 cells of batch 'b'{advice}") as caught:
        setup_anndata(adata, protein_obsm_key="protein", batch_key="run")
    assert len(caught) == 1
    with pytest.warns(ScviExtWarning, match=rf"protein count: 23 of 60 cells{advice}"):
        setup_anndata(adata, protein_obsm_key="protein")
    with pytest.warns(ScviExtWarning, match=r"protein count: 2 of 20 cells of batch 'b', 20 of 20 cells of batch 'g"):
        setup_anndata(adata, protein_obsm_key="protein", batch_key="run", protein_batch_mask=None)
    adata.obsm["protein"].iloc[20] = 1
    setup_anndata(adata, protein_obsm_key="protein", batch_key="run")


def test_only_proteins_that_were_measured_are_counted(adata):
    adata.obs["run"] = np.where(np.arange(N) < 20, "a", "b")
    adata.obsm["protein"].iloc[:10] = [0, 5, 5, 5]
    mask = {"a": ["CD0"]}
    with pytest.warns(ScviExtWarning) as caught:
        setup_anndata(adata, protein_obsm_key="protein", batch_key="run", protein_batch_mask=mask)
    ignored, empty = (str(warning.message) for warning in caught)
    assert "60 entries of 'CD1', 'CD2', 'CD3' in batch 'a'" in ignored
    assert "10 of 20 cells of batch 'a'. If" in empty


def test_duplicate_genes(adata):
    adata.var_names = ["g1", "g1", *adata.var_names[2:]]
    refused(adata, ValueError, r"1 names more than once: 'g1'.*adata\.var_names_make_unique\(\)")


class MuData:
    """Stands for the class of the same name."""


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (pd.DataFrame({"g": [1]}), "adata is a DataFrame; an AnnData is needed"),
        (MuData(), r"is a MuData; an AnnData is needed\. Call scvi_ext\.pp\.setup_mudata"),
    ],
)
def test_not_an_anndata(other, message):
    with pytest.raises(TypeError, match=message):
        setup_anndata(other)


def test_no_cells_or_genes(adata):
    refused(adata[:0].copy(), ValueError, "adata has 0 cells and 15 genes; at least one of each")
    refused(adata[:, :0].copy(), ValueError, "adata has 60 cells and 0 genes")


def test_no_x(adata):
    empty = ad.AnnData(obs=adata.obs, var=adata.var, layers={"counts": adata.X})
    refused(empty, TypeError, r"adata\.X is None.*'counts'")
    setup_anndata(empty, layer="counts")


def test_unsupported_dtype(adata):
    adata.layers["counts"] = adata.layers["counts"].toarray().astype(object)
    refused(adata, TypeError, "dtype object", layer="counts")


def test_newer_format_is_not_overwritten(adata):
    adata.uns["scvi_ext"] = {"format": FORMAT + 1}
    refused(adata, ValueError, "written by a newer version")


def spoil(counts: np.ndarray, how: str) -> np.ndarray:
    match how:
        case "log-normalised":
            return np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
        case "scaled":
            return np.rint(1e6 * counts / counts.sum(1, keepdims=True))
        case "negative":
            counts[9, 2] = -1
        case "missing":
            counts[9, 2] = np.nan
        case "infinite":
            counts[9, 2] = np.inf
        case "fractional":
            counts[9, 2] = 2.5
        case "empty":
            counts[9] = 0
        case "too large":
            counts[9, 2] = 2.0**25
    return counts


BAD_COUNTS = {
    "log-normalised": "in 60 of 60 cells are not integers .*log-transformed",
    "scaled": "hardly vary",
    "negative": r"1 entries in 1 of 60 cells are negative \(cells: 1 of \d+ in 'd\d'\), first cell 'c9', gene 'g2': -1",
    "missing": r"are missing \(NaN\)",
    "infinite": "are infinite",
    "fractional": "are not integers .*gene 'g2': 2.5",
    "empty": "1 of 60 cells have no counts at all: 'c9'",
    "too large": r"are above 2\*\*24",
}


@pytest.mark.parametrize("how", BAD_COUNTS)
def test_bad_counts_are_refused_or_warned_about(adata, how):
    adata.layers["counts"] = sp.csr_matrix(spoil(adata.layers["counts"].toarray(), how))
    match = rf"(?s)not raw counts\.\n- adata\.layers\['counts'\]: .*{BAD_COUNTS[how]}"
    refused(adata, ValueError, match, layer="counts", batch_key="donor")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        setup_anndata(adata, layer="counts", batch_key="donor", check="warn")
    assert {w.category for w in caught} == {ScviExtWarning}
    with pytest.warns(ScviExtWarning, match=BAD_COUNTS[how]):
        setup_anndata(adata, layer="counts", batch_key="donor", check="warn")
    assert read_setup(adata).batch_key == "donor"


def test_downsampled_counts_pass_on_request(adata):
    downsampled = sc.pp.downsample_counts(adata, counts_per_cell=12, random_state=0, copy=True)
    downsampled = downsampled[np.asarray(downsampled.X.sum(1)).ravel() == 12].copy()
    refused(downsampled, ValueError, "downsampled to one depth on purpose")
    with pytest.warns(ScviExtWarning):
        setup_anndata(downsampled, check="warn")


def test_silent_genes_only_warn(adata):
    adata.X = adata.X.toarray()
    adata.X[:, 3] = 0
    with pytest.warns(ScviExtWarning, match=r"adata\.X: 1 of 15 genes are zero in all cells: 'g3'") as caught:
        setup_anndata(adata)
    assert caught[0].filename == __file__


def test_log_normalising_after_setup_is_fine_with_a_layer(adata):
    setup_anndata(adata, layer="counts")
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    setup_anndata(adata, layer="counts")
    refused(adata, ValueError, r"adata\.X: .*are not integers")


def test_table_of_what_is_registered(adata):
    setup_anndata(adata, **EVERYTHING)
    table = setup(adata)
    assert list(table.columns) == ["field", "slot", "key", "n_categories", "categories"]
    assert table["n_categories"].dtype == "Int64"
    rows = [tuple(None if value is pd.NA else value for value in row) for row in table.itertuples(index=False)]
    assert rows == [
        ("counts", "layers", "counts", None, ""),
        ("batch", "obs", "donor", 2, "d2, d1"),
        ("labels", "obs", "cell_type", 3, "B, NK, T"),
        ("unlabeled category", "obs", "cell_type", 1, "unknown"),
        ("size factor", "obs", "size", None, ""),
        ("categorical covariate", "obs", "sex", 2, "f, m"),
        ("categorical covariate", "obs", "site", 3, "1, 2, 3"),
        ("continuous covariate", "obs", "age", None, ""),
        ("continuous covariate", "obs", "mito", None, ""),
        ("protein", "obsm", "protein", 4, "CD0, CD1, CD2, CD3"),
    ]


def test_table_shortens_and_needs_a_setup(adata):
    with pytest.raises(KeyError, match="setup_anndata"):
        setup(adata)
    adata.obs["run"] = [str(i % 7) for i in range(N)]
    setup_anndata(adata, batch_key="run")
    assert setup(adata)["categories"].tolist() == ["", "0, 1, 2, 3, 4, ..."]
