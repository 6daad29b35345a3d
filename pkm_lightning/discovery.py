"""Finds the public classes of a package's modules without importing modules that do not define them.

A package whose modules are plugins defines `__getattr__` by `find_public`: a new plugin is then one new file, and a
plugin that lacks a package which it needs fails only when it is used.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import sys
from importlib.abc import InspectLoader
from typing import Any


def find_public(package: str, name: str) -> Any:
    """Returns the object `name` of the module in `package` whose `__all__` lists it; imports that module only.

    Raises:
        AttributeError: no module of the package lists the name.
    """
    if not name.startswith("_"):
        for module in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}."):
            if name in _public_names(module.name, mentioning=name):
                return getattr(importlib.import_module(module.name), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def _public_names(module: str, mentioning: str) -> list[str]:
    """Returns the literal `__all__` of a module, read from its source without importing it."""
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
