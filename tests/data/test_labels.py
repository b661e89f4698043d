from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scvi_ext.data.labels import read_labels


def test_columns_share_their_codes():
    obs = pd.DataFrame(
        {
            "truth": pd.Categorical(["b", "a", "b", None, "?"], categories=["c", "b", "a", "?"]),
            "known": ["?", "a", None, "b", "?"],
            "predicted": ["d", "a", "b", "b", None],
        }
    )
    names, (truth, known, predicted) = read_labels(obs, ["truth", "known", "predicted"], "?")
    assert names == ("b", "a", "d")  # in the order of the categories, without those that are not there
    np.testing.assert_array_equal(truth, [0, 1, 0, -1, -1])
    np.testing.assert_array_equal(known, [-1, 1, -1, 0, -1])
    np.testing.assert_array_equal(predicted, [2, 1, 0, 0, -1])
    names, (truth,) = read_labels(obs, ["truth"])
    assert names == ("b", "a", "?")
    np.testing.assert_array_equal(truth, [0, 1, 0, -1, 2])


@pytest.mark.parametrize("values", [[3, 1, 3], [True, False, True], [2.5, -1.0, 2.5]])
def test_labels_of_any_kind_are_compared_as_strings(values):
    obs = pd.DataFrame({"truth": values, "predicted": pd.Categorical([str(v) for v in values])})
    names, (truth, predicted) = read_labels(obs, ["truth", "predicted"])
    assert set(names) == {str(v) for v in values}
    np.testing.assert_array_equal(truth, predicted)


def test_a_column_without_any_label_and_one_that_is_not_there():
    obs = pd.DataFrame({"empty": [None, np.nan], "a": ["x", "y"]})
    names, (empty, a) = read_labels(obs, ["empty", "a"])
    assert names == ("x", "y")
    np.testing.assert_array_equal(empty, [-1, -1])
    np.testing.assert_array_equal(a, [0, 1])
    with pytest.raises(KeyError, match=r"'b' is not in adata.obs"):
        read_labels(obs, ["a", "b"])
