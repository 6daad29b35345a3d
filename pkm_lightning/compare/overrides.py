"""Hydra overrides as texts: written from values, quoted, and without those that a later one replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
# Hydra would read these as something else than a string.
_RESERVED_WORDS = ("null", "true", "false", "inf", "nan")


def quoted(text: str) -> str:
    """Returns `text` in quotes, so that Hydra reads back the same text."""
    # Inside quotes Hydra keeps a backslash as it is, except in a run of backslashes before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def key_of(override: str) -> str:
    """Returns the key of an override in any form: `optim.lr` for `++optim.lr=1` and for `~optim.lr`."""
    return override.split("=")[0].lstrip("+~")


def sets_key(overrides: Iterable[str], key: str) -> bool:
    """Returns whether one of `overrides` sets, adds or deletes `key`."""
    return any(key_of(override) == key for override in overrides)


def last_of_each(overrides: Iterable[str]) -> tuple[str, ...]:
    """Returns the last override of each key: Hydra refuses a group that is chosen twice.

    A deletion (`~KEY`) chooses nothing and therefore stays next to a choice.
    """
    return tuple({override.split("=")[0].lstrip("+"): override for override in overrides}.values())


def as_overrides(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Writes keys and values as overrides in Hydra's grammar."""
    return tuple(f"{key}={_literal(value)}" for key, value in values.items())


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
    if _PLAIN.fullmatch(str(value)) and str(value).lower() not in _RESERVED_WORDS:
        return str(value)
    return quoted(str(value))
