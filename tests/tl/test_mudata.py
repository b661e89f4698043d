"""Fits and read-outs of a MuData are those of the same cells in an AnnData, and go into the right modality."""

from __future__ import annotations

import inspect
import pickle

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from _tolerances import FLOAT32

import scvi_ext as sx
from scvi_ext.modalities import takes_mudata

md = pytest.importorskip("mudata")
SMALL = {"n_hidden": 16, "n_latent": 4, "max_epochs": 2, "progress": False}
KEY = "protein_expression"
# mudata says so whenever a protein is called like a gene.
pytestmark = pytest.mark.filterwarnings("ignore:var_names are not unique")


@pytest.fixture(autouse=True)
def _of_the_next_mudata():
    """Global tables are not pulled from modalities, as from mudata 0.4 on; before, it warns wherever it does so."""
    with md.set_options(pull_on_update=False):
        yield


def draw() -> ad.AnnData:
    adata = sx.datasets.synthetic_cite(n_cells_batch=40, n_genes=30, n_proteins=5, n_missing=1)
    adata.obsm[KEY].columns = ["CD3", "CD4", "gene_2", "CD19", "CD4/8"]  # one called like a gene
    adata.var_names = [f"gene_{i}" for i in range(30)]
    return adata


def as_mudata(adata: ad.AnnData, *, shuffled: bool = False) -> md.MuData:
    """The same cells; ``shuffled``: of the proteins, and of the genes, in orders of their own."""
    table = adata.obsm[KEY]
    prot = ad.AnnData(
        sp.csr_matrix(table.to_numpy()), obs=pd.DataFrame(index=adata.obs_names), var=table.columns.to_frame()[[]]
    )
    rna = ad.AnnData(adata.X, obs=adata.obs.copy(), var=adata.var.copy())
    if shuffled:
        rng = np.random.default_rng(0)
        rna, prot = (part[rng.permutation(adata.n_obs)].copy() for part in (rna, prot))
    return md.MuData({"rna": rna, "prot": prot})


_FITTED: list[tuple[ad.AnnData, md.MuData]] = []


@pytest.fixture
def both() -> tuple[ad.AnnData, md.MuData]:
    """An AnnData and a MuData of the same cells, with the same fit."""
    if not _FITTED:
        adata = draw()
        mdata = as_mudata(adata)
        sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key=KEY)
        sx.pp.setup_mudata(mdata, batch_key="batch")
        for data in (adata, mdata):
            sx.tl.fit(data, "totalvi", **SMALL)
        _FITTED.append((adata, mdata))
    adata, mdata = _FITTED[0]
    return adata.copy(), mdata.copy()


def layer(mdata: md.MuData, name: str) -> pd.DataFrame:
    prot = mdata["prot"]
    return pd.DataFrame(prot.layers[name], index=prot.obs_names, columns=prot.var_names)


# ---- the same as an AnnData, in the right place --------------------------------------------------------------------


def test_the_fit_is_the_same(both):
    adata, mdata = both
    assert list(sx.get.fits(mdata).index) == ["totalvi"]
    one, other = sx.get.model(adata).state_dict(), sx.get.model(mdata).state_dict()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)
    pd.testing.assert_frame_equal(
        sx.get.history(adata).drop(columns="cells_per_second"), sx.get.history(mdata).drop(columns="cells_per_second")
    )
    assert set(mdata.uns) == {"scvi_ext"}
    assert not mdata["rna"].uns
    assert not mdata["prot"].uns


def test_cells(both):
    for data in both:
        sx.tl.get_latent(data, return_dist=True)
        sx.tl.get_elbo(data, return_mean=False)
        sx.tl.get_library_size(data)
        sx.tl.get_normalized_expression(data, gene_list=["gene_2"], key_added="some")
    adata, mdata = both
    for name in ("X_totalvi", "X_totalvi_var"):
        np.testing.assert_array_equal(mdata.obsm[name], adata.obsm[name])
    pd.testing.assert_frame_equal(mdata.obsm["some"], adata.obsm["some"])  # of a gene, though a protein is called so
    for name in ("totalvi_elbo", "totalvi_library_size"):
        pd.testing.assert_series_equal(mdata.obs[name], adata.obs[name])
        assert name not in mdata["rna"].obs
    assert set(mdata.obsm) == {"rna", "prot", "X_totalvi", "X_totalvi_var", "some"}
    assert not mdata["rna"].obsm
    assert sx.tl.get_elbo(mdata) == sx.tl.get_elbo(adata)


