"""Lightning's strategies for models with sharded tables; each reads the checkpoints of all others.

A strategy's module is imported when its name is first used, so that a run pays only for its own.
"""

from __future__ import annotations

from typing import Any

from pkm_lightning.discovery import find_public, list_public


def __getattr__(name: str) -> Any:
    return find_public(__name__, name)


def __dir__() -> list[str]:
    return list_public(__name__)
