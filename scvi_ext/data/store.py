"""All columns that a model reads, for the chosen cells, in host memory."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_ext._bar import progress_bar
from scvi_ext._errors import listing, missing_key
from scvi_ext.data.audit import LARGEST_EXACT
from scvi_ext.data.disk import (
    BLOCK_BYTES,
    ENTRY_BYTES,
    DiskCounts,
    check_chunks,
    chunk_rows,
    chunks_of_block,
    estimated_bytes,
    memory_limit,
    read_into_memory,
    row_marks,
    row_totals,
)
from scvi_ext.data.matrix import check_rows_stored, counts_matrix, on_disk, read_all, read_rows, row_chunks
from scvi_ext.data.proteins import background
from scvi_ext.data.registry import codes, column, known_codes
from scvi_ext.data.sampler import Blocks
from scvi_ext.kernels.sparse import all_counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import scipy.sparse as sp
    from anndata import AnnData

    from scvi_ext._contract import DataSummary, Stream
    from scvi_ext.data.registry import Registry

# Standard deviation 0.01 of the log library: a batch with one cell, or downsampled to one depth, keeps a proper prior.
MIN_LIBRARY_VARIANCE = 1e-4
_STRETCH_BYTES = 2**26  # read at once where all cells are gone over


def resolve_indices(adata: AnnData, indices: Any) -> np.ndarray | None:
    """Row numbers of the chosen cells, in the order given.

    Parameters
    ----------
    adata
        Annotated data.
    indices
        Row numbers, a mask over all cells, names of cells, a slice, or None for all cells.

    Returns
    -------
    int64 row numbers between 0 and n - 1, shape (m,), or None for all cells.

    Raises
    ------
    IndexError
        A row number is out of range.
    KeyError
        A name is not in ``adata.obs_names``.
    TypeError
        ``indices`` is none of these kinds.
    ValueError
        A mask has the wrong length or another order of cells, or names are asked for that are not unique.
    """
    n = adata.n_obs
    if indices is None:
        return None
    if isinstance(indices, slice):
        return np.arange(n)[indices]
    chosen = np.atleast_1d(np.asarray(indices))
    if chosen.ndim != 1:
        msg = f"indices has shape {chosen.shape}; one dimension is needed."
        raise ValueError(msg)
    if chosen.size == 0 and chosen.dtype != bool:
        return np.empty(0, dtype=np.int64)
    if chosen.dtype == bool:
        return _from_mask(adata, chosen, indices)
    if chosen.dtype.kind in "iu":
        outside = (chosen < -n) | (chosen >= n)
        if outside.any():
            msg = f"indices has {outside.sum()} row numbers outside 0 to {n - 1}, the first is {chosen[outside][0]}."
            raise IndexError(msg)
        chosen = chosen.astype(np.int64)
        return np.where(chosen < 0, chosen + n, chosen)
    if all(isinstance(name, str) for name in chosen):
        return _from_names(adata, chosen)
    msg = f"indices has dtype {chosen.dtype}; row numbers, a mask of booleans, names of cells or a slice are needed."
    raise TypeError(msg)


def _from_mask(adata: AnnData, mask: np.ndarray, given: Any) -> np.ndarray:
    if len(mask) != adata.n_obs:
        msg = f"The mask in indices has {len(mask)} entries and adata has {adata.n_obs} cells."
        raise ValueError(msg)
    if isinstance(given, pd.Series) and not given.index.equals(adata.obs_names):
        msg = "The mask in indices names its cells, and they are not adata.obs_names in the same order: reindex it."
        raise ValueError(msg)
    return np.flatnonzero(mask)


def _from_names(adata: AnnData, names: np.ndarray) -> np.ndarray:
    if not adata.obs_names.is_unique:
        msg = "Cells cannot be chosen by name: adata.obs_names has duplicates. Call adata.obs_names_make_unique()."
        raise ValueError(msg)
    rows = adata.obs_names.get_indexer(names)
    if (rows < 0).any():
        absent = names[rows < 0]
        msg = f"{len(absent)} of {len(names)} names in indices are not in adata.obs_names: {listing(absent, 3)}."
        raise KeyError(msg)
    return rows.astype(np.int64)


def check_unique_genes(adata: AnnData, name: str = "adata") -> None:
    """Raise a ValueError if two genes have the same name; ``name``: what messages call the AnnData."""
    if not adata.var_names.is_unique:
        repeated = adata.var_names[adata.var_names.duplicated()].unique()
        msg = (
            f"{name}.var_names has {len(repeated)} names more than once: {listing(repeated, 3)}. "
            f"Genes are matched by name: call {name}.var_names_make_unique() first."
        )
        raise ValueError(msg)


def _gene_order(adata: AnnData, var_names: Sequence[str] | None) -> np.ndarray | None:
    """Columns of ``adata`` in the order of ``var_names``; None if they are the columns as they stand."""
    if var_names is None:
        return None
    check_unique_genes(adata)
    wanted = pd.Index(var_names)
    order = adata.var_names.get_indexer(wanted)
    if (order < 0).any():
        absent = wanted[order < 0]
        msg = (
            f"{len(absent)} of the {len(wanted)} genes of the fit are not in adata.var_names: {listing(absent, 5)}. "
            "All of them are needed, in any order, under the same names."
        )
        raise KeyError(msg)
    return None if np.array_equal(order, np.arange(adata.n_vars)) else order


def numeric_column(obs: pd.DataFrame, key: str) -> np.ndarray:
    """``obs[key]`` as finite float32 numbers, shape (n,)."""
    values = column(obs, key)
    if not pd.api.types.is_numeric_dtype(values.dtype):
        msg = (
            f"adata.obs[{key!r}] has dtype {values.dtype}; numbers are needed. Convert it (pandas.to_numeric); "
            "categories belong in batch_key or categorical_covariate_keys."
        )
        raise TypeError(msg)
    with np.errstate(over="ignore"):  # becomes infinite, and is reported as such
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan).astype(np.float32)
    _check_all(np.isfinite(numbers), obs, key, "is missing, infinite or beyond float32", "Fill them in")
    return numbers


def size_factors(obs: pd.DataFrame, key: str) -> np.ndarray:
    """``obs[key]`` as positive finite float32 numbers, shape (n,)."""
    numbers = numeric_column(obs, key)
    _check_all(numbers > 0, obs, key, "is not positive", "Size factors multiply the mean: compute them again")
    return numbers


def _check_all(good: np.ndarray, obs: pd.DataFrame, key: str, what: str, advice: str) -> None:
    if not good.all():
        msg = (
            f"adata.obs[{key!r}] {what} in {(~good).sum()} of {len(good)} cells, first in "
            f"{listing(obs.index[~good], 3)}. {advice}, or leave these cells out."
        )
        raise ValueError(msg)


def protein_names(adata: AnnData, key: str, names_key: str | None) -> tuple[str, ...] | None:
    """Names of the columns of ``obsm[key]``: those of a table, or of an array in ``uns[names_key]``; None without."""
    if key not in adata.obsm:
        raise missing_key("adata.obsm", key, adata.obsm)
    proteins = adata.obsm[key]
    if len(proteins.shape) != 2:
        msg = f"adata.obsm[{key!r}] has shape {proteins.shape}; cells x proteins are needed."
        raise ValueError(msg)
    if isinstance(proteins, pd.DataFrame):
        names = pd.Index(proteins.columns.astype(str))
    elif names_key is None:
        return None
    elif names_key not in adata.uns:
        missing = missing_key("adata.uns", names_key, adata.uns, f"the names of the proteins in adata.obsm[{key!r}]")
        msg = f"{missing.args[0]} Columns of an array are found by these: adata.uns[{names_key!r}] = [...]."
        raise KeyError(msg)
    else:
        names = pd.Index(list(map(str, adata.uns[names_key])), dtype=object)
    if len(names) != proteins.shape[1]:
        msg = (
            f"adata.obsm[{key!r}] has {proteins.shape[1]} proteins and there are {len(names)} names in "
            f"adata.uns[{names_key!r}]; one for each is needed."
        )
        raise ValueError(msg)
    if not names.is_unique:
        repeated = names[names.duplicated()].unique()
        msg = f"The proteins in adata.obsm[{key!r}] have names more than once: {listing(repeated)}. Rename them."
        raise ValueError(msg)
    return tuple(names)


def protein_matrix(adata: AnnData, registry: Registry, names: Sequence[str]) -> Any:
    """The registered entry of ``obsm`` as a matrix of cells x proteins, in the order of ``names``."""
    key = registry.protein_obsm_key
    own = protein_names(adata, key, registry.protein_names_uns_key)
    proteins = adata.obsm[key]
    if own is None:
        if proteins.shape[1] != len(names):
            msg = f"adata.obsm[{key!r}] has {proteins.shape[1]} columns; {len(names)} proteins were registered."
            raise ValueError(msg)
        return proteins
    absent = [name for name in names if name not in own]
    if absent:
        msg = f"adata.obsm[{key!r}] lacks {len(absent)} of {len(names)} proteins: {listing(absent, 5)}."
        raise KeyError(msg)
    order = [own.index(name) for name in names]
    if isinstance(proteins, pd.DataFrame):
        return _numbers(proteins.iloc[:, order], key)
    return proteins if order == list(range(len(own))) else proteins[:, order]


def _numbers(table: pd.DataFrame, key: str) -> np.ndarray:
    words = [f"{name} ({dtype})" for name, dtype in table.dtypes.items() if not pd.api.types.is_numeric_dtype(dtype)]
    if words:
        msg = (
            f"adata.obsm[{key!r}] has {len(words)} proteins that are not numbers: {listing(words, 3)}. Convert them: "
            f"adata.obsm[{key!r}] = adata.obsm[{key!r}].astype('float32')."
        )
        raise TypeError(msg)
    values = table.to_numpy()
    if values.dtype == object:  # columns of several dtypes, or <NA>
        return table.to_numpy(np.float64, na_value=np.nan)
    return values


def known_proteins(adata: AnnData, registry: Registry) -> list[str]:
    """Those of the registered proteins that ``adata`` has; none where there is no such entry of ``obsm``."""
    if registry.protein_obsm_key not in adata.obsm:
        return []
    own = protein_names(adata, registry.protein_obsm_key, registry.protein_names_uns_key)
    if own is None:
        protein_matrix(adata, registry, registry.protein_names)  # as many columns as names
        return list(registry.protein_names)
    present = set(own)
    return [name for name in registry.protein_names if name in present]


def check_proteins(adata: AnnData, registry: Registry, batch_index: np.ndarray) -> None:
    """Raise a KeyError for a registered protein that is lacking, unless no batch of the cells has measured it."""
    names, present = registry.protein_names, known_proteins(adata, registry)
    for batch in np.unique(batch_index) if len(present) < len(names) else ():
        unmeasured = registry.missing_proteins[batch] if registry.missing_proteins and batch >= 0 else ()
        if not {*present, *unmeasured}.issuperset(names):
            protein_matrix(adata, registry, names)  # says what is lacking


@dataclass(frozen=True)
class CellStore:
    """All columns that a model reads, for the chosen cells, genes in the order of the network. Not to be written to.

    All but the counts are in host memory, and so are these unless they are too many.
    """

    counts: sp.csr_matrix | DiskCounts  # (n, G) float32
    batch_index: np.ndarray  # (n,) int64, zeros when no batch is registered
    labels: np.ndarray | None  # (n,) int64, -1 = unlabelled
    size_factor: np.ndarray | None  # (n,) float32
    categorical: np.ndarray | None  # (n, number of categorical covariates) int64
    continuous: np.ndarray | None  # (n, number of continuous covariates) float32
    protein: np.ndarray | None  # (n, P) float32
    obs_names: pd.Index
    var_names: pd.Index
    chunk: int | None = None  # of counts that come from disk, cells that lie together there

    @classmethod
    def from_adata(
        cls,
        adata: AnnData,
        registry: Registry,
        *,
        var_names: Sequence[str] | None = None,
        indices: Any = None,
        columns: frozenset[str] = frozenset(),
        labels_optional: bool = False,
    ) -> CellStore:
        """Read the registered columns.

        Parameters
        ----------
        adata
            Annotated data, in memory or backed.
        registry
            What ``pp.setup_anndata`` wrote, here or where the model was trained.
        var_names
            Genes of the network. They are found by name; further genes of ``adata`` are left out.
        indices
            The chosen cells, as in :func:`resolve_indices`.
        columns
            Which of ``labels``, ``size_factor``, ``categorical``, ``continuous`` and ``protein`` to read. The others,
            and those that are not registered, are None.
        labels_optional
            Whether a label that is missing or not among the registered ones, or a missing column of labels, counts as
            no label.
        """
        rows = resolve_indices(adata, indices)
        genes = _gene_order(adata, var_names)
        names = adata.var_names if var_names is None else pd.Index(var_names)
        obs = adata.obs if rows is None else adata.obs.iloc[rows]
        readers = {
            "labels": (registry.labels_key, lambda key: _labels(obs, registry, optional=labels_optional)),
            "size_factor": (registry.size_factor_key, lambda key: size_factors(obs, key)),
            "categorical": (registry.categorical_covariate_keys, lambda keys: _categorical(obs, registry)),
            "continuous": (
                registry.continuous_covariate_keys,
                lambda keys: np.column_stack([numeric_column(obs, key) for key in keys]),
            ),
            "protein": (registry.protein_obsm_key, lambda key: _protein(adata, registry, rows, batch_index, obs.index)),
        }
        batch_index = (
            codes(obs, registry.batch_key, registry.batch_categories)
            if registry.batch_key
            else np.zeros(len(obs), dtype=np.int64)
        )
        optional = {name: read(key) if name in columns and key else None for name, (key, read) in readers.items()}
        matrix = counts_matrix(adata, registry.layer, "the layer that pp.setup_anndata registered")
        return cls(
            counts=_counts(matrix, rows, genes, registry, obs.index, adata.var_names),
            batch_index=batch_index,
            obs_names=obs.index,
            var_names=names,
            chunk=chunk_rows(matrix) if on_disk(matrix) else None,
            **optional,
        )

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.counts.shape[0]

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.counts.shape[1]

    def cells_of(self, stream: Stream, cells: np.ndarray) -> np.ndarray:
        """Those of the positions ``cells`` that belong to a stream."""
        return cells[self.labels[cells] >= 0] if stream.labelled_only else cells

    def take(self, rows: np.ndarray) -> CellStore:
        """The cells at these positions, in their order, as often as they are named."""
        fields = ("counts", "batch_index", "labels", "size_factor", "categorical", "continuous", "protein", "obs_names")
        columns = {name: getattr(self, name) for name in fields}
        taken = replace(self, chunk=None, **{name: None if c is None else c[rows] for name, c in columns.items()})
        taken.counts.has_canonical_format = self.counts.has_canonical_format  # which SciPy would look for again
        return taken

    def stretches(self) -> Iterator[tuple[slice, sp.csr_matrix]]:
        """The counts of consecutive cells, stretch by stretch, in host memory."""
        if not self.on_disk:
            for start, chunk in row_chunks(self.counts):
                yield slice(start, start + chunk.shape[0]), chunk
            return
        length = max(1, int(self.n_cells * _STRETCH_BYTES / max(self.n_bytes, 1)))
        for start in range(0, self.n_cells, length):
            stretch = slice(start, min(start + length, self.n_cells))
            yield stretch, self.counts[stretch]

    @property
    def on_disk(self) -> bool:
        """Whether the counts stay on disk."""
        return isinstance(self.counts, DiskCounts)

    @property
    def n_bytes(self) -> int:
        """What the counts take in host memory, or would take."""
        if self.on_disk and self.counts.sizes is None:
            return estimated_bytes(self.counts.matrix, self.n_cells)
        return self.counts.nnz * ENTRY_BYTES

    def blocks(self) -> Blocks | None:
        """The order in which an epoch goes over them; None for any. It follows from the file, not from the machine."""
        if self.chunk is None:
            return None
        self.totals  # noqa: B018 - all entries are counted
        n_blocks = math.ceil(self.n_bytes / BLOCK_BYTES)
        return Blocks(n_blocks, chunks_of_block(self.chunk, self.n_cells, n_blocks)) if n_blocks > 1 else None

    @property
    def totals(self) -> np.ndarray:
        """Float64 sum of the counts of each cell, (n,)."""
        return self._sums[0]

    @property
    def sizes(self) -> np.ndarray:
        """Entries of each cell, (n,)."""
        if not self.on_disk:
            return np.diff(self.counts.indptr)
        self.totals  # noqa: B018 - all entries are counted
        return self.counts.sizes

    def summary(self, registry: Registry) -> DataSummary:
        """Sizes, and mean and variance of the log library size of the cells with a positive finite sum in each batch.

        The variance is that of the population, at least ``MIN_LIBRARY_VARIANCE``. A batch without such cells gets the
        mean and variance over all of them. Of proteins that were read, also where to start with their background.
        """
        totals = self.totals
        filled = (totals > 0) & np.isfinite(totals)
        library, batches = np.log(totals[filled]), self.batch_index[filled]
        sizes = registry.sizes(self.n_genes)
        groups = [library[batches == batch] for batch in range(sizes.n_batch)]
        groups = [next(values for values in (group, library, np.zeros(1)) if len(values)) for group in groups]
        if self.protein is not None:
            mask = np.array(sizes.proteins.protein_batch_mask)
            means, scales = background(self.protein, self.batch_index, mask)
            start = {"background_means": _tuples(means), "background_scales": _tuples(scales)}
            sizes = replace(sizes, proteins=replace(sizes.proteins, **start))
        return replace(
            sizes,
            library_log_means=tuple(float(group.mean()) for group in groups),
            library_log_vars=tuple(max(float(group.var()), MIN_LIBRARY_VARIANCE) for group in groups),
        )

    def fingerprint(self) -> str:
        """Hash of the shape, of the sums over cells and over genes, and of all other columns.

        Two stores with the same cells and genes in the same order have the same one.
        """
        digest = hashlib.sha256(repr(self.counts.shape).encode())
        columns = (self.batch_index, self.labels, self.size_factor, self.categorical, self.continuous, self.protein)
        for values in (*self._sums, *columns):
            digest.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    @cached_property
    def _sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Float64 sums of the counts per cell and per gene: independent of how the matrix is stored and read."""
        cells, genes = np.zeros(self.n_cells), np.zeros(self.n_genes)
        sizes, marks = np.zeros(self.n_cells, np.int32), np.zeros(self.n_cells)
        bar = progress_bar(self.n_cells, "count", "cell", None if self.on_disk else False)
        for stretch, counts in self.stretches():
            bar.update(counts.shape[0])
            cells[stretch] = row_totals(counts)
            # Of counts that are no integers sums are rounded: one after the other, wherever a stretch ends.
            with np.errstate(over="ignore", invalid="ignore"):
                np.add.at(genes, counts.indices.astype(np.int64), counts.data.astype(np.float64))
            sizes[stretch] = np.diff(counts.indptr)
            if self.on_disk:
                marks[stretch] = row_marks(counts)
        bar.close()
        if self.on_disk:
            self.counts.remember(sizes, marks)
        return cells, genes