def test_genes(both):
    for data in both:
        sx.tl.get_normalized_expression(data)
        sx.tl.get_likelihood_parameters(data)
        sx.tl.feature_correlation(data, n_samples=2)
    adata, mdata = both
    rna = mdata["rna"]
    for slot in ("layers", "varm", "varp"):
        made = dict(getattr(adata, slot))
        assert made.keys() == getattr(rna, slot).keys()
        for name, values in made.items():
            np.testing.assert_array_equal(np.asarray(getattr(rna, slot)[name]), np.asarray(values), err_msg=name)
    pd.testing.assert_frame_equal(rna.var, adata.var)
    assert "totalvi_dispersion" not in mdata.var


def test_proteins(both):
    for data in both:
        sx.tl.get_protein_expression(data)
        sx.tl.get_protein_foreground(data)
        sx.tl.posterior_predictive_sample(data)
    adata, mdata = both
    tables = [name for name in adata.obsm if name.startswith("totalvi")]
    assert len(tables) == 3
    assert set(mdata["prot"].layers) == set(tables)
    for name in tables:
        np.testing.assert_array_equal(layer(mdata, name), adata.obsm[name])
        assert name not in mdata.obsm


def test_some_proteins_and_cells(both):
    _, mdata = both
    sx.tl.get_protein_expression(mdata, protein_list=["CD4/8", "gene_2"], indices=[3, 4], key_added="some")
    filled = layer(mdata, "some").notna()
    assert filled.columns[filled.any()].tolist() == ["gene_2", "CD4/8"]
    assert np.flatnonzero(filled["gene_2"]).tolist() == [3, 4]


def test_results_are_beside_the_fits(both):
    for data in both:
        data.obs["half"] = ["a", "b"] * 40
        sx.tl.differential_expression(data, "half", n_samples=100)
    adata, mdata = both
    pd.testing.assert_frame_equal(sx.get.de_df(mdata, "a"), sx.get.de_df(adata, "a"))
    assert set(mdata.uns) == set(adata.uns)
    one, other = (sc.get.rank_genes_groups_df(data, group="a", key="totalvi_de") for data in (mdata, adata))
    pd.testing.assert_frame_equal(one, other)
    assert len(sx.pl.history(mdata, show=False).lines) == len(sx.pl.history(adata, show=False).lines) > 0
    plt.close("all")


def test_values_come_in_the_order_of_the_mudata(both):
    adata, mdata = both
    one = sx.tl.get_protein_expression(adata, return_mean=False)
    np.testing.assert_array_equal(sx.tl.get_protein_expression(mdata, return_mean=False), one)
    for data in both:
        sx.tl.get_latent(data)
    assert sx.metrics.entropy_batch_mixing(mdata, "batch", use_rep="X_totalvi") == sx.metrics.entropy_batch_mixing(
        adata, "batch", use_rep="X_totalvi"
    )


def test_modalities_in_orders_of_their_own(both):
    adata, _ = both
    mdata = as_mudata(adata, shuffled=True)
    sx.pp.setup_mudata(mdata, batch_key="batch")
    mdata.uns["scvi_ext"]["fits"] = both[1].uns["scvi_ext"]["fits"]
    for data in (adata, mdata):
        sx.tl.get_latent(data)
        sx.tl.get_elbo(data, return_mean=False, indices=data.obs_names[:5])
    order = adata.obs_names.get_indexer(mdata.obs_names)
    assert not np.array_equal(order, np.arange(len(order)))
    np.testing.assert_allclose(mdata.obsm["X_totalvi"], adata.obsm["X_totalvi"][order], **FLOAT32)
    assert mdata.obs["totalvi_elbo"].notna().to_numpy().nonzero()[0].tolist() == [0, 1, 2, 3, 4]


