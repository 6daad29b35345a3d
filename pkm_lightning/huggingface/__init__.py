"""Exchange with Hugging Face transformers (extra `hf`): export, pretrained trunks, registered classes.

Where transformers is installed, importing this package registers the classes that its Auto classes then load. A module
is imported when one of its names is first used.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from pkm_lightning.discovery import find_public
from pkm_lightning.errors import ConfigError

if find_spec("transformers") is not None:
    try:
        from pkm_lightning.huggingface import registration as registration
    except ImportError as error:  # a release with other names, or one that lacks a package itself
        raise ConfigError(
            f"pkm_lightning.huggingface cannot use the transformers that are installed ({error}); run: pip install "
            "'pkm_lightning[hf]'."
        ) from error


def __getattr__(name: str) -> Any:
    return find_public(__name__, name)
