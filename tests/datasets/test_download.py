"""The downloader against a web server on this machine that cuts connections, changes files and forgets ranges."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import numpy as np
import pytest
import scanpy as sc

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._download")
NAME = "counts.bin"
CONTENT = np.random.default_rng(0).bytes(400_000)
OTHER = np.random.default_rng(1).bytes(400_000)
NOBODY = f"http://127.0.0.1:9/{NAME}"  # the port "discard", where nobody listens


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


RIGHT = sha256(CONTENT)


@pytest.fixture
def fetch(datasetdir, host):
    """Download ``NAME`` from the host, which has ``CONTENT`` there."""
    host.files[NAME] = CONTENT

    def call(checksum=RIGHT, **options):
        return module.download(host.url + NAME, NAME, checksum, **options)

    return call


def cut_off(fetch, host, after=150_000):
    """Have a download end after so many bytes, as it does when the machine goes to sleep; what is left there."""
    host.cut_after, host.errors = [after], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ATTEMPTS", 1)
        with pytest.raises(OSError, match=rf"{NAME}.*cannot be downloaded .*bytes that were are kept"):
            fetch()
    kept = (sc.settings.datasetdir / f"{NAME}.part").read_bytes()
    assert 0 < len(kept) <= after
    assert CONTENT.startswith(kept)
    host.requests.clear()
    host.answers.clear()
    return len(kept)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what is downloaded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sha256", "md5", "git"])
def test_a_file_is_downloaded_once_and_verified(fetch, host, datasetdir, logged, kind):
    whole = b"blob %d\0" % len(CONTENT) + CONTENT if kind == "git" else CONTENT
    checksum = f"{kind}:{hashlib.new('sha1' if kind == 'git' else kind, whole).hexdigest()}"
    path = fetch(checksum, size=len(CONTENT))
    assert path == datasetdir / NAME
    assert path.read_bytes() == CONTENT
    assert left(datasetdir) == [NAME, f"{NAME}.json"]
    assert f"downloaded {host.url}{NAME}\n    400000 bytes, to {str(path)!r}" in logged()
    assert fetch(checksum) == path
    assert len(host.requests) == 1


def test_the_checksum_of_git_is_what_git_says(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"counts\n")
    # printf 'counts\n' | git hash-object --stdin
    said = subprocess.run(["git", "hash-object", str(path)], capture_output=True, text=True, check=False)
    if said.returncode:
        pytest.skip("no git here")
    assert module._digest(path, "git") == f"git:{said.stdout.strip()}"


def test_an_empty_file(datasetdir, host):
    host.files["empty"] = b""
    assert module.download(host.url + "empty", "empty", sha256(b"")).read_bytes() == b""


@pytest.mark.parametrize("name", ["../a", "a/b", "/a", "..", "", "a/"])
def test_a_name_stays_in_the_folder(datasetdir, name):
    with pytest.raises(ValueError, match=r"file_name=.* must be the name of a file"):
        module.download(NOBODY, name, None)


def test_passing_failures_are_tried_again(fetch, host):
    host.errors = [503, 429, 500]
    assert fetch().read_bytes() == CONTENT
    assert len(host.requests) == 4


def test_waits_grow(fetch, host, monkeypatch):
    waits = []
    monkeypatch.setattr(module, "sleep", waits.append)
    host.errors = [503] * 9
    with pytest.raises(OSError, match="503 Service Unavailable"):
        fetch()
    assert waits == [1, 2, 4]


def test_a_file_that_does_not_exist_is_asked_for_once(fetch, host, datasetdir):
    del host.files[NAME]
    with pytest.raises(OSError, match=r"not in .* and cannot be downloaded \(404 Not Found\)"):
        fetch()
    assert len(host.requests) == 1
    assert left(datasetdir) == []


def test_no_network(datasetdir):
    with pytest.raises(
        OSError, match=rf"'{NAME}' is not in .*ConnectionError.*Or download {NOBODY}.*datasetdir"
    ) as error:
        module.download(NOBODY, NAME, sha256(CONTENT))
    assert str(datasetdir) in str(error.value)


@pytest.mark.parametrize("package", ["requests", "filelock"])
def test_without_what_downloads(datasetdir, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}, which is not installed: .*scvi-ext\[data\]"):
        module.download(NOBODY, NAME, None)


# ---- what goes on where it stopped ---------------------------------------------------------------------------------


def test_a_cut_connection_goes_on_by_itself(fetch, host):
    host.cut_after = [100_000, 100_000, 100_000]
    assert fetch().read_bytes() == CONTENT
    starts = [int(r["Range"].removeprefix("bytes=").removesuffix("-")) for r in host.requests if "Range" in r]
    assert len(starts) == 3
    assert starts == sorted(starts)
    assert starts[0] > 0
    assert sum(host.sent) < len(CONTENT) + 3 * module._PIECE  # and not four times the file


def test_any_number_of_cuts_as_long_as_it_gets_on(fetch, host):
    host.cut_after = [70_000] * 5
    assert fetch().read_bytes() == CONTENT
    assert len(host.requests) == 6 > module._ATTEMPTS


def test_the_next_call_goes_on(fetch, host, datasetdir):
    kept = cut_off(fetch, host)
    assert fetch().read_bytes() == CONTENT
    assert [r["Range"] for r in host.requests] == [f"bytes={kept}-"]
    assert host.requests[0]["If-Range"] == host.tag(NAME)
    assert host.sent == [len(CONTENT) - kept]
    assert left(datasetdir) == [NAME, f"{NAME}.json"]


def test_an_interrupt_keeps_what_there_is(fetch, host, datasetdir, monkeypatch, logged):
    receive = module._receive

    def interrupted(response, part, have, total):
        stream = response.raw.stream

        def impatient(size, **options):
            yield next(stream(size, **options))
            raise KeyboardInterrupt

        response.raw.stream = impatient
        receive(response, part, have, total)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch()
    assert f"interrupted: {module._PIECE} bytes of {NAME!r} are kept" in logged()
    assert fetch().read_bytes() == CONTENT
    assert host.requests[-1]["Range"] == f"bytes={module._PIECE}-"


@pytest.mark.parametrize("heed_if_range", [True, False])
@pytest.mark.parametrize("change", ["content", "size"])
def test_a_file_that_has_changed_is_downloaded_anew(fetch, host, heed_if_range, change):
    cut_off(fetch, host)
    host.heed_if_range = heed_if_range
    host.files[NAME] = new = OTHER if change == "content" else OTHER[:300_000]
    assert fetch(sha256(new)).read_bytes() == new
    assert host.sent[-1] == len(new)
    assert "Range" in host.requests[0]


def test_a_file_that_has_shrunk_below_what_is_there(fetch, host):
    cut_off(fetch, host)
    host.heed_if_range = False  # so that it answers 416
    host.files[NAME] = OTHER[:1000]
    assert fetch(sha256(OTHER[:1000])).read_bytes() == OTHER[:1000]


def test_a_server_without_marks_is_checked_by_the_checksum(fetch, host, logged):
    host.marks = False
    kept = cut_off(fetch, host)
    assert fetch().read_bytes() == CONTENT
    assert host.sent == [len(CONTENT) - kept]
    (sc.settings.datasetdir / NAME).unlink()
    cut_off(fetch, host)
    host.files[NAME] = OTHER  # of the same size
    assert fetch(sha256(OTHER)).read_bytes() == OTHER
    assert "do not belong together" in logged()


def test_without_marks_and_checksum_nothing_goes_on(fetch, host):
    host.marks = False
    cut_off(fetch, host)
    host.files[NAME] = OTHER
    assert fetch(None).read_bytes() == OTHER
    assert "Range" not in host.requests[0]


def test_another_address_starts_anew(fetch, host):
    cut_off(fetch, host)
    host.files["elsewhere"] = OTHER
    assert module.download(host.url + "elsewhere", NAME, sha256(OTHER)).read_bytes() == OTHER
    assert "Range" not in host.requests[0]


def test_a_server_without_ranges_starts_anew(fetch, host):
    host.ranges = False
    cut_off(fetch, host)
    assert fetch().read_bytes() == CONTENT
    assert host.sent == [len(CONTENT)]


def test_all_bytes_are_there_already(fetch, host, datasetdir):
    cut_off(fetch, host)
    (datasetdir / f"{NAME}.part").write_bytes(CONTENT)
    assert fetch().read_bytes() == CONTENT
    assert host.sent == [0]  # answered 416


def test_notes_that_cannot_be_read_start_anew(fetch, host, datasetdir):
    cut_off(fetch, host)
    (datasetdir / f"{NAME}.part.json").write_text("{")
    assert fetch().read_bytes() == CONTENT
    assert host.sent == [len(CONTENT)]


# ---- what is not the right file ------------------------------------------------------------------------------------


def test_a_wrong_file_is_never_in_place(fetch, host, datasetdir):
    host.files[NAME] = b"<html>Please log in</html>"
    with pytest.raises(
        ValueError, match=r"not 'counts\.bin': its checksum is sha256:\w{64}, expected sha256:\w{64}"
    ) as error:
        fetch()
    assert sha256(host.files[NAME]) in str(error.value)
    assert sha256(CONTENT) in str(error.value)
    assert left(datasetdir) == []


def test_a_file_of_the_wrong_size_is_never_in_place(fetch, datasetdir):
    with pytest.raises(ValueError, match="it has 400000 bytes, expected 399999"):
        fetch(None, size=399_999)
    assert left(datasetdir) == []


def test_a_wrong_continuation_is_downloaded_anew_once(fetch, host, datasetdir):
    cut_off(fetch, host)
    part = datasetdir / f"{NAME}.part"
    part.write_bytes(bytes(part.stat().st_size))  # a disk that has lost what was written
    assert fetch().read_bytes() == CONTENT
    assert host.sent[-1] == len(CONTENT)


def test_a_file_put_there_by_hand(fetch, host, datasetdir):
    datasetdir.mkdir()
    (datasetdir / NAME).write_bytes(CONTENT)
    assert fetch(size=len(CONTENT)).read_bytes() == CONTENT
    (datasetdir / NAME).write_bytes(OTHER)
    with pytest.raises(ValueError, match=r"not the file it should be: its checksum is .* Delete it") as error:
        fetch()
    assert sha256(OTHER) in str(error.value)
    assert (datasetdir / NAME).read_bytes() == OTHER  # it is the user's
    assert host.requests == []


def test_all_at_once_download_it_once(fetch, host, datasetdir):
    """Several users, or workers of one, may begin on the same empty folder."""
    with ThreadPoolExecutor(4) as pool:
        paths = {future.result() for future in [pool.submit(fetch) for _ in range(4)]}
    assert len(paths) == len(host.requests) == 1
    assert left(datasetdir) == [NAME, f"{NAME}.json"]


def test_what_is_there_needs_no_network_and_no_library(fetch, monkeypatch):
    path = fetch()
    monkeypatch.setitem(__import__("sys").modules, "requests", None)
    assert fetch() == path


def test_a_large_file_is_read_again_when_it_has_changed(fetch, datasetdir, monkeypatch):
    monkeypatch.setattr(module, "_ALWAYS_HASHED", 1000)
    path = fetch()
    assert left(datasetdir) == [NAME, f"{NAME}.json", f"{NAME}.verified"]
    digest, read = module._digest, []
    monkeypatch.setattr(module, "_digest", lambda *args: read.append(args) or digest(*args))
    fetch()
    assert read == []
    path.write_bytes(OTHER)  # of the same size, later
    with pytest.raises(ValueError, match="its checksum is"):
        fetch()
    path.write_bytes(CONTENT)
    fetch()
    assert len(read) == 2
    with pytest.raises(ValueError, match="its checksum is"):
        fetch(sha256(OTHER))  # it was another checksum that was verified
    note = json.loads((datasetdir / f"{NAME}.verified").read_text())
    assert note["checksum"] == sha256(CONTENT)


def test_without_a_published_checksum_the_first_one_holds(fetch, host, datasetdir, logged):
    path = fetch(None)
    note = datasetdir / f"{NAME}.sha256"
    assert not note.exists()  # until it was read
    module.keep_first_checksum(path)
    assert note.read_text() == f"{sha256(CONTENT).removeprefix('sha256:')}  {NAME}\n"
    assert "nobody has published a checksum" in logged()
    module.keep_first_checksum(fetch(None))
    assert logged().count("nobody has published") == 1
    path.write_bytes(OTHER)
    with pytest.raises(
        ValueError, match=rf"its checksum is .* If it is the right one after all, delete '{NAME}\.sha256'"
    ):
        fetch(None)
    path.unlink()
    host.files[NAME] = OTHER
    with pytest.raises(ValueError, match=rf"its checksum is .* delete '{NAME}\.sha256'"):
        fetch(None)
    note.unlink()
    assert fetch(None).read_bytes() == OTHER


def test_a_folder_that_cannot_be_written_can_be_read(fetch, datasetdir, monkeypatch):
    """Root may write everywhere, so that the refusal is played."""
    path = fetch(None)
    monkeypatch.setattr(type(path), "write_text", refuse)
    monkeypatch.setattr(module, "_ALWAYS_HASHED", 0)
    module.keep_first_checksum(fetch(None))
    assert fetch() == path


def refuse(*args, **kwargs):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_that_cannot_be_made(fetch, datasetdir):
    datasetdir.write_bytes(b"a file")
    with pytest.raises(OSError, match=rf"'{NAME}' cannot be written into .*\(File exists\).*datasetdir = ") as error:
        fetch()
    assert str(datasetdir) in str(error.value)


def test_a_folder_that_may_not_be_written(fetch, datasetdir, monkeypatch):
    monkeypatch.setattr(module, "_fetch", refuse)
    with pytest.raises(PermissionError, match=rf"'{NAME}' cannot be written into .*\(Permission denied\)"):
        fetch()


def test_a_full_disk_keeps_what_there_is(fetch, host, datasetdir, monkeypatch):
    bar = module.progress_bar

    class Full:
        """Fills up with the second piece."""

        def __init__(self, *args, **options):
            self.pieces, self.bar = 0, bar(*args, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.bar.close()

        def update(self, n):
            self.pieces += 1
            if self.pieces == 2:
                raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "progress_bar", Full)
        with pytest.raises(OSError, match=rf"'{NAME}' cannot be written into .*\(No space left on device\)") as error:
            fetch()
    assert error.value.errno == errno.ENOSPC
    assert str(datasetdir) in str(error.value)
    assert len(host.requests) == 1
    assert fetch().read_bytes() == CONTENT
    assert host.requests[1]["Range"] == f"bytes={2 * module._PIECE}-"


# ---- where it is from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, RIGHT])
def test_a_file_from_elsewhere_is_not_taken_for_this_one(fetch, host, first):
    path = fetch(first)
    host.files["other"] = OTHER
    with pytest.raises(
        ValueError, match=rf"{NAME}' was downloaded from {host.url}{NAME}, and not from {host.url}other"
    ):
        module.download(host.url + "other", NAME, None)
    assert module.download(host.url + "other", NAME, RIGHT) == path  # it is the file that was asked for
    path.unlink()
    assert module.download(host.url + "other", NAME, None).read_bytes() == OTHER
    with pytest.raises(ValueError, match=r"was downloaded from .*other"):
        fetch(None)


# ---- what is packed ------------------------------------------------------------------------------------------------

PACKED = gzip.compress(CONTENT)


@pytest.fixture
def fetch_packed(datasetdir, host):
    """Download a file of a host that calls what it sends packed."""
    host.encoding = "gzip"

    def call(name, sent, checksum=None):
        host.files[name] = sent
        return module.download(host.url + name, name, checksum).read_bytes()

    return call


@pytest.mark.parametrize("cuts", [[], [150_000, 100_000]])
@pytest.mark.parametrize(
    ("name", "sent", "expected"),
    [
        ("x.csv.gz", PACKED, PACKED),  # kept packed, and called packed
        ("X.TGZ", PACKED, PACKED),
        ("x.csv.gz", gzip.compress(PACKED), PACKED),  # packed once more for the way
        ("x.csv", PACKED, CONTENT),
        ("x.csv", CONTENT, CONTENT),  # called packed, which it is not
    ],
)
def test_what_a_server_calls_packed(fetch_packed, host, datasetdir, name, sent, expected, cuts):
    host.cut_after = list(cuts)
    assert fetch_packed(name, sent, sha256(expected)) == expected
    assert [r.get("Range") is not None for r in host.requests] == [False, *[True] * len(cuts)]
    assert sum(host.sent) < len(sent) + (len(cuts) + 1) * module._PIECE
    assert left(datasetdir) == [name, f"{name}.json"]


def test_pieces_packed_and_not_packed_are_not_put_together(fetch_packed, host):
    host.cut_after, host.heed_if_range = [150_000], False

    def once(piece):
        host.encoding = ""
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sleep", once)
        assert fetch_packed("x.csv.gz", PACKED) == PACKED
    assert host.sent[-1] == len(PACKED)


# ---- archives ------------------------------------------------------------------------------------------------------


def archive(path, files):
    """A tar or zip archive of name -> content; a name on the other side of "->" is a link to it."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as opened:
            for name, content in files.items():
                opened.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as opened:
        for name, content in files.items():
            name, _, target = name.partition("->")
            member = tarfile.TarInfo(name)
            member.size = 0 if target else len(content)
            member.type, member.linkname = (tarfile.SYMTYPE, target) if target else (tarfile.REGTYPE, "")
            opened.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_only_what_is_wanted_is_extracted_and_never_elsewhere(tmp_path, suffix):
    folder = tmp_path / "in"
    folder.mkdir()
    files = {
        "top/a/1.csv": b"1",
        "top/readme.txt": b"no",
        "../../2.csv": b"2",
        f"{tmp_path}/3.csv": b"3",
        "..": b"4",
    }
    if suffix != "zip":
        files["5.csv->/etc/passwd"] = b""
    wanted = lambda name: name.endswith((".csv", ".."))  # noqa: E731
    found = module.extract(archive(tmp_path / f"x.{suffix}", files), wanted, folder)
    assert {name: path.read_bytes() for name, path in found.items()} == {"1.csv": b"1", "2.csv": b"2", "3.csv": b"3"}
    assert all(path.resolve() == folder.resolve() / name for name, path in found.items())
    assert sorted(path.name for path in folder.iterdir()) == list(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", f"x.{suffix}"]


def test_two_files_of_one_name_are_not_taken_for_each_other(tmp_path):
    two = archive(tmp_path / "x.zip", {"hg19/matrix.mtx": b"1", "mm10/matrix.mtx": b"2"})
    with pytest.raises(ValueError, match=r"two files that are called 'matrix\.mtx', the second at 'mm10/matrix\.mtx'"):
        module.extract(two, lambda name: True, tmp_path)
