from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from scanpy import logging as logg

from scvi_ext import models, results
from scvi_ext._contract import Capability
from scvi_ext._errors import listing, warn
from scvi_ext._keys import UNS
from scvi_ext.data.registry import read_fit, read_root
from scvi_ext.data.store import check_in_memory
from scvi_ext.engine.device import resolve_device
from scvi_ext.functional import fused
from scvi_ext.tl._prepare_fit import reopen
from scvi_ext.tl._prepare_joint import check_datasets, reopen_joint
from scvi_ext.tl._train import Prepared, prepare_new, train

if TYPE_CHECKING:
    from datetime import datetime
    from typing import Any, Literal

    import torch
    from anndata import AnnData

    from scvi_ext._contract import SavedFit
    from scvi_ext.data.store import CellStore
    from scvi_ext.engine.fit import Progress


def fit(
    adata: AnnData | Mapping[str, AnnData],
    model: str = "scvi",
    *,
    key_added: str | None = None,
    init_from: str | None = None,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    train_size: float = 0.9,
    validation_size: float | None = None,
    early_stopping: bool | int = False,
    n_samples_per_label: int | None = None,
    lr: float | None = None,
    plan: Literal["auto", "scvi-tools"] = "auto",
    kl_warmup: float | None = None,
    weight_decay: float | None = None,
    device: str = "auto",
    precision: Literal["float32", "bf16"] = "float32",
    seed: int | None = None,
    checkpoint: bool = False,
    resume: bool = False,
    progress: bool | None = None,
    copy: bool = False,
    **model_params: Any,
) -> AnnData | dict[str, AnnData] | None:
    """Train a model on the counts, and keep it inside ``adata``.

    Reads what :func:`~scvi_ext.pp.setup_anndata` registered. Logs the plan (epochs, steps, final KL weight, predicted
    time) at verbosity info before it starts, and shows a progress bar. Ctrl-C stops after the step under way: what has
    been trained is kept, can be used, and can be continued with ``resume=True``. Where a finished fit has that name
    already, it stays, and the interrupted one is called ``"<key_added>_interrupted"``.

    Parameters
    ----------
    adata
        Annotated data, set up. For a model of several data sets a mapping from their names to them: genes are matched
        by name, and each need not have those of the others. The fit is kept in each of them, with what is its own.
    model
        Name of a model, see :func:`scvi_ext.models.show`.
    key_added
        Name of the fit, from which the slots of its read-outs are named; the name of the model by default.
    init_from
        Name of a fit to start from, of a model that is part of this one: a ``"scvi"`` fit for ``"scanvi"``. Its options
        and weights are taken over, and without ``kl_warmup`` the KL weight is 1 from the first step on. Labels may have
        been registered since. For a ``"classifier"`` it is the fit that it stands on, see :doc:`/user_guide/scanvi`.
    max_epochs
        Passes over the training cells; None takes the plan's.
    batch_size
        Cells per step; None takes the plan's, 128 or, with 15,000 training cells and more, 256.
    train_size, validation_size
        Shares of the cells to train on and to hold out; ``validation_size=None`` holds out the rest. Split by ``seed``.
    early_stopping
        Stop when the held-out ELBO has not improved for some epochs (a number, or True for the plan's) and restore the
        best state. By default the plan is carried out to its end.
    n_samples_per_label
        Of a model that learns labels: labelled cells of each label that an epoch draws, so that frequent ones do not
        drown the rare; None takes all.
    lr
        Learning rate (of ``plan="auto"``: its peak).
    plan
        ``"auto"``: one-cycle learning rate over few epochs. ``"scvi-tools"``: the schedule of that library.
    kl_warmup
        Share of the planned steps over which the weight of KL(q(z) || p(z)) rises from 0 to 1.
    weight_decay
        L2 penalty of Adam, 1e-6 by default.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    precision
        Of the inputs of matrix products while training: ``"float32"`` (on CUDA: TF32, 10 bits of mantissa), or
        ``"bf16"`` (7 bits) where the device has it. Likelihoods, sums and parameters are float32 in any case, and so is
        all that is read out later.
    seed
        Of initial weights, split, order of the cells, dropout and posterior samples; None takes ``settings.seed``.
        Global random generators are neither read nor changed.
    checkpoint
        Keep the state of optimiser and generators too (about twice the size of the weights). An interrupted run keeps
        it anyway.
    resume
        Go on with the fit ``key_added`` exactly where it stopped. All other options are those of that run.
    progress
        Show a bar; None shows it in terminals and notebooks.
    copy
        Return a copy instead of changing ``adata``.
    **model_params
        Options of the model, see :func:`scvi_ext.models.show`. Those with a value for each label (``y_prior``,
        ``labels_groups``) or data set (``reconstruction_losses``, ``model_library_bools``) are given as a mapping from
        labels or names, or in the order of ``get.setup(adata)`` or of the data sets.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.uns["scvi_ext"]["fits"][key_added]``
        ``model``, ``config``, ``run``, ``setup``, ``var_names``, ``state`` (name -> array), ``history`` (one row per
        epoch: ELBO, reconstruction loss and KL terms per cell for training and held-out cells; higher ELBO is better),
        ``status``; of several data sets ``joint``, which tells them and their genes.

    Raises
    ------
    KeyError
        ``adata`` was not set up, or there is no fit to resume.
    TypeError
        Unknown keyword; scvi-tools' names are answered with ours. Or ``adata`` is not what the model takes.
    ValueError
        An option has an impossible value, would have no effect, or contradicts the run to resume.
    FloatingPointError
        The loss is not finite from the first epoch on, at any learning rate tried.
    KeyboardInterrupt
        After the fit was written, if Ctrl-C was pressed (and ``copy=False``).

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.get.history(adata)["elbo_train"].shape
    (2,)

    References
    ----------
    Lopez et al. (2018), Nature Methods 15, 1053. Svensson et al. (2020), Bioinformatics 36, 3418.
    """
    asked = {k: v for k, v in locals().items() if k in _RUN_ARGUMENTS and v != DEFAULTS[k]} | model_params
    options = {name: value for name, value in locals().items() if name in DEFAULTS}
    check_datasets(adata, models.get(model))
    several = isinstance(adata, Mapping)
    for part in adata.values() if several else ():
        check_in_memory(part, copy=copy)
    if copy:
        adata = {name: part.copy() for name, part in adata.items()} if several else adata.copy()
    target = resolve_device(device)
    if resume:
        start = Prepared(*(reopen_joint if several else reopen)(adata, key_added, model, asked))
    else:
        start = prepare_new(adata, model, options, model_params, keywords=KEYWORDS, device=target)
    began = _log_start(start)
    done, fits = train(
        start,
        target,
        keep_checkpoint=checkpoint,
        show_progress=progress,
        announce=lambda seconds, how: _log_plan(start, seconds, target, how),
    )

    interrupted = done.stop_reason == "interrupted"
    parts = [adata[fitted.joint["dataset"]] for fitted in fits] if several else [adata]
    if interrupted and not resume and any(_is_finished(part, fits[0].key) for part in parts):
        # What was complete is not given up for it.
        fits = [replace(fitted, key=f"{fitted.key}_interrupted") for fitted in fits]
    for part, fitted in zip(parts, fits, strict=True):
        results.write_fit(part, fitted)
    _report(done, fits[0], start.store)
    where = f" of each of the data sets {listing(start.store.names)}" if several else ""
    logg.info(
        f"    {done.stop_reason} after {len(done.history)} epochs",
        time=began,
        deep=f"added\n    {fits[0].key!r}, the fitted model (adata.uns[{UNS.root!r}][{UNS.fits!r}]{where})",
    )
    if done.ctrl_c and not copy:
        raise KeyboardInterrupt
    return adata if copy else None


