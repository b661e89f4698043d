"""Cell types of cells whose label is hidden: our models beside scvi-tools' SCANVI and what needs no deep model.

    python benchmarks/annotation.py pbmc_multibatch_5.h5ad:batch --splits 60% 95% pbmc10k_v3 pbmc3k_10xv1 --cache DIR

Labels are in obs["cell_type"], cells called Unknown have none. A split hides a share of the labels at random, or all
labels of one batch; hidden cells whose label is left nowhere cannot be told and do not count. The reference is SCVI and
then SCANVI.from_scvi_model of scvi-tools, both with their defaults: with --reference nothing else is run, and its
predictions are kept in the cache, which is read where scvi-tools is not installed. Prints markdown tables: all rows,
means over seeds, and ours less the reference's (above 0: ours is better, errors and times excepted). Seconds include
pretraining, and those of the reference are of the run that filled the cache; CPU seconds are what counts where other
programs run, and are to be compared with one thread on both sides (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _annotation import (
    LABEL,
    TRUTH,
    UNKNOWN,
    add,
    add_prediction,
    hide_labels,
    keep,
    new_reference_scanvi,
    new_reference_scvi,
    stopwatch,
    table_of,
    times_of,
)
from _common import Data, add_cache, machine, make_parser, markdown, read_data, same_threads, say
from sklearn.ensemble import RandomForestClassifier
from sklearn.svm import SVC, LinearSVC

import scvi_ext as sx

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

REFERENCE = "scvi-tools SCANVI"
# Key of the fit and row of the table -> options of tl.fit; those that start from the scVI fit pay for that too.
OURS = {
    "scanvi": {"model": "scanvi", "init_from": "scvi"},
    "scanvi alone": {"model": "scanvi"},
    "vaec": {"model": "vaec"},
    "classifier": {"model": "classifier"},
}
CLASSIFIERS = {"SVC": SVC(), "linear SVC": LinearSVC(), "random forest": RandomForestClassifier()}
SCORES = {
    "accuracy": "accuracy",
    "mean_recall": "mean recall",
    "worst_recall": "worst recall",
    "expected_calibration_error": "calibration error",
    "seconds": "seconds",
}


def main() -> None:
    """Hide, fit, predict, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="FILE.h5ad:BATCH_COLUMN, with cell types in obs['cell_type']")
    parser.add_argument("--splits", nargs="+", default=["60%", "95%"], metavar="SPLIT", help="60%%, or a batch's name")
    parser.add_argument("--models", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of fits; hidden are always the same cells")
    parser.add_argument("--max-epochs", type=int, help="of ours, for a trial; by default each one's own")
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    parser.add_argument("--reference", action="store_true", help="only fill the cache with scvi-tools' predictions")
    add_cache(parser)
    arguments = parser.parse_args()
    tables = []
    for file in arguments.files:
        data = read_data(file, arguments.subsample)
        for seed in arguments.seeds:
            for split in arguments.splits:
                if arguments.reference:
                    fit_reference(data, split, seed, arguments.cache)
                    continue
                adata, times = fit_ours(data, split, seed, arguments.models, arguments.max_epochs)
                times |= read_reference(adata, data, split, seed, arguments.cache)
                table = judged(adata, times, seed)
                tables.append(table.assign(data=data.label, split=f"{split} hidden", seed=seed))
                say(table.round(4).to_string())
    if tables:
        report(pd.concat(tables, ignore_index=True))


def fit_ours(
    data: Data, split: str, seed: int, models: list[str], max_epochs: int | None
) -> tuple[AnnData, dict[str, Any]]:
    """Cells with the predictions of our models, and what each of them took."""
    adata = data.shell()
    adata.obs[LABEL] = hide_labels(data, split)
    sx.pp.setup_anndata(adata, batch_key=data.batch_key, labels_key=LABEL, unlabeled_category=UNKNOWN)
    options = {"seed": seed, "progress": False, "max_epochs": max_epochs}
    with stopwatch() as pretraining:
        sx.tl.fit(adata, "scvi", **options)
    sx.tl.get_latent(adata, key="scvi")
    times = {}
    for key in models:
        with stopwatch() as times[key]:
            sx.tl.fit(adata, key_added=key, **OURS[key], **options)
            sx.tl.classify(adata, key=key)
        if "init_from" in OURS[key]:
            times[key] = add(pretraining, times[key])
    return adata, times


@same_threads()
def judged(adata: AnnData, times: dict[str, Any], seed: int) -> pd.DataFrame:
    """Scores of all that was predicted, and of classifiers without a deep model, on the same cells."""
    options = {"prediction_keys": list(times), "use_rep": "X_scvi", "classifiers": CLASSIFIERS, "seed": seed}
    sx.metrics.annotation_baselines(adata, TRUTH, **options)
    scores = sx.get.annotation_df(adata).rename(columns=SCORES)
    for key, watch in times.items():
        scores.loc[key, ["seconds", "CPU seconds"]] = watch.seconds, watch.cpu_seconds
    return scores.rename_axis("method").reset_index()


def fit_reference(data: Data, split: str, seed: int, cache: Path) -> None:
    """Predictions of scvi-tools' SCANVI into the cache, unless they are there."""
    file = file_of(data, split, seed, cache)
    if file.exists():
        return
    pretrained, pretraining = new_reference_scvi(data, seed, cache / f"{data.name}_annotation_scvi_{seed}")
    model, training = new_reference_scanvi(pretrained, hide_labels(data, split), seed)
    keep(
        file,
        model.predict(soft=True),
        latent=model.get_latent_representation(),
        seconds=np.array([pretraining.seconds, training.seconds]),
        cpu_seconds=np.array([pretraining.cpu_seconds, training.cpu_seconds]),
    )
    say(f"{file}: {pretraining} + {training}")


def read_reference(adata: AnnData, data: Data, split: str, seed: int, cache: Path | None) -> dict[str, Any]:
    """Predictions of scvi-tools' SCANVI into ``adata``, and what they took; nothing if the cache does not have them."""
    if cache is None or not (file := file_of(data, split, seed, cache)).exists():
        return {}
    kept = np.load(file)
    add_prediction(adata, REFERENCE, table_of(kept, adata))
    return {REFERENCE: times_of(kept["seconds"].sum(), kept["cpu_seconds"].sum())}


def file_of(data: Data, split: str, seed: int, cache: Path) -> Path:
    """Where predictions of scvi-tools are kept."""
    return cache / f"{data.name}_annotation_{split.removesuffix('%')}_{seed}.npz"


def report(table: pd.DataFrame) -> None:
    """All rows, their means, and ours less the reference's."""
    first = ["data", "split", "method", "seed"]
    table = table[[*first, *table.columns.difference(first, sort=False)]]
    means = table.drop(columns="seed").groupby(["data", "split", "method"], sort=False).mean().reset_index()
    print(f"{machine()}\n\n{markdown(table)}\n\nMean over seeds\n\n{markdown(means)}")
    rows = []
    for (data, split), methods in means.groupby(["data", "split"], sort=False):
        methods = methods.drop(columns=["data", "split"]).set_index("method")
        for method in methods.index.intersection(list(OURS)) if REFERENCE in methods.index else []:
            row = (methods.loc[method] - methods.loc[REFERENCE]).drop(["seconds", "CPU seconds"]).to_dict()
            faster = methods.loc[REFERENCE, "CPU seconds"] / methods.loc[method, "CPU seconds"]
            rows.append({"data": data, "split": split, "method": method} | row | {"times faster": faster})
    if rows:
        print(f"\nOurs less the reference's\n\n{markdown(pd.DataFrame(rows))}")


if __name__ == "__main__":
    main()
