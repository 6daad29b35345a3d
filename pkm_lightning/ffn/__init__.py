"""FFN plugins, one paper per file. A new plugin is one Python file here, one YAML and one test; nothing else is edited.

A module is imported when one of its names is first used: `from pkm_lightning.ffn import MemoryPlus` reads
`memory_plus.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from pkm_lightning.ffn.base import (
    FFNContext,
    FFNCost,
    FFNOutput,
    HasAfterStep,
    HasCost,
    HasReads,
    HasSlots,
    Slots,
    TableRead,
    TableSpec,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "FFNContext",
    "FFNCost",
    "FFNOutput",
    "HasAfterStep",
    "HasCost",
    "HasReads",
    "HasSlots",
    "Slots",
    "TableRead",
    "TableSpec",
]


def __getattr__(name: str) -> type[nn.Module]:
    """Returns the public class `name` of the plugin module whose `__all__` lists it."""
    for module_info in pkgutil.iter_modules(__path__):
        # Introspection asks for dunder names and the import system for submodules; neither may import all plugins.
        if name.startswith("_") or name == module_info.name:
            break
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        # `__all__` decides, so that a class which a module merely imports is not attributed to it.
        if name in getattr(module, "__all__", ()):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
