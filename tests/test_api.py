"""Every public function has the same shape, says what it does, and its example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import scvi_ext as sx

PROJECT = Path(sx.__file__).parents[1]
NAMESPACES = sorted(name for name in sx.__all__ if inspect.ismodule(getattr(sx, name)))
# Namespaces of functions of an AnnData, and those that make or read one.
OF_ANNDATA = [name for name in NAMESPACES if name in ("pp", "tl", "pl", "get", "metrics")]
PUBLIC = {
    f"{space}.{name}": getattr(getattr(sx, space), name) for space in NAMESPACES for name in getattr(sx, space).__all__
}
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f) and not name.startswith("models.")}
ON_ANNDATA = {name: f for name, f in FUNCTIONS.items() if name.partition(".")[0] in OF_ANNDATA}

# Columns of obs that only the user can name, and what cells are held against: the arguments without a default.
REQUIRED = {"groupby", "condition", "batch_key", "labels_key", "reference", "measured"}
# Whose result has other genes, so that it is always an AnnData of its own.
MAKES_ITS_OWN = {"align_query"}
# Of a MuData only; all others take an AnnData.
OF_MUDATA = {"setup_mudata"}

functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
on_anndata = pytest.mark.parametrize("function", ON_ANNDATA.values(), ids=ON_ANNDATA)


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def sections(function) -> dict[str, str]:
    """Sections of a numpydoc docstring; what comes before the first one is under ``""``."""
    lines = inspect.getdoc(function).splitlines()
    found, name = {"": []}, ""
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line and below and set(below) == {"-"} and len(below) == len(line):
            name = line
            found[name] = []
        elif not (line and set(line) == {"-"}):
            found[name].append(line)
    return {name: "\n".join(text).strip("\n") for name, text in found.items()}


def documented(function) -> list[str]:
    heads = [line for line in sections(function).get("Parameters", "").splitlines() if line and line[0] != " "]
    return [name.strip() for head in heads for name in head.partition(":")[0].split(",")]


def test_there_is_something_to_look_at():
    assert {"pp.setup_anndata", "tl.fit", "tl.get_latent", "get.fits", "pl.history"} <= set(ON_ANNDATA)
    assert {"datasets.pbmc68k_counts"} <= set(FUNCTIONS)


@pytest.mark.parametrize("space", NAMESPACES)
def test_a_namespace_shows_what_is_public_and_nothing_else(space):
    module = getattr(sx, space)
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert not name.startswith("_")
        assert getattr(module, name).__module__.startswith("scvi_ext.")


@on_anndata
def test_adata_comes_first_and_at_most_two_arguments_are_positional(function):
    first, *others = parameters(function).values()
    assert first.name == ("mdata" if function.__name__ in OF_MUDATA else "adata")
    assert first.default is first.empty
    positional = [p for p in others if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    assert len(positional) <= 1
    required = {p.name for p in others if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    assert required <= REQUIRED
    assert not any(p.kind is p.VAR_POSITIONAL for p in others)


@functions
def test_options_that_all_functions_share_have_one_default(function):
    expected = {
        "copy": False,
        "key_added": None,
        "key": None,
        "indices": None,
        "batch_size": None,
        "seed": None,
        "return_mean": True,
        "show": None,
        "save": None,
        "ax": None,
    }
    if function.__module__.startswith("scvi_ext.datasets"):
        expected["seed"] = 0  # the data of an example are always the same
    for name, parameter in parameters(function).items():
        if name in expected:
            assert parameter.default == expected[name], name


@on_anndata
def test_what_writes_can_copy(function):
    returns = str(inspect.signature(function).return_annotation)
    writes = ("AnnData" in returns or "MuData" in returns) and function.__name__ not in MAKES_ITS_OWN
    assert ("copy" in parameters(function)) == writes


@functions
def test_every_type_is_given(function):
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    assert [p.name for p in signature.parameters.values() if p.annotation is p.empty] == []


@functions
def test_it_is_documented_in_full(function):
    found = sections(function)
    summary = found[""].splitlines()
    assert re.fullmatch(r"[A-Z-].*[.:]", summary[0])
    assert len(summary) == 1 or summary[1] == ""
    needed = {"Returns", "Examples"} | ({"Parameters"} if parameters(function) else set())
    assert needed <= set(found)
    known = ["", "Parameters", "Returns", "Raises", "Warns", "Notes", "Examples", "References", "See Also"]
    assert set(found) <= set(known)
    assert list(found) == sorted(found, key=known.index)
    assert all(found.values())


@functions
def test_every_parameter_is_documented_in_its_order(function):
    stars = {"VAR_KEYWORD": "**", "VAR_POSITIONAL": "*"}
    assert documented(function) == [stars.get(p.kind.name, "") + p.name for p in parameters(function).values()]


@functions
def test_types_are_not_repeated(function):
    heads = [line for line in sections(function).get("Parameters", "").splitlines() if line and line[0] != " "]
    assert [head for head in heads if ":" in head] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_lists_it(name):
    page = (PROJECT / "docs" / "api" / f"{name.partition('.')[0]}.md").read_text()
    # A class may be listed where it is defined
    places = {f"scvi_ext.{name}", f"{PUBLIC[name].__module__}.{PUBLIC[name].__name__}"}
    pattern = rf"auto(function|class|data|exception):: ({'|'.join(map(re.escape, places))})$"
    assert re.search(pattern, page, flags=re.M), f"docs/api has no entry of scvi_ext.{name}"


@pytest.mark.parametrize("space", NAMESPACES)
def test_the_reference_lists_nothing_that_does_not_exist(space):
    page = (PROJECT / "docs" / "api" / f"{space}.md").read_text()
    for path in re.findall(r"auto\w+:: scvi_ext\.([\w.]+)$", page, flags=re.M):
        owner = sx
        for part in path.split("."):
            owner = getattr(owner, part, None) or importlib.import_module(f"{owner.__name__}.{part}")
    assert space in (PROJECT / "docs" / "api" / "index.md").read_text().splitlines()


# ---- examples ------------------------------------------------------------------------------------------------------

NEEDS_TRITON = "scvi_ext.kernels.cuda"
MODULES = [name for _, name, _ in pkgutil.walk_packages(sx.__path__, "scvi_ext.") if name != NEEDS_TRITON]
EXAMPLES = [
    test
    for module in map(importlib.import_module, ["scvi_ext", *MODULES])
    for test in doctest.DocTestFinder().find(module)
    if test.examples
]


def test_every_public_function_has_an_example():
    names = {test.name for test in EXAMPLES}
    defined = [inspect.unwrap(f) for f in FUNCTIONS.values()]
    assert {f"{f.__module__}.{f.__name__}" for f in defined} <= names


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name.removeprefix("scvi_ext."))
def test_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in example.examples:
        if "tl.fit(" in step.source:
            assert "max_epochs=2" in step.source, "an example is read, not waited for"
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    failed, _ = runner.run(example, out=said.append)
    plt.close("all")
    assert not failed, "".join(said)
