"""Hydra overrides as texts: written from values, quoted, and without those that a later one replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")


def quoted(text: str) -> str:
    """`text` in quotes, as Hydra reads it back: there a backslash stands for itself, but for one before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def key_of(override: str) -> str:
    """What an override is about, however it is written: `++optim.lr=1` and `~optim.lr` about `optim.lr`."""
    return override.split("=")[0].lstrip("+~")


def says(overrides: Iterable[str], key: str) -> bool:
    """One of `overrides` is about `key`."""
    return any(key_of(override) == key for override in overrides)


def last_of_each(overrides: Iterable[str]) -> tuple[str, ...]:
    """Of several overrides of one key the last: Hydra refuses a group that is chosen twice. A deletion chooses none."""
    return tuple({override.split("=")[0].lstrip("+"): override for override in overrides}.values())


def as_overrides(own: Mapping[str, Any]) -> tuple[str, ...]:
    """Overrides from keys and values, in the grammar of Hydra."""
    return tuple(f"{key}={_literal(value)}" for key, value in own.items())


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(_literal(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if _PLAIN.fullmatch(str(value)) and str(value).lower() not in ("null", "true", "false", "inf", "nan"):
        return str(value)
    return quoted(str(value))
