"""Which policy answers which event of `instability`, and when it has been tried often enough."""

from __future__ import annotations

from collections.abc import Mapping

from pkm_lightning.callbacks.step_events import STEP_EVENTS
from pkm_lightning.errors import ConfigError, check_choice

EVENTS = (*STEP_EVENTS, "weight_not_finite", "limit")
#: From the weakest to the strongest answer.
POLICIES = ("warn", "skip", "rollback", "stop")


def check_mapping(name: str, value: object) -> None:
    """Refuse a `value` of `callbacks.instability.NAME` that is no mapping.

    Raises:
        ConfigError: naming it.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"callbacks.instability.{name}={value} is no mapping; write {name}: {{NAME: VALUE}}.")


def all_policies(policies: Mapping[str, str | None]) -> dict[str, str]:
    """A policy for every event, from those that are configured; see `Instability`.

    Raises:
        ConfigError: an unknown event, or a policy that is unknown or makes no sense for it.
    """
    check_mapping("policies", policies)
    chosen = {event: policy for event, policy in policies.items() if policy is not None}
    for event in policies:
        check_choice("callbacks.instability.policies: event", event, EVENTS)
    for event, policy in chosen.items():
        allowed = POLICIES if event in STEP_EVENTS else tuple(p for p in POLICIES if p != "skip")
        check_choice(f"callbacks.instability.policies.{event}", policy, allowed)
    found = dict.fromkeys(EVENTS, "warn") | chosen
    if "weight_not_finite" not in chosen:
        # Weights that are broken make every later step fail: none of them is worth skipping.
        found["weight_not_finite"] = {"skip": "stop"}.get(found["loss_not_finite"], found["loss_not_finite"])
    return found


class Tries:
    """Counts refused steps in a row, and rollbacks that have not got beyond the step that failed.

    Args:
        most: of either.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._skips = self._rollbacks = self._furthest = 0

    def allow(self, answer: str, step: int) -> bool:
        """`skip` or `rollback` may be tried again after `step` has failed."""
        if answer == "skip":
            self._skips += 1
            return self._skips <= self.most
        self._rollbacks = 1 if step > self._furthest else self._rollbacks + 1
        self._furthest = max(self._furthest, step)
        return self._rollbacks <= self.most

    def made(self, step: int) -> None:
        """`step` went well."""
        self._skips = 0
        if step > self._furthest:
            self._rollbacks = 0

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skips": self._skips, "rollbacks": self._rollbacks, "furthest": self._furthest}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes them up."""
        self._skips, self._rollbacks, self._furthest = state["skips"], state["rollbacks"], state["furthest"]
