"""Read a fitted model from a folder of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load

from scvi_ext._errors import listing
from scvi_ext.portable import FORMAT, from_arrays

from ._adopt import adopt
from ._model_folder import ARRAYS, DOCUMENT

if TYPE_CHECKING:
    import os

    from anndata import AnnData

    from scvi_ext._contract import SavedFit


def read_model(
    path: str | os.PathLike, adata: AnnData | None = None, *, key_added: str | None = None
) -> SavedFit | None:
    """Read a model that :func:`write_model` wrote.

    Reading executes nothing: the files are JSON and safetensors.

    Parameters
    ----------
    path
        Folder with ``model.json`` and ``model.safetensors``.
    adata
        Annotated data to put the model into: new cells, with all genes of the model in any order, and the columns it
        was set up with.
    key_added
        Name of the fit; by default the one it was written under. ``adata`` must not have a fit of this name.

    Returns
    -------
    None if ``adata`` is given. Then ``adata.uns["scvi_ext"]["fits"][key_added]`` is written, and
    ``adata.uns["scvi_ext"]["setup"]`` if ``adata`` has not been set up yet. Otherwise the ``SavedFit``: plain data with
    ``model``, ``config``, ``run``, ``setup``, ``var_names``, ``state`` (name -> array), ``history``, ``status`` and
    ``checkpoint`` (or None).

    Raises
    ------
    FileNotFoundError
        The folder or one of its files is missing.
    KeyError
        ``adata`` lacks genes of the model, or columns it was set up with.
    ValueError
        The folder was written by a newer version, is damaged, or ``adata`` has been set up differently, or has batches
        or categories of covariates that the model does not know. Nothing has been written then.

    Examples
    --------
    >>> import tempfile
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> folder = tempfile.mkdtemp() + "/my_model"
    >>> sx.io.write_model(adata, folder)
    >>> new_cells = sx.datasets.pbmc68k_counts()[:100].copy()
    >>> sx.io.read_model(folder, new_cells)
    >>> sx.tl.get_latent(new_cells)
    >>> new_cells.obsm["X_scvi"].shape
    (100, 10)
    """
    folder = Path(path).expanduser()
    missing = [name for name in (DOCUMENT, ARRAYS) if not (folder / name).is_file()]
    if missing:
        msg = f"{str(folder)!r} is not a folder that write_model wrote: {listing(missing)} missing."
        raise FileNotFoundError(msg)
    document = _document(folder / DOCUMENT)
    content = (folder / ARRAYS).read_bytes()
    if sha256(content).hexdigest() != document.get("sha256"):
        msg = (
            f"{str(folder / ARRAYS)!r} is not the file that {DOCUMENT} was written with (its SHA-256 differs): it is "
            "cut off, damaged or from another model. Copy the folder again, or write it again with write_model."
        )
        raise ValueError(msg)
    try:
        fit = from_arrays(load(content), document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        msg = f"{str(folder / DOCUMENT)!r} is incomplete or was changed ({type(error).__name__}: {error})."
        raise ValueError(msg) from error
    return adopt(fit if key_added is None else replace(fit, key=key_added), adata)


def _document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{str(file)!r} is not complete JSON ({error}): it is cut off or damaged. Copy the folder again."
        raise ValueError(msg) from error
    found = document.get("format") if isinstance(document, dict) else None
    if not isinstance(found, int) or found > FORMAT:
        msg = (
            f"{str(file)!r} has format {found!r}, and this version of scvi_ext reads formats up to {FORMAT}. If it was "
            "written by a newer version, update scvi_ext."
        )
        raise ValueError(msg)
    return document
