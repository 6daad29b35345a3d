"""An interrupted run goes on with the configuration that it started with; a command that says otherwise is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pkm_lightning.build.instantiate import check_trusted
from pkm_lightning.compare.leaves import COMMAND_KEYS, MACHINE_KEYS, leaves, move_paths
from pkm_lightning.errors import RunDirectoryError

#: Keys that say where a run is spread and what is there: it may go on elsewhere. `devices` counts as `trainer.devices`.
_SPREAD = (
    "strategy",
    "devices",
    *MACHINE_KEYS,
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "table.shard",
    "table.group",
)
_ABSENT = object()


def saved_config(run_dir: Path, *, trust: bool) -> dict[str, Any]:
    """The configuration in `run_dir`, its paths there too where the directory has moved.

    Raises:
        RunDirectoryError: there is none, or it is no configuration.
        ConfigError: it names classes of other packages and is not trusted.
    """
    file = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise RunDirectoryError(f"run_dir={run_dir} holds no run: {file.name} is missing there.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunDirectoryError(f"{file} cannot be read ({str(error).splitlines()[0]}).") from None
    if not isinstance(config, dict) or not {"model", "ffn", "data"} <= config.keys():
        raise RunDirectoryError(f"{file} is no configuration of this package.")
    if not trust:
        check_trusted(config, str(file))
    here: dict[str, Any] = move_paths(config, str(config.get("run_dir")), str(run_dir))
    return {**here, "run_dir": str(run_dir)}


def differences(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: saved value -> new value` for every leaf that differs, but for keys of the sitting and of the spread."""
    left, right = dict(leaves(saved)), dict(leaves(new))
    keys = [k for k in {**left, **right} if k.split(".")[0] not in COMMAND_KEYS and not is_spread(k)]
    differing = [k for k in keys if left.get(k, _ABSENT) != right.get(k, _ABSENT)]
    return [f"{k}: {left.get(k, '(absent)')} -> {right.get(k, '(absent)')}" for k in differing]


def is_spread(key: str) -> bool:
    """The key, as on a command line, says over what a run is spread."""
    return _spread_of(key) is not None


def _spread_of(key: str) -> str | None:
    path = key.lstrip("+~").split("@")[0].replace("/", ".")
    return next((spread for spread in _SPREAD if path == spread or path.startswith(f"{spread}.")), None)


def spread_anew(saved: Mapping[str, Any], new: Mapping[str, Any], said: Iterable[str]) -> dict[str, Any]:
    """`saved` with the keys of the spread among `said`, and of them only, as in `new`."""
    spread = copy.deepcopy(dict(saved))
    for key in said:
        group, _, name = (_spread_of(key) or "").partition(".")
        if name:
            spread.setdefault(group, {})[name] = new[group][name]
        elif group in new:
            spread[group] = new[group]
            if group == "devices":
                spread["trainer"]["devices"] = new["trainer"]["devices"]
    return spread
