from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scanpy import logging as logg

from scvi_ext import results
from scvi_ext._errors import warn, whole_number
from scvi_ext.engine.checkpoint import load_module, module_arrays
from scvi_ext.engine.device import resolve_device, resolve_seed
from scvi_ext.engine.map_cells import map_cells
from scvi_ext.engine.plan import make_plan
from scvi_ext.engine.refit import refit_encoders
from scvi_ext.fitted import Fitted
from scvi_ext.functional.evidence import draws_of_shared, elbo_of_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from anndata import AnnData
    from torch import nn

    from scvi_ext._contract import Minibatch
    from scvi_ext.data.store import CellStore
    from scvi_ext.engine.map_cells import Draws


def amortization_gap(
    adata: AnnData,
    *,
    key: str | None = None,
    n_paths: int = 3,
    max_epochs: int = 50,
    lr: float = 1e-2,
    n_samples: int = 25,
    return_mean: bool = True,
    indices: Sequence | None = None,
    device: str = "auto",
    progress: bool | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> float | AnnData | None:
    """How much of the bound is lost because one encoder serves all cells: ELBO after refitting it, minus before.

    Only the encoders (of z, and of a latent library) are trained further, from where the fit ended, on the chosen
    cells, with a KL weight of 1 and without dropout. The generative model and all statistics of batch normalisation
    stay as they are, and so does the fit in ``adata``. The best of several paths counts, and the start is one of the
    candidates: a warning says so where no path beats it. On held-out cells the gap tells how much better q could be for
    cells that the encoder has not seen.

    The true gap, to the best q of each cell for itself, is at least as large: the refitted encoder is shared as well.

    Parameters
    ----------
    adata
        Annotated data that holds the fit.
    key
        Which fit; the last one by default.
    n_paths
        Refits, each with its own order of the cells and its own samples.
    max_epochs
        Passes over the cells in each.
    lr
        Peak of the learning rate, which rises, and falls to a thousandth of it.
    n_samples
        Posterior samples per cell of which both ELBOs are averages, the same before and after.
    return_mean
        Return the mean over cells. False: write one value per cell instead, from the path with the best mean.
    indices
        The cells: positions, mask or names.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    progress
        Show a bar for each path; None shows it in terminals and notebooks. Ctrl-C stops after the step under way, and
        what was found so far is the result.
    seed
        Of the paths and of the posterior samples.
    key_added
        Slot to write with ``return_mean=False``, ``"<key>_amortization_gap"`` by default.
    copy
        With ``return_mean=False``: return a copy instead of changing ``adata``.

    Returns
    -------
    The mean per cell, in nats, 0 or more. With ``return_mean=False``: ``None``, or the changed copy, and sets

    ``adata.obs["<key>_amortization_gap"]``
        float64, one value per cell, NaN for cells that were not asked for; some may be below 0, as the mean over cells
        is what was maximised.

    Raises
    ------
    KeyError
        No such fit, or genes of the fit are missing.
    ValueError
        An option has an impossible value, or ``key_added`` or ``copy`` together with ``return_mean=True``.
    KeyboardInterrupt
        After the slot was written, if Ctrl-C was pressed with ``return_mean=False`` (and ``copy=False``).

    Examples
    --------
    >>> import scvi_ext as sx
    >>> adata = sx.datasets.pbmc68k_counts()
    >>> sx.pp.setup_anndata(adata, batch_key="batch")
    >>> sx.tl.fit(adata, max_epochs=2)
    >>> sx.tl.amortization_gap(adata, n_paths=1, max_epochs=10, indices=slice(0, 100)) > 0
    True

    References
    ----------
    Cremer, Li and Duvenaud (2018), Inference suboptimality in variational autoencoders, ICML.
    """
    whole_number("n_paths", n_paths, 1)
    whole_number("n_samples", n_samples, 1)
    seed = resolve_seed(seed)
    if return_mean and (copy or key_added is not None):
        msg = "return_mean=True writes nothing: leave out copy and key_added, or ask for return_mean=False."
        raise ValueError(msg)
    target = resolve_device(device)
    adata = adata.copy() if copy else adata
    fitted = Fitted.open(adata, key, indices)
    slot = fitted.slot("obs", fitted.keys.amortization_gap, key_added)
    module, store = fitted.module, fitted.store
    plan = make_plan(
        "auto",
        n_cells=store.n_cells,
        n_train=store.n_cells,
        batch_size=None,
        max_epochs=whole_number("max_epochs", max_epochs, 1),
        lr=lr,
        kl_warmup=0.0,
        weight_decay=0.0,
        peak_lr=lr,
        effort=0.0,
    )

    start = logg.info(f"refitting the encoders of fit {fitted.fit.key!r} on {store.n_cells} cells")
    trained = module_arrays(module)
    before = best = _elbo(module, store, n_samples, seed, target)
    interrupted = False
    for path, seed_of_path in enumerate(np.random.SeedSequence(seed).generate_state(n_paths), start=1):
        load_module(module, trained)
        done = refit_encoders(module, store, plan, seed=int(seed_of_path), device=target, show_progress=progress)
        after = _elbo(module, store, n_samples, seed, target)
        best = max(best, after, key=np.mean)
        logg.info(f"    path {path}: ELBO {after.mean():.2f} per cell, {before.mean():.2f} before")
        if done.ctrl_c:
            interrupted = True
            logg.warning(f"interrupted in path {path} of {n_paths}; the gap is that of what was trained so far.")
            break
    if best is before:
        warn(
            f"No path has a higher ELBO than the fit itself, so the gap is 0, which says little: take more epochs than "
            f"max_epochs={max_epochs}, or another learning rate than lr={lr:g}."
        )
    gap = best - before
    if return_mean:
        logg.info("    finished", time=start)
        return float(gap.mean())
    results.write_obs(adata, slot, gap, fitted.rows)
    logg.info("    finished", time=start, deep=f"added\n    {slot!r}, amortization gap in nats (adata.obs)")
    if interrupted and not copy:
        raise KeyboardInterrupt
    return adata if copy else None


def _elbo(module: nn.Module, store: CellStore, n_samples: int, seed: int, device: torch.device) -> np.ndarray:
    """ELBO of each cell, shape (n,), always from the same draws."""
    shared = draws_of_shared(module.to(device), n_samples, seed)

    def elbo(cells: Minibatch, draws: Draws) -> tuple[torch.Tensor]:
        noise = draws.normal(len(cells.x), n_samples, module.n_noise)
        return (elbo_of_cells(module, cells, noise, shared).double(),)

    size = n_samples * module.n_noise
    parts = map_cells(elbo, module, store, device=device, seed=seed, floats_per_cell=size)
    return np.concatenate([part for _, (part,) in parts])
