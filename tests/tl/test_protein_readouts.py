"""What a fit says of proteins: the laws of the tables, and where a protein was not measured."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _tolerances import FLOAT32, N_STANDARD_ERRORS
from scipy.special import expit
from scipy.stats import nbinom, spearmanr
from sklearn.metrics import roc_auc_score

import scvi_ext as sx
from scvi_ext.data.blocks import Block
from scvi_ext.data.registry import read_setup
from scvi_ext.data.store import CellStore
from scvi_ext.engine import map_cells as engine
from scvi_ext.engine.map_cells import Draws

SLOTS = {
    "get_protein_expression": "totalvi_protein",
    "get_protein_foreground": "totalvi_protein_foreground",
    "get_protein_background": "totalvi_protein_background",
}
QUICK = {"n_hidden": 16, "n_latent": 4, "max_epochs": 3}
KEY = "protein_expression"
# protein_0 was not measured in batch_0, protein_4 and protein_5 not in batch_2
MEASURED = np.array([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=bool)
NAMES = [f"protein_{i}" for i in range(6)]
tables = pytest.mark.parametrize("name", SLOTS)


def make_cite(**options) -> ad.AnnData:
    adata = sx.datasets.synthetic_cite(n_cells_batch=40, n_genes=30, n_proteins=6, n_batches=3, n_missing=2)
    adata.obsm[KEY].iloc[:40, 0] = 0
    adata.obs["size"] = np.linspace(0.5, 2, 120)
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key=KEY, **options)
    return adata


@pytest.fixture(scope="module")
def _cite() -> ad.AnnData:
    adata = make_cite()
    sx.tl.fit(adata, "scvi", **QUICK)
    sx.tl.fit(adata, "totalvi", key_added="efficient", protein_efficiency=True, **QUICK)
    sx.tl.fit(adata, "totalvi", **QUICK)
    return adata


@pytest.fixture
def cite(_cite) -> ad.AnnData:
    """120 cells of 3 batches with panels of their own, a fit of scVI, and two of totalVI."""
    return _cite.copy()


def table(name: str, adata: ad.AnnData, **options) -> pd.DataFrame:
    slot = SLOTS[name].replace("totalvi", options.get("key", "totalvi"))
    return getattr(sx.tl, name)(adata, copy=True, **options).obsm[slot]


def values(name: str, adata: ad.AnnData, **options) -> np.ndarray:
    return table(name, adata, **options).to_numpy()


def measured(adata: ad.AnnData) -> np.ndarray:
    return MEASURED[adata.obs["batch"].cat.codes]


def decoded(adata: ad.AnnData, n_samples: int, seed: int, key: str = "totalvi"):
    """The module, the cells, and z and noise of each posterior sample, as a read-out draws them."""
    module = sx.get.model(adata, key)
    columns = frozenset({"protein", "size_factor"})
    store = CellStore.from_adata(adata, read_setup(adata), columns=columns)
    cells = Block(store, torch.device("cpu"), 0, adata.n_obs).minibatch(np.arange(adata.n_obs))
    noise = Draws(seed, torch.device("cpu")).normal(adata.n_obs, n_samples, module.n_noise)
    posteriors = module.posteriors(cells)
    samples = [(module.transform_z(module.draw(cells, posteriors, n)[0]), n) for n in noise.unbind(1)]
    return module, cells, samples


def decoded_logits(adata: ad.AnnData) -> np.ndarray:
    """What the decoder says of mixing in each cell's own batch, measured or not."""
    module, cells, [(z, _)] = decoded(adata, 1, 0)
    return module.decode_protein(z, cells).mixing_logits.detach().numpy()


def assert_same_means(adata: ad.AnnData, samples: np.ndarray, means: np.ndarray) -> None:
    """Samples (S, cells, P) average to ``means``, (cells, P), over the cells of each batch."""
    codes = adata.obs["batch"].cat.codes.to_numpy()
    for batch in range(3):
        drawn = samples[:, codes == batch]
        error = np.sqrt(drawn.var(0, ddof=1).sum(0) / len(drawn)) / drawn.shape[1]
        difference = drawn.mean((0, 1)) - means[codes == batch].mean(0)
        assert (np.abs(difference) <= N_STANDARD_ERRORS * error + 1e-6 * means.max()).all()


