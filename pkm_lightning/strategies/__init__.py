"""Lightning's strategies for models with sharded tables; each reads the checkpoints of all others.

A strategy's module is imported when its name is first asked for, so that a run pays only for its own.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Public names and their modules.
_MODULES = {"DDP": "ddp", "FSDP2": "fsdp", "DeepSpeed": "deepspeed", "PortableCheckpoints": "portable"}

__all__ = ["DDP", "FSDP2", "DeepSpeed", "PortableCheckpoints"]


def __getattr__(name: str) -> Any:
    """Imports the class `name`."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
