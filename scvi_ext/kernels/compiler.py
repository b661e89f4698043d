"""How numba compiles the kernels, and how many threads they run on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numba
import torch
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

# Some of numba's threading layers must not be entered by two threads at a time.
_ENTERED = threading.Lock()


# Products and sums may be fused into one instruction, and nothing else. Sums in particular must not be reordered: numba
# optimises what it keeps on disk once more, so the first process on a machine would differ from all later ones.
_ARITHMETIC = {"fastmath": {"contract"}, "error_model": "numpy"}


@intrinsic
def widest_vectors(typing_context):
    """Let the function that calls this use vectors of 512 bits where the processor has them; LLVM keeps to 256."""

    def generate(context, builder, signature, args):
        # The set refuses what is not on llvmlite's list, and this one, which takes a value, is not.
        if isinstance(builder.function.attributes, set):
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


def fast(function: Callable) -> Callable:
    """A piece of a kernel: it becomes part of the loop that calls it."""
    return numba.njit(function, inline="always", **_ARITHMETIC)


def kernel(function: Callable) -> Callable:
    """A kernel on one thread."""
    return _on_disk(function, **_ARITHMETIC)


def parallel(function: Callable) -> Callable:
    """A kernel that calls others for parts of the rows or columns; call it through :func:`in_parallel`."""
    return _on_disk(function, parallel=True)


def _on_disk(function: Callable, **options: object) -> Callable:
    """Compiled on first call, once on this machine where there is a folder to keep it in."""
    try:
        return numba.njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # no folder that numba may write to
        return numba.njit(function, nogil=True, **options)


def in_parallel(function: Callable, *args: object) -> object:
    """Call ``function(parts, *args)`` on as many threads as torch uses, and return what it does."""
    n_threads = torch.get_num_threads()
    with _ENTERED:
        numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
        result = function(n_threads, *args)
    if torch.get_num_threads() != n_threads:  # numba's first parallel call sets the number of OpenMP threads
        torch.set_num_threads(n_threads)
    return result


def arrays(*tensors: Tensor | None) -> list[np.ndarray | None]:
    """The memory of tensors as numpy arrays, contiguous."""
    return [None if t is None else (t.detach() if t.requires_grad else t).contiguous().numpy() for t in tensors]
