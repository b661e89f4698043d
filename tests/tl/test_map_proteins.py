"""Cells whose proteins were not measured, or only some of them, are mapped onto a reference that has them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from _tolerances import FLOAT32

import scvi_ext as sx
from scvi_ext.data.registry import Registry, read_fit

KEY = "protein_expression"
SMALL = {"n_hidden": 16, "n_latent": 4, "max_epochs": 3, "progress": False}
QUICK = {"max_epochs": 2, "progress": False}
N_PROTEINS = 6
_FITTED: dict[int, tuple[ad.AnnData, ad.AnnData]] = {}


def split(n_batches: int, **options) -> tuple[ad.AnnData, ad.AnnData]:
    """Genes and proteins of all batches but the last one, set up, and those of the last one."""
    adata = sx.datasets.synthetic_cite(n_batches=n_batches, n_proteins=N_PROTEINS, **options)
    new = (adata.obs["batch"] == f"batch_{n_batches - 1}").to_numpy()
    reference, query = adata[~new].copy(), adata[new].copy()
    sx.pp.setup_anndata(reference, batch_key="batch", protein_obsm_key=KEY)
    return reference, query


@pytest.fixture(params=[1, 2], ids=["one batch known", "two batches known"])
def pair(request) -> tuple[ad.AnnData, ad.AnnData]:
    """A reference with a fit, and a query of another batch with the same proteins."""
    if request.param not in _FITTED:
        reference, query = split(request.param + 1, n_cells_batch=60, n_genes=30)
        sx.tl.fit(reference, "totalvi", **SMALL)
        _FITTED[request.param] = reference, query
    reference, query = _FITTED[request.param]
    return reference.copy(), query.copy()


def without(query: ad.AnnData) -> ad.AnnData:
    del query.obsm[KEY]
    return query


def setup_of_fit(adata: ad.AnnData) -> Registry:
    return Registry.from_uns(read_fit(adata).setup)


def latent(adata: ad.AnnData) -> np.ndarray:
    return sx.tl.get_latent(adata, copy=True, key_added="z").obsm["z"]


# ---- what is registered --------------------------------------------------------------------------------------------


def test_without_proteins_none_was_measured(pair, logged):
    reference, query = pair
    sx.tl.map_query(without(query), reference, **QUICK)
    names = Registry.from_uns(read_fit(reference).setup).protein_names
    assert setup_of_fit(query).missing_proteins[-1] == names
    assert not any(setup_of_fit(query).missing_proteins[:-1])
    assert "6 of the 6 proteins were not measured in the query: 'protein_0'" in logged()
    assert KEY not in query.obsm  # no table is made up
    assert "protein" not in set(sx.get.setup(query)["field"])
    assert not sx.get.model(query).protein_batch_mask[-1].any()


def test_proteins_are_found_by_name(pair, logged):
    reference, query = pair
    table = query.obsm[KEY]
    full = sx.tl.map_query(query, reference, copy=True, **QUICK)
    query.obsm[KEY] = table.iloc[:, ::-1].assign(CD999=3)
    sx.tl.map_query(query, reference, **QUICK)
    assert "proteins that the reference does not know are left out: 'CD999'" in logged()
    np.testing.assert_array_equal(latent(query), latent(full))
    assert setup_of_fit(query).missing_proteins == ()


def test_some_proteins(pair, logged):
    reference, query = pair
    table = query.obsm[KEY].copy()
    query.obsm[KEY] = table.iloc[:, [4, 0, 2]].assign(protein_2=0)
    sx.tl.map_query(query, reference, **QUICK)
    missing = ("protein_1", "protein_2", "protein_3", "protein_5")  # absent, or zero everywhere
    assert setup_of_fit(query).missing_proteins[-1] == missing
    assert "4 of the 6 proteins were not measured" in logged()
    own = Registry.from_uns(query.uns["scvi_ext"]["setup"])
    assert own.protein_names == ("protein_0", "protein_2", "protein_4")
    assert own.missing_proteins == (("protein_2",),)
    # what stands where a protein was not measured is without effect
    zeros = query.copy()
    zeros.obsm[KEY] = table.assign(**dict.fromkeys(missing, 0))
    np.testing.assert_array_equal(latent(zeros), latent(query))
    sx.tl.get_protein_expression(query)
    assert list(query.obsm["totalvi_protein"].columns) == [f"protein_{i}" for i in range(N_PROTEINS)]
    assert np.isfinite(query.obsm["totalvi_protein"].to_numpy()).all()


def test_names_that_are_others_in_part(pair, recwarn, logged):
    """protein_1 and protein_5 may be what the query calls otherwise."""
    reference, query = pair
    query.obsm[KEY] = query.obsm[KEY].rename(columns={"protein_1": "PROTEIN_1", "protein_5": "protein_5_TotalSeqB"})
    sx.tl.map_query(query, reference, **QUICK)
    (caught,) = recwarn
    assert issubclass(caught.category, sx.ScviExtWarning)
    assert str(caught.message) == (
        "4 of the 6 proteins of the reference are found in the query. Only the reference has 'protein_1', 'protein_5', "
        "which are imputed; only the query has 'PROTEIN_1', 'protein_5_TotalSeqB', which are left out. Rename those "
        "that are the same."
    )
    assert "does not know are left out" not in logged()
    assert setup_of_fit(query).missing_proteins[-1] == ("protein_1", "protein_5")


@pytest.mark.parametrize("rename", [str.upper, "{}_TotalSeqB".format], ids=["upper case", "suffix"])
def test_names_that_are_all_others(pair, rename):
    reference, query = pair
    query.obsm[KEY] = query.obsm[KEY].rename(columns=rename)
    message = (
        rf"\['{KEY}'\] has no protein of the reference: its 6 are called '{rename('protein_0')}', .* of the reference "
        rf"'protein_0', .* and 3 more\. Rename them; .* protein_obsm_key=.*imputed, drop this one: del adata\.obsm"
    )
    with pytest.raises(KeyError, match=message):
        sx.tl.map_query(query, reference, **QUICK)
    assert "scvi_ext" not in query.uns
    sx.tl.map_query(without(query), reference, **QUICK)
    assert len(setup_of_fit(query).missing_proteins[-1]) == N_PROTEINS


def test_proteins_of_the_query_under_another_name(pair, recwarn):
    """As of a MuData, whose proteins are called like their modality."""
    reference, query = pair
    table = query.obsm.pop(KEY)
    query.obsm["log"], query.obsm["is_cd3"] = np.log1p(table), table > 3
    query.obsm["adt"] = table.iloc[:, :2].astype("Int64").assign(more="words")
    query.obsm["array"] = table.to_numpy()
    sx.tl.map_query(query, reference, **QUICK)
    (caught,) = recwarn
    assert issubclass(caught.category, sx.ScviExtWarning)
    assert str(caught.message) == (
        "adata.obsm has no 'protein_expression', where the reference has its proteins, so all are imputed; counts of "
        "proteins of the reference are in adata.obsm under other names: 'adt'. Name the entry, protein_obsm_key=..., "
        "if they are measured."
    )


def test_what_a_fit_says_of_proteins_is_no_measurement(pair, tmp_path):
    reference, query = pair
    sx.tl.map_query(without(query), reference, **QUICK)
    sx.tl.get_protein_expression(query)
    sx.tl.posterior_predictive_sample(query)
    query.write_h5ad(tmp_path / "q.h5ad")
    for adata in (query, ad.read_h5ad(tmp_path / "q.h5ad")):
        sx.tl.map_query(adata, reference, **QUICK)  # no warning


def test_batches_of_a_query_may_have_measured_different_proteins(pair):
    reference, query = pair
    query.obs["batch"] = np.where(np.arange(query.n_obs) % 2 == 0, "even", "odd")
    odd = (query.obs["batch"] == "odd").to_numpy()
    query.obsm[KEY].loc[odd, "protein_3"] = 0
    sx.tl.map_query(query, reference, **QUICK)
    registry = setup_of_fit(query)
    measured = dict(zip(registry.batch_categories, registry.missing_proteins, strict=True))
    assert (measured["even"], measured["odd"]) == ((), ("protein_3",))


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_an_array_has_the_proteins_of_the_reference(pair, kind):
    reference, query = pair
    full = sx.tl.map_query(query, reference, copy=True, **QUICK)
    query.obsm["adt"] = kind(query.obsm.pop(KEY).to_numpy())
    sx.tl.map_query(query, reference, protein_obsm_key="adt", **QUICK)
    np.testing.assert_array_equal(latent(query), latent(full))
    query.obsm["adt"] = query.obsm["adt"][:, :4]
    with pytest.raises(ValueError, match=r"obsm\['adt'\] has 4 columns; 6 proteins were registered"):
        sx.tl.map_query(query, reference, protein_obsm_key="adt", **QUICK)


# ---- what stays, and what is read out ------------------------------------------------------------------------------


def test_cells_of_the_reference_are_as_before(pair):
    reference, query = pair
    sx.tl.map_query(without(query), reference, **QUICK)
    cells = reference.copy()
    cells.uns = query.uns.copy()
    np.testing.assert_allclose(latent(cells), latent(reference), **FLOAT32)
    for adata in (cells, reference):
        sx.tl.get_protein_expression(adata, seed=0)
    np.testing.assert_allclose(cells.obsm["totalvi_protein"], reference.obsm["totalvi_protein"], **FLOAT32)


@pytest.mark.parametrize("write", ["h5ad", "zarr"])
def test_it_travels(pair, tmp_path, write):
    reference, query = pair
    sx.tl.map_query(without(query), reference, **QUICK)
    path = tmp_path / f"q.{write}"
    getattr(query, f"write_{write}")(path)
    again = getattr(ad, f"read_{write}")(path)
    for adata in (query, again):
        sx.tl.get_protein_expression(adata, seed=1)
    pd.testing.assert_frame_equal(again.obsm["totalvi_protein"], query.obsm["totalvi_protein"])
    some = again[:7].copy()
    np.testing.assert_allclose(latent(some), latent(query)[:7], **FLOAT32)


def test_it_is_read_from_a_folder(pair, tmp_path):
    reference, query = pair
    bare = without(query.copy())
    sx.tl.map_query(without(query), reference, **QUICK)
    sx.io.write_model(query, tmp_path / "model")
    sx.io.read_model(tmp_path / "model", adata=bare)
    np.testing.assert_array_equal(latent(bare), latent(query))
    bare.obs["batch"] = "batch_0"
    for slot in list(bare.uns):
        del bare.uns[slot]
    with pytest.raises(KeyError, match=rf"'{KEY}' is not in adata\.obsm"):
        sx.io.read_model(tmp_path / "model", adata=bare)


def test_nothing_but_genes_is_learned_from(pair):
    """Without proteins, what a new batch has for them stays at the mean of the known ones."""
    reference, query = pair
    sx.tl.map_query(without(query), reference, **QUICK)
    before, after = read_fit(reference).state, read_fit(query).state
    for name in ("background_mean", "background_log_scale"):
        np.testing.assert_allclose(after[name][-1], before[name].mean(0), rtol=1e-6)


def test_the_whole_model_can_be_trained_on(pair):
    reference, query = pair
    sx.tl.map_query(without(query), reference, freeze=False, **QUICK)
    assert np.isfinite(latent(query)).all()
    assert np.isfinite(sx.tl.get_elbo(query))


def test_what_is_imputed_is_near_the_truth():
    """Rank correlation with the counts of 300 cells: by chance, 0.3 is five standard errors."""
    reference, query = split(3)
    sx.tl.fit(reference, "totalvi", progress=False, seed=0)
    truth = query.obsm[KEY].rank()
    sx.tl.map_query(without(query), reference, progress=False)
    sx.tl.get_protein_expression(query, include_background=True)
    assert query.obsm["totalvi_protein"].rank().corrwith(truth).min() > 0.3


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_known_batch_that_has_measured_them(pair):
    reference, query = pair
    query.obs["batch"] = "batch_0"
    message = r"60 cells are of the batch 'batch_0', which has measured 6 proteins that adata has not: .*batch_name="
    with pytest.raises(ValueError, match=message):
        sx.tl.map_query(without(query), reference)
    assert "scvi_ext" not in query.uns
    del query.obs["batch"]
    sx.tl.map_query(query, reference, batch_name="genes alone", **QUICK)
    assert setup_of_fit(query).batch_categories[-1] == "genes alone"


def test_a_known_batch_that_has_not_measured_them():
    reference, query = split(3, n_cells_batch=60, n_genes=30)
    reference.obsm[KEY].loc[(reference.obs["batch"] == "batch_1").to_numpy(), "protein_4"] = 0
    sx.pp.setup_anndata(reference, batch_key="batch", protein_obsm_key=KEY)
    sx.tl.fit(reference, "totalvi", **SMALL)
    query.obs["batch"] = "batch_1"
    query.obsm[KEY] = query.obsm[KEY].drop(columns="protein_4")
    sx.tl.map_query(query, reference, **QUICK)
    assert setup_of_fit(query).missing_proteins == ((), ("protein_4",))


def test_a_reference_without_batches():
    reference, query = split(2, n_cells_batch=60, n_genes=30)
    sx.pp.setup_anndata(reference, protein_obsm_key=KEY)
    sx.tl.fit(reference, "totalvi", **SMALL)
    full = sx.tl.map_query(query, reference, copy=True, **QUICK)
    assert np.isfinite(latent(full)).all()
    with pytest.raises(ValueError, match=r"have no batch, and the reference has .* Fit the reference with a batch_key"):
        sx.tl.map_query(without(query), reference)


def test_proteins_that_are_no_counts(pair):
    reference, query = pair
    query.obsm[KEY] = np.log1p(query.obsm[KEY]).iloc[:, :2]
    with pytest.raises(ValueError, match=r"in 2 of 2 proteins: 'protein_0', 'protein_1'.*log1p, CLR"):
        sx.tl.map_query(query, reference)
    query.obsm[KEY].iloc[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"check='warn' does not make them so.*\n.*1 entries .*'protein_1'"):
        sx.tl.map_query(query, reference, check="warn")


def test_a_name_that_is_not_there(pair):
    reference, query = pair
    with pytest.raises(KeyError, match=r"'adt' is not in adata\.obsm"):
        sx.tl.map_query(query, reference, protein_obsm_key="adt")


def test_a_reference_that_reads_no_proteins(pair):
    reference, query = pair
    sx.tl.fit(reference, "scvi", **SMALL)
    with pytest.raises(ValueError, match=r"protein_obsm_key='adt' has no effect"):
        sx.tl.map_query(query, reference, protein_obsm_key="adt")
    sx.tl.map_query(query, reference, **QUICK)
    assert setup_of_fit(query).protein_names == ()


def test_lacking_proteins_that_were_measured_are_still_refused(pair):
    reference, _ = pair
    del reference.obsm[KEY]
    with pytest.raises(KeyError, match=rf"'{KEY}' is not in adata\.obsm"):
        sx.tl.get_latent(reference)
