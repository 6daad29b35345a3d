"""A nested configuration as dotted keys and plain values, and which of them are not of the run itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Keys that say how a sitting is run, not what the run is.
OF_THE_SITTING = ("run_dir", "resume", "trust_config", "ckpt", "format", "out", "file", "overwrite")


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with its dotted key; an empty mapping is a value."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def portable_leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves that say what a run is: without those of the sitting, and the same wherever the run directory lies."""
    own = str(config.get("run_dir", ""))
    return {
        key: value.replace(own, "RUN_DIR") if own and isinstance(value, str) else value
        for key, value in leaves(config)
        if key.split(".")[0] not in OF_THE_SITTING
    }
