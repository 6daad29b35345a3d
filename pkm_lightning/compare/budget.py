"""How many optimizer steps a budget of tokens is."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning as L
from torch import Tensor

from pkm_lightning.errors import ConfigError

#: Optimizer steps whose real tokens are counted; packed rows differ little from step to step.
SAMPLE = 50


def steps_of_tokens(budget: float, data: L.LightningDataModule, config: dict[str, Any]) -> int:
    """The steps that come nearest to `budget` real input tokens, from the first `SAMPLE` steps of prepared data.

    Raises:
        ConfigError: the budget is less than half a step.
    """
    data.setup("fit")
    # Without a Trainer this package's data modules make batches of a whole step; others know nothing of steps.
    whole = hasattr(data, "global_batch_size")
    trainer = config["trainer"]
    ranks = trainer["num_nodes"] * (trainer["devices"] if isinstance(trainer["devices"], int) else 1)
    batches = 1 if whole else trainer["accumulate_grad_batches"] * ranks
    counted = [_real_tokens(batch) for batch in islice(data.train_dataloader(), SAMPLE * batches)]
    if not sum(counted):
        raise ConfigError(f"budget.tokens={budget:g}: the training data give no token to count; set trainer.max_steps.")
    a_step = sum(counted) / len(counted) * batches
    steps = round(budget / a_step)
    if steps < 1:
        raise ConfigError(f"budget.tokens={budget:g} is less than a step, which has about {a_step:,.0f} tokens.")
    return steps


def _real_tokens(batch: dict[str, Tensor]) -> int:
    valid = batch.get("valid")
    return batch["input_ids"].numel() if valid is None else int(valid.sum())
