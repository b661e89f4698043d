from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _tolerances import FLOAT32, FLOAT64, N_STANDARD_ERRORS
from scipy import stats

import scvi_ext as sx
from scvi_ext.engine import map_cells as engine

SLOT = "scvi_posterior_predictive"
QUICK = {"n_hidden": 8, "n_latent": 2, "max_epochs": 2}
COLUMNS = [f"{name}_{which}" for name in ("mean", "cv", "zero_fraction") for which in ("observed", "predicted", "sd")]
COVERAGE = ["coverage_50", "coverage_80", "coverage_95"]


@pytest.fixture
def fit_with(counts):
    def fit(model="scvi", **options):
        sx.pp.setup_anndata(counts, batch_key="batch", labels_key="cell_type", size_factor_key="size")
        sx.tl.fit(counts, model, key_added="scvi", **QUICK | {"library": "observed"} | options)
        return counts

    return fit


def check(adata, **options) -> dict:
    return sx.tl.posterior_predictive_check(adata, copy=True, **{"n_samples": 3} | options).uns[SLOT]


def statistics(x: np.ndarray, axis: int) -> list[np.ndarray]:
    with np.errstate(invalid="ignore"):
        return [x.mean(axis), x.std(axis) / x.mean(axis), (x == 0).mean(axis)]


def test_it_writes_four_tables_and_nothing_else(fitted, logged):
    before = fitted.copy()
    assert sx.tl.posterior_predictive_check(fitted, n_samples=2) is None
    found = fitted.uns[SLOT]
    assert list(found) == ["genes", "cells", "calibration", "params"]
    assert list(found["genes"].columns) == list(found["cells"].columns) == [*COLUMNS, *COVERAGE]
    assert found["genes"].index.equals(fitted.var_names)
    assert found["cells"].index.equals(fitted.obs_names)
    assert (found["genes"].dtypes == np.float64).all()
    assert list(found["calibration"].columns) == ["level", "coverage", "coverage_expressed"]
    assert found["params"] == {"fit": "scvi", "n_samples": 2, "seed": 0}
    assert set(fitted.uns) == {*before.uns, SLOT}
    assert list(fitted.obs) == list(before.obs)
    assert not set(fitted.layers) | set(fitted.obsm)
    assert f"'{SLOT}'" in logged()


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "normal"])
def test_it_compares_the_counts_with_posterior_predictive_samples(fit_with, likelihood):
    adata = fit_with(reconstruction_loss=likelihood)
    found = check(adata, n_samples=4, seed=5)
    drawn = sx.tl.posterior_predictive_sample(adata, n_samples=4, seed=5)
    replicates = [matrix.toarray().astype(float) for matrix in drawn]
    for table, axis in (("genes", 0), ("cells", 1)):
        observed = statistics(adata.X.toarray().astype(float), axis)
        predicted = np.array([statistics(x, axis) for x in replicates])  # (S, 3, n)
        for i, name in enumerate(("mean", "cv", "zero_fraction")):
            part = found[table].filter(like=name)
            # samples are returned in float32, which rounds those of a density
            tolerance = FLOAT64 if likelihood != "normal" else {"rtol": 1e-3, "atol": 1e-5}
            np.testing.assert_allclose(part[f"{name}_observed"], observed[i], **FLOAT64)
            np.testing.assert_allclose(part[f"{name}_predicted"], predicted[:, i].mean(0), **tolerance)
            np.testing.assert_allclose(part[f"{name}_sd"], predicted[:, i].std(0, ddof=1), **tolerance)


