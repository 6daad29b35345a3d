"""The length of a run whose data say how many steps they are for: `trainer.max_steps=auto`."""

from __future__ import annotations

from typing import Any

from pkm_lightning.data.base import steps_of
from pkm_lightning.errors import ConfigError, check_integer

#: Validations over a run with `trainer.val_check_interval=auto`.
VALIDATIONS = 10


def complete_length(config: dict[str, Any], data: object) -> dict[str, Any]:
    """Returns `config` with numbers for `auto` steps and `auto` micro-batches between validations.

    Raises:
        ConfigError: the data have no such number.
    """
    trainer = dict(config["trainer"])
    if trainer["max_steps"] == "auto":
        steps = steps_of(data)
        if steps is None:
            raise ConfigError(
                f"trainer.max_steps=auto, but {type(data).__name__} has no `steps`; set trainer.max_steps to a number."
            )
        check_integer(f"data: {type(data).__name__}.steps", steps, 1)
        trainer["max_steps"] = steps
    if trainer["val_check_interval"] == "auto":
        # Lightning counts the interval in micro-batches.
        trainer["val_check_interval"] = max(1, trainer["max_steps"] // VALIDATIONS) * trainer["accumulate_grad_batches"]
    return {**config, "trainer": trainer}
