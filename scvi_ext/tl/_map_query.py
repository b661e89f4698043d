from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import pandas as pd
import torch
from scanpy import logging as logg

from scvi_ext import models, results
from scvi_ext._contract import N_TRAIN, Capability, SavedFit
from scvi_ext._errors import listing, one_of, warn, whole_number
from scvi_ext._keys import UNS, valid_key
from scvi_ext.data.query import read_query
from scvi_ext.data.registry import Registry, differing_slots, read_fit, read_root, read_setup, stale_slots
from scvi_ext.engine.adapt import train_on_query
from scvi_ext.engine.checkpoint import module_arrays
from scvi_ext.engine.device import resolve_device, resolve_seed, seeded
from scvi_ext.engine.plan import make_plan
from scvi_ext.fitted import columns_read
from scvi_ext.nn.surgery import widen
from scvi_ext.reference import read_reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from typing import Any, Literal

    from anndata import AnnData
    from torch import Tensor, nn

    from scvi_ext._contract import ModelSpec
    from scvi_ext.data.query import Query
    from scvi_ext.engine.plan import Plan
    from scvi_ext.engine.progress import Progress

_MAPPED = "mapped_from"  # in the status of a fit that was made here
# A few hundred numbers are trained, not a network: steps can be larger and fewer than those of the model's own plan.
# On queries of 50 to 6,855 cells, within 0.7 nats per cell of what ten times as many steps reach (50 cells: 4).
_PEAK_LR, _EFFORT = 0.1, 5.0


