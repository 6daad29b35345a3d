"""Data sources. A new one is one Python file here, one YAML and one test; nothing else is edited.

`base.py` is their contract. Names are imported when they are first used: `from pkm_lightning.data import
TextDataModule` imports `text.py`, whose `__all__` lists it, and needs no package that another source is made from.
This file imports nothing heavy, since every import of a module in this folder runs it.
"""

from __future__ import annotations

from typing import Any

from pkm_lightning.discovery import find_public, list_public


def __getattr__(name: str) -> Any:
    return find_public(__name__, name)


def __dir__() -> list[str]:
    return list_public(__name__)
