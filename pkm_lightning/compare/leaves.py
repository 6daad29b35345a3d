"""A nested configuration as dotted keys with plain values, and the keys that do not describe the run itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Keys that control one command (where it writes, whether it resumes) and do not describe the run.
COMMAND_KEYS = (
    *("run_dir", "resume", "trust_config", "ckpt", "format", "out", "file", "dir", "overwrite", "quantize"),
    *("objective", "objective_mode", "sweep_dir"),
)
#: Keys that describe the machine.
MACHINE_KEYS = ("data.cache_dir", "device_memory")


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value with its dotted key; an empty mapping is a value."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def move_paths(node: Any, old: str, new: str) -> Any:
    """Returns `node` with every path at or under the directory `old` replaced by the same path at or under `new`."""
    if isinstance(node, Mapping):
        return {key: move_paths(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [move_paths(value, old, new) for value in node]
    if isinstance(node, str) and (node == old or node.startswith(f"{old}/")):
        return new + node[len(old) :]
    return node


def portable_leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves that describe a run: equal on every machine and in every directory."""
    # Paths inside the run directory would differ between two runs of one variant without meaning anything.
    portable = move_paths(config, config["run_dir"], "RUN_DIR") if config.get("run_dir") else config
    described = {key: value for key, value in leaves(portable) if key.split(".")[0] not in COMMAND_KEYS}
    return {key: value for key, value in described.items() if key not in MACHINE_KEYS}
