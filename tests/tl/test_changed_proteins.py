"""Proteins that are others, or in other places, than those that were set up: noticed, or found by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import scvi_ext as sx

if TYPE_CHECKING:
    import pandas as pd

KEY = "protein_expression"
NAMES = ["CD3", "CD4", "CD8", "CD19"]
SMALL = {"n_hidden": 16, "n_latent": 4, "max_epochs": 2, "progress": False}
_FITTED: list[ad.AnnData] = []


def draw(seed: int = 0) -> ad.AnnData:
    """80 cells of two batches, the second of which lacks one of four proteins."""
    adata = sx.datasets.synthetic_cite(n_cells_batch=40, n_genes=30, n_proteins=4, n_missing=1, seed=seed)
    adata.obsm[KEY].columns = NAMES
    return adata


@pytest.fixture
def adata() -> ad.AnnData:
    """Set up with a table of proteins, and with a fit."""
    if not _FITTED:
        adata = draw()
        sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key=KEY)
        sx.tl.fit(adata, "totalvi", **SMALL)
        _FITTED.append(adata)
    return _FITTED[0].copy()


def clr(table: pd.DataFrame) -> pd.DataFrame:
    logs = np.log1p(table)
    return logs.sub(logs.mean(axis=1), axis=0)


# ---- normalised since the setup --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform", [np.log1p, clr, lambda table: table.where(table > 3)], ids=["log1p", "clr", "nan"]
)
def test_proteins_that_are_no_counts_any_more_are_refused(adata, transform):
    changed = transform(adata.obsm[KEY])
    bad = ((changed != changed.round()) | (changed < 0)).to_numpy()
    cell, protein = (int(i) for i in np.argwhere(bad)[0])
    message = (
        rf"adata\.obsm\['{KEY}'\] holds {bad.sum()} entries that are no counts, first "
        rf"{changed.iloc[cell, protein]:.6g} in cell '{adata.obs_names[cell]}', protein '{NAMES[protein]}', .*has it "
        r"been normalised since\? Put the counts back, or .*setup_anndata\(adata, protein_obsm_key='protein_counts'"
    )
    adata.obsm[KEY] = changed
    for use in (sx.tl.get_latent, sx.tl.get_protein_expression, lambda adata: sx.tl.fit(adata, "totalvi", **SMALL)):
        with pytest.raises(ValueError, match=message):
            use(adata)
    sx.tl.fit(adata, "scvi", **SMALL)  # reads no proteins


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_whatever_they_are_stored_as_the_cell_and_the_protein_are_named(kind):
    adata = draw()
    values = adata.obsm[KEY].to_numpy(np.float64)
    adata.obsm[KEY] = kind(values)
    sx.pp.setup_anndata(adata, protein_obsm_key=KEY)
    values[50, 2] = 0.5
    adata.obsm[KEY] = kind(values)
    message = f"holds 1 entries .* first 0.5 in cell '{adata.obs_names[50]}', protein 'protein_2'"
    with pytest.raises(ValueError, match=message):
        sx.tl.fit(adata, "totalvi", **SMALL)


def test_only_the_cells_that_are_read_are_looked_at(adata):
    adata.obsm[KEY] = adata.obsm[KEY].astype(float)
    adata.obsm[KEY].iloc[7, 1] = 2.5
    sx.tl.get_latent(adata, indices=[3, 5])
    with pytest.raises(ValueError, match=rf"first 2\.5 in cell '{adata.obs_names[7]}', protein 'CD4'"):
        sx.tl.get_latent(adata, indices=[9, 7])


def test_estimated_proteins_stay_what_they_were_set_up_as(adata):
    adata.obsm[KEY] = adata.obsm[KEY] * 0.75
    with pytest.warns(sx.ScviExtWarning, match="They look normalised or estimated"):
        sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key=KEY, check="warn")
    sx.tl.fit(adata, "totalvi", **SMALL)
    sx.tl.get_latent(adata)
    assert np.isfinite(adata.obsm["X_totalvi"]).all()


def test_proteins_of_a_mudata():
    md = pytest.importorskip("mudata")
    adata = draw()
    prot = ad.AnnData(adata.obsm[KEY].astype(np.float32))
    with md.set_options(pull_on_update=False):
        mdata = md.MuData({"rna": adata, "prot": prot})
    mdata.obs["batch"] = adata.obs["batch"]
    sx.pp.setup_mudata(mdata, batch_key="batch")
    sx.tl.fit(mdata, "totalvi", **SMALL)
    mdata["prot"].layers["counts"] = mdata["prot"].X
    mdata["prot"].X = clr(mdata["prot"].to_df()).to_numpy()
    for use in (sx.tl.get_latent, lambda mdata: sx.tl.fit(mdata, "totalvi", **SMALL)):
        with pytest.raises(ValueError, match=r"adata\.obsm\['prot'\] holds .* protein 'CD3'.*protein_layer='counts'"):
            use(mdata)
    sx.pp.setup_mudata(mdata, batch_key="batch", protein_layer="counts")
    sx.tl.fit(mdata, "totalvi", **SMALL)


# ---- arrays whose columns have names in uns --------------------------------------------------------------------------


def as_array(
    adata: ad.AnnData, order: list[int], kind: type = np.asarray, key: str = KEY, names: str = "names"
) -> ad.AnnData:
    """The same proteins in an array, columns in this order, and their names."""
    table = adata.obsm.pop(KEY).iloc[:, order]
    adata.obsm[key] = kind(table.to_numpy())
    adata.uns[names] = np.array(table.columns, dtype=str)
    return adata


_OF_ARRAY: list[ad.AnnData] = []


@pytest.fixture
def of_array() -> ad.AnnData:
    """Set up with an array of proteins and their names, and with a fit."""
    if not _OF_ARRAY:
        adata = as_array(draw(), [0, 1, 2, 3])
        sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key=KEY, protein_names_uns_key="names")
        sx.tl.fit(adata, "totalvi", **SMALL)
        _OF_ARRAY.append(adata)
    return _OF_ARRAY[0].copy()


def latent(adata: ad.AnnData) -> np.ndarray:
    return sx.tl.get_latent(adata, copy=True).obsm["X_totalvi"]


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_columns_are_found_by_name(of_array, kind):
    permuted = as_array(draw(), [2, 0, 3, 1], kind)
    permuted.uns["scvi_ext"] = of_array.uns["scvi_ext"]
    np.testing.assert_array_equal(latent(permuted), latent(of_array))
    sx.tl.fit(permuted, "totalvi", **SMALL)
    np.testing.assert_array_equal(latent(permuted), latent(of_array))


@pytest.mark.parametrize("way", ["h5ad", "zarr"])
def test_they_are_found_after_a_file(of_array, way, tmp_path):
    getattr(of_array, f"write_{way}")(tmp_path / f"a.{way}")
    again = getattr(ad, f"read_{way}")(tmp_path / f"a.{way}")
    again.obsm[KEY], again.uns["names"] = again.obsm[KEY][:, ::-1], again.uns["names"][::-1]
    np.testing.assert_array_equal(latent(again), latent(of_array))


def test_a_table_in_place_of_the_array(of_array):
    expected = latent(of_array)
    of_array.obsm[KEY] = draw().obsm[KEY].iloc[:, ::-1]
    del of_array.uns["names"]
    np.testing.assert_array_equal(latent(of_array), expected)


def test_names_that_are_gone_or_others(of_array):
    for names, error, message in [
        (["CD3", "CD4", "CD8", "CD20"], KeyError, r"lacks 1 of 4 proteins: 'CD19'"),
        (["CD3", "CD4", "CD8"], ValueError, r"has 4 proteins and there are 3 names in adata\.uns\['names'\]; one for"),
        (["CD3", "CD4", "CD4", "CD19"], ValueError, r"have names more than once: 'CD4'"),
    ]:
        of_array.uns["names"] = np.array(names)
        with pytest.raises(error, match=message):
            sx.tl.get_latent(of_array)
    del of_array.uns["names"]
    with pytest.raises(KeyError, match=r"'names', the names of the proteins in .* is not in adata\.uns.* = \[\.\.\.\]"):
        sx.tl.get_latent(of_array)


def test_a_setup_of_before_finds_them_by_position(of_array):
    expected = latent(of_array)
    root = of_array.uns["scvi_ext"]
    for setup in (root["setup"], root["fits"]["totalvi"]["setup"]):
        del setup["protein_names_uns_key"]
    of_array.uns["names"] = of_array.uns["names"][::-1]
    np.testing.assert_array_equal(latent(of_array), expected)
    # and its fit goes on being used beside a setup of today
    of_array.uns["names"] = of_array.uns["names"][::-1]
    sx.pp.setup_anndata(of_array, batch_key="batch", protein_obsm_key=KEY, protein_names_uns_key="names")
    np.testing.assert_array_equal(latent(of_array), expected)


def query(order: list[int], **names: str) -> ad.AnnData:
    adata = as_array(draw(seed=1), order, **names)
    adata.obs["batch"] = "new"
    return adata


def test_queries_whose_columns_and_names_are_permuted_together(of_array):
    found = []
    for cells in (query([0, 1, 2, 3]), query([3, 1, 0, 2]), query([1, 2, 0, 3], key="adt", names="panel")):
        other = {} if KEY in cells.obsm else {"protein_obsm_key": "adt", "protein_names_uns_key": "panel"}
        sx.tl.map_query(cells, of_array, max_epochs=2, progress=False, **other)
        sx.tl.get_protein_expression(cells)
        found.append((latent(cells), cells.obsm["totalvi_protein"]))
    assert list(found[0][1].columns) == NAMES
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_query_with_some_of_the_names(of_array):
    cells = query([3, 0])
    sx.tl.map_query(cells, of_array, max_epochs=2, progress=False)
    table = draw(seed=1)
    table.obs["batch"], table.obsm[KEY] = "new", table.obsm[KEY][["CD3", "CD19"]]
    sx.tl.map_query(table, of_array, max_epochs=2, progress=False)
    np.testing.assert_array_equal(latent(cells), latent(table))


def test_names_of_a_query_that_cannot_be_read(adata, of_array):
    cells = query([0, 1, 2, 3])
    del cells.uns["names"]
    with pytest.raises(KeyError, match=r"'names', the names of the proteins in .* is not in adata\.uns"):
        sx.tl.map_query(cells, of_array)
    with pytest.raises(ValueError, match=r"there is no adata\.obsm\['protein_expression'\]: name protein_obsm_key"):
        sx.tl.map_query(query([0, 1], key="adt"), adata, protein_names_uns_key="names")
    table = draw(seed=1)
    with pytest.raises(ValueError, match="is a table with names of its own: leave out protein_names_uns_key"):
        sx.tl.map_query(table, of_array, protein_names_uns_key="names")
    sx.tl.fit(adata, "scvi", **SMALL)
    with pytest.raises(ValueError, match="protein_names_uns_key='names' has no effect"):
        sx.tl.map_query(table, adata, protein_names_uns_key="names")
