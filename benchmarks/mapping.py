"""A query mapped onto a reference: labels transferred, batches mixed, time taken, beside load_query_data of scvi-tools.

    python benchmarks/mapping.py pbmc_multibatch_5.h5ad:batch --queries pbmc10k_v3 --cache DIR

All cells of one batch are the query, the others the reference with its labels in obs["cell_type"] (cells called Unknown
have none). Labels of the query judge only; cells of a label that the reference does not have cannot be told and do not
count. scvi-tools fits SCVI and SCANVI to the reference with its defaults, and with the architecture that its
documentation recommends for mapping ("scArches"), then trains 100 epochs on the query without weight decay: with
--reference nothing else is run, and what comes of it is kept in the cache, which is read where scvi-tools is not
installed. Prints two markdown tables, all rows and means over seeds: labels by nearest neighbours in the latent space
("kNN") and by the model's own classifier; how well query and reference mix within cell types, and how far types stand
apart, in both together; seconds to fit the reference (pretraining included) and to map. Times of scvi-tools are of the
run that filled the cache; CPU seconds are what counts where other programs run, and are to be compared with one thread
on both sides (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from _annotation import (
    LABEL,
    TRUTH,
    UNKNOWN,
    add,
    add_prediction,
    keep,
    new_reference_scanvi,
    new_reference_scvi,
    stopwatch,
    table_of,
    times_of,
)
from _common import (
    Data,
    add_cache,
    batch_mixing,
    machine,
    make_parser,
    markdown,
    quiet_reference,
    read_data,
    same_threads,
    say,
    scvi,
    silhouette,
)

import scvi_ext as sx

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ARCHITECTURES = {
    "default": {},
    "scArches": {"encode_covariates": True, "use_layer_norm": "both", "use_batch_norm": "none"},
}
# Key of the fit and row of the table -> options of tl.fit. Where the encoder sees the batch, mapping moves the query.
OURS = {
    "scvi": {"model": "scvi"},
    "scanvi": {"model": "scanvi", "init_from": "scvi"},
    "scvi, batch encoded": {"model": "scvi", "encode_covariates": True},
    "scanvi, batch encoded": {"model": "scanvi", "init_from": "scvi, batch encoded"},
    "vaec": {"model": "vaec"},
}
QUERY_EPOCHS = 100  # of scvi-tools' tutorial on mapping


def main() -> None:
    """Split, fit, map, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="FILE.h5ad:BATCH_COLUMN, with cell types in obs['cell_type']")
    parser.add_argument("--queries", nargs="+", required=True, metavar="BATCH", help="each of them is mapped alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    parser.add_argument("--max-epochs", type=int, help="of ours, for a trial; by default each one's own")
    parser.add_argument("--reference", action="store_true", help="only fill the cache with what scvi-tools does")
    add_cache(parser)
    arguments = parser.parse_args()
    rows = []
    for file in arguments.files:
        data = read_data(file, arguments.subsample)
        for query in arguments.queries:
            for seed in arguments.seeds:
                run = {"data": data.label, "query": query, "seed": seed}
                if arguments.reference:
                    for architecture in ARCHITECTURES:
                        map_with_reference(data, query, architecture, seed, arguments.cache)
                    continue
                for row in ours(data, query, seed, arguments.max_epochs):
                    rows.append(run | row)
                    say(rows[-1])
                rows += [run | row for row in from_cache(data, query, seed, arguments.cache)]
    if rows:
        table = pd.DataFrame(rows)
        means = table.drop(columns="seed").groupby(["data", "query", "method"], sort=False).mean().reset_index()
        print(f"{machine()}\n\n{markdown(table)}\n\nMean over seeds\n\n{markdown(means)}")


def split_off(data: Data, query: str) -> tuple[Data, Data]:
    """The reference and the query."""
    of_query = (data.adata.obs[data.batch_key].astype(str) == query).to_numpy()
    if of_query.all() or not of_query.any():
        msg = f"{query!r} would take {of_query.sum()} of {len(of_query)} cells."
        raise ValueError(msg)
    return tuple(
        Data(f"{data.name}_{role}_{query}", data.adata[cells].copy(), data.batch_key)
        for role, cells in (("without", ~of_query), ("only", of_query))
    )


def ours(data: Data, query: str, seed: int, max_epochs: int | None) -> Iterator[dict[str, Any]]:
    """A row for each of our models, mapped with and without training on the query."""
    rest, new = split_off(data, query)
    reference = rest.shell()
    reference.obs[LABEL] = reference.obs[TRUTH].astype(str)
    sx.pp.setup_anndata(reference, batch_key=data.batch_key, labels_key=LABEL, unlabeled_category=UNKNOWN)
    took = {}
    for key, options in OURS.items():
        with stopwatch() as took[key]:
            sx.tl.fit(reference, key_added=key, seed=seed, progress=False, max_epochs=max_epochs, **options)
        if "init_from" in options:
            took[key] = add(took[options["init_from"]], took[key])
        sx.tl.get_latent(reference, key=key)
        for method, epochs in ((key, max_epochs), (f"{key}, projected", 0)):
            cells = new.shell()
            with stopwatch() as mapping:
                sx.tl.map_query(cells, reference, key=key, max_epochs=epochs, seed=seed, progress=False)
            sx.tl.get_latent(cells)
            probabilities = None
            if options["model"] != "scvi":
                sx.tl.classify(cells)
                probabilities = cells.obsm[f"{key}_probabilities"]
            latents = (reference.obsm[f"X_{key}"], cells.obsm[f"X_{key}"])
            scores = judged(rest, new, latents, probabilities)
            yield {"method": f"scvi_ext {method}"} | scores | times(took[key], mapping)


def from_cache(data: Data, query: str, seed: int, cache: Path | None) -> Iterator[dict[str, Any]]:
    """A row for each model and architecture of scvi-tools that the cache has."""
    rest, new = split_off(data, query)
    for architecture in ARCHITECTURES:
        if cache is None or not (file := file_of(data, query, architecture, seed, cache)).exists():
            continue
        kept = np.load(file)
        pretraining, training, vae_mapping, mapping = map(times_of, kept["seconds"], kept["cpu_seconds"])
        for method, latents, probabilities, took in (
            ("SCVI", ("scvi_latent_of_reference", "scvi_latent"), None, (pretraining, vae_mapping)),
            (
                "SCANVI",
                ("latent_of_reference", "latent"),
                table_of(kept, new.adata),
                (add(pretraining, training), mapping),
            ),
        ):
            scores = judged(rest, new, tuple(kept[name] for name in latents), probabilities)
            yield {"method": f"scvi-tools {method}, {architecture}"} | scores | times(*took)


@same_threads()
def judged(
    rest: Data, new: Data, latents: tuple[np.ndarray, np.ndarray], probabilities: pd.DataFrame | None
) -> dict[str, float]:
    """How well labels are told, and how reference and query lie in one latent space."""
    obs = pd.concat([rest.adata.obs, new.adata.obs])
    types = obs[TRUTH].astype(str)
    roles = pd.Series(np.repeat(["reference", "query"], [rest.adata.n_obs, new.adata.n_obs]))
    joint = ad.AnnData(obs=pd.DataFrame(index=obs.index), obsm={"X_latent": np.concatenate(latents)})
    joint.obs[TRUTH] = types.where(types != UNKNOWN)
    joint.obs[LABEL] = joint.obs[TRUTH].where((roles == "reference").to_numpy())
    if probabilities is not None:
        none = pd.DataFrame(1 / probabilities.shape[1], rest.adata.obs_names, probabilities.columns)
        add_prediction(joint, "classifier", pd.concat([none, probabilities]))
    keys = [] if probabilities is None else ["classifier"]
    options = {"train_key": LABEL, "use_rep": "X_latent", "classifiers": {}, "prediction_keys": keys}
    sx.metrics.annotation_baselines(joint, TRUTH, **options)
    scores = sx.get.annotation_df(joint).reindex(["kNN", "classifier"])
    return {
        "kNN accuracy": scores.loc["kNN", "accuracy"],
        "kNN mean recall": scores.loc["kNN", "mean_recall"],
        "accuracy": scores.loc["classifier", "accuracy"],
        "mean recall": scores.loc["classifier", "mean_recall"],
        "calibration error": scores.loc["classifier", "expected_calibration_error"],
        "mixing": batch_mixing(joint.obsm["X_latent"], roles, types),
        "silhouette": silhouette(joint.obsm["X_latent"], types),
    }


def times(reference: Any, mapping: Any) -> dict[str, float]:
    """What both steps took."""
    return {
        "reference, s": reference.seconds,
        "reference, CPU s": reference.cpu_seconds,
        "mapping, s": mapping.seconds,
        "mapping, CPU s": mapping.cpu_seconds,
    }


def file_of(data: Data, query: str, architecture: str, seed: int, cache: Path) -> Path:
    """Where what scvi-tools does is kept."""
    return cache / f"{data.name}_mapping_{query}_{architecture}_{seed}.npz"


def map_with_reference(data: Data, query: str, architecture: str, seed: int, cache: Path) -> None:
    """scvi-tools' latents and predictions of reference and query into the cache, unless they are there."""
    file = file_of(data, query, architecture, seed, cache)
    if file.exists():
        return
    rest, new = split_off(data, query)
    folder = cache / f"{rest.name}_{architecture}_scvi_{seed}"
    vae, pretraining = new_reference_scvi(rest, seed, folder, **ARCHITECTURES[architecture])
    scanvi, training = new_reference_scanvi(vae, rest.adata.obs[TRUTH].astype(str), seed)
    with quiet_reference():
        scanvi.save(folder.with_name(folder.name.replace("_scvi_", "_scanvi_")), overwrite=True)
        mapped_vae, vae_mapping = _map(scvi.model.SCVI, vae, new, seed)
        mapped, mapping = _map(scvi.model.SCANVI, scanvi, new, seed)
        keep(
            file,
            mapped.predict(soft=True),
            latent=mapped.get_latent_representation(),
            latent_of_reference=scanvi.get_latent_representation(),
            scvi_latent=mapped_vae.get_latent_representation(),
            scvi_latent_of_reference=vae.get_latent_representation(),
            steps=["SCVI", "SCANVI", "mapping SCVI", "mapping SCANVI"],
            seconds=[float(watch.seconds) for watch in (pretraining, training, vae_mapping, mapping)],
            cpu_seconds=[float(watch.cpu_seconds) for watch in (pretraining, training, vae_mapping, mapping)],
        )
    say(f"{file}: {pretraining}, {training}, {vae_mapping}, {mapping}")


def _map(kind: Any, fitted: Any, query: Data, seed: int) -> tuple[Any, Any]:
    """A model of scvi-tools, mapped onto the query, and how long that trained."""
    adata = query.shell()
    adata.obs[LABEL] = UNKNOWN
    scvi.settings.seed = seed
    model = kind.load_query_data(adata, fitted)
    with stopwatch() as watch:
        model.train(max_epochs=QUERY_EPOCHS, plan_kwargs={"weight_decay": 0.0}, enable_progress_bar=False, logger=False)
    return model, watch


if __name__ == "__main__":
    main()
