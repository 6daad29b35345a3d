"""Finds the public objects of a package's modules without importing modules that do not define them.

A package whose modules are plugins defines `__getattr__` by `find_public` and `__dir__` by `list_public`: a new plugin
is then one new file, and a plugin that lacks a package which it needs fails only when it is used.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from importlib.abc import InspectLoader
from typing import Any


def find_public(package: str, name: str) -> Any:
    """Returns the object `name` of the module in `package` whose `__all__` lists it; imports that module only.

    Asked for `__all__`, as `from package import *` does, it returns the names of all modules.

    Raises:
        AttributeError: no module of the package lists the name.
    """
    if name == "__all__":
        return list_public(package)
    if not name.startswith("_"):
        for module in _modules(package):
            if name in public_names(module, mentioning=name):
                found = getattr(importlib.import_module(module), name)
                # A module's `__getattr__` is asked for what it lacks: the next use needs no search.
                setattr(sys.modules[package], name, found)
                return found
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def list_public(package: str) -> list[str]:
    """Returns the names that the modules of `package` list in their `__all__`, sorted; imports none of them."""
    return sorted({name for module in _modules(package) for name in public_names(module)})


def public_names(module: str, mentioning: str = "__all__") -> list[str]:
    """Returns the literal `__all__` of a module, read from its source without importing it.

    Args:
        module: its dotted name.
        mentioning: a text without which the source is not parsed, which is the slow part.

    Raises:
        ImportError: its `__all__` is no literal.
    """
    spec = importlib.util.find_spec(module)
    loader = None if spec is None else spec.loader
    source = loader.get_source(module) if isinstance(loader, InspectLoader) else None
    return [] if source is None or mentioning not in source else list(_names_in(source, module))


@functools.lru_cache(maxsize=1024)  # of sources, so that a file that changes is read anew
def _names_in(source: str, module: str) -> tuple[str, ...]:
    for statement in ast.parse(source, filename=module).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            try:
                return tuple(map(str, ast.literal_eval(statement.value)))  # type: ignore[attr-defined]
            except ValueError:
                raise ImportError(
                    f"__all__ of {module} is no literal list of names, which is read unimported"
                ) from None
    return ()


def _modules(package: str) -> Iterator[str]:
    return (module.name for module in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}."))
