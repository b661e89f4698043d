"""Deep generative models of single-cell data as scanpy functions: the fitted model comes back in the AnnData."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from scvi_ext._errors import ScviExtWarning
from scvi_ext._settings import set_verbosity, settings

if TYPE_CHECKING:
    from scvi_ext import datasets, get, io, metrics, models, pl, pp, tl
    from scvi_ext.pp import setup_anndata
    from scvi_ext.tl import fit, get_latent

__version__ = version("scvi-ext")

_NAMESPACES = ("datasets", "get", "io", "metrics", "models", "pl", "pp", "tl")
_VERBS = {"setup_anndata": "pp", "fit": "tl", "get_latent": "tl"}

__all__ = [
    "ScviExtWarning",
    "datasets",
    "fit",
    "get",
    "get_latent",
    "io",
    "metrics",
    "models",
    "pl",
    "pp",
    "set_verbosity",
    "settings",
    "setup_anndata",
    "tl",
]


def __getattr__(name: str) -> object:
    # Namespaces are imported when first used, so that importing the package costs next to nothing.
    if name in _NAMESPACES:
        return import_module(f"{__name__}.{name}")
    if name in _VERBS:
        return getattr(import_module(f"{__name__}.{_VERBS[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
