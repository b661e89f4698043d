from __future__ import annotations

import pytest
import torch
from _tolerances import FLOAT32, N_STANDARD_ERRORS
from torch import nn
from torch.testing import assert_close

from scvi_ext.nn.layers import FCLayers

B = 12


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def codes() -> list[torch.Tensor]:
    return [torch.arange(B) % 3, torch.zeros(B, dtype=torch.long), torch.arange(B) % 2]


def weights(net: FCLayers) -> list[tuple[int, int]]:
    return [tuple(layer.linear.weight.shape) for layer in net.layers]


def trained(net: FCLayers) -> FCLayers:
    """In evaluation mode, with running statistics that are not the initial ones."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def test_sizes():
    assert weights(FCLayers(4, 2)) == [(2, 4)]
    assert weights(FCLayers(4, 2, n_layers=3, n_hidden=7)) == [(7, 4), (7, 7), (2, 7)]


@pytest.mark.parametrize("n_layers", [0, -1])
def test_a_network_has_a_layer(n_layers):
    with pytest.raises(ValueError, match=rf"n_layers={n_layers}: a network has at least one layer\."):
        FCLayers(4, 2, n_layers=n_layers)


def test_covariates_enter_every_layer():
    # Five columns of one-hot codes: the covariate with a single category is left out.
    net = FCLayers(4, 2, n_cat_list=[3, 1, 2], n_layers=3, n_hidden=7)
    assert weights(net) == [(7, 4 + 5), (7, 7 + 5), (2, 7 + 5)]


def test_covariates_enter_the_first_layer_only():
    net = FCLayers(4, 2, n_cat_list=[3, 1, 2], n_layers=3, n_hidden=7, inject_covariates=False)
    assert weights(net) == [(7, 4 + 5), (7, 7), (2, 7)]


@pytest.mark.parametrize("inject", [True, False])
def test_every_covariate_changes_the_output(codes, inject):
    net = trained(FCLayers(4, 2, [3, 1, 2], n_layers=2, n_hidden=7, inject_covariates=inject, use_relu=False))
    x = torch.randn(B, 4)
    before = net(x, *codes)
    for i in (0, 2):
        others = [c.roll(1) if i == j else c for j, c in enumerate(codes)]
        assert (net(x, *others) - before).abs().min() > 1e-4
    assert torch.equal(net(x, codes[0], codes[0], codes[2]), before)  # the covariate with one category


def test_forward_is_the_composition_it_says():
    net = trained(FCLayers(4, 3, [2], use_layer_norm=True))
    x, code = torch.randn(B, 4), torch.arange(B) % 2
    layer, norm = net.layers[0].linear, net.layers[0].batch_norm[0]
    h = torch.cat([x, torch.eye(2)[code]], 1) @ layer.weight.T + layer.bias
    h = (h - norm.running_mean) / torch.sqrt(norm.running_var + 1e-3) * norm.weight + norm.bias
    h = (h - h.mean(1, keepdim=True)) / torch.sqrt(h.var(1, correction=0, keepdim=True) + 1e-5)
    assert_close(net(x, code), h.relu(), **FLOAT32)


def test_batch_norm_keeps_its_running_mean_slowly():
    net, x = FCLayers(4, 3, use_relu=False, dropout_rate=0.0), torch.randn(B, 4)
    net(x)
    assert_close(net.layers[0].batch_norm[0].running_mean, 0.01 * net.layers[0].linear(x).mean(0), **FLOAT32)


def test_parts_are_there_only_where_asked_for():
    def kinds(**options) -> set[str]:
        return {type(m).__name__ for m in FCLayers(4, 2, **options).modules()} & {
            "BatchNorm1d", "LayerNorm", "ReLU", "Dropout",
        }  # fmt: skip

    assert kinds() == {"BatchNorm1d", "ReLU", "Dropout"}
    assert kinds(use_batch_norm=False, use_relu=False, dropout_rate=0) == set()
    assert kinds(use_layer_norm=True, dropout_rate=0) == {"BatchNorm1d", "LayerNorm", "ReLU"}
    assert FCLayers(4, 2, bias=False).layers[0].linear.bias is None


def test_dropout_is_for_training_only():
    net, x = FCLayers(4, 50, dropout_rate=0.5, use_batch_norm=False, use_relu=False), torch.randn(B, 4)
    dropped = (net(x) == 0).float()
    assert (dropped.mean() - 0.5).abs() < N_STANDARD_ERRORS * 0.5 / dropped.numel() ** 0.5
    assert not (net.eval()(x) == 0).any()


def test_codes_columns_and_one_hot_are_the_same(codes):
    net, x = trained(FCLayers(4, 2, [3, 1, 2], n_layers=2)), torch.randn(B, 4)
    one_hots = [torch.eye(3)[codes[0]], torch.ones(B, 1), torch.eye(2, dtype=torch.long)[codes[2]]]
    expected = net(x, *codes)
    assert torch.equal(net(x, *(c.unsqueeze(1) for c in codes)), expected)
    assert torch.equal(net(x, *one_hots), expected)


def test_samples_are_independent(codes):
    net, x = trained(FCLayers(4, 2, [3, 1, 2], n_layers=2, use_layer_norm=True)), torch.randn(5, B, 4)
    assert_close(net(x, *codes), torch.stack([net(sample, *codes) for sample in x]), **FLOAT32)


def test_samples_are_normalised_together_in_training():
    net, x = FCLayers(4, 2, dropout_rate=0.0), torch.randn(5, B, 4)
    assert_close(net(x), net(x.flatten(0, 1)).view(5, B, 2), **FLOAT32)


def test_instance_id_picks_its_batch_norm():
    net, x = trained(FCLayers(4, 3, n_layers=2, n_instances=2, use_relu=False)), torch.randn(B, 4)
    first, second = net(x, instance_id=0), net(x, instance_id=1)
    assert torch.equal(net(x), first)
    assert (first - second).abs().min() > 1e-5
    with torch.no_grad():
        for layer in net.layers:
            layer.batch_norm[0].load_state_dict(layer.batch_norm[1].state_dict())
    assert torch.equal(net(x, instance_id=0), second)


def test_only_the_picked_batch_norm_learns():
    net = FCLayers(4, 3, n_instances=2)
    net(torch.randn(B, 4) + 1, instance_id=1)
    first, second = net.layers[0].batch_norm
    assert first.num_batches_tracked == 0
    assert second.num_batches_tracked == 1


@pytest.mark.parametrize("given", [0, 1, 3])
def test_the_number_of_covariates_must_match(codes, given):
    net = FCLayers(4, 2, n_cat_list=[3, 2])
    with pytest.raises(ValueError, match=rf"{given} categorical covariates given, 2 expected\."):
        net(torch.randn(B, 4), *codes[:given])


@pytest.mark.parametrize("inject", [True, False])
def test_the_initial_weights_of_covariates_alone_are_multiplied_by_their_gain(inject):
    def net(gain: float) -> FCLayers:
        torch.manual_seed(0)
        return FCLayers(4, 6, [3, 1, 2], n_layers=2, n_hidden=5, inject_covariates=inject, covariate_gain=gain)

    for i, (plain, strong) in enumerate(zip(net(1.0).layers, net(5.0).layers, strict=True)):
        n = 4 if i == 0 else 5
        assert torch.equal(strong.linear.weight[:, :n], plain.linear.weight[:, :n])
        assert torch.equal(strong.linear.weight[:, n:], 5 * plain.linear.weight[:, n:])
        assert torch.equal(strong.linear.bias, plain.linear.bias)
