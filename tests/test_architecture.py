"""The house is as docs/developer/architecture.md says: imports go down the floors, one file writes into an AnnData."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import scvi_ext as sx
from scvi_ext import models

ROOT = Path(sx.__file__).parent
PROJECT = ROOT.parent
FILES = sorted(ROOT.rglob("*.py"))

# ---- the floors ----------------------------------------------------------------------------------------------------

F0 = {"_bar", "_contract", "_keys", "_errors", "_settings", "_torchrun"}
F1 = {"kernels", "functional"}
F6 = {"pp", "tl", "pl", "get", "io", "metrics", "datasets"}
BELOW_F5 = F0 | F1 | {"nn", "models", "data", "engine"}

# Room (a file or folder of the package) -> rooms it may import from, besides itself.
MAY_IMPORT = {
    **{room: set() for room in F0},
    "_bar": {"_torchrun"},
    "kernels": F0,  # speaks of tensors only
    "functional": F0 | {"kernels"},
    "nn": F0 | F1,
    "models": F0 | F1 | {"nn"},
    "data": F0 | {"kernels"},  # minibatches of sparse rows
    "engine": F0 | F1 | {"data"},
    "results": F0,  # writes into an AnnData
    "fitted": BELOW_F5,  # reads a fit out of an AnnData
    "reference": F0 | {"data", "io"},  # a fit, whatever it is handed over as
    "portable": F0 | {"data"},  # a fit in the types that files can hold
    "modalities": F0 | {"data", "results"},  # a MuData as an AnnData, and back
    "files": F0 | {"data", "engine", "results"},  # files as an AnnData, and back
    **{room: BELOW_F5 | {"results", "fitted", "modalities", "files", "portable"} for room in F6 - {"pl"}},
    "pp": BELOW_F5 | {"results", "reference", "modalities", "files"},
    "tl": BELOW_F5 | {"results", "fitted", "reference", "metrics", "modalities", "files", "portable"},
    "pl": F0 | {"get"},
    "__init__": F0 | F6 | {"models"},
}
MUST_NOT_IMPORT = {
    **{room: {"anndata", "pandas", "scanpy"} for room in F1},
    "nn": {"anndata", "scanpy"},
    "models": {"anndata", "scanpy"},
    "data": {"scanpy"},
    "engine": {"anndata", "scanpy"},
    "results": {"torch"},
    "pl": {"torch"},
}


def name_of(file: Path) -> str:
    parts = file.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _type_checking(tree: ast.Module) -> set[ast.AST]:
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {node for block in blocks for statement in block.body for node in ast.walk(statement)}


def imports(module: str, *, types: bool = True) -> list[str]:
    """Full names of what a module imports, also inside functions: modules, or names in the package root."""
    tree = TREES[module]
    skipped = set() if types else _type_checking(tree)
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = MODULES[module].name == "__init__.py"
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append(full if full in MODULES or base == "scvi_ext" else base)
    return found


def ours(names: list[str]) -> list[str]:
    return [name for name in names if name.partition(".")[0] == "scvi_ext"]


def test_every_room_of_the_house_is_on_a_floor():
    assert {room_of(module) for module in MODULES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    room = room_of(module)
    forbidden = {name for name in ours(imports(module)) if room_of(name) not in MAY_IMPORT[room] | {room}}
    assert not forbidden, f"{module} must not import {sorted(forbidden)}"


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_stay_on_their_floors(module):
    found = {name.partition(".")[0] for name in imports(module)}
    forbidden = found & MUST_NOT_IMPORT.get(room_of(module), set())
    assert not forbidden, f"{module} must not import {sorted(forbidden)}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_from_the_package_root_but_its_rooms(module):
    """A constant is imported from where it is defined, or else the root would have to be complete before its parts."""
    assert [name for name in ours(imports(module)) if name not in MODULES] == []
    assert "scvi_ext" not in imports(module)


def test_imports_have_no_cycles():
    graph = {module: set(ours(imports(module, types=False))) - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()


def test_models_do_not_know_each_other():
    files = {f"scvi_ext.models.{name}" for name in models.names()}
    for module in files:
        siblings = {name for name in ours(imports(module)) if room_of(name) == "models"}
        assert siblings <= {"scvi_ext.models.base"}, module


def public_files(namespace: str) -> set[str]:
    package = getattr(sx, namespace)
    return {inspect.unwrap(getattr(package, name)).__module__ for name in package.__all__}


@pytest.mark.parametrize("namespace", sorted(F6 & set(sx.__all__)))
def test_a_public_function_is_never_imported_from_its_private_file(namespace):
    """Inside a namespace, files without a public function (tl/_per_cell.py, pl/_finish.py, ...) may be shared."""
    package = f"scvi_ext.{namespace}"
    for module in MODULES:
        private = {name for name in ours(imports(module)) if name.startswith(f"{package}._")}
        if module == package or not private:
            continue
        assert module.startswith(f"{package}."), f"{module} imports {sorted(private)}"
        assert not private & public_files(namespace), f"{module} imports {sorted(private)}"


# ---- models are read from their folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_nobody_asks_for_the_name_of_a_model(module):
    """What a model can do, it declares: code that compares names would have to be changed for the next one."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Compare):
            constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not constants & set(models.names()), f"{module}:{node.lineno} {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", f"{module}:{node.lineno} {ast.unparse(node)}"