def test_coverage_is_that_of_the_mixture_over_posterior_samples(fit_with):
    adata = fit_with(reconstruction_loss="nb")
    found = check(adata, n_samples=3, seed=5)
    theta = np.exp(adata.uns["scvi_ext"]["fits"]["scvi"]["state"]["dispersion.log_theta"].astype(float))
    rate = sx.tl.get_normalized_expression(adata, n_samples=3, seed=5, return_mean=False, library_size="latent")
    law = stats.nbinom(theta, theta / (theta + rate.astype(float)))
    x = adata.X.toarray()
    up_to, below = law.cdf(x).mean(0), law.cdf(x - 1).mean(0)
    expressed = rate.mean(0) >= 1
    for level in (0.1, 0.5, 0.8, 0.95):
        low, high = (1 - level) / 2, (1 + level) / 2
        inside = np.clip(np.minimum(up_to, high) - np.maximum(below, low), 0, None) / (up_to - below)
        row = found["calibration"].set_index("level").loc[level]
        # rates in float32, some of which fall on either side of one
        np.testing.assert_allclose(row["coverage"], inside.mean(), **FLOAT32)
        np.testing.assert_allclose(row["coverage_expressed"], inside[expressed].mean(), rtol=1e-3)
        if level != 0.1:
            name = f"coverage_{100 * level:.0f}"
            np.testing.assert_allclose(found["genes"][name], inside.mean(0), **FLOAT32)
            np.testing.assert_allclose(found["cells"][name], inside.mean(1), **FLOAT32)


def true_model(likelihood: str, counts: ad.AnnData) -> ad.AnnData:
    """Counts drawn from a fit that does not look at them: nothing it knows of a cell comes from its counts."""
    sx.pp.setup_anndata(counts, size_factor_key="size")
    sx.tl.fit(counts, reconstruction_loss=likelihood, **QUICK)
    state = counts.uns["scvi_ext"]["fits"]["scvi"]["state"]
    for name in state:
        if name.startswith("z_encoder") and name.endswith("weight"):
            state[name] = np.zeros_like(state[name])
    counts.X = sx.tl.posterior_predictive_sample(counts, n_samples=2, seed=11)[0]
    return counts


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "bernoulli"])
def test_the_true_model_is_calibrated(make_counts, likelihood):
    adata = true_model(likelihood, make_counts(600, 40))
    found = check(adata, n_samples=200)
    level, covered = found["calibration"]["level"], found["calibration"]["coverage"]
    error = 0.5 / np.sqrt(600 * 40)  # of a share of independent counts, at most
    assert (np.abs(covered - level) < N_STANDARD_ERRORS * error).all()
    if likelihood != "bernoulli":  # which has only some counts with a rate of one or more here
        assert (np.abs(found["calibration"]["coverage_expressed"] - level) < 0.05).all()
    for table, n in (("genes", 600), ("cells", 40)):
        values = found[table]
        off = (values[COVERAGE] - [0.5, 0.8, 0.95]).abs()
        assert (off < N_STANDARD_ERRORS * 0.5 / np.sqrt(n)).all(axis=None)
        # a replicate deviates as the observation does: five of its standard deviations, themselves known to a tenth
        for name in ("mean", "zero_fraction"):
            deviation = (values[f"{name}_observed"] - values[f"{name}_predicted"]).abs()
            assert (deviation <= 6 * values[f"{name}_sd"] + 1e-9).all()


def test_a_wrong_model_is_found_out(make_counts):
    """Overdispersed counts, and a Poisson model whose intervals are too narrow for them."""
    adata = true_model("nb", make_counts(600, 40))
    sx.tl.fit(adata, reconstruction_loss="poisson", library="observed", key_added="poisson", **QUICK)
    sx.tl.posterior_predictive_check(adata, key="poisson")
    found = adata.uns["poisson_posterior_predictive"]
    assert (found["calibration"]["coverage_expressed"] < found["calibration"]["level"] - 0.03)[3:].all()
    genes = found["genes"]
    assert (genes["cv_observed"] > genes["cv_predicted"] + 3 * genes["cv_sd"]).mean() > 0.5


def test_detections_are_compared_as_such(fit_with):
    adata = fit_with(reconstruction_loss="bernoulli")
    found = check(adata)
    detected = (adata.X.toarray() > 0).astype(float)
    np.testing.assert_allclose(found["genes"]["mean_observed"], detected.mean(0), **FLOAT64)
    np.testing.assert_allclose(
        found["cells"]["mean_predicted"], 1 - found["cells"]["zero_fraction_predicted"], **FLOAT64
    )


