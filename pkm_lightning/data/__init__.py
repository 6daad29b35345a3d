"""Data: DataModules whose order is a pure function of seed and position, and the tokenizers and caches beneath them.

Names are imported when first used: `data=text` needs none of the packages that real facts come from.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkm_lightning.data.batch import NO_TARGET, Batch
    from pkm_lightning.data.datamodule import LoaderOptions, TokenDataModule
    from pkm_lightning.data.facts import FactsDataModule
    from pkm_lightning.data.jsonl import JsonlDataModule
    from pkm_lightning.data.recall import RecallItem
    from pkm_lightning.data.text import TextDataModule
    from pkm_lightning.data.tokenizer import Tokenizer

_HOMES = {
    "NO_TARGET": "batch",
    "Batch": "batch",
    "FactsDataModule": "facts",
    "JsonlDataModule": "jsonl",
    "LoaderOptions": "datamodule",
    "RecallItem": "recall",
    "TextDataModule": "text",
    "TokenDataModule": "datamodule",
    "Tokenizer": "tokenizer",
}

__all__ = [
    "NO_TARGET",
    "Batch",
    "FactsDataModule",
    "JsonlDataModule",
    "LoaderOptions",
    "RecallItem",
    "TextDataModule",
    "TokenDataModule",
    "Tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
