"""A search with Optuna: what is searched, where the trials are kept, in which order they come, and a table of them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Set
from contextlib import contextmanager
from datetime import datetime
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import TrialState
from scanpy import logging as logg
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from scvi_ext._errors import first_line, listing
from scvi_ext._keys import NONE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

_RUNG = 10  # percent of the plan between two comparisons: the same for all trials, whatever their number of epochs
# Trials that are carried out in any case, and percent of the plan of every other one: where the learning rate rises and
# falls, the bound says little before.
_UNPRUNED, _EARLIEST = 5, 60

_ABOUT, _ERROR, _SAME = "scvi_ext", "error", "same_as"  # attributes of the study, of a failed trial, of a repeated one


def distribution_of(name: str, values: Any, *, real: bool) -> BaseDistribution:
    """What is searched of one option: a list of values, a range, or a distribution of Optuna's.

    ``real`` tells that the option is no whole number, even where the ends of its range are.
    """
    if isinstance(values, BaseDistribution):
        return values
    how = f"space[{name!r}]={values!r}"
    if isinstance(values, tuple):
        low, high, *log = values if len(values) in (2, 3) else (None, None)
        if not all(_is_number(end) for end in (low, high)) or log not in ([], ["log"]):
            msg = f"{how} is no range: (low, high) or (low, high, 'log') is needed; values to choose from are a list."
            raise ValueError(msg)
        if not (low < high and (low > 0 or not log)):
            msg = f"{how} is empty: low must be less than high{', and more than 0 on a log scale' if log else ''}."
            raise ValueError(msg)
        if real or not all(isinstance(end, int | np.integer) for end in (low, high)):
            return FloatDistribution(float(low), float(high), log=bool(log))
        return IntDistribution(int(low), int(high), log=bool(log))
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        msg = f"{how} is a {type(values).__name__}; a list of values or a range (low, high) is needed."
        raise TypeError(msg)
    choices = [value.item() if isinstance(value, np.generic) else value for value in values]
    if not choices:
        msg = f"{how} has no value to choose."
        raise ValueError(msg)
    for choice in choices:
        if not (choice is None or isinstance(choice, bool | int | float | str)):
            msg = f"{how} holds a {type(choice).__name__}; numbers, names, True, False and None can be chosen from."
            raise TypeError(msg)
    return CategoricalDistribution(choices)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a trial could have this value."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    inside = _is_number(value) and distribution.low <= value <= distribution.high
    return inside and (distribution.step is None or (value - distribution.low) % distribution.step == 0)


def described(distribution: BaseDistribution) -> str:
    """What is searched, in words."""
    if isinstance(distribution, CategoricalDistribution):
        return listing(distribution.choices)
    by = "" if distribution.step in (None, 1) else f" by {distribution.step:g}"
    return f"{distribution.low:g} to {distribution.high:g}{by}{' on a log scale' if distribution.log else ''}"


def ends_of(distribution: BaseDistribution) -> list[Any]:
    """Every choice, or both ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [distribution.low, distribution.high]


class _ByNumber(BaseSampler):
    """First the values that are given, then tree-structured Parzen estimators with a seed and the number of the trial.

    Processes that share a study thus neither repeat each other, as they would with one seed, nor need one each.
    """

    def __init__(self, seed: int, first: Mapping[str, Any]):
        self._seed = seed
        self._first = first
        self._given: Mapping[str, Any] = {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        earlier = study.get_trials(deepcopy=False)[: trial.number]
        self._given = {} if any(map(_counts, earlier)) else self._first
        seed = np.random.SeedSequence([self._seed, trial.number]).generate_state(1)
        self._sampler = TPESampler(seed=int(seed[0]))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {} if self._given else self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name in self._given:
            return self._given[param_name]
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Optuna logs nothing: what is to be told is told as scanpy tells it."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(
    storage: str | PathLike | None,
    name: str,
    *,
    direction: str,
    prune: bool,
    seed: int,
    about: Mapping[str, str],
    first: Mapping[str, Any],
) -> Study:
    """A new study, or the one of that name that is kept in ``storage``, if it is about the same.

    ``about`` is everything that two trials must have in common to be compared, ``first`` are values to begin with.
    """
    pruner = optuna.pruners.MedianPruner(_UNPRUNED, _EARLIEST) if prune else optuna.pruners.NopPruner()
    study = _patiently(
        lambda: optuna.create_study(
            storage=_storage(storage),
            study_name=name,
            direction=direction,
            sampler=_ByNumber(seed, first),
            pruner=pruner,
            load_if_exists=True,
        ),
        storage,
    )
    known = study.user_attrs.get(_ABOUT)
    if known is None and not study.trials and [of.name.lower() for of in study.directions] == [direction]:
        study.set_user_attr(_ABOUT, dict(about))
    elif known is None:
        msg = f"The study {name!r} that is kept there was not made by tl.tune: give another study_name."
        raise ValueError(msg)
    elif known != about:
        unlike = [what for what in about if about[what] != known.get(what)]
        found = "; ".join(f"{what} {known.get(what, 'not told')}, here {about[what]}" for what in unlike)
        msg = f"The study {name!r} that is kept there is about something else ({found}): give another study_name."
        raise ValueError(msg)
    return study


