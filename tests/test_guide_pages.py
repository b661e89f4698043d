"""Each model has a page of the user guide with all its options, what it is for, and where it ends."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from scvi_ext import models

GUIDE = Path(__file__).parents[1] / "docs" / "user_guide"
PAGE = {"vaec": "scanvi", "classifier": "scanvi"}  # models that share the page of another one
SECTIONS = ["The (generative process|model)", "Options", "When to use it", "Limits", "References?"]
INHERITED = "All options of {doc}`scvi` are there"

MODELS = pytest.mark.parametrize("name", models.names())
TABLE = re.compile(r"^\| option \|.*\n\|[-|]+\n((?:\|.*\n)+)", flags=re.M)


def read(name: str) -> str:
    return (GUIDE / f"{PAGE.get(name, name)}.md").read_text(encoding="utf-8")


def options_of(name: str) -> dict[str, object]:
    return {field.name: field.default for field in fields(models.get(name).config)}


def shown(name: str) -> list[tuple[str, str]]:
    """Options and defaults in the tables of the page, one by one where a row has several."""
    found = []
    for row in "".join(TABLE.findall(read(name))).splitlines():
        options, defaults = (cell.strip() for cell in row.split("|")[1:3])
        names, values = re.findall(r"`(\w+)`", options), defaults.split(", ")
        found += zip(names, values if len(values) == len(names) else [defaults] * len(names), strict=True)
    return found


@MODELS
def test_every_option_stands_on_the_page(name):
    missing = options_of(name).keys() - dict(shown(name)).keys()
    if INHERITED in read(name):
        scvi = options_of("scvi").items()
        missing = {option for option in missing if (option, options_of(name)[option]) not in scvi}
    assert not missing


@MODELS
def test_defaults_are_those_of_the_model(name):
    defaults = options_of(name)
    of_this_model = [(option, text) for option, text in shown(name) if option in defaults]
    assert of_this_model
    for option, text in of_this_model:
        if defaults[option] is not None:  # what None stands for is told in words
            assert ast.literal_eval(text.strip("`")) == defaults[option], option


@MODELS
def test_options_on_the_page_exist(name):
    here = [other for other in models.names() if PAGE.get(other, other) == PAGE.get(name, name)]
    assert dict(shown(name)).keys() <= set().union(*map(options_of, here))


@MODELS
@pytest.mark.parametrize("section", SECTIONS)
def test_pages_have_the_same_sections(name, section):
    assert re.search(rf"^##+ {section}$", read(name), flags=re.M)


@MODELS
def test_pages_say_where_inference_is_explained(name):
    assert "{doc}`variational_inference`" in read(name)


@MODELS
def test_the_table_of_models_leads_to_the_page(name):
    table = (GUIDE / "index.md").read_text(encoding="utf-8").split("## Which model?")[1]
    assert f"{{doc}}`{PAGE.get(name, name)}`" in table
