from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from scanpy import logging as logg

from scvi_ext import models, results
from scvi_ext._errors import listing, number, whole_number
from scvi_ext._keys import FitKeys, valid_key
from scvi_ext.engine.device import resolve_seed
from scvi_ext.engine.interrupt import deferred_interrupt
from scvi_ext.tl._fit_into import fit_into
from scvi_ext.tl._prepare_joint import check_datasets

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike
    from typing import Any, Literal

    from anndata import AnnData


def tune(
    adata: AnnData | Mapping[str, AnnData],
    model: str = "scvi",
    *,
    space: Mapping[str, Any] | None = None,
    metric: str | Callable = "elbo",
    direction: Literal["maximize", "minimize"] | None = None,
    n_trials: int = 20,
    timeout: float | None = None,
    prune: bool = False,
    storage: str | PathLike | None = None,
    study_name: str | None = None,
    key_added: str | None = None,
    refit: bool = True,
    seed: int | None = None,
    progress: bool | None = None,
    copy: bool = False,
    **fit_options: Any,
) -> AnnData | dict[str, AnnData] | None:
    """Search the options of a model and of its training, and fit the model with the best.

    Every trial is a fit as :func:`~scvi_ext.tl.fit` would do it, with the same held-out cells and the same seed, so
    that trials differ by their options only. The first trial has the defaults, where ``space`` has them; all others are
    proposed by Optuna's tree-structured Parzen estimator. What the search finds stays in ``adata``; trials
    themselves leave nothing there.

    With ``storage`` any number of processes, on machines that see the file or the database, share one search: start
    the same call in each. A search that was stopped, by Ctrl-C or by the loss of its process, goes on with the same
    call too; a trial that was under way then counts for nothing. Ctrl-C ends the search when the step of training, or
    the metric, that is under way is done; a second one ends it at once.

    Parameters
    ----------
    adata
        Annotated data, set up, or a mapping of several data sets, as for :func:`~scvi_ext.tl.fit`.
    model
        Name of a model, see :func:`scvi_ext.models.show`.
    space
        What to search: name of an option -> a list of values to choose from; a range ``(low, high)``, both ends
        included, of whole numbers where both are; ``(low, high, "log")`` for one on a log scale; or a distribution of
        Optuna's. Options are those of the model, and ``lr``, ``max_epochs``, ``batch_size``, ``kl_warmup``,
        ``weight_decay``, ``early_stopping``, ``n_samples_per_label``, ``plan`` and ``precision``. None searches latent
        units, hidden layers and their units, dropout and likelihood, those that the model has, and the learning rate
        from a fifth to five times its default; with ``init_from``, the learning rate alone.
    metric
        What to judge a trial by: ``"elbo"``, of held-out cells after the last epoch; ``"marginal_ll"``, their marginal
        log-likelihood from 100 samples; or a function of an AnnData that returns a number, of
        :mod:`scvi_ext.metrics` or your own. It is given a copy of the cells with the fit of the trial in them and,
        where the model has one, its latent space in ``obsm["X_<key_added>"]``; of several data sets, a mapping; of a
        MuData, an AnnData with what is registered of it.
    direction
        Whether high or low values are good. None: high, but low for :func:`scvi_ext.metrics.imputation_error`.
    n_trials
        Trials to carry out, all processes and all earlier calls with this storage together. Each further process may
        add one, which was under way when the last was done.
    timeout
        Seconds after which no further trial is begun.
    prune
        Give up trials whose held-out ELBO is worse than that of most others at the same share of the plan, from the
        sixth on and not before 60 % of it. That saves time with long plans (``plan="scvi-tools"``); with the short ones
        of ``plan="auto"``, more trials carried out found better options in the same time. Only for likelihoods as
        metric: of anything else, the ELBO says nothing.
    storage
        Where to keep the search: a file (a journal, ``"search.log"``), or the URL of a database
        (``"sqlite:///search.db"``, ``"postgresql://..."``). None keeps it in memory.
    study_name
        Name of the search in ``storage``, ``key_added`` by default. A kept search that is about other cells, options,
        fits to start from, space, metric (by its name and arguments) or seed is refused.
    key_added
        Name of the fit and first part of that of the table, the name of the model by default.
    refit
        Fit the model with the best options. It comes out as it did in its trial, where the device is the same.
    seed
        Of the proposals, and of every fit; None takes ``settings.seed``.
    progress
        Show a bar of the trials; None shows it in terminals and notebooks.
    copy
        Return a copy instead of changing ``adata``.
    **fit_options
        Arguments of :func:`~scvi_ext.tl.fit` that all trials have in common, options of the model among them.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.uns["<key_added>_tuning"]["trials"]``
        One row per trial: ``state`` (complete, pruned, failed, interrupted, or running: in another process, which may
        have died), ``value`` of the metric, the options, ``seconds``, and a ``note`` where there is something to say.
    ``adata.uns["<key_added>_tuning"]["progress"]``
        Held-out ELBO of each trial by percent of its plan.
    ``adata.uns["<key_added>_tuning"]["params"]``
        What was searched and how, and which trial was best.
    ``adata.uns["scvi_ext"]["fits"][key_added]``
        The fit with the best options, unless ``refit=False``.

    Raises
    ------
    ImportError
        The extra ``tune`` is not installed.
    KeyError
        ``adata`` was not set up.
    TypeError
        Unknown keyword or option, or a value of the wrong type.
    ValueError
        An option has an impossible value, cannot be searched, or is searched and fixed; trials would not be
        comparable; ``storage`` is something else, or the study in it is about something else; no trial could be
        carried out.
    OSError
        ``storage`` cannot be read and written.
    KeyboardInterrupt
        After the trials so far were written, if Ctrl-C was pressed (and ``copy=False``). Nothing is fitted then; of a
        last fit that is interrupted itself, what was trained is kept as :func:`~scvi_ext.tl.fit` does.

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.tune(adata, space={"n_latent": [5, 10], "lr": (1e-3, 1e-2, "log")}, n_trials=2, max_epochs=1)
    >>> sx.get.tuning_df(adata).columns.tolist()
    ['state', 'value', 'n_latent', 'lr', 'seconds', 'note']

    References
    ----------
    Bergstra et al. (2011), Algorithms for hyper-parameter optimization, NeurIPS. Akiba et al. (2019), Optuna, KDD.
    """
    try:
        import optuna
    except ImportError as error:
        msg = "tl.tune searches with optuna, which is not installed: pip install 'scvi-ext[tune]'."
        raise ImportError(msg) from error
    from scvi_ext.tl import _search, _study

    spec = models.get(model)
    check_datasets(adata, spec)
    several = isinstance(adata, Mapping)
    if "resume" in fit_options:
        msg = "tl.tune has no keyword 'resume': a search that is kept in storage goes on with the same call."
        raise TypeError(msg)
    _search.check_metric(metric, spec)
    search = _search.Search(
        spec,
        key=valid_key(model if key_added is None else key_added),
        metric=metric,
        fixed=fit_options,
        seed=resolve_seed(seed),
    )
    direction = _search.check_direction(direction, metric)
    _search.check_prune(prune, search)
    whole_number("n_trials", n_trials, 1)
    if timeout is not None and not number("timeout", timeout) > 0:
        msg = f"timeout={timeout!r} must be more than 0 seconds."
        raise ValueError(msg)
    if study_name is not None and (not isinstance(study_name, str) or not study_name):
        msg = f"study_name={study_name!r} must be a name."
        raise TypeError(msg)
    start = search.prepare(adata, {})
    if search.likelihood and not len(start.split()[1]):
        msg = f"metric={metric!r} judges held-out cells, and there are none: choose a smaller train_size."
        raise ValueError(msg)
    space = _search.default_space(search, start) if space is None else space
    distributions = _search.distributions_of(space, search)
    search.check(adata, distributions)
    about = search.about(direction, distributions, start)
    if copy:
        adata = {name: part.copy() for name, part in adata.items()} if several else adata.copy()

    slot = FitKeys(search.key).tuning
    best = None
    with _study.quiet(), warnings.catch_warnings(), deferred_interrupt() as interrupt:
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        study = _study.open_study(
            storage,
            search.key if study_name is None else study_name,
            direction=direction,
            prune=prune,
            seed=search.seed,
            about=about,
            first=search.defaults(start, distributions),
        )
        began = logg.info(f"searching {listing(distributions)} of {model}: {n_trials} trials")
        search.carry_out(adata, study, distributions, n_trials, timeout, progress, interrupt)
        if _study.any_complete(study):
            best = study.best_trial
            tables = _study.tables(study, distributions)
            how = {"seed": search.seed, "study_name": study.study_name, "n_trials": n_trials, "prune": prune}
            params = about | how | {"best_trial": best.number, "best_value": best.value}
            for part in adata.values() if several else [adata]:
                results.write_uns(part, slot, {"params": params, **{name: of.copy() for name, of in tables.items()}})
            logg.info(
                f"    best of {len(tables['trials'])} trials: {best.value:.6g} with {_search.said(best.params)}",
                time=began,
                deep=f"added\n    {slot!r}, trials and how they went (adata.uns)",
            )
    interrupted = interrupt.requested
    if interrupted:
        kept = "" if best is None else f"; the trials so far are in adata.uns[{slot!r}]"
        logg.warning(f"interrupted{kept}" + ("" if storage is None else "; the same call goes on with the search"))
    elif best is None:
        msg = f"None of the trials could be carried out: {_study.failures(study)}."
        if not _study.n_finished(study):
            msg = f"No trial was complete after timeout={timeout!r} seconds: give it more."
        raise ValueError(msg)
    elif refit:
        done = fit_into(adata, search.prepare(adata, best.params), search.device, progress=progress)
        interrupted = done.ctrl_c
    if interrupted and not copy:
        raise KeyboardInterrupt
    return adata if copy else None
