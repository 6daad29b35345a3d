"""Starting, watching and ending the processes of a run; nothing here depends on the model."""

from pkm_lightning.supervision.error_folder import ErrorFolder
from pkm_lightning.supervision.launcher import RANK_LOST, RankFailure, WatchedLauncher, WatchedRanks

__all__ = ["RANK_LOST", "ErrorFolder", "RankFailure", "WatchedLauncher", "WatchedRanks"]