def test_classes_are_abstract_or_final():
    finals = [models.get(name).module for name in models.names()]
    for final in finals:
        assert len(final.__bases__) == 1, f"{final.__name__} has more than one base class"
        assert not getattr(final, "__abstractmethods__", None)
        assert not final.__subclasses__()


# ---- one file writes into an AnnData -------------------------------------------------------------------------------

SLOTS = {"X", "obs", "var", "uns", "obsm", "varm", "layers", "obsp", "varp", "raw", "obs_names", "var_names"}
WRITING = {"setdefault", "update", "pop", "popitem", "clear", "insert", "drop", "_init_as_actual"}


def _slot(node: ast.expr) -> bool:
    """Whether an expression is a slot of something, or in one: ``x.uns``, ``x.obs["a"]``, ``x.uns["a"]["b"]``."""
    while isinstance(node, ast.Subscript):
        node = node.value
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return isinstance(node, ast.Attribute) and node.attr in SLOTS and not own


def assignments(tree: ast.Module) -> list[ast.AST]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITING:
            targets = [node.func.value] if node.func.attr != "_init_as_actual" else [ast.parse("x.X").body[0].value]
        else:
            continue
        flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
        if any(_slot(target) for target in flat):
            found.append(node)
    return found


def test_the_search_for_assignments_finds_them():
    wrong = """
adata.obs["a"] = 1
adata.uns["a"]["b"] = 1
adata.X = x
adata.layers["a"][rows] += 1
del adata.obsm["a"]
adata.uns.setdefault("a", {})
first, adata.varm["a"] = 1, 2
self.adata.var_names = names
adata._init_as_actual(adata.copy())
"""
    assert len(assignments(ast.parse(wrong))) == 9
    right = "obs = adata.obs\nx = adata.X[rows]\nadata.obs['a'].to_numpy()\nself.layers = layers\ncounts.data[0] = 1\n"
    assert assignments(ast.parse(right)) == []


@pytest.mark.parametrize("module", MODULES)
def test_only_results_assigns_into_an_anndata(module):
    found = [f"{MODULES[module].name}:{node.lineno} {ast.unparse(node)}" for node in assignments(TREES[module])]
    if module == "scvi_ext.results":
        assert found
    elif room_of(module) != "datasets":  # which make an AnnData of their own
        assert found == []


# ---- importing costs next to nothing -------------------------------------------------------------------------------


def test_importing_the_package_imports_no_heavy_library():
    command = [sys.executable, "-X", "importtime", "-c", "import scvi_ext"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "scvi_ext" in imported
    assert not imported & {"torch", "scanpy", "numba", "anndata", "matplotlib", "sklearn", "pandas", "scipy", "h5py"}


@pytest.mark.parametrize("module", MODULES)
def test_mudata_is_needed_for_types_only(module):
    """Who has a MuData has the library; nobody else needs it."""
    assert "mudata" not in {name.partition(".")[0] for name in imports(module, types=False)}


def test_names_of_the_root_are_found_when_asked_for():
    assert set(sx.__all__) <= set(dir(sx))
    for name in sx.__all__:
        assert getattr(sx, name) is not None
    with pytest.raises(AttributeError, match="module 'scvi_ext' has no attribute 'tools'"):
        sx.tools  # noqa: B018


# ---- nothing is left lying about -----------------------------------------------------------------------------------


def test_no_marks_of_unfinished_work():
    folders = [ROOT, PROJECT / "tests", PROJECT / "docs", PROJECT / "benchmarks"]
    files = [file for folder in folders for suffix in ("py", "md") for file in folder.rglob(f"*.{suffix}")]
    files += list(PROJECT.glob("*.md"))
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    built = {"_build", "jupyter_execute", "generated"}
    marked = [str(file) for file in files if not built & set(file.parts) and mark.search(file.read_text())]
    assert marked == []


def test_types_are_shipped():
    assert (ROOT / "py.typed").is_file()
