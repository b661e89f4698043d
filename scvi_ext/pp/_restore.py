from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext import results
from scvi_ext._errors import warn
from scvi_ext._keys import UNS
from scvi_ext.data.corruption import read_corruption
from scvi_ext.data.registry import read_root, read_setup

if TYPE_CHECKING:
    from anndata import AnnData


def restore(adata: AnnData, *, corruption: str = "corrupted", copy: bool = False) -> AnnData | None:
    """Remove a corrupted layer, and the record of how it was made.

    The originals have never been touched, so nothing has to be put back.

    Parameters
    ----------
    adata
        Annotated data that :func:`~scvi_ext.pp.corrupt` has written to.
    corruption
        The corrupted layer.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy: ``adata`` without ``layers["corrupted"]`` and
    ``uns["scvi_ext"]["corruptions"]["corrupted"]``. Fits stay, those on the removed layer too.

    Raises
    ------
    KeyError
        No such corruption.
    ValueError
        A backed ``adata`` cannot be copied.

    Warns
    -----
    ScviExtWarning
        The removed layer is what :func:`~scvi_ext.pp.setup_anndata` registered.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.corrupt(adata)
    >>> sx.pp.restore(adata)
    >>> list(adata.layers), "scvi_ext" in adata.uns
    ([], False)
    """
    from scanpy import logging as logg

    read_corruption(adata, corruption)
    if UNS.setup in read_root(adata) and read_setup(adata).layer == corruption:
        msg = (
            f"adata is set up to read adata.layers[{corruption!r}], which is removed: call pp.setup_anndata again "
            "before the next fit or read-out."
        )
        warn(msg)
    adata = adata.copy() if copy else adata
    results.remove_corruption(adata, corruption)
    logg.info(
        f"removed the corruption {corruption!r}",
        deep=f"removed\n    {corruption!r} (adata.layers)\n    its record (adata.uns[{UNS.root!r}])",
    )
    return adata if copy else None
