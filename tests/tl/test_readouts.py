"""Laws that every read-out obeys."""

from __future__ import annotations

import inspect
import random
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import torch
from _tolerances import FLOAT32

import scvi_ext as sx
from scvi_ext.engine import map_cells as engine

if TYPE_CHECKING:
    import anndata as ad

MEANS = ("get_elbo", "get_reconstruction_error", "get_marginal_ll")  # of which a mean over cells can be returned
SAMPLES = ("get_normalized_expression", "get_likelihood_parameters", *MEANS)
EXPECTED = {
    "get_latent": {("obsm", "X_scvi"): ((201, 4), np.float32)},
    "get_normalized_expression": {("layers", "scvi_normalized"): ((201, 60), np.float32)},
    "get_likelihood_parameters": {
        ("layers", "scvi_mean"): ((201, 60), np.float32),
        ("layers", "scvi_dropout"): ((201, 60), np.float32),
        ("var", "scvi_dispersion"): ((60,), np.float32),
    },
    "get_library_size": {("obs", "scvi_library_size"): ((201,), np.float32)},
    "get_elbo": {("obs", "scvi_elbo"): ((201,), np.float64)},
    "get_reconstruction_error": {("obs", "scvi_reconstruction_error"): ((201,), np.float64)},
    "get_marginal_ll": {("obs", "scvi_marginal_ll"): ((201,), np.float64)},
}


def slots(adata: ad.AnnData) -> set[tuple[str, str]]:
    names = ("obs", "var", "obsm", "varm", "layers", "obsp", "varp", "uns")
    return {(name, key) for name in names for key in getattr(adata, name).keys()}


def test_every_read_out_of_cells_is_tested_here():
    public = {name for name in sx.tl.__all__ if name.startswith("get_")}
    of_proteins = {"get_protein_background", "get_protein_expression", "get_protein_foreground"}
    of_zeros = {"get_technical_zeros", "get_zero_inflation"}
    elsewhere = {"get_drift", "get_importance_weights", "get_loadings"} | of_proteins | of_zeros
    assert public == set(EXPECTED) | elsewhere


def test_it_writes_its_slots_and_nothing_else(fitted, write, readout):
    before, x = slots(fitted), fitted.X.copy()
    assert write(readout, fitted) is None
    assert slots(fitted) - before == set(EXPECTED[readout])
    assert before <= slots(fitted)
    assert (fitted.X != x).nnz == 0
    for (slot, key), (shape, dtype) in EXPECTED[readout].items():
        values = np.asarray(getattr(fitted, slot)[key])
        assert values.shape == shape
        assert values.dtype == dtype
        assert np.isfinite(values).all()


def test_it_says_what_it_wrote(fitted, write, readout, logged):
    write(readout, fitted)
    for slot, key in EXPECTED[readout]:
        assert f"'{key}'" in logged()
        assert f"(adata.{slot})" in logged()


def test_a_copy_is_written_to_and_the_original_is_not(fitted, write, readout):
    before = slots(fitted)
    copy = write(readout, fitted, copy=True)
    assert slots(fitted) == before
    assert slots(copy) == before | set(EXPECTED[readout])


def test_a_view_becomes_an_anndata_of_its_own(fitted, write, readout, read):
    view = fitted[50:60]
    expected = read(readout, view.copy())
    write(readout, view)
    assert not view.is_view
    assert not slots(fitted) & set(EXPECTED[readout])
    np.testing.assert_array_equal(np.asarray(view.obs_names), fitted.obs_names[50:60])
    np.testing.assert_array_equal(read(readout, view), expected)


def test_another_slot_can_be_named(fitted, write, readout):
    if "key_added" not in inspect.signature(getattr(sx.tl, readout)).parameters:
        with pytest.raises(TypeError, match="key_added"):
            write(readout, fitted, key_added="mine")
        return
    before = slots(fitted)
    write(readout, fitted, key_added="mine")
    (slot, _), *more = EXPECTED[readout]
    assert not more
    assert slots(fitted) - before == {(slot, "mine")}


