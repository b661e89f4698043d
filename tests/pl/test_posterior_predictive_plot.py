from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import scvi_ext as sx


@pytest.fixture(autouse=True)
def clean():
    yield
    plt.close("all")


@pytest.fixture
def checked(fitted):
    sx.tl.posterior_predictive_check(fitted, n_samples=3)
    return fitted


def test_a_point_for_every_gene_and_cell_with_its_diagonal(checked):
    axes = sx.pl.posterior_predictive(checked, show=False)
    tables = sx.get.posterior_predictive(checked)
    panels = [("genes", "cv"), ("genes", "zero_fraction"), ("cells", "cv"), ("cells", "zero_fraction")]
    for ax, (table, statistic) in zip(axes, panels, strict=False):
        points = tables[table]
        (scatter,) = (c for c in ax.collections if len(c.get_offsets()) == len(points))
        expected = points[[f"{statistic}_observed", f"{statistic}_predicted"]]
        np.testing.assert_allclose(scatter.get_offsets(), expected)
        assert ax.get_xlim() == ax.get_ylim()
        low, high = ax.get_xlim()
        assert low <= expected.min(axis=None)
        assert high >= expected.max(axis=None)
        assert table in ax.get_title()
        assert ax.get_xscale() == ("log" if statistic == "cv" else "linear")
        (diagonal,) = (line for line in ax.get_lines() if line.get_color() == "black")
        np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())


def test_the_calibration_curve(checked):
    ax = sx.pl.posterior_predictive(checked, show=False)[-1]
    table = sx.get.posterior_predictive(checked)["calibration"]
    lines = {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}
    assert set(lines) == {"all counts", "predicted rate 1 or more"}
    for line, column in zip(lines.values(), ("coverage", "coverage_expressed"), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), table["level"])
        np.testing.assert_array_equal(line.get_ydata(), table[column])


def test_what_is_not_defined_is_not_drawn(fitted):
    x = fitted.X.toarray()
    x[:, 5] = 0
    fitted.X = x
    sx.tl.posterior_predictive_check(fitted, n_samples=2)
    for ax in sx.pl.posterior_predictive(fitted, show=False):
        assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()
    one = fitted[:1].copy()
    sx.tl.posterior_predictive_check(one, n_samples=2)
    assert len(sx.pl.posterior_predictive(one, show=False)) == 5


def test_means_below_zero_are_left_out(make_counts):
    """Normal draws around almost nothing: half of the means are negative, and so would be bars and logarithms."""
    adata = make_counts(60, 60)
    adata.X = np.maximum(adata.X.toarray() > 7, np.eye(60)).astype(np.float32)
    sx.pp.setup_anndata(adata)
    sx.tl.fit(adata, reconstruction_loss="normal", n_hidden=8, n_latent=2, max_epochs=2)
    sx.tl.posterior_predictive_check(adata, n_samples=2)
    axes = sx.pl.posterior_predictive(adata, show=False)
    axes[0].figure.canvas.draw()
    predicted = sx.get.posterior_predictive(adata)["genes"]["cv_predicted"]
    (scatter,) = (c for c in axes[0].collections if hasattr(c, "get_sizes"))
    assert 0 < len(scatter.get_offsets().compressed()) // 2 == predicted.notna().sum() < 60
    assert np.isfinite(axes[0].get_ylim()).all()


def test_without_a_check_it_says_what_to_call(fitted):
    with pytest.raises(KeyError, match=r"call tl\.posterior_predictive_check first"):
        sx.pl.posterior_predictive(fitted)
    sx.tl.posterior_predictive_check(fitted, n_samples=2, key_added="mine")
    assert len(sx.pl.posterior_predictive(fitted, "mine", show=False)) == 5
    with pytest.raises(KeyError, match="which has: 'mine'"):
        sx.pl.posterior_predictive(fitted, "ldvae")
    assert len(plt.get_fignums()) == 1
