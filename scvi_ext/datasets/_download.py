"""Files from elsewhere, kept where scanpy keeps its own, and never read unless they are the right ones.

Beside ``<file>`` there may be ``<file>.part`` and ``<file>.part.json`` (an interrupted download, which goes on from
there, and what it is a part of), ``<file>.json`` (where it was downloaded from), ``<file>.verified`` (a large file that
was verified: size and time of change) and ``<file>.sha256`` (where nobody published a checksum: that of the file that
was first read), and while it is downloaded ``<file>.lock`` and ``<file>.part.unpacked``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tarfile
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from time import sleep
from typing import TYPE_CHECKING

from scvi_ext._bar import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

    from requests import Response

_ATTEMPTS = 4  # in a row without a byte more than before, after waits of 1, 2 and 4 seconds
_TIMEOUT = (10, 60)  # seconds: to connect, and between two pieces of the answer
_PIECE = 1 << 16  # bytes; what a cut connection loses at most
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # a server that has no time now
# Files up to here are read in full before every use, in less than a second; larger ones when they have changed.
_ALWAYS_HASHED = 256 * 2**20
_GZIP = b"\x1f\x8b"  # how a packed file begins


def download(url: str, file_name: str, checksum: str | None, *, size: int | None = None) -> Path:
    """Path of ``file_name`` in ``sc.settings.datasetdir``, downloaded from ``url`` if it is not there yet.

    A download that was interrupted goes on where it stopped, if the server can do that and the file there is still
    the same. The file gets its name when it is complete and verified. A file that is there is verified before every
    use; one above 256 MB is only read for that when its size or time of change is not what it was.

    Parameters
    ----------
    url
        Where it is.
    file_name
        What it is called in the folder.
    checksum
        What was published: ``"sha256:<hex>"``, ``"md5:<hex>"``, or ``"git:<hex>"``, the name of the file's content in
        a git repository. None where nothing was: then that holds which :func:`keep_first_checksum` has kept.
    size
        Bytes, if that is known.

    Raises
    ------
    ImportError
        A package that downloads is not installed.
    OSError
        The file is not there and cannot be had, or the folder cannot be written.
    ValueError
        It has another size or checksum, or is from elsewhere and has no published checksum.
    """
    import scanpy as sc

    folder = Path(sc.settings.datasetdir)
    if Path(file_name).name != file_name or file_name in ("", ".."):
        msg = f"file_name={file_name!r} must be the name of a file in {str(folder)!r}, without a folder."
        raise ValueError(msg)
    path = folder / file_name
    expected = checksum or _first_checksum(path)
    if not path.exists():
        _fetch_alone(url, path, expected, size)
    elif wrong := _wrong(path, expected, size, _beside(path, "verified")):
        msg = (
            f"{str(path)!r} is not the file it should be: {wrong}. Delete it, and it is downloaded again from {url}."
            + _if_it_is_right(path)
        )
        raise ValueError(msg)
    source = _read_json(_beside(path, "json")).get("url", url)
    if checksum is None and source != url:
        msg = (
            f"{str(path)!r} was downloaded from {source}, and not from {url}. Choose another name for this one; or, if "
            "both are the same file, give its checksum; or delete the one that is there."
        )
        raise ValueError(msg)
    return path


def keep_first_checksum(path: Path) -> None:
    """Write the SHA-256 of a file of which none was published beside it, once it was read: it holds from then on."""
    from scanpy import logging as logg

    if checksum_note(path).exists():
        return
    found = _digest(path, "sha256")
    _write_beside(checksum_note(path), f"{found.partition(':')[2]}  {path.name}\n")  # as sha256sum writes it
    logg.info(
        f"nobody has published a checksum of {path.name!r}, so that it could not be verified; that of this file is "
        f"kept beside it, and compared from now on ({found})"
    )


def checksum_note(path: Path) -> Path:
    """Where :func:`keep_first_checksum` writes it."""
    return _beside(path, "sha256")


# ---- is it the right file? -----------------------------------------------------------------------------------------


def _wrong(path: Path, checksum: str | None, size: int | None, stamp: Path) -> str:
    """What is wrong with a file, or nothing; ``stamp`` remembers when a large one was verified."""
    now = path.stat()
    if size is not None and now.st_size != size:
        return f"it has {now.st_size} bytes, expected {size}"
    if checksum is None:
        return ""
    state = {"checksum": checksum, "size": now.st_size, "time": now.st_mtime_ns}
    large = now.st_size > _ALWAYS_HASHED
    if large and _read_json(stamp) == state:
        return ""
    found = _digest(path, checksum.partition(":")[0])
    if found != checksum:
        return f"its checksum is {found}, expected {checksum}"
    if large:
        _write_beside(stamp, json.dumps(state))
    return ""


def _digest(path: Path, kind: str) -> str:
    """Checksum of a file: its kind and the hexadecimal number."""
    hasher = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":
        hasher.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        return f"{kind}:{hashlib.file_digest(file, lambda: hasher).hexdigest()}"


def _first_checksum(path: Path) -> str | None:
    with suppress(OSError, IndexError):
        return f"sha256:{checksum_note(path).read_text().split()[0]}"


def _if_it_is_right(path: Path) -> str:
    """What to do about a checksum that nobody but the first download has given."""
    note = checksum_note(path)
    return f" If it is the right one after all, delete {note.name!r}." if note.exists() else ""


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _write_beside(path: Path, text: str) -> None:
    with suppress(OSError):  # a folder that is read by all and written by one: nothing depends on these notes
        path.write_text(text)


def _read_json(path: Path) -> dict:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


# ---- the network ---------------------------------------------------------------------------------------------------


def _fetch_alone(url: str, path: Path, checksum: str | None, size: int | None) -> None:
    """Fetch the file, or wait until another process has done so."""
    from scanpy import logging as logg

    try:
        import requests  # noqa: F401
        from filelock import FileLock, Timeout
    except ImportError as error:
        msg = f"{path.name!r} is downloaded by {error.name}, which is not installed: pip install 'scvi-ext[data]'."
        raise ImportError(msg) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_beside(path, "lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logg.info(f"waiting for another process, which downloads {path.name!r}")
            lock.acquire()
        try:
            if not path.exists():
                _fetch(url, path, checksum, size)
        finally:
            _beside(path, "lock").unlink(missing_ok=True)  # whoever still waits for it will find the file
            lock.release()
    except OSError as error:
        if error.errno is None:  # not one of the disk
            raise
        msg = (
            f"{path.name!r} cannot be written into {str(path.parent)!r} ({os.strerror(error.errno)}). Make that "
            "possible, or choose another folder: sc.settings.datasetdir = ..."
        )
        raise OSError(error.errno, msg) from error


def _fetch(url: str, path: Path, checksum: str | None, size: int | None) -> None:
    from scanpy import logging as logg

    part, stamp = _beside(path, "part"), _beside(path, "verified")
    went_on = _persist(url, path, part, checksum, size)
    whole = _unpacked(part, path)
    if (wrong := _wrong(whole, checksum, size, stamp)) and went_on:  # the fault may lie in what was there before
        logg.warning(f"the pieces of {path.name!r} do not belong together: it is downloaded anew")
        _discard(part)
        _persist(url, path, part, checksum, size)
        whole = _unpacked(part, path)
        wrong = _wrong(whole, checksum, size, stamp)
    if wrong:
        _discard(part)
        msg = (
            f"What {url} sent is not {path.name!r}: {wrong}. It was removed. Either something on the way sends its own "
            "page (log in to the network, mind a proxy) or has damaged it: try again; or the file there has been "
            f"replaced: put the former one into {str(path.parent)!r} by hand, or look for a newer version of this "
            "package." + _if_it_is_right(path)
        )
        raise ValueError(msg)
    _beside(part, "json").replace(_beside(path, "json"))
    whole.replace(path)
    _discard(part)
    logg.info(f"downloaded {url}\n    {path.stat().st_size} bytes, to {str(path)!r}")


def _persist(url: str, path: Path, part: Path, checksum: str | None, size: int | None) -> bool:
    """Transfer the file, again and again as long as it gets on; what the last :func:`_transfer` returned."""
    import requests
    from scanpy import logging as logg

    most, failures = _size(part), 0
    while True:
        try:
            return _transfer(url, part, checksum, size)
        except requests.RequestException as error:
            failures = 1 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures == _ATTEMPTS or not _passes(error):
                raise OSError(_cannot(url, path, error)) from error
            sleep(2 ** (failures - 1))
        except KeyboardInterrupt:
            kept = f"{_size(part)} bytes of {path.name!r} are kept, and the next call goes on from there"
            logg.warning(f"interrupted: {kept}")
            raise


def _transfer(url: str, part: Path, checksum: str | None, size: int | None) -> bool:
    """Write what ``part`` lacks of the file, or all of it where that cannot be continued (False)."""
    import requests

    known, have = _read_json(_beside(part, "json")), _size(part)
    # Without a mark of the server's version, only a checksum can tell whether two pieces belong together.
    if known.get("url") != url or not (known.get("mark") or checksum) or have > (size or have):
        have = 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "scvi-ext"}  # ranges are those of the file as it is
    if have:
        headers["Range"] = f"bytes={have}-"
        if known.get("mark"):
            headers["If-Range"] = known["mark"]
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if have and response.status_code == requests.codes.requested_range_not_satisfiable:
            if _range(response) == (None, have) and _mark(response) in (None, known.get("mark")):
                return True  # nothing is missing
        else:
            response.raise_for_status()
            goes_on = bool(have) and response.status_code == requests.codes.partial_content
            total = _range(response)[1] if goes_on else _length(response)
            packed = response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip")
            same = (_range(response)[0], packed) == (have, known.get("packed")) and known.get("total") in (None, total)
            if not goes_on or (same and _mark(response) in (None, known.get("mark"))):
                have = have if goes_on else 0
                mark = known.get("mark") if goes_on else _mark(response)
                note = {"url": url, "mark": mark, "total": total, "packed": packed}
                _beside(part, "json").write_text(json.dumps(note))
                _receive(response, part, have, total)
                return goes_on
    _discard(part)  # the file there is another one now
    return _transfer(url, part, checksum, size)


def _receive(response: Response, part: Path, have: int, total: int | None) -> None:
    import requests
    from urllib3.exceptions import HTTPError

    bar = progress_bar(total, part.stem, "B", None, done=have, unit_scale=True, unit_divisor=1024)
    with part.open("ab" if have else "wb") as file, bar:
        try:
            # As they are sent, packed or not: sizes and ranges are those of these bytes.
            for piece in response.raw.stream(_PIECE, decode_content=False):
                file.write(piece)
                bar.update(len(piece))
        except HTTPError as error:
            raise requests.ConnectionError(error) from error
    if total is not None and _size(part) < total:
        msg = f"the connection ended after {_size(part)} of {total} bytes"
        raise requests.ConnectionError(msg)


def _unpacked(part: Path, path: Path) -> Path:
    """The file without what the server has packed it into, although it was asked not to; ``part``, if that is it.

    Servers also call files packed that are kept that way, ``.csv.gz`` for example, and these stay as they are.
    """
    if not _read_json(_beside(part, "json")).get("packed"):
        return part
    unpacked = _beside(part, "unpacked")
    try:
        with gzip.open(part) as content:
            if path.suffix.lower() in (".gz", ".tgz") and content.read(len(_GZIP)) != _GZIP:
                return part
            content.seek(0)
            with unpacked.open("wb") as file:
                shutil.copyfileobj(content, file)
    except (EOFError, gzip.BadGzipFile, zlib.error):  # it is not what the server calls it
        return part
    return unpacked


def _mark(response: Response) -> str | None:
    """What tells this version of the file from others: the tag that the server gives it, or else its date."""
    tag = response.headers.get("ETag", "")
    strong = tag if tag.startswith('"') else ""  # a weak one may be that of a file with other bytes
    return strong or response.headers.get("Last-Modified")


def _range(response: Response) -> tuple[int | None, int | None]:
    """First byte of what is sent, and size of the whole file: ``bytes 5-9/10``, ``bytes */10``, ``bytes 5-9/*``."""
    span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes").strip().partition("/")
    first = span.partition("-")[0]
    return int(first) if first.isdecimal() else None, int(total) if total.isdecimal() else None


def _length(response: Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _passes(error: Exception) -> bool:
    """Whether it makes sense to try again."""
    import requests

    if isinstance(error, requests.HTTPError):
        return error.response.status_code in _TRANSIENT
    return isinstance(error, requests.ConnectionError | requests.Timeout)


def _cannot(url: str, path: Path, error: Exception) -> str:
    answer = getattr(error, "response", None)
    reason = type(error).__name__ if answer is None else f"{answer.status_code} {answer.reason}"
    kept = _size(_beside(path, "part"))
    return (
        f"{path.name!r} is not in {str(path.parent)!r} and cannot be downloaded ({reason}). "
        + (f"The {kept} bytes that were are kept, and the next call goes on from there. " if kept else "")
        + f"Or download {url} elsewhere, and put it there under this name, or into another folder: "
        "sc.settings.datasetdir = ..."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _discard(part: Path) -> None:
    for path in (part, _beside(part, "json"), _beside(part, "unpacked")):
        path.unlink(missing_ok=True)


# ---- archives ------------------------------------------------------------------------------------------------------


def extract(archive: Path, wanted: Callable[[str], bool], folder: Path) -> dict[str, Path]:
    """Extract the files that are wanted from a tar or zip archive straight into a folder, and nothing else.

    Folders in the archive are dropped, so that what it calls its files never decides where one is written; links are
    passed over.

    Parameters
    ----------
    archive
        A tar archive, compressed or not, or a zip archive.
    wanted
        Whether a file is, by its path in the archive.
    folder
        Where to put them; it must exist.

    Returns
    -------
    Name of the file, without folders -> where it is, in the order of the archive.

    Raises
    ------
    ValueError
        Two of the files that are wanted have the same name.
    """
    found: dict[str, Path] = {}

    def put(path: str, open_it: Callable[[], IO[bytes]]) -> None:
        name = PurePosixPath(path.replace("\\", "/")).name
        if name in ("", "..") or not wanted(path):
            return
        if name in found:
            msg = f"{str(archive)!r} has two files that are called {name!r}, the second at {path!r}; one is expected."
            raise ValueError(msg)
        found[name] = folder / name
        with open_it() as content, found[name].open("wb") as file:
            shutil.copyfileobj(content, file)

    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                if not member.is_dir():
                    put(member.filename, partial(opened.open, member))
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.isfile():
                    put(member.name, partial(opened.extractfile, member))
    return found
