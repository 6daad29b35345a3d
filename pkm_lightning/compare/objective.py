"""The objective of a sweep: a figure of validation, never of the test, which would then have been chosen by itself."""

from __future__ import annotations

from pkm_lightning.compare.metric import QUESTION_KINDS, kind_of
from pkm_lightning.errors import ConfigError, check_choice, nearest

DEFAULT = "val/loss"
#: Figures that every validation has.
ALWAYS = ("val/loss", "val/perplexity")
#: Of the callback `evaluate`, on tasks of lm-evaluation-harness.
BENCHMARKS = "eval/"
_MODES = ("auto", "min", "max")


class ObjectiveError(ConfigError):
    """An objective that no run of a sweep can have, which ends the sweep."""


def check_objective(key: str, objective: str) -> None:
    """Refuses a figure that is none of validation.

    Args:
        key: the configuration key that names it.
        objective: its name in metrics.csv.

    Raises:
        ConfigError: with the reason, and what is allowed.
    """
    part = objective.partition("/")[0]
    reasons = {
        "test": "is a figure of the test, which says nothing any more once a setting was chosen by it",
        "train": "is a figure of training, which says nothing about other data",
    }
    if objective.startswith(("val/", BENCHMARKS)) and objective.partition("/")[2]:
        return
    names = (*ALWAYS, *(f"val/{kind}_FORM" for kind in QUESTION_KINDS))
    guess = f"val/{objective}" if kind_of(objective) else objective.replace(f"{part}/", "val/", 1)
    hint = f" Did you mean {guess}?" if kind_of(guess.removeprefix("val/")) else nearest(guess, ALWAYS)
    raise ObjectiveError(
        f"{key}={objective} {reasons.get(part, 'is no figure of validation')}; name one that validations log: "
        f"{', '.join(names)}.{hint}"
    )


def direction_of(objective: str | None, mode: str = "auto") -> str:
    """Returns `minimize` or `maximize`, as Optuna writes them.

    Args:
        objective: the figure's name; None for the default.
        mode: `min`, `max`, or `auto`: more recall is better, less loss.

    Raises:
        ConfigError: nobody knows what is better of this figure.
    """
    check_choice("objective_mode", mode, _MODES)
    objective = objective or DEFAULT
    if mode == "auto" and objective not in ALWAYS and not kind_of(objective.removeprefix("val/")):
        raise ObjectiveError(
            f"objective={objective}: whether more or less of it is better is not known; set objective_mode=min or max."
            f"{nearest(objective, ALWAYS)}"
        )
    is_min = mode == "min" or (mode == "auto" and objective in ALWAYS)
    return "minimize" if is_min else "maximize"
