"""Data sets that are files elsewhere: where they are, and how the counts in them become an AnnData."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.utils import make_index_unique
from scipy.sparse import csr_matrix, vstack

from scvi_ext._errors import first_line, listing

from ._download import checksum_note, download, keep_first_checksum

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS = 1000  # of a table that are dense at once
_ENTRIES = 2**23  # of a matrix that are dense at once: 64 MB


class DataError(ValueError):
    """A ValueError about a file in our own words, which :meth:`File.opened` leaves as it is."""


@dataclass(frozen=True)
class File:
    """A file to download; ``shape``: the published numbers of cells and genes, where nobody published a checksum."""

    url: str
    name: str
    checksum: str | None
    size: int | None = None
    shape: tuple[int, int] | None = None

    def path(self) -> Path:
        """Where it is; without a checksum it may be anything, and is to be read while it is :meth:`opened`."""
        return download(self.url, self.name, self.checksum, size=self.size)

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """Where it is, while it is read: what fails is said of the file, and only one that can be read is vouched for.

        Raises
        ------
        ValueError
            It is empty, or it is not what can be read.
        """
        path = self.path()
        if path.stat().st_size == 0:
            raise self.is_wrong("is empty")
        try:
            yield path
        except (DataError, ImportError, MemoryError, Warning):
            raise
        except Exception as error:  # there is nothing that readers do not raise at what is not their format
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            raise self.is_wrong(f"cannot be read ({first_line(error)})") from error
        if self.checksum is None:
            keep_first_checksum(path)

    def is_wrong(self, what: str) -> DataError:
        """A ValueError that says what is wrong with the file, and what to do."""
        import scanpy as sc

        path = Path(sc.settings.datasetdir) / self.name
        folder, note = str(path.parent), checksum_note(path)
        if self.checksum:
            advice = (
                f"The file in {folder!r} has the right checksum: {self.url} has another file than it seems, or what "
                "reads it is too old or too new."
            )
        else:
            files = f"both it and {note.name!r}" if note.exists() else "it"
            advice = f"Unless that is what {self.url} has, delete {files} from {folder!r}, to download it again."
        return DataError(f"{self.name!r} {what}. {advice}")


def to_anndata(counts: Any, obs: pd.DataFrame, genes: pd.Index, file: File, **obsm: Any) -> AnnData:
    """Counts of cells x genes, checked, as CSR float32, with unique names and without empty cells."""
    from scanpy import logging as logg

    counts = csr_matrix(counts)
    if file.shape not in (None, counts.shape):
        has, expected = (f"{cells} cells and {genes} genes" for cells, genes in (counts.shape, file.shape))
        raise file.is_wrong(f"has {has}, expected {expected}")
    is_count = np.isfinite(counts.data) & (counts.data >= 0) & (counts.data == np.rint(counts.data))
    if not is_count.all():
        raise file.is_wrong(f"has numbers that are no counts: {listing(counts.data[~is_count], 3)}")
    obs = obs.set_axis(_unique(obs.index))
    adata = AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=_unique(genes)), obsm=obsm)
    seen = np.asarray(counts.sum(axis=1)).ravel() > 0
    if seen.all():
        return adata
    logg.info(f"{(~seen).sum()} of {seen.size} cells in {file.name!r} have no counts at all, and are left out")
    return adata[seen].copy()


def read_table(file: File, path: Path, **options: Any) -> tuple[csr_matrix, pd.Index, pd.Index]:
    """Numbers of a text table, the names of its rows, and those of its columns; ``options`` are those of pandas."""
    # Genes may be called "NA"; what is missing among the numbers makes text of its column.
    options = {"index_col": 0, "na_filter": False, "low_memory": False, "chunksize": _ROWS, **options}
    blocks, rows = [], []
    with pd.read_csv(path, **options) as pieces:
        for piece in pieces:
            if text := [name for name, dtype in piece.dtypes.items() if dtype.kind not in "iuf"]:
                raise file.is_wrong(f"has entries that are no numbers, in the columns {listing(text, 3)}")
            blocks.append(csr_matrix(piece.to_numpy()))
            rows.append(piece.index.astype(str))
    return vstack(blocks, format="csr"), rows[0].append(rows[1:]), piece.columns.astype(str)


def read_loom(path: Path) -> tuple[csr_matrix, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Cells x genes of a loom file, and its attributes: of genes, of cells, and of the file (version 2 of the format).

    scanpy reads loom files too, but not those in which an attribute has several columns, as all of these have.
    """
    import h5py

    with h5py.File(path, "r") as file:
        matrix = file["matrix"]
        step = max(1, _ENTRIES // max(1, matrix.shape[1]))
        blocks = [csr_matrix(matrix[first : first + step]) for first in range(0, matrix.shape[0], step)]
        of_genes, of_cells = ({k: _values(v) for k, v in file[f"{axis}_attrs"].items()} for axis in ("row", "col"))
        of_file = {k: _decoded(np.asarray(v)) for k, v in file.attrs.items()}
    return vstack(blocks).T.tocsr(), of_genes, of_cells, of_file


def numbered(n: int) -> pd.Index:
    """Names for cells that have none."""
    return pd.Index([f"cell_{i}" for i in range(n)])


def categories(codes: np.ndarray, names: np.ndarray | list[str], file: File) -> pd.Categorical:
    """Names in their order, of codes 0, 1, ..."""
    if unknown := sorted(set(codes) - set(range(len(names)))):
        raise file.is_wrong(f"has the codes {listing(unknown, 3)}, expected 0 to {len(names) - 1}")
    return pd.Categorical.from_codes(codes.astype(int), categories=np.asarray(names).tolist())


def as_text(codes: np.ndarray) -> pd.Categorical:
    """Codes that are whole numbers of any type, as categories that are text."""
    return pd.Categorical(codes.astype(int).astype(str))


def _unique(names: pd.Index) -> pd.Index:
    names = names.rename(None)  # what a table calls its first column need not be text, which files of AnnData want
    return names if names.is_unique else make_index_unique(names)


def _values(dataset: Any) -> np.ndarray:
    values = _decoded(dataset[()])
    return values[:, 0] if values.shape[1:] == (1,) else values


def _decoded(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "O":  # text of any length, as bytes in data sets and as text in attributes
        return np.vectorize(lambda text: text.decode() if isinstance(text, bytes) else text, otypes=[str])(values)
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
