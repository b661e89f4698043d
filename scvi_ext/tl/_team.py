"""Several processes that run the same script: they must mean the same, and one of them speaks."""

from __future__ import annotations

import json
import math
import warnings
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING

import scanpy as sc

from scvi_ext.portable import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scvi_ext.engine.processes import Team
    from scvi_ext.tl._train import Prepared


@contextmanager
def quiet_unless_first(team: Team) -> Iterator[None]:
    """Inside, processes other than the first neither log nor warn."""
    if team.is_first:
        yield
        return
    before, sc.settings.verbosity = sc.settings.verbosity, 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sc.settings.verbosity = before


def check_team(team: Team, start: Prepared) -> None:
    """Raise a ValueError unless all processes have come with the same cells and options, and can share minibatches."""
    if team.n == 1:
        return
    fitted, batch_size = start.fits[0], start.plan.batch_size
    about = {"model": fitted.model, "config": fitted.config, "run": fitted.run, "step": start.step}
    digest = sha256(json.dumps(encode(about), sort_keys=True).encode() + start.store.fingerprint().encode())
    team.check_alike(digest.hexdigest())
    if batch_size % team.n:
        most = max(batch_size // team.n, math.ceil(3 / team.n)) * team.n  # three cells or more, see make_plan
        msg = (
            f"{batch_size} cells of a step cannot be shared equally by {team.n} processes: give batch_size={most}, or "
            "another multiple."
        )
        raise ValueError(msg)