def _counts(
    matrix: Any,
    rows: np.ndarray | None,
    genes: np.ndarray | None,
    registry: Registry,
    cells: pd.Index,
    names: pd.Index,
) -> sp.csr_matrix | DiskCounts:
    """These rows and columns, in host memory if they come from there or do not take too much of it."""
    if on_disk(matrix):
        check_chunks(matrix)
    if on_disk(matrix) and estimated_bytes(matrix, len(cells)) > memory_limit():
        check_rows_stored(matrix)
        check = partial(_check_rows, registry, cells, names)
        return DiskCounts(matrix, rows, genes, check)
    if rows is None:
        counts = read_into_memory(matrix) if on_disk(matrix) else read_all(matrix)
    else:
        counts = read_rows(matrix, rows)
    check_still_raw(counts, registry, cells, names)
    if genes is not None:
        counts = counts[:, genes]
        counts.sort_indices()
    return counts


def _check_rows(
    registry: Registry, cells: pd.Index, names: pd.Index, counts: sp.csr_matrix, positions: np.ndarray
) -> None:
    check_still_raw(counts, registry, cells[positions], names)


def check_still_raw(counts: sp.csr_matrix, registry: Registry, cells: pd.Index, genes: Sequence[str]) -> None:
    """Raise a ValueError if counts of genes that were raw when they were registered are not so any more."""
    if registry.audit == "clean":
        slot = "adata.X" if registry.layer is None else f"adata.layers[{registry.layer!r}]"
        advice = "Keep the counts in a layer, and register that: pp.setup_anndata(adata, layer='counts', ...)."
        _check_still_counts(counts, slot, "gene", cells, genes, advice)


