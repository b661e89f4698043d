"""The parsers on small files with the layout of the originals, one of which is at hand."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import h5py
import numpy as np
import pytest
import scanpy as sc

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._loom")
SHARED = Path(__file__).parents[3] / "shared" / "data"

X = np.array([[0, 3, 1], [12, 0, 0], [1, 1, 5], [0, 0, 2]])  # cells x genes
GENES = ["acss1", "adcyap1", "aqp4"]


def loom(path: Path, cells: dict, x=X, genes=GENES, **attributes) -> bytes:
    """A file of version 2 of the format: genes x cells, text as bytes."""
    with h5py.File(path, "w") as file:
        file["matrix"] = x.T.astype(float)
        file["row_attrs/Gene"] = np.array(genes, dtype="S")
        for name, values in cells.items():
            values = np.asarray(values)
            file[f"col_attrs/{name}"] = values.astype("S") if values.dtype.kind == "U" else values
        for group in ("layers", "col_graphs", "row_graphs"):
            file.create_group(group)
        file.attrs["LOOM_SPEC_VERSION"] = np.bytes_(b"2.0.1")
        for name, values in attributes.items():
            file.attrs[name] = values
    return path.read_bytes()


def column(*values) -> np.ndarray:
    return np.array(values)[:, None]


STARMAP = {
    "BatchID": column(0.0, 0.0, 1.0, 1.0),
    "Clusters": ["Smc", "NA", "Endo", "NA"],
    "Spatial_coordinates": np.array([[92.5, 1062.25], [79.5, 120.0], [142.75, 3444.5], [88.0, 4092.5]]),
}


def assert_is_x(adata, x=X):
    np.testing.assert_array_equal(adata.X.toarray(), x)
    assert (adata.X.format, adata.X.dtype) == ("csr", np.float32)
    assert list(adata.var_names) == GENES


def test_retina(offer, tmp_path, roundtrip, assert_same):
    cells = {"BatchID": column(1.0, 2.0, 1.0, 1.0), "ClusterID": column(0, 14, 2, 0)}
    offer(module, "_RETINA", loom(tmp_path / "a.loom", cells))
    adata = sx.datasets.retina()
    assert_is_x(adata)
    assert list(adata.obs["batch"]) == ["1", "2", "1", "1"]
    assert list(adata.obs["cell_type"]) == ["RBC", "BC8_9", "BC5A", "RBC"]
    assert len(adata.obs["cell_type"].cat.categories) == 15
    assert adata.obs_names.is_unique
    assert_same(roundtrip(adata), adata)
    sx.pp.setup_anndata(adata, labels_key="cell_type")


def test_retina_with_an_unknown_cluster(offer, tmp_path):
    cells = {"BatchID": column(1.0, 2.0, 1.0, 1.0), "ClusterID": column(0, 15, 2, -1)}
    offer(module, "_RETINA", loom(tmp_path / "a.loom", cells))
    with pytest.raises(ValueError, match=r"has the codes '-1', '15', expected 0 to 14"):
        sx.datasets.retina()


def test_starmap(offer, tmp_path, roundtrip, assert_same):
    offer(module, "_STARMAP", loom(tmp_path / "a.loom", STARMAP, CellTypes=np.array(["Smc", "NA"], dtype="S")))
    adata = sx.datasets.prefrontal_cortex_starmap()
    assert_is_x(adata)
    assert list(adata.obs["batch"]) == ["0", "0", "1", "1"]
    assert list(adata.obs["cell_type"]) == ["Smc", "NA", "Endo", "NA"]
    np.testing.assert_array_equal(adata.obsm["spatial"], STARMAP["Spatial_coordinates"])
    assert_same(roundtrip(adata), adata)
    sx.pp.setup_anndata(adata, labels_key="cell_type", unlabeled_category="NA")


def test_the_real_starmap(offer):
    source = SHARED / "mpfc-starmap.loom"
    if not source.exists():
        pytest.skip(f"{source.name} is not there")
    data = sc.settings.datasetdir
    data.mkdir()
    (data / module._STARMAP.name).symlink_to(source)
    assert module._STARMAP.path().exists()  # with the size and checksum that are published
    adata = sx.datasets.prefrontal_cortex_starmap()
    assert adata.shape == (3704, 158)
    with h5py.File(source) as file:
        np.testing.assert_array_equal(adata.X.toarray(), file["matrix"][()].T)
        assert list(adata.var_names) == [name.decode() for name in file["row_attrs/Gene"]]
        np.testing.assert_array_equal(adata.obsm["spatial"], file["col_attrs/Spatial_coordinates"][()])
    assert len(adata.obs["cell_type"].cat.categories) == 16
    assert "NA" in adata.obs["cell_type"].cat.categories
    sx.pp.setup_anndata(adata, batch_key="batch", labels_key="cell_type", unlabeled_category="NA")


@pytest.mark.parametrize(
    "clusters", [column(0, 2, 1, 0), column(0.0, 2.0, 1.0, 0.0), ["Astro", "L5/6", "Endo", "Astro"]]
)
def test_dropseq(offer, tmp_path, clusters):
    types = np.array(["Astro", "Endo", "L5/6", "VIP"], dtype="S")
    cells = {"BatchID": column(1.0, 1.0, 1.0, 2.0), "Clusters": clusters}
    offer(module, "_DROPSEQ", loom(tmp_path / "a.loom", cells, CellTypes=types))
    adata = sx.datasets.frontal_cortex_dropseq()
    assert_is_x(adata)
    assert list(adata.obs["batch"]) == ["1", "1", "1", "2"]
    assert list(adata.obs["cell_type"]) == ["Astro", "L5/6", "Endo", "Astro"]
    sx.pp.setup_anndata(adata, labels_key="cell_type")


def test_cells_without_counts_are_left_out(offer, tmp_path):
    offer(module, "_STARMAP", loom(tmp_path / "a.loom", STARMAP, x=X * [[1], [0], [1], [1]]))
    adata = sx.datasets.prefrontal_cortex_starmap()
    assert_is_x(adata, X[[0, 2, 3]])
    assert list(adata.obs_names) == ["cell_0", "cell_2", "cell_3"]
    np.testing.assert_array_equal(adata.obsm["spatial"], STARMAP["Spatial_coordinates"][[0, 2, 3]])


def test_a_large_matrix_is_read_in_pieces(offer, tmp_path, monkeypatch):
    offer(module, "_STARMAP", loom(tmp_path / "a.loom", STARMAP))
    monkeypatch.setattr("scvi_ext.datasets._files._ENTRIES", 8)  # two genes at once, and one
    assert_is_x(sx.datasets.prefrontal_cortex_starmap())


def test_text_of_any_length(offer, tmp_path):
    """As version 3 of the format has it."""
    path = tmp_path / "a.loom"
    loom(path, STARMAP)
    with h5py.File(path, "a") as file:
        del file["col_attrs/Clusters"], file["row_attrs/Gene"]
        file["col_attrs/Clusters"] = np.array(["Müller", "NA", "Endo", "NA"], dtype=h5py.string_dtype())
        file["row_attrs/Gene"] = np.array(GENES, dtype=h5py.string_dtype())
        file.attrs["CellTypes"] = np.array(["Müller"], dtype=h5py.string_dtype())
    offer(module, "_STARMAP", path.read_bytes())
    adata = sx.datasets.prefrontal_cortex_starmap()
    assert_is_x(adata)
    assert list(adata.obs["cell_type"]) == ["Müller", "NA", "Endo", "NA"]


def test_numbers_that_are_no_counts(offer, tmp_path):
    offer(module, "_STARMAP", loom(tmp_path / "a.loom", STARMAP, x=X / 2))
    with pytest.raises(ValueError, match=r"'mpfc-starmap.loom' has numbers that are no counts: '1.5', '0.5'"):
        sx.datasets.prefrontal_cortex_starmap()
