from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

from scvi_ext import models
from scvi_ext._errors import one_of
from scvi_ext.engine.device import resolve_device
from scvi_ext.engine.interrupt import TO_STOP, Interrupt, deferred_interrupt
from scvi_ext.engine.processes import device_of_rank, join
from scvi_ext.tl._checkpoint import checkpoint_file, fit_inside, go_on, is_finished, usable
from scvi_ext.tl._fit_into import fit_into, take_over
from scvi_ext.tl._prepare_fit import reopen
from scvi_ext.tl._prepare_joint import check_datasets, reopen_joint
from scvi_ext.tl._team import check_team, quiet_unless_first
from scvi_ext.tl._train import OPTIONS, Prepared, prepare_new

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from typing import Any, Literal

    from anndata import AnnData


def fit(
    adata: AnnData | str | PathLike | Sequence[str | PathLike] | Mapping[str, AnnData],
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
    checkpoint: bool | str | PathLike = False,
    resume: bool | Literal["auto"] = False,
    progress: bool | None = None,
    copy: bool = False,
    **model_params: Any,
) -> AnnData | dict[str, AnnData] | None:
    """Train a model on the counts, and keep it inside ``adata``.

    Reads what :func:`~scvi_ext.pp.setup_anndata` registered. Logs the plan (epochs, steps, final KL weight, predicted
    time) at verbosity info before it starts, and shows a progress bar. Ctrl-C stops after the step under way: what has
    been trained is kept, can be used, and can be continued with ``resume=True``; a second Ctrl-C does not wait for
    that. Where a finished fit has that name already, it stays, and the interrupted one is called
    ``"<key_added>_interrupted"``.

    Parameters
    ----------
    adata
        Annotated data, set up: in memory, backed, or the path of an h5ad file or zarr folder, or several, into each of
        which the fit is written. Counts of files that take more than ``settings.memory_limit`` stay on disk, see
        :doc:`/user_guide/large_data`. For a model of several data sets a mapping from their names to them: genes are
        matched by name, and each need not have those of the others. The fit is kept in each of them, with what is its
        own.
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
        ``"bf16"`` (7 bits) where the device has it, on a processor in large layers only. Likelihoods, sums and
        parameters are float32 in any case, and so is all that is read out later.
    seed
        Of initial weights, split, order of the cells, dropout and posterior samples; None takes ``settings.seed``.
        Global random generators are neither read nor changed.
    checkpoint
        True: keep the state of optimiser and generators too (about twice the size of the weights). An interrupted run
        keeps it anyway. A path: besides, keep the run in this file while it is under way (once a minute, when an epoch
        ends), so that it outlives its process. Where ``adata`` is the path of a file, there is one beside it until the
        fit is inside, ``<file>.<key_added>.checkpoint``; of several processes ``<key_added>.checkpoint`` else.
    resume
        True: go on exactly where the fit ``key_added`` stopped, in ``adata`` or in its checkpoint file; all other
        options are those of that run. ``"auto"``: go on where there is such a fit, leave it where it is finished, and
        begin where there is none: for scripts that are started again and again. An unfinished fit must have been given
        the same options; a finished one of other options is replaced, as by any fit.
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
    SystemExit
        The same, if the system asked the process to end (SIGTERM).
    OSError
        A file cannot be read, which is named with the rows. What was trained before is written and can go on.
    RuntimeError
        Of several processes that train together, one has ended. What was trained before is kept, too.

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
    if not isinstance(resume, bool):
        one_of("resume", resume, ("auto",))
    options = {name: value for name, value in locals().items() if name in OPTIONS}
    asked = {k: v for k, v in options.items() if k in _OF_RUN and v != OPTIONS[k]} | model_params
    check_datasets(adata, models.get(model))
    several = isinstance(adata, Mapping)
    if copy:
        adata = {name: part.copy() for name, part in adata.items()} if several else adata.copy()
    if several and resume == "auto":
        msg = "resume='auto' is for one data set: give True to go on with a fit to several, or False to begin one."
        raise ValueError(msg)
    target = device_of_rank(resolve_device(device))
    team = join(target)
    file = checkpoint_file(checkpoint, adata, model if key_added is None else key_added, team)
    options["checkpoint"] = checkpoint is True
    with quiet_unless_first(team):
        kept = file.read() if file is not None and resume else None
        if file is not None and kept is None:
            file.check_replaceable()
        if resume is True:
            start = Prepared(
                *reopen_joint(adata, key_added, model, asked)
                if several
                else reopen(adata, key_added, model, asked, kept)
            )
        else:
            start = prepare_new(adata, model, options, model_params, device=target)
            found = (fit_inside(adata, start) if kept is None else usable(start, kept)) if resume else None
            if found is not None:
                start = go_on(start, found)
                if is_finished(found):
                    return take_over(adata, found, None if kept is None else file, team, copy=copy)
        check_team(team, start)
        bar = progress if team.is_first else False
        # Of several processes, what ends all of them waits until what was trained is written: it comes with the loss of
        # one of them.
        with deferred_interrupt(TO_STOP, patient=True) if team.n > 1 else nullcontext(Interrupt()) as late:
            done = fit_into(
                adata, start, target, keep_checkpoint=checkpoint is True, file=file, team=team, progress=bar
            )
    if done.failure is not None:
        raise done.failure
    if done.terminated or late.terminated:
        raise SystemExit(128 + signal.SIGTERM)
    if (done.ctrl_c or late.requested) and not copy:
        raise KeyboardInterrupt
    return adata if copy else None


_OF_RUN = OPTIONS.keys() - {"key_added", "device", "checkpoint"}  # what a run that goes on has been given already
