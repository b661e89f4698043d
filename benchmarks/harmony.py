"""What a user would take instead: PCA and Harmony beside our default fit, in time and in quality.

    python benchmarks/harmony.py pbmc_multibatch_5.h5ad:batch --fits '{"adversarial_mixing": 3}'

PCA has 30 components of log-normalised counts (scanpy), Harmony is harmonypy with its defaults (left out where it is
not installed). Time of PCA and Harmony: from normalised counts to the embedding, and normalisation by itself in another
column; of ours: tl.fit and tl.get_latent, from counts. Both sides run on 500 cells first, so that imports and
compilation do not count. Prints one markdown table.
"""

from __future__ import annotations

import time
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scanpy as sc
from _common import (
    Outcome,
    add_cache,
    add_fits,
    cached_reference,
    fit_ours,
    judge,
    machine,
    make_parser,
    markdown,
    random_cells,
    read_data,
    same_threads,
    say,
    title,
    warm_up,
)

if TYPE_CHECKING:
    import anndata as ad

try:
    import harmonypy
except ImportError:
    harmonypy = None

N_COMPONENTS = 30


def main() -> None:
    """Embed, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="FILE.h5ad:BATCH_COLUMN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of our fit, and of PCA and Harmony")
    parser.add_argument("--max-epochs", type=int, help="of our fit, for a trial")
    add_fits(parser)
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    add_cache(parser)
    arguments = parser.parse_args()
    rows = []
    for file in arguments.files:
        data = read_data(file, arguments.subsample)
        if data.batch_key is None:
            parser.error(f"{file} needs a batch column: FILE.h5ad:BATCH_COLUMN")
        warm_up(data)
        few = random_cells(data.adata.n_obs, 500)
        pca_and_harmony(data.adata[few].copy(), data.batch_key, 0)
        for seed in arguments.seeds:
            normalization, outcomes = pca_and_harmony(data.adata, data.batch_key, seed)
            for options in ({}, *arguments.fits):
                ours = fit_ours(data, seed, **{"max_epochs": arguments.max_epochs} | options)
                ours.method = title(options)
                ours.seconds += ours.latent_seconds
                outcomes.append(ours)
            reference = cached_reference(data, seed, cache=arguments.cache)
            if reference is not None:
                outcomes.append(reference)
            for outcome in outcomes:
                linear = outcome.method.startswith("PCA")
                row = {"data": data.label, "method": outcome.method, "seed": seed, "seconds": outcome.seconds}
                row |= {"normalisation, seconds": normalization if linear else float("nan")}
                judged = judge(data, outcome)
                if linear:
                    judged.pop("active units")  # the threshold is for latents of unit scale
                rows.append(row | judged)
                say(rows[-1])
    table = pd.DataFrame(rows)
    harmony = table["seconds"].where(table["method"] == "PCA + Harmony")
    harmony = harmony.groupby([table["data"], table["seed"]]).transform("max")  # the one that there is
    table.insert(4, "times PCA + Harmony", table["seconds"] / harmony)
    print(f"{machine()}, harmonypy {'not installed' if harmonypy is None else version('harmonypy')}\n")
    print(markdown(table))


@same_threads()
def pca_and_harmony(counts: ad.AnnData, batch_key: str, seed: int) -> tuple[float, list[Outcome]]:
    """Seconds of the normalisation, and both embeddings."""
    adata = counts.copy()
    started = time.perf_counter()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    normalized = time.perf_counter()
    sc.pp.pca(adata, n_comps=N_COMPONENTS, random_state=seed)
    pca = adata.obsm["X_pca"]
    outcomes = [Outcome("PCA", time.perf_counter() - normalized, float("nan"), pca)]
    if harmonypy is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            harmony = harmonypy.run_harmony(pca, adata.obs, batch_key, verbose=False, random_state=seed)
        corrected = np.asarray(harmony.Z_corr)
        if len(corrected) != adata.n_obs:  # before harmonypy 2
            corrected = corrected.T
        outcomes.append(Outcome("PCA + Harmony", time.perf_counter() - normalized, float("nan"), corrected))
    return normalized - started, outcomes


if __name__ == "__main__":
    main()
