"""Open files without reading the counts in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_ext.data.backed import open_backed

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_ext.data.backed import Backed


def read_backed(
    paths: str | os.PathLike | Sequence[str | os.PathLike | AnnData], *, label: str | None = None
) -> Backed:
    """One or several files as one AnnData whose ``X`` and layers stay on disk; everything else is read.

    Unlike AnnData's own backed mode it knows zarr beside h5ad, leaves layers on disk too, and puts the cells of several
    files one below the other. What is written into it stays in memory. To have results in the files themselves, give
    the paths to the functions: ``tl.fit("atlas.h5ad")``, ``tl.fit(["a.h5ad", "b.zarr"])``.

    Parameters
    ----------
    paths
        The path of an h5ad file or a zarr folder, or several with the same genes in any order, of which that of the
        first counts. An AnnData may stand among the paths.
    label
        Column of ``obs`` to add, with the name of the file of each cell.

    Returns
    -------
    An AnnData, and no view. Its files are open for reading until nothing that reads from them is left; ``close()``
    closes them at once, as does the end of ``with``. Of several files it has

    ``X``, ``layers``
        What all of them have, as one matrix on disk.
    ``obs``
        All columns. Categories are united; what a file lacks is missing in its cells.
    ``obsm``, ``uns``
        What all of them have alike.
    ``var``, ``varm``, ``varp``
        Those of the first.

    ``raw`` is not read, nor is ``obsp`` of several files.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ImportError
        zarr is not installed, and a path is a folder.
    KeyError
        Files have different genes.
    OSError
        A file is damaged, or open elsewhere for writing.
    ValueError
        A file holds no AnnData or no counts, a matrix of several files is stored by columns (CSC), or names of cells
        are there more than once.

    Warns
    -----
    ScviExtWarning
        Setup or fits differ between the files, so that none is used.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> adata[:400].write_h5ad("first.h5ad")
    >>> adata[400:].write_h5ad("second.h5ad")
    >>> with sx.io.read_backed(["first.h5ad", "second.h5ad"], label="file") as both:
    ...     print(both.shape, both.X[[650, 3]].shape, both.obs["file"].unique().tolist())
    (700, 765) (2, 765) ['first.h5ad', 'second.h5ad']
    """
    return open_backed(paths, label)
