"""Exchange with Hugging Face transformers (extra `hf`): export, pretrained trunks, registered classes.

A module is imported when one of its names is first used, so that a missing transformers is explained and not met here.
"""

from __future__ import annotations

from typing import Any

from pkm_lightning.discovery import find_public


def __getattr__(name: str) -> Any:
    return find_public(__name__, name)
