from __future__ import annotations

import io
import os

# Before anything imports pyplot, torch or numba. One thread each: numba would also set the number of torch's threads,
# and two that share a core wait for each other most of the time.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch

import scvi_ext as sx

torch.set_num_threads(1)
sc.settings.verbosity = "warning"
sc.settings.autoshow = False

N_CELLS, N_GENES = 201, 60
TINY = {"n_hidden": 16, "n_latent": 4, "max_epochs": 3}  # enough to have weights that differ from the first ones


def draw_counts(n_cells: int = N_CELLS, n_genes: int = N_GENES, kind=sp.csr_matrix, seed: int = 3) -> ad.AnnData:
    """Poisson counts with three cell types, three batches that each shift a third of the genes, and covariates."""
    rng = np.random.default_rng(seed)
    labels, batches = rng.integers(3, size=n_cells), np.arange(n_cells) % 3
    profile = rng.gamma(2.0, 1.0, (3, n_genes))[labels]
    shift = np.where(np.arange(n_genes) % 3 == batches[:, None], 2.0, 1.0)
    counts = rng.poisson(profile * shift * rng.lognormal(0, 0.3, (n_cells, 1))).astype(np.float32)
    counts[:, 0] += 1  # no empty cell
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical([f"b{i}" for i in batches]),
            "cell_type": pd.Categorical([f"t{i}" for i in labels]),
            "size": (counts.sum(1) / counts.sum(1).mean()).astype(np.float64),
            "sex": rng.choice(["f", "m"], n_cells),
            "age": rng.normal(size=n_cells),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    return ad.AnnData(kind(counts), obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]))


@pytest.fixture
def make_counts():
    """Draw an AnnData of counts: ``make_counts(n_cells, n_genes, kind, seed)``."""
    return draw_counts


@pytest.fixture
def counts() -> ad.AnnData:
    """201 cells x 60 genes with batches, cell types, size factors and covariates, not set up."""
    return draw_counts()


@pytest.fixture
def registered(counts) -> ad.AnnData:
    """The same, set up with its batches."""
    sx.pp.setup_anndata(counts, batch_key="batch")
    return counts


@pytest.fixture(scope="session")
def _fitted() -> ad.AnnData:
    adata = draw_counts()
    sx.pp.setup_anndata(adata, batch_key="batch")
    sx.tl.fit(adata, "ldvae", **TINY)
    sx.tl.fit(adata, "scvi", **TINY)
    return adata


@pytest.fixture
def fitted(_fitted) -> ad.AnnData:
    """The same with a fit of LDVAE and then one of scVI, both with 4 latent units."""
    return _fitted.copy()


@pytest.fixture
def logged():
    """From here on everything down to hints is logged; ``logged()`` is what has been."""
    stream, before = io.StringIO(), (sc.settings.logfile, sc.settings.verbosity)
    sc.settings.logfile, sc.settings.verbosity = stream, "hint"
    yield stream.getvalue
    sc.settings.logfile, sc.settings.verbosity = before


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets beside the project; tests that need it are skipped without."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}")
    return folder
