"""Texts on the command line are taken as they are typed: Hydra would read `Hello, world` as two values."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from pkm_lightning.compare.overrides import key_of, quoted

#: Keys whose value is a text; `prompt`, `text` and `stop` also take a list of texts.
TEXT_KEYS = ("prompt", "text", "system", "stop", "name", "note")


def with_quoted_texts(arguments: Sequence[str]) -> list[str]:
    """Returns `arguments` with each value of a text key in quotes, unless it is `null`, quoted, or a list."""
    return [_quoted(argument) if key_of(argument) in TEXT_KEYS else argument for argument in arguments]


def _quoted(argument: str) -> str:
    key, separator, value = argument.partition("=")
    if not separator or value == "null" or _is_quoted_or_list(argument):
        return argument
    # Within quotes OmegaConf would still take ${ for the reference to another key.
    return f"{key}={quoted(value.replace('${', chr(92) + '${'))}"


def _is_quoted_or_list(argument: str) -> bool:
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return False
    return isinstance(value, QuotedString | list)