def _patiently(create: Callable[[], Study], storage: str | PathLike | None) -> Study:
    """Create a study; processes that make the tables of a database at the same time must try again."""
    for wait in (0.2, 0.4, 0.8, 1.6, None):
        try:
            return create()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if wait is None:
                msg = f"storage={_shown(storage)} cannot be used ({first_line(error)})."
                raise OSError(msg) from error
            time.sleep(wait)
    raise AssertionError


def _storage(storage: str | PathLike | None) -> Any:
    """Where Optuna keeps a study: in memory, in a journal file, or in a database that is named by a URL."""
    if storage is None:
        return None
    if not isinstance(storage, str | PathLike) or not fspath(storage):
        msg = f"storage={storage!r} is no place; a file or the URL of a database is needed."
        raise TypeError(msg)
    if "://" not in fspath(storage):
        return _journal(Path(storage).absolute())  # a lock on a relative path could not be looked at by others
    if fspath(storage).startswith("redis"):
        msg = "Optuna reads pickles from Redis, which can run any program: give a file, or the URL of a database."
        raise ValueError(msg)
    try:
        return optuna.storages.RDBStorage(storage)
    except (ImportError, NoSuchModuleError, ArgumentError) as error:
        msg = f"storage={_shown(storage)} is no database that can be reached from here ({first_line(error)})."
        raise ValueError(msg) from error


def _shown(storage: str | PathLike) -> str:
    """The place without a password."""
    return re.sub(r"(?<=:)[^:@/]+(?=@)", "***", repr(fspath(storage)))


def _journal(file: Path) -> Any:
    """A journal in this file, which may be new."""
    if not file.parent.is_dir():
        msg = f"storage={str(file)!r}: there is no folder {str(file.parent)!r}."
        raise FileNotFoundError(msg)
    try:
        lock = optuna.storages.journal.JournalFileSymlinkLock(str(file))
        if file.exists():
            with file.open("rb") as journal:
                first = journal.readline()
            if first.endswith(b"\n"):
                _check_journal(file, first)
                lock.acquire()
                try:
                    _drop_half_a_line(file)
                finally:
                    lock.release()
            elif first:
                _check_journal(file, first)
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file), lock_obj=lock))
    except OSError as error:
        msg = f"storage={str(file)!r} cannot be read and written ({error.strerror or error})."
        raise type(error)(msg) from error


def _check_journal(file: Path, first: bytes) -> None:
    """Raise a ValueError unless the file begins as a journal does."""
    try:
        is_journal = "op_code" in json.loads(first)
    except (ValueError, TypeError):
        is_journal = False
    if not is_journal:
        msg = f"storage={str(file)!r} is a file of something else, and no journal of Optuna: name another file."
        raise ValueError(msg)


def _drop_half_a_line(file: Path) -> None:
    """Take away what a process has left that died, or had no space left, while it wrote."""
    with file.open("rb+") as journal:
        content = journal.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            journal.truncate(whole)
            logg.warning(f"{str(file)!r} ended in half a line, which is left out")


