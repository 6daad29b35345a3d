"""Frozen parameters: those that a pattern of `optim.freeze` names keep their values and have no optimizer state.

Beside the patterns stands the word `trunk`, for all that is neither of a variant's plugin nor of a value table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from pkm_lightning.build.instantiate import target_class
from pkm_lightning.errors import ConfigError, nearest
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer

#: Prefix of the transformer's parameters in a checkpoint, which a pattern may have or lack.
_MODEL = "model."


class ParameterCounts(NamedTuple):
    """Numbers of parameters of a model, over all ranks."""

    trained: int
    frozen: int


#: The word for all parameters that are not of a variant of the FFN.
TRUNK = "trunk"


def freeze_parameters(model: Transformer, patterns: Sequence[str], places: Collection[tuple[int, str]] = ()) -> None:
    """Excludes the parameters of `model` from training whose names match one of `patterns`.

    Args:
        model: the trunk, before it is sharded and before an optimizer is made.
        patterns: `trunk`, or as `fnmatch` reads them, of names as in a checkpoint, with or without the leading
            `model.`: `embedding*`, `blocks.0.*`, `*attention*`, `tables.*`.
        places: layer and name of the variants' plugins, which are not of the trunk.

    Raises:
        ConfigError: a pattern matches no name, or nothing is left to train.
    """
    if not patterns:
        return
    names = [name for name, _ in model.named_parameters()]
    others = [pattern for pattern in patterns if pattern != TRUNK]
    frozen = matching_names(names, others, "optim.freeze", words=(TRUNK,))
    if TRUNK in patterns:
        frozen |= trunk_parameters(model, places)
    _freeze(model, frozen)
    if parameter_counts(model).trained == 0:
        if TRUNK in patterns and not places:
            raise ConfigError(
                "optim.freeze=[trunk] leaves nothing to train, since no layer has an FFN variant; choose one, as in "
                "ffn=memory_plus placement.layers=[LAYER] placement.mode=parallel, or leave trunk out."
            )
        raise ConfigError(
            f"optim.freeze=[{','.join(patterns)}] freezes all {len(names)} parameters, so that nothing is trained; "
            "remove a pattern."
        )


def matching_names(names: Sequence[str], patterns: Sequence[str], key: str, *, words: Sequence[str] = ()) -> set[str]:
    """Returns those of the `names` of parameters that match one of `patterns`, which `key` holds.

    Args:
        names: of all parameters.
        patterns: as `fnmatch` reads them.
        key: for errors.
        words: what `key` allows besides, for errors.

    Raises:
        ConfigError: a pattern matches no name.
    """
    chosen = set[str]()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(_MODEL + name, pattern)}
        if not matches:
            raise ConfigError(
                f"{key}: {pattern!r} matches no parameter; patterns are of whole names, such as "
                f"{names[0]} and {names[-1]}{''.join(f', beside the word {word}' for word in words)}."
                f"{_near(pattern, names, words)}"
            )
        chosen |= matches
    return chosen


def freeze_others(model: nn.Module, names: Collection[str]) -> None:
    """Excludes all parameters of `model` from training but those with these names."""
    _freeze(model, {name for name, _ in model.named_parameters()} - set(names))


def _freeze(model: nn.Module, names: Collection[str]) -> None:
    tables = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, ValueTable)}
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
            if name in tables:
                tables[name].stage = None  # a table that learns by rows requires no gradient: reads are staged


def trunk_parameters(model: Transformer, places: Collection[tuple[int, str]]) -> set[str]:
    """Returns the names of the parameters that are neither of a plugin at one of `places` nor of a value table.

    The norm in front of a plugin before or after a layer, which is as new as the plugin, counts as its part.
    """
    of_plugins: list[nn.Module] = list(model.value_tables)
    for layer, name, plugin in model.plugins():
        if (layer, name) in places:
            norm = getattr(model.blocks[layer], f"{name}_norm", None) if name in ("before", "after") else None
            of_plugins += [plugin] if norm is None else [plugin, norm]
    others = {id(parameter) for module in of_plugins for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in others}


def check_frozen(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuses a strategy whose engine would have nothing to train, where only tables are left, or would fail.

    Raises:
        ConfigError: naming the strategies that work.
    """
    strategy = config["strategy"]
    if not strategy or not config["optim"].get("freeze"):
        return
    # DeepSpeed 0.19 gathers a module's weights for its backward only where an input of the module has a gradient.
    if TRUNK in config["optim"]["freeze"] and strategy.get("stage") == 3:
        raise ConfigError(
            "optim.freeze=[trunk] fails with ZeRO stage 3, which does not gather the weights of the first plugin for "
            "its backward; set strategy=deepspeed_2, fsdp or ddp."
        )
    tables = {id(module.weight) for module in model.modules() if isinstance(module, ValueTable)}
    dense = [p for p in model.parameters() if p.requires_grad and id(p) not in tables]
    if not dense and getattr(target_class(strategy, "strategy"), "owns_parameters", False):
        raise ConfigError(
            f"strategy._target_={strategy['_target_']}: its engine trains the parameters outside of tables, and "
            "optim.freeze leaves none of them; set strategy=ddp or strategy=fsdp."
        )


def is_frozen(module: nn.Module) -> bool:
    """Returns whether no parameter of `module` is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Returns the numbers of trained and frozen parameters, those of a whole table where a rank holds a part."""
    trained = frozen = 0
    for size, _, learns in _sizes(model):
        trained, frozen = (trained + size, frozen) if learns else (trained, frozen + size)
    return ParameterCounts(trained, frozen)


def trained_bytes(model: nn.Module) -> int:
    """Returns the bytes of the parameters that may learn, all rows of a table that learns included."""
    return sum(size * width for size, width, learns in _sizes(model) if learns)


def _sizes(model: nn.Module) -> Iterator[tuple[int, int, bool]]:
    """Yields number of values, bytes per value and whether they are trained, of each parameter."""
    tables = {id(module.weight): module for module in model.modules() if isinstance(module, ValueTable)}
    for parameter in model.parameters():
        table = tables.get(id(parameter))
        if table is None:
            yield parameter.numel(), parameter.element_size(), parameter.requires_grad
        else:
            yield table.size, parameter.element_size(), table.stage is not None or parameter.requires_grad


def _near(pattern: str, names: Sequence[str], words: Sequence[str]) -> str:
    """Returns the words and the parts of names that are nearest to the longest text in `pattern`."""
    text = max(pattern.replace("?", "*").split("*"), key=len).strip(". ")
    parts = {part for name in names for part in (name, *name.split(".")) if not part.isdigit()}
    return nearest(text, sorted({*parts, *words}))
