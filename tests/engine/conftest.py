from __future__ import annotations

import pytest
import torch

from scvi_ext.models.scvi import VAE


@pytest.fixture
def at_training_step(monkeypatch):
    """Interfere with scVI's loss: ``at_training_step({7: action})`` calls ``action(module, loss)`` in the 7th step.

    The loss becomes what it returns. ``"always"`` stands for all other steps. Steps are counted from 1 over all fits;
    held-out cells, which the loop evaluates at a constant KL weight, do not count. The loss goes part by part: the one
    that makes gradients at once has no total to interfere with.
    """
    original = VAE.loss

    def interfere(actions):
        step = 0

        def loss(module, *cells, **options):
            nonlocal step
            result = original(module, *cells, **options)
            if not isinstance(options.get("kl_weight"), torch.Tensor):
                return result
            step += 1
            action = actions.get(step, actions.get("always"))
            return result if action is None else action(module, result)

        monkeypatch.setattr(VAE, "loss", loss)
        monkeypatch.setattr(VAE, "loss_at_once", lambda module, n_cells: None)

    return interfere
