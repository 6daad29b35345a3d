"""Sizes a plugin to a budget: one integer of its configuration is solved so that FLOPs or parameters match.

The plugin's YAML names this knob: `_size_by_: {flops: value_dim, params: n_keys}`, a key of the plugin or a dotted path
such as `model.base_ffn.hidden_dim`. A knob that must be a multiple of a number has it in `_step_: {value_dim: 2}`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from pkm_lightning.build.model import attention_context, build_meta_model
from pkm_lightning.build.variants import EXTRAS
from pkm_lightning.errors import ConfigError, check_choice, check_integer, check_range, nearest
from pkm_lightning.model import model_cost

_TOLERANCE = 0.02
_LARGEST = 2**24


def solve_size(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `config` with the plugin's knob solved for `match` and `match_budget`.

    With `match=flops` the basis is the trunk's forward FLOPs per token in training (all layers, without embeddings),
    with `params` the total parameters; the default budget is that of the same model with its base FFN everywhere.

    Raises:
        ConfigError: the plugin names no knob, or no value of it comes within 2% of the budget; the message names the
            bound that prevents it.
    """
    match = str(config["match"])
    check_choice("match", match, ("none", "flops", "params"))
    config = copy.deepcopy(config)
    if match == "none":
        return config
    knob = _knob(config, match)
    if knob is None:
        raise ConfigError(
            f"match={match}: ffn._target_={config['ffn']['_target_']} names no knob to size; add "
            f"_size_by_: {{{match}: NAME_OF_AN_INTEGER}} to its YAML, or set match=none."
        )
    budget = _budget(config, match)
    multiple = _mapping(config, "_step_").get(knob, 1)
    check_integer(f"ffn._step_.{knob}", multiple, low=1)

    def measure(factor: int) -> float:
        trial = copy.deepcopy(config)
        _set(trial, knob, factor * multiple)
        return _basis(trial, match)

    path = ".".join(_path(knob))
    _set(config, knob, multiple * _closest(measure, budget, f"match={match} through {path}", multiple))
    return config


def sized_knob(config: dict[str, Any]) -> dict[str, int]:
    """Returns the knob that `match` solves and its value in `config`; empty without `match`."""
    knob = _knob(config, str(config["match"]))
    if knob is None:
        return {}
    node: Any = config
    for key in _path(knob):
        node = node[key]
    return {knob: int(node)}


def _path(knob: str) -> list[str]:
    """Returns the keys that lead to a knob: a key of `ffn`, or a dotted path from the root of the configuration."""
    return knob.split(".") if "." in knob else ["ffn", knob]


def _knob(config: dict[str, Any], match: str) -> str | None:
    """Returns the knob that the plugin's YAML names for `match`.

    Raises:
        ConfigError: `_size_by_` is not a mapping, or names a key that does not exist.
    """
    knob = _mapping(config, "_size_by_").get(match)
    if knob is not None and "." not in str(knob) and knob not in config["ffn"]:
        raise ConfigError(
            f"ffn._size_by_.{match}={knob} is not a key of ffn.{nearest(str(knob), map(str, config['ffn']))}"
        )
    return None if knob is None else str(knob)


def _mapping(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config["ffn"].get(key)
    if value is not None and not isinstance(value, dict):
        example = "{flops: NAME_OF_AN_INTEGER}" if key == "_size_by_" else "{NAME_OF_AN_INTEGER: 2}"
        raise ConfigError(f"ffn.{key}={value!r} is not a mapping; write it as in {key}: {example}.")
    return value or {}


def _set(config: dict[str, Any], knob: str, value: int) -> None:
    *parents, leaf = _path(knob)
    node = config
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            raise ConfigError(f"ffn._size_by_ names {knob}, which is not a key of the configuration.")
        node = node[parent]
    node[leaf] = value


def _budget(config: dict[str, Any], match: str) -> float:
    budget = config["match_budget"]
    if budget is None:
        return _basis(_dense_twin(config), match)
    check_range("match_budget", budget, 1)
    return float(budget)


def _dense_twin(config: dict[str, Any]) -> dict[str, Any]:
    # The budget is the plain model: nothing in parallel, nothing deferred, no other variants.
    twin = copy.deepcopy(config)
    twin["ffn"] = twin["model"]["base_ffn"]
    twin["placement"].update(mode="replace", write_after=0)
    twin[EXTRAS] = {}
    return twin


def _basis(config: dict[str, Any], match: str) -> float:
    cost = model_cost(build_meta_model(config), attention_context(config))
    if match == "params":
        return cost.params_total
    if cost.unknown:
        raise ConfigError(f"match=flops: {', '.join(cost.unknown)} states no cost(); set match=params or match=none.")
    return cost.trunk_train_flops


def _closest(measure: Callable[[int], float], budget: float, what: str, multiple: int) -> int:
    """Returns the integer whose measure is nearest to `budget`, by bisection: the measure grows with the integer.

    Raises:
        ConfigError: the nearest one is not within 2%; the message shows values in multiples of `multiple`.
    """
    low, smallest = _smallest_valid(measure, what, multiple)
    if smallest > budget * (1 + _TOLERANCE):
        raise ConfigError(
            f"{what}: even its least value {low * multiple} gives {smallest:,.0f}, above the budget {budget:,.0f}; set "
            "match_budget, or lower the plugin's other sizes."
        )
    high = low
    while measure(high) < budget:
        low, high = high, min(high * 2, _LARGEST + 1)
        if high > _LARGEST or not _is_valid(measure, high):
            high = _largest_valid(measure, low, high)
            break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(middle) < budget else (low, middle)
    best = min((low, high), key=lambda value: abs(measure(value) - budget))
    reached = measure(best)
    if abs(reached - budget) > _TOLERANCE * budget and reached == smallest:
        raise ConfigError(
            f"{what}: the knob changes nothing, {smallest:,.0f} up to its value {best * multiple}, and the budget is "
            f"{budget:,.0f}; does any layer carry the FFN?"
        )
    if abs(reached - budget) > _TOLERANCE * budget:
        raise ConfigError(
            f"{what}: the nearest value {best * multiple} gives {reached:,.0f}, not within {_TOLERANCE:.0%} of the "
            f"budget {budget:,.0f}; set match_budget, or change the plugin's other sizes."
        )
    return best


def _smallest_valid(measure: Callable[[int], float], what: str, multiple: int) -> tuple[int, float]:
    """Returns the least value that the plugin accepts (for example n_keys**2 must be knn or more) and its measure."""
    value = 1
    while not _is_valid(measure, value):
        value *= 2
        if value > _LARGEST:
            measure(1)  # raises the plugin's own error
            raise ConfigError(f"{what}: no value up to {_LARGEST * multiple} is accepted.")
    refused = value // 2
    while value - refused > 1:
        middle = (value + refused) // 2
        value, refused = (middle, refused) if _is_valid(measure, middle) else (value, middle)
    return value, measure(value)


def _largest_valid(measure: Callable[[int], float], low: int, high: int) -> int:
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _is_valid(measure, middle) else (low, middle)
    return low


def _is_valid(measure: Callable[[int], float], value: int) -> bool:
    try:
        measure(value)
    except ConfigError:
        return False
    return True
