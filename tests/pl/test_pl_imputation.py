from __future__ import annotations

import matplotlib.image as mpimg
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

import scvi_ext as sx

# Fits of the originals, which is well for a picture.
pytestmark = pytest.mark.filterwarnings("ignore:Fit .* was trained on adata.X:scvi_ext.ScviExtWarning")
METHODS = ["fit", "uncorrupted", "nearest cells", "gene mean", "no imputation"]


@pytest.fixture(scope="session")
def _scored(_fitted):
    adata = _fitted.copy()
    sx.pp.corrupt(adata, rate=0.5, method="binomial")
    sx.tl.imputation_score(adata)
    return adata


@pytest.fixture
def scored(_scored):
    yield _scored.copy()
    plt.close("all")


def test_entries_and_errors_are_drawn(scored):
    axes = sx.pl.imputation(scored, methods=METHODS, show=False)
    assert all(isinstance(ax, Axes) for ax in axes)
    assert [ax.get_title() for ax in axes] == [*METHODS, ""]
    entries = sx.get.imputation_df(scored, table="entries")
    for ax, method in zip(axes, METHODS, strict=False):
        (mesh,) = (artist for artist in ax.collections if isinstance(artist, QuadMesh))
        assert np.nansum(mesh.get_array()) == len(entries)  # every entry is in the picture
        diagonal, line = ax.get_lines()
        np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        slope, intercept = np.polyfit(entries["original"].astype(float), entries[method].astype(float), 1)
        np.testing.assert_allclose(line.get_ydata(), slope * line.get_xdata() + intercept, rtol=1e-6, atol=1e-6)
        assert line.get_label() == f"slope {slope:.2f}"
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("original count", "imputed")


def test_no_column_of_the_picture_is_empty_between_whole_numbers(scored):
    entries = scored.uns["scvi_imputation"]["entries"]
    entries["original"] = np.resize(np.arange(1, 1001), len(entries)).astype(np.float32)
    (ax, _) = sx.pl.imputation(scored, show=False)
    density = ax.collections[0].get_array()
    assert (np.isfinite(density).sum(axis=0) > 0).all()


@pytest.mark.parametrize("measure", ["median", "mean", "median_per_cell", "median_per_gene"])
def test_every_method_has_a_bar(scored, measure):
    bars = sx.pl.imputation(scored, measure=measure, show=False)[-1]
    scores = sx.get.imputation_df(scored)[measure]
    assert [label.get_text() for label in bars.get_yticklabels()] == METHODS[::-1]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], scores[::-1])
    assert measure.partition("_")[0] in bars.get_xlabel()


def test_a_single_method_may_be_named_as_it_is(scored):
    assert len(sx.pl.imputation(scored, methods="gene mean", show=False)) == 2


def test_entries_of_one_value_and_a_single_entry_can_be_drawn(scored):
    tables = scored.uns["scvi_imputation"]
    tables["entries"]["original"] = np.float32(1)
    assert len(sx.pl.imputation(scored, show=False)[0].get_lines()) == 1  # no line through one value
    tables["entries"] = tables["entries"].iloc[:1]
    sx.pl.imputation(scored, methods=METHODS, show=False)[0].figure.canvas.draw()


def test_another_slot_and_another_fit(scored):
    sx.tl.imputation_score(scored, key="ldvae", baselines=False)
    sx.tl.imputation_score(scored, key="ldvae", baselines=False, key_added="mine")
    for options in ({"key": "ldvae"}, {"slot": "mine"}):
        bars = sx.pl.imputation(scored, **options, show=False)[-1]
        assert [label.get_text() for label in bars.get_yticklabels()] == ["fit"]


def test_the_picture_is_saved(scored, tmp_path):
    assert sx.pl.imputation(scored, save=tmp_path / "picture.png") is not None
    pixels = mpimg.imread(tmp_path / "picture.png")[..., :3]
    assert (pixels.std(axis=(0, 1)) > 0.02).all()  # not one colour


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["fit", "magic"]}, ValueError, r"must be some of those that were judged: 'fit', 'uncorrupted'"),
        ({"methods": []}, ValueError, r"methods=\[\] must be some of"),
        ({"measure": "error"}, ValueError, r"measure='error' is not one of 'mean', 'median'"),
        ({"key": "nope"}, KeyError, r"'nope' is not in"),
        ({"key": "ldvae"}, KeyError, r"has no 'ldvae_imputation': call scvi_ext\.tl\.imputation_score"),
        ({"slot": "scvi_ext"}, KeyError, r"has no errors of imputed counts"),
        ({"slot": "mine"}, KeyError, r"has no 'mine': call scvi_ext\.tl\.imputation_score"),
        ({"key": "scvi", "slot": "mine"}, ValueError, r"has no effect beside"),
        ({"save": True}, TypeError, r"save=True must be the name of a file"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(scored, options, error, message):
    with pytest.raises(error, match=message):
        sx.pl.imputation(scored, **options)
