"""Biographies of invented people, whose names and values have known entropy: how many bits a model stores."""

from __future__ import annotations

from pkm_lightning.data.biographies.datamodule import BiographiesDataModule

__all__ = ["BiographiesDataModule"]
