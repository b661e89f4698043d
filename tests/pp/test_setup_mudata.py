from __future__ import annotations

import inspect
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scvi_ext as sx
from scvi_ext.data.registry import Registry
from scvi_ext.modalities import takes_mudata
from scvi_ext.pp import setup_anndata, setup_mudata

md = pytest.importorskip("mudata")
N, G, P = 60, 15, 4


@pytest.fixture(autouse=True)
def _of_the_next_mudata():
    """Global tables are not pulled from modalities, as from mudata 0.4 on; before, it warns wherever it does so."""
    with md.set_options(pull_on_update=False):
        yield


def draw(kind=sp.csr_matrix) -> dict[str, ad.AnnData]:
    rng = np.random.default_rng(7)
    counts = rng.poisson(rng.gamma(2.0, 1.0, G) * rng.lognormal(0, 0.4, (N, 1))).astype(np.float32)
    counts[:, 0] += 1
    counts[0] += 1
    obs = pd.DataFrame({"donor": rng.choice(["d2", "d1"], N)}, index=[f"c{i}" for i in range(N)])
    rna = ad.AnnData(kind(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(G)]))
    tags = rng.poisson(20.0, (N, P)).astype(np.float32)
    prot = ad.AnnData(kind(tags), obs=obs[[]].copy(), var=pd.DataFrame(index=[f"CD{i}" for i in range(P)]))
    return {"rna": rna, "prot": prot}


@pytest.fixture
def mdata() -> md.MuData:
    return md.MuData(draw())


def registry(mdata) -> Registry:
    return Registry.from_uns(mdata.uns["scvi_ext"]["setup"])


def refused(mdata, error, match, **arguments):
    """The setup raises, and leaves no trace."""
    with pytest.raises(error, match=match):
        setup_mudata(mdata, **arguments)
    assert "scvi_ext" not in mdata.uns
    assert not mdata["rna"].uns


# ---- what is registered --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])
def test_genes_and_proteins(kind, logged):
    mdata = md.MuData(draw(kind))
    assert setup_mudata(mdata, batch_key="donor") is None
    found = registry(mdata)
    assert (found.layer, found.batch_key, found.batch_categories) == (None, "donor", ("d1", "d2"))
    assert (found.protein_obsm_key, found.protein_names) == ("prot", ("CD0", "CD1", "CD2", "CD3"))
    assert mdata.uns["scvi_ext"]["modalities"] == {"rna": "rna", "protein": "prot"}
    assert list(mdata.uns) == ["scvi_ext"]
    assert set(mdata.obsm) == {"rna", "prot"}
    assert mdata.obs.empty
    assert "60 cells x 15 genes from X, 2 batches ('donor'), 4 proteins ('prot')" in logged()
    assert "of the MuData: 'scvi_ext' (mdata.uns)" in logged()


def test_names_and_layers_of_modalities():
    parts = draw()
    parts["rna"].layers["counts"] = parts["rna"].X.copy()
    parts["rna"].X = parts["rna"].X.log1p()
    parts["prot"].layers["raw"] = parts["prot"].X.copy()
    parts["prot"].X = parts["prot"].X.log1p()
    mdata = md.MuData({"ADT": parts["prot"], "GEX": parts["rna"]})
    arguments = {"rna": "GEX", "protein": "ADT", "rna_layer": "counts"}
    refused_match = r"adata\.obsm\['ADT'\]: 240 entries .*in 4 of 4 proteins: 'CD0'.*CLR"
    with pytest.raises(ValueError, match=refused_match) as error:
        setup_mudata(mdata, **arguments)
    assert "adata.obsm['ADT'] 'ADT'.X" in error.value.__notes__[0]
    setup_mudata(mdata, **arguments, protein_layer="raw")
    assert (registry(mdata).layer, registry(mdata).protein_obsm_key) == ("counts", "ADT:raw")
    assert mdata.uns["scvi_ext"]["modalities"] == {"rna": "GEX", "protein": "ADT", "protein_layer": "raw"}


def test_genes_alone(mdata):
    setup_mudata(mdata, protein=None)
    assert registry(mdata).protein_names == ()
    assert mdata.uns["scvi_ext"]["modalities"] == {"rna": "rna"}
    sx.tl.fit(mdata, n_hidden=4, n_latent=2, max_epochs=1, progress=False)
    sx.tl.get_latent(mdata)
    assert mdata.obsm["X_scvi"].shape == (N, 2)


