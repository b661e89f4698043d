"""Are these raw counts? Every entry is looked at, in one pass over the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_ext._bar import progress_bar
from scvi_ext._errors import listing
from scvi_ext.data.matrix import on_disk, row_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import scipy.sparse as sp

LARGEST_EXACT = 2**24  # float32 holds every integer up to here
_LARGEST_LOG = 20.0  # log1p of a count stays below this up to 485 million counts
# Sums of independent counts vary at least as much as Poisson noise, so their variance is not below their mean.
# For 20 cells with Poisson sums, P(variance < 0.1 mean) = P(chi2_19 < 1.9) = 2e-7; for more cells it is smaller still.
_MIN_CELLS = 20
_UNDERDISPERSED = 0.1
_SMALLEST_SUM = 2.0  # on average: positive sums of few counts are nearly all 1

_WHAT = {
    "missing": ("are missing (NaN)", "Remove or recompute them; zero counts are 0, not NaN."),
    "infinite": ("are infinite", "Start again from the raw counts."),
    "negative": ("are negative", "Scaled or batch-corrected values cannot be used: pass the raw counts."),
    "fractional": ("are not integers", ""),
    "too_large": (
        f"are above 2**24 = {LARGEST_EXACT:,}",
        "float32 cannot hold such integers exactly; counts of molecules are far smaller: check how they were made.",
    ),
}
# What to do where proteins are another matter than genes.
_WHAT_PROTEIN = {
    "missing": (
        "Zero counts are 0, not NaN, also where a batch has not measured a protein (protein_batch_mask='auto' finds "
        "that): fill them, fillna(0)."
    ),
    "negative": "Centred, scaled or background-corrected values (CLR, DSB) cannot be used: pass the raw counts.",
}


@dataclass(frozen=True)
class Offence:
    """Entries or cells that cannot be raw counts."""

    kind: str
    n_entries: int
    n_cells: int
    features: tuple[str, ...]  # genes or proteins that have such entries
    example: tuple[str, str, float]  # cell, gene, value of the first entry
    cells_per_batch: dict[str, tuple[int, int]]  # batch: offending cells, all cells
    largest: float  # of the finite offending entries


@dataclass(frozen=True)
class CountAudit:
    """What :func:`audit_counts` saw."""

    n_cells: int
    n_genes: int
    non_zeros: int
    largest: float
    offences: tuple[Offence, ...]
    empty_cells: tuple[str, ...]
    silent_genes: tuple[str, ...]
    constant_sums: dict[str, tuple[int, float]]  # batch: cells, mean sum, where sums hardly vary
    feature: str = "gene"

    def problems(self) -> list[str]:
        """What keeps these numbers from being raw counts, one message each; empty if nothing does."""
        messages = self.impossible_entries()
        messages += [
            f"The sums over {self.feature}s of {n} cells{_in(batch)} hardly vary (mean {mean:.6g}), less than by "
            "counting noise: the rows look scaled to a constant (CPM, normalize_total). Pass the raw counts, or "
            "check='warn' if they were downsampled to one depth on purpose (sc.pp.downsample_counts)."
            for batch, (n, mean) in self.constant_sums.items()
        ]
        if self.empty_cells and self.feature == "gene":
            messages.append(
                f"{len(self.empty_cells)} of {self.n_cells} cells have no counts at all: "
                f"{listing(self.empty_cells, 3)}. Leave them out: sc.pp.filter_cells(adata, min_counts=1)."
            )
        return messages

    def impossible_entries(self) -> list[str]:
        """Of the problems, those of single entries that no count can be."""
        return [self._entries(offence) for offence in self.offences]

    def remarks(self) -> list[str]:
        """What is allowed but of no use."""
        if not self.silent_genes:
            return []
        filtering = " To leave them out: sc.pp.filter_genes(adata, min_cells=1)." if self.feature == "gene" else ""
        return [
            f"{len(self.silent_genes)} of {self.n_genes} {self.feature}s are zero in all cells: "
            f"{listing(self.silent_genes, 3)}. A model learns nothing from them.{filtering}"
        ]

    @property
    def _transforms(self) -> str:
        return " (log1p, CLR)" if self.feature == "protein" else ""

    def _entries(self, offence: Offence) -> str:
        what, advice = _WHAT[offence.kind]
        cell, name, value = offence.example
        which = ""
        if self.feature == "protein":
            which = f", in {len(offence.features)} of {self.n_genes} proteins: {listing(offence.features, 3)}"
            advice = _WHAT_PROTEIN.get(offence.kind, advice)
        batches = ", ".join(f"{bad} of {all_} in {batch!r}" for batch, (bad, all_) in offence.cells_per_batch.items())
        if offence.kind == "fractional":
            advice = (
                f"They look log-transformed or normalised{self._transforms}: pass the raw counts"
                if offence.largest < _LARGEST_LOG
                else "They look normalised or estimated: pass the raw counts"
            )
            if self.feature == "gene":
                advice += ", often in a layer (layer='counts')"
            advice += ". Estimated counts (SoupX, CellBender, RSEM) can be rounded, or passed with check='warn'."
        return (
            f"{offence.n_entries} entries in {offence.n_cells} of {self.n_cells} cells {what}"
            f"{f' (cells: {batches})' if batches else ''}{which}, first cell {cell!r}, {self.feature} {name!r}: "
            f"{value:.10g}. {advice}"
        )


def _in(batch: str) -> str:
    return f" in batch {batch!r}" if batch else ""


class _Tally:
    """Offending entries of one kind, added up over chunks."""

    def __init__(self, n_cells: int, n_genes: int):
        self.n_entries = 0
        self.cells = np.zeros(n_cells, dtype=bool)
        self.features = np.zeros(n_genes, dtype=bool)
        self.example: tuple[int, int, float] | None = None
        self.largest = -np.inf

    def add(self, start: int, chunk: sp.csr_matrix, offending: np.ndarray) -> None:
        entries = np.flatnonzero(offending)
        rows = start + np.searchsorted(chunk.indptr, entries, side="right") - 1
        values = chunk.data[entries].astype(np.float64)
        self.n_entries += len(entries)
        self.cells[rows] = True
        self.features[chunk.indices[entries]] = True
        self.largest = max(self.largest, values[np.isfinite(values)].max(initial=-np.inf))
        if self.example is None:
            self.example = (int(rows[0]), int(chunk.indices[entries[0]]), float(values[0]))


def _offending(values: np.ndarray) -> dict[str, np.ndarray]:
    """Masks of the entries that cannot be counts."""
    if values.dtype.kind == "b":
        return {}
    if values.dtype.kind in "iu":
        return {"negative": values < 0, "too_large": values > LARGEST_EXACT}
    whole = values == np.rint(values)
    if whole.all() and values.min(initial=0) >= 0 and values.max(initial=0) <= LARGEST_EXACT:
        return {}
    finite = np.isfinite(values)
    return {
        "missing": np.isnan(values),
        "infinite": np.isinf(values),
        "negative": finite & (values < 0),
        "fractional": finite & ~whole,
        "too_large": finite & (values > LARGEST_EXACT),
    }


def audit_counts(
    matrix: Any,
    genes: Sequence[str],
    obs_names: Sequence[str],
    batch: Any = None,
    *,
    feature: str = "gene",
) -> CountAudit:
    """Look at every entry of a matrix that should hold raw counts.

    Parameters
    ----------
    matrix
        Counts, shape (n, G), of any kind that :mod:`scvi_ext.data.matrix` reads.
    genes
        Names of the genes, shape (G,).
    obs_names
        Names of the cells, shape (n,).
    batch
        Batch of each cell, shape (n,), to count offenders by batch.
    feature
        What a column is called in messages.

    Returns
    -------
    The audit; time grows with the number of non-zero entries, memory with one chunk of rows and one number per cell.
    """
    n_cells, n_genes = matrix.shape
    sums, expressed = np.zeros(n_cells), np.zeros(n_genes, dtype=bool)
    tallies: dict[str, _Tally] = {}
    non_zeros, largest = 0, 0.0
    bar = progress_bar(n_cells, "audit", "cell", None if on_disk(matrix) else False)
    for start, chunk in row_chunks(matrix):
        bar.update(chunk.shape[0])
        for kind, mask in _offending(chunk.data).items():
            if mask.any():
                tallies.setdefault(kind, _Tally(n_cells, n_genes)).add(start, chunk, mask)
        non_zeros += np.count_nonzero(chunk.data)
        largest = max(largest, float(chunk.data[np.isfinite(chunk.data)].max(initial=0)))
        expressed[chunk.indices[chunk.data != 0]] = True
        rows = np.repeat(np.arange(chunk.shape[0]), np.diff(chunk.indptr))
        sums[start : start + chunk.shape[0]] = np.bincount(rows, weights=chunk.data, minlength=chunk.shape[0])

    bar.close()
    batches = pd.Categorical(np.zeros(n_cells, dtype=int) if batch is None else batch)
    names = [""] if batch is None else [str(c) for c in batches.categories]
    return CountAudit(
        n_cells=n_cells,
        n_genes=n_genes,
        non_zeros=int(non_zeros),
        largest=largest,
        offences=tuple(
            _offence(kind, tallies[kind], genes, obs_names, batches.codes, names) for kind in _WHAT if kind in tallies
        ),
        empty_cells=tuple(str(obs_names[i]) for i in np.flatnonzero(sums == 0)),
        silent_genes=tuple(str(genes[i]) for i in np.flatnonzero(~expressed)),
        constant_sums=_constant_sums(sums, batches.codes, names),
        feature=feature,
    )


def _offence(
    kind: str,
    tally: _Tally,
    genes: Sequence[str],
    obs_names: Sequence[str],
    batch_codes: np.ndarray,
    names: list[str],
) -> Offence:
    cell, gene, value = tally.example
    offending = np.bincount(batch_codes[tally.cells], minlength=len(names))
    total = np.bincount(batch_codes, minlength=len(names))
    return Offence(
        kind=kind,
        n_entries=tally.n_entries,
        n_cells=int(tally.cells.sum()),
        features=tuple(str(genes[i]) for i in np.flatnonzero(tally.features)),
        example=(str(obs_names[cell]), str(genes[gene]), value),
        cells_per_batch={
            name: (int(bad), int(n)) for name, bad, n in zip(names, offending, total, strict=True) if name and bad
        },
        largest=tally.largest,
    )


def _constant_sums(sums: np.ndarray, batch_codes: np.ndarray, names: list[str]) -> dict[str, tuple[int, float]]:
    """Batches whose cells have nearly the same total, against the noise that counting makes."""
    found = {}
    usable = np.isfinite(sums) & (sums > 0)
    for code, name in enumerate(names):
        totals = sums[usable & (batch_codes == code)]
        if len(totals) < _MIN_CELLS or totals.mean() < _SMALLEST_SUM:
            continue
        if totals.var(ddof=1) < _UNDERDISPERSED * totals.mean():
            found[name] = (len(totals), float(totals.mean()))
    return found
