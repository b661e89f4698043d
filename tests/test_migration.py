"""The pages for those who come from scvi-tools and from scVI 0.5: nothing of theirs is left out, all of ours exists."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import scvi_ext as sx

GUIDE = Path(__file__).parents[1] / "docs" / "user_guide"
NAMES = {
    page: Path(__file__).with_name(f"names_{page.removeprefix('from_')}.txt")
    for page in ("from_scvi_tools", "from_scvi_05")
}
PACKAGES = {"sx": "scvi_ext", "sc": "scanpy"}
ROLE = re.compile(r"\{(?:func|class)\}`(?:[^`<]*<)?([\w.]+)>?`")
CODE = re.compile(r"(?<!\})`([^`]+)`")
SLOT = re.compile(r'\b(obs|var|obsm|varm|varp|layers|uns)\["([^"]+)"\]')
NAMESPACES = ("pp", "tl", "get", "pl", "metrics", "datasets", "io")


class Row(NamedTuple):
    section: str
    header: list[str]
    cells: list[str]

    def __str__(self) -> str:
        return f"{self.section}: {self.cells[0]}"


@cache
def rows(page: str) -> list[Row]:
    """The rows of all tables of a page."""
    found, section, header = [], "", []
    for line in (GUIDE / f"{page}.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        elif not set(line) <= set("|-"):
            found.append(Row(section, header, cells))
    return found


def correspondences(page: str) -> list[Row]:
    """Rows that set a name of theirs beside what takes its place; tables of defaults compare values."""
    return [row for row in rows(page) if row.header[0]]


@cache
def golden(page: str) -> tuple[frozenset[str], frozenset[str]]:
    """Public names of the other library, and its options."""
    lines = [line for line in NAMES[page].read_text().splitlines() if not line.startswith("#")]
    options = {line.removesuffix("=") for line in lines if line.endswith("=")}
    return frozenset(lines) - {f"{option}=" for option in options}, frozenset(options)


def theirs(row: Row) -> tuple[set[str], set[str]]:
    """Names and options of the other library that a row is about; `a` alone may be either."""
    names, options = set(), set()
    for code in CODE.findall(row.cells[0]):
        given = set(re.findall(r"(\w+)=", code))
        options |= given or ({code} if code.isidentifier() else set())
        names |= set() if given else {code.lstrip(".")}
    return names, options


def matches(name: str, written: str) -> bool:
    return name == written or name.endswith(f".{written}")


@cache
def signature_of(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@cache
def options_of(target: str, model: str | None = None) -> frozenset[str]:
    """Keywords that a function of ours takes; `tl.fit` also those of a model or of any, `tl.tune` all of these."""
    function = resolve(target)
    own = {n for n, p in signature_of(function).items() if p.kind is not p.VAR_KEYWORD}
    if target == "scvi_ext.tl.tune":
        own |= options_of("scvi_ext.tl.fit", model)
    if target == "scvi_ext.tl.fit":
        for name in sx.models.names() if model is None else [model]:
            own |= {field.name for field in fields(sx.models.get(name).config)}
    return frozenset(own)


@cache
def resolve(dotted: str) -> object:
    """What a dotted name stands for; an AttributeError or ImportError where there is nothing."""
    package, *rest = dotted.split(".")
    dotted = ".".join([PACKAGES.get(package, package), *rest])
    found = import_module(dotted.split(".")[0])
    for i, part in enumerate(dotted.split(".")[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = import_module(".".join(dotted.split(".")[:i]))
    return found


def dotted_name(node: ast.expr) -> str | None:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def parsed(code: str) -> ast.expr | None:
    """Code as an expression; options alone (`a=1, b=2`) as the call of a nameless function."""
    for text in (code, f"_({code})"):
        try:
            return ast.parse(text, mode="eval").body
        except SyntaxError:
            continue
    return None


def check_ours(code: str, functions: list[str]) -> bool:
    """Whether a piece of code names something of ours, all of which must exist; options are those of ``functions``."""
    tree = parsed(code)
    if tree is None:
        return False
    if isinstance(tree, ast.Name) and functions:
        assert any(tree.id in options_of(f) for f in functions), f"{functions} have no option {tree.id}"
        return True
    found = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted_name(node)):
            root = name.split(".")[0]
            if root in ("sx", "sc", "scvi_ext", "torch"):
                resolve(name)
                found = True
            elif root == "adata":
                found = True
        if isinstance(node, ast.Call):
            name = dotted_name(node.func)
            given = {keyword.arg for keyword in node.keywords}
            if name == "_":
                assert functions, f"whose options are {given}?"
                for option in given:
                    assert any(option in options_of(f) for f in functions), f"{functions} have no option {option}"
                found |= bool(given)
            elif name and name.split(".")[0] in PACKAGES and name.startswith("sx."):
                named = [a.value for a in node.args if isinstance(a, ast.Constant)]
                named += [k.value.value for k in node.keywords if k.arg == "model"]
                model = next((n for n in named if n in sx.models.names()), "scvi" if name == "sx.tl.fit" else None)
                unknown = given - options_of(name.replace("sx.", "scvi_ext.", 1), model)
                assert not unknown, f"{name} has no option {unknown}"
    return found


def names_ours(row: Row) -> bool:
    """Whether a row names something of ours, all of which must exist."""
    functions = ROLE.findall(row.header[1]) if len(row.header) > 1 else []
    found = False
    for cell in row.cells[1:]:
        for target in ROLE.findall(cell):
            resolve(target)
            found = True
    for code in CODE.findall(row.cells[1]):
        found |= check_ours(code, functions)
    for cell in row.cells[2:]:
        for code in CODE.findall(cell):
            if code.startswith(("sx.", "scvi_ext.")):
                found |= check_ours(code, [])
    return found


def missing_of_the_same(row: Row) -> list[str]:
    """Of a row that says "the same": methods that our class has not, or options that no function of the header has."""
    names, options = theirs(row)
    if classes := [resolve(target) for target in ROLE.findall(row.cells[1])]:
        return sorted(n for n in names if not all(hasattr(c, n.rpartition(".")[2]) for c in classes))
    known = [options_of(function) for function in ROLE.findall(row.header[1])]
    return sorted(option for option in options if not any(option in of_one for of_one in known))


def slots_written() -> set[tuple[str, str]]:
    """Slots that the docstrings of our functions say they write."""
    found = set()
    for namespace in NAMESPACES:
        for name in getattr(sx, namespace).__all__:
            found |= set(SLOT.findall(inspect.getdoc(getattr(getattr(sx, namespace), name)) or ""))
    return found


PAGES = pytest.mark.parametrize("page", NAMES)


@PAGES
def test_every_name_of_theirs_is_in_the_page(page):
    names, options = golden(page)
    written = [theirs(row) for row in correspondences(page)]
    all_names = set().union(*(n for n, _ in written))
    all_options = set().union(*(o for _, o in written))
    assert sorted(name for name in names if not any(matches(name, w) for w in all_names)) == []
    assert sorted(options - all_options) == []


@PAGES
def test_no_name_of_theirs_is_made_up(page):
    names, options = golden(page)
    for row in correspondences(page):
        written, given = theirs(row)
        for name in written:
            assert name in options or any(matches(n, name) for n in names), f"{row}: they have no {name}"
        for option in given - written:
            assert option in options, f"{row}: they have no option {option}"


@PAGES
def test_every_row_names_ours_or_says_that_it_is_not_here(page):
    for row in correspondences(page):
        try:
            ours = names_ours(row)
        except (AttributeError, ImportError, AssertionError) as error:
            pytest.fail(f"{row}: {error}")
        if row.cells[1].startswith("the same"):
            assert missing_of_the_same(row) == [], row
            ours = True
        assert ours or re.search(r"\b[Nn]ot here\b", " ".join(row.cells[1:])), f"{row}: what takes its place?"


@PAGES
def test_slots_that_are_named_are_written(page):
    written = slots_written()
    for row in rows(page):
        for slot, key in SLOT.findall(" ".join(row.cells[1:])):
            assert (slot, key) in written or (slot, key) == ("uns", "scvi_ext"), f'{row}: nobody writes {slot}["{key}"]'


@pytest.mark.parametrize("page", [*NAMES, "faq"])
def test_calls_of_the_page_take_their_options(page):
    """Code in sentences, and in tables of defaults."""
    text = re.sub(r"^```.*?^```$", "", (GUIDE / f"{page}.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    for line in text.splitlines():
        for code in CODE.findall(line):
            if code.startswith(("sx.", "sc.")):
                check_ours(code, [])


def test_a_wrong_row_is_noticed():
    header = ["theirs", "{func}`sx.tl.fit <scvi_ext.tl.fit>`"]
    for wrong in (
        "{func}`sx.tl.nothing <scvi_ext.tl.nothing>`",
        "`sx.tl.fit(adata, nothing=1)`",
        "`nothing=1`",
        "`nothing`",
    ):
        with pytest.raises((AttributeError, ImportError, AssertionError)):
            names_ours(Row("", header, ["`a`", wrong]))
    for right in (
        "`sx.tl.fit(adata, n_latent=5)`",
        '`sx.tl.fit(adata, "gimvi", kappa=5)`',
        "`lr=1e-3, kl_warmup=1`",
        "`sc.pp.pca`",
    ):
        assert names_ours(Row("", header, ["`a`", right]))
    assert not names_ours(Row("", header, ["`a`", "not here", "`b.c`"]))
