"""Data sources. A new one is one Python file here, one YAML and one test; nothing else is edited.

`base.py` is their contract. Names are imported when they are first used: `from pkm_lightning.data import
TextDataModule` imports `text.py`, whose `__all__` lists it, and needs no package that another source is made from.
This file imports nothing heavy, since every import of a module in this folder runs it.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
from importlib.abc import InspectLoader
from typing import Any


def __getattr__(name: str) -> Any:
    """Returns the public object `name` of the module whose `__all__` lists it; no other module is imported."""
    if not name.startswith("_"):
        for module_info in pkgutil.iter_modules(__path__, f"{__name__}."):
            if name in _public_names(module_info.name, mentioning=name):
                return getattr(importlib.import_module(module_info.name), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _public_names(module: str, mentioning: str) -> list[str]:
    """Returns the literal `__all__` of a module's source, read without importing it."""
    spec = importlib.util.find_spec(module)
    loader = None if spec is None else spec.loader
    source = loader.get_source(module) if isinstance(loader, InspectLoader) else None
    # Parsing is the slow part, and few files contain the name.
    if source is None or mentioning not in source:
        return []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(statement.value)
            return names
    return []
