"""Package-wide defaults. A leaf: import it from here, never through the package root."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)  # a misspelled setting is an error, not a new attribute
class Settings:
    """Defaults that a function uses where its own argument is ``None`` (or ``device="auto"``).

    Attributes
    ----------
    seed
        Seed of fits and of read-outs that sample.
    device
        ``"auto"`` (CUDA where present, else the processor), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
    batch_size
        Cells per forward pass of a read-out; None takes what suits the device. Results do not depend on it.
    memory_limit
        Gigabytes of counts that may be held in host memory: those of files that would take more stay on disk, and are
        read block by block. None allows half of the memory that is free. Results do not depend on it.
    """

    seed: int = 0
    device: str = "auto"
    batch_size: int | None = None
    memory_limit: float | None = None

    @property
    def verbosity(self) -> int:
        """scanpy's verbosity: 0 errors, 1 warnings, 2 info, 3 hints, 4 debug."""
        import scanpy as sc

        return int(sc.settings.verbosity)

    @verbosity.setter
    def verbosity(self, level: int | str) -> None:
        import scanpy as sc

        sc.settings.verbosity = level


settings = Settings()


def set_verbosity(level: int | str) -> None:
    """Set how much is logged.

    Parameters
    ----------
    level
        ``0`` to ``4``, or ``"error"``, ``"warning"``, ``"info"``, ``"hint"``, ``"debug"``: scanpy's levels.
    """
    settings.verbosity = level
