"""A fitted model travels inside its AnnData: through files, processes, copies, subsets and concatenation."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from copy import deepcopy

import anndata as ad
import numpy as np
import pytest
from _tolerances import FLOAT32

import scvi_ext as sx

# Another process: reads each file, and writes what the fit inside says about the cells.
READER = """
    import sys
    import anndata as ad, numpy as np, torch
    import scvi_ext as sx

    torch.set_num_threads(1)
    *paths, out = sys.argv[1:]
    found = {}
    for path in paths:
        adata = ad.read_zarr(path) if path.endswith("zarr") else ad.read_h5ad(path)
        for key in ("scvi", "ldvae"):
            sx.tl.get_latent(adata, key=key)
            sx.tl.get_normalized_expression(adata, key=key, n_samples=2, transform_batch="b1")
            found[f"{path}:{key}:latent"] = adata.obsm[f"X_{key}"]
            found[f"{path}:{key}:normalized"] = adata.layers[f"{key}_normalized"]
            found[f"{path}:{key}:history"] = sx.get.history(adata, key).to_numpy()
        adata.write_h5ad(path + ".again.h5ad")  # what was read can be written
    np.savez(out, **found)
"""


def read_out(adata: ad.AnnData, key: str) -> dict[str, np.ndarray]:
    adata = sx.tl.get_latent(adata, key=key, copy=True)
    sx.tl.get_normalized_expression(adata, key=key, n_samples=2, transform_batch="b1")
    return {
        "latent": adata.obsm[f"X_{key}"],
        "normalized": adata.layers[f"{key}_normalized"],
        "history": sx.get.history(adata, key).to_numpy(),
    }


def test_another_process_reads_the_same_bits_from_files(fitted, tmp_path):
    paths = [tmp_path / "fitted.h5ad", tmp_path / "fitted.zarr"]
    fitted.write_h5ad(paths[0])
    fitted.write_zarr(paths[1])
    command = [sys.executable, "-W", "error::UserWarning:scvi_ext", "-c", textwrap.dedent(READER)]
    run = subprocess.run(
        [*command, *map(str, paths), str(tmp_path / "found.npz")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = np.load(tmp_path / "found.npz")
    for path in paths:
        for key in ("scvi", "ldvae"):
            for name, values in read_out(fitted, key).items():
                np.testing.assert_array_equal(
                    found[f"{path}:{key}:{name}"], values, err_msg=f"{path.name} {key} {name}"
                )


@pytest.fixture(params=["h5ad", "zarr"])
def through_a_file(request, tmp_path):
    def roundtrip(adata):
        path = tmp_path / f"a.{request.param}"
        getattr(adata, f"write_{request.param}")(path)
        return getattr(ad, f"read_{request.param}")(path)

    return roundtrip


def assert_same_fits(one: ad.AnnData, other: ad.AnnData) -> None:
    for key in ("scvi", "ldvae"):
        a, b = (adata.uns["scvi_ext"]["fits"][key] for adata in (one, other))
        assert a.keys() == b.keys()
        assert a["state"].keys() == b["state"].keys()
        for name, values in a["state"].items():
            assert np.asarray(values).dtype == np.asarray(b["state"][name]).dtype
            np.testing.assert_array_equal(values, b["state"][name], err_msg=name)
    assert sx.get.fits(one).equals(sx.get.fits(other))


def test_a_file_keeps_everything(fitted, through_a_file):
    again = through_a_file(fitted)
    assert_same_fits(fitted, again)
    assert sx.get.setup(fitted).equals(sx.get.setup(again))
    for name, values in read_out(fitted, "scvi").items():
        np.testing.assert_array_equal(read_out(again, "scvi")[name], values)


def test_every_registered_column_travels(counts, through_a_file):
    counts.obsm["protein"] = np.random.default_rng(0).poisson(5, (201, 3)).astype(np.float32)
    sx.pp.setup_anndata(
        counts,
        batch_key="batch",
        labels_key="cell_type",
        unlabeled_category="t2",
        size_factor_key="size",
        categorical_covariate_keys=["sex"],
        continuous_covariate_keys=["age"],
        protein_obsm_key="protein",
    )
    sx.tl.fit(counts, n_hidden=8, max_epochs=2, checkpoint=True, early_stopping=2, encode_covariates=True)
    again = through_a_file(counts)
    assert sx.get.setup(counts).equals(sx.get.setup(again))
    np.testing.assert_array_equal(read_out_latent(again), read_out_latent(counts))
    sx.tl.fit(again, resume=True)  # nothing left to do, and the state of the optimiser is there
    np.testing.assert_array_equal(read_out_latent(again), read_out_latent(counts))


def read_out_latent(adata):
    return sx.tl.get_latent(adata, copy=True).obsm["X_scvi"]


def test_a_fit_without_a_complete_epoch_travels_too(fitted, through_a_file):
    saved = fitted.uns["scvi_ext"]["fits"]["scvi"]
    saved["history"] = saved["history"].iloc[:0, :0]  # as after an interrupt in the first epoch
    again = through_a_file(fitted)
    assert sx.get.history(again).empty
    assert sx.get.fits(again)["epochs"].to_dict() == {"ldvae": 3, "scvi": 0}


def test_a_copy_is_independent(fitted):
    copy = fitted.copy()
    sx.tl.fit(copy, n_hidden=8, max_epochs=2)
    assert copy.uns["scvi_ext"]["fits"]["scvi"]["config"]["n_hidden"] == 8
    assert fitted.uns["scvi_ext"]["fits"]["scvi"]["config"]["n_hidden"] == 16
    assert read_out_latent(copy).shape == (201, 10)
    assert read_out_latent(fitted).shape == (201, 4)


@pytest.mark.parametrize(
    "choose",
    [
        lambda a: a[:50].copy(),
        lambda a: a[::-1].copy(),
        lambda a: a[a.obs["cell_type"] == "t1"].copy(),
        lambda a: a[:, np.random.default_rng(0).permutation(a.n_vars)].copy(),
        lambda a: a[50:20:-3, ::-1],
        lambda a: ad.concat([a], uns_merge="first"),
        lambda a: ad.concat([a], uns_merge="same"),
        lambda a: a[[3]],
    ],
    ids=["head", "reversed", "one type", "genes shuffled", "view of both", "concat first", "concat same", "one cell"],
)
@pytest.mark.parametrize("key", ["scvi", "ldvae"])
def test_parts_of_the_data_get_the_same_values(fitted, choose, key):
    sx.tl.get_latent(fitted, key=key)
    part = choose(fitted)
    sx.tl.get_latent(part, key=key, key_added="here")
    np.testing.assert_allclose(part.obsm["here"], part.obsm[f"X_{key}"], **FLOAT32)


def test_new_cells_with_more_genes_in_another_order_are_placed_by_name(fitted, make_counts, with_genes):
    new = make_counts(n_cells=50, seed=9)
    new.uns["scvi_ext"] = deepcopy(fitted.uns["scvi_ext"])
    names = ["unknown0", *fitted.var_names[::-1], "unknown1"]
    np.testing.assert_allclose(read_out_latent(with_genes(new, names)), read_out_latent(new), **FLOAT32)


def test_concatenated_with_new_cells_the_fit_still_works(fitted, make_counts):
    new = make_counts(n_cells=30, seed=9)
    both = ad.concat([fitted, new], uns_merge="first", index_unique="-")
    latent = read_out_latent(both)
    np.testing.assert_allclose(latent[:201], read_out_latent(fitted), **FLOAT32)
    assert np.isfinite(latent[201:]).all()


def test_a_backed_file_is_read_out_without_being_loaded(fitted, tmp_path):
    fitted.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sx.tl.get_latent(backed)
    sx.tl.get_normalized_expression(backed, indices=[1, 0], gene_list=["gene1"])
    assert backed.isbacked
    np.testing.assert_array_equal(backed.obsm["X_scvi"], read_out_latent(fitted))
    backed.file.close()


def test_counts_may_lie_in_a_layer(counts):
    counts.layers["counts"] = counts.X.copy()
    counts.X = counts.X.log1p()
    sx.pp.setup_anndata(counts, layer="counts")
    sx.tl.fit(counts, n_hidden=8, max_epochs=2)
    latent = read_out_latent(counts)
    counts.X = None
    np.testing.assert_array_equal(read_out_latent(counts), latent)
    del counts.layers["counts"]
    with pytest.raises(KeyError, match=r"'counts', the layer that .* registered, is not in adata\.layers"):
        sx.tl.get_latent(counts)


def test_a_fit_from_a_newer_version_is_refused(fitted):
    fitted.uns["scvi_ext"]["format"] = 99
    for call in (sx.tl.get_latent, sx.get.fits, sx.tl.fit):
        with pytest.raises(ValueError, match=r"has format 99, and .* reads formats up to 1\..*: update scvi_ext"):
            call(fitted)