# ---- the tables ----------------------------------------------------------------------------------------------------


@tables
def test_it_writes_a_table_and_nothing_else(cite, name, logged):
    before = cite.copy()
    assert getattr(sx.tl, name)(cite) is None
    written = cite.obsm[SLOTS[name]]
    assert isinstance(written, pd.DataFrame)
    assert list(written.columns) == NAMES
    assert written.index.equals(cite.obs_names)
    assert (written.dtypes == np.float32).all()
    assert np.isfinite(written).all(axis=None)
    assert (written >= 0).all(axis=None)
    assert set(cite.obsm) - set(before.obsm) == {SLOTS[name]}
    for slot in ("obs", "layers", "varm", "uns"):
        assert list(getattr(cite, slot)) == list(getattr(before, slot))
    pd.testing.assert_frame_equal(cite.obsm[KEY], before.obsm[KEY])
    assert f"'{SLOTS[name]}'" in logged()


@tables
def test_copies_views_keys_and_names(cite, name):
    assert SLOTS[name] not in cite.obsm
    copied = getattr(sx.tl, name)(cite, copy=True, key_added="mine", key="efficient")
    assert set(copied.obsm) - set(cite.obsm) == {"mine"}
    view = cite[30:50]
    expected = values(name, view.copy())
    getattr(sx.tl, name)(view)
    assert not view.is_view
    assert SLOTS[name] not in cite.obsm
    np.testing.assert_array_equal(view.obsm[SLOTS[name]], expected)
    with pytest.raises(ValueError, match="is what fit 'totalvi' reads"):
        getattr(sx.tl, name)(cite, key_added=KEY)


@tables
def test_neither_the_batch_size_nor_blocks_matter(cite, name, monkeypatch):
    expected = values(name, cite, n_samples=3)
    for batch_size in (1, 7, 119):
        np.testing.assert_allclose(values(name, cite, n_samples=3, batch_size=batch_size), expected, **FLOAT32)
    monkeypatch.setattr(engine, "_BLOCK_CELLS", 50)
    np.testing.assert_allclose(values(name, cite, n_samples=3), expected, **FLOAT32)


