"""Training: the LightningModule, the optimizer step, its loss normalisation, clipping, and the record of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkm_lightning.training.module import LanguageModule

__all__ = ["LanguageModule"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the record of a run and its figures need no Lightning.
    if name != "LanguageModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pkm_lightning.training.module import LanguageModule

    return LanguageModule
