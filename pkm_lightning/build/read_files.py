"""Files that tables, finetuning methods and callbacks read: a run may be continued from another directory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pkm_lightning.build.stored_tables import with_absolute_paths
from pkm_lightning.data.files import expanded

#: Arguments of callbacks that name files which are only read.
READ_BY_CALLBACKS = {"pkm_lightning.callbacks.Retention": ("facts", "questions", "known", "text")}
_READ_BY_METHODS = ("background", "background_path", "replay_path")


def with_absolute_files(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `config` with absolute paths of what tables, the finetuning method and callbacks read."""
    changed = with_absolute_paths(config) if config.get("table") else dict(config)
    if isinstance(described := config.get("finetune"), Mapping):
        changed["finetune"] = _with_absolute(described, _READ_BY_METHODS)
    if isinstance(callbacks := config.get("callbacks"), Mapping):
        changed["callbacks"] = {
            name: _with_absolute(one, READ_BY_CALLBACKS.get(str(one.get("_target_")), ()))
            if isinstance(one, Mapping)
            else one
            for name, one in callbacks.items()
        }
    return changed


def _with_absolute(described: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: _absolute(value) if key in keys else value for key, value in described.items()}


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    return str(expanded(value).absolute()) if isinstance(value, str) and value.strip() else value
