"""Room for new categories in a trained module: what it has learned stays where it was, the rest is new."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import torch

from scvi_ext.nn.layers import FCLayers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


class Block(NamedTuple):
    """A stretch of an axis: how long it was and is, and how many of its new entries are known already."""

    old: int
    new: int
    known: int


def widen(old: nn.Module, new: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a module with more categories, from that of the same module with fewer.

    New categories come after the known ones. New parameters start at the mean of those of the known categories of the
    same covariate, so that a new batch is first decoded like an average one; new entries of buffers, which hold what
    the data say (the prior of a library in each batch), are those of ``new``. So are parts that only the larger module
    has, such as the critic of batches once they have measured different proteins.

    Parameters
    ----------
    old, new
        The module as it was built, and as built for the larger sizes. Of the old one only the structure is looked at.
    state
        Parameters and buffers of the old one.

    Returns
    -------
    Parameters and buffers of the new one, and by the name of each parameter that has grown a mask of its new entries.
    """
    parameters = {name for name, _ in new.named_parameters()}
    blocks_of = _blocks_of_weights(old, new)
    widened, masks = {}, {}
    for name, built in new.state_dict().items():
        if name not in state:
            widened[name] = built.clone()
            continue
        trained = state[name]
        if trained.shape == built.shape:
            widened[name] = trained.clone()
            continue
        axis = next(i for i, (a, b) in enumerate(zip(trained.shape, built.shape, strict=True)) if a != b)
        rows = [Block(trained.shape[axis], built.shape[axis], trained.shape[axis])]
        parts = _grown(trained.movedim(axis, 0), built.movedim(axis, 0), blocks_of.get(name, rows), name in parameters)
        widened[name], mask = (torch.cat(part).movedim(0, axis).contiguous() for part in zip(*parts, strict=True))
        if name in parameters:
            masks[name] = mask
    return widened, masks


def _blocks_of_weights(old: nn.Module, new: nn.Module) -> dict[str, list[Block]]:
    """How the inputs of each layer that sees covariates are made up: something, then one column for each category.

    A covariate with one category had no column, and may not have been there at all. All other axes that grow are a row
    for each category.
    """
    blocks, known = {}, dict(old.named_modules())
    for name, layers in new.named_modules():
        if not isinstance(layers, FCLayers) or name not in known:
            continue
        sizes = list(zip_longest(known[name].n_cat_list, layers.n_cat_list, fillvalue=0))
        for i, layer in enumerate(layers.layers):
            n_own = layer.linear.in_features - sum(after for _, after in sizes)
            blocks[f"{name}.layers.{i}.linear.weight"] = [
                Block(n_own, n_own, n_own),
                *(Block(n_before, after, max(n_before, 1)) for n_before, after in sizes if after),
            ]
    return blocks


def _grown(trained: Tensor, built: Tensor, blocks: list[Block], is_parameter: bool) -> list[tuple[Tensor, Tensor]]:
    """Values and mask of each block, categories along the first axis."""
    parts, n_old, n_new = [], 0, 0
    for block in blocks:
        known, target = trained[n_old : n_old + block.old], built[n_new : n_new + block.new]
        values = torch.zeros_like(target) if is_parameter else target.clone()
        if is_parameter and block.old:
            values[:] = known.mean(0)
        values[: block.old] = known
        mask = torch.zeros(target.shape, dtype=torch.bool)
        mask[block.known :] = True
        parts.append((values, mask))
        n_old, n_new = n_old + block.old, n_new + block.new
    return parts
