"""Where a run takes place, and its own source of randomness."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from scvi_ext._errors import one_of, whole_number
from scvi_ext._settings import settings
from scvi_ext.functional import products

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


def resolve_seed(seed: int | None) -> int:
    """A seed that generators take; None asks ``settings.seed``."""
    return whole_number("seed", settings.seed if seed is None else seed, 0)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators start from ``seed``; outside, they are as if nothing had happened.

    The generators belong to the whole process, so only one thread at a time can be inside.
    """
    with _GENERATORS, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


PRECISIONS = ("float32", "bf16")


def check_precision(precision: str, device: torch.device) -> str:
    """``precision``, if it is one that the device computes with.

    Raises
    ------
    ValueError
        If it is unknown, or the device has no bfloat16 arithmetic.
    """
    one_of("precision", precision, PRECISIONS)
    if precision == "bf16" and not _has_bf16(device):
        msg = f"precision='bf16' was asked for, and {device} has no bfloat16 arithmetic: use precision='float32'."
        raise ValueError(msg)
    return precision


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Without the instructions torch multiplies bfloat16 all the same, and slower than float32.
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep what a step frees for the next one, instead of giving it back to the system each time.

    Each page that the system hands out anew costs an interrupt. The allocator of glibc holds on to twice the largest
    piece that it has seen freed, if that had at most 32 MB (its manual: mallopt, M_MMAP_THRESHOLD); others do as they
    always did.
    """
    if device.type == "cpu":
        torch.empty(2**25 - 2**16, dtype=torch.uint8)


@contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, matrix products take the inputs that a training run with this precision allows.

    float32 allows TF32 on CUDA (10 bits of mantissa in the inputs of a product, float32 everywhere else), bf16 takes
    bfloat16 inputs (7 bits). Sums, parameters and likelihoods are float32 in any case.
    """
    if device.type == "cpu":
        with products.in_bfloat16() if precision == "bf16" else nullcontext():
            yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """On CUDA with bf16, layers in bfloat16; layers cast by themselves on a processor, see :func:`arithmetic`."""
    if device.type == "cuda" and precision == "bf16":
        # A cast that was cached while a graph was captured would not be made again when it is replayed.
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return nullcontext()
