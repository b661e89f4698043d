"""The processes that train one module together: those that ``torchrun`` has started, joined by torch.distributed."""

from __future__ import annotations

import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed

from scvi_ext._errors import first_line, warn
from scvi_ext._torchrun import local_rank, n_processes
from scvi_ext.functional.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np


_PATIENCE = 60  # seconds
_ALONE = (
    "{found}: not all processes of this run have come here for {seconds} seconds, and this one goes on waiting. Has "
    "one of them ended? All must call tl.fit, or a function with the path of a file."
)


class LostProcessError(RuntimeError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Team:
    """All processes of a run, as one of them sees them; alone by default."""

    ranks: Ranks
    device: torch.device

    @property
    def n(self) -> int:
        """How many processes there are."""
        return self.ranks.n

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.ranks.rank == 0

    def own(self, rows: np.ndarray) -> np.ndarray:
        """The part of every minibatch that is this process's; ``rows``: (..., B)."""
        n_cells = rows.shape[-1] // self.n
        return rows[..., self.ranks.rank * n_cells : (self.ranks.rank + 1) * n_cells]

    def share(self, of: Sequence) -> Sequence:
        """Consecutive items, of all of them as many as of any other process, or one more."""
        first, stop = (len(of) * rank // self.n for rank in (self.ranks.rank, self.ranks.rank + 1))
        return of[first:stop]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.n > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process. All of them must ask."""
        if self.n == 1:
            return flag
        with noticing_loss(self):
            return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def average(self, gradients: Sequence[torch.Tensor]) -> None:
        """The mean over all processes, in place, in one go."""
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients])).div_(self.n)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(list(gradients), [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])

    def check_alike(self, digest: str) -> None:
        """Raise a ValueError in every process unless all have come with the same."""
        if self.n == 1:
            return
        found: list[str | None] = [None] * self.n
        with noticing_loss(self):
            distributed.all_gather_object(found, digest)
        others = [rank for rank, other in enumerate(found) if other != found[0]]
        if others:
            msg = (
                f"The {self.n} processes of this run were not given the same: rank {', '.join(map(str, others))} came "
                "with other cells or options than rank 0. All of them must run the same script on the same data."
            )
            raise ValueError(msg)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.n > 1:
            with noticing_loss(self):
                distributed.barrier()


ALONE = Team(Ranks(), torch.device("cpu"))


@contextmanager
def noticing_loss(team: Team) -> Iterator[None]:
    """Inside, an operation of all processes that one of them does not answer any more is a LostProcessError."""
    try:
        yield
    except LostProcessError:
        raise
    except RuntimeError as error:
        if team.n == 1 or not _tells_of_loss(error):
            raise
        # "[where in the library] Connection closed by peer [1.2.3.4]:5. What one may do about it." of gloo
        reason = re.sub(r"^\[[^]]*\] *", "", first_line(error)).partition(". ")[0].rstrip(".")
        msg = f"Another of the {team.n} processes of this run has ended, so that the others cannot go on ({reason})."
        raise LostProcessError(msg) from error


def _tells_of_loss(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))


def join(device: torch.device) -> Team:
    """The processes that ``torchrun`` has started, each with a device of its own; alone where it has not.

    A process group that exists already is used as it is.
    """
    if not distributed.is_available():
        return ALONE
    if not distributed.is_initialized():
        if n_processes() == 1:
            return ALONE
        _meet(device)
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    return Team(ranks, device) if ranks.n > 1 else ALONE


def _meet(device: torch.device) -> None:
    found = f"WORLD_SIZE={os.environ['WORLD_SIZE']} and RANK={os.environ['RANK']}"
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        msg = (
            f"This process has {found} in its environment, as those that torchrun starts, but no "
            f"{' and no '.join(absent)}: start the script by torchrun, or remove RANK to have it run alone."
        )
        raise ValueError(msg)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = threading.Timer(_PATIENCE, warn, [_ALONE.format(found=found, seconds=_PATIENCE)])
    patience.daemon = True
    patience.start()
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except distributed.DistError as error:
        msg = (
            f"The processes of this run did not find each other ({first_line(error)}). {found}: all of them must run "
            "a script that calls tl.fit, or a function with the path of a file, and reach MASTER_ADDR."
        )
        raise LostProcessError(msg) from error
    finally:
        patience.cancel()


def device_of_rank(device: torch.device) -> torch.device:
    """Of several CUDA devices that of this process, as ``torchrun`` numbers them on each machine."""
    local, n_devices = local_rank(), torch.cuda.device_count()
    if device.type != "cuda" or local is None:
        return device
    if local >= n_devices:
        msg = (
            f"This is process {local} of its machine (LOCAL_RANK, from 0), which has {n_devices} CUDA devices: start "
            f"as many as there are, torchrun --nproc-per-node {n_devices}, or give device='cpu'."
        )
        raise ValueError(msg)
    return torch.device("cuda", local)
