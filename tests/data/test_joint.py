from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scvi_ext._contract import SavedFit, Stream
from scvi_ext.data.blocks import Block
from scvi_ext.data.joint import (
    JointBlock,
    JointStore,
    describe,
    first_batch,
    n_batches,
    position,
    resident,
    sizes_of,
    summary_of,
)
from scvi_ext.data.registry import Registry
from scvi_ext.data.store import CellStore

GENES = (["b", "a", "c"], ["d", "a"], ["e", "d", "b"])
BATCHES = (("x", "y"), (), ("u", "v", "w"))
N_CELLS = (5, 3, 4)
EVERY = ["b", "a", "c", "d", "e"]
REGISTRIES = [Registry(batch_key="batch" if known else None, batch_categories=known) for known in BATCHES]


@pytest.fixture
def datasets() -> list[ad.AnnData]:
    rng = np.random.default_rng(0)
    found = []
    for n, genes, batches in zip(N_CELLS, GENES, BATCHES, strict=True):
        obs = pd.DataFrame({"batch": rng.choice(batches or ["none"], n)}, index=[f"c{i}" for i in range(n)])
        x = rng.poisson(3.0, (n, len(genes))).astype(np.float32) + 1
        found.append(ad.AnnData(x, obs=obs, var=pd.DataFrame(index=genes)))
    return found


@pytest.fixture
def store(datasets) -> JointStore:
    stores, first = [], 0
    for adata, registry in zip(datasets, REGISTRIES, strict=True):
        own = CellStore.from_adata(adata, registry, var_names=adata.var_names)
        stores.append(replace(own, batch_index=own.batch_index + first))
        first += n_batches(registry)
    return JointStore(("r", "s", "t"), tuple(stores))


def test_cells_and_genes_are_counted_through(store):
    assert store.n_cells == 12
    assert store.first.tolist() == [0, 5, 8, 12]
    assert store.var_names.tolist() == EVERY
    assert store.n_genes == 5
    assert [[EVERY[g] for g in genes] for genes in store.genes] == [list(genes) for genes in GENES]
    assert store.obs_names.tolist()[4:6] == ["c4 (r)", "c0 (s)"]
    assert store.obs_names.is_unique


def test_streams_take_the_cells_of_their_data_set(store):
    assert store.streams == (Stream("r", dataset=0), Stream("s", dataset=1), Stream("t", dataset=2))
    cells = np.array([0, 4, 5, 7, 8, 11])
    assert [store.cells_of(stream, cells).tolist() for stream in store.streams] == [[0, 4], [5, 7], [8, 11]]


def test_minibatches_are_found_by_positions_among_all(store, datasets):
    block = JointBlock(store, torch.device("cpu"))
    for stream, adata, registry, batch_0 in zip(store.streams, datasets, REGISTRIES, (0, 2, 3), strict=True):
        source = block.of(stream)
        rows = store.first[stream.dataset] + np.array([2, 0])
        for asked in (rows, source.rows(rows)):
            cells = source.minibatch(asked)
            np.testing.assert_array_equal(cells.x.to_dense(), adata.X[[2, 0]])
            codes = (
                [registry.batch_categories.index(b) for b in adata.obs["batch"].iloc[[2, 0]]]
                if registry.batch_key
                else [0, 0]
            )
            assert cells.batch_index.tolist() == [batch_0 + code for code in codes]
        assert [EVERY[g] for g in source.genes] == adata.var_names.tolist()
    assert block.note == ""


def test_what_is_resident_is_a_block_of_one_or_of_several(store):
    cpu = torch.device("cpu")
    assert isinstance(resident(store, cpu), JointBlock)
    assert isinstance(resident(store.stores[0], cpu), Block)


def test_the_fingerprint_is_of_cells_and_order(store):
    turned = JointStore(store.names[::-1], store.stores[::-1])
    counts = store.stores[0].counts.copy()
    counts.data[0] += 1
    changed = JointStore(store.names, (replace(store.stores[0], counts=counts), *store.stores[1:]))
    assert len({store.fingerprint(), turned.fingerprint(), changed.fingerprint()}) == 3
    assert JointStore(("a", "b", "c"), store.stores).fingerprint() == store.fingerprint()


def test_the_prior_of_the_library_is_that_of_each_batch_of_the_data_set(store, datasets):
    summary = summary_of(store, REGISTRIES)
    assert summary.n_batch == 6
    assert summary.joint.n_genes == 5
    assert summary.joint.genes == tuple(tuple(EVERY.index(g) for g in genes) for genes in GENES)
    means, variances = np.array(summary.joint.library_log_means), np.array(summary.joint.library_log_vars)
    own = np.zeros((3, 6), bool)
    for i, (adata, batches, first) in enumerate(zip(datasets, BATCHES, (0, 2, 3), strict=True)):
        for k, batch in enumerate(batches or ["none"]):
            own[i, first + k] = True
            total = np.log(adata.X.sum(1))[(adata.obs["batch"] == batch).to_numpy()]
            if len(total):
                np.testing.assert_allclose(means[i, first + k], total.mean(), rtol=1e-5)
    assert (variances > 0).all()
    assert (means[~own] == 0).all()
    assert (variances[~own] == 1).all()


@pytest.mark.parametrize("name", ["r", "s", "t"])
def test_a_fit_knows_its_place(store, name):
    i = store.names.index(name)
    fit = SavedFit(
        key="k",
        model="gimvi",
        config={},
        run={},
        setup=REGISTRIES[i].to_uns(),
        var_names=np.array(GENES[i]),
        state={},
        history=pd.DataFrame(),
        status={},
        joint=describe(store, REGISTRIES) | {"dataset": name},
    )
    assert position(fit) == i
    assert first_batch(fit) == (0, 2, 3)[i]
    sizes, expected = sizes_of(fit), summary_of(store, REGISTRIES)
    assert sizes.n_batch == expected.n_batch
    assert sizes.joint.genes == expected.joint.genes
    assert sizes.joint.n_genes == expected.joint.n_genes
    assert np.shape(sizes.joint.library_log_means) == np.shape(expected.joint.library_log_means)
    alone = replace(fit, joint=None)
    assert first_batch(alone) == 0
    assert sizes_of(alone).joint is None
    assert sizes_of(alone).n_input == len(GENES[i])
