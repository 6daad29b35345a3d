"""FFN plugins, one paper per file. A new plugin is one Python file here, one YAML and one test; nothing else is edited.

A module is imported when one of its names is first used: `from pkm_lightning.ffn import MemoryPlus` reads
`memory_plus.py`.
"""

from __future__ import annotations

from typing import Any

from pkm_lightning.discovery import find_public
from pkm_lightning.ffn.base import (
    NO_CONTEXT,
    FFNContext,
    FFNCost,
    FFNOutput,
    HasAfterStep,
    HasCost,
    HasPretrained,
    HasReads,
    HasRowIds,
    HasSlots,
    HasStreamScale,
    HasZeroOutput,
    Past,
    Slots,
    TableRead,
    TableSpec,
    UsesTokenizer,
    replaced,
)

__all__ = [
    "NO_CONTEXT",
    "FFNContext",
    "FFNCost",
    "FFNOutput",
    "HasAfterStep",
    "HasCost",
    "HasPretrained",
    "HasReads",
    "HasRowIds",
    "HasSlots",
    "HasStreamScale",
    "HasZeroOutput",
    "Past",
    "Slots",
    "TableRead",
    "TableSpec",
    "UsesTokenizer",
    "replaced",
]


def __getattr__(name: str) -> Any:
    return find_public(__name__, name)