@pytest.mark.parametrize(
    "options",
    [
        {"dispersion": "gene-cell"},
        {"dispersion": "gene-batch", "library": "latent", "latent_distribution": "ln"},
        {"dispersion": "gene-label", "library": "size_factor"},
    ],
    ids=lambda o: o["dispersion"],
)
def test_every_dispersion_can_be_checked(fit_with, options):
    found = check(fit_with(**options))
    assert np.isfinite(found["genes"]).all(axis=None)
    assert np.isfinite(found["calibration"]["coverage"]).all()


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_neither_batch_size_nor_blocks_matter(fitted, monkeypatch, batch_size):
    expected = check(fitted)
    monkeypatch.setattr(engine, "_BLOCK_CELLS", 50)
    found = check(fitted, batch_size=batch_size)
    for table in ("genes", "cells", "calibration"):
        pd.testing.assert_frame_equal(found[table], expected[table], rtol=1e-5)


def test_memory_does_not_grow_with_the_cells(fitted, monkeypatch):
    """Arrays of cells x genes are never larger than a minibatch."""
    monkeypatch.setattr(engine, "_HOST_FLOATS", 60 * 2 * 20)
    sizes = []
    streams = engine.Draws.streams
    monkeypatch.setattr(engine.Draws, "streams", lambda draws, n: sizes.append(n) or streams(draws, n))
    check(fitted)
    assert max(sizes) == 20


def test_genes_and_cells_without_counts(fitted):
    x = fitted.X.toarray()
    x[:, 5], x[7] = 0, 0
    fitted.X = x
    found = check(fitted, n_samples=2)
    assert np.isnan(found["genes"].loc["gene5", "cv_observed"])
    assert found["genes"].loc["gene5", "zero_fraction_observed"] == 1
    assert np.isnan(found["cells"].loc["cell7", ["cv_observed", "cv_predicted"]].astype(float)).all()
    assert found["cells"].loc["cell7", "coverage_95"] == pytest.approx(0.95, abs=0.01)


def test_a_mean_below_zero_has_no_coefficient_of_variation(make_counts):
    adata = make_counts(60, 60)
    adata.X = np.maximum(adata.X.toarray() > 7, np.eye(60)).astype(np.float32)  # rates near 0, draws with an sd near 1
    sx.pp.setup_anndata(adata)
    sx.tl.fit(adata, reconstruction_loss="normal", **QUICK)
    found = check(adata, n_samples=5, seed=2)
    drawn = [matrix.toarray().astype(float) for matrix in sx.tl.posterior_predictive_sample(adata, n_samples=5, seed=2)]
    for table, axis in (("genes", 0), ("cells", 1)):
        lowest = np.min([x.mean(axis) for x in drawn], axis=0)
        values = found[table]
        assert (lowest < 0).any()
        assert (lowest > 0).any()
        np.testing.assert_array_equal(np.isnan(values["cv_predicted"]), lowest < 0)
        np.testing.assert_array_equal(np.isnan(values["cv_sd"]), lowest < 0)
        pd.testing.assert_frame_equal(check(adata, n_samples=5, seed=2, batch_size=7)[table], values, rtol=1e-4)


def test_chosen_cells_in_their_order_under_any_names(fitted, with_genes):
    found = check(fitted, indices=[9, 3, 4])
    assert found["cells"].index.tolist() == ["cell9", "cell3", "cell4"]
    np.testing.assert_allclose(
        found["genes"]["mean_observed"], fitted.X.toarray()[[9, 3, 4]].mean(0, dtype=float), **FLOAT64
    )
    larger = with_genes(fitted, ["new", *fitted.var_names[::-1]])
    larger.obs_names = ["same"] * larger.n_obs
    sx.tl.posterior_predictive_check(larger, n_samples=3)
    with_others = larger.uns[SLOT]
    assert with_others["genes"].index.tolist() == list(fitted.var_names)
    np.testing.assert_array_equal(with_others["genes"], check(fitted)["genes"])
    assert check(fitted, indices=[3])["cells"].shape == (1, 12)


