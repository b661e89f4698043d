"""Code in the pages: what the build does not execute is run here, or checked as far as it goes without doing it."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc

import scvi_ext as sx

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MADE_BY_THE_BUILD = {"_build", "generated", "jupyter_execute"}
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if not MADE_BY_THE_BUILD & set(path.relative_to(ROOT).parts)
)

# Pages with a test of their own, which sets the stage for them and looks closer.
ELSEWHERE = {
    "docs/developer/adding_a_model.md": "test_adding_a_model.py",
    "docs/index.md": "test_landing_page.py",
}

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^ *(?P=fence) *$", flags=re.M | re.S
)
ROLE_OF_THE_BUILD = ("{code-cell}", "{eval-rst}", "{include}", "{toctree}")


@dataclass(frozen=True)
class Block:
    """A fenced block: the language that it declares, where it begins, and the code."""

    language: str
    line: int
    code: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, line: int = 1) -> list[Block]:
    """The blocks of a page; those within a directive (a tab, a note) included."""
    found = []
    for match in FENCE.finditer(text):
        info, here = match["info"].strip(), line + text.count("\n", 0, match.start())
        if info.startswith("{") and not info.startswith(ROLE_OF_THE_BUILD):
            found += blocks(match["body"], here + 1)
            continue
        code = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.M)
        found.append(Block(info, here, code))
    return found


def of(page: str, language: str) -> list[Block]:
    return [block for block in blocks(read(page)) if block.language == language]


def is_ours(block: Block) -> bool:
    """Whether it is code for this package; pages on migration show that of scvi-tools beside it."""
    return not block.code.startswith(("# scvi-tools", "# scVI 0.5"))


def is_executed_by_the_build(page: str) -> bool:
    return re.match(r"---\n.*?^kernelspec:.*?^---$", read(page), re.M | re.S) is not None


RUN_HERE = [page for page in PAGES if page not in ELSEWHERE and any(map(is_ours, of(page, "python")))]


def test_blocks_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/user_guide/scvi.md"} <= set(PAGES)
    page = "a\n\n````{tab-item} b\n```python\nx = 1\n```\n````\n\n- c\n\n  ```bash\n  make test\n  ```\n"
    assert blocks(page) == [Block("python", 4, "x = 1\n"), Block("bash", 11, "make test\n")]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    """Then each one is executed by the build, run or checked below, or plain text."""
    known = {"python", "bash", "text", "console"}
    cells = re.compile(r"\{code-cell\} (python|ipython3)$")
    for block in blocks(read(page)):
        where = f"{page}, line {block.line}"
        if block.language.startswith("{code-cell}"):
            assert cells.match(block.language), where
            assert is_executed_by_the_build(page), f"{where}: a cell needs a page with a kernelspec"
        else:
            assert block.language.startswith(ROLE_OF_THE_BUILD) or block.language in known, where
            if block.language == "python" and is_ours(block) and page not in ELSEWHERE:
                assert not is_executed_by_the_build(page), f"{where}: on this page a {{code-cell}} can run"


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_pages_that_are_run_elsewhere_are(page, test):
    assert Path(page).name in (Path(__file__).parent / test).read_text(encoding="utf-8")


# ---- Python ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the Python blocks of a page, one after the other, in an empty folder: the names as each one leaves them."""
    settings = {name: getattr(sx.settings, name) for name in sx.settings.__slots__}
    verbosity, logfile = sc.settings.verbosity, sc.settings.logfile
    monkeypatch.chdir(tmp_path)

    def run(page: str) -> list[dict[str, object]]:
        names, after = {"sc": sc, "sx": sx}, []
        for block in filter(is_ours, of(page, "python")):
            code = "\n" * block.line + block.code  # so that an error names the line of the page
            exec(compile(code, ROOT / page, "exec"), names)
            plt.close("all")
            after.append(dict(names))
        return after

    yield run
    for name, value in settings.items():
        setattr(sx.settings, name, value)
    sc.settings.verbosity, sc.settings.logfile = verbosity, logfile


@pytest.mark.parametrize("page", [page for page in RUN_HERE if page != "README.md"])
def test_python_runs(page, run):
    assert run(page)


