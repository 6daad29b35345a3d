"""An interrupted run goes on with the configuration that it started with; a command that says otherwise is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from pkm_lightning.errors import CheckpointError, RunDirectoryError
from pkm_lightning.training.instantiate import check_trusted

#: Keys that say how this sitting is run, not what the run is.
#: `devices` counts as `trainer.devices`, however it was said.
_OF_THE_SITTING = ("run_dir", "resume", "trust_config", "ckpt", "format", "out", "devices", "device_memory")
_ABSENT = object()


def saved_config(run_dir: Path, *, trust: bool) -> dict[str, Any]:
    """The configuration in `run_dir`.

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
    return {**config, "run_dir": str(run_dir)}


def differences(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: saved value -> new value` for every leaf that differs, but for keys of the sitting."""
    left, right = dict(_leaves(saved, "")), dict(_leaves(new, ""))
    keys = [k for k in {**left, **right} if k.split(".")[0] not in _OF_THE_SITTING]
    differing = [k for k in keys if left.get(k, _ABSENT) != right.get(k, _ABSENT)]
    return [f"{k}: {left.get(k, '(absent)')} -> {right.get(k, '(absent)')}" for k in differing]


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of this package, tensors memory-mapped.

    Raises:
        CheckpointError: missing, damaged, or not written by this package.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"ckpt={path} does not exist.") from None
    except Exception:  # torch raises half a dozen kinds for a file that it cannot read
        raise CheckpointError(f"ckpt={path} is damaged or no checkpoint; use another one.") from None
    content = checkpoint if isinstance(checkpoint, dict) else {}
    config = (content.get("hyper_parameters") or {}).get("config") or {}
    if not {"tokens_seen", "state_dict"} <= content.keys() or not {"model", "ffn", "data", "trainer"} <= config.keys():
        raise CheckpointError(f"ckpt={path} was not written by this package; use one from a run's checkpoints folder.")
    return checkpoint


def checkpoint_config(checkpoint: Mapping[str, Any], path: str, *, trust: bool) -> dict[str, Any]:
    """The configuration inside a checkpoint.

    Raises:
        ConfigError: it names classes of other packages and is not trusted.
    """
    config: dict[str, Any] = dict(checkpoint["hyper_parameters"]["config"])
    if not trust:
        check_trusted(config, path)
    return config
