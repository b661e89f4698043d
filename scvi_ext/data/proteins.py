"""Proteins: which were measured in which batch, and where their background is to be looked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_ext._errors import listing, missing_key, one_of, warn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_CELLS = 1000  # of a batch, to look for the background in: their means are known to a few percent then
_ITERATIONS = 50
_MIN_SCALE = 0.1  # of a component on the log scale: narrower than any staining


def missing_proteins(
    counts: np.ndarray, batch_index: np.ndarray, names: Sequence[str], batches: Sequence[str], given: Any
) -> tuple[tuple[str, ...], ...]:
    """Names of the proteins that were not measured in each batch; () where all were measured everywhere.

    Parameters
    ----------
    counts
        Shape (n, P).
    batch_index
        Codes of the batches, shape (n,).
    names, batches
        Of proteins and batches.
    given
        ``"auto"``: those that are zero in all cells of a batch, and in no other all. None: none. Or a mapping from
        batches to the names of the proteins measured there, or to a mask of them; of other batches, all.
    """
    if given is None:
        return ()
    if isinstance(given, Mapping):
        measured = _measured(given, names, batches)
        _warn_of_ignored(counts, batch_index, names, batches, measured)
    else:
        if not isinstance(given, str):
            table = (
                " Of a table of booleans, proteins x batches: dict(table)." if isinstance(given, pd.DataFrame) else ""
            )
            msg = (
                f"protein_batch_mask is a {type(given).__name__}; 'auto', None or a mapping from batches to the names "
                f"of the proteins measured there is needed.{table}"
            )
            raise TypeError(msg)
        one_of("protein_batch_mask", given, ("auto",))
        measured = np.stack([(counts[batch_index == k] > 0).any(0) for k in range(max(1, len(batches)))])
        measured |= ~measured.any(0)  # zero everywhere: nothing says that it was measured anywhere else
    if measured.all():
        return ()
    return tuple(tuple(name for name, known in zip(names, row, strict=True) if not known) for row in measured)


def missing_in_query(
    counts: np.ndarray,
    batch_index: np.ndarray,
    names: Sequence[str],
    batches: Sequence[str],
    known: Sequence[Sequence[str]],
    absent: Sequence[str],
) -> tuple[tuple[str, ...], ...]:
    """The same for new cells beside known batches: in a new batch, what is absent or zero in all of its cells.

    Parameters
    ----------
    counts
        Of the new cells, shape (n, P), zeros where a protein is absent.
    batch_index
        Codes of their batches, shape (n,).
    names, batches
        Of proteins and batches, the known ones first.
    known
        Names of the proteins that were not measured in each known batch.
    absent
        Names of the proteins that the new cells do not have at all.

    Raises
    ------
    ValueError
        A protein is absent and the cells are of a known batch that has measured it.
    """
    for k in np.unique(batch_index[batch_index < len(known)]):
        lacking = [name for name in absent if name not in known[k]]
        if lacking:
            where = f"are of the batch {batches[k]!r}, which" if batches else "have no batch, and the reference"
            advice = "Name their batch" if batches else "Fit the reference with a batch_key, and name one"
            msg = (
                f"{(batch_index == k).sum()} cells {where} has measured {len(lacking)} proteins that adata has not: "
                f"{listing(lacking, 5)}. Their zeros would be taken for measurements. {advice}, batch_name=... or "
                "batch_key=..., or the entry of obsm with the proteins if it has another name, protein_obsm_key=..."
            )
            raise ValueError(msg)
    new = range(len(known), len(batches))
    silent = [~(counts[batch_index == k] > 0).any(0) for k in new]
    missing = (*known, *(tuple(np.array(names)[zero].tolist()) for zero in silent))
    return tuple(map(tuple, missing)) if any(map(len, missing)) else ()


def _measured(given: Mapping[Any, Any], names: Sequence[str], batches: Sequence[str]) -> np.ndarray:
    """The mapping of a user as a mask, (K, P)."""
    if not batches:
        msg = "protein_batch_mask says what was measured in which batch, and no batch_key is given: name the batches."
        raise ValueError(msg)
    mask = np.ones((len(batches), len(names)), dtype=bool)
    for batch, of_batch in given.items():
        if str(batch) not in batches:
            raise missing_key("the batches of protein_batch_mask", str(batch), batches)
        mask[batches.index(str(batch))] = _of_batch(f"protein_batch_mask[{batch!r}]", of_batch, names)
    nowhere = [name for name, somewhere in zip(names, mask.any(0), strict=True) if not somewhere]
    if nowhere:
        msg = f"protein_batch_mask leaves proteins that were measured in no batch: {listing(nowhere)}. Drop them."
        raise ValueError(msg)
    return mask


def _of_batch(what: str, given: Any, names: Sequence[str]) -> np.ndarray:
    """Which proteins were measured in one batch, (P,)."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping | pd.DataFrame) or not np.iterable(given):
        msg = f"{what} is a {type(given).__name__}; names of proteins, or a mask of them, are needed."
        raise TypeError(msg)
    if isinstance(given, pd.Series) and pd.api.types.is_bool_dtype(given.dtype):
        own = given.index.astype(str)
        if not own.is_unique or set(own) != set(names):
            msg = (
                f"{what} is a Series whose index {listing(own, 3)} is not the {len(names)} proteins, "
                f"{listing(names, 3)}: reindex it, or pass a mask without names, .to_numpy()."
            )
            raise ValueError(msg)
        if given.isna().any():
            msg = f"{what} is missing for {listing(own[given.isna()], 3)}; True or False is needed: fillna(False)."
            raise ValueError(msg)
        given = given.set_axis(own)[list(names)]
    chosen = np.asarray(list(given))
    if chosen.dtype == bool:
        if chosen.shape != (len(names),):
            msg = f"{what} has {chosen.size} entries; there are {len(names)} proteins."
            raise ValueError(msg)
        return chosen
    unknown = [name for name in map(str, chosen) if name not in names]
    if unknown:
        msg = f"{what} names proteins that do not exist: {listing(unknown)}."
        raise KeyError(msg)
    return np.isin(names, list(map(str, chosen)))


