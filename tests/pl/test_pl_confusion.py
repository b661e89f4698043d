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
def guessed(counts):
    """Predictions of which a third of t0 is taken for t1, and some are missing."""
    truth = counts.obs["cell_type"].astype(str).to_numpy()
    guess = np.where((truth == "t0") & (np.arange(201) % 3 == 0), "t1", truth).astype(object)
    guess[190:] = None
    counts.obs["guess"] = guess
    return counts


@pytest.mark.parametrize("normalize", [True, False])
def test_every_field_that_has_cells_is_written(guessed, normalize):
    ax = sx.pl.confusion(guessed, "cell_type", prediction_key="guess", normalize=normalize, show=False)
    table = sx.get.confusion_df(guessed, "cell_type", prediction_key="guess")
    shares = table.div(table.sum(axis=1), axis=0).to_numpy()
    (image,) = ax.get_images()
    np.testing.assert_allclose(image.get_array(), shares, rtol=1e-12)
    assert image.get_clim() == (0, 1)
    written = {text.get_position(): text.get_text() for text in ax.texts}
    expected = {
        (column, row): f"{shares[row, column]:.2f}" if normalize else str(count)
        for (row, column), count in np.ndenumerate(table.to_numpy())
        if count
    }
    assert written == expected
    assert [label.get_text() for label in ax.get_xticklabels()] == ["t0", "t1", "t2", "abstained"]
    support = guessed.obs["cell_type"].value_counts()
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"t{i} ({support[f't{i}']})" for i in range(3)]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted (guess)", "true (cell_type)")
    assert ax.yaxis_inverted()  # the first label is on top


def test_numbers_can_be_read_on_their_shade(guessed):
    ax = sx.pl.confusion(guessed, "cell_type", prediction_key="guess", show=False)
    for text in ax.texts:
        assert text.get_color() == ("white" if float(text.get_text()) > 0.6 else "black")


def test_axes_files_and_cells(guessed, tmp_path):
    figure, axes = plt.subplots(1, 2)
    options = {"prediction_key": "guess", "show": False}
    assert sx.pl.confusion(guessed, "cell_type", ax=axes[1], indices=np.arange(50), **options) is axes[1]
    assert not axes[0].texts
    assert plt.get_fignums() == [figure.number]
    assert len(axes[1].get_xticklabels()) == 3  # nobody abstained
    sx.pl.confusion(guessed, "cell_type", save=tmp_path / "confusion.png", **options)
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_nothing_is_drawn_where_something_is_wrong(guessed):
    with pytest.raises(KeyError, match=r"'gues' is not in adata.obs"):
        sx.pl.confusion(guessed, "cell_type", prediction_key="gues")
    assert not plt.get_fignums()
