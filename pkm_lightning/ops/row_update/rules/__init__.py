"""Row optimizers: one rule per file of this folder, found by the name of the file.

A rule states what it keeps per row or per value, and how an update changes the rows that were read. `CONTRIBUTING.md`
lists the steps to add one.
Modules are imported when a rule is first asked for: `find_rule("lazy_adam")` reads `lazy_adam.py`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from pkm_lightning.discovery import public_names
from pkm_lightning.ops.row_update.rules.base import (
    COLUMN_STATE,
    RowRule,
    RowState,
    UpdateStep,
    new_state,
    state_bytes,
)

__all__ = ["COLUMN_STATE", "RowRule", "RowState", "UpdateStep", "find_rule", "new_state", "rule_names", "state_bytes"]


def rule_names() -> tuple[str, ...]:
    """Returns the names of all rules, sorted."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(name for name in names if public_names(f"{__name__}.{name}"))


@functools.cache
def find_rule(name: str) -> type[RowRule]:
    """Returns the rule `name`: the class that the `__all__` of the module of that name lists.

    Raises:
        ValueError: there is no such module, or its class has another name or a state whose name means another kind.
    """
    if name not in rule_names():
        raise ValueError(f"row_update: rule={name!r} is unknown; allowed: {', '.join(rule_names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    rules = [getattr(module, listed, None) for listed in module.__all__]
    if len(rules) != 1 or not (isinstance(rules[0], type) and issubclass(rules[0], RowRule)):
        raise ValueError(f"row_update: the __all__ of rules/{name}.py is {module.__all__}; list one RowRule there.")
    rule: type[RowRule] = rules[0]
    class_name = rule.__name__
    if rule.name != name:
        raise ValueError(f"row_update: {class_name}.name is {rule.name!r}; it must be the name of its file, {name!r}.")
    if "step" in rule.state:
        raise ValueError(f"row_update: {class_name}.state has the name 'step', which the number of the update has.")
    for state, part in rule.state.items():
        if state.startswith(COLUMN_STATE) != (part.per == "column"):
            raise ValueError(
                f"row_update: {class_name}.state has {state!r} per {part.per}; the names of states per column, and no "
                f"others, begin with {COLUMN_STATE!r}."
            )
    return rule
