"""What `instability` refuses: values out of range, and configurations in which it cannot do its work."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pkm_lightning.callbacks.base import configured, engine_owns_parameters
from pkm_lightning.callbacks.diagnostics import Diagnostics
from pkm_lightning.callbacks.event_policies import check_mapping
from pkm_lightning.callbacks.step_checkpoint import StepCheckpoint
from pkm_lightning.errors import ConfigError, check_choice, check_integer, check_range

KEY = "callbacks.instability"
#: Fewer steps have no meaningful spread.
_SMALLEST_WINDOW = 10
_log = logging.getLogger(__name__)


def check_states(restore: str, keep_every_n_steps: int, settle_steps: int) -> None:
    """Refuses values of `GoodStates` that are out of range.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    check_choice(f"{KEY}.restore", restore, ("memory", "disk"))
    check_integer(f"{KEY}.keep_every_n_steps", keep_every_n_steps, low=1)
    check_integer(f"{KEY}.settle_steps", settle_steps, low=0, high=keep_every_n_steps)


def check_numbers(window: int, warm_up: int, threshold: float, max_tries: int, lr_factor: float) -> None:
    """Refuses numbers of `Instability` that are out of range.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    check_integer(f"{KEY}.window", window, low=_SMALLEST_WINDOW)
    check_integer(f"{KEY}.warm_up", warm_up, low=1, high=window)
    check_range(f"{KEY}.threshold", threshold, 0)
    check_integer(f"{KEY}.max_tries", max_tries, low=1)
    check_range(f"{KEY}.lr_factor", lr_factor, 1e-9, 1)


def check_limits(limits: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the limits by name of their figure; None sets no limits.

    Raises:
        ConfigError: they are not a mapping, or one is not a number.
    """
    check_mapping("limits", limits or {})
    for name, limit in (limits or {}).items():
        check_range(f"{KEY}.limits.{name}", limit)
    return dict(limits or {})


def check_config(
    config: Mapping[str, Any], *, policies: Mapping[str, str], restore: str, limits: Mapping[str, float]
) -> None:
    """Refuses a configuration in which a policy cannot be carried out.

    Args:
        config: the complete configuration.
        policies: the policy of every event.
        restore: where a rollback finds its state: `memory` or `disk`.
        limits: the largest values of figures of `Diagnostics`; a warning if nothing measures them.

    Raises:
        ConfigError: states in memory of parameters that an engine holds; states on disk that nothing writes.
    """
    # A state in memory is copied from the module's parameters, which an engine leaves empty or stale.
    rolls_back = "rollback" in policies.values()
    if rolls_back and restore == "memory" and engine_owns_parameters(config):
        raise ConfigError(
            f"{KEY}.restore=memory cannot copy parameters that DeepSpeed's engine holds; set {KEY}.restore=disk."
        )
    if rolls_back and restore == "disk" and not configured(config, StepCheckpoint):
        raise ConfigError(
            f"{KEY}.restore=disk needs callbacks.step_checkpoint, which is off; add it, or set {KEY}.restore=memory."
        )
    if limits and not configured(config, Diagnostics):
        _log.warning("%s.limits are not watched, since callbacks.diagnostics is off", KEY)
