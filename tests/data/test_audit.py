from __future__ import annotations

import re
import tracemalloc

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from scvi_ext.data import matrix as matrix_module
from scvi_ext.data.audit import LARGEST_EXACT, audit_counts

N, G = 200, 30
GENES = [f"g{i}" for i in range(G)]
CELLS = [f"c{i}" for i in range(N)]
BATCH = np.array(["a"] * 150 + ["b"] * 50)
KINDS = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix}


def counts(seed: int = 0) -> np.ndarray:
    """Negative binomial counts, with library sizes that differ as in real data; no empty cell, no silent gene."""
    rng = np.random.default_rng(seed)
    means = rng.gamma(2.0, 1.0, G) * rng.lognormal(0, 0.4, (N, 1))
    values = rng.poisson(rng.gamma(2.0, means / 2.0)).astype(np.float64)
    values[:, 0] += 1
    return values


@pytest.fixture(params=KINDS)
def as_kind(request, monkeypatch):
    monkeypatch.setattr(matrix_module, "_CHUNK_ENTRIES", 64 * G)  # several chunks
    return KINDS[request.param]


def audit(values, batch=None):
    return audit_counts(values, GENES, CELLS, batch)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.int16, np.uint32])
def test_raw_counts_pass(as_kind, dtype):
    values = counts()
    result = audit(as_kind(values.astype(dtype)), BATCH)
    assert result.problems() == []
    assert result.remarks() == []
    assert (result.n_cells, result.n_genes) == (N, G)
    assert result.non_zeros == np.count_nonzero(values)
    assert result.largest == values.max()


def test_booleans_pass():
    values = counts() > 1
    values[:, 0] = True
    assert not audit(values).offences


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (np.nan, "missing", r"are missing \(NaN\).*: nan\. Remove or recompute"),
        (np.inf, "infinite", r"are infinite.*: inf\."),
        (-np.inf, "infinite", r"are infinite.*: -inf\."),
        (-3.0, "negative", r"are negative.*: -3\. Scaled or batch-corrected"),
        (0.5, "fractional", r"are not integers.*: 0\.5\. They look log-transformed or normalised.*layer='counts'"),
        (1 + 1e-9, "fractional", r"are not integers.*: 1\.000000001\."),
        (1000.5, "fractional", r"They look normalised or estimated.*SoupX, CellBender, RSEM.*check='warn'"),
        (2.0**24 + 1, "too_large", r"are above 2\*\*24 = 16,777,216.*: 16777217\. float32 cannot hold"),
    ],
)
def test_each_bad_entry_is_named(as_kind, value, kind, message):
    values = counts()
    values[170, 5] = values[190, 7] = value
    result = audit(as_kind(values), BATCH)
    (offence,) = result.offences
    assert (offence.kind, offence.n_entries, offence.n_cells) == (kind, 2, 2)
    assert offence.cells_per_batch == {"b": (2, 50)}
    (problem,) = result.problems()
    start = rf"2 entries in 2 of {N} cells .* \(cells: 2 of 50 in 'b'\), first cell 'c170', gene 'g5'"
    np.testing.assert_array_equal(offence.example[2], value)
    assert offence.example[:2] == ("c170", "g5")
    assert re.search(start, problem)
    assert re.search(message, problem)


def test_largest_exact_integer_is_allowed():
    values = counts()
    values[0, 0] = LARGEST_EXACT
    assert audit(values).problems() == []
    assert audit(values.astype(np.int64)).problems() == []


@pytest.mark.parametrize(("dtype", "value", "kind"), [(np.int64, -1, "negative"), (np.int64, 2**40, "too_large")])
def test_bad_integers(as_kind, dtype, value, kind):
    values = counts().astype(dtype)
    values[3, 3] = value
    (offence,) = audit(as_kind(values)).offences
    assert (offence.kind, offence.example) == (kind, ("c3", "g3", value))


