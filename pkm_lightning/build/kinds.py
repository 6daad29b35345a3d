"""Kinds of configured values: the signature of the class that `_target_` names declares what each of its keys takes.

An annotation is compared with what YAML can hold: null, truth values, numbers, text, lists and mappings. A range may
stand in it, as in `Annotated[int, Range(1)]`; the constructor checks what an annotation cannot express.
"""

from __future__ import annotations

import collections.abc
import enum
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from pkm_lightning.errors import ConfigError, check_choice, check_flag, check_range

#: What an annotation in text may name although its module imports it for type checking only.
_TYPING_NAMES = {**vars(collections.abc), **vars(typing)}
_LARGEST_INTEGER = 2**63 - 1
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Range:
    """The closed interval of a number in an annotation; None leaves a side open."""

    low: float | None = None
    high: float | None = None


@functools.cache
def keyword_annotations(cls: type) -> dict[str, Any]:
    """Returns the annotation of each keyword that the constructor of `cls` takes.

    `**options: Unpack[KEYS]` stands for the keys of that TypedDict, other `**options` for those of the base class that
    receives them. What cannot be evaluated becomes `Any`.
    """
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        constructor = inspect.unwrap(vars(base)["__init__"])
        if not inspect.isfunction(constructor):
            break
        parameters = inspect.signature(constructor).parameters.values()
        scope = {**_TYPING_NAMES, **constructor.__globals__}
        passes_on = False
        for parameter in list(parameters)[1:]:
            annotation = _evaluate(parameter.annotation, scope)
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                keys = get_args(annotation)[0] if get_origin(annotation) is typing.Unpack else None
                declared = _typed_keys(keys) if keys else {}
                found = {**{name: _required(kind) for name, kind in declared.items()}, **found}
                passes_on = keys is None
            elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
                # Many write `size: int = None`.
                found.setdefault(parameter.name, annotation | None if parameter.default is None else annotation)
        if not passes_on:
            break
    return found


def _evaluate(annotation: Any, scope: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    try:
        return typing.get_type_hints(holder, globalns=scope, include_extras=True)["value"]
    except Exception:  # names that exist for a type checker only
        return Any


def check_kinds(cls: type, config: Mapping[str, Any], key: str) -> None:
    """Refuses values of `config`, the keywords of `cls`, that do not fit the signature; `key` is its place.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    hints = keyword_annotations(cls)
    for name, value in config.items():
        if name in hints and not str(name).startswith("_"):
            check_kind(f"{key}.{name}", value, hints[name])


def check_kind(key: str, value: Any, annotation: Any) -> None:
    """Refuses a `value` of `key` that `annotation` does not allow; also a key that a TypedDict requires and lacks.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    alternatives = list(_alternatives(annotation))
    # Of what fits in kind, the ranges and the parts are checked; a value that fits nothing is of a wrong kind.
    for alternative in alternatives:
        bare, limits = _without_range(alternative)
        if _fits(value, bare):
            if limits is not None:
                check_range(key, value, limits.low, limits.high)
            elif isinstance(value, float) and math.isnan(value):
                check_range(key, value)
            _check_parts(key, value, bare)
            return
    if alternatives == [bool]:
        check_flag(key, value)
    if all(get_origin(part) is Literal or part is type(None) for part in alternatives):
        choices = [choice for part in alternatives for choice in get_args(part) or (None,)]
        check_choice(key, value, dict.fromkeys("null" if choice is None else str(choice) for choice in choices))
    words = dict.fromkeys(_words(_without_range(alternative)[0]) for alternative in alternatives)
    raise ConfigError(f"{key}={_shown(value)} is not {_joined(list(words))}{_advice(key, value, alternatives)}.")


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Union or origin is types.UnionType:
        for part in get_args(annotation):
            yield from _alternatives(part)
    elif isinstance(annotation, typing.NewType):
        yield from _alternatives(annotation.__supertype__)
    else:
        yield type(None) if annotation is None else annotation


def _without_range(annotation: Any) -> tuple[Any, Range | None]:
    if get_origin(annotation) is not Annotated:
        return annotation, None
    bare, *extras = get_args(annotation)
    return bare, next((extra for extra in extras if isinstance(extra, Range)), None)


def _fits(value: Any, annotation: Any) -> bool:
    """Returns whether `value` is of the kind of `annotation`, its parts aside."""
    origin = get_origin(annotation) or annotation
    if isinstance(value, Mapping) and "_target_" in value:
        return True  # an object, checked by its own signature
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(annotation))
    if not isinstance(origin, type) or origin is object:
        return True  # Any, type variables
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_INTEGER
    if isinstance(value, str) and issubclass(origin, os.PathLike | enum.Enum):
        return True
    if is_typeddict(origin) or issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if issubclass(origin, collections.abc.Iterable) and not issubclass(origin, str):
        return isinstance(value, list | tuple) and len(value) == (_length(annotation) or len(value))
    try:
        return isinstance(value, origin)
    except TypeError:  # a protocol
        return True


