"""Where a run that is read back may write: within its directory, unless the user trusts it.

A run directory may come from a stranger. Its configuration names files to write, and links in it may lead anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import pkm_lightning.configs
from pkm_lightning.build.read_files import READ_BY_CALLBACKS
from pkm_lightning.cli.paths import expanded
from pkm_lightning.compare.leaves import COMMAND_KEYS
from pkm_lightning.errors import ConfigError

#: Keys whose value is a path even if it does not look like one, such as `notes.csv`.
_PATH_KEY = re.compile(r"(^|_)(path|dir|dirpath|file|folder)$")
#: What wandb (0.31) links in each of its folders, to the log of a process of its own; nothing is written through it.
_LOG_OF_WANDB = re.compile(r"wandb/[\w-]+/logs/debug-core\.log")
#: The package's own data modules, pretrained models, plugins, tables and finetuning methods, by their group.
_READERS = {
    "data": "pkm_lightning.data.",
    "model": "pkm_lightning.huggingface.",
    "ffn": "pkm_lightning.ffn.",
    "table": "pkm_lightning.memory.",
    "finetune": "pkm_lightning.adaptation.",
}


def check_places(config: Mapping[str, Any], source: str, folder: Path | None, allowed: Collection[str] = ()) -> None:
    """Refuses a configuration read back from `source` with a path outside `folder`, except for data that it reads.

    Args:
        config: the saved configuration.
        source: the file that it was read from.
        folder: the run's directory; None if there is none, in which no path may be written.
        allowed: paths that the command itself names, such as its cache.

    Raises:
        ConfigError: naming the key, the path, and how to trust it.
    """
    inside = None if folder is None else Path(os.path.realpath(folder))
    for key, value in _paths(config):
        if value not in allowed and not (inside and Path(_real(value)).is_relative_to(inside) and ":/" not in value):
            where = "" if folder is None else f", outside of {folder}"
            raise ConfigError(
                f"{source} names {key}={value}{where}, where a saved configuration may not write unasked; if it is "
                "yours, repeat the command with trust_config=true."
            )


def with_own_cache(config: Mapping[str, Any], folder: Path | None, cache: str | None) -> dict[str, Any]:
    """Returns a saved configuration with `data.cache_dir=cache`, unless its own lies within the run's directory.

    The cache belongs to the machine: a run that has moved prepares its data where the command does.
    """
    data = config.get("data")
    saved = data.get("cache_dir") if isinstance(data, Mapping) else None
    is_inside = folder is not None and Path(_real(str(saved))).is_relative_to(os.path.realpath(folder))
    if saved is None or cache is None or is_inside:
        return dict(config)
    return {**config, "data": {**config["data"], "cache_dir": cache}}


def cache_of(command: Mapping[str, Any]) -> str:
    """Returns the `data.cache_dir` of a command, by default that of all token data, which a data module may lack."""
    chosen = (command.get("data") or {}).get("cache_dir")
    if not chosen:
        file = Path(str(pkm_lightning.configs.__file__)).parent / "data" / "loader" / "batches.yaml"
        chosen = OmegaConf.select(OmegaConf.load(file), "cache_dir")
    return expanded("data.cache_dir", str(chosen))


def check_links(folder: Path) -> None:
    """Refuses a run's directory with a link that leads out of it, through which a run would write there, or a pipe.

    Raises:
        ConfigError: naming the link, where it leads, and how to trust it; or what is neither a file nor a folder.
    """
    inside = Path(os.path.realpath(folder))
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            is_outside = path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside)
            if is_outside and not _LOG_OF_WANDB.fullmatch(path.relative_to(folder).as_posix()):
                raise ConfigError(
                    f"{path} is a link that leads out of the run's directory, to {os.path.realpath(path)}; if it is "
                    "yours, repeat the command with trust_config=true."
                )
            # A pipe would wait for its other end, and a device takes what is written to it.
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ConfigError(f"{path} is neither a file nor a folder; remove it from the run's directory.")


def _paths(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the keys and values that may name a place to write."""
    # These write nowhere else; what they read may lie anywhere.
    own = tuple(f"{key}." for key, group, node in _groups(config) if _target(node).startswith(_READERS[group]))
    read = {
        f"callbacks.{name}.{argument}"
        for name, entry in (config.get("callbacks") or {}).items()
        for argument in READ_BY_CALLBACKS.get(_target(entry), ())
    }
    # `init_from` is only read.
    for key, value, listed in _texts({k: v for k, v in config.items() if k not in (*COMMAND_KEYS, "init_from")}, ""):
        name = key.rsplit(".", 1)[-1]
        if key in read or (key.startswith(own) and key != "data.cache_dir"):
            continue
        is_prose = listed and name == "prompts"
        looks_like_path = not is_prose and (value.startswith(("/", "~")) or ":/" in value or ".." in Path(value).parts)
        if value and (_PATH_KEY.search(name) or looks_like_path):
            yield key, value


def _groups(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yields key, kind and content of the groups that `_READERS` names, those of `extra_ffns` among them."""
    yield from ((group, group, config.get(group)) for group in _READERS)
    extras = config.get("extra_ffns")
    for name, extra in extras.items() if isinstance(extras, Mapping) else ():
        if isinstance(extra, Mapping):
            yield f"extra_ffns.{name}.ffn", "ffn", extra.get("ffn")
            # Its tables are of the class of `table`.
            yield f"extra_ffns.{name}.table", "table", config.get("table")


def _target(node: Any) -> str:
    return str(node.get("_target_")) if isinstance(node, Mapping) else ""


def _texts(node: Any, key: str, listed: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Yields each text with its dotted key, and whether it stands in a list."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, key, listed=True)
    elif isinstance(node, str):
        yield key, node, listed


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))
