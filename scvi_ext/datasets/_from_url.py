"""Any file of counts that has an address."""

from __future__ import annotations

import gzip
import hashlib
import re
from inspect import signature
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pandas as pd
from anndata import AnnData
from anndata.utils import make_index_unique
from scipy.sparse import csr_matrix

from scvi_ext._errors import listing, missing_key, unknown_keyword

from ._files import File, read_loom
from ._tenx_files import read_sample

if TYPE_CHECKING:
    from collections.abc import Callable

_DIGITS = {"sha256": 64, "md5": 32, "git": 40}
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": None}  # None: any white space


def from_url(url: str, *, checksum: str | None = None, file_name: str | None = None, **read_options: Any) -> AnnData:
    """Download counts from any address, and read them by what their file is called.

    ======================================== =========================================================================
    ``.h5ad``                                as it is, by :func:`anndata.read_h5ad`
    ``.loom``                                the main layer; attributes of one value in ``obs`` and ``var``, those of
                                             several in ``obsm`` and ``varm``
    ``.csv``, ``.tsv``, ``.tab``, ``.txt``   by :func:`scanpy.read_csv`; also ``.gz``
    ``.h5``, ``.tar.gz``, ``.tgz``           output of Cell Ranger, as :func:`scvi_ext.datasets.dataset_10x` has it
    ======================================== =========================================================================

    The file is kept in ``sc.settings.datasetdir``, and is not downloaded again as long as it is there and right. How
    large it is, and under which licence, only you can know.

    Parameters
    ----------
    url
        Address, beginning with ``https://`` or ``http://``.
    checksum
        ``"sha256:..."``, ``"md5:..."``, or ``"git:..."`` (what git calls the content of a file), hexadecimal. None
        keeps the SHA-256 of the file that was read first beside it, and compares it from then on.
    file_name
        What to call the file, with one of the endings above. None takes the end of the address after a short mark of
        the whole address, so that files from two places never meet.
    **read_options
        Of ``.h5ad``: those of :func:`anndata.read_h5ad`. Of ``.loom``: ``obs_names`` and ``var_names``, the attributes
        that have names (``"CellID"`` and ``"Gene"``). Of text: ``genes_in_rows=True`` where rows are genes and columns
        are cells, and those of :func:`scanpy.read_csv`. Of Cell Ranger: ``genome``, where there are several.

    Returns
    -------
    AnnData of cells x genes, counts in ``X``: of ``.h5ad`` whatever the file has, otherwise CSR float32.

    Raises
    ------
    ImportError
        The extra ``data`` is not installed.
    KeyError
        A loom file has no attribute of this name.
    OSError
        The file is not in ``sc.settings.datasetdir`` and cannot be downloaded, or not be written there.
    TypeError
        The address, the name or the checksum is no text, or an option does not exist for this kind of file.
    ValueError
        The address, the name or the checksum cannot be used; the file is not the one that it should be, cannot be read,
        or has no such genome; or without a checksum, a file of this ``file_name`` is there from another address.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.from_url(
    ...     "https://github.com/YosefLab/scVI-data/raw/9a647afc8893604fa11024ddcd5fc5bb22b8e50e/smfish.h5ad",
    ...     checksum="git:c5960c06426b61c290492739c2e7b23399479328",
    ... )  # doctest: +SKIP
    """
    _check_text("url", url)
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.netloc:
        msg = f"url={url!r} is no address that begins with 'https://' or 'http://'."
        raise ValueError(msg)
    if checksum is not None:
        _check_text("checksum", checksum)
        checksum = _checked(checksum)
    if file_name is not None:
        _check_text("file_name", file_name)
    else:
        end = PurePosixPath(unquote(address.path)).name
        file_name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{end}"
    reader = _reader(file_name)
    _check_options(reader, read_options)
    return reader(File(url, file_name, checksum), **read_options)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        msg = f"{name}={value!r} is a {type(value).__name__}; text is needed."
        raise TypeError(msg)


def _checked(checksum: str) -> str:
    kind, _, digits = checksum.lower().partition(":")
    if kind not in _DIGITS or not re.fullmatch(rf"[0-9a-f]{{{_DIGITS[kind]}}}", digits):
        kinds = ", ".join(f"'{kind}:' and {n}" for kind, n in _DIGITS.items())
        msg = f"checksum={checksum!r} is not one of these, with so many hexadecimal digits: {kinds}."
        raise ValueError(msg)
    return f"{kind}:{digits}"


def _reader(file_name: str) -> Callable[..., AnnData]:
    name = file_name.lower()
    readers = {
        ".h5ad": _read_h5ad,
        ".loom": _read_loom,
        ".h5": _read_10x,
        ".tar.gz": _read_10x,
        ".tgz": _read_10x,
        **{end + zipped: _read_text for end in _DELIMITERS for zipped in ("", ".gz")},
    }
    for ending, reader in readers.items():
        if name.endswith(ending):
            return reader
    msg = (
        f"What {file_name!r} is cannot be told by its name, which ends in none of {listing(readers, 99)}. Call it "
        "after what it is: file_name='...'."
    )
    raise ValueError(msg)


def _check_options(reader: Callable[..., AnnData], options: dict[str, Any]) -> None:
    """Raise a TypeError at an option that neither the reader has nor the function that it hands the others to."""
    import anndata as ad
    import scanpy as sc

    handed = {_read_h5ad: ad.read_h5ad, _read_text: sc.read_csv}.get(reader, reader)
    valid = {*signature(reader).parameters, *signature(handed).parameters} - {"file", "filename", "options"}
    for name in options:
        if name not in valid:
            raise unknown_keyword("from_url", name, valid)


def _read_h5ad(file: File, **options: Any) -> AnnData:
    import anndata as ad

    with file.opened() as path:
        return ad.read_h5ad(path, **options)


def _read_10x(file: File, *, genome: str | None = None) -> AnnData:
    with file.opened() as path:
        return read_sample(file, path, genome=genome)


def _read_text(file: File, *, genes_in_rows: bool = False, **options: Any) -> AnnData:
    import scanpy as sc

    ending = PurePosixPath(file.name.lower().removesuffix(".gz")).suffix
    options = {"delimiter": _DELIMITERS[ending], "first_column_names": True, **options}
    unpack = gzip.open if file.name.lower().endswith(".gz") else open
    with file.opened() as path, unpack(path, "rt", encoding="utf-8") as text:
        adata = sc.read_csv(text, **options)
        if 0 in adata.shape:
            raise file.is_wrong(f"has no numbers between the delimiters {options['delimiter']!r}")
    if genes_in_rows:
        adata = adata.T
    return AnnData(csr_matrix(adata.X, dtype="float32"), obs=adata.obs, var=adata.var)


def _read_loom(file: File, *, obs_names: str = "CellID", var_names: str = "Gene") -> AnnData:
    with file.opened() as path:
        counts, of_genes, of_cells, _ = read_loom(path)
    for slot, name, attributes in (("col_attrs", obs_names, of_cells), ("row_attrs", var_names, of_genes)):
        if name not in attributes:
            raise missing_key(f"{slot} of {file.name!r}", name, attributes)
    tables = []
    for name, attributes in ((obs_names, of_cells), (var_names, of_genes)):
        single = {key: values for key, values in attributes.items() if values.ndim == 1 and key != name}
        several = {key: values for key, values in attributes.items() if values.ndim > 1}
        names = make_index_unique(pd.Index(attributes[name].astype(str)))
        tables.append((pd.DataFrame(single, index=names), several))
    (obs, obsm), (var, varm) = tables
    return AnnData(counts.astype("float32"), obs=obs, var=var, obsm=obsm, varm=varm)
