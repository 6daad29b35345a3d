"""DDP: one copy of the dense model per rank, gradients averaged over the ranks."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from pkm_lightning.strategies.portable import PortableCheckpoints
from pkm_lightning.supervision.launcher import WatchedRanks

__all__ = ["DDP"]


class DDP(PortableCheckpoints, WatchedRanks, DDPStrategy):
    """Lightning's `DDPStrategy` with its arguments, for models whose tables are split or copied over the ranks."""
