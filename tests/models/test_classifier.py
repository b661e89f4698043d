"""The classifier: of counts, or of what a fitted model, which stays as it is, makes of them."""

from __future__ import annotations

import pytest
import torch
from _small import N_CELLS, SUMMARY, build, make_cells
from _tolerances import FLOAT64
from torch.testing import assert_close

from scvi_ext import models


def test_the_seeds_classifier():
    x = torch.randn(9, 7)
    module = models.Classifier(7, 16, 3, 2, 0.2).eval()
    assert_close(module(x).sum(-1), torch.ones(9))
    logits = models.Classifier(7, 16, 3, 2, 0.2, logits=True).eval()
    logits.load_state_dict(module.state_dict())
    assert_close(torch.softmax(logits(x), -1), module(x))
    assert_close(module.log_probabilities(x), torch.log(module(x)))
    linear = models.Classifier(7, n_labels=3, n_layers=0)
    assert [tuple(p.shape) for p in linear.parameters()] == [(3, 7), (3,)]


@pytest.mark.parametrize(("classifies", "n_units"), [("counts", SUMMARY.n_input), ("z", 3), ("z_library", 4)])
@pytest.mark.parametrize("inside", ["scvi", "scanvi", "vaec"])
@pytest.mark.parametrize("library", ["observed", "latent"])
def test_only_the_classifier_learns(classifies, n_units, inside, library):
    frozen = None if classifies == "counts" else build(inside, library=library)
    module = models.CellClassifier(SUMMARY.n_input, 4, classifies=classifies, frozen=frozen).double()
    assert module.classifier.hidden.layers[0].linear.in_features == n_units
    cells = make_cells()
    before = {name: value.clone() for name, value in module.state_dict().items() if name.startswith("frozen")}
    loss = module.train().loss(cells)
    loss.total.backward()
    assert loss.total == loss.classification.mean()
    assert loss.reconstruction is loss.kl_z is loss.kl_library is None
    learning = {name for name, p in module.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert learning
    assert all(name.startswith("classifier") for name in learning)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    if frozen is not None:
        assert not frozen.training


def test_it_learns_from_samples_and_predicts_at_the_mean():
    module = models.CellClassifier(SUMMARY.n_input, 4, dropout_rate=0.0, classifies="z", frozen=build("scvi")).double()
    cells = make_cells()
    module.eval()
    assert torch.equal(module.encode_label(cells), module.encode_label(cells))
    expected = module.classifier.log_probabilities(module.frozen.encode(cells).loc)
    assert_close(module.encode_label(cells), expected, **FLOAT64)
    module.train()
    assert not torch.equal(module.encode_label(cells), module.encode_label(cells))


def test_a_frozen_model_is_not_told_the_label():
    module = models.CellClassifier(SUMMARY.n_input, 4, classifies="z", frozen=build("vaec")).double().eval()
    cells = make_cells()
    other = cells._replace(labels=(cells.labels + 1) % 4)
    assert torch.equal(module.encode_label(cells), module.encode_label(other))


def test_minibatches_do_not_change_predictions():
    module = models.CellClassifier(SUMMARY.n_input, 4).double().eval()
    cells = make_cells()
    rows = torch.arange(N_CELLS).split(7)
    pieces = [module.encode_label(cells._replace(x=cells.x[r])) for r in rows]
    assert_close(torch.cat(pieces), module.encode_label(cells), **FLOAT64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_labels": 0}, "Model 'classifier' needs labels"),
        ({"classifies": "z"}, "classifies='z', and there is no fitted model to make that of"),
        ({"frozen": build("scvi")}, "classifies='counts', and a fitted model has no effect"),
        (
            {"classifies": "z", "frozen": build("scvi"), "log_variational": False},
            "log_variational=False has no effect on classifies='z'",
        ),
        ({"n_hidden": 0}, "n_hidden=0 must be 1 or more"),
        ({"n_layers": 0}, "n_layers=0 must be 1 or more"),
        ({"classifies": "latent"}, "classifies='latent' is not one of 'counts', 'z', 'z_library'"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.CellClassifier(**{"n_input": 5, "n_labels": 2} | options)
