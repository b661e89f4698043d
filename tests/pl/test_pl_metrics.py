from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import scvi_ext as sx


@pytest.fixture(autouse=True)
def clean():
    yield
    plt.close("all")


@pytest.fixture
def compared(counts):
    """Cells with a table of metrics, the columns of which have different scales; one is the same everywhere."""
    table = pd.DataFrame(
        {"entropy_batch_mixing": [0.5, 1.0, 0.75], "ASW": [0.3, -0.1, 0.1], "ARI": [0.2, 0.2, 0.2]},
        index=["X_pca", "X_scvi", "X_ldvae"],
    )
    counts.uns["scvi_ext_metrics"] = {"table": table, "params": {}}
    return counts


def test_every_number_of_the_table_is_written(compared):
    ax = sx.pl.metrics(compared, show=False)
    table = sx.get.metrics_df(compared)
    written = np.array([text.get_text() for text in ax.texts]).reshape(table.shape)
    assert written.tolist() == [[f"{value:.3f}" for value in row] for row in table.to_numpy()]
    positions = [text.get_position() for text in ax.texts]
    assert positions == [(column, row) for row in range(3) for column in range(3)]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["X_pca", "X_scvi", "X_ldvae"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["entropy\nbatch mixing", "ASW", "ARI"]
    assert ax.yaxis_inverted()  # the first row is on top


def test_each_column_is_shaded_from_its_lowest_to_its_highest_value(compared):
    ax = sx.pl.metrics(compared, show=False)
    (image,) = ax.get_images()
    np.testing.assert_allclose(image.get_array(), [[0, 1, 0], [1, 0, 0], [0.5, 0.5, 0]], atol=1e-12)
    highest = [text.get_text() for text in ax.texts if text.get_fontweight() == "bold"]
    assert highest == ["0.300", "1.000"]


def test_a_table_of_one_row(compared):
    compared.uns["mine"] = {"table": sx.get.metrics_df(compared).iloc[:1]}
    figure, axes = plt.subplots(1, 2)
    assert sx.pl.metrics(compared, "mine", ax=axes[1], show=False) is axes[1]
    assert [text.get_text() for text in axes[1].texts] == ["0.500", "0.300", "0.200"]
    assert not axes[0].texts
    assert plt.get_fignums() == [figure.number]


def test_a_table_that_is_not_there_is_not_drawn(counts):
    with pytest.raises(KeyError, match=r"adata.uns has no 'scvi_ext_metrics'"):
        sx.pl.metrics(counts)
    assert not plt.get_fignums()
