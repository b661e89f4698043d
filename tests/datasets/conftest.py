from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.sparse import issparse


@pytest.fixture
def datasetdir(tmp_path, monkeypatch):
    """An empty folder where data sets are kept, and no waiting between attempts to download one."""
    before = sc.settings.datasetdir
    sc.settings.datasetdir = tmp_path / "data"
    monkeypatch.setattr(import_module("scvi_ext.datasets._download"), "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # where a proxy is set, it is not asked for what is on this machine
    yield sc.settings.datasetdir
    sc.settings.datasetdir = before


@dataclass
class Host:
    """A web server for files that the test hands it, which notes what it was asked for and what it has sent."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[dict[str, str]] = field(default_factory=list)  # headers, with "path"
    answers: list[list[int]] = field(default_factory=list)  # bytes of content: one number, which its thread sets
    # How it behaves.
    ranges: bool = True
    marks: bool = True  # sends ETag
    heed_if_range: bool = True
    encoding: str = ""  # which it says that the content has
    cut_after: list[int] = field(default_factory=list)  # of the next answers: bytes before the connection ends
    errors: list[int] = field(default_factory=list)  # of the next answers: status

    @property
    def sent(self) -> list[int]:
        """Bytes of content, of each answer."""
        return [n for (n,) in self.answers]

    def tag(self, name: str) -> str:
        return f'"{hash(self.files[name])}"'


@pytest.fixture
def host():
    """A :class:`Host` on this machine; ``host.files["a.csv"] = b"..."`` is at ``host.url + "a.csv"``."""
    host = Host()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            name = self.path.removeprefix("/")
            host.requests.append({**self.headers, "path": self.path})
            self.n_sent = [0]
            host.answers.append(self.n_sent)
            self.close_connection = True
            if host.errors or name not in host.files:
                return self.answer(host.errors.pop(0) if host.errors else 404, b"", {})
            content, tag = host.files[name], host.tag(name)
            headers = {"ETag": tag} if host.marks else {}
            headers |= {"Content-Encoding": host.encoding} if host.encoding else {}
            first = self.first(tag)
            if first is None:
                return self.answer(200, content, headers)
            if first >= len(content):
                return self.answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
            span = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[first:], {**headers, "Content-Range": span})

        def first(self, tag):
            asked = self.headers.get("Range")
            if asked is None or not host.ranges:
                return None
            if host.heed_if_range and self.headers.get("If-Range", tag) != tag:
                return None
            return int(asked.removeprefix("bytes=").removesuffix("-"))

        def answer(self, status, content, headers):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content)), "Connection": "close"}.items():
                self.send_header(key, value)
            self.end_headers()
            end = host.cut_after.pop(0) if content and host.cut_after else len(content)
            self.n_sent[0] = len(content[:end])  # first: who receives the last byte may look at once
            self.wfile.write(content[:end])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    host.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield host
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def offer(host, datasetdir, monkeypatch):
    """Offer a small file in place of that of a data set: ``offer(module, "_FILE", content, shape)``."""

    def offer(module, name, content, shape=None):
        file = getattr(module, name)
        host.files[file.name] = content
        monkeypatch.setattr(
            module, name, replace(file, url=host.url + file.name, checksum=None, size=None, shape=shape)
        )

    return offer


@pytest.fixture(params=["h5ad", "zarr"])
def roundtrip(request, tmp_path):
    """Write an AnnData in one of the formats that scanpy users keep, and read it again."""

    def write_and_read(adata):
        path = tmp_path / f"adata.{request.param}"
        with warnings.catch_warnings():
            # anndata 0.12 announces here that it will write another version of zarr by default
            warnings.filterwarnings("ignore", message="Writing zarr v2 data", category=UserWarning)
            getattr(adata, f"write_{request.param}")(path)
        return getattr(anndata, f"read_{request.param}")(path)

    return write_and_read


@pytest.fixture(name="assert_same")
def assert_same_fixture():
    """Compare two AnnData, or two of the things that one holds: same values, types and names."""
    return assert_same


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, anndata.AnnData):
        for slot in ("X", "obs", "var"):
            assert_same(getattr(a, slot), getattr(b, slot))
        for slot in ("layers", "obsm", "varm", "uns"):
            assert_same(dict(getattr(a, slot)), dict(getattr(b, slot)))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    elif issparse(a):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a != b).nnz == 0
    else:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
