"""A fit brought back to life: the module, and the cells it is asked about. What ``results.py`` writes, read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from scvi_ext import models
from scvi_ext._contract import Capability
from scvi_ext._errors import listing, needs_capability, no_cells, one_of
from scvi_ext._keys import UNS, FitKeys, valid_key
from scvi_ext.data.corruption import corruption_layers
from scvi_ext.data.joint import first_batch, sizes_of
from scvi_ext.data.registry import Registry, check_fit_matches_setup, read_fit
from scvi_ext.data.store import CellStore, resolve_indices
from scvi_ext.engine.device import resolve_device, resolve_seed
from scvi_ext.engine.map_cells import Draws, map_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from anndata import AnnData
    from torch import nn

    from scvi_ext._contract import Minibatch, ModelSpec, SavedFit

_ALWAYS_READ = frozenset({"categorical", "continuous"})  # columns that enter every model if registered


def columns_read(model: str, config: Mapping, frozen: Mapping | None) -> frozenset[str]:
    """The optional columns of cells that a fit reads, and the fitted model inside it if there is one."""
    spec = models.get(model)
    columns = spec.needs(spec.config(**config)) | _ALWAYS_READ
    return columns if frozen is None else columns | columns_read(**frozen, frozen=None)


def load_module(adata: AnnData, key: str | None = None) -> tuple[SavedFit, ModelSpec, Registry, nn.Module]:
    """A fit of ``adata`` with its torch module, in evaluation mode, on the host."""
    fit = read_fit(adata, key)
    check_fit_matches_setup(fit, adata)
    registry = Registry.from_uns(fit.setup)
    return fit, models.get(fit.model), registry, models.restore(fit, sizes_of(fit))


@dataclass(frozen=True)
class Fitted:
    """A module and the chosen cells, their genes in the module's order."""

    fit: SavedFit
    registry: Registry
    module: nn.Module
    store: CellStore
    rows: np.ndarray | None  # of adata; None = all
    columns: np.ndarray  # positions of the module's genes in adata
    corruption_layers: frozenset[str]  # of adata, corrupted and original

    @classmethod
    def open(
        cls,
        adata: AnnData,
        key: str | None,
        indices: object = None,
        *,
        decodes: bool = True,
        capability: Capability = Capability.COUNTS,
    ) -> Fitted:
        """Read a fit and the cells at ``indices`` from ``adata``.

        ``decodes``: the cells will be decoded. ``capability``: what the model must be able to do.
        """
        fit, spec, registry, module = load_module(adata, key)
        require(capability, fit)
        infers_labels = Capability.LABELS in spec.capabilities
        store = CellStore.from_adata(
            adata,
            registry,
            var_names=fit.var_names,
            indices=indices,
            columns=columns_read(fit.model, fit.config, fit.frozen),
            labels_optional=infers_labels,
        )
        if store.n_cells == 0:
            raise no_cells()
        store = replace(store, batch_index=store.batch_index + first_batch(fit))
        if decodes and not infers_labels and store.labels is not None and (store.labels < 0).any():
            msg = (
                f"{(store.labels < 0).sum()} of {store.n_cells} cells have no label, and fit {fit.key!r} decodes with "
                "dispersion='gene-label': leave them out with indices, or label them."
            )
            raise ValueError(msg)
        columns = adata.var_names.get_indexer(fit.var_names)
        return cls(fit, registry, module, store, resolve_indices(adata, indices), columns, corruption_layers(adata))

    @property
    def keys(self) -> FitKeys:
        """Names of the slots that this fit's read-outs write."""
        return FitKeys(self.fit.key)

    def slot(self, place: str, default: str, key_added: str | None) -> str:
        """The name to write in ``place`` ("obs", "layers", ...): valid, and none that the fit or a corruption needs."""
        name = default if key_added is None else valid_key(key_added)
        read = {
            "obs": {
                self.registry.batch_key,
                self.registry.labels_key,
                self.registry.size_factor_key,
                *self.registry.categorical_covariate_keys,
                *self.registry.continuous_covariate_keys,
            },
            "obsm": {self.registry.protein_obsm_key},
            "layers": {self.registry.layer},
            "uns": {UNS.root},
        }
        if name in read.get(place, ()):
            msg = f"adata.{place}[{name!r}] is what fit {self.fit.key!r} reads: choose another name, key_added=..."
            raise ValueError(msg)
        if place == "layers" and name in self.corruption_layers:
            msg = (
                f"adata.layers[{name!r}] holds original or corrupted counts of pp.corrupt: choose another name, "
                "key_added=..."
            )
            raise ValueError(msg)
        return name

    def map(
        self,
        fn: Callable[[Minibatch, Draws], tuple[torch.Tensor, ...]],
        *,
        batch_size: int | None,
        seed: int | None,
        floats_per_cell: int = 0,
    ) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
        """Map ``fn`` over the cells, see :func:`~scvi_ext.engine.map_cells.map_cells`."""
        return map_cells(
            fn,
            self.module,
            self.store,
            device=resolve_device(),
            batch_size=batch_size,
            seed=resolve_seed(seed),
            floats_per_cell=floats_per_cell,
        )

    def batch_codes(self, transform_batch: object, *, of_profile: bool = False) -> list[int | None]:
        """Codes of the batches to decode in; ``[None]`` is each cell's own.

        ``of_profile``: nothing but the normalised profile is decoded, which must then depend on the batch.
        """
        if transform_batch is None:
            return [None]
        if of_profile and not self.module.profile_sees_batch:
            msg = (
                f"A batch to decode in has no effect: in fit {self.fit.key!r} the profile of genes does not depend on "
                "the batch."
            )
            raise ValueError(msg)
        if self.registry.batch_key is None:
            msg = f"transform_batch={transform_batch!r} has no meaning: fit {self.fit.key!r} knows no batches."
            raise ValueError(msg)
        single = isinstance(transform_batch, str) or not np.iterable(transform_batch)
        wanted = [str(b) for b in ([transform_batch] if single else transform_batch)]
        if not wanted:
            msg = "transform_batch is an empty list: name at least one batch, or None for each cell's own."
            raise ValueError(msg)
        for batch in wanted:
            one_of("transform_batch", batch, self.registry.batch_categories)
        return [first_batch(self.fit) + self.registry.batch_categories.index(batch) for batch in wanted]

    def batch_name(self, code: int) -> str:
        """What the batch with this code is called."""
        return self.registry.batch_categories[code - first_batch(self.fit)]

    def batch_code(self, transform_batch: object) -> int | None:
        """The same for what is decoded in one batch only: samples cannot be averaged."""
        first, *more = self.batch_codes(transform_batch)
        if more:
            msg = (
                f"transform_batch names {1 + len(more)} batches, and a sample is drawn in one: call once for each, or "
                "give None for each cell's own."
            )
            raise ValueError(msg)
        return first

    def gene_positions(self, gene_list: Sequence[str] | None) -> np.ndarray | None:
        """Positions of genes in the module's order; None for all."""
        return None if gene_list is None else _positions("gene", gene_list, self.fit.var_names, "adata.var_names[...]")

    def joint_gene_positions(self, gene_list: Sequence[str]) -> np.ndarray:
        """Positions among the genes of all data sets of a joint fit."""
        return _positions("gene", gene_list, self.fit.joint["genes"], "adata.var_names[...]")

    def protein_positions(self, protein_list: Sequence[str] | None) -> np.ndarray | None:
        """The same of proteins."""
        if protein_list is None:
            return None
        return _positions("protein", protein_list, self.registry.protein_names, "the columns of its table")


