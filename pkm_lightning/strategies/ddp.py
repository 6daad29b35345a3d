"""Lightning's DDP with watched ranks."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from pkm_lightning.strategies.launcher import WatchedRanks


class DDP(WatchedRanks, DDPStrategy):
    """One copy of the model a process, gradients averaged; the arguments are those of Lightning's `DDPStrategy`."""