def test_the_key_chooses_the_fit(fitted, write, readout):
    before = slots(fitted)
    write(readout, fitted, key="ldvae")
    assert slots(fitted) - before == {(slot, name.replace("scvi", "ldvae")) for slot, name in EXPECTED[readout]}


def test_global_generators_are_neither_read_nor_changed(fitted, read, readout):
    def states():
        return [*np.random.get_state()[1], *torch.get_rng_state(), *random.getstate()[1]]

    torch.manual_seed(5)
    before = states()
    first = read(readout, fitted)
    assert states() == before
    torch.manual_seed(6)
    np.testing.assert_array_equal(read(readout, fitted), first)


def test_the_seed_decides_where_there_is_one(fitted, read, readout, monkeypatch):
    if "seed" not in inspect.signature(getattr(sx.tl, readout)).parameters:
        with pytest.raises(TypeError, match="seed"):
            read(readout, fitted, seed=1)
        return
    first = read(readout, fitted, seed=1)
    np.testing.assert_array_equal(read(readout, fitted, seed=1), first)
    assert np.array_equal(read(readout, fitted, seed=2), first) is (readout not in SAMPLES)
    monkeypatch.setattr(sx.settings, "seed", 1)
    np.testing.assert_array_equal(read(readout, fitted), first)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200, 1000])
def test_the_batch_size_does_not_matter(fitted, read, readout, batch_size):
    np.testing.assert_allclose(read(readout, fitted, batch_size=batch_size), read(readout, fitted), **FLOAT32)


def test_blocks_do_not_matter(fitted, read, readout, monkeypatch):
    expected = read(readout, fitted)
    monkeypatch.setattr(engine, "_BLOCK_CELLS", 50)
    np.testing.assert_allclose(read(readout, fitted), expected, **FLOAT32)


@pytest.mark.parametrize(
    "choose",
    [
        lambda adata, rows: rows,
        lambda adata, rows: rows.tolist(),
        lambda adata, rows: rows - adata.n_obs,
        lambda adata, rows: adata.obs_names[rows],
        lambda adata, rows: np.isin(np.arange(adata.n_obs), rows),
        lambda adata, rows: pd.Series(np.isin(np.arange(adata.n_obs), rows), index=adata.obs_names),
    ],
    ids=["array", "list", "from the end", "names", "mask", "series"],
)
def test_chosen_cells_get_values_and_the_others_nan(fitted, read, readout, choose):
    rows = np.array([3, 17, 18, 150])
    values = read(readout, fitted, indices=choose(fitted, rows))
    others = np.setdiff1d(np.arange(fitted.n_obs), rows)
    assert np.isnan(values[others]).all()
    np.testing.assert_allclose(values[rows], read(readout, fitted[rows].copy()), **FLOAT32)


def test_chosen_cells_may_come_in_any_order(fitted, read, readout):
    values = read(readout, fitted, indices=[150, 3, 17])
    assert np.isfinite(values[[150, 3, 17]]).all()
    if readout not in SAMPLES:
        np.testing.assert_allclose(values[[150, 3, 17]], read(readout, fitted)[[150, 3, 17]], **FLOAT32)
    np.testing.assert_allclose(values[[150, 3, 17]], read(readout, fitted[[150, 3, 17]].copy()), **FLOAT32)


def test_a_slice_chooses_too(fitted, read, readout):
    np.testing.assert_array_equal(
        read(readout, fitted, indices=slice(5, 20, 3)), read(readout, fitted, indices=[5, 8, 11, 14, 17])
    )


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([], ValueError, "There are no cells to compute anything for"),
        (np.zeros(201, bool), ValueError, "There are no cells to compute anything for"),
        ([201], IndexError, "1 row numbers outside 0 to 200"),
        (["cell1", "nobody"], KeyError, "1 of 2 names in indices are not in adata.obs_names: 'nobody'"),
        (np.ones(3, bool), ValueError, "The mask in indices has 3 entries and adata has 201 cells"),
        ([0.5], TypeError, "indices has dtype float64"),
    ],
    ids=["none", "empty mask", "outside", "unknown name", "short mask", "floats"],
)
def test_wrong_indices_are_refused(fitted, write, readout, indices, error, message):
    before = slots(fitted)
    with pytest.raises(error, match=message):
        write(readout, fitted, indices=indices)
    assert slots(fitted) == before


