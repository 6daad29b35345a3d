"""Real facts, shown a known number of times in known forms, so that recall can be measured form by form."""

from __future__ import annotations

from pkm_lightning.data.facts.datamodule import FactsDataModule
from pkm_lightning.data.facts.invented import InventedChoice
from pkm_lightning.data.facts.selection import Fact

__all__ = ["Fact", "FactsDataModule", "InventedChoice"]
