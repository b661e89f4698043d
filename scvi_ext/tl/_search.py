"""The trials of a search: what each of them does, and how it is judged."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from types import CodeType
from typing import TYPE_CHECKING

import numpy as np
import scanpy as sc
import torch
from scanpy import Verbosity
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._bar import progress_bar
from scvi_ext._contract import Capability
from scvi_ext._errors import first_line, listing, one_of, unknown_keyword
from scvi_ext.engine.checkpoint import module_arrays
from scvi_ext.engine.device import resolve_device
from scvi_ext.fitted import Fitted
from scvi_ext.metrics import imputation_error
from scvi_ext.tl import _study
from scvi_ext.tl._latent import latent_of
from scvi_ext.tl._marginal_ll import marginal_ll
from scvi_ext.tl._study import Rungs
from scvi_ext.tl._train import OPTIONS, Prepared, prepare_new, train

if TYPE_CHECKING:
    from typing import Any

    from anndata import AnnData
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial
    from tqdm import tqdm

    from scvi_ext._contract import ModelSpec, SavedFit
    from scvi_ext.engine.interrupt import Interrupt
    from scvi_ext.engine.progress import Progress

    Data = AnnData | Mapping[str, AnnData]
    Metric = Callable[[Data], float]

# What is searched where nothing else is asked for, beside the learning rate: the options of the seed's search.
_SPACE = {
    "n_latent": (5, 30),
    "n_hidden": [64, 128, 256],
    "dim_hidden_encoder": [64, 128, 256],
    "n_layers": (1, 3),
    "dropout_rate": (0.0, 0.4),
    "dropout_rate_encoder": (0.0, 0.4),
    "reconstruction_loss": ["zinb", "nb"],
    "reconstruction_loss_gene": ["zinb", "nb"],
}
_LR = 5.0  # how far from the default learning rate to search, as a factor
_OF_RUN = ("lr", "max_epochs", "batch_size", "kl_warmup", "weight_decay", "early_stopping")
_OF_RUN += ("n_samples_per_label", "plan", "precision")
_REAL = {"lr", "kl_warmup", "weight_decay"}
_OF_PLAN = {"lr": "lr", "max_epochs": "n_epochs", "batch_size": "batch_size", "weight_decay": "weight_decay"}
_NO_LIKELIHOODS_OF_COUNTS = {"normal", "bernoulli"}
# Options that change the quantity that held-out cells are judged by: with an observed library, it is p(x | l).
_CHANGES_LIKELIHOOD = {"library", "model_library_bools", "protein_weight"}
_N_SAMPLES = 100  # posterior samples of the marginal log-likelihood, as in the seed's search


@dataclass(frozen=True)
class Search:
    """What all trials have in common."""

    spec: ModelSpec
    key: str
    metric: str | Metric
    fixed: Mapping[str, Any]  # arguments of tl.fit
    seed: int

    @property
    def likelihood(self) -> bool:
        """Whether trials are judged by how likely held-out cells are."""
        return not callable(self.metric)

    def prepare(self, adata: Data, params: Mapping[str, Any]) -> Prepared:
        """A fit with these options."""
        asked = {**self.fixed, **params}
        options = {name: value for name, value in asked.items() if name in OPTIONS}
        of_model = {name: value for name, value in asked.items() if name not in OPTIONS}
        options |= {"key_added": self.key, "seed": self.seed}
        return prepare_new(adata, self.spec.name, options, of_model, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where trials are carried out."""
        return resolve_device(self.fixed.get("device", OPTIONS["device"]))

    def check(self, adata: Data, distributions: Mapping[str, BaseDistribution]) -> None:
        """Prepare a fit with each value that is a choice or an end of a range, all else as it is by default."""
        for name, distribution in distributions.items():
            for value in _study.ends_of(distribution):
                try:
                    self.prepare(adata, {name: value})
                except (TypeError, ValueError) as error:
                    msg = f"space[{name!r}], value {value!r}: {error}"
                    raise type(error)(msg) from error

    def defaults(self, start: Prepared, distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """What the options are where nobody says anything, of those that can be that in this search."""
        plan = {name: getattr(start.plan, of) for name, of in _OF_PLAN.items()}
        values = OPTIONS | plan | dict(start.fits[0].config)
        return {name: values[name] for name, of in distributions.items() if _study.contains(of, values[name])}

    def about(self, direction: str, distributions: Mapping[str, BaseDistribution], start: Prepared) -> dict[str, str]:
        """What makes trials comparable, as strings. On which device they are carried out does not matter."""
        usual = OPTIONS | {field.name: field.default for field in fields(self.spec.config)}
        fixed = {name: value.item() if isinstance(value, np.generic) else value for name, value in self.fixed.items()}
        said = [f"{name}={of!r}" for name, of in sorted(fixed.items()) if name != "device" and of != usual.get(name)]
        return {
            "model": self.spec.name,
            "metric": self.metric if self.likelihood else _name_of(self.metric),
            "direction": direction,
            "space": "; ".join(f"{name}: {_study.described(of)}" for name, of in sorted(distributions.items())),
            "options": ", ".join(said),
            "seed": str(self.seed),
            "data": start.store.fingerprint(),
        } | ({"starts from": _digest(module_arrays(start.module))} if fixed.get("init_from") else {})

    def carry_out(
        self,
        adata: Data,
        study: Study,
        distributions: Mapping[str, BaseDistribution],
        n_trials: int,
        timeout: float | None,
        progress: bool | None,
        interrupt: Interrupt,
    ) -> None:
        """Trials until there are enough, it is time, or ``interrupt`` is requested."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with progress_bar(n_trials, "tune", "trial", progress) as bar:
            while (n := _study.n_finished(study)) < n_trials and time.monotonic() < deadline:
                bar.update(n - bar.n)
                if interrupt.requested:
                    return
                trial = study.ask(dict(distributions))
                try:
                    if self._carry_out(adata, study, trial, bar):
                        interrupt.requested = True
                except KeyboardInterrupt:  # a second one
                    _study.give_up(study, trial)
                    interrupt.requested = True
                except BaseException:
                    _study.give_up(study, trial)
                    raise
            bar.update(_study.n_finished(study) - bar.n)

    def _carry_out(self, adata: Data, study: Study, trial: Trial, bar: tqdm) -> bool:
        """One trial, whatever comes of it; whether it was interrupted while it was trained."""
        what = f"    trial {trial.number}, {said(trial.params)}"
        known = _study.same_as(study, trial.params)
        if known is not None:
            _study.repeats(study, trial, known)
            logg.info(f"{what}: as trial {known.number}")
            return False
        try:
            start = self.prepare(adata, trial.params)
            done, fits = self.train(start, trial, bar)
        except _FAILURES as error:
            _study.give_up(study, trial, first_line(error))
            logg.warning(f"{what}: failed: {first_line(error)}")
            return False
        if done.failure is not None:  # a damaged file, which no other trial could read either
            _study.give_up(study, trial, first_line(done.failure))
            raise done.failure
        if done.ctrl_c and done.stop_reason == "interrupted":
            _study.give_up(study, trial)
        elif done.stop_reason == "pruned":
            _study.prune(study, trial)
            logg.info(f"{what}: given up after {len(done.history)} of {start.plan.n_epochs} epochs")
        else:
            self._tell(adata, study, trial, what, start, done, fits)
        return done.ctrl_c

    def _tell(
        self, adata: Data, study: Study, trial: Trial, what: str, start: Prepared, done: Progress, fits: list[SavedFit]
    ) -> None:
        """Judge a trial that was carried out."""
        try:
            with sc.settings.verbosity.override(min(sc.settings.verbosity, Verbosity.warning)):
                value = self.judge(adata, start, done, fits)
        except Exception as error:
            if not _study.any_complete(study):  # then it is likely to be the metric, and not the trial
                raise
            _study.give_up(study, trial, first_line(error))
            logg.warning(f"{what}: failed: {first_line(error)}")
            return
        study.tell(trial, value)
        logg.info(f"{what}: {value:.6g}")

    def train(self, start: Prepared, trial: Trial, bar: tqdm) -> tuple[Progress, list[SavedFit]]:
        """Train, and give up where others were better."""
        rungs = Rungs(trial)

        def after_epoch(row: Mapping[str, float], share: float) -> bool:
            bar.set_description_str(f"tune, trial {trial.number} at {share:.0%}")
            return "elbo_validation" in row and rungs.give_up(row["elbo_validation"], share)

        return train(start, self.device, show_progress=False, after_epoch=after_epoch)

    def judge(self, adata: Data, start: Prepared, done: Progress, fits: list[SavedFit]) -> float:
        """The metric of a trial. What it does to the AnnData that it is given is forgotten with it."""
        if self.metric == "elbo":
            kept = done.best_epoch if done.best_state is not None else -1
            return done.history[kept]["elbo_validation"]
        adata = _copy(adata)
        parts = [adata[fitted.joint["dataset"]] if fitted.joint else adata for fitted in fits]
        for part, fitted in zip(parts, fits, strict=True):
            results.write_fit(part, fitted)
        if self.metric == "marginal_ll":
            return _marginal_ll(parts, start, self.key, self.seed)
        if Capability.COUNTS in self.spec.capabilities:
            for part in parts:
                fitted = Fitted.open(part, self.key, decodes=False)
                results.write_obsm(part, fitted.keys.latent, *latent_of(fitted))
        value = self.metric(adata)
        if isinstance(value, bool) or not isinstance(value, Real):
            msg = (
                f"metric={_name_of(self.metric)} gave a {type(value).__name__}; a number is needed. Wrap it: "
                "metric=lambda adata: ..."
            )
            raise TypeError(msg)
        if not math.isfinite(value):
            msg = f"metric={_name_of(self.metric)} gave {value}."
            raise ValueError(msg)
        return float(value)


# What may go wrong in a trial that is no fault of the search: an impossible combination, no finite loss, no memory.
_FAILURES = (ValueError, FloatingPointError, torch.OutOfMemoryError)


def _marginal_ll(parts: list[AnnData], start: Prepared, key: str, seed: int) -> float:
    """Mean over the held-out cells, of all data sets."""
    held_out = start.split()[1]
    first = np.array([0] if len(parts) == 1 else start.store.first)
    of = np.searchsorted(first, held_out, side="right") - 1
    of_parts = [held_out[of == i] - first[i] for i in range(len(parts))]
    options = {"key": key, "n_mc_samples": _N_SAMPLES, "seed": seed}
    means = [marginal_ll(part, indices=cells, **options) for part, cells in zip(parts, of_parts, strict=True)]
    return float(np.average(means, weights=[len(cells) for cells in of_parts]))


def _copy(adata: Data) -> Data:
    """All of it, in memory: a metric may do with it what it likes."""
    if isinstance(adata, Mapping):
        return {name: _copy(part) for name, part in adata.items()}
    return adata.to_memory() if adata.isbacked else adata.copy()


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Tells weights from others."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def check_metric(metric: str | Metric, spec: ModelSpec) -> None:
    """Raise unless the metric is there, and the model has what it is about."""
    if callable(metric):
        return
    one_of("metric", metric, ("elbo", "marginal_ll"))
    if Capability.COUNTS not in spec.capabilities:
        msg = (
            f"Model {spec.name!r} has no likelihood of counts to be judged by: give a function as metric, as in "
            "metric=lambda adata: ..."
        )
        raise ValueError(msg)


def check_direction(direction: str | None, metric: str | Metric) -> str:
    if direction is None:
        return "minimize" if metric is imputation_error else "maximize"
    one_of("direction", direction, ("maximize", "minimize"))
    if not callable(metric) and direction == "minimize":
        msg = f"direction='minimize' would look for the worst fit: metric={metric!r} is high where a fit is good."
        raise ValueError(msg)
    return direction


def check_prune(prune: bool, search: Search) -> None:
    """Raise unless trials can be given up on the way, where that is asked for."""
    if not isinstance(prune, bool):
        msg = f"prune={prune!r} must be True or False."
        raise TypeError(msg)
    if prune and not search.likelihood:
        msg = (
            "prune=True gives up trials by their held-out ELBO, which says nothing of "
            f"metric={_name_of(search.metric)}: leave it out."
        )
        raise ValueError(msg)


def _name_of(metric: Metric) -> str:
    """What tells a metric from others: its name and arguments, and of a function without a name what it does."""
    if isinstance(metric, functools.partial):
        arguments = [*map(repr, metric.args), *(f"{name}={value!r}" for name, value in metric.keywords.items())]
        return f"{_name_of(metric.func)}({', '.join(arguments)})"
    name = getattr(metric, "__qualname__", type(metric).__name__)
    if name.endswith("<lambda>"):
        return f"<lambda {hashlib.sha256(repr(_meaning(metric.__code__)).encode()).hexdigest()[:8]}>"
    return name


def _meaning(code: CodeType) -> tuple:
    """What a piece of code does, wherever it stands."""
    constants = tuple(_meaning(of) if isinstance(of, CodeType) else of for of in code.co_consts)
    return code.co_code, constants, code.co_names


def default_space(search: Search, start: Prepared) -> dict[str, Any]:
    """What is searched where nothing else is asked for; of a fit that starts from another, the learning rate."""
    options = {field.name for field in fields(search.spec.config)} if not search.fixed.get("init_from") else set()
    space = {name: values for name, values in _SPACE.items() if name in options}
    space |= {"lr": (start.plan.lr / _LR, start.plan.lr * _LR, "log")}
    return {name: values for name, values in space.items() if name not in search.fixed}


def distributions_of(space: Mapping[str, Any], search: Search) -> dict[str, BaseDistribution]:
    """What is searched, of options that can be; what their values may be is for the model to say."""
    if not isinstance(space, Mapping):
        msg = f"space is a {type(space).__name__}; a mapping from options to values is needed: {{'n_latent': (5, 30)}}."
        raise TypeError(msg)
    if not space:
        msg = "There is nothing to search: space is empty, or all of it is fixed by other arguments."
        raise ValueError(msg)
    options = {field.name: field for field in fields(search.spec.config)}
    for name in space:
        if name not in options and name not in _OF_RUN:
            if name in OPTIONS:
                msg = f"{name!r} cannot be searched: trials that differ by it are not comparable."
                raise ValueError(msg)
            raise unknown_keyword(f"space of tl.tune(model={search.spec.name!r})", name, [*options, *_OF_RUN])
        if name in search.fixed:
            msg = f"{name!r} is searched and fixed, to {search.fixed[name]!r}, at the same time: leave out one of them."
            raise ValueError(msg)
        if name in options and "tuple" in options[name].type:
            msg = f"{name!r} has a value for each label or data set, and cannot be searched: give it a value."
            raise ValueError(msg)
        if search.likelihood and name in _CHANGES_LIKELIHOOD:
            msg = (
                f"{name!r} changes what metric={search.metric!r} is the likelihood of, so that trials would not be "
                "comparable by it: fix it, or judge by a function as metric."
            )
            raise ValueError(msg)
    real = {name for name in options if isinstance(options[name].default, float)} | _REAL
    distributions = {name: _study.distribution_of(name, values, real=name in real) for name, values in space.items()}
    if search.likelihood and (name := "reconstruction_loss") in distributions:
        choices = set(_study.ends_of(distributions[name]))
        if len(choices) > 1 and choices & _NO_LIKELIHOODS_OF_COUNTS:
            msg = (
                f"space[{name!r}] has {listing(sorted(choices & _NO_LIKELIHOODS_OF_COUNTS))} beside others: a "
                f"density, or the likelihood of zeros, cannot be compared with that of counts by "
                f"metric={search.metric!r}. Judge by a function as metric."
            )
            raise ValueError(msg)
    return distributions


def said(params: Mapping[str, Any]) -> str:
    """Options with their values, in short."""
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())
