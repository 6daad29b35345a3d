"""Transformers whose feed-forward networks are interchangeable plugins, sparse memory among them.

A tensor carries its shape in its name: `q_BTHK`, `ids_TK`. One letter has one meaning in the whole package; other
letters are local, and the head of their file explains them.

| letter | number of |
|---|---|
| B | sequences in a batch |
| T | tokens of a sequence, or of a batch whose sequences are laid end to end |
| D | values of the model dimension |
| H | heads |
| K | reads per token (of one head where there are several) |
| N | rows of a value table |
| S | sub-keys per half |
| E | experts |
| V | values per row of a value table |
"""

import importlib
from typing import Any

__version__ = "0.1.0"
#: Names offered here, and the modules that define them.
_OFFERED = {"load": "build.loading", "save": "build.saving"}


def __getattr__(name: str) -> Any:
    # Imported at first use: they need torch, and a bare `import pkm_lightning` takes a hundredth of a second.
    if name in _OFFERED:
        return getattr(importlib.import_module(f"{__name__}.{_OFFERED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