@pytest.mark.parametrize("seed", range(40))
def test_five_percent_of_log_normalised_cells_are_always_found(seed):
    values = counts(seed)
    chosen = np.random.default_rng(100 + seed).choice(N, N // 20, replace=False)
    values[chosen] = np.log1p(1e4 * values[chosen] / values[chosen].sum(1, keepdims=True))
    result = audit(sp.csr_matrix(values), BATCH)
    (offence,) = result.offences
    assert (offence.kind, offence.n_cells) == ("fractional", len(chosen))
    expected = {b: (int((BATCH[chosen] == b).sum()), int((BATCH == b).sum())) for b in ("a", "b")}
    assert offence.cells_per_batch == {b: n for b, n in expected.items() if n[0]}
    assert "log-transformed" in result.problems()[0]


@pytest.mark.parametrize("target", [1e4, 1e6])
def test_rounded_scaled_counts_are_found(as_kind, target):
    values = counts()
    scaled = np.rint(target * values / values.sum(1, keepdims=True))
    (problem,) = audit(as_kind(scaled)).problems()
    for part in (
        "sums over genes of 200 cells hardly vary",
        "scaled to a constant",
        "downsample_counts",
        "check='warn'",
    ):
        assert part in problem


def test_scaled_counts_of_one_batch_are_found():
    values = counts()
    values[150:] = np.rint(1e4 * values[150:] / values[150:].sum(1, keepdims=True))
    result = audit(values, BATCH)
    assert list(result.constant_sums) == ["b"]
    assert "of 50 cells in batch 'b' hardly vary" in result.problems()[0]


def test_sums_with_poisson_noise_only_pass():
    """The least noise that independent counts can have; 200 data sets, where one false alarm means a broken rule."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        values = rng.poisson(2.0, (20, G))
        assert not audit_counts(values, GENES, CELLS[:20]).constant_sums


def test_few_cells_with_equal_sums_pass():
    values = np.ones((19, G))
    assert audit_counts(values, GENES, CELLS[:19]).problems() == []
    assert audit_counts(np.ones((20, G)), GENES, CELLS[:20]).problems() != []


def test_empty_cells_are_named(as_kind):
    values = counts()
    values[[3, 70, 71, 199]] = 0
    result = audit(as_kind(values))
    assert result.empty_cells == ("c3", "c70", "c71", "c199")
    (problem,) = result.problems()
    assert problem.startswith("4 of 200 cells have no counts at all: 'c3', 'c70', 'c71' and 1 more. Leave them out")


def test_silent_genes_are_a_remark(as_kind):
    values = counts()
    values[:, [4, 9]] = 0
    result = audit(as_kind(values))
    assert result.problems() == []
    (remark,) = result.remarks()
    assert remark.startswith("2 of 30 genes are zero in all cells: 'g4', 'g9'. A model learns nothing from them.")


def test_stored_zeros_are_zeros():
    values = sp.csr_matrix(counts())
    values.data[values.indices == 4] = 0
    values.data[values.indptr[3] : values.indptr[4]] = 0
    result = audit(values)
    assert result.silent_genes == ("g4",)
    assert result.empty_cells == ("c3",)
    assert result.non_zeros == np.count_nonzero(values.toarray())


def test_all_problems_are_told_at_once():
    values = counts()
    values[0, 0], values[1, 1], values[2] = -1, 0.5, 0
    assert len(audit(values).problems()) == 3


def test_proteins_may_be_unmeasured_and_are_called_proteins():
    values = counts()
    values[:50] = 0
    values[:, 3] = 0
    values[60, 4] = -1
    result = audit_counts(values, GENES, CELLS, feature="protein")
    (problem,) = result.problems()
    assert "protein 'g4'" in problem
    assert "1 of 30 proteins are zero in all cells" in result.remarks()[0]


def test_memory_stays_with_the_chunk(tmp_path, monkeypatch):
    """A file of 80 MB is audited in chunks: nowhere near its size is ever in memory."""
    monkeypatch.setattr(matrix_module, "_CHUNK_ENTRIES", 10**6)
    names = [str(i) for i in range(10_000)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        stored = file.create_dataset("x", (2000, 10_000), dtype="f4", fillvalue=0, chunks=(100, 10_000))
        stored[:, :3] = np.arange(1, 2001)[:, None]
        tracemalloc.start()
        try:
            result = audit_counts(stored, names, names[:2000])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert result.non_zeros == 6000
    assert peak < 20e6  # the chunk of 4 MB, its mask and copies
