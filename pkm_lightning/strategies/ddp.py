"""One copy of the dense model a process, gradients averaged."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from pkm_lightning.strategies.portable import PortableCheckpoints
from pkm_lightning.supervision.launcher import WatchedRanks


class DDP(PortableCheckpoints, WatchedRanks, DDPStrategy):
    """Lightning's `DDPStrategy`, whose arguments it takes, beside tables that are split or copied over the ranks."""
