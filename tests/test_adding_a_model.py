"""The page on adding a model, followed to the letter: its file in a copy of the package, used and tested there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

import scvi_ext

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/developer/adding_a_model.md").read_text(encoding="utf-8")
MODEL, USE, VALUES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
(COMMAND,) = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S)
(NAME,) = re.findall(r"As `scvi_ext/models/(\w+)\.py`", PAGE)


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """The package and the tests of its models, with what the page adds to both."""
    folder = tmp_path_factory.mktemp("copied")
    # With the kernels that numba has compiled, which would take as long again as all tests.
    copytree(Path(scvi_ext.__file__).parent, folder / "scvi_ext", ignore=ignore_patterns("*.pyc*", "*tmp*"))
    copytree(ROOT / "tests/models", folder / "tests/models", ignore=ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "tests/conftest.py", "tests/_tolerances.py", "tests/test_architecture.py"):
        copy(ROOT / file, folder / file)
    (folder / f"scvi_ext/models/{NAME}.py").write_text(MODEL, encoding="utf-8")
    small = folder / "tests/models/_small.py"
    before, declared, after = small.read_text(encoding="utf-8").partition("VALUES = {\n")
    assert declared
    small.write_text(f"{before}{declared}    {VALUES}{after}", encoding="utf-8")
    return folder


def run(folder: Path, *words: str) -> str:
    """Python in the copy; what it printed."""
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_the_model_is_fitted_and_read_out(copied):
    seen = f"""
import numpy as np
from scvi_ext import models
assert sx.__file__.startswith({str(copied)!r}), sx.__file__
assert {NAME!r} in models.names() and models.SlimVAE is models.get({NAME!r}).module
assert "n_hidden_decoder=32" in models.show().loc[{NAME!r}, "options"]
assert adata.uns["scvi_ext"]["fits"][{NAME!r}]["config"]["n_hidden_decoder"] == 16
assert adata.obsm["X_{NAME}"].shape == (700, 10)
np.testing.assert_allclose(adata.layers["{NAME}_normalized"].sum(1), 1e4, rtol=1e-5)
elbo = sx.get.history(adata)["elbo_validation"]
print(elbo.iloc[-1] - elbo.iloc[0])
"""
    assert float(run(copied, "-c", USE + seen).split()[-1]) > 50  # nats: it has learned


def test_it_keeps_the_laws_of_all_models(copied):
    program, *words = shlex.split(COMMAND)
    assert program == "python"
    passed = re.search(r"(\d+) passed", run(copied, *words, "-q", "-p", "no:cacheprovider"))
    assert int(passed[1]) > 500  # the laws, times the values of the options
