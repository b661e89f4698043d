"""What a user already has is not lost, and what has changed is noticed."""

import os
import signal

import anndata as ad
import numpy as np
import pytest
import scanpy as sc

import scvi_ext as sx


def normalize(adata):
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)


def spoil(adata):
    adata.X = adata.X.astype(np.float32)
    adata.X[0, 0] = np.nan


@pytest.mark.parametrize("change", [normalize, spoil])
def test_counts_that_changed_after_setup_are_noticed(fitted, change):
    with np.errstate(all="ignore"):
        change(fitted)
    for function in (sx.tl.fit, sx.tl.get_latent, sx.tl.get_elbo):
        with pytest.raises(ValueError, match=r"adata\.X holds .* it held raw counts when it was set up"):
            function(fitted)
    assert list(fitted.obsm) == []


def test_counts_that_were_accepted_with_a_warning_are_not_looked_at_again(counts):
    counts.X = counts.X.astype(np.float32) * 0.5
    with pytest.warns(sx.ScviExtWarning, match="are not integers"):
        sx.pp.setup_anndata(counts, check="warn")
    sx.tl.fit(counts, max_epochs=1)
    sx.tl.get_latent(counts)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", 5])
def test_slots_that_no_file_can_hold_are_refused(fitted, name):
    for function in (sx.tl.get_latent, sx.tl.get_normalized_expression, sx.tl.get_library_size):
        with pytest.raises(ValueError, match="must be a name"):
            function(fitted, key_added=name)
    with pytest.raises(ValueError, match="must be a name"):
        sx.tl.get_elbo(fitted, return_mean=False, key_added=name)


def test_a_read_out_does_not_overwrite_what_the_fit_reads(counts):
    counts.layers["counts"] = counts.X.copy()
    sx.pp.setup_anndata(counts, layer="counts", batch_key="batch")
    sx.tl.fit(counts, max_epochs=1)
    with pytest.raises(ValueError, match=r"adata\.layers\['counts'\] is what fit 'scvi' reads"):
        sx.tl.get_normalized_expression(counts, key_added="counts")
    with pytest.raises(ValueError, match=r"adata\.obs\['batch'\] is what fit 'scvi' reads"):
        sx.tl.get_elbo(counts, return_mean=False, key_added="batch")


def test_without_the_last_fit_the_only_other_one_is_taken(fitted):
    sx.tl.fit(fitted, "ldvae", max_epochs=1)
    del fitted.uns["scvi_ext"]["fits"]["ldvae"]
    sx.tl.get_latent(fitted)
    assert "X_scvi" in fitted.obsm
    sx.tl.fit(fitted, max_epochs=1, key_added="other")
    sx.tl.fit(fitted, max_epochs=1, key_added="third")
    del fitted.uns["scvi_ext"]["fits"]["third"]
    with pytest.raises(KeyError, match="The last fit was deleted; name one of the others"):
        sx.tl.get_latent(fitted)


def test_a_model_that_is_read_does_not_replace_a_fit(fitted, tmp_path):
    sx.io.write_model(fitted, tmp_path / "model")
    with pytest.raises(ValueError, match="already has a fit 'scvi': read this one under another name"):
        sx.io.read_model(tmp_path / "model", fitted)
    sx.io.read_model(tmp_path / "model", fitted, key_added="second")
    assert {"scvi", "second"} <= set(sx.get.fits(fitted).index)


def test_a_history_without_the_metric_is_said(fitted):
    history = fitted.uns["scvi_ext"]["fits"]["scvi"]["history"]
    fitted.uns["scvi_ext"]["fits"]["scvi"]["history"] = history[["lr"]]
    with pytest.raises(ValueError, match="has no 'elbo'; it has: 'lr'"):
        sx.pl.history(fitted, show=False)


def test_something_else_under_our_name_is_left_alone():
    adata = ad.AnnData(np.ones((3, 2), np.float32))
    adata.uns["scvi_ext"] = "mine"
    with pytest.raises(ValueError, match="which scvi_ext has not written"):
        sx.pp.setup_anndata(adata)
    assert adata.uns["scvi_ext"] == "mine"


def test_an_interrupted_refit_leaves_the_finished_fit(fitted, monkeypatch):
    finished = fitted.uns["scvi_ext"]["fits"]["scvi"]
    module = sx.models.VAE
    loss, calls = module.loss, []

    def interrupting(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "loss", interrupting)
        with pytest.raises(KeyboardInterrupt):
            sx.tl.fit(fitted, max_epochs=50)
    assert fitted.uns["scvi_ext"]["fits"]["scvi"] is finished
    sx.tl.fit(fitted, key_added="scvi_interrupted", resume=True)
    assert sx.get.fits(fitted).loc["scvi_interrupted", "stop_reason"] == "finished"


def test_a_misspelled_setting_is_refused():
    with pytest.raises(AttributeError, match="sede"):
        sx.settings.sede = 3
