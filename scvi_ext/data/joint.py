"""Cells of several data sets, each with genes of its own, as one store: what a model of all of them is trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_ext._contract import DataSummary, JointSummary, Stream
from scvi_ext.data.blocks import Block
from scvi_ext.data.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import torch

    from scvi_ext._contract import Minibatch, SavedFit
    from scvi_ext.data.store import CellStore


@dataclass(frozen=True)
class JointStore:
    """Several stores, one after the other. Positions count through all of them."""

    names: tuple[str, ...]  # (D,) of the data sets
    stores: tuple[CellStore, ...]
    labels: None = None  # data sets need not have the same ones

    @cached_property
    def first(self) -> np.ndarray:
        """Position of the first cell of each data set, and the number of all cells, (D + 1,)."""
        return np.concatenate([[0], np.cumsum([store.n_cells for store in self.stores])])

    @cached_property
    def var_names(self) -> pd.Index:
        """Every gene once: those of the first data set in their order, then what others add."""
        return union([store.var_names for store in self.stores])

    @cached_property
    def obs_names(self) -> pd.Index:
        """Names of all cells, with those of their data sets."""
        pairs = zip(self.names, self.stores, strict=True)
        return pd.Index([f"{cell} ({name})" for name, store in pairs for cell in store.obs_names])

    @property
    def genes(self) -> list[np.ndarray]:
        """Positions of the genes of each data set in ``var_names``."""
        return [self.var_names.get_indexer(store.var_names) for store in self.stores]

    @property
    def n_cells(self) -> int:
        """Number of cells of all data sets."""
        return int(self.first[-1])

    @property
    def n_genes(self) -> int:
        """Number of genes that any data set has."""
        return len(self.var_names)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Minibatches of each data set."""
        return tuple(Stream(name, dataset=i) for i, name in enumerate(self.names))

    def cells_of(self, stream: Stream, cells: np.ndarray) -> np.ndarray:
        """Those of the positions ``cells`` that belong to the data set of a stream."""
        return cells[(cells >= self.first[stream.dataset]) & (cells < self.first[stream.dataset + 1])]

    def fingerprint(self) -> str:
        """Hash of the fingerprints of all data sets, in their order."""
        return hashlib.sha256("".join(store.fingerprint() for store in self.stores).encode()).hexdigest()


class JointBlock:
    """All cells of a joint store, resident on one device."""

    def __init__(self, store: JointStore, device: torch.device):
        self.device = device
        blocks = [Block(part, device) for part in store.stores]
        self.note = next(filter(None, (block.note for block in blocks)), "")
        self.parts = [
            PartOfBlock(block, int(first), genes)
            for block, first, genes in zip(blocks, store.first, store.genes, strict=False)
        ]

    def of(self, stream: Stream) -> PartOfBlock:
        """Where the minibatches of a stream come from."""
        return self.parts[stream.dataset]


@dataclass(frozen=True)
class PartOfBlock:
    """The cells of one data set, named by their positions in the joint store."""

    block: Block
    first: int  # position of its first cell
    genes: np.ndarray  # positions of its genes in the names of the joint store

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        """Positions on the block's device."""
        return self.block.rows(rows)

    def minibatch(self, rows: torch.Tensor | np.ndarray) -> Minibatch:
        """The cells at these positions."""
        return self.block.minibatch(rows - self.first)


def resident(store: CellStore | JointStore, device: torch.device) -> Block | JointBlock:
    """All cells of a store on a device."""
    return JointBlock(store, device) if isinstance(store, JointStore) else Block(store, device)


# ---- what a fit remembers of the data sets it was fitted to --------------------------------------------------------


def describe(store: JointStore, registries: Sequence[Registry]) -> dict[str, Any]:
    """The data sets in words and numbers that files can hold: names, all genes, and by position those of each."""
    return describe_genes(store.names, [part.var_names for part in store.stores], registries)


def describe_genes(
    names: Sequence[str], genes: Sequence[Sequence[str]], registries: Sequence[Registry]
) -> dict[str, Any]:
    """The same of data sets with these genes."""
    every = union(genes)
    return {
        "datasets": np.array(names, dtype=np.str_),
        "genes": np.array(every, dtype=np.str_),
        "positions": {str(i): every.get_indexer(of_one) for i, of_one in enumerate(genes)},
        "batches": {str(i): np.array(n_batches(registry)) for i, registry in enumerate(registries)},
    }


def union(genes: Sequence[Sequence[str]]) -> pd.Index:
    """Every gene once: those of the first data set in their order, then what others add."""
    return pd.Index(dict.fromkeys(name for of_one in genes for name in of_one))


def n_batches(registry: Registry) -> int:
    """Batches of a data set; 1 where none are registered."""
    return max(1, len(registry.batch_categories))


def trained_together(one: SavedFit, other: SavedFit) -> bool:
    """Whether two data sets hold the same fit: options, run and weights."""
    if (one.key, one.config, one.run, one.status) != (other.key, other.config, other.run, other.status):
        return False
    return one.state.keys() == other.state.keys() and all(
        np.array_equal(array, other.state[name]) for name, array in one.state.items()
    )


def first_batch(fit: SavedFit) -> int:
    """What the batches of a fit's data set begin with, as the module numbers them."""
    return 0 if fit.joint is None else batches_of(fit, position(fit)).start


def batches_of(fit: SavedFit, dataset: int) -> range:
    """The batches of one of the data sets, as the module numbers them."""
    first = sum(int(fit.joint["batches"][str(i)]) for i in range(dataset))
    return range(first, first + int(fit.joint["batches"][str(dataset)]))


def position(fit: SavedFit) -> int:
    """Which of the data sets a fit belongs to, from 0."""
    return list(fit.joint["datasets"]).index(fit.joint["dataset"])


def sizes_of(fit: SavedFit) -> DataSummary:
    """Sizes of a fit's module; priors that its weights hold are left at zero, to be filled in."""
    summary = Registry.from_uns(fit.setup).sizes(len(fit.var_names))
    if fit.joint is None:
        return summary
    number = len(fit.joint["datasets"])
    genes = tuple(tuple(fit.joint["positions"][str(i)]) for i in range(number))
    n_batch = sum(int(fit.joint["batches"][str(i)]) for i in range(number))
    zeros = ((0.0,) * n_batch,) * number
    return replace(summary, n_batch=n_batch, joint=JointSummary(genes, len(fit.joint["genes"]), zeros, zeros))


def summary_of(store: JointStore, registries: Sequence[Registry]) -> DataSummary:
    """The same of data, with the prior of the log library in each batch: that of other data sets' is N(0, 1)."""
    counts = [n_batches(registry) for registry in registries]
    first = np.cumsum([0, *counts])
    means, variances = (np.full((len(counts), first[-1]), value) for value in (0.0, 1.0))
    for i, (part, registry) in enumerate(zip(store.stores, registries, strict=True)):
        own = slice(first[i], first[i + 1])
        from_zero = replace(part, batch_index=part.batch_index - first[i])
        of_part = from_zero.summary(registry)
        means[i, own], variances[i, own] = of_part.library_log_means, of_part.library_log_vars
    genes = tuple(tuple(positions.tolist()) for positions in store.genes)
    priors = (tuple(map(tuple, values.tolist())) for values in (means, variances))
    return DataSummary(store.n_genes, n_batch=int(first[-1]), joint=JointSummary(genes, store.n_genes, *priors))
