"""Files from elsewhere, kept where scanpy keeps its own, and never read unless they are the right ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def download(url: str, file_name: str, sha256: str) -> Path:
    """Path of ``file_name`` in ``sc.settings.datasetdir``, downloaded from ``url`` if it is not there yet.

    Raises
    ------
    ImportError
        The package that downloads is not installed.
    OSError
        The file is not there and cannot be had.
    ValueError
        It has another checksum than ``sha256``.
    """
    import scanpy as sc

    folder = sc.settings.datasetdir
    try:
        import pooch
    except ImportError as error:
        msg = f"{file_name!r} is downloaded by pooch, which is not installed: pip install 'scvi-ext[data]'."
        raise ImportError(msg) from error
    shelf = pooch.create(
        path=folder, base_url="", registry={file_name: f"sha256:{sha256}"}, urls={file_name: url}, retry_if_failed=3
    )
    try:
        return folder / shelf.fetch(file_name, downloader=pooch.HTTPDownloader(progressbar=True))
    except OSError as error:  # those of requests among them
        msg = (
            f"{file_name!r} is not in {str(folder)!r} and cannot be downloaded ({type(error).__name__}). Download "
            f"{url} elsewhere, and put it there under this name, or into another folder: sc.settings.datasetdir = ..."
        )
        raise OSError(msg) from error