def test_the_examples_of_the_readme(run, tmp_path):
    of_genes, of_proteins, of_zeros, of_datasets = run("README.md")

    adata = of_genes["adata"]
    assert {"X_scvi", "X_umap"} <= set(adata.obsm)
    assert adata.obs["leiden"].nunique() > 2
    (written,) = tmp_path.glob("*.h5ad")
    again = ad.read_h5ad(written)
    sx.tl.get_latent(again, key="scvi", key_added="again")  # labels that came later do not concern it
    np.testing.assert_array_equal(again.obsm["again"], adata.obsm["X_scvi"])
    sx.tl.classify(again, key_added="again")
    assert (again.obs["again_prediction"] == adata.obs["scanvi_prediction"]).all()

    adata = of_proteins["adata"]
    assert {"X_totalvi", "totalvi_protein", "totalvi_protein_foreground"} <= set(adata.obsm)
    on_cells, foreground = adata.obsm["is_foreground"], adata.obsm["totalvi_protein_foreground"]
    assert foreground.to_numpy()[on_cells.to_numpy()].mean() > 0.7
    assert foreground.to_numpy()[~on_cells.to_numpy()].mean() < 0.3

    adata = of_zeros["adata"]
    inflated = adata.varm["dropout"]["batch_0"].to_numpy() > 0
    probability = adata.var["autozi_zero_inflation_probability"].to_numpy()
    assert (probability[inflated][:, None] > probability[~inflated]).mean() > 0.95  # the area under the ROC curve

    rna, imputed = of_datasets["rna"], of_datasets["spatial"].obsm["gimvi_imputed"]
    assert list(imputed) == list(rna.var_names[100:])
    measured = sc.pp.normalize_total(rna, target_sum=1e4, copy=True)[:, 100:].X.toarray()
    assert np.corrcoef(np.log1p(imputed).mean(), np.log1p(measured).mean(0))[0, 1] > 0.9


# ---- commands ----------------------------------------------------------------------------------------------------

TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
PINNED = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
AS_WE_ARE = re.compile(r"(?:\.|scvi[-_]ext|dist/\S+\.whl)(?:\[([\w,-]+)\])?")


def commands(block: Block) -> list[list[str]]:
    """The words of each command, without comments; `a && b` are two commands."""
    lines = block.code.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in re.split(r" && ", line)]
    return [command for command in words if command]


def options_of(script: Path) -> set[str]:
    """What a script and the modules that it takes from its own folder hand to ``add_argument``."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    found = {"-h", "--help"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("-")}
        if isinstance(node, ast.ImportFrom) and (beside := script.with_name(f"{node.module}.py")).is_file():
            found |= options_of(beside)
    return found


def check_make(*words: str) -> None:
    targets = [word for word in words if "=" not in word]
    assert set(targets) <= TARGETS, f"no such target: {set(targets) - TARGETS}"


def check_pip(verb: str, *words: str) -> None:
    assert verb == "install"
    words = iter(words)
    for word in words:
        if word == "-c":
            assert (ROOT / next(words)).is_file()
        elif (ours := AS_WE_ARE.fullmatch(word)) is not None:
            check_extras(ours[1] or "")
        elif not word.startswith("-"):
            name = re.match(r"[\w.-]+", word)[0]
            assert name in PINNED, f"{name} is not among the versions that are tested"


def check_extras(extras: str) -> None:
    unknown = set(filter(None, extras.split(","))) - set(PROJECT["optional-dependencies"])
    assert not unknown, f"no such extra: {unknown}"


def check_python(first: str, *words: str) -> None:
    if first == "-c":
        exec(words[0], {})
    elif first == "-m" and words[0] == "pip":
        check_pip(*words[1:])
    elif first == "-m" and words[0] == "pytest":
        check_pytest(*words[1:])
    elif first == "-m":
        assert words[0] in PINNED | sys.stdlib_module_names | {"build"}, f"where does {words[0]} come from?"
    else:
        script = ROOT / first
        assert script.is_file(), f"no such script: {first}"
        asked = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert asked <= options_of(script), f"{first} has no {asked - options_of(script)}"


def check_pytest(*words: str) -> None:
    paths = [word.partition("::")[0] for word in words if not word.startswith("-") and "/" in word]
    assert all((ROOT / path).exists() for path in paths), f"no such test: {paths}"


def check_nothing(*words: str) -> None:
    """What these do is not of this project."""


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    "pytest": check_pytest,
    "pre-commit": check_nothing,
    "git": check_nothing,
    "cd": check_nothing,
}


@pytest.mark.parametrize("page", [page for page in PAGES if of(page, "bash")])
def test_commands_can_be_given(page):
    for block in of(page, "bash"):
        for program, *words in commands(block):
            name = re.sub(r"3(\.\d+)?$", "", Path(program).name)  # python3.11
            assert name in CHECKS, f"{page}, line {block.line}: how can {name!r} be checked?"
            CHECKS[name](*words)


@pytest.mark.parametrize("page", PAGES)
def test_targets_and_extras_of_the_text_exist(page):
    """Those in a sentence, in a table and in comments of commands."""
    text = read(page)
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= TARGETS
    for ours in AS_WE_ARE.finditer(text):
        check_extras(ours[1] or "")


def test_a_wrong_command_is_noticed():
    for wrong in (
        "make nothing",
        "pip install '.[nothing]'",
        "pip install nothing",
        "python benchmarks/fit.py --nothing",
    ):
        program, *words = shlex.split(wrong)
        with pytest.raises(AssertionError):
            CHECKS[program](*words)
    CHECKS["python"]("benchmarks/quality.py", "a.h5ad:batch", "--model", "scvi", "--cache", "folder")