_RUN_ARGUMENTS = {
    *("init_from", "max_epochs", "batch_size", "train_size", "validation_size", "early_stopping"),
    "n_samples_per_label",
    *("lr", "plan", "kl_warmup", "weight_decay", "precision", "seed"),
}
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(fit).parameters.items()}
KEYWORDS = [name for name in DEFAULTS if name not in ("adata", "model", "model_params")]


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


def _log_plan(start: Prepared, seconds: float, device: torch.device, how: str) -> None:
    plan, module = start.plan, start.module
    generates = Capability.COUNTS in start.spec.capabilities
    if generates:
        dtype = next(module.parameters()).dtype
        kernels = [fused.choose(name, device.type, dtype)[1] for name in dict.fromkeys(module.likelihoods)]
        how = ", ".join(filter(None, (*kernels, how)))
    schedule = f"one cycle with peak {plan.lr:g}" if plan.one_cycle else f"constant {plan.lr:g}"
    kl_weight = f", final KL weight {plan.final_kl_weight:.3g}" if generates else ""
    logg.info(
        f"    plan {plan.name!r}: {plan.n_epochs} epochs of {plan.steps_per_epoch} steps of {plan.batch_size} cells, "
        f"learning rate {schedule}{kl_weight}\n"
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


def _report(done: Progress, fitted: SavedFit, store: CellStore) -> None:
    """Say aloud what a user must know about the run."""
    if done.stop_reason == "interrupted":
        logg.warning(
            f"interrupted at step {done.step}; what was trained is kept as {fitted.key!r}. "
            f"Go on with tl.fit(adata, {fitted.model!r}, key_added={fitted.key!r}, resume=True)."
        )
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
