"""Every format, from a web server on this machine."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from _tenx_writing import git, h5_v2, h5_v3, md5, mex_v2, tar

import scvi_ext as sx

pytest.importorskip("requests")
COUNTS = np.array([[0, 3, 1], [2, 0, 0], [1, 0, 300]])
CELLS, GENES = ["AA-1", "CC-1", "GG-1"], ["A", "B", "C"]


def check(adata):
    assert isinstance(adata.X, sp.csr_matrix)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs_names) == CELLS
    assert list(adata.var_names) == GENES


@pytest.fixture
def offer(host, datasetdir):
    """Have the host offer a file; its address."""

    def call(name, content):
        host.files[name] = content
        return host.url + name

    return call


@pytest.mark.parametrize(("name", "sep"), [("x.csv", ","), ("x.TSV", "\t"), ("x.txt", " "), ("x.tab.gz", "\t")])
@pytest.mark.parametrize("genes_in_rows", [False, True])
def test_text(offer, name, sep, genes_in_rows):
    table = pd.DataFrame(COUNTS, CELLS, GENES)
    text = (table.T if genes_in_rows else table).to_csv(sep=sep, index_label="name").encode()
    url = offer(name, gzip.compress(text) if name.endswith(".gz") else text)
    check(sx.datasets.from_url(url, genes_in_rows=genes_in_rows))


@pytest.mark.parametrize("name", ["X.CSV", "X.CSV.GZ"])
def test_names_in_upper_case(offer, name):
    text = pd.DataFrame(COUNTS, CELLS, GENES).to_csv().encode()
    check(sx.datasets.from_url(offer(name, gzip.compress(text) if name.endswith("GZ") else text)))


def test_options_of_text_are_those_of_scanpy(offer):
    url = offer("x.csv", pd.DataFrame(COUNTS, CELLS, GENES).to_csv(sep=";").encode())
    check(sx.datasets.from_url(url, delimiter=";"))
    with pytest.raises(TypeError, match=r"no keyword 'sep'.*delimiter, dtype, first_column_names, genes_in_rows\."):
        sx.datasets.from_url("http://127.0.0.1:9/x.csv", sep=";")  # before anything is downloaded


@pytest.fixture
def h5ad(tmp_path):
    adata = ad.AnnData(sp.csr_matrix(COUNTS.astype(np.int64)), obs=pd.DataFrame({"batch": list("xyx")}, index=CELLS))
    adata.var_names = GENES
    adata.write_h5ad(tmp_path / "x.h5ad")
    return (tmp_path / "x.h5ad").read_bytes()


def test_h5ad_is_left_as_it_is(offer, h5ad):
    url = offer("x.h5ad", h5ad)
    adata = sx.datasets.from_url(url)
    assert adata.X.dtype == np.int64
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs["batch"]) == list("xyx")
    backed = sx.datasets.from_url(url, backed="r")
    assert backed.isbacked
    backed.file.close()
    with pytest.raises(TypeError, match=r"no keyword 'genome'.*as_sparse.*backed"):
        sx.datasets.from_url(url, genome="mm10")


@pytest.fixture
def loom(tmp_path):
    with h5py.File(tmp_path / "x.loom", "w") as file:
        file["matrix"] = COUNTS.T
        file["row_attrs/Gene"] = np.array(GENES, dtype="S")
        file["row_attrs/Length"] = np.array([100, 200, 300])
        file["col_attrs/CellID"] = np.array(CELLS, dtype="S")
        file["col_attrs/Cluster"] = np.array(["u", "v", "u"], dtype="S")
        file["col_attrs/Place"] = np.arange(6.0).reshape(3, 2)
        file.create_group("layers")
    return (tmp_path / "x.loom").read_bytes()


def test_loom(offer, loom):
    url = offer("x.loom", loom)
    adata = sx.datasets.from_url(url)
    check(adata)
    assert list(adata.obs["Cluster"]) == ["u", "v", "u"]
    assert list(adata.var["Length"]) == [100, 200, 300]
    np.testing.assert_array_equal(adata.obsm["Place"], np.arange(6.0).reshape(3, 2))
    assert list(adata.obs) == ["Cluster"]
    other = sx.datasets.from_url(url, obs_names="Cluster", var_names="Length")
    assert list(other.obs_names) == ["u", "v", "u-1"]
    assert list(other.var_names) == ["100", "200", "300"]
    with pytest.raises(KeyError, match=r"'Cell' is not in col_attrs of .*'CellID'"):
        sx.datasets.from_url(url, obs_names="Cell")
    with pytest.raises(TypeError, match="no keyword 'genome'"):
        sx.datasets.from_url(url, genome="mm10")


def test_output_of_cell_ranger(offer, tmp_path):
    ids = ["E1", "E2", "E3"]
    check(sx.datasets.from_url(offer("x.tar.gz", mex_v2(COUNTS, CELLS, ids, GENES, "any/hg19"))))
    check(sx.datasets.from_url(offer("x.tgz", mex_v2(COUNTS, CELLS, ids, GENES, "hg19"))))
    h5_v2(tmp_path / "2.h5", COUNTS, CELLS, ids, GENES, "hg19")
    check(sx.datasets.from_url(offer("2.h5", (tmp_path / "2.h5").read_bytes())))
    features = {"id": ids, "name": GENES, "feature_type": ["Gene Expression"] * 3, "genome": ["hg19", "hg19", "mm10"]}
    h5_v3(tmp_path / "3.h5", COUNTS, CELLS, features)
    url = offer("3.h5", (tmp_path / "3.h5").read_bytes())
    check(sx.datasets.from_url(url))
    assert list(sx.datasets.from_url(url, genome="hg19").var_names) == ["A", "B"]
    with pytest.raises(ValueError, match=r"^genome='GRCh38' is not in '\w+-3\.h5', which has 'hg19', 'mm10'\.$"):
        sx.datasets.from_url(url, genome="GRCh38")
    check(sx.datasets.from_url(offer("V2.H5", (tmp_path / "2.h5").read_bytes()), genome="hg19"))
    check(sx.datasets.from_url(offer("V2.TAR.GZ", mex_v2(COUNTS, CELLS, ids, GENES, "hg19"))))
    with pytest.raises(ValueError, match=r"^genome='mm10' is not in '\w+-V2\.H5', which has 'hg19'\.$"):
        sx.datasets.from_url(url.replace("3.h5", "V2.H5"), genome="mm10")
    with pytest.raises(TypeError, match=r"no keyword 'delimiter'.*genome"):
        sx.datasets.from_url(url, delimiter=",")


def test_two_genomes_in_an_archive(offer):
    import io
    import tarfile

    files = {}
    for genome, counts in (("hg19", COUNTS), ("mm10", 2 * COUNTS)):
        part = mex_v2(counts, CELLS, ["E1", "E2", "E3"], GENES, f"filtered_gene_bc_matrices/{genome}")
        with tarfile.open(fileobj=io.BytesIO(part)) as archive:
            files |= {m.name: archive.extractfile(m).read() for m in archive if "readme" not in m.name}
    url = offer("x.tar.gz", tar(files))
    check(sx.datasets.from_url(url, genome="hg19"))
    with pytest.raises(ValueError, match=r"^genome='hg38' is not in .*x\.tar\.gz', which has 'hg19', 'mm10'\.$"):
        sx.datasets.from_url(url, genome="hg38")
    with pytest.raises(ValueError, match=r"x\.tar\.gz' has several genomes, 'hg19', 'mm10'"):
        sx.datasets.from_url(url)


# ---- what is something else ----------------------------------------------------------------------------------------

HTML = b"<html><body>Please log in</body></html>"


def hdf5(path):
    with h5py.File(path, "w") as file:
        file["foo"] = 1
    return path.read_bytes()


@pytest.fixture(params=["html", "empty", "cut", "other"])
def wrong(request, h5ad, loom, tmp_path):
    """Content of a file of this ending that is something else."""
    text = pd.DataFrame(COUNTS, CELLS, GENES).to_csv().encode()
    rng = np.random.default_rng(0)
    whole = {
        ".h5ad": h5ad,
        ".loom": loom,
        ".csv.gz": gzip.compress(rng.integers(9, size=999).astype("S")),
        ".tar.gz": mex_v2(COUNTS, CELLS, ["E1", "E2", "E3"], GENES, "hg19"),
        ".h5": h5ad,
    }
    other = {
        ".h5ad": text,
        ".loom": h5ad,
        ".csv": b"name,A,B\nc1,1,foo\nc2,2,3\n",
        ".csv.gz": text,
        ".tar.gz": tar({"readme": b"?"}),
        ".h5": hdf5(tmp_path / "other"),
    }

    def content(ending):
        cut = whole[ending][: len(whole[ending]) // 2] if ending in whole else b"name,A,B\nc1,1"
        return {"html": HTML, "empty": b"", "cut": cut, "other": other[ending]}[request.param]

    return content


@pytest.mark.parametrize("ending", [".h5ad", ".loom", ".csv", ".csv.gz", ".tar.gz", ".h5"])
def test_what_cannot_be_read_is_named_and_not_vouched_for(offer, wrong, datasetdir, ending):
    url = offer("x" + ending, wrong(ending))
    for _ in range(2):  # the second time it is there already
        with pytest.raises(ValueError, match=rf"^'\w+-x{ending}' .* Unless that is what {url} has, delete it from .*"):
            sx.datasets.from_url(url)
    assert not list(datasetdir.glob("*.sha256"))
    with pytest.raises(ValueError, match=rf"^'\w+-x{ending}' .* right checksum: {url} has another file than it seems"):
        sx.datasets.from_url(url, checksum=md5(wrong(ending)))


def test_what_a_reader_says_is_handed_on(offer, datasetdir):
    url = offer("x.csv", b"name,A,B\nc1,1,foo\nc2,2,3\n")
    with pytest.raises(ValueError, match=r"cannot be read \(could not convert string to float: 'foo'\)") as error:
        sx.datasets.from_url(url)
    assert str(datasetdir) in str(error.value)


def test_what_is_vouched_for_already_is_deleted_with_its_note(offer, datasetdir):
    url = offer("x.csv", pd.DataFrame(COUNTS, CELLS, GENES).to_csv(sep=";").encode())
    sx.datasets.from_url(url, delimiter=";")
    with pytest.raises(ValueError, match=r"delete both it and '\w+-x\.csv\.sha256' from"):
        sx.datasets.from_url(url)


def test_an_archive_without_all_tables(offer):
    url = offer("x.tar.gz", tar({"hg19/matrix.mtx": b"1", "hg19/barcodes.tsv": b"A"}))
    with pytest.raises(ValueError, match=r"has of counts, genes and barcodes only 'matrix\.mtx', 'barcodes\.tsv'"):
        sx.datasets.from_url(url)


# ---- names, checksums, addresses -----------------------------------------------------------------------------------


def test_files_of_one_name_are_not_taken_for_each_other(offer):
    first = offer("a/x.csv", pd.DataFrame(COUNTS, CELLS, GENES).to_csv().encode())
    second = offer("b/x.csv", pd.DataFrame(2 * COUNTS, CELLS, GENES).to_csv().encode())
    for factor, url in ((1, first), (2, second), (1, first)):
        np.testing.assert_array_equal(sx.datasets.from_url(url).X.toarray(), factor * COUNTS)


def test_a_name_that_is_given(offer, host, datasetdir):
    url = offer("download/?acc=1", b"")
    host.files["download/?acc=1"] = pd.DataFrame(COUNTS, CELLS, GENES).to_csv().encode()
    with pytest.raises(ValueError, match=r"cannot be told by its name.*'\.h5ad'.*file_name="):
        sx.datasets.from_url(url)
    check(sx.datasets.from_url(url, file_name="mine.csv"))
    assert (datasetdir / "mine.csv").exists()
    host.files.clear()
    check(sx.datasets.from_url(url, file_name="mine.csv"))  # without the network


def test_a_name_that_is_given_twice(offer):
    content = pd.DataFrame(COUNTS, CELLS, GENES).to_csv().encode()
    first, second = offer("a.csv", content), offer("b.csv", pd.DataFrame(2 * COUNTS, CELLS, GENES).to_csv().encode())
    for checksum in (md5(content), None):
        check(sx.datasets.from_url(first, file_name="mine.csv", checksum=checksum))
        with pytest.raises(ValueError, match=rf"mine\.csv' was downloaded from {first}, and not from {second}"):
            sx.datasets.from_url(second, file_name="mine.csv")
    check(sx.datasets.from_url(second, file_name="mine.csv", checksum=md5(content)))


@pytest.mark.parametrize("argument", [{"url": None}, {"checksum": 5}, {"file_name": Path("x.csv")}])
def test_what_is_no_text(argument):
    ((name, value),) = argument.items()
    with pytest.raises(TypeError, match=rf"^{name}=.* is a {type(value).__name__}; text is needed"):
        sx.datasets.from_url(**{"url": "http://127.0.0.1:9/x.csv", **argument})


def test_what_follows_the_path_is_not_in_the_name(offer, datasetdir):
    url = offer("x.csv?raw=true", pd.DataFrame(COUNTS, CELLS, GENES).to_csv().encode())
    check(sx.datasets.from_url(url))
    mark = hashlib.sha256(url.encode()).hexdigest()[:8]
    assert (datasetdir / f"{mark}-x.csv").exists()


def test_a_checksum_is_verified(offer, datasetdir):
    content = pd.DataFrame(COUNTS, CELLS, GENES).to_csv().encode()
    url = offer("x.csv", content)
    for checksum in (git(content), md5(content), f"SHA256:{hashlib.sha256(content).hexdigest().upper()}"):
        check(sx.datasets.from_url(url, checksum=checksum))
    with pytest.raises(ValueError, match="not the file it should be"):
        sx.datasets.from_url(url, checksum=md5(b""))


def test_without_a_checksum_the_first_file_holds(offer, host, datasetdir):
    url = offer("x.csv", pd.DataFrame(COUNTS, CELLS, GENES).to_csv().encode())
    sx.datasets.from_url(url)
    (path,) = datasetdir.glob("*.csv")
    path.unlink()
    host.files["x.csv"] = b"changed"
    with pytest.raises(ValueError, match="its checksum is"):
        sx.datasets.from_url(url)


@pytest.mark.parametrize("checksum", ["sha256:12", "crc:12", "d41d8cd98f00b204e9800998ecf8427e", "md5:" + "g" * 32])
def test_a_checksum_that_is_none(checksum, datasetdir):
    with pytest.raises(ValueError, match=r"checksum=.* is not one of these.*'sha256:' and 64"):
        sx.datasets.from_url("http://127.0.0.1:9/x.csv", checksum=checksum)


@pytest.mark.parametrize("url", ["x.csv", "/data/x.csv", "file:///x.csv", "ftp://a.b/x.csv", "http:///x.csv"])
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match=r"url=.* is no address"):
        sx.datasets.from_url(url)


def test_without_a_network(datasetdir):
    with pytest.raises(OSError, match=r"cannot be downloaded .*http://127\.0\.0\.1:9/x\.csv"):
        sx.datasets.from_url("http://127.0.0.1:9/x.csv")
    assert str(sc.settings.datasetdir) == str(datasetdir)
