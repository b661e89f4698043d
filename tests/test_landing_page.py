"""docs/index.md: its blocks, copied beside a folder of Cell Ranger, lead to a UMAP in which cell types are apart."""

from __future__ import annotations

import code
import gzip
import re
from pathlib import Path

import anndata as ad
import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc
import scipy.io
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors

import scvi_ext as sx

PAGE = (Path(__file__).parents[1] / "docs" / "index.md").read_text(encoding="utf-8")
TABS = ("One sample", "Several samples")
N_TYPES, N_CELLS, N_GENES, N_MITO = 4, 320, 2400, 13
EMPTY, DYING, LEAST = 40, 40, 5  # droplets without a cell, dying cells, and genes that hardly any cell has


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"^(?:```|~~~){language}\n(.*?)^(?:```|~~~)$", text, re.M | re.S)


def write_10x_folder(folder: Path, seed: int, shift: float = 0.0) -> dict[str, int]:
    """Write what Cell Ranger writes, of planted types. Returns the type of each cell by barcode; -1 is no cell."""
    planted, rng = np.random.default_rng(0), np.random.default_rng(seed)
    mito = np.arange(N_GENES) < N_MITO
    level = np.exp(planted.normal(0, 1.5, N_GENES))
    level[mito] = level[~mito].sum() / 25 / N_MITO  # 4 % of the counts
    level[-LEAST:] = 0
    profile = level * np.where(planted.random((N_TYPES, N_GENES)) < 0.03, 8.0, 1.0)
    profile *= np.exp(shift * rng.standard_normal(N_GENES))  # of the sample
    profile /= profile.sum(axis=1, keepdims=True)

    types = np.arange(N_CELLS) % N_TYPES
    depth = np.exp(rng.normal(np.log(4000), 0.4, (N_CELLS, 1)))
    cells = rng.negative_binomial(5, 5 / (5 + depth * profile[types]))
    empty = rng.poisson(60 * profile.mean(axis=0), (EMPTY, N_GENES))
    dying = rng.poisson(1500 * (0.3 * profile.mean(axis=0) + 0.7 * mito / N_MITO), (DYING, N_GENES))
    counts = np.concatenate([cells, empty, dying])
    counts[0, -1] = 1  # in one cell only

    symbols = [f"MT-{i}" if mito[i] else f"Gene{i}" for i in range(N_GENES)]
    symbols[101] = symbols[100]  # as there are in every annotation
    ids = [f"ENSG{i:011d}" for i in range(N_GENES)]
    barcodes = sorted({"".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(len(counts) + 5)})[: len(counts)]

    folder.mkdir(parents=True)
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(counts.T))
    features = "".join(f"{ids[i]}\t{symbols[i]}\tGene Expression\n" for i in range(N_GENES))
    (folder / "features.tsv.gz").write_bytes(gzip.compress(features.encode()))
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress("".join(f"{b}\n" for b in barcodes).encode()))
    return dict(zip(barcodes, [*types, *[-1] * (EMPTY + DYING)], strict=True))


def share_of_neighbors(points: np.ndarray, labels: np.ndarray) -> float:
    """How many of the 15 nearest cells have the label of the cell."""
    index = NearestNeighbors(n_neighbors=16).fit(points).kneighbors(points, return_distance=False)[:, 1:]
    return float((labels[index] == labels[:, None]).mean())


