"""The learning-rate schedule of a configuration: linear warm-up, then a named shape over `trainer.max_steps`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pkm_lightning.errors import ConfigError, check_choice, check_range


def configured_schedule(optim: Mapping[str, Any], max_steps: int) -> Callable[[int], float]:
    """Returns `schedule_factor` for the `optim` group, whose shares are of `max_steps`.

    Raises:
        ConfigError: as `schedule_factor`.
    """
    return schedule_factor(
        optim["schedule"],
        max_steps=max_steps,
        warmup_steps=warmup_steps(optim, max_steps),
        final_factor=optim["final_factor"],
        decay_share=optim["decay_share"],
    )


def warmup_steps(optim: Mapping[str, Any], max_steps: int) -> int:
    """Returns the steps in which the rate rises: `optim.warmup_steps`, or its share of `max_steps`."""
    configured = optim.get("warmup_steps")
    return int(max_steps * optim["warmup_share"]) if configured is None else int(configured)


def decay_start(optim: Mapping[str, Any], max_steps: int) -> int:
    """Returns the number of steps after which the rate falls from its peak."""
    start = int(max_steps * (1 - optim["decay_share"])) if optim["schedule"] == "wsd" else 0
    return max(warmup_steps(optim, max_steps), start)


def schedule_factor(
    schedule: str, *, max_steps: int, warmup_steps: int, final_factor: float, decay_share: float
) -> Callable[[int], float]:
    """Returns the factor on every group's learning rate as a function of the step.

    Linear warm-up, then the named shape, down to `final_factor` at `max_steps`.

    Args:
        schedule: `cosine`, `linear`, or `wsd` (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395; linear decay
            over the last `decay_share` of the steps).
        max_steps: optimizer steps of the run.
        warmup_steps: steps until the full rate.
        final_factor: factor at the end, 0 to 1.
        decay_share: for `wsd`, 0 to 1.

    Raises:
        ConfigError: an unknown schedule, a number out of range, or no positive `max_steps`.
    """
    check_choice("optim.schedule", schedule, ("cosine", "linear", "wsd"))
    check_range("optim.final_factor", final_factor, 0, 1)
    check_range("optim.decay_share", decay_share, 0, 1)
    if max_steps < 1:
        raise ConfigError(f"trainer.max_steps={max_steps} gives the schedule no length; set a number of steps.")
    check_range("optim.warmup_steps", warmup_steps, 0, max_steps)
    start = max(warmup_steps, int(max_steps * (1 - decay_share))) if schedule == "wsd" else warmup_steps

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - start) / max(1, max_steps - start)) if step > start else 0.0
        shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
        return final_factor + (1 - final_factor) * shape

    return factor
