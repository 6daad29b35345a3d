"""Starting, watching and ending the processes of a run; this room knows no model."""

from pkm_lightning.supervision.last_words import LastWords
from pkm_lightning.supervision.launcher import RANK_LOST, RankFailure, WatchedLauncher, WatchedRanks

__all__ = ["RANK_LOST", "LastWords", "RankFailure", "WatchedLauncher", "WatchedRanks"]