@tables
def test_the_seed_decides_and_global_generators_do_not(cite, name):
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = values(name, cite, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(6)
    np.testing.assert_array_equal(values(name, cite, seed=1), first)
    assert not np.array_equal(values(name, cite, seed=2), first)


@tables
def test_chosen_cells_get_values_and_the_others_nan(cite, name):
    rows = [100, 3, 50]
    found = values(name, cite, indices=rows)
    assert np.isnan(np.delete(found, rows, axis=0)).all()
    np.testing.assert_allclose(found[rows], values(name, cite[rows].copy()), **FLOAT32)
    assert getattr(sx.tl, name)(cite, indices=rows, n_samples=2, return_mean=False).shape == (2, 3, 6)


@tables
def test_some_proteins_are_columns_of_all(cite, name):
    chosen = ["protein_5", "protein_0"]
    pd.testing.assert_frame_equal(
        table(name, cite, protein_list=chosen), table(name, cite)[chosen], check_exact=False, rtol=1e-6
    )
    assert list(table(name, cite, protein_list="protein_3").columns) == ["protein_3"]
    with pytest.raises(KeyError, match="1 of the 2 proteins in protein_list are not in the fit: 'CD3'"):
        getattr(sx.tl, name)(cite, protein_list=["protein_1", "CD3"])
    with pytest.raises(ValueError, match="protein_list has proteins more than once: 'protein_1'"):
        getattr(sx.tl, name)(cite, protein_list=["protein_1", "protein_1"])
    with pytest.raises(ValueError, match="protein_list is empty: name at least one protein, or None for all"):
        getattr(sx.tl, name)(cite, protein_list=[])
    with pytest.raises(TypeError, match=r"protein_list holds 1 \(int\); names are needed"):
        getattr(sx.tl, name)(cite, protein_list=[1])


@tables
def test_a_model_without_proteins_is_refused(cite, name):
    with pytest.raises(ValueError, match=r"not possible with a 'scvi' fit.*models that have it: 'totalvi'"):
        getattr(sx.tl, name)(cite, key="scvi")


@tables
def test_options_without_effect_are_refused(cite, name):
    for option in ({"copy": True}, {"key_added": "mine"}):
        with pytest.raises(ValueError, match="return_mean=False returns an array and writes nothing"):
            getattr(sx.tl, name)(cite, return_mean=False, **option)
    with pytest.raises(ValueError, match="n_samples=0 must be 1 or more"):
        getattr(sx.tl, name)(cite, n_samples=0)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_table_travels_whatever_its_proteins_are_called(kind, tmp_path):
    adata = make_cite()
    adata.obsm["panel"] = adata.obsm[KEY].set_axis(["CD3/CD28", 4, "CD16 (FcR)", "ä", "HLA-DR", "x"], axis=1)
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key="panel")
    sx.tl.fit(adata, "totalvi", **QUICK)
    sx.tl.get_protein_expression(adata, protein_list=["CD3/CD28", "4"])
    sx.tl.posterior_predictive_sample(adata)
    sx.tl.feature_correlation(adata, n_samples=1)
    del adata.obsm["panel"]  # h5ad would not take "CD3/CD28"
    getattr(adata, f"write_{kind}")(tmp_path / "fitted")
    again = getattr(ad, f"read_{kind}")(tmp_path / "fitted")
    assert list(again.obsm["totalvi_protein"].columns) == ["CD3|CD28", "4"]
    for slot, key in (
        ("obsm", "totalvi_protein"),
        ("obsm", "totalvi_posterior_predictive_protein"),
        ("varm", "totalvi_protein_correlation"),
        ("uns", "totalvi_protein_correlation"),
    ):
        one, other = getattr(adata, slot)[key], getattr(again, slot)[key]
        pd.testing.assert_frame_equal(one, other, check_exact=True, check_index_type=False)


# ---- where a protein was not measured ------------------------------------------------------------------------------


@tables
def test_a_protein_is_imputed_from_the_batches_that_have_measured_it(cite, name, logged):
    found = values(name, cite, n_samples=2)
    assert "imputing 3 proteins that were not measured in the batches of 80 of 120 cells" in logged()
    assert "'protein_0', 'protein_4', 'protein_5'; decoded in 'batch_0', 'batch_1', 'batch_2'" in logged()
    codes = cite.obs["batch"].cat.codes
    for p, protein in enumerate(NAMES):
        in_batches = {
            b: values(name, cite, n_samples=2, protein_list=[protein], transform_batch=f"batch_{b}")[:, 0]
            for b in np.flatnonzero(MEASURED[:, p])
        }
        elsewhere = np.mean(list(in_batches.values()), axis=0)
        expected = [in_batches.get(b, elsewhere)[i] for i, b in enumerate(codes)]
        np.testing.assert_allclose(found[:, p], expected, **FLOAT32)


@tables
def test_what_a_batch_without_the_protein_would_say_has_no_influence(cite, name):
    """Batch codes enter the last layers too: a shift there of the batch that lacks a protein changes nothing."""
    before = values(name, cite)
    says = decoded_logits(cite)
    state = cite.uns["scvi_ext"]["fits"]["totalvi"]["state"]
    heads = [key for key in state if key.startswith("decoder.") and state[key].ndim == 2 and len(state[key]) == 6]
    assert heads
    for key in heads:
        state[key] = state[key].copy()
        state[key][4:, -1] += 100  # the column of batch_2, for its two unmeasured proteins
    changed = ~np.isclose(decoded_logits(cite), says)
    assert (changed == ~measured(cite) & (cite.obs["batch"] == "batch_2").to_numpy()[:, None]).all()
    np.testing.assert_allclose(values(name, cite), before, **FLOAT32)
    with pytest.raises(ValueError, match="Batch 'batch_2' has not measured"):
        getattr(sx.tl, name)(cite, transform_batch="batch_2")