def _length(annotation: Any) -> int | None:
    parts = get_args(annotation)
    return len(parts) if get_origin(annotation) is tuple and parts and parts[-1] is not Ellipsis else None


def _check_parts(key: str, value: Any, annotation: Any) -> None:
    parts = get_args(annotation)
    if is_typeddict(annotation):
        for name, part in _typed_keys(annotation).items():
            if name in value:
                check_kind(f"{key}.{name}".lstrip("."), value[name], _required(part))
            elif annotation.__total__ and get_origin(part) is not typing.NotRequired:
                raise ConfigError(
                    f"{f'{key}.{name}'.lstrip('.')} is missing, and nothing works without it; set it, or do not delete "
                    "it with ~."
                )
    elif isinstance(value, Mapping) and len(parts) == 2 and "_target_" not in value:
        for name, part in value.items():
            check_kind(f"{key}.{name}", part, parts[1])
    elif isinstance(value, list | tuple) and parts and get_origin(annotation) is not Literal:
        items = parts if _length(annotation) else [parts[0]] * len(value)
        for number, (item, part) in enumerate(zip(value, items, strict=True)):
            check_kind(f"{key}[{number}]", item, part)


@functools.cache
def _typed_keys(keys: type) -> dict[str, Any]:
    return typing.get_type_hints(keys, include_extras=True)


def _required(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) in (typing.Required, typing.NotRequired) else annotation


def _words(annotation: Any) -> str:
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return " or ".join("null" if choice is None else str(choice) for choice in get_args(annotation))
    if origin in _WORDS:
        return _WORDS[origin]
    if is_typeddict(origin) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return "a mapping {KEY: VALUE}"
    if isinstance(origin, type) and issubclass(origin, os.PathLike):
        return "a path"
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        length = _length(annotation)
        return f"a list of {length}" if length else "a list"
    return f"a {getattr(origin, '__name__', origin)}"


def _joined(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _advice(key: str, value: Any, alternatives: list[Any]) -> str:
    """Returns what to write instead, where the value shows it."""
    bare = [_without_range(alternative) for alternative in alternatives]
    integers = [limits or Range() for kind, limits in bare if kind is int]
    advice = ""
    if isinstance(value, str) and any(_words(kind) == "a mapping {KEY: VALUE}" for kind, _ in bare):
        advice = f"; set its keys, as in {key}.NAME=VALUE"
    elif (
        isinstance(value, str) and value and any(_words(kind) == "a list" and str in get_args(kind) for kind, _ in bare)
    ):
        advice = f"; write {key}=[{value}]"
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and integers:
        low = min(-_LARGEST_INTEGER if limits.low is None else limits.low for limits in integers)
        high = max(_LARGEST_INTEGER if limits.high is None else limits.high for limits in integers)
        if value > high:
            advice = f" of at most {high}"
        elif value == int(value) and value >= low:
            advice = f"; write {int(value)}"
    if isinstance(value, int | float) and not isinstance(value, bool) and str in [kind for kind, _ in bare]:
        name, item, _ = key.partition("[")
        # What was typed is lost for a fraction: 1e3 has become 1000.0.
        quoted = "'TEXT'" if item or isinstance(value, float) else f"'{value}'"
        advice += f'; if it is meant as text, quote it: "{name}={f"[{quoted},...]" if item else quoted}"'
    return advice
