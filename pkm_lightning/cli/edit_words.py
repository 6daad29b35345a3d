"""The second word of `edit`: `edit list run_dir=RUN` is `edit action=list run_dir=RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from pkm_lightning.errors import ConfigError, nearest

#: What `edit` does, and the keys that each action reads besides those that name the model.
ACTIONS: dict[str, tuple[str, ...]] = {
    "write": (
        *("facts", "name", "note", "drift_path", "drift_tokens", "kl_bound", "rows_per_fact", "margin", "max_steps"),
        *("max_seconds", "lr", "batch_size", "contexts", "ends", "sample_seed", "overwrite"),
    ),
    "list": (),
    "show": ("name",),
    "remove": ("name",),
    "apply": ("name",),
    "merge": ("edits", "format", "file", "dir", "overwrite", "quantize"),
}


def with_action(verb: str, arguments: Sequence[str]) -> list[str]:
    """Returns the command line with the word behind `edit` as `action=WORD`.

    Raises:
        ConfigError: a word that is no action.
    """
    if verb != "edit" or not arguments or "=" in arguments[0] or arguments[0].startswith(("-", "~", "+")):
        return list(arguments)
    word = arguments[0]
    if word not in ACTIONS:
        raise ConfigError(
            f"edit {word}: no such action; allowed: {', '.join(ACTIONS)}, or keys as in edit run_dir=RUN facts=FILE."
            f"{nearest(word, ACTIONS)}"
        )
    return [f"action={word}", *arguments[1:]]