def test_columns_of_cells_are_found_in_their_order(mdata):
    mdata.obs["site"] = ["s1", "s2"] * 30
    mdata.obs["rna:donor"] = ["x", "y", "z"] * 20
    setup_mudata(mdata, batch_key="site", labels_key="donor", categorical_covariate_keys=["rna:donor"])
    found = registry(mdata)
    assert found.batch_categories == ("s1", "s2")  # of the MuData
    assert found.labels_categories == ("d1", "d2")  # of the genes
    assert found.covariate_categories == (("x", "y", "z"),)
    mdata.obs["donor"] = ["p", "q"] * 30  # the MuData comes first
    setup_mudata(mdata, labels_key="donor")
    assert registry(mdata).labels_categories == ("p", "q")
    with pytest.raises(KeyError, match=r"'batch' is not in adata\.obs"):
        setup_mudata(mdata, batch_key="batch")


def test_pulled_columns():
    """What mudata does by default up to 0.3: columns of modalities stand in the MuData with a prefix."""
    mdata = md.MuData(draw())
    mdata.pull_obs()
    name = next(name for name in mdata.obs if "donor" in name)
    setup_mudata(mdata, batch_key=name)
    assert registry(mdata).batch_categories == ("d1", "d2")


@pytest.mark.filterwarnings("ignore:protein_batch_mask says of proteins")
def test_cells_in_other_orders(mdata):
    parts = draw()
    order = np.random.default_rng(0).permutation(N)
    parts["prot"].X = sp.csr_matrix(np.arange(N)[:, None] * np.ones((1, P), np.float32) + 1)
    parts["prot"] = parts["prot"][order].copy()
    shuffled = md.MuData(parts)
    mask = {"d1": ["CD0"]}
    setup_mudata(shuffled, batch_key="donor", protein_batch_mask=mask)
    assert registry(shuffled).missing_proteins == (("CD1", "CD2", "CD3"), ())
    seen = []
    takes_mudata(lambda adata: seen.append(adata.obsm["prot"]), "tests")(shuffled)
    assert seen[0]["CD0"].tolist() == [int(name[1:]) + 1 for name in shuffled.obs_names]


def test_panels_that_differ_between_batches(mdata):
    is_d1 = (mdata["rna"].obs["donor"] == "d1").to_numpy()
    values = mdata["prot"].X.toarray()
    values[is_d1, 2] = 0
    mdata["prot"].X = values
    setup_mudata(mdata, batch_key="donor")
    assert registry(mdata).missing_proteins == (("CD2",), ())
    setup_mudata(mdata, batch_key="donor", protein_batch_mask=None)
    assert registry(mdata).missing_proteins == ()


def test_copy_leaves_it_as_it_is(mdata):
    copied = setup_mudata(mdata, copy=True)
    assert isinstance(copied, md.MuData)
    assert "setup" in copied.uns["scvi_ext"]
    assert "scvi_ext" not in mdata.uns


def test_a_view_becomes_its_own(mdata):
    some = mdata[:30]
    setup_mudata(some)
    assert not some.is_view
    assert "scvi_ext" not in mdata.uns


def test_another_layer_makes_a_fit_stale(mdata):
    mdata["prot"].layers["raw"] = mdata["prot"].X.copy()
    setup_mudata(mdata)
    sx.tl.fit(mdata, "totalvi", n_hidden=4, n_latent=2, max_epochs=1, progress=False)
    setup_mudata(mdata, protein_layer="raw")
    with pytest.raises(
        ValueError, match=r"protein_obsm_key='prot', and adata has since .* protein_obsm_key='prot:raw'"
    ):
        sx.tl.get_latent(mdata)


def test_other_modalities_are_left_alone(mdata):
    parts = draw()
    parts["hto"] = ad.AnnData(np.ones((N, 2)), obs=parts["rna"].obs[[]].copy(), var=pd.DataFrame(index=["h1", "h2"]))
    mdata = md.MuData(parts)
    setup_mudata(mdata)
    assert not mdata["hto"].uns
    parts["hto"].obs_names = [f"other{i}" for i in range(N)]
    refused(md.MuData(parts), ValueError, r"60 cells are not in mdata\['rna'\].*muon\.pp\.intersect_obs\(mdata\)")


@pytest.mark.parametrize("write", ["h5mu", "zarr"])
def test_it_travels(mdata, tmp_path, write):
    setup_mudata(mdata, batch_key="donor")
    getattr(mdata, f"write_{write}")(tmp_path / "a")
    again = getattr(md, f"read_{write}")(tmp_path / "a")
    assert registry(again) == registry(mdata)
    pd.testing.assert_frame_equal(sx.get.setup(again), sx.get.setup(mdata))
    sx.tl.fit(again, "totalvi", n_hidden=4, n_latent=2, max_epochs=1, progress=False)


