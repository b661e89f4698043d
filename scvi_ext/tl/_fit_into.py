"""What is left of a fit once it is prepared: it is trained, written, and told of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._contract import Capability
from scvi_ext._errors import listing, warn
from scvi_ext._keys import UNS
from scvi_ext.data.backed import Backed, is_written_back
from scvi_ext.data.registry import read_fit, read_root
from scvi_ext.data.stream import placement
from scvi_ext.engine.processes import ALONE, LostProcessError
from scvi_ext.functional import fused
from scvi_ext.tl._train import train

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    import torch
    from anndata import AnnData

    from scvi_ext._contract import SavedFit
    from scvi_ext.engine.processes import Team
    from scvi_ext.engine.progress import Progress
    from scvi_ext.tl._checkpoint import CheckpointFile
    from scvi_ext.tl._train import Prepared


def fit_into(
    adata: AnnData | Mapping[str, AnnData],
    start: Prepared,
    device: torch.device,
    *,
    keep_checkpoint: bool = False,
    file: CheckpointFile | None = None,
    team: Team = ALONE,
    progress: bool | None = None,
) -> Progress:
    """Train, and write the fit into ``adata``, or into each of its data sets; how it went."""
    began = _log_start(start)
    done, fits = train(
        start,
        device,
        keep_checkpoint=keep_checkpoint,
        file=file,
        team=team,
        show_progress=progress,
        announce=lambda seconds, how: _log_plan(start, seconds, device, how, team),
    )
    several = isinstance(adata, Mapping)
    parts = [adata[fitted.joint["dataset"]] for fitted in fits] if several else [adata]
    resumed = start.checkpoint is not None
    if done.stop_reason == "interrupted" and not resumed and any(_is_finished(part, fits[0].key) for part in parts):
        # What was complete is not given up for it.
        fits = [replace(fitted, key=f"{fitted.key}_interrupted") for fitted in fits]
    for part, fitted in zip(parts, fits, strict=True):
        results.write_fit(part, fitted)
    left = file if file is not None and file.is_left(adata, done) else None
    if team.is_first and file is not None and left is None and file.path.exists():
        _once_written(adata, file.remove)
    if file is not None and not isinstance(done.failure, LostProcessError):
        team.wait()  # a process that goes ahead would find the file as it was before
    _report(done, fits[0], start, left, adata, team)
    where = f" of each of the data sets {listing(start.store.names)}" if several else ""
    logg.info(
        f"    {done.stop_reason} after {len(done.history)} epochs",
        time=began,
        deep=f"added\n    {fits[0].key!r}, the fitted model (adata.uns[{UNS.root!r}][{UNS.fits!r}]{where})",
    )
    return done


def take_over(
    adata: AnnData, found: SavedFit, file: CheckpointFile | None, team: Team, *, copy: bool
) -> AnnData | None:
    """A fit that was finished already: in ``adata`` itself, or in the file that another process has left."""
    if file is not None:
        results.write_fit(adata, found if found.run["checkpoint"] else replace(found, checkpoint=None))
        team.wait()  # all have read it
        if team.is_first:
            _once_written(adata, file.remove)
    logg.info(f"fit {found.key!r} was finished already" + ("" if file is None else f": taken from {str(file.path)!r}"))
    return adata if copy else None


def _once_written(adata: AnnData | Mapping[str, AnnData], then: Callable[[], None]) -> None:
    """What is in no file yet, a process that is ended before it is written can be asked for again."""
    if isinstance(adata, Backed):
        adata.once_written(then)
    else:
        then()


def _called(adata: AnnData | Mapping[str, AnnData]) -> str:
    """What a user gives to ``tl.fit`` for it."""
    if not is_written_back(adata):
        return "adata"
    first, *others = (repr(str(source.path)) for source in adata.sources)
    return f"[{first}, ...]" if others else first


def _log_start(start: Prepared) -> datetime:
    """Say what is fitted; the time."""
    train, validation = start.split()
    store = start.store
    learned = any(stream.labelled_only for stream in start.streams)
    labelled = f" ({(store.labels[train] >= 0).sum()} with a label)" if learned else ""
    of_datasets = f" of the data sets {listing(store.names)}" if start.fits[0].joint is not None else ""
    return logg.info(
        f"fitting {start.spec.name} on {len(train)} cells{labelled} x {store.n_genes} genes{of_datasets}, "
        f"{len(validation)} held out"
    )


def _log_plan(start: Prepared, seconds: float, device: torch.device, how: str, team: Team) -> None:
    plan, module, step = start.plan, start.module, start.step
    generates = Capability.COUNTS in start.spec.capabilities
    if generates:
        dtype = next(module.parameters()).dtype
        kernels = [fused.choose(name, device.type, dtype)[1] for name in dict.fromkeys(module.likelihoods)]
        how = ", ".join(filter(None, (*kernels, how)))
    shared = f", shared by {team.n} processes" if team.n > 1 else ""
    schedule = f"one cycle with peak {plan.lr:g}" if plan.one_cycle else f"constant {plan.lr:g}"
    goes_on = f"    goes on after step {step} of {plan.n_steps}\n" if step is not None else ""
    kl_weight = f", final KL weight {plan.final_kl_weight:.3g}" if generates else ""
    logg.info(
        f"    plan {plan.name!r}: {plan.n_epochs} epochs of {plan.steps_per_epoch} steps of {plan.batch_size} cells"
        f"{shared}, learning rate {schedule}{kl_weight}\n"
        f"{goes_on}"
        f"    {placement(start.store, device)}\n"
        f"    about {_duration(seconds)} on {device}{f', {how}' if how else ''}"
    )
    if generates and plan.final_kl_weight < 1:
        warn(
            f"The KL weight ends at {plan.final_kl_weight:.3g}, not 1, so the prior of z is not fully enforced. "
            "Use plan='auto', or give kl_warmup."
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _is_finished(adata: AnnData, key: str) -> bool:
    fits = read_root(adata).get(UNS.fits, {})
    return key in fits and read_fit(adata, key).status.get("stop_reason") != "interrupted"


def _report(
    done: Progress,
    fitted: SavedFit,
    start: Prepared,
    file: CheckpointFile | None,
    adata: AnnData | Mapping[str, AnnData],
    team: Team,
) -> None:
    """Say aloud what a user must know about the run."""
    store = start.store
    if done.stop_reason == "interrupted":
        places = [] if file is None else [f"in {str(file.path)!r}"]
        if team.is_first or not is_written_back(adata):  # the first process alone writes into files
            places.insert(0, f"as {fitted.key!r}")
        kept = " and ".join(places)
        in_file = "" if file is None or not file.asked else f", checkpoint={str(file.path)!r}"
        key = fitted.key if file is None else start.fits[0].key  # a file has it under the name that was asked for
        advice = f"Go on with tl.fit({_called(adata)}, {fitted.model!r}, key_added={key!r}{in_file}, resume=True)."
        logg.warning(f"interrupted at step {done.step}; what was trained is kept {kept}. {advice}")
        if done.failure is not None:
            done.failure.add_note(f"What was trained until step {done.step} is kept {kept}. {advice}")
    if done.events:
        last = done.events[-1]
        who = (
            f"left out cells without a finite loss: {listing(store.obs_names[list(done.excluded)])}"
            if done.excluded
            else "lowered the learning rate; cells with the largest loss: "
            f"{listing(store.obs_names[list(last.suspects)], 5)}"
        )
        warn(
            f"The loss was not finite {len(done.events)} times; each time the last good state was restored, and "
            f"the fit {who}. "
            f"Genes with the most extreme counts there: {listing(store.var_names[list(last.genes)], 5)}."
        )
