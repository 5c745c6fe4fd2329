"""Menus: folders in which each file is one dish and the file's name is the dish's name."""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from moeplan.errors import CatalogueError, unknown_name

_HERE = Path(__file__).parent


def names(folder: str) -> list[str]:
    """The dishes of a menu, sorted: the files of `moeplan/<folder>` that do not start with an underscore."""
    return sorted(path.stem for path in (_HERE / folder).glob("*.py") if not path.stem.startswith("_"))


@lru_cache
def module(folder: str, name: str) -> ModuleType:
    """The file of one dish, imported. Raises CatalogueError for a name that is not on the menu."""
    if name not in names(folder):
        kind = folder.removesuffix("s").replace("_", " ")
        raise CatalogueError(unknown_name(kind, name, names(folder)))
    return import_module(f"moeplan.{folder}.{name}")


def load(folder: str, name: str, function: str) -> Any:
    """The function that a menu's manual names, from the file of one dish."""
    return getattr(module(folder, name), function)


def about(folder: str, name: str) -> str:
    """The first line of a dish's docstring, read without importing it (a dish may need a heavy package)."""
    text = ast.get_docstring(ast.parse((_HERE / folder / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0]
