"""The parser on a small file with the layout of the original: ten lines on cells, an empty one, genes."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import scanpy as sc

import scvi_ext as sx

pytest.importorskip("requests")
module = import_module("scvi_ext.datasets._cortex")

HEADER = {
    "tissue": ["sscortex", "ca1hippocampus", "sscortex", "sscortex"],
    "group #": ["1", "2", "10", "1"],
    "total mRNA mol": ["21580", "21748", "31642", "9999"],
    "well": ["11", "95", "33", "42"],
    "sex": ["1", "-1", "0", "1"],
    "age": ["21", "20", "31", "25"],
    "diameter": ["0", "9.56", "11.1", "11"],
    "cell_id": ["1772071015_C02", "1772071017_G12", "1772071017_A05", "1772071014_B06"],
    "level1class": ["interneurons", "pyramidal CA1", "microglia", "interneurons"],
    "level2class": ["Int10", "(none)", "Mgl1", "Int9"],
}
GENES = ["Tspan12", "Tshz1", "NA", "Tspan12", "Xist_loc2"]
X = np.array([[0, 3, 1, 0], [12, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 255, 0]])


def table(x=X, genes=GENES, header=HEADER) -> bytes:
    lines = ["\t".join(["", name, *values]) for name, values in header.items()]
    lines += ["\t" * (x.shape[1] + 1)]
    lines += ["\t".join([gene, str(k + 1), *map(str, row)]) for k, (gene, row) in enumerate(zip(genes, x, strict=True))]
    return ("\n".join(lines) + "\n").encode()


@pytest.fixture
def small(offer, monkeypatch):
    offer(module, "_FILE", table(), (4, 5))


def test_counts_and_names(small):
    adata = sx.datasets.cortex()
    np.testing.assert_array_equal(adata.X.toarray(), X.T)
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    assert list(adata.obs_names) == HEADER["cell_id"]
    assert list(adata.var_names) == ["Tspan12", "Tshz1", "NA", "Tspan12-1", "Xist_loc2"]


def test_what_is_known_of_the_cells(small, roundtrip, assert_same):
    adata = sx.datasets.cortex()
    obs = adata.obs
    assert list(obs) == "tissue group total_mRNA_mol well sex age diameter level1class level2class".split()
    assert list(obs["level1class"]) == HEADER["level1class"]
    assert list(obs["level2class"]) == HEADER["level2class"]
    assert list(obs["group"].cat.categories) == ["1", "10", "2"]
    assert [str(obs[c].dtype) for c in ("total_mRNA_mol", "well", "age", "diameter")] == ["int64"] * 3 + ["float64"]
    assert obs["diameter"].tolist() == [0, 9.56, 11.1, 11]
    assert obs["total_mRNA_mol"].tolist() == [21580, 21748, 31642, 9999]
    assert {"category"} == {str(obs[c].dtype) for c in ("tissue", "group", "sex", "level1class", "level2class")}
    assert_same(roundtrip(adata), adata)


def test_it_can_be_set_up(small):
    adata = sx.datasets.cortex()
    sc.pp.filter_genes(adata, min_cells=1)
    sx.pp.setup_anndata(adata, labels_key="level1class")


def test_the_genes_that_vary_most(offer):
    rng = np.random.default_rng(0)
    n_cells, marker = 60, [7, 3, 19]
    x = rng.poisson(3.0, (25, n_cells))
    x[marker] = rng.poisson(np.where(np.arange(n_cells) % 2, 20.0, 0.1), (3, n_cells))
    header = {name: [values[0]] * n_cells for name, values in HEADER.items()}
    header["cell_id"] = [f"c{i}" for i in range(n_cells)]
    offer(module, "_FILE", table(x, [f"g{i}" for i in range(25)], header), (n_cells, 25))
    adata = sx.datasets.cortex(n_genes=3)
    assert list(adata.var_names) == ["g3", "g7", "g19"]
    np.testing.assert_array_equal(adata.X.toarray(), x[sorted(marker)].T)
    assert not adata.uns
    assert not adata.is_view
    assert list(adata.var) == []


@pytest.mark.parametrize(
    ("n_genes", "error", "says"),
    [
        (0, ValueError, "n_genes=0 must be 1 or more"),
        (6, ValueError, "n_genes=6 is more than the 5 that there are"),
        (2.5, TypeError, r"n_genes=2\.5 is a float; a whole number"),
        ("5", TypeError, "n_genes='5' is a str; a whole number"),
    ],
)
def test_a_number_of_genes_that_is_not_possible(small, n_genes, error, says, host):
    with pytest.raises(error, match=says):
        sx.datasets.cortex(n_genes=n_genes)
    assert host.requests == []


def test_another_file(offer):
    offer(module, "_FILE", table(), (3005, 19972))
    with pytest.raises(
        ValueError, match=r"has 4 cells and 5 genes, expected 3005 cells and 19972 genes.*delete it from"
    ):
        sx.datasets.cortex()
    offer(module, "_FILE", table(header={k: v for k, v in HEADER.items() if k != "sex"} | {"gender": HEADER["sex"]}))
    (sc.settings.datasetdir / module._FILE.name).unlink()
    assert not (sc.settings.datasetdir / f"{module._FILE.name}.sha256").exists()
    with pytest.raises(ValueError, match="lacks 'sex' in its first 10 lines"):
        sx.datasets.cortex()


@pytest.mark.parametrize(
    ("entry", "says"), [("0.5", "no counts: '0.5'"), ("-1", "no counts: '-1'"), ("", "no numbers"), ("nan", "no ")]
)
def test_what_is_no_count(offer, entry, says):
    x = X.astype(object)
    x[1, 2] = entry
    offer(module, "_FILE", table(x), (4, 5))
    with pytest.raises(ValueError, match=says):
        sx.datasets.cortex()


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"<html>Please log in</html>\n", "cannot be read"), (b"", "is empty"), (table()[:100], "lacks ")],
)
def test_what_is_no_table(offer, content, says):
    offer(module, "_FILE", content, (4, 5))
    with pytest.raises(ValueError, match=rf"'{module._FILE.name}' {says}.*http://127.*delete it from"):
        sx.datasets.cortex()
    assert not list(sc.settings.datasetdir.glob("*.sha256"))
