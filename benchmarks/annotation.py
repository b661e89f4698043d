"""Cell types of cells whose label is hidden: our models beside scvi-tools' SCANVI and what needs no deep model.

    python benchmarks/annotation.py pbmc_multibatch_5.h5ad:batch --splits 60% 95% pbmc10k_v3 pbmc3k_10xv1 --cache DIR

Labels are in obs["cell_type"], cells called Unknown have none. A split hides a share of the labels at random, or all
labels of one batch; hidden cells whose label is left nowhere cannot be told and do not count. The reference is SCVI and
then SCANVI.from_scvi_model of scvi-tools, both with their defaults: with --reference nothing else is run, and its
predictions are kept in the cache, which is read where scvi-tools is not installed. Prints one markdown table; seconds
of a model include its pretraining, and CPU seconds are what counts where other programs run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from _annotation import hide_labels, keep, new_reference_scanvi, new_reference_scvi
from _common import Data, add_cache, make_parser, read_data, say

if TYPE_CHECKING:
    from pathlib import Path


def main() -> None:
    """Hide, fit, predict, judge and print."""
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", help="FILE.h5ad:BATCH_COLUMN, with cell types in obs['cell_type']")
    parser.add_argument("--splits", nargs="+", default=["60%", "95%"], metavar="SPLIT", help="60%%, or a batch's name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of fits; hidden are always the same cells")
    parser.add_argument("--subsample", type=int, metavar="N", help="take N random cells of each file")
    parser.add_argument("--reference", action="store_true", help="only fill the cache with scvi-tools' predictions")
    add_cache(parser)
    arguments = parser.parse_args()
    for file in arguments.files:
        data = read_data(file, arguments.subsample)
        for seed in arguments.seeds:
            for split in arguments.splits:
                fit_reference(data, split, seed, arguments.cache)


def fit_reference(data: Data, split: str, seed: int, cache: Path) -> None:
    """Predictions of scvi-tools' SCANVI into the cache, unless they are there."""
    file = cache / f"{data.name}_annotation_{split.removesuffix('%')}_{seed}.npz"
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


if __name__ == "__main__":
    main()
