"""Strategies whose ranks are watched: a run that loses one ends on all of them, and says which and how to go on."""

from pkm_lightning.strategies.ddp import DDP
from pkm_lightning.strategies.last_words import LastWords
from pkm_lightning.strategies.launcher import RANK_LOST, Loss, WatchedLauncher, WatchedRanks

__all__ = ["DDP", "WatchedRanks", "WatchedLauncher", "Loss", "LastWords", "RANK_LOST"]