def test_layers_of_shuffled_modalities_stand_beside_their_cells():
    """Counts whose names tell what they are: the layer of a cell is that of its own counts."""
    mdata = as_mudata(draw(), shuffled=True)
    sx.pp.setup_mudata(mdata, batch_key="batch")
    sx.tl.fit(mdata, "totalvi", **SMALL)
    sx.pp.corrupt(mdata, rate=0.2)
    rna = mdata["rna"]
    corrupted, original = (np.asarray(sp.csr_matrix(values).todense()) for values in (rna.layers["corrupted"], rna.X))
    assert (corrupted <= original).all()
    assert 0 < (corrupted < original).mean() < 0.5
    sx.pp.restore(mdata)
    assert "corrupted" not in rna.layers
    assert "corruptions" not in mdata.uns["scvi_ext"]
    sx.tl.get_protein_expression(mdata, include_background=True)
    made = layer(mdata, "totalvi_protein").loc[mdata.obs_names]
    alone = ad.AnnData(rna[mdata.obs_names].X, obs=rna.obs.loc[mdata.obs_names], var=rna.var[[]])
    alone.obsm["prot"] = mdata["prot"][mdata.obs_names].to_df()
    alone.uns["scvi_ext"] = mdata.uns["scvi_ext"]
    sx.tl.get_protein_expression(alone, include_background=True)
    np.testing.assert_allclose(made, alone.obsm["totalvi_protein"], **FLOAT32)


# ---- copies, views, files ------------------------------------------------------------------------------------------


def test_copy(both):
    _, mdata = both
    changed = sx.tl.get_protein_expression(mdata, copy=True)
    assert isinstance(changed, md.MuData)
    assert "totalvi_protein" in changed["prot"].layers
    assert not mdata["prot"].layers
    fitted = sx.tl.fit(mdata, "scvi", copy=True, **SMALL)
    assert list(sx.get.fits(fitted).index) == ["scvi", "totalvi"]
    assert list(sx.get.fits(mdata).index) == ["totalvi"]


def test_counts_are_not_copied(both):
    _, mdata = both
    before = mdata["rna"].X
    seen = []
    takes_mudata(lambda adata: seen.append(adata), "tests")(mdata)
    assert seen[0].X is before
    assert seen[0].shape == mdata["rna"].shape
    assert "prot" in seen[0].obsm


def test_a_subset_becomes_a_mudata_of_its_own(both):
    _, mdata = both
    some = mdata[5:15]
    sx.tl.get_latent(some)
    sx.tl.get_protein_expression(some)
    assert not some.is_view
    assert some["prot"].layers["totalvi_protein"].shape == (10, 5)
    assert "X_totalvi" not in mdata.obsm
    assert not mdata["prot"].layers
    sx.tl.get_latent(mdata)
    np.testing.assert_allclose(some.obsm["X_totalvi"], mdata.obsm["X_totalvi"][5:15], **FLOAT32)


def test_reading_leaves_a_view(both):
    some = both[1][:10]
    sx.get.fits(some)
    sx.tl.get_elbo(some)
    assert some.is_view


@pytest.mark.parametrize("write", ["h5mu", "zarr"])
@pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr hierarchy")
def test_files(both, tmp_path, write):
    _, mdata = both
    sx.tl.get_latent(mdata)
    sx.tl.get_protein_foreground(mdata)
    sx.tl.get_normalized_expression(mdata)
    path = tmp_path / f"a.{write}"
    getattr(mdata, f"write_{write}")(path)
    again = getattr(md, f"read_{write}")(path)
    assert sx.get.fits(again).equals(sx.get.fits(mdata))
    pd.testing.assert_frame_equal(sx.get.setup(again), sx.get.setup(mdata))
    kept = again.obsm["X_totalvi"], layer(again, "totalvi_protein_foreground")
    sx.tl.get_latent(again)
    sx.tl.get_protein_foreground(again)
    np.testing.assert_array_equal(again.obsm["X_totalvi"], kept[0])
    np.testing.assert_array_equal(layer(again, "totalvi_protein_foreground"), kept[1])
    getattr(again, f"write_{write}")(tmp_path / f"b.{write}")


