"""Paths in a configuration: `~` and `$VARIABLE` mean the same in every key that holds one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pkm_lightning.errors import ConfigError

#: Names of keys that hold a path or a list of them, in any group.
PATH_KEYS = frozenset(
    (
        *(
            "run_dir",
            "init_from",
            "ckpt",
            "file",
            "dir",
            "out",
            "runs",
            "packages",
            "path",
            "dirpath",
            "save_dir",
            "cache_dir",
        ),
        *("prompts_file", "tokenizer", "tasks_dir", "val_path", "test_path", "replay_path"),
    )
)


def with_expanded_paths(node: Any, key: str = "") -> Any:
    """Returns `node`, the part of a configuration at `key`, with every path expanded as a shell would.

    Raises:
        ConfigError: a path is empty, which would be the working directory, or is in the home of a user who has none.
    """
    if isinstance(node, Mapping):
        return {name: with_expanded_paths(part, f"{key}.{name}".lstrip(".")) for name, part in node.items()}
    if key.rpartition(".")[2] not in PATH_KEYS:
        return node
    if isinstance(node, list):
        return [expanded(key, part) if isinstance(part, str) else part for part in node]
    return expanded(key, node) if isinstance(node, str) else node


def expanded(key: str, path: str) -> str:
    """Returns `path`, the value of `key`, with `~` and `$VARIABLE` replaced; variables that are not set stay."""
    if not path.strip():
        raise ConfigError(f"{key}={path!r} names no file or folder; give {key}=PATH.")
    full = os.path.expanduser(os.path.expandvars(path))  # `Path.expanduser` raises a RuntimeError without a home
    if full == "~" or full.startswith("~/"):
        raise ConfigError(f"{key}={path} is in the home of a user who has none; set HOME, or {key}=PATH.")
    return full
