"""Code in the pages: what the build does not execute is run here, or checked as far as it goes without doing it."""

from __future__ import annotations

import ast
import codeop
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


def python_of(page: str) -> list[Block]:
    """All Python of ours on a page, cells of the build included, without what these say of themselves."""
    cells = [block for block in blocks(read(page)) if block.language.startswith("{code-cell}")]
    bare = [Block("python", block.line, re.sub(r"\A(:.*\n)+", "", block.code)) for block in cells]
    return bare + list(filter(is_ours, of(page, "python")))


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

FILES = {"docs/developer/adding_a_model.md"}  # what is saved rather than pasted
PASTED = [page for page in PAGES if page not in FILES and python_of(page)]


def refused_by_the_console(code: str) -> str | None:
    """The line at which the interactive interpreter gives up, as it does where no blank line ends an indented body."""
    complete, pasted = codeop.CommandCompiler(), []
    for line in [*code.splitlines(), ""]:
        pasted.append(line)
        try:
            if complete("\n".join(pasted)) is not None:
                pasted = []
        except SyntaxError:
            return line
    return "the end" if any(pasted) else None


@pytest.mark.parametrize("page", PASTED)
def test_blocks_can_be_pasted(page):
    for block in python_of(page):
        line = refused_by_the_console(block.code)
        assert line is None, f"{page}, block in line {block.line}: a blank line is missing before {line!r}"


def test_what_cannot_be_pasted_is_noticed():
    assert refused_by_the_console("for i in 'ab':\n    i\nsum([])\n") == "sum([])"
    assert refused_by_the_console("def f():\n    a = 1\n\n    return a\n") == "    return a"
    assert refused_by_the_console("for i in 'ab':\n    i\n\nsum([\n    1,\n])\n") is None
    assert refused_by_the_console("sum([") == "the end"


@pytest.mark.parametrize("page", PASTED)
def test_what_should_be_refused_is(page):
    """A block that shows how a call is refused fails if it is not."""
    for block in python_of(page):
        for node in ast.walk(ast.parse(block.code)):
            shows = isinstance(node, ast.Try) and len(node.body) == 1
            if shows and all(is_print(line) for way in node.handlers for line in way.body):
                assert node.orelse, f"{page}, block in line {block.line}: and if it is not refused?"
                assert isinstance(node.orelse[-1], ast.Raise)


def is_print(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and ast.unparse(line).startswith("print(")


@pytest.mark.parametrize("page", RUN_HERE)
def test_no_comment_gives_a_value(page):
    """Nobody would look whether it still is the value; cells of the build show theirs."""
    for block in filter(is_ours, of(page, "python")):
        assert not re.findall(r"\S  # [\d(\[-].*", block.code), f"{page}, block in line {block.line}"


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


LOOKED_AT = ["README.md", "docs/user_guide/faq.md"]  # what they say is asserted too


@pytest.mark.parametrize("page", [page for page in RUN_HERE if page not in LOOKED_AT])
def test_python_runs(page, run):
    assert run(page)


def test_the_answers_of_the_faq(run):
    names = run("docs/user_guide/faq.md")[-1]
    # Channels of one instrument: hardly a difference, and about as mixed as can be.
    np.testing.assert_allclose([names["before"], names["after"]], np.log(8), rtol=0.1)


def test_the_examples_of_the_readme(run, tmp_path):
    of_genes, of_proteins, of_zeros, of_datasets, of_files = run("README.md")

    adata = of_genes["adata"]
    assert {"X_scvi", "X_umap"} <= set(adata.obsm)
    assert adata.obs["leiden"].nunique() > 2
    (written,) = set(tmp_path.glob("*.h5ad")) - {tmp_path / "cells.h5ad"}
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

    cells, inside = of_files["cells"], ad.read_h5ad(tmp_path / "cells.h5ad")
    assert "X_scvi" not in cells.obsm
    assert inside.obsm["X_scvi"].shape == (cells.n_obs, 10)


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


def check_python(first: str = "", *words: str) -> None:
    if not first:
        return  # a session
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


def check_pre_commit(verb: str) -> None:
    assert verb == "install"
    assert (ROOT / ".pre-commit-config.yaml").is_file()


def check_git(verb: str, *words: str) -> None:
    """Tags are named after the version."""
    assert verb in {"push", "tag"}
    tags = [word for word in words if re.fullmatch(r"v[\d.]+", word)]
    assert tags == [f"v{PROJECT['version']}"], f"a tag other than that of the version: {tags}"


def check_cd(folder: str) -> None:
    assert folder.startswith("path/to/") or (ROOT / folder).is_dir(), f"no such folder: {folder}"


def check_torchrun(option: str, n: str, script: str) -> None:
    assert option == "--nproc-per-node"
    assert int(n) > 1
    assert script == "train.py"  # of the user


CHECKS = {
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    "pytest": check_pytest,
    "pre-commit": check_pre_commit,
    "git": check_git,
    "cd": check_cd,
}


@pytest.mark.parametrize("page", [page for page in PAGES if of(page, "bash")])
def test_commands_can_be_given(page):
    check_commands(of(page, "bash"), page)


def check_commands(of_a_page: list[Block], page: str) -> None:
    """Commands of one page; where they make an environment, what follows has to be that environment's."""
    environment = None
    for block in of_a_page:
        for program, *words in commands(block):
            where, name = f"{page}, line {block.line}", re.sub(r"3(\.\d+)?$", "", Path(program).name)  # python3.11
            assert name in CHECKS, f"{where}: how can {name!r} be checked?"
            CHECKS[name](*words)
            if words[:2] == ["-m", "venv"]:
                environment = words[2]
            elif environment is not None and name in {"pip", "pytest", "python"}:
                assert program.startswith(f"{environment}/bin/"), f"{where}: not the {name} of {environment}"


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
        "cd nothing",
        "git tag v99.0",
        "pip install '.[nothing]'",
        "pip install nothing",
        "python benchmarks/fit.py --nothing",
        "python3 -m venv ~/scvi && ~/scvi/bin/pip install . && python -c 'import scvi_ext'",
    ):
        with pytest.raises(AssertionError):
            check_commands([Block("bash", 1, wrong)], "a page")
    CHECKS["python"]("benchmarks/quality.py", "a.h5ad:batch", "--model", "scvi", "--cache", "folder")
