"""The word of `edit`: `edit list run_dir=RUN` is `edit action=list run_dir=RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pkm_lightning.compare.overrides import key_of
from pkm_lightning.errors import ConfigError, nearest

#: What `edit` does, and the keys that each action reads besides those that name the model.
ACTIONS: dict[str, tuple[str, ...]] = {
    "write": (
        *("facts", "name", "note", "drift_path", "drift_tokens", "kl_bound", "rows_per_fact", "margin", "max_steps"),
        *("max_seconds", "lr", "batch_size", "contexts", "ends", "sample_seed", "overwrite", "data"),
    ),
    "list": ("format",),
    "show": ("name",),
    "remove": ("name",),
    "apply": ("name",),
    "merge": ("edits", "format", "file", "dir", "overwrite", "quantize"),
}


def with_action(verb: str, arguments: Sequence[str]) -> list[str]:
    """Returns the command line with the word among the keys of `edit` as `action=WORD`.

    Raises:
        ConfigError: a word that is no action, or several.
    """
    # What follows a flag, such as --config-dir, is its value.
    words = [
        word
        for before, word in pairwise(["", *arguments])
        if "=" not in word and not word.startswith(("-", "~", "+")) and not before.startswith("-")
    ]
    if verb != "edit" or not words:
        return list(arguments)
    for word in words:
        if word not in ACTIONS:
            raise ConfigError(
                f"edit {word}: no such action; allowed: {', '.join(ACTIONS)}, or keys as in edit run_dir=RUN "
                f"facts=FILE.{nearest(word.lower(), ACTIONS)}"
            )
    keys = [argument for argument in arguments if key_of(argument) == "action"]
    if len(words) + len(keys) > 1:
        raise ConfigError(
            f"edit {' '.join((*words, *keys))}: one action per command; give one of {', '.join(ACTIONS)}."
        )
    return [f"action={word}" if word in words else word for word in arguments]
