"""Cells that come to the device block by block: each once, in time, in the same memory, and the same as all at once."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

import scvi_ext as sx
from scvi_ext._contract import Stream
from scvi_ext.data import store as store_module
from scvi_ext.data.blocks import Block, DeviceCounts, Room, few_entries
from scvi_ext.data.matrix import UnreadableRowsError
from scvi_ext.data.registry import read_setup
from scvi_ext.data.sampler import epoch_order
from scvi_ext.data.store import CellStore
from scvi_ext.data.stream import Resident, Streamed, _room, cells_of_run, order_of, placement

CPU = torch.device("cpu")
CELLS, LABELLED = (Stream("cells"),), (Stream("cells"), Stream("labelled", labelled_only=True))
COLUMNS = frozenset({"labels", "size_factor", "categorical", "continuous"})
READER = "scvi_ext-read"


@pytest.fixture(autouse=True)
def from_disk(monkeypatch):
    """Counts of files stay there, and several blocks of some 20 cells make up an epoch."""
    before, sx.settings.memory_limit = sx.settings.memory_limit, 0
    monkeypatch.setattr(store_module, "BLOCK_BYTES", 10_000)
    yield
    sx.settings.memory_limit = before


@pytest.fixture
def backed(counts, tmp_path) -> ad.AnnData:
    """The counts in a file, with labels for two of three cells."""
    counts.obs["cell_type"] = counts.obs["cell_type"].astype(str).where(np.arange(201) % 3 > 0, "?")
    counts.write_h5ad(tmp_path / "counts.h5ad")
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    sx.pp.setup_anndata(
        backed,
        batch_key="batch",
        labels_key="cell_type",
        unlabeled_category="?",
        size_factor_key="size",
        categorical_covariate_keys=["sex"],
        continuous_covariate_keys=["age"],
    )
    return backed


def read(adata: ad.AnnData) -> CellStore:
    return CellStore.from_adata(adata, read_setup(adata), columns=COLUMNS)


@pytest.fixture
def on_disk(backed) -> CellStore:
    return read(backed)


@pytest.fixture
def in_memory(backed) -> CellStore:
    sx.settings.memory_limit = None
    store = read(backed)
    sx.settings.memory_limit = 0
    return store


@dataclass
class Counting:
    """A store that takes note of what is taken from it, when, and by which thread."""

    store: CellStore
    taken: list = field(default_factory=list)
    threads: set = field(default_factory=set)
    fails_at: int | None = None

    def __getattr__(self, name: str):
        return getattr(self.store, name)

    def take(self, rows: np.ndarray) -> CellStore:
        self.taken.append(rows)
        if len(rows):
            self.threads.add(threading.current_thread().name)
            if self.n_taken == self.fails_at:
                raise UnreadableRowsError("these rows")
        return self.store.take(rows)

    def forget(self) -> None:
        """What has been taken so far does not count: a block is made with some cells, to learn of what kind."""
        self.taken.clear()
        self.threads.clear()

    @property
    def n_taken(self) -> int:
        return sum(len(rows) > 0 for rows in self.taken)


def epoch(store, streams, batch_size=16, blocks=None, seed=0):
    """Positions of an epoch of all cells, and its shape."""
    shape = (math.ceil(store.n_cells / batch_size), batch_size)
    cells = np.arange(store.n_cells)
    rows = [epoch_order(store.cells_of(s, cells), shape, seed, 0, i, blocks) for i, s in enumerate(streams)]
    return np.stack(rows), shape


def streamed(store, streams=CELLS, batch_size=16) -> tuple[Streamed, np.ndarray]:
    blocks = store.blocks()
    rows, shape = epoch(store, streams, batch_size, blocks)
    return Streamed(store, CPU, streams, shape, blocks), rows


def assert_same_minibatch(one, other) -> None:
    np.testing.assert_array_equal(one.x.to_dense().numpy(), other.x.to_dense().numpy())
    assert one.x.multiply_sparse == other.x.multiply_sparse
    for name in one._fields[1:]:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(READER)]


# ---- pieces of an epoch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [CELLS, LABELLED], ids=["one stream", "two streams"])
def test_minibatches_are_those_of_all_cells_at_once(on_disk, in_memory, streams):
    source, rows = streamed(on_disk, streams)
    resident = Resident(in_memory, CPU, streams)
    assert len(source.blocks.steps(rows.shape[1])) > 4
    stop = 0
    for first, stop, local in source.pieces(rows, 0):
        assert local.shape == (len(streams), stop - first, rows.shape[2])
        for step in range(first, stop):
            for i, of in enumerate(local[:, step - first]):
                expected = resident.block.minibatch(rows[i, step])
                assert_same_minibatch(source.block.of(streams[i]).minibatch(of), expected)
    assert stop == rows.shape[1]
    source.close()


def test_each_block_is_read_once_and_in_order(on_disk):
    store = Counting(on_disk)
    source, rows = streamed(store)
    for _ in range(2):
        store.forget()
        bounds = [(first, stop) for first, stop, _ in source.pieces(rows, 0)]
        assert bounds == list(pairwise(source.blocks.steps(rows.shape[1])))
        assert len(store.taken) == len(bounds)
        for (first, stop), taken in zip(bounds, store.taken, strict=True):
            np.testing.assert_array_equal(taken, np.unique(rows[:, first:stop]))  # forwards, as the file lies
            assert len(taken) <= source.n_cells
    source.close()


def test_the_next_block_is_read_while_one_is_trained_on(on_disk):
    store = Counting(on_disk)
    source, rows = streamed(store)
    n = len(source.blocks.steps(rows.shape[1])) - 1
    store.forget()
    for i, _ in enumerate(source.pieces(rows, 0)):
        source.reader.submit(int).result(60)  # done when everything is that was asked for before
        assert store.n_taken == min(i + 2, n)  # one ahead, and not more: that is what memory is reckoned for
    assert store.threads == {f"{READER}_0"}
    source.close()


@pytest.mark.parametrize("first", [1, 5, 12, 13])
def test_blocks_before_the_step_that_is_next_are_not_read(on_disk, first):
    store = Counting(on_disk)
    source, rows = streamed(store)
    assert rows.shape[1] == 13
    store.forget()
    pieces = list(source.pieces(rows, first))
    expected = [(a, z) for a, z in pairwise(source.blocks.steps(13)) if z > first]
    assert [piece[:2] for piece in pieces] == expected
    assert store.n_taken == len(expected)
    source.close()


def test_the_first_piece_is_what_an_epoch_begins_with(on_disk):
    source, rows = streamed(on_disk)
    local = source.first_piece(rows)
    alone = source.block.minibatch(local[0, 0])
    ((_, _, again), *_) = source.pieces(rows, 0)
    np.testing.assert_array_equal(local, again)
    _, z = source.blocks.steps(rows.shape[1])[:2]
    assert local.shape == (1, z, rows.shape[2])
    assert_same_minibatch(alone, Block(on_disk.take(rows[0, 0]), CPU).minibatch(np.arange(rows.shape[2])))
    source.close()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_no_thread_stays_behind_whenever_it_is_closed(on_disk, n):
    before = readers()
    source, rows = streamed(Counting(on_disk))
    pieces = source.pieces(rows, 0)
    for _ in range(n):
        next(pieces)
    pieces.close()
    source.close()
    assert readers() == before


def test_an_error_comes_with_its_block_and_not_before(on_disk):
    store = Counting(on_disk)
    source, rows = streamed(store)
    store.forget()
    store.fails_at = 3
    pieces = source.pieces(rows, 0)
    next(pieces)
    next(pieces)  # by now the third one has failed, or will
    with pytest.raises(UnreadableRowsError, match="these rows"):
        next(pieces)
    pieces.close()
    source.close()
    assert not readers()


# ---- cells in a given order: held-out ones, and those that the guard looks at --------------------------------------


def passes_of(store, sizes, streams=CELLS, seed=1):
    rng = np.random.default_rng(seed)
    cells = np.arange(store.n_cells)
    return [[rng.choice(store.cells_of(s, cells), n) for s, n in zip(streams, of, strict=True)] for of in sizes]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [[(7, 3), (0, 4), (5, 0), (30, 30), (1, 1)], [(3, 2)], [(200, 100)] * 3, []],
    ids=["odd", "few", "all", "no"],
)
def test_cells_in_a_given_order(on_disk, in_memory, sizes, keep):
    source, _ = streamed(on_disk, LABELLED)
    resident = Resident(in_memory, CPU, LABELLED)
    passes = passes_of(on_disk, sizes, LABELLED)
    for _ in range(2):
        found, expected = (list(each.minibatches(passes, keep=keep)) for each in (source, resident))
        assert len(found) == len(expected) == len(sizes)
        for of_pass, others in zip(found, expected, strict=True):
            for one, other in zip(of_pass, others, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert_same_minibatch(one, other)
    source.close()


def test_what_is_asked_for_again_is_read_once(on_disk):
    store = Counting(on_disk)
    source, _ = streamed(store)
    few, others = (passes_of(on_disk, [(5,), (6,)], seed=seed) for seed in (1, 2))
    store.forget()
    for _ in range(3):
        list(source.minibatches(few, keep=True))
    assert store.n_taken == 1
    list(source.minibatches(others, keep=True))  # of other cells it does not take the ones it has
    list(source.minibatches(others, keep=True))
    assert store.n_taken == 2
    list(source.minibatches(few))
    list(source.minibatches(few))
    assert store.n_taken == 4
    source.close()


def test_more_than_a_block_is_not_kept(on_disk):
    store = Counting(on_disk)
    source, _ = streamed(store)
    passes = [[cells] for cells in np.array_split(np.arange(201), 20)]
    store.forget()
    list(source.minibatches(passes, keep=True))
    once = store.n_taken
    assert once > 3
    assert max(map(len, store.taken)) <= source.n_cells
    list(source.minibatches(passes, keep=True))
    assert store.n_taken == 2 * once
    assert source.kept is None
    source.close()


# ---- where cells are, and in which order they come -----------------------------------------------------------------


def test_cells_are_resident_where_they_fit(on_disk, in_memory):
    assert isinstance(cells_of_run(in_memory, CPU, CELLS, (13, 16), in_memory.blocks()), Resident)
    for blocks in (on_disk.blocks(), None):
        source = cells_of_run(on_disk, CPU, CELLS, (13, 16), blocks)
        assert isinstance(source, Streamed)
        source.close()


def test_the_order_is_that_of_the_file(on_disk, in_memory, counts, registered):
    assert order_of(on_disk, CPU) == order_of(in_memory, CPU) == on_disk.blocks()
    assert order_of(on_disk, CPU).n_blocks > 1
    assert order_of(read(registered), CPU) is None


def test_where_counts_are_is_said(on_disk, in_memory, registered):
    assert "stay on disk and are read in blocks: more than the 0 MB of memory that they may take" in placement(
        on_disk, CPU
    )
    assert placement(in_memory, CPU).startswith("counts (")
    assert "in host memory, read from disk: within the " in placement(in_memory, CPU)
    assert "settings.memory_limit" in placement(in_memory, CPU)
    assert placement(read(registered), CPU).endswith("in host memory")


def test_products_are_made_alike_in_all_blocks(on_disk):
    """Sparse or dense: as all cells have it, or blocks would be rounded differently from all at once."""
    source, rows = streamed(on_disk)
    for _ in source.pieces(rows, 0):
        assert source.block.counts.multiply_sparse == few_entries(on_disk.counts)
    source.close()


# ---- the same memory -----------------------------------------------------------------------------------------------


def test_device_counts_are_loaded_into_the_memory_they_had(on_disk):
    parts = [on_disk.take(rows).counts for rows in (np.arange(0), np.arange(9), np.arange(50, 71), np.arange(40, 43))]
    room = Room(21, max(part.nnz for part in parts), int(on_disk.sizes.max()))
    counts = DeviceCounts(parts[0], CPU, room)
    tensors = (counts.indptr, counts.genes, counts.values, counts.lane)
    places = [tensor.data_ptr() for tensor in tensors]
    for part in parts[1:]:
        counts.load(part)
        assert [tensor.data_ptr() for tensor in tensors] == places
        rows = np.random.default_rng(0).integers(0, part.shape[0], 30)
        np.testing.assert_array_equal(counts.rows(torch.from_numpy(rows)).numpy(), part[rows].toarray())
        every = torch.arange(part.shape[0])
        np.testing.assert_array_equal(counts.rows(every).numpy(), part.toarray())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_of_a_device_are_loaded_into_the_memory_they_had(on_disk, in_memory):
    device = torch.device("cuda")
    block = Block(on_disk.take(np.arange(0)), device, room=_room(on_disk, 60))
    tensors = {"indptr": block.counts.indptr, "genes": block.counts.genes, "values": block.counts.values}
    tensors |= block.columns
    places = [tensor.data_ptr() for tensor in tensors.values()]
    whole = Block(in_memory, device)
    for rows in (np.arange(60), np.arange(0, 201, 4), np.array([200])):
        block.load(on_disk.take(rows))
        assert [tensor.data_ptr() for tensor in tensors.values()] == places
        found, expected = block.minibatch(np.arange(len(rows))), whole.minibatch(rows)
        for one, other in zip(found, expected, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("n_cells", [1, 20, 201])
def test_there_is_room_for_any_cells(on_disk, n_cells):
    sizes = np.sort(on_disk.sizes)[::-1]
    assert _room(on_disk, n_cells) == Room(n_cells, int(sizes[:n_cells].sum()), int(sizes[0]))


def test_a_block_of_the_host_is_loaded_too(on_disk, in_memory):
    block, whole = Block(on_disk.take(np.arange(0)), CPU, multiply_sparse=False), Block(in_memory, CPU)
    for rows in (np.arange(60), np.array([200, 3, 3]), np.arange(0)):
        block.load(on_disk.take(rows))
        assert_same_minibatch(block.minibatch(np.arange(len(rows))), whole.minibatch(rows))


READING = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import anndata as ad
import numpy as np
import torch
import scvi_ext as sx
from scvi_ext.data.registry import read_setup
from scvi_ext.data.store import CellStore

def n_threads():
    return len(os.listdir("/proc/self/task"))

sx.settings.memory_limit = 0
adata = ad.read_h5ad(sys.argv[1], backed="r")
sx.pp.setup_anndata(adata)
store = CellStore.from_adata(adata, read_setup(adata))
store.totals
with ThreadPoolExecutor(1) as reader:
    before = reader.submit(n_threads).result()
    reader.submit(store.take, np.arange(50)).result()
    print(torch.get_num_threads(), reader.submit(n_threads).result() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux tells them")
def test_the_thread_that_reads_starts_no_others(counts, tmp_path):
    """With more threads of OpenMP than processors, those that train sleep between two operations: 40 % more time."""
    counts.write_h5ad(tmp_path / "counts.h5ad")
    environment = os.environ | {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    run = [sys.executable, "-c", READING, str(tmp_path / "counts.h5ad")]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "0"], done.stderr
