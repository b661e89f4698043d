"""A query mapped onto a reference: labels transferred, batches mixed, time taken, beside load_query_data of scvi-tools.

    python benchmarks/mapping.py pbmc_multibatch_5.h5ad:batch --queries pbmc10k_v3 --cache DIR

All cells of one batch are the query, the others the reference with its labels in obs["cell_type"] (cells called Unknown
have none). Labels of the query judge only; cells of a label that the reference does not have cannot be told and do not
count. scvi-tools fits SCVI and SCANVI to the reference with its defaults, and with the architecture that its
documentation recommends for mapping ("scArches"), then trains 100 epochs on the query without weight decay: with
--reference nothing else is run, and what comes of it is kept in the cache, which is read where scvi-tools is not
installed. Prints one markdown table; CPU seconds are what counts where other programs run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from _annotation import LABEL, TRUTH, UNKNOWN, keep, new_reference_scanvi, new_reference_scvi, stopwatch
from _common import Data, add_cache, make_parser, quiet_reference, read_data, say, scvi

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURES = {
    "default": {},
    "scArches": {"encode_covariates": True, "use_layer_norm": "both", "use_batch_norm": "none"},
}
QUERY_EPOCHS = 100  # of scvi-tools' tutorial on mapping


def main() -> None:
    """Split, fit, map, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="FILE.h5ad:BATCH_COLUMN, with cell types in obs['cell_type']")
    parser.add_argument("--queries", nargs="+", required=True, metavar="BATCH", help="each of them is mapped alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    parser.add_argument("--reference", action="store_true", help="only fill the cache with what scvi-tools does")
    add_cache(parser)
    arguments = parser.parse_args()
    for file in arguments.files:
        data = read_data(file, arguments.subsample)
        for query in arguments.queries:
            for seed in arguments.seeds:
                for architecture in ARCHITECTURES:
                    map_with_reference(data, query, architecture, seed, arguments.cache)


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


def map_with_reference(data: Data, query: str, architecture: str, seed: int, cache: Path) -> None:
    """scvi-tools' latents and predictions of reference and query into the cache, unless they are there."""
    file = cache / f"{data.name}_mapping_{query}_{architecture}_{seed}.npz"
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
