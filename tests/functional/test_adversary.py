"""A critic and what it watches each follow their own loss, in one backward pass."""

from __future__ import annotations

import math

import pytest
import torch
from _tolerances import FLOAT64
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.testing import assert_close

from scvi_ext.functional.adversary import adversarial_loss, losses_by_cell, mixing_loss

B, L = 11, 4


def make(n_classes: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A critic, what it sees, and the classes."""
    torch.manual_seed(n_classes)
    critic = nn.Sequential(nn.Linear(L, 6), nn.ELU(), nn.Linear(6, n_classes)).double()
    return critic, torch.randn(B, L, dtype=torch.float64, requires_grad=True), torch.arange(B) % n_classes


def fooled(critic: nn.Module, z: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy to the other classes, all alike, written out cell by cell."""
    total = 0
    for log_p, own in zip(log_softmax(critic(z), -1), classes.tolist(), strict=True):
        others = [c for c in range(len(log_p)) if c != own]
        total = total - sum(log_p[c] for c in others) / len(others)
    return total / len(classes)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0, torch.tensor(0.4, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_one_sum_of_two_losses_that_do_not_reach_each_other(n_classes, weight):
    critic, z, classes = make(n_classes)
    loss = adversarial_loss(critic, z, classes, weight)
    own, other = cross_entropy(critic(z), classes), fooled(critic, z, classes)
    assert_close(loss, own + weight * other, **FLOAT64)
    parameters = list(critic.parameters())
    d_z, *d_critic = torch.autograd.grad(loss, [z, *parameters])
    (expected,) = torch.autograd.grad(weight * other, z)
    assert_close(d_z, expected, **FLOAT64)
    for found, expected in zip(d_critic, torch.autograd.grad(own, parameters), strict=True):
        assert_close(found, expected, **FLOAT64)


@pytest.mark.parametrize("weight", [0.0, 3.0, torch.tensor(0.4, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_mixing_and_its_critic_do_not_reach_each_other(n_classes, weight):
    critic, z, classes = make(n_classes)
    log_p = log_softmax(critic(z), -1)  # E_q(z,s) and E_q(z)q(s) of log c(s | z), cell by cell
    together = sum(row[own] for row, own in zip(log_p, classes.tolist(), strict=True)) / B
    apart = sum(row[other] for row in log_p for other in classes.tolist()) / B**2
    own, parameters = cross_entropy(critic(z), classes), list(critic.parameters())
    loss = mixing_loss(critic, z, classes, weight)
    assert_close(loss, own + weight * (together - apart), **FLOAT64)
    d_z, *d_critic = torch.autograd.grad(loss, [z, *parameters])
    (expected,) = torch.autograd.grad(weight * (together - apart), z, retain_graph=True)
    assert_close(d_z, expected, **FLOAT64)
    for found, expected in zip(d_critic, torch.autograd.grad(own, parameters), strict=True):
        assert_close(found, expected, **FLOAT64)


def test_what_mixing_minimises_is_the_symmetrised_divergence():
    """Of z ~ N(m_s, I) it is sum_s q(s) |m_s - m|^2, since log q(s | z) is m_s z - |m_s|^2 / 2 + log q(s) + ..."""
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[0.7, -0.2], [-0.4, 0.5], [0.1, 1.1]], dtype=torch.float64)
    best = nn.Linear(2, 3).double()
    with torch.no_grad():
        best.weight[:] = means
        best.bias[:] = shares.log() - means.square().sum(-1) / 2
    torch.manual_seed(0)
    noise = torch.randn(10, 2, dtype=torch.float64)
    noise = torch.cat([noise, -noise])  # a mean of zero in every class, which is all that counts here
    classes = torch.tensor([0] * 5 + [1] * 3 + [2] * 2).repeat(2)
    z = means[classes] + noise
    dependence = mixing_loss(best, z, classes, 1.0) - mixing_loss(best, z, classes, 0.0)
    assert_close(dependence, (shares * (means - shares @ means).square().sum(-1)).sum(), **FLOAT64)


def test_a_critic_that_is_wrong_pulls_at_nothing():
    """It says the opposite of what is: z would run away from it, and batches come apart on the other side."""
    right, z, classes = nn.Linear(L, 2).double(), torch.randn(B, L, dtype=torch.float64), torch.arange(B) % 2
    with torch.no_grad():
        right.weight[:] = 0
        right.weight[1, 0], z[:, 0] = 1.0, classes + 0.1 * z[:, 0]
    wrong, z = nn.Sequential(right, nn.Linear(2, 2, bias=False).double()), z.requires_grad_()
    with torch.no_grad():
        wrong[1].weight[:] = -torch.eye(2)
    for critic, pulls in ((right, True), (wrong, False)):
        loss = mixing_loss(critic, z, classes, 3.0)
        assert (loss > mixing_loss(critic, z, classes, 0.0)) == pulls
        assert torch.autograd.grad(loss, z)[0].any() == pulls


def test_of_independent_classes_there_is_nothing_to_mix():
    critic, z, _ = make(3)
    z, classes = z.repeat(3, 1), torch.arange(3).repeat_interleave(B)  # the same z in all of them
    assert_close(mixing_loss(critic, z, classes, 5.0), mixing_loss(critic, z, classes, 0.0), **FLOAT64)


def test_the_best_critic_and_the_best_disguise():
    """Without knowledge each loses log C; a critic that knows costs nothing, and is the worst for what it watches."""

    class Says(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, z):
            return self.logits

    classes = torch.arange(B) % 3
    z = torch.zeros(B, L, dtype=torch.float64)
    blind = Says(torch.zeros(B, 3, dtype=torch.float64))
    assert_close(adversarial_loss(blind, z, classes, 1.0).item(), 2 * math.log(3), **FLOAT64)
    sure = Says(30.0 * torch.nn.functional.one_hot(classes, 3).double())
    assert adversarial_loss(sure, z, classes, 0.0) < 1e-9
    assert adversarial_loss(sure, z, classes, 1.0) > 25


def test_dropout_of_the_critic_may_differ_between_its_two_looks():
    critic, z, classes = make(3)
    critic = nn.Sequential(critic, nn.Dropout(0.5)).train()
    losses = {adversarial_loss(critic, z, classes, 1.0).item() for _ in range(4)}
    assert len(losses) == 4
    critic.eval()
    assert len({adversarial_loss(critic, z, classes, 1.0).item() for _ in range(2)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_precision_is_that_of_the_critic(dtype):
    critic, z, classes = make(3)
    assert adversarial_loss(critic.to(dtype), z.to(dtype), classes, torch.tensor(0.5)).dtype == dtype


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_losses_by_cell_average_to_those_that_are_trained_on(n_classes):
    critic, z, classes = make(n_classes)
    of_cells = [losses_by_cell(critic(z[i : i + 1]), own) for i, own in enumerate(classes.tolist())]
    of_critic, fooling = (torch.cat(values) for values in zip(*of_cells, strict=True))
    assert_close(of_critic.mean(), cross_entropy(critic(z), classes), **FLOAT64)
    assert_close(fooling.mean(), fooled(critic, z, classes), **FLOAT64)
    assert_close((of_critic + 0.4 * fooling).mean(), adversarial_loss(critic, z, classes, 0.4), **FLOAT64)
