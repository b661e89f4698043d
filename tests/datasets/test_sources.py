"""What all data sets that are downloaded have in common."""

from __future__ import annotations

import inspect
import re
from importlib import import_module

import pytest

import scvi_ext as sx
from scvi_ext.datasets._files import File

# Without a network, and of any size.
NOT_DOWNLOADED = {name for name in sx.datasets.__all__ if name.startswith("synthetic_")} | {"pbmc68k_counts"}
ANYTHING = {"from_url"}
DOWNLOADED = sorted(set(sx.datasets.__all__) - NOT_DOWNLOADED - ANYTHING)
MODULES = [import_module(f"scvi_ext.datasets.{m}") for m in ("_cortex", "_loom", "_seqfish", "_smfish", "_spatial_csv")]
FILES = [file for module in MODULES for file in vars(module).values() if isinstance(file, File)]


@pytest.mark.parametrize("name", DOWNLOADED)
def test_it_says_how_much_is_downloaded_and_where_to(name):
    text = inspect.getdoc(getattr(sx.datasets, name))
    before_parameters = text.partition("\nParameters\n")[0].partition("\nReturns\n")[0]
    assert re.search(r"\d(\.\d)?\s+[kMG]B\b", before_parameters)
    assert "sc.settings.datasetdir" in before_parameters
    assert "OSError" in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_can_be_told_from_another(file):
    assert file.url.startswith("https://")
    if file.checksum is None:
        assert file.shape is not None
    else:
        kind, _, number = file.checksum.partition(":")
        assert re.fullmatch(rf"[0-9a-f]{{{ {'sha256': 64, 'git': 40, 'md5': 32}[kind] }}}", number)


@pytest.mark.parametrize("name", ["cortex", "smfish", "mouse_ob"])
def test_what_nobody_published_a_checksum_of_is_only_vouched_for_when_read(offer, datasetdir, name):
    pytest.importorskip("requests")
    read = getattr(sx.datasets, name)
    module = import_module(read.__module__)
    of_module = {"mouse_ob": "_MOUSE_OB"}.get(name, "_FILE")
    offer(module, of_module, b"<html>Please log in</html>", (262, 16218))
    with pytest.raises(ValueError, match=r"Unless that is what .* has, delete it from"):
        read()
    assert not list(datasetdir.glob("*.sha256"))


def test_names_of_files_are_their_own():
    names = [file.name for file in FILES]
    assert len(set(names)) == len(names)
