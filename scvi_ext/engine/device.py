"""Where a run takes place, and its own source of randomness."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from scvi_ext._settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

_GENERATORS = threading.RLock()


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The torch device of a name; ``"auto"`` asks ``settings.device``, then takes CUDA where present.

    Raises
    ------
    ValueError
        If the name is not a device that we support, or the device is not there.
    """
    name = str(settings.device if device == "auto" else device)
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        msg = f"device={name!r} is not supported: use 'auto', 'cpu', 'cuda' or 'cuda:<number>'."
        raise ValueError(msg)
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= n_cuda:
        msg = (
            f"device={name!r} was asked for, but torch {torch.__version__} sees {n_cuda} CUDA devices here: use 'cpu'."
        )
        raise ValueError(msg)
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators start from ``seed``; outside, they are as if nothing had happened.

    The generators belong to the whole process, so only one thread at a time can be inside.
    """
    with _GENERATORS, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
