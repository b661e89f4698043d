"""A reference, whatever it is handed over as: an AnnData with a fit, a fit that was read from a file, or the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anndata import AnnData

from scvi_ext import io
from scvi_ext._contract import SavedFit
from scvi_ext._keys import UNS
from scvi_ext.data.backed import is_path, open_backed
from scvi_ext.data.registry import read_fit, read_root

if TYPE_CHECKING:
    from os import PathLike

_OWN = "model.json"  # in every folder of write_model, and in none of scvi-tools


def read_reference(reference: AnnData | SavedFit | str | PathLike, key: str | None = None) -> SavedFit:
    """The fit of a reference; ``key`` chooses among those of an AnnData, in memory or in a file.

    Raises
    ------
    FileNotFoundError
        There is nothing at this path.
    KeyError
        The AnnData has no such fit.
    TypeError
        It is none of these kinds.
    ValueError
        ``key`` is given for what holds one fit only, or the file cannot be read.
    """
    if _is_file_of_anndata(reference):
        with open_backed(reference) as adata:
            return read_reference(adata, key)
    if isinstance(reference, AnnData):
        if not read_root(reference).get(UNS.fits):
            msg = (
                f"The reference has no fit (adata.uns[{UNS.root!r}]): call tl.fit on it first. The query comes first, "
                "the reference second."
            )
            raise KeyError(msg)
        return read_fit(reference, key)
    if not (is_path(reference) or isinstance(reference, SavedFit)):
        msg = (
            f"reference is a {type(reference).__name__}; an AnnData with a fit, what io.read_model or "
            "io.read_scvi_tools returns, or the path of one of them is needed."
        )
        raise TypeError(msg)
    if key is not None:
        msg = f"key={key!r} has no effect: only an AnnData has several fits to choose from."
        raise ValueError(msg)
    if isinstance(reference, SavedFit):
        return reference
    path = Path(reference).expanduser()
    if not path.exists():
        msg = (
            f"The reference {str(path)!r} does not exist: give an h5ad file or a zarr folder with a fit, or the folder "
            "that io.write_model or scvi-tools wrote."
        )
        raise FileNotFoundError(msg)
    return io.read_model(path) if (path / _OWN).is_file() else io.read_scvi_tools(path)


def _is_file_of_anndata(reference: object) -> bool:
    return is_path(reference) and Path(reference).suffix in (".h5ad", ".zarr")
