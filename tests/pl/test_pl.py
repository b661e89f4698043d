from __future__ import annotations

import matplotlib.image as mpimg
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc
from matplotlib.axes import Axes

import scvi_ext as sx


def draw_imputation(adata, **options):
    if "corrupted" not in adata.layers:
        sx.pp.corrupt(adata)
        with pytest.warns(sx.ScviExtWarning, match=r"was trained on adata\.X"):
            sx.tl.imputation_score(adata)
    return sx.pl.imputation(adata, **options)


def draw_confusion(adata, **options):
    adata.obs["guess"] = adata.obs["cell_type"].to_numpy()[::-1]
    return sx.pl.confusion(adata, "cell_type", prediction_key="guess", **options)


def draw_metrics(adata, **options):
    if "scvi_ext_metrics" not in adata.uns:
        for key in ("scvi", "ldvae"):
            sx.tl.get_latent(adata, key=key)
        sx.metrics.table(adata, labels_key="cell_type")
    return sx.pl.metrics(adata, **options)


def draw_posterior_predictive(adata, **options):
    if "scvi_posterior_predictive" not in adata.uns:
        sx.tl.posterior_predictive_check(adata, n_samples=2)
    return sx.pl.posterior_predictive(adata, **options)


def draw_tuning(adata, **options):
    if "scvi_tuning" not in adata.uns:
        sx.tl.tune(adata, space={"n_latent": [2, 3]}, n_trials=2, refit=False, max_epochs=1, n_hidden=8)
    return sx.pl.tuning(adata, "scvi", **options)


def draw_volcano(adata, **options):
    if "scvi_de" not in adata.uns:
        sx.tl.differential_expression(adata, "cell_type", n_samples=300)
    return sx.pl.volcano(adata, "t0", **options)


def draw_zero_inflation(adata, **options):
    if "autozi_zero_inflation_share" not in adata.var:
        sx.tl.fit(adata, "autozi", max_epochs=2, n_hidden=8)
        sx.tl.get_zero_inflation(adata)
    return sx.pl.zero_inflation(adata, "autozi", **options)


PLOTS = {
    "confusion": draw_confusion,
    "history": lambda *a, **k: sx.pl.history(*a, **k),
    "imputation": draw_imputation,
    "metrics": draw_metrics,
    "loadings": lambda a, **k: sx.pl.loadings(a, "ldvae", **k),
    "posterior_predictive": draw_posterior_predictive,
    "tuning": draw_tuning,
    "volcano": draw_volcano,
    "zero_inflation": draw_zero_inflation,
}


@pytest.fixture(autouse=True)
def clean():
    before = sc.settings.autoshow
    yield
    sc.settings.autoshow = before
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    calls = []
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: calls.append(1))
    return calls


@pytest.fixture(params=PLOTS)
def plot(request):
    return PLOTS[request.param]


def test_every_plot_is_tested_here():
    assert set(PLOTS) == set(sx.pl.__all__)


def test_axes_are_returned_unless_the_figure_is_shown(fitted, plot, shown):
    axes = plot(fitted, show=False)
    assert all(isinstance(ax, Axes) for ax in np.atleast_1d(axes))
    assert not shown
    assert plot(fitted, show=True) is None
    assert len(shown) == 1
    sc.settings.autoshow = True
    assert plot(fitted) is None
    assert len(shown) == 2
    sc.settings.autoshow = False
    assert plot(fitted) is not None
    assert len(shown) == 2


@pytest.mark.parametrize("name", ["picture.png", "picture.pdf", "picture.svg"])
def test_a_picture_is_saved_and_not_shown(fitted, plot, shown, tmp_path, name):
    sc.settings.autoshow = True
    assert plot(fitted, save=tmp_path / name) is not None
    assert not shown
    assert (tmp_path / name).stat().st_size > 5000


def test_a_saved_picture_can_be_shown_too(fitted, plot, shown, tmp_path):
    assert plot(fitted, save=str(tmp_path / "picture.png"), show=True) is None
    assert len(shown) == 1
    pixels = mpimg.imread(tmp_path / "picture.png")[..., :3]
    assert (pixels.std(axis=(0, 1)) > 0.02).all()  # not one colour
    assert min(pixels.shape[:2]) > 200


@pytest.mark.parametrize("metric", ["elbo", "reconstruction_loss", "kl_z", "kl_library"])
def test_history_draws_training_and_held_out_cells(fitted, metric):
    ax = sx.pl.history(fitted, metric=metric, show=False)
    history = sx.get.history(fitted)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert set(lines) == {"train", "validation"}
    for name, line in lines.items():
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_array_equal(line.get_ydata(), history[f"{metric}_{name}"])
    assert ax.get_xlabel() == "epoch"
    assert all(tick == round(tick) for tick in ax.get_xticks())
    assert "per cell" in ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "validation"]


