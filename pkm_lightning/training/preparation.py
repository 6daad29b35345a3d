"""What a Trainer and the process around it need before a model is built."""

from __future__ import annotations

import lightning as L

from pkm_lightning.allocator import keep_freed_memory
from pkm_lightning.training.logged_step import follow_steps
from pkm_lightning.training.lookahead import wrap_loaders


def prepare(trainer: L.Trainer | None) -> None:
    """Makes loaders prefetch rows, loggers follow the steps, and a Trainer on CPUs keep its memory from step to step.

    Repeated calls have no effect.
    """
    wrap_loaders(trainer)
    follow_steps(trainer)
    # Of the whole process, so only where a Trainer has it: not for loops of users, and not on import.
    if trainer is not None and trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