def test_backed(both, tmp_path):
    _, mdata = both
    mdata.write_h5mu(tmp_path / "a.h5mu")
    backed = md.read_h5mu(tmp_path / "a.h5mu", backed="r")
    for data in (mdata, backed):
        sx.tl.get_latent(data)
    np.testing.assert_array_equal(backed.obsm["X_totalvi"], mdata.obsm["X_totalvi"])


def test_a_query(both):
    _, mdata = both
    query = mdata.copy()
    del query.uns["scvi_ext"]
    query.obs["batch"] = "new"
    with pytest.raises(KeyError, match=r"call scvi_ext\.pp\.setup_mudata\(mdata\) first"):
        sx.tl.map_query(query, mdata)
    sx.pp.setup_mudata(query)
    sx.tl.map_query(query, mdata, max_epochs=1, progress=False)
    sx.tl.get_latent(query)
    assert query.uns["scvi_ext"]["modalities"] == {"rna": "rna", "protein": "prot"}
    # cells with genes alone, of an AnnData
    genes = mdata["rna"].copy()
    genes.obs["batch"] = "new"
    sx.tl.map_query(genes, mdata, max_epochs=1, progress=False)
    sx.tl.get_protein_expression(genes)
    assert genes.obsm["totalvi_protein"].shape == (80, 5)


def test_a_query_of_genes_alone_has_no_modality_for_proteins(both):
    _, mdata = both
    query = md.MuData({"rna": mdata["rna"].copy()})
    query.obs["batch"] = "new"
    sx.pp.setup_mudata(query, protein=None)
    sx.tl.map_query(query, mdata, max_epochs=1, progress=False)
    sx.tl.get_protein_expression(query)
    assert query.obsm["totalvi_protein"].shape == (80, 5)
    assert np.isfinite(query.obsm["totalvi_protein"].to_numpy()).all()


def test_a_folder(both, tmp_path):
    sx.io.write_model(both[1], tmp_path / "model")
    sx.tl.map_query(draw(), tmp_path / "model", protein_obsm_key=KEY, max_epochs=0, progress=False)


# ---- what is refused, and AnnData that notices nothing -------------------------------------------------------------


def test_what_ctrl_c_leaves_is_written(both):
    _, mdata = both

    def interrupted(adata: ad.AnnData) -> None:
        sx.tl.get_latent(adata)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        takes_mudata(interrupted, "tests")(mdata)
    assert "X_totalvi" in mdata.obsm


def test_the_name_of_a_modality_is_kept_for_it(both):
    _, mdata = both
    with pytest.raises(ValueError, match=r"mdata\.obsm\['rna'\] is kept for the modality of this name"):
        sx.tl.get_latent(mdata, key_added="rna")
    assert mdata.obsm["rna"].dtype == bool
    with pytest.raises(ValueError, match=r"adata\.obsm\['prot'\] is what fit 'totalvi' reads"):
        sx.tl.get_latent(mdata, key_added="prot")


def test_errors_say_what_adata_is(both):
    _, mdata = both
    with pytest.raises(KeyError) as error:
        sx.tl.get_latent(mdata, key="other")
    assert "X, layers and var are those of the modality 'rna', adata.obsm['prot'] 'prot'.X" in error.value.__notes__[0]


def test_an_anndata_takes_the_way_it_took(both):
    adata, _ = both
    with pytest.raises(KeyError) as error:
        sx.tl.get_latent(adata, key="other")
    assert not hasattr(error.value, "__notes__")
    assert inspect.signature(sx.tl.fit) == inspect.signature(inspect.unwrap(sx.tl.fit))
    for function in (sx.tl.fit, sx.get.fits, sx.metrics.knn_purity, sx.pp.corrupt, sx.io.write_model):
        assert pickle.loads(pickle.dumps(function)) is function
    with pytest.warns(sx.ScviExtWarning, match="The KL weight ends at") as caught:
        sx.tl.fit(adata, "totalvi", **SMALL, plan="scvi-tools")
    assert {warning.filename for warning in caught} == {__file__}
