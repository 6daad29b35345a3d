"""Ranks must make the same number of batches: one that waits for another that has ended would wait for ever.

The package's own data modules see to it. Of others, lengths are compared before a loop starts; where a loader has no
length, the ranks tell each other with every batch whether it is their last, for which the host waits.
"""

from __future__ import annotations

import math

import lightning as L
import torch

from pkm_lightning.data.base import is_endless
from pkm_lightning.errors import DataError
from pkm_lightning.ops.ranks import gather_into


def check_lengths(trainer: L.Trainer, loader: str, lengths: float | list[float], needed: float = math.inf) -> None:
    """Compare the lengths of a loader over ranks; every rank must call it.

    Args:
        trainer: within a run.
        loader: its name, for the message.
        lengths: batches of this rank, infinite where unknown; of several loaders a list.
        needed: batches after which the run ends anyway.

    Raises:
        DataError: they differ, and some rank has fewer than are needed.
    """
    if trainer.world_size == 1:
        return
    own = sum(lengths) if isinstance(lengths, list) else lengths
    every = _gather(trainer, own)
    if len(set(every)) > 1 and min(every) < needed:
        raise DataError(
            f"{_name(trainer)}.{loader} gives the ranks {', '.join(f'{n:g}' for n in every)} batches; each must make "
            "the same number: drop the last ones, or fill up with batches whose labels are all -100."
        )


def check_last(trainer: L.Trainer, ended: bool = False) -> None:
    """Compare whether this is the last batch, where the loader's length is unknown; every rank must call it.

    Args:
        trainer: within a training batch, or at the end of an epoch.
        ended: this rank has had no batch at all.

    Raises:
        DataError: some ranks have their last batch here, or none, and others have more.
    """
    endless = is_endless(trainer.datamodule)  # type: ignore[attr-defined]
    if trainer.world_size == 1 or endless or not math.isinf(trainer.num_training_batches):
        return
    every = _gather(trainer, 2.0 if ended else float(trainer.is_last_batch))
    if len(set(every)) > 1:
        ending = ", ".join(str(rank) for rank, state in enumerate(every) if state)
        raise DataError(
            f"{_name(trainer)}.train_dataloader has ended on rank {ending} at step {trainer.global_step}, while other "
            "ranks have more; each must make the same number of batches: repeat the data, or set trainer.max_steps "
            "below that."
        )


def _gather(trainer: L.Trainer, own: float) -> list[float]:
    here = torch.tensor([own], dtype=torch.float32, device=trainer.strategy.root_device)
    gathered = here.new_empty(trainer.world_size)
    gather_into(gathered, here)
    return gathered.tolist()


def _name(trainer: L.Trainer) -> str:
    data = trainer.datamodule  # type: ignore[attr-defined]
    return "the data" if data is None else type(data).__name__
