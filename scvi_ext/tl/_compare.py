"""What differential_expression and within_group_de share: from sets of cells to a table of comparisons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import listing, number, one_of, whole_number
from scvi_ext._keys import of_proteins
from scvi_ext.data.registry import column
from scvi_ext.data.store import resolve_indices
from scvi_ext.engine.device import resolve_seed
from scvi_ext.fitted import Fitted
from scvi_ext.functional.bayes import bayes_factor, expected_fdr, learned_delta
from scvi_ext.kernels import changes
from scvi_ext.kernels.compiler import in_parallel
from scvi_ext.kernels.sparse import sums_by_set
from scvi_ext.tl import _pool_proteins
from scvi_ext.tl._pool import LEAST_DRAWS, LOWEST, Pool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from anndata import AnnData

    from scvi_ext.data.store import CellStore
    from scvi_ext.tl._pool_proteins import ProteinPool

_LEAST_GENES = 10  # to learn delta from
_CELLS_AT_ONCE = 2**14  # whose counts of proteins are summed
_PER_CELL = 25  # draws of a cell whose importance weights are normalised
_UNEXPRESSED = 0.01  # mean count of a gene, below which it counts as not expressed (as in scvi-tools)


@dataclass(frozen=True)
class Options:
    """How two sets of cells are compared."""

    mode: str
    hypothesis: str
    delta: float | None
    pseudocount: float | None
    protein_pseudocount: float | None
    credible_interval: float
    fdr_target: float
    min_fraction: float
    permuted: bool
    weights: str | None
    n_samples: int
    seed: int

    @classmethod
    def checked(cls, seed: int | None, **given: Any) -> Options:
        """The options of a user, or an error that says what is wrong with them."""
        options = cls(seed=resolve_seed(seed), **given)
        one_of("mode", options.mode, ["change", "vanilla"])
        one_of("hypothesis", options.hypothesis, ["three", "two"])
        if options.weights is not None:
            one_of("weights", options.weights, ["importance"])
        whole_number("n_samples", options.n_samples, 1)
        if options.delta is not None and not 0 < number("delta", options.delta) < np.inf:
            msg = f"delta={options.delta!r} must be positive (a log2 fold change), or None to learn it from the data."
            raise ValueError(msg)
        _check_pseudocount(
            "pseudocount", options.pseudocount, LOWEST, "scale", "takes it from the genes that are not expressed"
        )
        _check_pseudocount(
            "protein_pseudocount",
            options.protein_pseudocount,
            _pool_proteins.LOWEST,
            "mean count",
            "takes the mean of each protein's background",
        )
        if not isinstance(options.permuted, bool):
            msg = f"permuted={options.permuted!r} is a {type(options.permuted).__name__}; True or False is needed."
            raise TypeError(msg)
        for name in ("credible_interval", "fdr_target"):
            if not 0 < number(name, getattr(options, name)) < 1:
                msg = f"{name}={getattr(options, name)!r} must lie between 0 and 1."
                raise ValueError(msg)
        if not 0 <= number("min_fraction", options.min_fraction) <= 1:
            msg = f"min_fraction={options.min_fraction!r} must be a share of cells, from 0 to 1."
            raise ValueError(msg)
        if options.mode == "vanilla":
            defaults = {"hypothesis": "three", "delta": 0.25, "pseudocount": None, "protein_pseudocount": None}
            for name, default in defaults.items():
                if getattr(options, name) != default:
                    msg = f"{name} has no effect with mode='vanilla', which asks for any difference of the scales."
                    raise ValueError(msg)
        return options


def _check_pseudocount(name: str, value: float | None, lowest: int, what: str, default: str) -> None:
    if value is not None and not 2.0**lowest <= number(name, value) < np.inf:
        msg = (
            f"{name}={value!r} must be at least {2.0**lowest:.2g}, the smallest {what} that is told apart, and finite; "
            f"None {default}."
        )
        raise ValueError(msg)


@dataclass(frozen=True)
class Comparison:
    """Two sides, each a union of sets of cells."""

    group: str
    reference: str
    left: np.ndarray  # (S,) bool
    right: np.ndarray  # (S,) bool


def restrict(codes: np.ndarray, adata: AnnData, indices: Any) -> None:
    """Set the codes of all cells but those at ``indices`` (None: all) to -1, in place."""
    if indices is not None:
        codes[np.setdiff1d(np.arange(adata.n_obs), resolve_indices(adata, indices))] = -1


def groups_of(adata: AnnData, name: str, indices: Any = None) -> tuple[list[str], np.ndarray]:
    """Names of the groups in ``adata.obs[name]`` and the code of every cell, -1 for none or outside ``indices``."""
    if not isinstance(name, str):
        msg = f"{name!r} is a {type(name).__name__}; the name of a column of adata.obs is needed."
        raise TypeError(msg)
    values = pd.Categorical(column(adata.obs, name))
    codes = values.codes.astype(np.int64)
    restrict(codes, adata, indices)
    names = [str(category) for category in values.categories]
    if len(set(names)) < len(names):
        msg = f"adata.obs[{name!r}] has values that read the same as text: {listing(names)}. Rename its categories."
        raise ValueError(msg)
    return names, codes


def carry_out(
    adata: AnnData,
    sets: np.ndarray,
    comparisons: Sequence[Comparison],
    options: Options,
    what: str,
    described: dict[str, str],
    *,
    key: str | None,
    batch_correction: bool,
    transform_batch: Any,
    batch_size: int | None,
    key_added: str | None,
) -> None:
    """Compare sets of the cells of ``adata`` (-1: none) and write the slot that ``FitKeys`` calls ``what``."""
    if not isinstance(batch_correction, bool):
        msg = f"batch_correction={batch_correction!r} is a {type(batch_correction).__name__}; True or False is needed."
        raise TypeError(msg)
    if batch_correction and transform_batch is not None:
        msg = "batch_correction=True decodes in all batches: leave out transform_batch, or batch_correction."
        raise ValueError(msg)
    chosen = np.flatnonzero(sets >= 0)
    everything = len(chosen) == adata.n_obs
    fitted = Fitted.open(adata, key, None if everything else chosen, decodes=options.weights is not None)
    if batch_correction and len(fitted.registry.batch_categories) < 2:
        msg = f"batch_correction=True has no effect: fit {fitted.fit.key!r} knows one batch only."
        raise ValueError(msg)
    decoded_in = fitted.registry.batch_categories if batch_correction else transform_batch
    batches = fitted.batch_codes(decoded_in, of_profile=True)
    if options.protein_pseudocount is not None and fitted.store.protein is None:
        msg = f"protein_pseudocount has no effect: fit {fitted.fit.key!r} ({fitted.fit.model!r}) has no proteins."
        raise ValueError(msg)
    slot = fitted.slot("uns", getattr(fitted.keys, what), key_added)
    start = logg.info(f"comparing {len(comparisons)} groups of cells by fit {fitted.fit.key!r}")
    by_gene, by_protein, n_decoded = _compare(fitted, sets[chosen], comparisons, batches, options, batch_size)
    params = {**described, "method": f"scvi_ext {options.mode}", "use_raw": False, "fit": fitted.fit.key}
    params |= {name: value for name, value in asdict(options).items() if value is not None}
    params |= {"pvals": "1 - proba_de", "pvals_adj": "expected false discovery rate", "n_decoded": n_decoded}
    if batches != [None]:
        params["batches"] = np.array([fitted.batch_name(batch) for batch in batches])
    of_genes = params if fitted.registry.layer is None else params | {"layer": fitted.registry.layer}
    genes, groups = fitted.fit.var_names, [comparison.group for comparison in comparisons]
    added = f"    {slot!r}, in the layout of sc.tl.rank_genes_groups, and a table (adata.uns)"
    called = f"genes called at an expected FDR of {options.fdr_target:g}: {_called(by_gene, groups)}\n"
    if by_protein is None:
        table = _table(by_gene, genes, comparisons)
    else:
        proteins = fitted.registry.protein_names
        table = _table_of_both(by_gene, by_protein, genes, proteins, comparisons)
        of_protein = table[table["feature_type"] == "protein"].reset_index(drop=True)
        ranked = {"params": params, **_ranked(by_protein, proteins, groups), "table": of_protein}
        results.write_uns(adata, of_proteins(slot), ranked)
        added += f"\n    {of_proteins(slot)!r}, the same of proteins (adata.uns)"
        called += f"proteins called: {_called(by_protein, groups)}\n"
        unknown = np.array(proteins)[(by_protein["reason"] == _NOT_MEASURED).any(0)]
        if len(unknown):
            called += (
                f"{len(unknown)} proteins were not measured where some groups are decoded: {listing(unknown, 5)}. "
                "batch_correction=True or transform_batch imputes them\n"
            )
    results.write_uns(adata, slot, {"params": of_genes, **_ranked(by_gene, genes, groups), "table": table})
    chance = max(float(np.nanmax(c["proba_mcse"], initial=0)) for c in (by_gene, by_protein) if c is not None)
    logg.info(
        "    finished",
        time=start,
        deep=f"decoded {n_decoded} profiles; Monte-Carlo error of probabilities to {chance:.2g}\n"
        f"{called}added\n{added}",
    )


def _called(columns: dict[str, np.ndarray], groups: Sequence[str]) -> str:
    return ", ".join(f"{group}: {n}" for group, n in zip(groups[:10], columns["is_de"].sum(1), strict=False))


def _compare(
    fitted: Fitted,
    sets: np.ndarray,
    comparisons: Sequence[Comparison],
    batches: Sequence[int | None],
    options: Options,
    batch_size: int | None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None, int]:
    """What is known of every comparison and gene, (C, G) each, and protein, and the number of decoded profiles.

    Parameters
    ----------
    fitted
        The fit and its cells.
    sets
        Which set each of these cells belongs to, 0 to S - 1, shape (n,).
    comparisons
        What to compare.
    batches
        Codes of the batches to decode in; ``[None]`` is each cell's own. Only draws of one decode batch make a pair.
    """
    n_cells = np.bincount(sets, minlength=len(comparisons[0].left))  # (S,)
    left, right = (_shares(n_cells, [getattr(c, side) for c in comparisons]) for side in ("left", "right"))
    of_sets = _of_counts(fitted.store, sets, n_cells)
    observed = np.stack([np.einsum("cs,isg->cig", shares, of_sets) for shares in (left, right)], 1)  # (C, 2, 3, G)
    n_on_sides = np.array([[n_cells[c.left].sum(), n_cells[c.right].sum()] for c in comparisons])
    pool = Pool(
        fitted,
        sets,
        n_cells,
        batches,
        n_samples=options.n_samples,
        per_cell=_PER_CELL if options.weights == "importance" else 1,
        seed=options.seed,
        batch_size=batch_size,
    )
    described, permuted, with_proteins = [], [], []
    for genes, proteins in pool.rounds():
        histograms, scales = pool.decode(genes, proteins)
        if not described:
            sides = np.stack([left @ scales, right @ scales], 1)  # (C, 2, G)
            pseudocounts = np.array([_pseudocount(*a, options) for a in zip(sides, observed, n_on_sides, strict=True)])
            deltas = np.array([_delta(*both, options) for both in zip(sides, pseudocounts, strict=True)])
        draws = histograms, pool.totals, pool.n_effective
        described.append(_describe(draws, left, right, pseudocounts, deltas, options))
        if options.permuted:
            both = _shares(n_cells, [c.left | c.right for c in comparisons])
            null = _describe(draws, both, both, pseudocounts, deltas, options)
            permuted.append(null[..., :2])
        if pool.proteins is not None:
            with_proteins.append(_describe_proteins(pool.proteins, comparisons, deltas, options))
    by_gene = _columns(
        np.concatenate(described, 1),
        np.concatenate(permuted, 1) if permuted else None,
        sides,
        observed,
        pseudocounts[:, None],
        deltas,
        options,
    )
    if pool.proteins is None:
        return by_gene, None, pool.n_decoded
    parts = (np.concatenate(of_rounds, 1) for of_rounds in zip(*with_proteins, strict=True))
    described, permuted, means, pseudocounts = parts
    observed, n_measured = _of_protein_counts(fitted, sets, comparisons)
    by_protein = _columns(
        described,
        permuted if options.permuted else None,
        np.moveaxis(means, 2, 1),
        observed,
        pseudocounts,
        deltas,
        options,
    )
    for side in (0, 1):
        by_gene[f"n_measured{side + 1}"] = np.broadcast_to(n_on_sides[:, side, None], sides[:, 0].shape)
        by_protein[f"n_measured{side + 1}"] = n_measured[:, side]
    return by_gene, by_protein, pool.n_decoded


def _columns(
    described: np.ndarray,
    permuted: np.ndarray | None,
    means: np.ndarray,
    observed: np.ndarray,
    pseudocounts: np.ndarray,
    deltas: np.ndarray,
    options: Options,
) -> dict[str, np.ndarray]:
    """All columns of the table that are numbers, (C, G) each; ``means`` and ``observed`` are (C, 2, ..., G)."""
    columns = _decided(described, np.fmax.reduce(observed[:, :, 2], 1), options)
    if permuted is not None:
        columns["proba_permuted"] = _probability(*np.moveaxis(permuted, -1, 0), options)
    for side in (0, 1):
        columns[f"scale{side + 1}"] = means[:, side]
        for name, values in zip(_OBSERVED, np.moveaxis(observed[:, side], 1, 0), strict=True):
            columns[f"{name}{side + 1}"] = values
    for name, values in (("pseudocount", pseudocounts), ("delta", deltas[:, None])):
        columns[name] = np.broadcast_to(values, means[:, 0].shape)
    return columns


def _describe_proteins(
    pool: ProteinPool, comparisons: Sequence[Comparison], deltas: np.ndarray, options: Options
) -> tuple[np.ndarray, ...]:
    """What is known of every comparison and protein of a pool, NaN where a side has hardly a draw of it.

    Outputs of ``kernels.changes``, (C, P, outputs), the first two of permuted pairs, (C, P, 2), means of the foreground
    on both sides, (C, P, 2), and pseudocounts, (C, P).
    """
    shape = len(comparisons), pool.histograms.shape[2]
    described, permuted, means = (np.full((*shape, n), np.nan) for n in (len(changes.OUTPUTS), 2, 2))
    pseudocounts = np.full(shape, np.nan)
    sides = np.array([[c.left, c.right, c.left | c.right] for c in comparisons])  # (C, 3, S)
    for i in range(shape[1]):
        of_protein = pool.of(i)
        if of_protein is None:
            continue
        enough = (sides[:, :2] @ of_protein.n_drawn.T >= LEAST_DRAWS).all((1, 2))
        if not enough.any():
            continue
        n_cells = np.where(of_protein.n_drawn.all(0), of_protein.n_cells, 0)
        left, right, both = (_shares(n_cells, of_side) for of_side in sides[enough].swapaxes(0, 1))
        means[enough, i] = np.stack([left @ of_protein.foreground, right @ of_protein.foreground], 1)
        pseudocounts[enough, i] = added = _protein_pseudocount(of_protein.background, left, right, options)
        known = (added, deltas[enough], options, _pool_proteins.LOWEST)
        described[enough, i] = _describe(of_protein[:3], left, right, *known)[:, 0]
        if options.permuted:
            permuted[enough, i] = _describe(of_protein[:3], both, both, *known)[:, 0, :2]
    return described, permuted, means, pseudocounts


def _protein_pseudocount(background: np.ndarray, left: np.ndarray, right: np.ndarray, options: Options) -> np.ndarray:
    """What is added to the foreground of a protein in every comparison: its mean background, on the side with more.

    A foreground that is small beside the background can hardly be told from it, and folds of it are folds of nothing.
    """
    if options.mode == "vanilla":
        return np.zeros(len(left))
    if options.protein_pseudocount is not None:
        return np.full(len(left), float(options.protein_pseudocount))
    return np.maximum(np.maximum(left @ background, right @ background), 2.0**_pool_proteins.LOWEST)


def _of_protein_counts(
    fitted: Fitted, sets: np.ndarray, comparisons: Sequence[Comparison]
) -> tuple[np.ndarray, np.ndarray]:
    """The same as of genes' counts on both sides, (C, 2, 3, P), and how many cells have measured them, (C, 2, P).

    Cells of batches without a protein do not count; mean counts per 10,000 are of all proteins of a cell.
    """
    store, mask = fitted.store, fitted.module.protein_batch_mask.cpu().numpy()
    sides = np.array([[c.left, c.right] for c in comparisons])  # (C, 2, S)
    sums = np.zeros((4, sides.shape[2], mask.shape[1]))
    for first in range(0, store.n_cells, _CELLS_AT_ONCE):
        cells = slice(first, first + _CELLS_AT_ONCE)
        measured = mask[store.batch_index[cells]]
        counts = np.where(measured, store.protein[cells].astype(np.float64), 0)
        normalized = counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1))
        n = len(counts)
        of_set = sp.csr_matrix((np.ones(n), (sets[cells], np.arange(n))), (sides.shape[2], n))
        for total, values in zip(sums, (counts, normalized, counts > 0, measured), strict=True):
            total += of_set @ values
    *totals, n_measured = np.einsum("cks,isp->ickp", sides, sums)
    return np.stack(totals, 2) / np.where(n_measured > 0, n_measured, np.nan)[:, :, None], n_measured.astype(np.int64)


_REASONS = ["", "unexpressed", "below min_fraction", "not measured"]  # for not even judging a gene or protein
_NOT_MEASURED = _REASONS.index("not measured")
_OBSERVED = ("raw_mean", "raw_normalized_mean", "fraction")


def _shares(n_cells: np.ndarray, sides: Sequence[np.ndarray]) -> np.ndarray:
    """Share of every set among the cells of a side, (C, S): cells weigh the same, however many draws a set has."""
    weights = np.array(sides) * n_cells
    return weights / weights.sum(1, keepdims=True)


def _of_counts(store: CellStore, sets: np.ndarray, n_cells: np.ndarray) -> np.ndarray:
    """Mean count, mean count per 10,000 of the cell, and share of cells with a count, of each set, (3, S, G)."""
    sums = np.zeros((3, len(n_cells), store.n_genes))
    for stretch, counts in store.stretches() if store.on_disk else [(slice(None), store.counts)]:
        to_10k = 1e4 / np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
        sums += sums_by_set(counts, sets[stretch], to_10k, len(n_cells))
    return sums / n_cells[:, None]


def _pseudocount(scales: np.ndarray, observed: np.ndarray, n_cells: np.ndarray, options: Options) -> float:
    """What is added to scales: as much as the decoder gives to genes that are not expressed, on the side with more.

    Of the mean scales of the genes with hardly any count on a side, the 0.9 quantile. A few cells cannot show that a
    gene is not expressed: such a side is not asked, or if both are small, they are asked together.
    """
    if options.mode == "vanilla":
        return 0.0
    if options.pseudocount is not None:
        return float(options.pseudocount)
    raw_means = observed[:, 0]
    asked = n_cells >= 1 / _UNEXPRESSED
    if not asked.any():
        together = n_cells / n_cells.sum()
        scales, raw_means, asked = (together @ scales)[None], (together @ raw_means)[None], [True]
    found = [2.0**LOWEST]
    for scale, raw_mean in zip(scales[asked], raw_means[asked], strict=True):
        unexpressed = raw_mean < _UNEXPRESSED
        if unexpressed.any():
            found.append(float(np.quantile(scale[unexpressed], 0.9)))
    return max(found)


def _delta(scales: np.ndarray, pseudocount: float, options: Options) -> float:
    """The smallest change that counts, log2."""
    if options.mode == "vanilla":
        return 0.0
    if options.delta is not None:
        return float(options.delta)
    if scales.shape[1] < _LEAST_GENES:
        msg = f"delta=None learns from the genes, of which there are {scales.shape[1]}: give a number, such as 0.25."
        raise ValueError(msg)
    left, right = np.log2(scales + pseudocount)
    return learned_delta(left - right, options.seed)


def _describe(
    draws: tuple[np.ndarray, np.ndarray, np.ndarray],
    left: np.ndarray,
    right: np.ndarray,
    pseudocounts: np.ndarray,
    deltas: np.ndarray,
    options: Options,
    lowest: int = LOWEST,
) -> np.ndarray:
    """What ``kernels.changes`` says of the changes between both sides, (C, G, outputs), in bins.

    ``draws``: histograms from log2 = ``lowest`` on, (D, S, G, K), what they add up to and cells they are of, (D, S).
    """
    histograms, totals, n_effective = draws
    n_batches, _, n_genes, n_bins = histograms.shape
    scales = np.exp2(np.arange(n_bins) / changes.PER_DOUBLING + lowest)
    positions = (np.log2(scales + pseudocounts[:, None]) - lowest) * changes.PER_DOUBLING
    slots = np.clip(positions.astype(np.int64), 0, n_bins - 1)
    fractions = np.clip(positions - slots, 0, 1).astype(np.float32)
    spread = changes.SPLIT_VARIANCE * np.gradient(positions, axis=1) ** 2
    outputs = np.empty((len(left), n_genes, len(changes.OUTPUTS)))
    in_parallel(
        changes.changes,
        histograms,
        totals,
        np.full(n_batches, 1 / n_batches),
        n_effective,
        left,
        right,
        slots,
        fractions,
        spread,
        deltas * changes.PER_DOUBLING,
        (1 - options.credible_interval) / 2,
        outputs,
    )
    return outputs


def _decided(described: np.ndarray, found_in: np.ndarray, options: Options) -> dict[str, np.ndarray]:
    """Probabilities, fold changes and decisions, (C, G) each; ``found_in``: share of the cells, on the better side."""
    of = dict(zip(changes.OUTPUTS, np.moveaxis(described, -1, 0), strict=True))
    up_wins = (of["up"] >= of["down"]) | (options.mode == "vanilla")
    variance = np.where(up_wins, of["up_variance"], of["down_variance"])
    if options.hypothesis == "two":
        variance = of["up_variance"] + of["down_variance"]
    probability = _probability(of["up"], of["down"], options)
    unknown = [np.isnan(probability), found_in == 0, found_in < options.min_fraction]
    reason = np.select(unknown, [_NOT_MEASURED, 1, 2], 0)  # positions in _REASONS
    fdr = np.ones_like(probability)
    for c, judged in enumerate(reason == 0):
        fdr[c, judged] = expected_fdr(probability[c, judged])
    in_log2 = {f"lfc_{name}": of[name] / changes.PER_DOUBLING for name in ("mean", "median", "low", "high")}
    return {
        "proba_de": probability,
        "proba_up": of["up"],
        "proba_down": of["down"],
        "proba_mcse": np.sqrt(variance),
        "bayes_factor": bayes_factor(probability),
        "fdr": fdr,
        "is_de": fdr <= options.fdr_target,
        "reason": reason,
        **in_log2,
        "lfc_sd": np.sqrt(of["variance"]) / changes.PER_DOUBLING,
        "lfc_mcse": np.sqrt(of["mean_variance"]) / changes.PER_DOUBLING,
    }


def _probability(up: np.ndarray, down: np.ndarray, options: Options) -> np.ndarray:
    if options.mode == "vanilla":
        return up
    return np.minimum(up + down, 1) if options.hypothesis == "two" else np.maximum(up, down)


def _ranked(columns: dict[str, np.ndarray], genes: np.ndarray, groups: Sequence[str]) -> dict[str, np.recarray]:
    """The layout of ``scanpy.tl.rank_genes_groups``: genes that go up come first, the surest first.

    scanpy draws scores, so what was not measured has those of what is sure not to change.
    """
    scores = bayes_factor(np.nan_to_num(columns["proba_up"]))
    fields = {
        "names": (np.broadcast_to(np.asarray(genes, dtype=object), scores.shape), object),
        "scores": (scores, np.float32),
        "pvals": (1 - np.nan_to_num(columns["proba_de"]), np.float64),
        "pvals_adj": (columns["fdr"], np.float64),
        "logfoldchanges": (columns["lfc_mean"], np.float32),
    }
    order = np.lexsort((-columns["lfc_mean"], -scores))
    return {
        name: np.rec.fromarrays(list(np.take_along_axis(values, order, 1)), dtype=[(group, dtype) for group in groups])
        for name, (values, dtype) in fields.items()
    }


def _table(columns: dict[str, np.ndarray], genes: np.ndarray, comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """A row for every comparison and gene."""
    flat = {name: values.ravel() for name, values in columns.items()}
    flat["reason"] = pd.Categorical.from_codes(flat["reason"], _REASONS)
    names = {
        "group": np.repeat(np.array([c.group for c in comparisons], dtype=object), len(genes)),
        "reference": np.repeat(np.array([c.reference for c in comparisons], dtype=object), len(genes)),
        "gene": np.tile(np.asarray(genes, dtype=object), len(comparisons)),
    }
    return pd.DataFrame(names | flat)


def _table_of_both(
    by_gene: dict[str, np.ndarray],
    by_protein: dict[str, np.ndarray],
    genes: np.ndarray,
    proteins: Sequence[str],
    comparisons: Sequence[Comparison],
) -> pd.DataFrame:
    """The same with the proteins after the genes, and a column that says which is which: names may be shared."""
    both = {name: np.concatenate([values, by_protein[name]], 1) for name, values in by_gene.items()}
    table = _table(both, [*genes, *proteins], comparisons)
    kinds = np.repeat(["gene", "protein"], [len(genes), len(proteins)])
    table.insert(3, "feature_type", pd.Categorical(np.tile(kinds, len(comparisons))))
    return table
