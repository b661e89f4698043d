from __future__ import annotations

import pytest
import torch

from scvi_ext._contract import Minibatch
from scvi_ext.nn.dispersion import Dispersion

B, G, K, C = 6, 5, 3, 2
CELLS = Minibatch(torch.ones(B, G), torch.tensor([0, 1, 2, 2, 1, 0]), labels=torch.tensor([0, 0, 1, 1, 1, 0]))


@pytest.mark.parametrize(
    ("kind", "shape", "codes"),
    [("gene", (G,), None), ("gene-batch", (K, G), CELLS.batch_index), ("gene-label", (C, G), CELLS.labels)],
)
def test_log_theta_is_the_row_of_the_cell(kind, shape, codes):
    dispersion = Dispersion(kind, G, K, C)
    assert dispersion.log_theta.shape == shape
    rows = dispersion.log_theta if codes is None else dispersion.log_theta[codes]
    assert torch.equal(dispersion(CELLS), rows)


def test_no_batches_are_one_batch():
    cells = CELLS._replace(batch_index=torch.zeros(B, dtype=torch.long))
    assert Dispersion("gene-batch", G, 0, 0)(cells).shape == (B, G)


def test_gene_label_needs_labels():
    with pytest.raises(ValueError, match="dispersion='gene-label' needs the label of each cell"):
        Dispersion("gene-label", G, K, C)(CELLS._replace(labels=None))


def test_only_the_rows_that_are_present_learn():
    dispersion = Dispersion("gene-batch", G, K, C)
    dispersion(CELLS._replace(batch_index=torch.tensor([0, 2, 2, 0, 0, 0]))).sum().backward()
    assert (dispersion.log_theta.grad != 0).any(1).tolist() == [True, False, True]
