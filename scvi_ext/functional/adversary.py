"""What a critic and the network that it watches want of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, log_softmax

from scvi_ext.functional import ranks

if TYPE_CHECKING:
    from torch import Tensor, nn


def adversarial_loss(critic: nn.Module, z: Tensor, classes: Tensor, weight: Tensor | float) -> Tensor:
    """The loss of the critic, and ``weight`` times the loss of what makes z: one sum, one backward pass.

    The critic tells classes from z, and its loss, the cross-entropy, does not reach z. Whatever makes z wants the
    critic to believe in the other classes, all alike, and that does not reach the critic. So both take the step of
    their own that they would take with an optimiser each.

    Parameters
    ----------
    critic
        From z to logits, (B, C) or (S, B, C).
    z
        Shape (B, L) or (S, B, L).
    classes
        Codes, (B,) or (S, B).
    weight
        Of what makes z.
    """
    logits = _as_it_is(critic, z)
    own = torch.nn.functional.one_hot(classes, logits.shape[-1])
    others = (1 - own) / (logits.shape[-1] - 1)
    fooled = -(others * log_softmax(logits, dim=-1)).sum(-1).mean()
    return weight * fooled + _of_critic(critic, z, classes)


def mixing_loss(critic: nn.Module, z: Tensor, classes: Tensor, weight: Tensor | float) -> Tensor:
    r"""The loss of the critic, and ``weight`` times how far z and the classes are from independent, in nats.

    With the critic for c(s | z) = q(s | z), this is the symmetrised divergence between the joint distribution of z and
    the class s and the product of the two by themselves:

    .. math::
        KL(q(z, s) \| q(z) q(s)) + KL(q(z) q(s) \| q(z, s)) = E_{q(z, s)} \log c(s | z) - E_{q(z) q(s)} \log c(s | z)

    The normaliser of the critic cancels. What is left is linear in its logits, and pulls as hard at cells of which it
    is certain as at others. A critic that lags behind may find less than nothing: then nothing is pulled, or z would
    run away from it. Parameters and gradients are those of :func:`adversarial_loss`; ``z`` has shape (B, L).
    """
    logits = _as_it_is(critic, z)
    own = torch.nn.functional.one_hot(classes, logits.shape[-1]).to(logits.dtype)
    shares = ranks.mean(own.mean(0))
    dependence = ranks.mean(((own - shares) * logits).sum(-1).mean()).clamp(min=0)
    return weight * dependence + _of_critic(critic, z, classes)


def _as_it_is(critic: nn.Module, z: Tensor) -> Tensor:
    """Its logits, through which gradients reach z and not the critic."""
    trained = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        return critic(z)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _of_critic(critic: nn.Module, z: Tensor, classes: Tensor) -> Tensor:
    """Its own loss, whose gradients do not reach z."""
    return cross_entropy(critic(z.detach()).flatten(0, -2), classes.flatten())


def losses_by_cell(logits: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """The same by cell, not to be trained on: the loss of the critic, and that of what makes z before it is weighted.

    Both are cross-entropies, (B,). ``logits`` are those of the critic, (B, C), for cells of the class ``own``.
    """
    log_p = log_softmax(logits, dim=-1)
    of_own = log_p[:, own]
    return -of_own, (of_own - log_p.sum(-1)) / (logits.shape[-1] - 1)