def test_cells_in_another_order_get_their_own_values(fitted, read, readout):
    order = np.random.default_rng(0).permutation(fitted.n_obs)
    values = read(readout, fitted[order].copy())
    if readout in SAMPLES:  # draws go by position
        assert not np.allclose(values, read(readout, fitted)[order])
    else:
        np.testing.assert_allclose(values, read(readout, fitted)[order], **FLOAT32)


def test_genes_are_found_by_name(fitted, read, readout, with_genes):
    order = np.random.default_rng(0).permutation(fitted.n_vars)
    shuffled = with_genes(fitted, list(fitted.var_names[order]))
    expected, found = read(readout, fitted), read(readout, shuffled)
    if "layers" in {slot for slot, _ in EXPECTED[readout]}:
        n_layers = expected.shape[1] // fitted.n_vars
        order = np.concatenate([order + i * fitted.n_vars for i in range(n_layers)])
        expected = expected[:, order]
    np.testing.assert_array_equal(found, expected)


def test_genes_that_the_fit_does_not_know_get_nan(fitted, write, read, readout, with_genes):
    names = ["new0", *fitted.var_names[:30], "new1", "new2", *fitted.var_names[30:]]
    larger = with_genes(fitted, names)
    write(readout, larger)
    known = larger.var_names.isin(fitted.var_names)
    plain = fitted.copy()
    write(readout, plain)
    for slot, key in EXPECTED[readout]:
        found, expected = (np.asarray(getattr(adata, slot)[key]) for adata in (larger, plain))
        if slot == "layers":
            assert np.isnan(found[:, ~known]).all()
            found = found[:, known]
        elif slot == "var":
            assert np.isnan(found[~known]).all()
            found = found[known]
        np.testing.assert_array_equal(found, expected)


def test_missing_genes_are_named(fitted, write, readout, with_genes):
    smaller = with_genes(fitted, list(fitted.var_names[2:]))
    with pytest.raises(KeyError, match=r"2 of the 60 genes of the fit are not in adata\.var_names: 'gene0', 'gene1'"):
        write(readout, smaller)
    assert not slots(smaller) & set(EXPECTED[readout])


def test_a_gene_name_that_is_not_unique_is_refused(fitted, write, readout):
    fitted.var_names = ["gene0", *fitted.var_names[:-1]]
    with pytest.raises(ValueError, match=r"1 names more than once: 'gene0'.*var_names_make_unique"):
        write(readout, fitted)


def test_without_a_fit_it_says_what_to_call(registered, counts, write, readout):
    with pytest.raises(KeyError, match=r"has no fits: call scvi_ext\.tl\.fit\(adata\) first"):
        write(readout, registered)


def test_an_unknown_fit_is_refused_with_those_there_are(fitted, write, readout):
    with pytest.raises(KeyError, match=r"'scvo' is not in .*which has: 'ldvae', 'scvi'\. Did you mean 'scvi'\?"):
        write(readout, fitted, key="scvo")


def test_an_unknown_keyword_is_refused(fitted, write, readout):
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_sample'"):
        write(readout, fitted, n_sample=3)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_impossible_batch_size_is_refused(fitted, write, readout, batch_size):
    before = slots(fitted)
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} must be 1 or more"):
        write(readout, fitted, batch_size=batch_size)
    assert slots(fitted) == before


def test_after_another_setup_the_fit_is_refused_by_name(fitted, write, readout):
    sx.pp.setup_anndata(fitted, batch_key="sex")
    before = slots(fitted)
    with pytest.raises(ValueError, match=r"fit 'scvi' was trained with batch_key='batch', .* with batch_key='sex'"):
        write(readout, fitted)
    assert slots(fitted) == before
    sx.pp.setup_anndata(fitted, batch_key="batch")
    write(readout, fitted)
    assert set(EXPECTED[readout]) <= slots(fitted)


