"""What the read-outs of proteins share: which proteins, the batches they are decoded in, and a table that is written.

A decoder is never trained for a protein in a batch that has not measured it: what it says there is noise. So it is not
asked there; :class:`Panel` has the rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from scanpy import logging as logg

from scvi_ext import models, results
from scvi_ext._contract import Capability
from scvi_ext._errors import listing, warn, whole_number
from scvi_ext.fitted import Fitted, in_batch, require
from scvi_ext.functional.proteins import background_mean, components

_PLAUSIBLE = 5  # times the largest count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from anndata import AnnData
    from numpy.random import Generator
    from torch import Tensor, nn

    from scvi_ext._contract import Minibatch, ProteinExpression
    from scvi_ext.engine.map_cells import Draws


@dataclass(frozen=True)
class Panel:
    """The proteins that are asked about, and the batches they are decoded in.

    ``batches`` are codes. ``(None,)`` is each cell's own batch for the proteins measured there; elsewhere it is the
    average over the batches that have measured them, which imputes a missing panel.
    """

    fitted: Fitted
    batches: tuple[int | None, ...]
    positions: np.ndarray | None  # of the proteins in the module's order; None = all
    measured: np.ndarray  # (K, P)

    @classmethod
    def of(
        cls,
        fitted: Fitted,
        batches: Sequence[int | None],
        protein_list: Sequence[str] | None = None,
        *,
        all_decoded: bool = False,
    ) -> Panel:
        """Check that ``batches`` have measured the proteins; ``all_decoded``: others than those listed take part."""
        positions = fitted.protein_positions(protein_list)
        measured = fitted.module.protein_batch_mask.cpu().numpy()
        panel = cls(fitted, tuple(batches), positions, measured)
        panel._check(np.arange(measured.shape[1]) if all_decoded or positions is None else positions)
        return panel

    @property
    def names(self) -> list[str]:
        """The proteins that are asked about."""
        names = self.fitted.registry.protein_names
        return list(names) if self.positions is None else [names[i] for i in self.positions]

    @property
    def columns(self) -> slice | np.ndarray:
        """The same as an index of an array of all proteins."""
        return slice(None) if self.positions is None else self.positions

    @cached_property
    def donors(self) -> tuple[int, ...]:
        """Codes of the batches that impute what the batches of the chosen cells have not measured."""
        if self.batches != (None,):
            return ()
        missing = ~self.measured[np.unique(self.fitted.store.batch_index)].all(0)
        return tuple(np.flatnonzero(self.measured[:, missing].any(1)).tolist())

    def mean(self, value: Callable[[ProteinExpression, Minibatch], Tensor], z: Tensor, cells: Minibatch) -> Tensor:
        """``value(py, cells)`` of all proteins, (B, P), averaged over the batches; ``z`` is transformed."""
        module = self.fitted.module

        def decoded(batch: int | None) -> Tensor:
            there = in_batch(cells, batch)
            return value(module.decode_protein(z, there), there)

        if self.batches != (None,):
            return torch.stack([decoded(batch) for batch in self.batches]).mean(0)
        own = decoded(None)
        if not self.donors:
            return own
        measured = module.protein_batch_mask
        imputed = sum(torch.where(measured[batch], decoded(batch), 0.0) for batch in self.donors) / measured.sum(0)
        return torch.where(measured[cells.batch_index], own, imputed)

    def components(
        self, z: Tensor, cells: Minibatch, noise: Tensor, streams: Sequence[Generator], *, counted: bool
    ) -> Tensor:
        """What counts of all proteins are drawn from, (4, B, P), see :func:`scvi_ext.functional.proteins.components`.

        ``batches`` is one. Draws cannot be averaged, so what is imputed comes from one of the batches at random, and
        from the same one for all proteins of a cell that the same batches have measured. ``noise`` is that of z, and
        ``counted`` says whether the efficiency of a batch belongs to it.
        """
        module = self.fitted.module

        def decoded(there: Minibatch) -> Tensor:
            py = module.decode_protein(z, there)
            background = background_mean(py, noise[:, module.n_latent : -1])
            return components(py, background * efficiency(module, there) if counted else background)

        cells = in_batch(cells, self.batches[0])
        values = decoded(cells)
        if not self.donors:
            return values
        n_donors, first = self.measured.sum(0), np.argsort(~self.measured, axis=0, kind="stable")
        chosen = (np.array([rng.random() for rng in streams])[:, None] * n_donors).astype(int)
        donor = torch.from_numpy(np.take_along_axis(first, chosen, axis=0)).to(z.device)  # (B, P)
        donor[module.protein_batch_mask[cells.batch_index]] = -1
        for batch in self.donors:
            values = torch.where(donor == batch, decoded(in_batch(cells, batch)), values)
        return values

    def _check(self, decoded: np.ndarray) -> None:
        names, categories = np.array(self.fitted.registry.protein_names), self.fitted.registry.batch_categories
        for batch in self.batches:
            missing = [] if batch is None else decoded[~self.measured[batch, decoded]]
            if len(missing):
                others = [categories[i] for i in np.flatnonzero(self.measured[:, decoded].all(1))]
                msg = (
                    f"Batch {categories[batch]!r} has not measured {len(missing)} of the {len(decoded)} proteins that "
                    f"are decoded: {listing(names[missing], 5)}. The decoder never saw them there, so what it says "
                    f"would be noise. Batches that have measured all: {listing(others, 5)}. Decode there, choose "
                    "proteins with protein_list, or leave it to None: each cell's own batch, or the average over those "
                    "that have measured a protein."
                )
                raise ValueError(msg)


def panel_if_any(fitted: Fitted, batches: Sequence[int | None], protein_list: Sequence[str] | None) -> Panel | None:
    """The panel of what is about genes first: all proteins of a model that has them, or none, or those listed."""
    if protein_list is None and Capability.PROTEIN not in models.get(fitted.fit.model).capabilities:
        return None
    require(Capability.PROTEIN, fitted.fit)
    none = protein_list is not None and len(protein_list) == 0
    return None if none else Panel.of(fitted, batches, protein_list)


def log_imputed(panel: Panel | None) -> None:
    """Say what is imputed, if anything is."""
    if panel is None or not panel.donors:
        return
    missing = ~panel.measured[panel.fitted.store.batch_index][:, panel.columns]
    proteins = [name for name, somewhere in zip(panel.names, missing.any(0), strict=True) if somewhere]
    if proteins:
        batches = listing((panel.fitted.registry.batch_categories[i] for i in panel.donors), 5)
        logg.info(
            f"    imputing {len(proteins)} proteins that were not measured in the batches of {missing.any(1).sum()} of "
            f"{len(missing)} cells: {listing(proteins, 5)}; decoded in {batches}"
        )


def _warn_of_implausible(panel: Panel, values: np.ndarray) -> None:
    """Warn where imputed ``values`` (n, P) are far above every count of the protein, in the cells that are asked about.

    A latent space in which batches lie apart is decoded where nothing was learned.
    """
    store = panel.fitted.store
    measured = panel.measured[store.batch_index][:, panel.columns]
    largest = np.where(measured, store.protein[:, panel.columns], 0).max(0)
    implausible = ~measured & ~(values <= _PLAUSIBLE * largest) & (largest > 0)
    if panel.donors and implausible.any():
        warn(
            f"Imputed proteins of {implausible.any(1).sum()} of {(~measured).any(1).sum()} cells are more than "
            f"{_PLAUSIBLE} times the largest count of that protein: the batches have not come together in the latent "
            "space. Fit longer, tl.fit(..., max_epochs=...), or with fewer latent units."
        )


def efficiency(module: nn.Module, cells: Minibatch) -> Tensor | float:
    """The factor of the counts of each protein in the batch of each cell, (B, P); 1 for a model without."""
    return 1.0 if module.log_efficiency is None else torch.exp(module.log_efficiency[cells.batch_index])


def streams_of_proteins(streams: Sequence[Generator]) -> list[Generator]:
    """Generators of their own, so that genes are drawn alike with and without proteins."""
    return [rng.spawn(1)[0] for rng in streams]


def read_proteins(
    adata: AnnData,
    sample: Callable[[Panel, Tensor, Minibatch, Tensor], Tensor],
    name: str,
    what: str,
    *,
    key: str | None,
    transform_batch: Any,
    protein_list: Sequence[str] | None,
    n_samples: int,
    return_mean: bool,
    indices: Sequence | None,
    batch_size: int | None,
    seed: int | None,
    key_added: str | None,
    copy: bool,
    all_decoded: bool = False,
    more_noise: bool = False,
    imputes: bool = True,
) -> AnnData | np.ndarray | None:
    """Write a table of cells x proteins, the mean of ``sample`` over posterior samples, or return the samples.

    Parameters
    ----------
    sample
        Called with the panel, a transformed z, the cells, and noise for proteins: (B, P) draws for the background, and
        with ``more_noise`` as many again. Returns all proteins, (B, P).
    name
        Attribute of :class:`~scvi_ext._keys.FitKeys` that names the slot.
    what
        What it is, for the log.
    all_decoded
        Whether proteins other than those listed take part.
    imputes
        Whether there is a value where a protein was not measured.
    """
    whole_number("n_samples", n_samples, 1)
    if not return_mean and (copy or key_added is not None):
        msg = "return_mean=False returns an array and writes nothing: leave out copy and key_added."
        raise ValueError(msg)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices, capability=Capability.PROTEIN)
    slot = fitted.slot("obsm", getattr(fitted.keys, name), key_added)
    panel = Panel.of(fitted, fitted.batch_codes(transform_batch), protein_list, all_decoded=all_decoded)
    module, n_noise = fitted.module, fitted.module.n_noise
    n_more = panel.measured.shape[1] if more_noise else 0

    def samples(cells: Minibatch, draws: Draws) -> tuple[Tensor]:
        noise = draws.normal(len(cells.x), n_samples, n_noise + n_more)
        posteriors = module.posteriors(cells)

        def one(s: int) -> Tensor:
            z, _ = module.draw(cells, posteriors, noise[:, s, :n_noise])
            of_proteins = torch.cat([noise[:, s, module.n_latent : n_noise - 1], noise[:, s, n_noise:]], dim=1)
            return sample(panel, module.transform_z(z), cells, of_proteins)[:, panel.columns]

        drawn = map(one, range(n_samples))
        return (reduce(torch.Tensor.add_, drawn).div_(n_samples) if return_mean else torch.stack(list(drawn)),)

    start = logg.info(f"computing {what} from fit {fitted.fit.key!r}")
    if imputes:
        log_imputed(panel)
    size = n_samples * (n_noise + n_more)
    parts = fitted.map(samples, batch_size=batch_size, seed=seed, floats_per_cell=size)
    values = np.concatenate([part for _, (part,) in parts], axis=0 if return_mean else 1)
    if not return_mean:
        logg.info("    finished", time=start)
        return values
    if imputes:
        _warn_of_implausible(panel, values)
    results.write_proteins(adata, slot, values, fitted.rows, panel.names)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, {what} (adata.obsm)")
    return adata if copy else None