@tables
def test_several_batches_are_averaged(cite, name):
    options = {"protein_list": ["protein_4", "protein_1"], "n_samples": 2}
    both = values(name, cite, transform_batch=["batch_0", "batch_1"], **options)
    each = [values(name, cite, transform_batch=batch, **options) for batch in ("batch_0", "batch_1")]
    np.testing.assert_allclose(both, np.mean(each, axis=0), **FLOAT32)
    assert not np.allclose(*each)


@tables
def test_a_batch_that_has_not_measured_a_protein_is_refused(cite, name):
    before = set(cite.obsm)
    message = (
        r"Batch 'batch_2' has not measured 2 of the 6 proteins that are decoded: 'protein_4', 'protein_5'\..*"
        r"Batches that have measured all: 'batch_1'\..*protein_list"
    )
    with pytest.raises(ValueError, match=message):
        getattr(sx.tl, name)(cite, transform_batch=["batch_1", "batch_2"])
    with pytest.raises(ValueError, match="is not one of 'batch_0', 'batch_1', 'batch_2'"):
        getattr(sx.tl, name)(cite, transform_batch="batch_7")
    assert set(cite.obsm) == before
    getattr(sx.tl, name)(cite, transform_batch="batch_2", protein_list=NAMES[:4])


def test_shares_need_all_proteins(cite):
    with pytest.raises(ValueError, match="Batch 'batch_2' has not measured 2 of the 6"):
        sx.tl.get_protein_expression(cite, transform_batch="batch_2", protein_list=NAMES[:4], scale=True)


@tables
def test_without_gaps_nothing_is_said_of_imputation(cite, name, logged):
    getattr(sx.tl, name)(cite, indices=cite.obs["batch"] == "batch_1")
    getattr(sx.tl, name)(cite, transform_batch="batch_1")
    getattr(sx.tl, name)(cite, protein_list=NAMES[1:4])
    assert "imputing" not in logged()


def test_one_batch_needs_no_name():
    adata = sx.datasets.synthetic_cite(n_cells_batch=60, n_genes=20, n_proteins=3, n_batches=1)
    sx.pp.setup_anndata(adata, protein_obsm_key=KEY)
    sx.tl.fit(adata, "totalvi", **QUICK)
    for name in SLOTS:
        assert np.isfinite(values(name, adata)).all()
        assert np.isfinite(values(name, adata[:1].copy())).all()
        with pytest.raises(ValueError, match="knows no batches"):
            getattr(sx.tl, name)(adata, transform_batch="a")
    sx.tl.posterior_predictive_sample(adata)
    sx.tl.feature_correlation(adata, n_samples=2)


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_background", [False, True])
def test_expression_is_the_formula_of_the_paper(cite, include_background):
    found = values("get_protein_expression", cite, n_samples=2, seed=3, include_background=include_background)
    module, cells, samples = decoded(cite, 2, 3)
    expected = 0
    for z, _ in samples:
        py = module.decode_protein(z, cells)
        loc, scale, log_ratio, mixing = (t.detach().numpy() for t in (*py.background, py.log_ratio, py.mixing_logits))
        background, p = np.exp(loc + scale**2 / 2), expit(mixing)
        expected = expected + (1 - p) * background * np.exp(log_ratio) + p * background * include_background
    known = measured(cite)
    np.testing.assert_allclose(found[known], expected[known] / 2, **FLOAT32)


@pytest.mark.parametrize(
    "options", [{}, {"include_background": True}, {"scale": True}, {"sample_mixing": True}], ids=str
)
def test_samples_average_to_the_mean(cite, options):
    options = {"n_samples": 60, "seed": 2} | options
    samples = sx.tl.get_protein_expression(cite, return_mean=False, **options)
    assert samples.shape == (60, 120, 6)
    assert samples.dtype == np.float32
    assert_same_means(cite, samples, values("get_protein_expression", cite, **options))


def test_shares_add_up_to_one(cite):
    shares = table("get_protein_expression", cite, scale=True, n_samples=3)
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    some = table("get_protein_expression", cite, scale=True, n_samples=3, protein_list=["protein_4", "protein_1"])
    pd.testing.assert_frame_equal(some, shares[["protein_4", "protein_1"]], check_exact=False, rtol=1e-6)


