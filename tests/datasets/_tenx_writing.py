"""Small files as Cell Ranger writes them, from known counts."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from typing import TYPE_CHECKING

import h5py
import numpy as np
import scipy.io
import scipy.sparse as sp

if TYPE_CHECKING:
    from pathlib import Path


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()}"


def git(content: bytes) -> str:
    return f"git:{hashlib.sha1(b'blob %d' % len(content) + bytes(1) + content, usedforsecurity=False).hexdigest()}"


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def matrix_market(counts: np.ndarray) -> bytes:
    out = io.BytesIO()
    scipy.io.mmwrite(out, sp.coo_matrix(counts.T))  # 10x has genes in rows
    return out.getvalue()


def lines(*columns: list[str]) -> bytes:
    return "".join("\t".join(row) + "\n" for row in zip(*columns, strict=True)).encode()


def mex_v2(counts: np.ndarray, barcodes: list[str], ids: list[str], symbols: list[str], folder: str) -> bytes:
    """filtered_gene_bc_matrices.tar.gz of Cell Ranger 1 and 2; what the archive holds besides is passed over."""
    files = {"matrix.mtx": matrix_market(counts), "genes.tsv": lines(ids, symbols), "barcodes.tsv": lines(barcodes)}
    return tar({f"{folder}/{name}": content for name, content in files.items()} | {"readme/notes.txt": b"?"})


def mex_v3(counts: np.ndarray, barcodes: list[str], ids: list[str], symbols: list[str], types: list[str]) -> bytes:
    """filtered_feature_bc_matrix.tar.gz of Cell Ranger 3."""
    files = {"matrix.mtx": matrix_market(counts), "features.tsv": lines(ids, symbols, types)}
    files |= {"barcodes.tsv": lines(barcodes)}
    return tar({f"filtered_feature_bc_matrix/{name}.gz": gzip.compress(text) for name, text in files.items()})


def h5_v2(path: Path, counts: np.ndarray, barcodes: list[str], ids: list[str], symbols: list[str], genome: str):
    matrix = sp.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        group = file.create_group(genome)
        group["data"], group["indices"] = matrix.data.astype(np.int32), matrix.indices.astype(np.int64)
        group["indptr"], group["shape"] = matrix.indptr.astype(np.int64), np.array(counts.shape[::-1], np.int32)
        for key, values in {"barcodes": barcodes, "genes": ids, "gene_names": symbols}.items():
            group[key] = np.array(values, dtype="S")


def h5_v3(path: Path, counts: np.ndarray, barcodes: list[str], features: dict[str, list[str]]):
    """``features``: columns id, name, feature_type and genome."""
    matrix = sp.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"] = matrix.data.astype(np.int32), matrix.indices.astype(np.int64)
        group["indptr"], group["shape"] = matrix.indptr.astype(np.int64), np.array(counts.shape[::-1], np.int32)
        group["barcodes"] = np.array(barcodes, dtype="S")
        for key, values in features.items():
            group[f"features/{key}"] = np.array(values, dtype="S")
        group["features/_all_tag_keys"] = np.array(["genome"], dtype="S")
