"""Changing what a trained model knows: sparse finetuning, its baselines, and facts that are written and removed.

Public names are those in the `__all__` of the files, which are imported when a name is first used.
"""

from __future__ import annotations

from typing import Any

from pkm_lightning.discovery import find_public, list_public


def __getattr__(name: str) -> Any:
    return find_public(__name__, name)


def __dir__() -> list[str]:
    return list_public(__name__)
