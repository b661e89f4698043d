"""Fits that one process carries out alone, or several that ``torchrun`` starts with this file: test_processes.py."""

from __future__ import annotations

import json
import os
import pickle
import select
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import distributed

import scvi_ext as sx
from scvi_ext._errors import ScviExtWarning
from scvi_ext.data import store
from scvi_ext.engine import fit as engine
from scvi_ext.engine.processes import LostProcessError
from scvi_ext.engine.step import TrainingStep
from scvi_ext.models.scvi import VAE
from scvi_ext.tl._checkpoint import CheckpointFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

N_CELLS, N_GENES = 200, 40
# 180 cells are trained on: 6 steps in an epoch, the last of which is filled up.
RUN = {"batch_size": 32, "max_epochs": 4, "device": "cpu", "seed": 1}
SMALL = RUN | {"n_hidden": 12, "n_latent": 3}
STEPS = 6
MARK = "---- all cases are fitted"  # in what processes say
LONG = SMALL | {"max_epochs": 5}  # what is killed and goes on: 30 steps


@dataclass(frozen=True)
class Case:
    """A fit: its model, its options, where the counts are, and steps in which something happens."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    source: str = "memory"
    nan_in_step: int | None = None


CASES = {
    "scvi": Case("scvi", LONG | {"encode_covariates": True, "n_layers": 2}),
    "ldvae": Case("ldvae", SMALL),
    "vaec": Case("vaec", SMALL),
    "scanvi": Case("scanvi", SMALL | {"n_samples_per_label": 7}),
    "autozi": Case("autozi", SMALL),
    "totalvi": Case("totalvi", SMALL | {"library": "latent"}),
    "classifier": Case("classifier", RUN | {"n_hidden": 12}),
    "gimvi": Case("gimvi", RUN | {"dim_hidden_encoder": 12, "n_latent": 3}, source="pair"),
    "scvi, h5ad": Case("scvi", SMALL, source="h5ad"),
    "scvi, zarr": Case("scvi", SMALL, source="zarr"),
    "scanvi, zarr": Case("scanvi", SMALL | {"n_samples_per_label": 7}, source="zarr"),
    "stops early": Case("scvi", SMALL | {"max_epochs": 40, "early_stopping": 1, "lr": 0.05}),
    "a cell that is infinite": Case("scvi", SMALL, source="infinite"),
    "a step that is not finite": Case("scvi", SMALL, nan_in_step=STEPS + 2),
}


def draw() -> ad.AnnData:
    """Three cell types in three batches, with covariates and proteins."""
    rng = np.random.default_rng(5)
    labels = rng.integers(3, size=N_CELLS)
    counts = rng.poisson(rng.gamma(1.0, 1.0, (3, N_GENES))[labels]).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {
            "batch": [f"b{i % 3}" for i in range(N_CELLS)],
            "cell_type": [("t0", "t1", "t2", "unknown")[i if rng.random() < 0.6 else 3] for i in labels],
            "age": rng.normal(size=N_CELLS),
        },
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    adata = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]))
    adata.obsm["protein"] = pd.DataFrame(
        rng.poisson(rng.gamma(2.0, 5.0, (3, 4))[labels]), index=obs.index, columns=["p0", "p1", "p2", "p3"]
    )
    return adata


def write_files(folder: Path) -> None:
    """The same cells on disk, where a few rows lie together."""
    adata = draw()
    adata.write_h5ad(folder / "cells.h5ad")
    adata.write_zarr(folder / "cells.zarr", chunks=(40, N_GENES))


def cells(source: str, folder: Path) -> ad.AnnData | dict[str, ad.AnnData]:
    """Set up; from files the counts stay there."""
    if source in ("h5ad", "zarr"):
        adata = sx.io.read_backed(folder / f"cells.{source}")
    else:
        adata = draw()
    if source == "pair":
        pair = {"rna": adata[:, 5:].copy(), "spatial": adata[:90, 19::-1].copy()}
        for part in pair.values():
            sx.pp.setup_anndata(part, batch_key="batch")
        return pair
    if source == "infinite":
        x = adata.X.toarray()
        x[17, 21] = np.inf
        adata.X = x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if source == "infinite" else "error")
        sx.pp.setup_anndata(
            adata,
            batch_key="batch",
            labels_key="cell_type",
            unlabeled_category="unknown",
            protein_obsm_key="protein",
            continuous_covariate_keys=["age"],
            check="warn" if source == "infinite" else "error",
        )
    return adata


# ---- fits ----------------------------------------------------------------------------------------------------------


@contextmanager
def changed(owner: object, **values: object) -> Iterator[None]:
    """Attributes of a module, a class or the settings that are others inside."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def at_step(number: int | None, action: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the loss of the training step of this number, from 1, is what ``action`` makes of it."""
    original, step = VAE.loss, 0

    def loss(module: VAE, *minibatches: Any, **options: Any) -> Any:
        nonlocal step
        found = original(module, *minibatches, **options)
        if not isinstance(options.get("kl_weight"), torch.Tensor):  # a rehearsal, or cells that are held out
            return found
        step += 1
        return action(found) if step == number else found

    with changed(VAE, loss=loss, loss_at_once=lambda module, n_cells: None):
        yield