def test_sampled_mixing_is_one_or_the_other(cite):
    options = {"sample_mixing": True, "transform_batch": "batch_1", "return_mean": False, "n_samples": 60}
    without, with_background = (
        sx.tl.get_protein_expression(cite, include_background=included, **options) for included in (False, True)
    )
    is_foreground = without > 0
    np.testing.assert_array_equal(with_background[is_foreground], without[is_foreground])
    assert (with_background[~is_foreground] > 0).all()
    exact = values("get_protein_foreground", cite, transform_batch="batch_1", n_samples=400, seed=8)
    assert_same_means(cite, is_foreground, exact)


def test_the_background_is_a_log_normal(cite):
    options = {"n_samples": 60, "seed": 2}
    samples = sx.tl.get_protein_background(cite, return_mean=False, **options)
    assert_same_means(cite, samples, values("get_protein_background", cite, **options))
    module, cells, [(z, noise)] = decoded(cite, 1, 7)
    loc, scale = (t.detach().numpy() for t in module.decode_protein(z, cells).background)
    known = measured(cite)
    drawn = sx.tl.get_protein_background(cite, return_mean=False, seed=7)[0]
    np.testing.assert_allclose(drawn[known], np.exp(loc + scale * noise[:, 4:-1].numpy())[known], **FLOAT32)
    mean = values("get_protein_background", cite, seed=7)
    np.testing.assert_allclose(mean[known], np.exp(loc + scale**2 / 2)[known], **FLOAT32)


def test_foreground_given_counts_is_bayes_theorem(cite):
    found = values("get_protein_foreground", cite, given="counts", seed=4, key="efficient")
    module, cells, [(z, noise)] = decoded(cite, 1, 4, "efficient")
    py = module.decode_protein(z, cells)
    loc, scale = (t.detach().numpy().astype(float) for t in py.background)
    efficiency = module.log_efficiency.detach().numpy()[cells.batch_index]
    background = np.exp(loc + scale * noise[:, 4:-1].numpy() + efficiency)
    theta, y = py.theta.detach().numpy().astype(float), cells.protein.numpy()
    prior = expit(-py.mixing_logits.detach().numpy().astype(float))
    fore, back = (
        nbinom(theta, theta / (theta + mean)).pmf(y)
        for mean in (background * np.exp(py.log_ratio.detach().numpy()), background)
    )
    expected = prior * fore / (prior * fore + (1 - prior) * back)
    known = measured(cite)
    assert np.abs(efficiency).max() > 1e-3
    np.testing.assert_allclose(found[known], expected[known], rtol=1e-3, atol=1e-5)  # float32 sums of a hundred nats
    assert np.isnan(found[~known]).all()


def test_given_counts_there_is_no_other_batch(cite, logged):
    with pytest.raises(ValueError, match=r"transform_batch='batch_1' has no meaning with given='counts'"):
        sx.tl.get_protein_foreground(cite, given="counts", transform_batch="batch_1")
    with pytest.raises(ValueError, match="given='count' is not one of 'counts', 'latent'"):
        sx.tl.get_protein_foreground(cite, given="count")
    sx.tl.get_protein_foreground(cite, given="counts")
    assert "imputing" not in logged()


def test_the_efficiency_of_a_batch_is_of_counts_only(cite):
    state = cite.uns["scvi_ext"]["fits"]["efficient"]["state"]
    options = {"key": "efficient", "n_samples": 20, "seed": 1}
    before = [values(name, cite, **options) for name in SLOTS]
    given_counts = values("get_protein_foreground", cite, given="counts", **options)
    _, denoised = sx.tl.denoised_samples(cite, **options)
    state["log_efficiency"] = np.zeros_like(state["log_efficiency"])
    _, plain = sx.tl.posterior_predictive_sample(cite, **options)
    state["log_efficiency"] = state["log_efficiency"] + np.log(3, dtype=np.float32)
    for name, expected in zip(SLOTS, before, strict=True):
        np.testing.assert_allclose(values(name, cite, **options), expected, **FLOAT32)
    np.testing.assert_allclose(sx.tl.denoised_samples(cite, **options)[1], denoised, **FLOAT32)
    _, tripled = sx.tl.posterior_predictive_sample(cite, **options)
    ratio = tripled.mean((0, 1)) / plain.mean((0, 1))  # each known to some 3 percent
    assert ((ratio > 2) & (ratio < 4.5)).all()
    assert not np.allclose(
        values("get_protein_foreground", cite, given="counts", **options), given_counts, equal_nan=True
    )


