"""What a critic and the network that it watches want of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy, log_softmax

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
    as_it_is = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    logits = functional_call(critic, as_it_is, (z,))
    own = torch.nn.functional.one_hot(classes, logits.shape[-1])
    others = (1 - own) / (logits.shape[-1] - 1)
    fooled = -(others * log_softmax(logits, dim=-1)).sum(-1).mean()
    return weight * fooled + cross_entropy(critic(z.detach()).flatten(0, -2), classes.flatten())


def losses_by_cell(logits: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """The same by cell, not to be trained on: the loss of the critic, and that of what makes z before it is weighted.

    Both are cross-entropies, (B,). ``logits`` are those of the critic, (B, C), for cells of the class ``own``.
    """
    log_p = log_softmax(logits, dim=-1)
    of_own = log_p[:, own]
    return -of_own, (of_own - log_p.sum(-1)) / (logits.shape[-1] - 1)