def to_nan(loss: Any) -> Any:
    """What is left of a step whose loss is not a number in the last of the processes only."""
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    return loss._replace(total=loss.total * np.nan) if last else loss


def saved(adata: ad.AnnData | Mapping[str, ad.AnnData], key: str) -> dict[str, Any]:
    """What is kept of a fit."""
    of_each = [a.uns["scvi_ext"]["fits"][key] for a in (adata.values() if isinstance(adata, dict) else [adata])]
    state = {f"{i} {name}": array for i, fit in enumerate(of_each) for name, array in fit["state"].items()}
    history = of_each[0]["history"].drop(columns="cells_per_second")
    return {"state": state, "history": history, "status": of_each[0]["status"], "run": of_each[0]["run"]}


def fitted(name: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Carry out a case."""
    case = CASES[name]
    adata = cells(case.source, folder)
    on_disk = {"memory_limit": 0} if case.source in ("h5ad", "zarr") else {}
    with (
        changed(sx.settings, **on_disk),
        changed(store, BLOCK_BYTES=10_000),
        changed(sx.settings, verbosity=3),
        at_step(case.nan_in_step, to_nan),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", ScviExtWarning)
        sx.tl.fit(adata, case.model, **case.options | options)
    return saved(adata, case.model) | {"warned": [str(warning.message) for warning in caught]}


# ---- what processes run --------------------------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> str:
    """The error of a call."""
    try:
        call()
    except (ValueError, OSError, LostProcessError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def everything(folder: Path, rank: int) -> dict[str, Any]:
    """All that two processes can do without one of them being lost."""
    found: dict[str, Any] = {name: fitted(name, folder, progress=name == "scvi" or None) for name in CASES}
    found["files left"] = sorted(path.name for path in Path.cwd().iterdir())

    options = CASES["scvi"].options
    print(MARK, file=sys.stderr)
    adata = cells("memory", folder)
    stop = (lambda loss: signal.raise_signal(signal.SIGINT) or loss) if rank == 1 else (lambda loss: loss)
    with at_step(STEPS + 1, stop), changed(engine, _ASK_EVERY=4):
        found["Ctrl-C"] = refused(lambda: sx.tl.fit(adata, **options))
    found["stopped"] = saved(adata, "scvi")["status"]
    with changed(CheckpointFile, write=slowly):
        sx.tl.fit(adata, resume=True, device="cpu", checkpoint="kept")
    found["went on"] = saved(adata, "scvi")
    found["kept"] = Path("kept").exists()

    other = cells("memory", folder)
    if rank == 1:
        other.obs["batch"] = other.obs["batch"].to_numpy()[::-1]
    found["refused"] = {
        "cells": refused(lambda: sx.tl.fit(other, **options)),
        "options": refused(lambda: sx.tl.fit(adata, **options | {"n_latent": 3 + rank}, key_added="other")),
        "batch_size": refused(lambda: sx.tl.fit(adata, **options | {"batch_size": 33}, key_added="other")),
        "three cells": refused(lambda: sx.tl.fit(adata, **options | {"batch_size": 3}, key_added="other")),
    }
    found["damaged"] = damaged(folder, rank)

    query = draw()[:60].copy()
    query.obs["batch"] = "new"
    sx.tl.map_query(query, adata, key="scvi", max_epochs=1, batch_size=32, device="cpu", progress=False)
    found["mapped"] = saved(query, "scvi")
    tuned = cells("memory", folder)
    sx.tl.tune(tuned, space={"n_latent": [2, 3]}, n_trials=2, **RUN | {"max_epochs": 1}, n_hidden=8, progress=False)
    found["tuned"] = saved(tuned, "scvi") | {"best": sx.get.tuning_params(tuned)["best_value"]}

    distributed.destroy_process_group()
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=int(os.environ.pop("WORLD_SIZE"))
    )
    del os.environ["RANK"]
    found["own group"] = fitted("ldvae", folder)
    found["group remains"] = distributed.is_initialized()
    distributed.destroy_process_group()
    found["alone"] = fitted("ldvae", folder)
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0"}
    found["alone in a world"] = fitted("ldvae", folder)
    found["joined nothing"] = not distributed.is_initialized()
    return found


def damaged(folder: Path, rank: int) -> dict[str, Any]:
    """A fit from disk, of which the second process loses its file in the second epoch, and which then goes on."""
    own = folder / f"own{rank}"
    shutil.copytree(folder / "cells.zarr", own / "cells.zarr")
    adata = cells("zarr", own)
    stored = [path for path in (own / "cells.zarr" / "X" / "data").rglob("*") if path.name.isdigit()]
    contents = {path: path.read_bytes() for path in stored}
    options = CASES["scvi, zarr"].options

    def damage(*passed_on: Any) -> Any:
        for path in stored if rank == 1 else ():
            path.write_bytes(b"nothing of the kind")
        return passed_on[0] if passed_on else None

    def mend() -> None:
        for path, content in contents.items():
            path.write_bytes(content)

    def lay_out(*arguments: Any) -> Any:
        damage()
        return TrainingStep(*arguments)

    found = {}
    with changed(sx.settings, memory_limit=0), changed(store, BLOCK_BYTES=10_000):
        with changed(engine, TrainingStep=lay_out):
            found["first block"] = refused(lambda: sx.tl.fit(adata, **options))
        mend()
        with at_step(STEPS + 1, damage):
            found["later block"] = refused(lambda: sx.tl.fit(adata, **options))
        mend()
        found["status"] = saved(adata, "scvi")["status"]
        sx.tl.fit(adata, resume=True, device="cpu")
    return found | {"went on": saved(adata, "scvi")}


def four(folder: Path, rank: int) -> dict[str, Any]:
    """One fit."""
    distributed.init_process_group("gloo", init_method=f"file://{Path('meeting').absolute()}", rank=rank, world_size=4)
    return fitted("ldvae", folder)


def left(folder: Path, rank: int) -> dict[str, Any]:
    """What the first process is told, wherever it turns to the other one, which has ended."""
    distributed.init_process_group("gloo", init_method=f"file://{Path('meeting').absolute()}", rank=rank, world_size=2)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    adata = cells("memory", folder)
    if rank == 1:
        os._exit(0)
    path = "cells.h5ad"
    adata.write_h5ad(path)
    calls = {
        "set-up": lambda: sx.pp.setup_anndata(path),
        "fit": lambda: sx.tl.fit(adata, **CASES["scvi"].options),
        "read-out": lambda: sx.tl.get_elbo(path, return_mean=False),
    }
    return {name: refused(call) for name, call in calls.items()}


def under_way(folder: Path, rank: int, plan: str, resume: str) -> dict[str, Any]:
    """A fit that ends too soon: ``plan`` has for each attempt a step and what happens there, and to whom."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    step, what, whom = json.loads(plan)[attempt] or (None, None, None)
    adata = cells("memory", folder)
    noticed, note = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(note)

    def happens(loss: Any) -> Any:
        if what == "SIGKILL" and rank == whom:
            os.kill(os.getpid(), signal.SIGKILL)
        if what in ("SIGTERM", "SIGINT"):
            if rank == 0 and what == "SIGTERM":  # as Slurm sends it to what it has started
                os.kill(os.getppid(), signal.SIGTERM)
            if rank == 0 and what == "SIGINT":  # as a terminal sends it
                os.killpg(os.getpgid(os.getppid()), signal.SIGINT)
            select.select([noticed], [], [], 60)  # which may have come before
        return loss

    options = CASES["scvi"].options if resume == "auto" else {"device": "cpu"}
    with at_step(step, happens), changed(engine, _ASK_EVERY=4), changed(CheckpointFile, write=slowly):
        sx.tl.fit(adata, resume="auto" if resume == "auto" else True, **options)
    return saved(adata, "scvi")


write = CheckpointFile.write


def slowly(self: CheckpointFile, fitted: Any) -> None:
    """Write a file in more time than ``torchrun`` takes to end the others when one is lost, which it looks for."""
    time.sleep(0.5)
    write(self, fitted)


def main() -> None:
    """Run a task as one of the processes, and keep what it has found."""
    torch.set_num_threads(1)
    task, folder, *arguments = sys.argv[1:]
    divided = {"four": 4, "left": 2}
    rank = divide(divided[task]) if task in divided else int(os.environ["RANK"])
    tasks = {"everything": everything, "four": four, "left": left, "under_way": under_way}
    found = tasks[task](Path(folder), rank, *arguments)
    Path(f"found{rank}").write_bytes(pickle.dumps(found))


def divide(n: int) -> int:
    """Become so many processes, for which everything is imported once; which of them this is. One more waits."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # torch imports seconds' worth for its first optimiser
    children = []
    for rank in range(n):
        child = os.fork()
        if not child:
            return rank
        children.append(child)
    sys.exit(any([os.waitpid(child, 0)[1] for child in children]))


if __name__ == "__main__":
    main()