@pytest.mark.parametrize("metric", ["kl_weight", "lr", "cells_per_second"])
def test_history_draws_one_line_of_what_belongs_to_the_run(fitted, metric):
    ax = sx.pl.history(fitted, "ldvae", metric=metric, show=False)
    (line,) = ax.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), sx.get.history(fitted, "ldvae")[metric])
    assert ax.get_legend() is None


def test_history_without_held_out_cells(registered):
    sx.tl.fit(registered, max_epochs=2, n_hidden=8, train_size=1.0)
    (line,) = sx.pl.history(registered, show=False).get_lines()
    assert line.get_label() == "train"


def test_history_draws_into_given_axes(fitted):
    figure, axes = plt.subplots(1, 2)
    assert sx.pl.history(fitted, ax=axes[1], show=False) is axes[1]
    assert not axes[0].get_lines()
    assert plt.get_fignums() == [figure.number]


def test_history_needs_an_epoch(fitted):
    saved = fitted.uns["scvi_ext"]["fits"]["scvi"]
    saved["history"] = saved["history"].iloc[:0, :0]  # as after an interrupt in the first epoch
    with pytest.raises(ValueError, match="There is no epoch to draw: the fit was interrupted in its first one"):
        sx.pl.history(fitted)
    assert not plt.get_fignums()


def test_history_knows_its_metrics(fitted):
    with pytest.raises(ValueError, match=r"metric='loss' is not one of 'cells_per_second', 'classif"):
        sx.pl.history(fitted, metric="loss")
    assert not plt.get_fignums()


@pytest.mark.parametrize("n_genes", [2, 10, 11, 60, 1000])
def test_loadings_draws_both_ends_of_every_unit(fitted, n_genes):
    axes = sx.pl.loadings(fitted, "ldvae", n_genes=n_genes, show=False)
    table = sx.get.loadings_df(fitted, "ldvae")
    assert [ax.get_title() for ax in axes] == list(table.columns)
    half = min(n_genes, 60) // 2
    for ax, unit in zip(axes, table, strict=True):
        ranked = table[unit].sort_values()
        expected = [*ranked.index[:half], *ranked.index[60 - half :]]
        assert [label.get_text() for label in ax.get_yticklabels()] == expected
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], ranked[expected], rtol=1e-6)


def test_loadings_draws_the_units_asked_for(fitted):
    axes = sx.pl.loadings(fitted, "ldvae", components=[3, 0], show=False)
    assert [ax.get_title() for ax in axes] == ["Z_3", "Z_0"]
    assert len(axes[0].figure.axes) == 2


def test_loadings_fill_several_rows(registered):
    sx.tl.fit(registered, "ldvae", max_epochs=2, n_hidden=8, n_latent=7)
    axes = sx.pl.loadings(registered, show=False)
    assert len(axes) == 7
    assert len(axes[0].figure.axes) == 7  # the three empty places of the second row are gone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": [4]}, r"components=\[4\] must be latent units from 0 to 3"),
        ({"components": [-1, 0]}, r"components=\[-1, 0\] must be latent units from 0 to 3"),
        ({"components": []}, r"components=\[\] must be latent units from 0 to 3, at least one"),
        ({"n_genes": 1}, r"n_genes=1 must be 2 or more"),
        ({"key": "scvi"}, r"is not possible with a 'scvi' fit"),
    ],
    ids=str,
)
def test_loadings_that_cannot_be_drawn_are_refused(fitted, options, message):
    with pytest.raises(ValueError, match=message):
        sx.pl.loadings(fitted, **{"key": "ldvae"} | options)
    assert not plt.get_fignums()


@pytest.mark.parametrize("draw", [sx.pl.history, sx.pl.loadings])
def test_an_unknown_fit_is_refused(fitted, draw):
    with pytest.raises(KeyError, match="'nope' is not in"):
        draw(fitted, "nope")


def test_the_latent_space_is_drawn_by_scanpy_itself(fitted):
    sx.tl.get_latent(fitted)
    axes = sc.pl.embedding(fitted, basis="scvi", color="cell_type", show=False)
    assert axes.get_xlabel() == "scvi1"
    assert len(axes.collections[0].get_offsets()) == 201


def test_a_file_name_is_asked_for_by_name(fitted, plot):
    with pytest.raises(TypeError, match=r"save=True must be the name of a file"):
        plot(fitted, save=True)
