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
