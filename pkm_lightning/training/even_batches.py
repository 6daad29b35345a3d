"""All ranks must make the same number of batches: a rank whose peer has ended would wait for it for ever.

The package's own data modules guarantee it. For others, lengths are compared before a loop starts; where a loader has
no length, the ranks exchange with every batch whether it is their last, which makes the host wait for the device.
"""

from __future__ import annotations

import math

import lightning as L
import torch

from pkm_lightning.data.base import is_endless
from pkm_lightning.errors import DataError
from pkm_lightning.ops.ranks import gather_into


def check_lengths(trainer: L.Trainer, loader: str, lengths: float | list[float], needed: float = math.inf) -> None:
    """Compares the lengths of a loader over ranks. Collective: call on all ranks.

    Args:
        trainer: within a run.
        loader: its name, for the message.
        lengths: number of batches on this rank, infinite where unknown; a list for several loaders.
        needed: batches after which the run ends anyway.

    Raises:
        DataError: they differ, and some rank has fewer than are needed.
    """
    if trainer.world_size == 1:
        return
    length = sum(lengths) if isinstance(lengths, list) else lengths
    lengths_of_ranks = _gather(trainer, length)
    if len(set(lengths_of_ranks)) > 1 and min(lengths_of_ranks) < needed:
        shown = ", ".join(f"{n:g}" for n in lengths_of_ranks)
        raise DataError(
            f"{_name(trainer)}.{loader} gives the ranks {shown} batches; each must make "
            "the same number: drop the last ones, or fill up with batches whose labels are all -100."
        )


def check_last(trainer: L.Trainer, ended: bool = False) -> None:
    """Compares whether this is the last batch, where the loader has no length. Collective: call on all ranks.

    Args:
        trainer: within a training batch, or at the end of an epoch.
        ended: this rank has received no batch at all.

    Raises:
        DataError: some ranks have their last batch here, or none, and others have more.
    """
    endless = is_endless(trainer.datamodule)  # type: ignore[attr-defined]
    if trainer.world_size == 1 or endless or not math.isinf(trainer.num_training_batches):
        return
    # 0: more batches follow; 1: this is the last; 2: there was none.
    states = _gather(trainer, 2.0 if ended else float(trainer.is_last_batch))
    if len(set(states)) > 1:
        ending = ", ".join(str(rank) for rank, state in enumerate(states) if state)
        raise DataError(
            f"{_name(trainer)}.train_dataloader has ended on rank {ending} at step {trainer.global_step}, while other "
            "ranks have more; each must make the same number of batches: repeat the data, or set trainer.max_steps "
            "below that."
        )


def _gather(trainer: L.Trainer, value: float) -> list[float]:
    device = trainer.strategy.root_device
    # float32 is exact only up to 2**24 batches; MPS has no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    local = torch.tensor([value], dtype=dtype, device=device)
    gathered = local.new_empty(trainer.world_size)
    gather_into(gathered, local)
    return gathered.tolist()


def _name(trainer: L.Trainer) -> str:
    data = trainer.datamodule  # type: ignore[attr-defined]
    return "the data" if data is None else type(data).__name__