class Console(code.InteractiveConsole):
    """The interactive interpreter, in which an error ends the session."""

    def showsyntaxerror(self, *_: object, **__: object) -> None:
        raise

    def showtraceback(self) -> None:
        raise


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Paste blocks into Python in an otherwise empty folder, one after the other and line by line."""
    monkeypatch.chdir(tmp_path)

    def run(*parts: str) -> dict[str, object]:
        console = Console()
        for line in "\n".join(parts).splitlines():
            unfinished = console.push(line)
        assert not unfinished
        plt.close("all")
        return console.locals

    return run


def test_there_are_three_blocks_in_each_tab():
    (install,) = blocks("bash")
    assert "pip install" in install
    assert install.endswith("/bin/python\n")  # which takes the other two
    per_tab = blocks("python")
    assert len(per_tab) == 2 * len(TABS)
    assert [PAGE.count(f"{{tab-item}} {tab}") for tab in TABS] == [2, 2]
    assert ["batch_key" in block for block in per_tab] == [False, True, False, True]


def test_one_sample(stranger, tmp_path):
    truth = write_10x_folder(tmp_path / "filtered_feature_bc_matrix", seed=1)
    read, _, fit, _ = blocks("python")
    adata = stranger(read, fit)["adata"]

    types = np.array([truth[barcode] for barcode in adata.obs_names])
    assert (types >= 0).all(), "droplets and dying cells are left out"
    assert len(types) > 0.95 * N_CELLS
    assert adata.n_vars == 2000
    assert adata.obsm["X_umap"].shape == (adata.n_obs, 2)
    # By chance it would be 1/4. A type of 80 cells has room for 15 neighbours.
    assert share_of_neighbors(adata.obsm["X_scvi"], types) > 0.95
    assert share_of_neighbors(adata.obsm["X_umap"], types) > 0.95
    assert (tmp_path / "figures" / "umap.png").stat().st_size > 10_000

    again = ad.read_h5ad(tmp_path / "fitted.h5ad")
    sx.tl.get_latent(again, key_added="again")
    np.testing.assert_array_equal(again.obsm["again"], adata.obsm["X_scvi"])


@pytest.mark.filterwarnings("ignore:Variable names are not unique")  # before the next line makes them so
def test_one_sample_as_one_file(stranger, tmp_path):
    """The line that is commented out, with the file that Cell Ranger writes beside the folder."""
    write_10x_folder(tmp_path / "filtered_feature_bc_matrix", seed=1)
    read = blocks("python")[0]
    of_folder = stranger(read)["adata"]
    written = sc.read_10x_mtx("filtered_feature_bc_matrix", var_names="gene_ids")
    with h5py.File("filtered_feature_bc_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        matrix["shape"] = np.array(written.shape[::-1], dtype=np.int32)
        counts = sp.csr_matrix(written.X)
        matrix["data"], matrix["indices"], matrix["indptr"] = counts.data, counts.indices, counts.indptr
        matrix["barcodes"] = written.obs_names.to_numpy().astype("S")
        features = {"id": written.var_names, "name": written.var["gene_symbols"], "feature_type": ["Gene Expression"]}
        for name, values in (features | {"genome": ["GRCh38"]}).items():
            matrix[f"features/{name}"] = np.broadcast_to(np.array(values).astype("S"), written.n_vars)
    (line,) = re.findall(r"^adata = sc.read_10x_mtx.*\n", read, re.M)
    of_file = stranger(read.replace(line, "").replace("# adata = sc.read_10x_h5", "adata = sc.read_10x_h5"))["adata"]
    assert of_file.var_names.equals(of_folder.var_names)
    assert abs(of_file.X - of_folder.X).sum() == 0


def test_several_samples(stranger, tmp_path):
    truth = {}
    for seed, name in enumerate(("control", "treated")):
        folder = tmp_path / name / "filtered_feature_bc_matrix"
        truth |= {f"{barcode}-{name}": t for barcode, t in write_10x_folder(folder, seed, shift=0.4).items()}
    _, read, _, fit = blocks("python")
    adata = stranger(read, fit)["adata"]

    types = np.array([truth[barcode] for barcode in adata.obs_names])
    assert (types >= 0).all()
    assert adata.obs["sample"].value_counts().min() > 0.95 * N_CELLS
    assert share_of_neighbors(adata.obsm["X_umap"], types) > 0.95
    # Half of the neighbours at best. Without batch_key it is 0.999 and more, with it 0.64 to 0.78 in four draws.
    samples = adata.obs["sample"].cat.codes.to_numpy()
    assert share_of_neighbors(adata.obsm["X_scvi"], samples) < 0.9
    assert (tmp_path / "figures" / "umap.png").is_file()