def test_a_batch_that_the_fit_does_not_know_is_refused(fitted, write, readout):
    fitted.obs["batch"] = ["b9"] * 2 + ["b1"] * 199
    with pytest.raises(ValueError, match=r"1 unknown categories in 2 of 201 cells: 'b9'. Known ones: 'b0', 'b1', 'b2'"):
        write(readout, fitted)


def test_a_subset_of_the_batches_is_enough(fitted, write, read, readout):
    one = fitted[fitted.obs["batch"] == "b2"].copy()
    one.obs["batch"] = one.obs["batch"].astype(str)
    values = read(readout, one)
    assert np.isfinite(values).all()
    if readout not in SAMPLES:
        np.testing.assert_allclose(values, read(readout, fitted)[fitted.obs["batch"] == "b2"], **FLOAT32)


@pytest.mark.parametrize("readout", SAMPLES)
@pytest.mark.parametrize("n_samples", [0, -5])
def test_it_takes_at_least_one_sample(fitted, write, readout, n_samples):
    name = "n_mc_samples" if readout == "get_marginal_ll" else "n_samples"
    before = slots(fitted)
    with pytest.raises(ValueError, match=rf"{n_samples}\b.* must be 1 or more"):
        write(readout, fitted, **{name: n_samples})
    assert slots(fitted) == before


@pytest.mark.parametrize("readout", SAMPLES)
def test_more_samples_change_the_result_and_bring_it_closer_to_the_mean(fitted, read, readout):
    name = "n_mc_samples" if readout == "get_marginal_ll" else "n_samples"

    def spread(n_samples):
        draws = [read(readout, fitted, seed=seed, indices=slice(0, 40), **{name: n_samples})[:40] for seed in range(10)]
        return np.std(draws, axis=0).mean()

    # By a factor of 5 for plain means; by less for the log of a mean that few samples dominate.
    assert 0 < spread(100) < spread(4) / (1.5 if readout == "get_marginal_ll" else 4)


@pytest.mark.parametrize("readout", SAMPLES)
def test_memory_does_not_grow_with_the_number_of_samples(fitted, read, readout, monkeypatch):
    largest = 0
    normal = engine.Draws.normal

    def measured(draws, n_cells, *shape):
        nonlocal largest
        noise = normal(draws, n_cells, *shape)
        largest = max(largest, noise.numel())
        return noise

    monkeypatch.setattr(engine.Draws, "normal", measured)
    monkeypatch.setattr(engine, "_HOST_FLOATS", 1500)
    name = "n_mc_samples" if readout == "get_marginal_ll" else "n_samples"
    for n_samples in (10, 100, 250):
        read(readout, fitted, indices=slice(0, 20), **{name: n_samples})
    assert 1000 < largest <= 1500  # 5 draws per sample: 250 samples of one cell are 1250


@pytest.mark.parametrize("readout", MEANS)
def test_a_mean_weighs_every_cell_the_same(fitted, read, write, readout):
    expected = read(readout, fitted, indices=slice(0, 200)).ravel()[:200].mean()
    for batch_size in (7, 64, 199, None):  # 200 cells: the last minibatch has 4, 8 or 1
        found = write(readout, fitted, return_mean=True, indices=slice(0, 200), batch_size=batch_size)
        assert isinstance(found, float)
        assert found == pytest.approx(expected, rel=1e-6)  # means in float64 of float32 values


@pytest.mark.parametrize("readout", MEANS)
def test_nothing_is_written_where_a_mean_is_returned(fitted, write, readout):
    before = slots(fitted)
    write(readout, fitted, return_mean=True)
    assert slots(fitted) == before
    for options in ({"copy": True}, {"key_added": "mine"}):
        with pytest.raises(ValueError, match="return_mean=True writes nothing: leave out copy"):
            write(readout, fitted, return_mean=True, **options)