def map_query(
    adata: AnnData,
    reference: AnnData | SavedFit | str | PathLike,
    *,
    key: str | None = None,
    key_added: str | None = None,
    layer: str | None = None,
    batch_key: str | None = None,
    batch_name: str | None = None,
    labels_key: str | None = None,
    protein_obsm_key: str | None = None,
    protein_names_uns_key: str | None = None,
    check: Literal["error", "warn"] = "error",
    freeze: bool = True,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    device: str = "auto",
    seed: int | None = None,
    progress: bool | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Map new cells onto a reference: give them the fitted model of other cells, with room for their batches.

    The query gets a fit of its own with the weights of the reference. Where it brings batches or categories of
    covariates that the reference does not know, the model is given parameters for these (columns of the layers that see
    them, rows of embeddings and of dispersions by batch), which start at the mean of those of the known categories and
    are trained on the query. Everything else stays as it is, bit for bit, so that cells of the reference have the same
    latent representation under both fits, and those of the query can be laid beside them. Where nothing is new, nothing
    is trained.

    Genes are found by name, in any order, and further ones are ignored; all genes of the reference must be there, see
    :func:`~scvi_ext.pp.align_query`. Proteins are found by name as well, but a new batch may lack some or all of them:
    those that it lacks, or that are zero in all of its cells, count as not measured there, so that cells with genes
    alone can be given proteins. A table in which no protein has a name of the reference is refused, and a warning says
    where only some have. Columns of ``obs`` have the names that they have in the reference. The query need not be set
    up: its counts are checked here as :func:`~scvi_ext.pp.setup_anndata` checks them.

    Parameters
    ----------
    adata
        The query.
    reference
        Annotated data with a fit or the path of its h5ad file or zarr folder, what :func:`~scvi_ext.io.read_model` or
        :func:`~scvi_ext.io.read_scvi_tools` returns, or the folder of a model, written by
        :func:`~scvi_ext.io.write_model` or by scvi-tools.
    key
        Which fit of an AnnData; the last one by default.
    key_added
        Name of the fit in the query, by default that of the reference. An earlier mapping of this name is replaced,
        another fit is not.
    layer
        Layer of the query with its counts; by default they are where those of the reference are.
    batch_key
        Column of ``obs`` with the batch, if its name is not that of the reference.
    batch_name
        For a query without such a column: the one batch that all cells are of, new or known.
    labels_key
        Column of ``obs`` with labels, if its name is not that of the reference. A model that infers labels needs none:
        those that are missing or unknown to it count as unlabelled.
    protein_obsm_key
        Entry of ``obsm`` with the proteins, if its name is not that of the reference.
    protein_names_uns_key
        Entry of ``uns`` with the names of the proteins, for an array, if its name is not that of the reference. An
        array without names has the proteins of the reference in their order.
    check
        ``"error"`` refuses numbers that do not look like raw counts; ``"warn"`` only warns, but refuses proteins that
        are negative, infinite or NaN.
    freeze
        Whether everything but the parameters of new categories stays as it is. False trains the whole model further on
        the query alone; its latent space is then no longer that of the reference.
    max_epochs
        Passes over the query; None takes the plan's. 0 trains nothing (projection): new batches are then decoded like
        an average known one.
    batch_size
        Cells per step; None takes the plan's.
    lr
        Peak of the learning rate; None takes the plan's, 0.1, or for ``freeze=False`` the model's.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    seed
        Of the order of the cells and of posterior samples; None takes ``settings.seed``.
    progress
        Show a bar; None shows it in terminals and notebooks. After Ctrl-C what has been trained so far is kept.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or the changed copy. Sets

    ``adata.uns["scvi_ext"]["fits"][key_added]``
        A fit like those of :func:`~scvi_ext.tl.fit`, which all read-outs take.
    ``adata.uns["scvi_ext"]["setup"]``
        What the fit reads, unless the same was registered before.
    ``adata.obs["<batch_key of the reference>"]``
        With ``batch_name`` only.

    Raises
    ------
    KeyError
        Genes or columns are missing, all proteins have other names, or the reference has no such fit.
    TypeError
        ``reference`` is none of these things.
    ValueError
        The counts are no raw counts, values are missing, the arguments contradict each other, or the fit joins several
        data sets. Nothing has been written then.
    KeyboardInterrupt
        After the fit was written, if Ctrl-C was pressed (and ``copy=False``).

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> is_new = adata.obs["batch"] == "1"
    >>> reference, query = adata[~is_new].copy(), adata[is_new].copy()
    >>> sx.pp.setup_anndata(reference, batch_key="batch")
    >>> sx.tl.fit(reference, max_epochs=2)
    >>> sx.tl.map_query(query, reference, max_epochs=2)
    >>> sx.tl.get_latent(query)
    >>> query.obsm["X_scvi"].shape[1]
    10

    References
    ----------
    Lotfollahi et al. (2022), Mapping single-cell data to reference atlases by transfer learning, Nature Biotechnology.
    """
    one_of("check", check, ["error", "warn"])
    seed, target = resolve_seed(seed), resolve_device(device)
    read_root(adata)
    trained = read_reference(reference, key)
    spec = models.get(trained.model)
    if Capability.JOINT in spec.capabilities:
        msg = (
            f"Fit {trained.key!r} joins the data sets {listing(trained.joint['datasets'])}, and cells cannot be mapped "
            f"onto it: fit them together, tl.fit({{..., 'new': query}}, model={trained.model!r}), or map onto a fit of "
            "one data set."
        )
        raise ValueError(msg)
    config = spec.config(**trained.config)
    name = _free_name(adata, trained.key if key_added is None else key_added)
    query = read_query(
        adata,
        Registry.from_uns(trained.setup),
        trained.var_names,
        needed=columns_read(trained.model, trained.config, trained.frozen),
        infers_labels=Capability.LABELS in spec.capabilities,
        layer=layer,
        batch_key=batch_key,
        batch_name=batch_name,
        labels_key=labels_key,
        protein_obsm_key=protein_obsm_key,
        protein_names_uns_key=protein_names_uns_key,
        check=check,
    )
    module, masks = _operate(trained, spec, config, query)
    pace = (_PEAK_LR, _EFFORT) if freeze else (spec.peak_lr, spec.effort)
    plan = _plan(query, *pace, max_epochs=max_epochs, batch_size=batch_size, lr=lr)
    if plan is None and not freeze:
        msg = "freeze=False has no effect with max_epochs=0, which trains nothing: leave out one of them."
        raise ValueError(msg)
    if not freeze and query.store.n_cells < 3:
        msg = f"freeze=False trains on the query, which has {query.store.n_cells} cells; three or more are needed."
        raise ValueError(msg)
    explains_counts = Capability.COUNTS in spec.capabilities
    if not freeze and not explains_counts:
        msg = f"freeze=False has nothing to train with: model {trained.model!r} has no bound for cells without a label."
        raise ValueError(msg)
    if freeze and not (masks and explains_counts):
        plan = None
    if plan is not None:
        _check_labelled(spec, query)

    adata = adata.copy() if copy else adata
    start = logg.info(
        f"mapping {query.store.n_cells} cells onto the {trained.model!r} fit {trained.key!r} of "
        f"{len(trained.var_names)} genes{_news(query)}"
    )
    _report_proteins(adata, query)
    done = None
    if plan is None:
        _say_why_not_trained(query, module, explains_counts)
    else:
        done = train_on_query(
            module,
            masks if freeze else None,
            query.store,
            plan,
            [stream for stream in models.get(trained.model).streams if not stream.labelled_only],
            seed=seed,
            device=target,
            show_progress=progress,
            announce=lambda seconds, how: logg.info(
                f"    {plan.n_epochs} epochs of {plan.steps_per_epoch} steps of {plan.batch_size} cells, about "
                f"{max(seconds, 1):.0f} s on {target}"
            ),
        )
    mapped = SavedFit(
        key=name,
        model=trained.model,
        config=trained.config,
        run={"seed": seed, "freeze": freeze} | ({} if plan is None else {"plan": asdict(plan)}),
        setup=query.registry.to_uns(),
        var_names=trained.var_names,
        state=module_arrays(module),
        history=_history(done),
        status=_status(done, trained, query, target, seed) | (_calibration(trained) if freeze else {}),
        frozen=trained.frozen,
    )
    _write(adata, mapped, query)
    _report(done, mapped, query)
    slots = f"\n    {name!r}, the fitted model (adata.uns[{UNS.root!r}][{UNS.fits!r}])"
    slots += "" if query.batch_column is None else f"\n    {query.registry.batch_key!r}, the batch (adata.obs)"
    logg.info("    finished", time=start, deep=f"added{slots}")
    if done is not None and done.ctrl_c and not copy:
        raise KeyboardInterrupt
    return adata if copy else None


def _free_name(adata: AnnData, name: str) -> str:
    """``name``, if no fit has it but an earlier mapping."""
    if valid_key(name) in read_root(adata).get(UNS.fits, {}) and _MAPPED not in read_fit(adata, name).status:
        msg = f"adata has a fit {name!r} of its own, which is not given up for a mapping: name this one, key_added=..."
        raise ValueError(msg)
    return name


def _operate(trained: SavedFit, spec: ModelSpec, config: Any, query: Query) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module of the reference with room for the query, and which parameters are new."""
    n_genes = len(trained.var_names)
    with torch.device("meta"):  # only its structure is looked at
        old = models.build(spec, config, Registry.from_uns(trained.setup).sizes(n_genes), trained.frozen)
    with seeded(0, resolve_device("cpu")):  # a module draws initial weights, even if it is given others
        summary = replace(query.store.summary(query.registry), n_train=query.store.n_cells)
        module = models.build(spec, config, summary, trained.frozen)
    learned = {name: torch.tensor(array) for name, array in trained.state.items() if name != N_TRAIN}
    state, masks = widen(old, module, learned)
    module.load_state_dict(state)
    return module.eval(), masks


def _plan(
    query: Query, peak_lr: float, effort: float, *, max_epochs: int | None, batch_size: int | None, lr: float | None
) -> Plan | None:
    """How to train, without weight decay, which would move what is frozen; None for no epochs."""
    if max_epochs is not None and whole_number("max_epochs", max_epochs, 0) == 0:
        return None
    n_cells = query.store.n_cells
    return make_plan(
        "auto",
        n_cells=n_cells,
        n_train=n_cells,
        batch_size=batch_size,
        max_epochs=max_epochs,
        lr=lr,
        kl_warmup=0.0,  # the latent space is there already
        weight_decay=0.0,
        peak_lr=peak_lr,
        effort=effort,
    )


def _check_labelled(spec: ModelSpec, query: Query) -> None:
    """Raise a ValueError if cells are trained on that lack a label which the model cannot infer."""
    labels = query.store.labels
    if labels is not None and (labels < 0).any() and Capability.LABELS not in spec.capabilities:
        msg = (
            f"{(labels < 0).sum()} of {len(labels)} cells have no label that the reference knows, and its dispersion "
            "is by label: leave them out, name the column of labels, labels_key=..., or train nothing, max_epochs=0 "
            "(the latent representation needs no labels)."
        )
        raise ValueError(msg)


def _news(query: Query) -> str:
    """What the query brings that the reference does not know."""
    news = {"batches": query.new_batches, "categories": query.new_categories}
    return "".join(f", {len(names)} new {what}: {listing(names)}" for what, names in news.items() if names)


def _report_proteins(adata: AnnData, query: Query) -> None:
    missing, names = query.missing_proteins, query.registry.protein_names
    absent, unknown = query.absent_proteins, query.unknown_proteins
    if missing:
        logg.info(
            f"    {len(missing)} of the {len(names)} proteins were not measured in the query: {listing(missing, 5)}. "
            "tl.get_protein_expression imputes them; name the entry of obsm if they were, protein_obsm_key=..."
        )
    if absent and unknown:  # the same under other names, perhaps
        warn(
            f"{len(names) - len(absent)} of the {len(names)} proteins of the reference are found in the query. Only "
            f"the reference has {listing(absent, 5)}, which are imputed; only the query has {listing(unknown, 5)}, "
            "which are left out. Rename those that are the same."
        )
    elif unknown:
        logg.info(f"    proteins that the reference does not know are left out: {listing(unknown, 5)}")
    key = query.registry.protein_obsm_key
    elsewhere = _counts_of(adata, names) if key is not None and key not in adata.obsm else []
    if elsewhere:
        warn(
            f"adata.obsm has no {key!r}, where the reference has its proteins, so all are imputed; counts of proteins "
            f"of the reference are in adata.obsm under other names: {listing(elsewhere)}. Name the entry, "
            "protein_obsm_key=..., if they are measured."
        )


def _counts_of(adata: AnnData, names: Sequence[str]) -> list[str]:
    """Entries of ``obsm`` that are tables with counts of some of these proteins, but for samples of a fit."""
    own = tuple(f"{key}_" for key in read_root(adata).get(UNS.fits, {}))
    found = []
    for key, table in adata.obsm.items():
        if isinstance(table, pd.DataFrame) and not key.startswith(own):
            values = table.loc[:, table.columns.astype(str).isin(names)].select_dtypes("number").fillna(0)
            if values.size and ((values >= 0) & (values == values.round())).to_numpy().all():
                found.append(key)
    return found


def _say_why_not_trained(query: Query, module: nn.Module, explains_counts: bool) -> None:
    if not _news(query):
        logg.info("    no new batches or categories: nothing is trained")
        return
    if not explains_counts:
        logg.info("    the model explains no counts, from which new batches could be learned: nothing is trained")
        return
    encoded = ", and encoded like it too" if getattr(module, "encode_covariates", False) else ""
    logg.warning(
        f"max_epochs=0: what is new ({listing((*query.new_batches, *query.new_categories))}) is decoded like the mean "
        f"of what is known{encoded}. Name a batch of the reference to decode in, transform_batch=..., or train."
    )


def _history(done: Progress | None) -> pd.DataFrame:
    history = pd.DataFrame([] if done is None else done.history)
    history.index = pd.RangeIndex(1, len(history) + 1, name="epoch")
    return history


def _status(done: Progress | None, trained: SavedFit, query: Query, device: object, seed: int) -> dict[str, Any]:
    run = {} if done is None else {"steps": done.step, "epochs": len(done.history)}
    return run | {
        "stop_reason": "projected" if done is None else done.stop_reason,
        _MAPPED: trained.key,
        "new_batches": list(query.new_batches) or None,
        "new_categories": list(query.new_categories) or None,
        "unknown_labels": list(query.unknown_labels) or None,
        "non_finite_cells": [str(query.store.obs_names[i]) for i in done.excluded] or None if done else None,
        "device": str(device),
        "seed": seed,
        "data": query.store.fingerprint(),
        "versions": {name: version(name) for name in ("scvi-ext", "torch", "anndata", "numpy")},
    }


def _calibration(trained: SavedFit) -> dict[str, Any]:
    """What the reference has learned of the confidence of its labels, which holds for the same weights."""
    return {name: trained.status[name] for name in ("temperature", "n_calibration") if name in trained.status}


def _write(adata: AnnData, mapped: SavedFit, query: Query) -> None:
    if query.batch_column is not None:
        results.write_obs(adata, query.registry.batch_key, query.batch_column)
    root = read_root(adata)
    if UNS.setup not in root or differing_slots(read_setup(adata), query.own):
        fits = root.get(UNS.fits, {})
        stale = [key for key in fits if stale_slots(Registry.from_uns(fits[key]["setup"]), query.own)]
        if stale:
            logg.warning(
                f"fits that were trained on other slots than the reference reads: {listing(stale)}. They are kept, and "
                "refused when used; call pp.setup_anndata as before to use them."
            )
        results.write_setup(adata, query.own.to_uns())
    results.write_fit(adata, mapped)


def _report(done: Progress | None, mapped: SavedFit, query: Query) -> None:
    """Say aloud what a user must know."""
    if query.unknown_labels:
        logg.warning(
            f"{len(query.unknown_labels)} labels are not known to the reference, and their cells count as unlabelled: "
            f"{listing(query.unknown_labels)}"
        )
    if done is None:
        return
    if done.stop_reason == "interrupted":
        logg.warning(f"interrupted at step {done.step}; what was trained is kept as {mapped.key!r}.")
    if done.events:
        warn(
            f"The loss was not finite {len(done.events)} times; each time the last good state was restored. Cells "
            f"without a finite loss, which were left out: {listing(mapped.status['non_finite_cells'] or ())}."
        )
