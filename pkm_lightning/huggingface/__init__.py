"""Exchange with Hugging Face transformers (extra `hf`): export, pretrained trunks, registered classes.

Where transformers is installed, importing this package registers the classes that its Auto classes then load. A module
is imported when one of its names is first used.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from pkm_lightning.discovery import find_public

if find_spec("transformers") is not None:
    from pkm_lightning.huggingface import registration as registration


def __getattr__(name: str) -> Any:
    return find_public(__name__, name)