def _warn_of_ignored(
    counts: np.ndarray, batch_index: np.ndarray, names: Sequence[str], batches: Sequence[str], measured: np.ndarray
) -> None:
    """Warn of counts of proteins that were not measured, as a user says, in the batch that has them."""
    found = []
    for k, batch in enumerate(batches):
        ignored = ((counts[batch_index == k] > 0) & ~measured[k]).sum(0)
        if ignored.any():
            of = listing(np.array(names)[ignored > 0], 5)
            found.append(f"{ignored.sum()} entries of {of} in batch {batch!r}")
    if found:
        warn(
            "protein_batch_mask says of proteins that they were not measured where adata has counts of them, which are "
            f"ignored: {'; '.join(found)}."
        )


def background(counts: np.ndarray, batch_index: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the log of background counts, (K, P) each: the lower of two normal components.

    They are fitted to the log1p counts of each protein and batch; a protein that was not measured in a batch gets the
    means over the batches where it was. Only where to start from: the prior of the background is learned.

    References
    ----------
    Gayoso et al. (2021), Nature Methods 18, 272, methods (there, over the proteins of a cell).
    """
    means, scales = np.zeros(mask.shape), np.ones(mask.shape)
    for k in range(len(mask)):
        cells = np.flatnonzero(batch_index == k)
        cells = cells[:: max(1, len(cells) // _CELLS)]
        if len(cells):
            means[k], scales[k] = _lower_component(np.log1p(counts[cells].astype(np.float64)))
    known = mask & np.isin(np.arange(len(mask)), batch_index)[:, None]
    for values in (means, scales):
        elsewhere = np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)
        values[:] = np.where(known, values, elsewhere)
    return means, np.maximum(scales, _MIN_SCALE)


def _lower_component(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the lower of two normal components of each column, by EM."""
    loc = np.quantile(values, [0.25, 0.9], axis=0)  # (2, P)
    scale = np.maximum(np.stack([values.std(0)] * 2) / 2, _MIN_SCALE)
    share = np.full_like(loc, 0.5)
    for _ in range(_ITERATIONS):
        log_p = np.log(share) - np.log(scale) - 0.5 * ((values[:, None] - loc) / scale) ** 2  # (n, 2, P)
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        weight = p.sum(0) + 1e-9
        share = weight / weight.sum(0)
        loc = (p * values[:, None]).sum(0) / weight
        scale = np.sqrt((p * (values[:, None] - loc) ** 2).sum(0) / weight)
        scale = np.maximum(scale, _MIN_SCALE)
    lower = loc.argmin(0)[None]
    return np.take_along_axis(loc, lower, 0)[0], np.take_along_axis(scale, lower, 0)[0]
