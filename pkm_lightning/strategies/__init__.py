"""Lightning's strategies beside sharded tables, with checkpoints that every one of them can read."""

from pkm_lightning.strategies.ddp import DDP
from pkm_lightning.strategies.deepspeed import DeepSpeed
from pkm_lightning.strategies.fsdp import FSDP2
from pkm_lightning.strategies.portable import PortableCheckpoints

__all__ = ["DDP", "FSDP2", "DeepSpeed", "PortableCheckpoints"]
