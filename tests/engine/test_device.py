from __future__ import annotations

import pytest
import torch

import scvi_ext as sx
from scvi_ext._settings import settings
from scvi_ext.engine.device import resolve_device, seeded

CPU = torch.device("cpu")


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_cuda_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.usefixtures("without_cuda")
def test_auto_is_the_processor_without_cuda():
    assert resolve_device("auto") == resolve_device() == resolve_device("cpu") == resolve_device(CPU) == CPU


@pytest.mark.usefixtures("two_cuda_devices")
def test_auto_is_the_current_cuda_device_where_there_is_one(monkeypatch):
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device='cuda:2' was asked for, but torch .* sees 2 CUDA devices"):
        resolve_device("cuda:2")
    monkeypatch.setattr(settings, "device", "cpu")
    assert resolve_device("auto") == CPU
    assert resolve_device("cuda:1") == torch.device("cuda", 1)  # an argument comes before the settings


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_cuda_without_cuda_says_so(name, registered):
    message = rf"device='{name}' was asked for, but torch .* sees 0 CUDA devices here: use 'cpu'\."
    with pytest.raises(ValueError, match=message):
        resolve_device(name)
    with pytest.raises(ValueError, match=message):
        sx.tl.fit(registered, device=name)
    assert "fits" not in registered.uns["scvi_ext"]


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:a", "cuda:-1", "cpu:x", "", "CUDA"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=rf"device='{name}' is not supported: use 'auto', 'cpu', 'cuda' or"):
        resolve_device(name)


def test_a_bad_device_in_the_settings_is_refused_by_whoever_uses_it(fitted, monkeypatch):
    monkeypatch.setattr(settings, "device", "tpu")
    with pytest.raises(ValueError, match="device='tpu' is not supported"):
        sx.tl.get_latent(fitted)
    assert "X_scvi" not in fitted.obsm


def test_seeded_gives_the_same_draws_and_leaves_the_global_generator_untouched():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    draws = []
    for seed in (5, 5, 6):
        with seeded(seed, CPU):
            draws.append(torch.randn(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_restores_the_generator_after_an_error_too():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1, CPU):
        torch.randn(4 // int(torch.rand(()) < 0))
    assert torch.equal(torch.get_rng_state(), before)