def test_it_goes_without_importing_mudata(mdata, monkeypatch):
    monkeypatch.setitem(sys.modules, "mudata", None)
    setup_mudata(mdata)
    assert registry(mdata).protein_obsm_key == "prot"


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_other_cells():
    parts = draw()
    parts["prot"] = parts["prot"][5:].copy()
    mdata = md.MuData(parts)
    message = r"5 cells are not in mdata\['prot'\] \('c0', 'c1' and 3 more\).*muon\.pp\.intersect_obs\(mdata\)"
    refused(mdata, ValueError, message)
    refused(mdata, ValueError, message, copy=True)
    setup_mudata(mdata, protein=None)


def test_a_modality_that_has_changed_since(mdata):
    mdata.mod["prot"] = mdata["prot"][::-1][:50].copy()
    refused(mdata, ValueError, r"10 cells are not in mdata\['prot'\].*mdata\.update\(\)")


def test_names_that_are_not_there(mdata):
    refused(mdata, KeyError, r"'gex', which is to be read, is not in mdata\.mod, which has: 'rna', 'prot'", rna="gex")
    refused(mdata, KeyError, r"'adt'.* is not in mdata\.mod", protein="adt")
    refused(mdata, KeyError, r"'raw' is not in mdata\['prot'\]\.layers", protein_layer="raw")
    refused(mdata, KeyError, r"'raw'.* is not in adata\.layers", rna_layer="raw")


def test_contradictions(mdata):
    refused(mdata, ValueError, "protein_layer='raw' has no effect with protein=None", protein=None, protein_layer="raw")
    refused(mdata, ValueError, "rna and protein are both 'rna'", protein="rna")
    refused(mdata, ValueError, "protein_batch_mask is given without", protein=None, protein_batch_mask={"d1": ["CD0"]})


def test_proteins_that_are_no_counts(mdata):
    values = mdata["prot"].X.toarray()
    values[3, 1] = np.nan
    mdata["prot"].X = values
    refused(mdata, ValueError, r"are missing \(NaN\), in 1 of 4 proteins: 'CD1', first cell 'c3'.*fillna\(0\)")
    values[3, 1] = 2.5
    mdata["prot"].X = values
    with pytest.warns(
        sx.ScviExtWarning, match="are not integers, in 1 of 4 proteins: 'CD1', first cell 'c3'"
    ) as caught:
        setup_mudata(mdata, check="warn")
    assert {warning.filename for warning in caught} == {__file__}


def test_no_proteins_in_x(mdata):
    mdata["prot"].layers["raw"] = mdata["prot"].X
    mdata["prot"].X = None
    refused(mdata, TypeError, r"mdata\['prot'\]\.X is None\. Name the layer, protein_layer=\.\.\., out of: 'raw'")


def test_names_that_are_not_unique():
    parts = draw()
    parts["prot"].var_names = ["CD0", "CD0", "CD2", "CD3"]
    with pytest.warns(UserWarning, match="not unique"):
        mdata = md.MuData(parts)
    refused(mdata, ValueError, "have names more than once: 'CD0'")


def test_axis_of_genes():
    parts = draw()
    mdata = md.MuData({"a": parts["rna"][:30].copy(), "b": parts["rna"][30:].copy()}, axis=1)
    with pytest.raises(ValueError, match="axis=1; modalities that share their cells are needed"):
        setup_mudata(mdata, rna="a", protein=None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer", "is called rna_layer here"),
        ("protein_obsm_key", "is called protein, the name of a modality, here"),
        ("modalities", "is called rna="),
        ("batchkey", "Did you mean 'batch_key'"),
    ],
)
def test_keywords_of_others(mdata, name, message):
    refused(mdata, TypeError, message, **{name: "x"})


def test_keywords_are_those_of_setup_anndata():
    one, other = (set(inspect.signature(function).parameters) for function in (setup_anndata, setup_mudata))
    assert one - other == {"adata", "layer", "protein_obsm_key", "protein_names_uns_key"}
    assert other - one == {"mdata", "rna", "protein", "rna_layer", "protein_layer"}


def test_not_a_mudata(mdata):
    with pytest.raises(TypeError, match=r"mdata is an AnnData; a MuData is needed\. Call scvi_ext\.pp\.setup_anndata"):
        setup_mudata(mdata["rna"])
    with pytest.raises(TypeError, match="mdata is a list"):
        setup_mudata([])
    with pytest.raises(TypeError, match=r"adata is a MuData; .* Call scvi_ext\.pp\.setup_mudata"):
        setup_anndata(mdata)


def test_before_it_is_set_up(mdata):
    for call in (sx.tl.get_latent, sx.get.setup, sx.tl.fit, sx.pp.corrupt):
        with pytest.raises(KeyError, match=r"call scvi_ext\.pp\.setup_mudata\(mdata\) first"):
            call(mdata)