def _positions(kind: str, names: Sequence[str], known: Sequence[str], where: str) -> np.ndarray:
    """Positions of ``names`` among the ``known`` names of this kind; ``where`` names are found."""
    names = [names] if isinstance(names, str) else list(names)
    other = next((name for name in names if not isinstance(name, str)), None)
    if other is not None:
        found = type(other).__name__
        msg = f"{kind}_list holds {other!r} ({found}); names are needed: of a mask or positions, {where}."
        raise TypeError(msg)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        found = f"has {kind}s more than once: {listing(repeated)}. Name each" if names else "is empty: name at least"
        msg = f"{kind}_list {found} one {kind}, or None for all."
        raise ValueError(msg)
    position = {name: i for i, name in enumerate(known)}
    absent = [name for name in names if name not in position]
    if absent:
        msg = f"{len(absent)} of the {len(names)} {kind}s in {kind}_list are not in the fit: {listing(absent)}."
        raise KeyError(msg)
    return np.array([position[name] for name in names])


def require(capability: Capability, fit: SavedFit) -> None:
    """Raise a ValueError if the fitted model lacks a capability."""
    able = [name for name in models.names() if capability in models.get(name).capabilities]
    if fit.model not in able:
        raise needs_capability(capability, fit.model, able)


def in_batch(cells: Minibatch, batch: int | None) -> Minibatch:
    """The counterfactual of a minibatch: the same cells, had they been measured in ``batch``."""
    return (
        cells
        if batch is None
        else cells._replace(batch_index=cells.batch_index.new_full(cells.batch_index.shape, batch))
    )
