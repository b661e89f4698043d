"""What the benchmarks of cell types share: hidden labels, fits of scvi-tools, and how predictions are judged."""

from __future__ import annotations

import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _common import Data, quiet_reference, scvi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anndata import AnnData

TRUTH, LABEL, UNKNOWN = "cell_type", "label", "Unknown"


@contextmanager
def stopwatch() -> Iterator[SimpleNamespace]:
    """Seconds on the clock and of the processor, once the block has ended."""
    watch = times_of(float("nan"), float("nan"))
    clock, cpu = time.perf_counter(), time.process_time()
    yield watch
    watch.seconds, watch.cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu


def times_of(seconds: float, cpu_seconds: float) -> SimpleNamespace:
    """What a stopwatch showed."""
    return SimpleNamespace(seconds=float(seconds), cpu_seconds=float(cpu_seconds))


def add(first: SimpleNamespace, second: SimpleNamespace) -> SimpleNamespace:
    """What two steps took together."""
    return times_of(first.seconds + second.seconds, first.cpu_seconds + second.cpu_seconds)


def hide_labels(data: Data, split: str) -> pd.Series:
    """Labels of which some are hidden: ``"60%"`` of those that are known, at random, or all of the batch of a name."""
    labels = data.adata.obs[TRUTH].astype(str)
    known = np.flatnonzero(labels != UNKNOWN)
    if split.endswith("%"):
        order = np.random.default_rng(0).permutation(known)
        hidden = order[: round(len(known) * float(split[:-1]) / 100)]
    else:
        hidden = known[data.adata.obs[data.batch_key].astype(str).iloc[known] == split]
    if len(hidden) in (0, len(known)):
        msg = f"{split!r} would hide the labels of {len(hidden)} of {len(known)} cells."
        raise ValueError(msg)
    labels.iloc[hidden] = UNKNOWN
    return labels


def new_reference_scvi(data: Data, seed: int, file: Path, **options: Any) -> tuple[Any, Any]:
    """SCVI of scvi-tools with its defaults, and how long it trained: from its folder if there is one, else kept there.

    Labels play no part in it, so one serves every split.
    """
    adata, times = data.shell(), file.with_name(f"{file.name}.times.npy")
    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(adata, batch_key=data.batch_key)
    with quiet_reference():
        if times.exists():
            return scvi.model.SCVI.load(file, adata), times_of(*np.load(times))
        model = scvi.model.SCVI(adata, **options)
        with stopwatch() as watch:
            model.train(enable_progress_bar=False, logger=False)
        model.save(file, overwrite=True)
    np.save(times, [watch.seconds, watch.cpu_seconds])
    return model, watch


def new_reference_scanvi(pretrained: Any, labels: pd.Series, seed: int) -> tuple[Any, Any]:
    """SCANVI of scvi-tools that starts from its SCVI, with its defaults, and how long it trained."""
    pretrained.adata.obs[LABEL] = labels.to_numpy()
    scvi.settings.seed = seed
    with quiet_reference():
        model = scvi.model.SCANVI.from_scvi_model(pretrained, unlabeled_category=UNKNOWN, labels_key=LABEL)
        with stopwatch() as watch:
            model.train(enable_progress_bar=False, logger=False)
    return model, watch


def keep(file: Path, probabilities: pd.DataFrame, **arrays: Any) -> None:
    """Save probabilities with whatever belongs to them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        file,
        probabilities=probabilities.to_numpy(np.float32),
        names=np.array(probabilities.columns, dtype=str),
        **arrays,
    )


def table_of(kept: Any, adata: AnnData) -> pd.DataFrame:
    """The probabilities of :func:`keep`."""
    if len(kept["probabilities"]) != adata.n_obs:
        msg = f"The cache has {len(kept['probabilities'])} cells, and the data have {adata.n_obs}: remove its file."
        raise ValueError(msg)
    return pd.DataFrame(kept["probabilities"], adata.obs_names, kept["names"])


def add_prediction(adata: AnnData, name: str, probabilities: pd.DataFrame) -> None:
    """Write what another tool predicts as ``tl.classify`` would."""
    adata.obsm[f"{name}_probabilities"] = probabilities
    adata.obs[f"{name}_prediction"] = probabilities.idxmax(axis=1)