def n_finished(study: Study) -> int:
    """Trials that count: carried out, given up, or impossible; not those that were interrupted or died."""
    return sum(map(_is_finished, study.get_trials(deepcopy=False)))


def _is_finished(trial: FrozenTrial) -> bool:
    done = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    return done or (trial.state == TrialState.FAIL and _ERROR in trial.user_attrs)


def _counts(trial: FrozenTrial) -> bool:
    """Whether it is finished, or may be some day."""
    return _is_finished(trial) or trial.state in (TrialState.RUNNING, TrialState.WAITING)


def same_as(study: Study, params: Mapping[str, Any]) -> FrozenTrial | None:
    """A trial that was carried out with the same values, if there is one: another would give the same."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((trial for trial in trials if trial.params == params), None)


class Rungs:
    """What a trial has reached when each tenth of its plan was done, and whether it is worth going on with."""

    def __init__(self, trial: Trial):
        self._trial = trial
        self._last = 0

    def give_up(self, value: float, share: float) -> bool:
        """Note the value when ``share`` of the plan is done; whether most trials were better then."""
        rung = int(round(100 * share, 6)) // _RUNG * _RUNG
        if rung == self._last:
            return False
        self._last = rung
        self._trial.report(value, rung)
        return rung < 100 and self._trial.should_prune()


def repeats(study: Study, trial: Trial, known: FrozenTrial) -> None:
    """Take the value of a trial with the same options."""
    trial.set_user_attr(_SAME, known.number)
    study.tell(trial, known.value)


def give_up(study: Study, trial: Trial, error: str | None = None) -> None:
    """A trial that has no value: with the error that it ended in, or without one where it was interrupted."""
    if error is not None:
        trial.set_user_attr(_ERROR, error)
    study.tell(trial, state=TrialState.FAIL)


def prune(study: Study, trial: Trial) -> None:
    """A trial that was not worth going on with; its last value is kept."""
    study.tell(trial, state=TrialState.PRUNED)


def tables(study: Study, space: Mapping[str, BaseDistribution]) -> dict[str, pd.DataFrame]:
    """The trials, and how they went, as tables that every file format holds."""
    trials = study.get_trials(deepcopy=False)
    options = {name: _column([t.params.get(name) for t in trials], of) for name, of in space.items()}
    of_trials = {
        "state": [_state(trial) for trial in trials],
        "value": [trial.value if trial.state == TrialState.COMPLETE else np.nan for trial in trials],
        **options,
        "seconds": [_seconds(trial) for trial in trials],
        "note": [_note(trial) for trial in trials],
    }
    index = pd.Index([trial.number for trial in trials], name="trial")
    went = [(t.number, rung, value) for t in trials for rung, value in sorted(t.intermediate_values.items())]
    return {
        "trials": pd.DataFrame(of_trials, index=index),
        "progress": pd.DataFrame(went, columns=["trial", "percent", "elbo"]).astype(
            {"trial": int, "percent": int, "elbo": float}
        ),
    }


def _column(values: list[Any], distribution: BaseDistribution) -> list[Any]:
    """Numbers where all choices are numbers; else their names."""
    if all(_is_number(end) for end in ends_of(distribution)):
        return [np.nan if value is None else value for value in values]
    return [NONE if value is None else str(value) for value in values]


def _state(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return "failed" if _ERROR in trial.user_attrs else "interrupted"
    return trial.state.name.lower()


def _seconds(trial: FrozenTrial) -> float:
    if trial.state == TrialState.RUNNING and trial.datetime_start is not None:
        return (datetime.now() - trial.datetime_start).total_seconds()
    return np.nan if trial.duration is None else trial.duration.total_seconds()


def _note(trial: FrozenTrial) -> str:
    if _SAME in trial.user_attrs:
        return f"as trial {trial.user_attrs[_SAME]}"
    return trial.user_attrs.get(_ERROR, "")


def any_complete(study: Study) -> bool:
    """Whether a trial has a value."""
    return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def failures(study: Study) -> str:
    """What the failed trials ended in, each kind once."""
    return listing(dict.fromkeys(t.user_attrs[_ERROR] for t in study.trials if _ERROR in t.user_attrs), 3)