def _check_still_counts(
    counts: sp.csr_matrix, slot: str, feature: str, cells: pd.Index, names: Sequence[str], advice: str
) -> None:
    """Raise a ValueError if counts that were raw when they were registered are not so any more."""
    values = counts.data
    if not all_counts(values, LARGEST_EXACT):
        bad = ~((values == np.rint(values)) & (values >= 0) & (values <= LARGEST_EXACT))
        first = int(np.argmax(bad))
        row = int(np.searchsorted(counts.indptr, first, side="right") - 1)
        msg = (
            f"{slot} holds {bad.sum()} entries that are no counts, first {values[first]:.6g} in cell {cells[row]!r}, "
            f"{feature} {names[counts.indices[first]]!r}, and it held raw counts when it was set up: has it been "
            f"normalised since? {advice}"
        )
        raise ValueError(msg)


def _labels(obs: pd.DataFrame, registry: Registry, *, optional: bool) -> np.ndarray:
    if optional:
        return known_codes(obs, registry.labels_key, registry.labels_categories)
    return codes(obs, registry.labels_key, registry.labels_categories, registry.unlabeled_category)


def _categorical(obs: pd.DataFrame, registry: Registry) -> np.ndarray:
    pairs = zip(registry.categorical_covariate_keys, registry.covariate_categories, strict=True)
    return np.column_stack([codes(obs, key, categories) for key, categories in pairs])


def _tuples(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))


def _protein(
    adata: AnnData, registry: Registry, rows: np.ndarray | None, batch_index: np.ndarray, cells: pd.Index
) -> np.ndarray:
    """Counts of the registered proteins, (n, P): those that no batch of the cells has measured may be lacking."""
    check_proteins(adata, registry, batch_index)
    key, names = registry.protein_obsm_key, registry.protein_names
    present = known_proteins(adata, registry)
    counts = np.zeros((len(batch_index), len(names)), np.float32)
    if present:
        proteins = protein_matrix(adata, registry, present)
        read = read_all(proteins) if rows is None else read_rows(proteins, rows)
        if registry.audit == "clean":
            advice = (
                "Put the counts back, or keep them in an entry of their own and register that: pp.setup_anndata("
                "adata, protein_obsm_key='protein_counts', ...); of a MuData in a layer, protein_layer='counts'."
            )
            _check_still_counts(read, f"adata.obsm[{key!r}]", "protein", cells, present, advice)
        counts[:, [names.index(name) for name in present]] = read.toarray()
    return counts
