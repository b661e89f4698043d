"""Cells of several data sets, each with genes of its own, as one store: what a model of all of them is trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_ext.data.blocks import Block

if TYPE_CHECKING:
    import torch

    from scvi_ext._contract import Minibatch, Stream
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
        return pd.Index(dict.fromkeys(name for store in self.stores for name in store.var_names))

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
