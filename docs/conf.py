"""Sphinx configuration. The build needs no network: nothing is looked up, and the executed pages use bundled data."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING

from numpydoc.docscrape_sphinx import SphinxDocString

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "scvi_ext"
author = "scvi_ext developers"
copyright = f"2026, {author}"
release = version = installed_version("scvi-ext")

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinxcontrib.katex",
]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "furo"
html_title = f"scvi_ext {release}"
html_static_path = ["_static"]
html_css_files = ["scvi_ext.css"]
html_show_sphinx = False

# Equations need no network either: KaTeX comes with its extension, and MathML needs no style or font from elsewhere.
katex_options = '{output: "mathml"}'
katex_css_path = "katex-math.css"

# Pages that declare a kernel are executed at every build: what they print is what the package does today.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_output_stderr = "warn"  # and with -W the build fails; a cell that may warn has the tag remove-stderr
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
numpydoc_show_class_members = False
numpydoc_xref_param_type = False


def _free_text(docstring: SphinxDocString, name: str = "Returns") -> list[str]:
    """Returns as scanpy writes them: sentences, and below them the slots that are written, each with an indented text.

    numpydoc takes every line for the name or type of a returned value, and would give each one a paragraph of its own.
    """
    if not docstring[name]:
        return []
    lines: list[str] = []
    for entry in docstring[name]:
        header = f"{entry.name} : {entry.type}" if entry.name else entry.type
        if entry.desc and lines and lines[-1] and not lines[-1].startswith(" "):
            lines.append("")  # a definition does not belong to the sentence before it
        if not entry.desc and lines and lines[-1].startswith(" "):
            lines.append("")
        lines += [header, *(f"    {line}" if line else "" for line in entry.desc)]
    return [f":{name}:", *(f"    {line}" if line else "" for line in lines), ""]


def setup(app: Sphinx) -> None:
    SphinxDocString._str_returns = _free_text
