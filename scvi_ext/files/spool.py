"""Read-outs of all cells that go to disk as they come, and into their file when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scvi_ext.results import of_all_genes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import IO

    from scvi_ext.data.backed import Source

DTYPE = np.dtype(np.float32)


@dataclass(frozen=True, eq=False)
class Spooled:
    """Numbers of cells (rows), as they stand in a file of their own: a matrix that is read slice by slice."""

    file: IO[bytes]
    width: int  # numbers in a row of the file
    positions: np.ndarray | None  # of each cell among these rows, -1: it has none; None: all, in order
    columns: np.ndarray | None  # of the matrix that the numbers belong to, NaN elsewhere; None: all, in order
    shape: tuple[int, int]
    first: int = 0  # of the cells that this is a part of
    genes: np.ndarray | None = None  # the order of the columns in the file that this goes to

    def part(self, first: int, stop: int, genes: np.ndarray | None) -> Spooled:
        """Some of the cells, with columns in another order."""
        return replace(self, first=self.first + first, shape=(stop - first, self.shape[1]), genes=genes)

    def rows(self, first: int, stop: int) -> np.ndarray:
        """The cells from ``first`` to before ``stop``, shape (stop - first, number of columns)."""
        first, stop = self.first + first, self.first + stop
        if self.positions is None:
            values = self._read(first, stop)
        else:
            positions = self.positions[first:stop]
            values = np.full((stop - first, self.width), np.nan, DTYPE)
            cells = np.flatnonzero(positions >= 0)
            cells = cells[np.argsort(positions[cells])]
            for run in np.split(cells, np.flatnonzero(np.diff(positions[cells]) > 1) + 1):
                if len(run):
                    values[run] = self._read(positions[run[0]], positions[run[-1]] + 1)
        if self.columns is not None:
            values = of_all_genes(values, self.columns, self.shape[1])
        return values if self.genes is None else values[:, self.genes]

    def _read(self, first: int, stop: int) -> np.ndarray:
        values = np.empty((int(stop - first), self.width), DTYPE)
        self.file.seek(int(first) * self.width * DTYPE.itemsize)
        if self.file.readinto(memoryview(values).cast("B")) < values.nbytes:
            msg = f"Of {values.nbytes:,} bytes of a read-out not all could be read back."
            raise OSError(msg)
        return values


class Spools:
    """Read-outs of the cells of some files: what is complete can be read slice by slice.

    The files that they stand in meanwhile are beside the first one and have no name, so that nothing is left of them
    whatever happens.
    """

    def __init__(self, n_cells: int, n_genes: int, sources: Sequence[Source]):
        self.n_cells, self.n_genes = n_cells, n_genes
        self.sources = sources
        self.complete: dict[tuple[str, str], Spooled] = {}
        self._files: list[IO[bytes]] = []

    def fill(
        self,
        slot: str,
        names: Sequence[str],
        blocks: Iterable[tuple[slice, tuple[np.ndarray, ...]]],
        rows: np.ndarray | None,
        columns: np.ndarray | None,
    ) -> None:
        """Take in ``slot[name]`` for each name, as :mod:`scvi_ext.results` writes it; no ``columns``: as they are."""
        n_rows = self.n_cells if rows is None else len(rows)
        if columns is not None and np.array_equal(columns, np.arange(self.n_genes)):
            columns = None
        files, widths, totals = [], [], []
        for _, arrays in blocks:
            if not files:
                widths = [array.shape[1] for array in arrays]
                totals = widths if columns is None else [self.n_genes] * len(widths)
                self._check_space(slot, names, n_rows * sum(widths), sum(totals))
                files = [self._new_file() for _ in names]
            for file, array in zip(files, arrays, strict=True):
                file.write(memoryview(np.ascontiguousarray(array, DTYPE)).cast("B"))
        positions = None
        if rows is not None:
            positions = np.full(self.n_cells, -1, np.int64)
            positions[rows] = np.arange(n_rows)
        for name, file, width, total in zip(names, files, widths, totals, strict=True):
            self.complete[slot, name] = Spooled(file, width, positions, columns, (self.n_cells, total))

    def close(self) -> None:
        """Give the disk space back."""
        for file in self._files:
            file.close()

    def _folder(self) -> Path:
        beside = self.sources[0].path.parent
        return beside if os.access(beside, os.W_OK) else Path(tempfile.gettempdir())

    def _new_file(self) -> IO[bytes]:
        file = tempfile.TemporaryFile(dir=self._folder(), prefix=".scvi_ext_")
        self._files.append(file)
        return file

    def _check_space(self, slot: str, names: Sequence[str], n_spooled: int, width: int) -> None:
        """Raise an OSError unless there is room for the numbers twice: as they come, and in the files."""
        bytes_in = [(self._folder(), n_spooled)]
        bytes_in += [(source.path.parent, (source.stop - source.first) * width) for source in self.sources]
        needed: dict[int, int] = {}  # by device
        for folder, numbers in bytes_in:
            device = folder.stat().st_dev
            needed[device] = needed.get(device, 0) + numbers * DTYPE.itemsize
        for folder, _ in bytes_in:
            free, asked = shutil.disk_usage(folder).free, needed[folder.stat().st_dev]
            if free < asked:
                what = " and ".join(f"{slot}[{name!r}]" for name in names)
                msg = (
                    f"{what} takes {asked / 1e9:.3g} GB on disk until it is in its file, and {free / 1e9:.3g} GB are "
                    f"free at {str(folder)!r}. Make room, or ask for less: indices=..., gene_list=..."
                )
                raise OSError(ENOSPC, msg)
