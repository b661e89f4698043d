"""What the package says of itself: complete, true, and the same wherever it stands."""

from __future__ import annotations

import re
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import scvi_ext as sx

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
REQUIREMENTS = [Requirement(line) for group in (PROJECT["dependencies"], *EXTRAS.values()) for line in group]
PAPER = re.compile(r"(?:doi\.org/|arxiv\.org/abs/)([\w./()-]+?)\)")


def test_there_is_one_version():
    assert sx.__version__ == version("scvi-ext") == PROJECT["version"] == str(CITATION["version"])
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[(Unreleased|{re.escape(PROJECT['version'])})\]", changes, re.M)


def test_metadata_are_complete():
    installed = metadata("scvi-ext")
    assert installed["License-Expression"] == "BSD-3-Clause" == CITATION["license"]
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("BSD 3-Clause License")
    assert PROJECT["license-files"] == ["LICENSE"]
    assert PROJECT["readme"] == "README.md"
    assert PROJECT["keywords"] == sorted(PROJECT["keywords"])
    assert PROJECT["classifiers"] == sorted(PROJECT["classifiers"])
    topics = {line.split(" :: ")[0] for line in PROJECT["classifiers"]}
    assert {"Development Status", "Intended Audience", "Programming Language", "Topic", "Typing"} <= topics
    # Either the project has an address, then all that the scverse list asks for, or it has none.
    assert {"Documentation", "Source", "Issues", "Changelog"} <= set(PROJECT.get("urls", {})) or "urls" not in PROJECT
    assert all(url.startswith("https://") for url in PROJECT.get("urls", {}).values())


def test_the_python_that_runs_this_is_one_that_is_declared():
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert here in SpecifierSet(PROJECT["requires-python"])
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert named
    assert all(name in SpecifierSet(PROJECT["requires-python"]) for name in named)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_what_is_required_is_pinned_where_it_is_tested(requirement):
    assert requirement.name in PINS
    assert PINS[requirement.name] in requirement.specifier
    # A floor; what is held back is in constraints.txt, but for what breaks an installation that does without.
    held_back = {"pynndescent"}
    assert {s.operator for s in requirement.specifier} == ({">=", "<"} if requirement.name in held_back else {">="})


def test_extras_that_messages_name_exist():
    named = {
        extra
        for path in Path(sx.__file__).parent.rglob("*.py")
        for extras in re.findall(r"scvi[-_]ext\[([\w,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert named
    assert named <= set(EXTRAS)


def test_the_tests_bring_what_all_functions_need():
    """Their environment is the only one that is tested, so nothing may be optional there."""
    of_functions = [line for extra in set(EXTRAS) - {"test", "docs", "dev"} for line in EXTRAS[extra]]
    needed = {Requirement(line).name for line in of_functions}
    assert needed <= {Requirement(line).name for line in EXTRAS["test"]}


def test_the_citation_is_one():
    """The required entries of the format, version 1.2.0, and the papers that the README asks to cite."""
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["title"] == "scvi_ext"
    assert CITATION["message"]
    assert [author["name"] for author in CITATION["authors"]] == [author["name"] for author in PROJECT["authors"]]
    for paper in CITATION["references"]:
        assert paper["title"]
        assert paper["authors"]
        assert paper["year"]
        assert paper["type"] in ("article", "conference-paper")
    papers = CITATION["references"]
    cited = {paper["doi"] for paper in papers if "doi" in paper}
    cited |= {i["value"].removeprefix("arXiv:") for paper in papers for i in paper.get("identifiers", ())}
    assert cited == set(PAPER.findall(README))


@pytest.mark.parametrize("page", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_to_files_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_the_archives_hold_what_they_should(tmp_path, monkeypatch):
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
        about = {Path(name).name for name in wheel.namelist()} - {Path(name).name for name in files}
    assert {"METADATA", "LICENSE", "RECORD", "WHEEL"} == about
    assert {"scvi_ext/py.typed", "scvi_ext/__init__.py", "scvi_ext/models/scvi.py"} <= files
    assert all(name.startswith("scvi_ext/") and name.endswith((".py", "/py.typed")) for name in files)

    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert files <= inside
    assert {"CITATION.cff", "CHANGELOG.md", "Makefile", "constraints.txt", ".ci/run", "docs/conf.py"} <= inside
    assert {"tests/conftest.py", "tests/golden/cases/scvi_zinb/model.pt", "benchmarks/fit.py"} <= inside
    stray = {name for name in inside if re.search(r"__pycache__|\.pyc$|/_build/|^\.venv|\.egg-info|^dist/", name)}
    assert not stray
