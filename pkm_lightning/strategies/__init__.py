"""Lightning's strategies beside sharded tables: watched ranks, and checkpoints that every one of them can read."""

from pkm_lightning.strategies.ddp import DDP
from pkm_lightning.strategies.deepspeed import DeepSpeed
from pkm_lightning.strategies.fsdp import FSDP2
from pkm_lightning.strategies.last_words import LastWords
from pkm_lightning.strategies.launcher import RANK_LOST, Loss, WatchedLauncher, WatchedRanks
from pkm_lightning.strategies.portable import PortableCheckpoints

__all__ = [
    "DDP",
    "FSDP2",
    "RANK_LOST",
    "DeepSpeed",
    "LastWords",
    "Loss",
    "PortableCheckpoints",
    "WatchedLauncher",
    "WatchedRanks",
]