def test_seed_settings_and_global_generators(fitted, monkeypatch):
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = check(fitted, seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert not check(fitted, seed=2)["genes"].equals(first["genes"])
    monkeypatch.setattr(sx.settings, "seed", 1)
    again = check(fitted)
    assert again["genes"].equals(first["genes"])
    assert again["params"]["seed"] == 1


def test_a_view_a_copy_and_a_name(fitted):
    view = fitted[20:30]
    sx.tl.posterior_predictive_check(view, n_samples=2, key="ldvae", key_added="mine")
    assert not view.is_view
    assert view.uns["mine"]["params"]["fit"] == "ldvae"
    assert "mine" not in fitted.uns


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_samples": 1}, ValueError, "n_samples=1 must be 2 or more"),
        ({"n_samples": "3"}, TypeError, "a whole number is needed"),
        ({"seed": -1}, ValueError, "seed=-1 must be 0 or more"),
        ({"key": "nope"}, KeyError, "'nope' is not in"),
        ({"key_added": "a/b"}, ValueError, "without '/'"),
        ({"key_added": "scvi_ext"}, ValueError, r"adata\.uns\['scvi_ext'\] is what fit 'scvi' reads"),
        ({"indices": []}, ValueError, "There are no cells"),
    ],
)
def test_wrong_options_are_refused(fitted, options, error, message):
    before = set(fitted.uns)
    with pytest.raises(error, match=message):
        sx.tl.posterior_predictive_check(fitted, **options)
    assert set(fitted.uns) == before
    assert set(fitted.uns["scvi_ext"]["fits"]) == {"scvi", "ldvae"}


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_it_travels(fitted, tmp_path, kind):
    sx.tl.posterior_predictive_check(fitted, n_samples=2)
    getattr(fitted, f"write_{kind}")(tmp_path / f"a.{kind}")
    read = ad.read_h5ad(tmp_path / "a.h5ad") if kind == "h5ad" else ad.read_zarr(tmp_path / "a.zarr")
    for name in ("genes", "cells", "calibration"):
        pd.testing.assert_frame_equal(
            sx.get.posterior_predictive(read)[name], fitted.uns[SLOT][name], check_index_type=False
        )
    assert read.uns[SLOT]["params"]["fit"] == "scvi"


def test_get_finds_the_check_of_a_fit_or_by_its_name(fitted):
    with pytest.raises(KeyError, match=r"'scvi_posterior_predictive' is not in adata\.uns \(call tl"):
        sx.get.posterior_predictive(fitted)
    with pytest.raises(KeyError, match="nope"):
        sx.get.posterior_predictive(fitted, "nope")
    sx.tl.posterior_predictive_check(fitted, n_samples=2)
    sx.tl.posterior_predictive_check(fitted, n_samples=2, key="ldvae", key_added="mine")
    by_default, named = sx.get.posterior_predictive(fitted), sx.get.posterior_predictive(fitted, "mine")
    assert by_default["genes"].equals(fitted.uns[SLOT]["genes"])
    assert named["genes"].equals(fitted.uns["mine"]["genes"])
    assert sx.get.posterior_predictive(fitted, "scvi")["genes"].equals(by_default["genes"])
    fitted.uns["foreign"], fitted.uns["ldvae_posterior_predictive"] = {"calibration": 1.0}, [1]
    for key, slot in (("foreign", "foreign"), ("ldvae", "ldvae_posterior_predictive")):
        message = rf"adata\.uns\['{slot}'\] is no posterior predictive check; adata\.uns has these: '{SLOT}', 'mine'\."
        with pytest.raises(KeyError, match=message):
            sx.get.posterior_predictive(fitted, key)
    named["genes"].iloc[:] = 0
    assert (fitted.uns["mine"]["genes"] != 0).any(axis=None)
