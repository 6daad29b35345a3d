"""A nested configuration as dotted keys and plain values, and which of them are not of the run itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Keys that say how a sitting is run, not what the run is.
OF_THE_SITTING = ("run_dir", "resume", "trust_config", "ckpt", "format", "out", "file", "overwrite")
#: Keys that say what the machine has to offer.
OF_THE_MACHINE = ("data.cache_dir", "device_memory")


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with its dotted key; an empty mapping is a value."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def moved(node: Any, old: str, new: str) -> Any:
    """`node` with paths at and under the directory `old` at and under `new`."""
    if isinstance(node, Mapping):
        return {key: moved(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [moved(value, old, new) for value in node]
    if isinstance(node, str) and (node == old or node.startswith(f"{old}/")):
        return new + node[len(old) :]
    return node


def portable_leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves that say what a run is: without those of the sitting, and the same on whatever machine and wherever."""
    portable = moved(config, config["run_dir"], "RUN_DIR") if config.get("run_dir") else config
    found = {key: value for key, value in leaves(portable) if key.split(".")[0] not in OF_THE_SITTING}
    return {key: value for key, value in found.items() if key not in OF_THE_MACHINE}