def test_planted_foreground_is_found_and_a_missing_panel_is_imputed():
    adata = sx.datasets.synthetic_cite(n_missing=5)
    sx.pp.setup_anndata(adata, batch_key="batch", protein_obsm_key=KEY)
    sx.tl.fit(adata, "totalvi", n_hidden=64, n_latent=8, max_epochs=60)
    known = np.ones((600, 15), bool)
    known[300:, 10:] = False
    truth = adata.obsm["is_foreground"].to_numpy()
    latent = values("get_protein_foreground", adata, n_samples=5)
    given_counts = values("get_protein_foreground", adata, n_samples=5, given="counts")
    # 0.98 and 0.999 were found; z cannot know the one cell in twenty that does not do as its type does.
    assert roc_auc_score(truth[known], latent[known]) > 0.95
    assert roc_auc_score(truth[known], given_counts[known]) > 0.99
    assert roc_auc_score(truth[~known], latent[~known]) > 0.95

    expression = values("get_protein_expression", adata, n_samples=5)
    expected = np.where(truth, adata.obsm["foreground"].to_numpy(), 0)
    for protein in range(10, 15):
        # 0.64 to 0.77 were found: ranks of cells that express it are noise of the background, which is large.
        assert spearmanr(expression[300:, protein], expected[300:, protein]).statistic > 0.5
    background = np.log(values("get_protein_background", adata, n_samples=5))
    levels = np.log(adata.obsm["background"].to_numpy())
    by_batch = [np.array([x[:300].mean(0), x[300:].mean(0)]) for x in (background, levels)]
    measured_there = np.array([[True] * 15, [True] * 10 + [False] * 5])
    assert np.corrcoef(*(x[measured_there] for x in by_batch))[0, 1] > 0.9


# ---- draws ---------------------------------------------------------------------------------------------------------


def test_counts_of_proteins_are_written_beside_those_of_genes(cite, logged):
    sx.tl.posterior_predictive_sample(cite, seed=3)
    counts = cite.obsm["totalvi_posterior_predictive_protein"]
    assert list(counts.columns) == NAMES
    assert (counts.dtypes == np.float32).all()
    np.testing.assert_array_equal(counts, np.rint(counts))
    assert (counts >= 0).all(axis=None)
    assert "'totalvi_posterior_predictive_protein', the same of proteins (adata.obsm)" in logged()
    assert "imputing 3 proteins" in logged()
    drawn = cite.layers["totalvi_posterior_predictive"]
    for protein_list, columns in (([], None), (["protein_5", "protein_1"], [5, 1])):
        other = sx.tl.posterior_predictive_sample(cite, seed=3, protein_list=protein_list, copy=True, key_added="x")
        assert (other.layers["x"] != drawn).nnz == 0
        assert ("x_protein" in other.obsm) == bool(columns)
        if columns:
            np.testing.assert_array_equal(other.obsm["x_protein"], counts.iloc[:, columns])
    some = sx.tl.posterior_predictive_sample(cite, seed=3, gene_list=["gene_7"], copy=True, indices=[5, 9])
    assert np.isnan(np.delete(some.obsm["totalvi_posterior_predictive_protein"].to_numpy(), [5, 9], axis=0)).all()


def test_a_protein_table_that_is_read_is_not_written_over(cite):
    cite.obsm["mine_protein"] = cite.obsm[KEY]
    sx.pp.setup_anndata(cite, batch_key="batch", protein_obsm_key="mine_protein")
    sx.tl.fit(cite, "totalvi", **QUICK)
    with pytest.raises(ValueError, match=r"adata\.obsm\['mine_protein'\] is what fit 'totalvi' reads"):
        sx.tl.posterior_predictive_sample(cite, key_added="mine")


