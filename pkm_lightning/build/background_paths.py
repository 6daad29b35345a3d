"""Paths of a read background in a configuration: `finetune.background` and `finetune.background_path`."""

from __future__ import annotations

from typing import Any

from pkm_lightning.data.files import expanded

_KEYS = ("background", "background_path")


def with_absolute_background(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `config` with absolute paths of a read background: a run may be continued from another directory."""
    described = config.get("finetune") or {}
    paths = {
        key: str(expanded(described[key]).absolute())
        for key in _KEYS
        if isinstance(described.get(key), str) and described[key].strip()
    }
    return {**config, "finetune": {**described, **paths}} if paths else config
