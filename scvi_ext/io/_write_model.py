"""Write a fitted model into a folder of its own."""

from __future__ import annotations

import json
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.numpy import save
from scanpy import logging as logg

from scvi_ext._errors import listing
from scvi_ext.data.registry import read_fit
from scvi_ext.portable import to_arrays

from ._model_folder import ARRAYS, DOCUMENT

if TYPE_CHECKING:
    import os

    from anndata import AnnData


def write_model(adata: AnnData, path: str | os.PathLike, key: str | None = None, *, overwrite: bool = False) -> None:
    """Write a fitted model into a folder, without the cells it was trained on.

    The model also travels inside ``adata`` (``adata.write_h5ad``); a folder is for handing it on alone. It holds two
    files: ``model.safetensors`` with all arrays, bit for bit, and ``model.json`` with everything else: options, setup,
    genes, history, status, and the SHA-256 of the other file. Neither can contain code. Both are complete before the
    folder gets its name, so that an interrupted call leaves no half of a model, and an earlier one as it was.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    path
        Folder to write.
    key
        Which fit; the last one by default.
    overwrite
        Whether to replace a model that is there already.

    Returns
    -------
    ``None``. Nothing is written into ``adata``.

    Raises
    ------
    FileExistsError
        There is something at ``path``, and ``overwrite`` is False or it is not the folder of a model.
    KeyError
        There is no such fit.

    Examples
    --------
    >>> import tempfile
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata)
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> folder = tempfile.mkdtemp() + "/my_model"
    >>> sx.io.write_model(adata, folder)
    >>> sx.io.read_model(folder).model
    'scvi'
    """
    fit = read_fit(adata, key)
    target = Path(path).expanduser()
    _check_target(target, overwrite)
    arrays, document = to_arrays(fit)
    content = save(arrays)
    document["sha256"] = sha256(content).hexdigest()

    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, hence on the same disk, where a name changes in one step.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        (new / ARRAYS).write_bytes(content)
        (new / DOCUMENT).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _put_in_place(new, target, old)
    logg.info(f"wrote the {fit.model!r} fit {fit.key!r}", deep=f"added\n    {str(target)!r}, {ARRAYS} and {DOCUMENT}")


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        msg = f"{str(target)!r} exists. Give another path, or overwrite=True to replace the model there."
        raise FileExistsError(msg)
    found = {p.name for p in target.iterdir()} if target.is_dir() else {target.name}
    if not found <= {ARRAYS, DOCUMENT}:
        msg = (
            f"{str(target)!r} is not the folder of a model, and is not replaced: besides {ARRAYS} and {DOCUMENT} there "
            f"is {listing(sorted(found - {ARRAYS, DOCUMENT}))}. Give another path."
        )
        raise FileExistsError(msg)


def _put_in_place(new: Path, target: Path, old: Path) -> None:
    """Give ``new`` the name ``target``; what had it before comes back if that fails."""
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:  # Ctrl-C too
        if old.exists() and not target.exists():
            old.rename(target)
        raise