@pytest.mark.parametrize("draw", ["posterior_predictive_sample", "denoised_samples"])
def test_samples_of_genes_and_proteins_are_a_pair(cite, draw):
    function, options = getattr(sx.tl, draw), {"n_samples": 3, "seed": 2}
    genes, of_proteins = function(cite, **options)
    assert of_proteins.shape == (3, 120, 6)
    assert of_proteins.dtype == np.float32
    alone = function(cite, protein_list=[], **options)
    assert not isinstance(alone, tuple)
    for one, other in zip(genes, alone, strict=True):
        assert abs(one - other).max() == 0
    some_genes, some_proteins = function(cite, gene_list=["gene_3"], protein_list="protein_2", batch_size=7, **options)
    assert some_genes[0].shape == (120, 1)
    # A z that differs in its last digit may take one count or draw across a threshold, in a handful of thousands.
    assert (some_proteins[..., 0] != of_proteins[..., 2]).mean() < 0.2
    np.testing.assert_allclose(some_proteins[..., 0], of_proteins[..., 2], rtol=1e-4, atol=1.5)
    with pytest.raises(ValueError, match="not possible with a 'scvi' fit"):
        function(cite, key="scvi", protein_list=["protein_2"], **options)
    assert not isinstance(function(cite, key="scvi", **options), tuple)
    with pytest.raises(ValueError, match="Batch 'batch_0' has not measured 1 of the 6 proteins"):
        function(cite, transform_batch="batch_0", **options)
    function(cite, transform_batch="batch_0", protein_list=[], **options)


@pytest.mark.parametrize("draw", ["posterior_predictive_sample", "denoised_samples"])
@pytest.mark.parametrize("batch", [None, "batch_1"])
def test_draws_average_to_expression(cite, draw, batch):
    """Also where they are imputed: a batch at random, on average the mean over the batches."""
    options = {"n_samples": 60, "seed": 2, "transform_batch": batch}
    _, drawn = getattr(sx.tl, draw)(cite, **options)
    counted = draw == "posterior_predictive_sample"
    assert_same_means(cite, drawn, values("get_protein_expression", cite, include_background=counted, **options))
    if not counted:
        assert_same_means(cite, drawn > 0, values("get_protein_foreground", cite, **options))


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize("options", [{}, {"gene_list": ["gene_4", "gene_1"], "protein_list": ["protein_3"]}], ids=str)
def test_correlations_are_those_of_denoised_samples(cite, method, options):
    sx.tl.feature_correlation(cite, method=method, n_samples=3, seed=5, **options)
    samples = np.concatenate(sx.tl.denoised_samples(cite, n_samples=3, seed=5, **options), axis=2)
    flat = samples.reshape(-1, samples.shape[2]).astype(float)
    expected = np.corrcoef(flat.T) if method == "pearson" else spearmanr(flat).statistic
    proteins = options.get("protein_list", NAMES)
    genes = options.get("gene_list", list(cite.var_names))
    n = len(genes)
    blocks = cite.varm["totalvi_protein_correlation"], cite.uns["totalvi_protein_correlation"]
    assert all(list(block.columns) == proteins for block in blocks)
    assert list(blocks[1].index) == proteins
    rounded = {"rtol": 0, "atol": 2e-7}  # of a correlation in float64
    np.testing.assert_allclose(blocks[0].loc[genes], expected[:n, n:], **rounded)
    np.testing.assert_allclose(blocks[1], expected[n:, n:], **rounded)
    assert blocks[0].drop(index=genes).isna().all(axis=None)


def test_correlations_are_averaged_over_batches_that_have_measured(cite):
    options = {"n_samples": 2, "method": "pearson", "protein_list": NAMES[1:4]}
    each = [sx.tl.feature_correlation(cite, transform_batch=f"batch_{b}", copy=True, **options) for b in range(3)]
    sx.tl.feature_correlation(cite, transform_batch=["batch_0", "batch_1", "batch_2"], key_added="all", **options)
    for slot in ("varm", "uns"):
        mean = np.mean([getattr(adata, slot)["totalvi_protein_correlation"] for adata in each], axis=0)
        np.testing.assert_allclose(getattr(cite, slot)["all"], mean, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="Batch 'batch_2' has not measured"):
        sx.tl.feature_correlation(cite, transform_batch=["batch_1", "batch_2"])
    sx.tl.feature_correlation(cite, key="scvi", n_samples=1, method="pearson")
    assert "scvi_protein_correlation" not in cite.varm
    sx.tl.feature_correlation(cite, key="efficient", n_samples=1, method="pearson", protein_list=[])
    assert "efficient_protein_correlation" not in cite.varm


# ---- the other read-outs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"library": "latent", "latent_distribution": "ln", "reconstruction_loss_gene": "zinb"},
        {"gene_dispersion": "gene-batch", "protein_dispersion": "protein-batch", "protein_efficiency": True},
        {"gene_dispersion": "gene-label", "protein_dispersion": "protein-label", "adversarial_classifier": "off"},
        {"library": "size_factor"},
    ],
    ids=str,
)
def test_every_read_out_takes_a_fit_with_proteins(options, tmp_path):
    extra = {"size_factor_key": "size"} if options.get("library") == "size_factor" else {}
    adata = make_cite(labels_key="cell_type", **extra)
    sx.tl.fit(adata, "totalvi", **QUICK | options)
    calls = {name: {"n_samples": 2} for name in SLOTS} | {
        "get_latent": {},
        "get_normalized_expression": {
            "n_samples": 2,
            "weights": "importance",
            "transform_batch": ["batch_0", "batch_2"],
        },
        "get_likelihood_parameters": {},
        "get_library_size": {},
        "get_elbo": {"return_mean": False},
        "get_reconstruction_error": {"return_mean": False},
        "get_marginal_ll": {"return_mean": False, "n_mc_samples": 3},
        "posterior_predictive_check": {"n_samples": 2},
        "posterior_predictive_sample": {},
        "feature_correlation": {"n_samples": 1},
        "amortization_gap": {"max_epochs": 1, "return_mean": False},
    }
    for name, arguments in calls.items():
        getattr(sx.tl, name)(adata, **arguments)
    assert np.isfinite(sx.tl.get_importance_weights(adata, n_samples=3)).all()
    for name in ("get_loadings", "classify"):
        with pytest.raises(ValueError, match="not possible with a 'totalvi' fit"):
            getattr(sx.tl, name)(adata)
    assert all(np.isfinite(np.asarray(adata.obsm[slot])).all() for slot in adata.obsm)
    assert np.isfinite(adata.obs.select_dtypes("number")).all(axis=None)
    adata.write_h5ad(tmp_path / "fitted.h5ad")
    again = ad.read_h5ad(tmp_path / "fitted.h5ad")
    for name, slot in SLOTS.items():
        np.testing.assert_allclose(values(name, again, n_samples=2), adata.obsm[slot], **FLOAT32)


def test_the_bound_is_that_of_genes_and_measured_proteins(cite):
    """log p(x, y | z) and a count of an unmeasured protein that nobody looks at."""
    module, cells, [(z, noise)] = decoded(cite, 1, 0)
    error = sx.tl.get_reconstruction_error(cite, return_mean=False, copy=True, seed=0, key_added="x")
    py = module.decode_protein(z, cells)
    loc, scale = py.background
    of_proteins = module.log_py(py, cells, loc + scale * noise[:, 4:-1])
    genes = module.log_px(z, cells, module.library.point(cells))
    np.testing.assert_allclose(error.obs["x"], -(of_proteins + genes).detach().numpy(), rtol=1e-5)


def test_implausible_imputation_is_warned_of(cite):
    table("get_protein_expression", cite)  # warnings are errors: there is none
    state = cite.uns["scvi_ext"]["fits"]["totalvi"]["state"]
    state["decoder.py_back_mean_log_alpha.layers.0.linear.bias"] = np.full(6, 20.0, np.float32)  # e^20 counts
    with pytest.warns(sx.ScviExtWarning, match=r"of 80 of 80 cells are more than 5 times.*max_epochs"):
        found = table("get_protein_expression", cite, include_background=True)
    assert found.shape == (120, 6)
    measured = cite.obs["batch"] == "batch_1"
    table("get_protein_expression", cite, indices=measured.to_numpy())  # nothing is imputed there
