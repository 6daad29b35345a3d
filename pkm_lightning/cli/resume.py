"""Saved configurations: a run resumes with the one that it started with, on other devices or shards if requested."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pkm_lightning.build.instantiate import check_trusted, target_class
from pkm_lightning.build.read_files import with_absolute_files
from pkm_lightning.build.variants import EXTRAS
from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.companions import TOKENIZER
from pkm_lightning.cli.places import check_links, check_places, with_own_cache
from pkm_lightning.compare.leaves import COMMAND_KEYS, MACHINE_KEYS, move_paths
from pkm_lightning.compare.run_files import read_yaml
from pkm_lightning.data.files import expanded
from pkm_lightning.errors import RunDirectoryError

#: Keys of devices, strategy, sharding and the machine, which a continued run may change; `devices` is an alias.
_CHANGEABLE = (
    "strategy",
    "devices",
    *MACHINE_KEYS,
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "table.shard",
    "table.group",
    "table.path",
    "table.tensor",
)
#: Keys of the command, not of the run, which a continued run obeys.
OF_COMMAND = ("resume", "trust_config", "objective", "objective_mode", "sweep_dir")
#: Likewise of the tables of a further variant.
_FILE_OF_EXTRA = re.compile(rf"{EXTRAS}\.\w+\.table\.(path|tensor)")
_ABSENT = object()
_GROUPS = ("model", "ffn", "data", "optim", "placement", "table", "trainer")
#: Of these one may be null or empty, but not absent.
_OPTIONAL_GROUPS = ("strategy", "callbacks", "logger")


def saved_config(run_dir: Path, *, trust: bool, executed: bool = True, cache: str | None = None) -> dict[str, Any]:
    """Returns the configuration in `run_dir`; where the directory has moved, paths below it are those of its new place.

    Args:
        run_dir: the run's directory.
        trust: whether the directory may name any class, and paths and links outside of it.
        executed: whether objects are made from the configuration, and not only compared to another one.
        cache: the command's `data.cache_dir`, which takes the place of one outside of an untrusted directory.

    Raises:
        RunDirectoryError: there is none, or it is not a configuration.
        ConfigError: it names classes of other packages, or writes outside of `run_dir`, and is not trusted.
    """
    file = run_dir / "config.yaml"
    try:
        config = read_yaml(file)
    except FileNotFoundError:
        raise RunDirectoryError(f"run_dir={run_dir} holds no run: {file.name} is missing there.") from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file} cannot be read ({' '.join(str(error).split())}).") from None
    check_groups(config, str(file))
    moved: dict[str, Any] = move_paths(_with_new_names(config), str(config.get("run_dir")), str(run_dir))
    moved = _with_own_tokenizer(moved, run_dir)
    if not trust:
        check_links(run_dir)
        if executed:
            check_trusted(config, str(file))
            moved = with_own_cache(moved, run_dir, cache)
            check_places(moved, str(file), run_dir, allowed=() if cache is None else (cache,))
    return {**moved, "run_dir": str(run_dir)}


def saved_config_of(checkpoint: Path, *, trust: bool, cache: str | None = None) -> dict[str, Any]:
    """Returns the configuration in a bare checkpoint, with `cache` in the place of its `data.cache_dir`.

    Raises:
        CheckpointError: it is missing, damaged, or not one of this package.
        RunDirectoryError: its configuration lacks a group.
        ConfigError: it names classes of other packages or places to write, and is not trusted.
    """
    config = open_checkpoint(checkpoint).config
    check_groups(config, str(checkpoint))
    if trust:
        return config
    check_trusted(config, str(checkpoint))
    config = with_own_cache(config, None, cache)
    # Callbacks and loggers that write do not take part in an evaluation.
    own_cache = () if cache is None else (cache,)
    check_places({key: config[key] for key in ("data", "trainer", "strategy")}, str(checkpoint), None, own_cache)
    return config


def check_groups(config: Any, source: str) -> None:
    """Refuses what is not the configuration of a run, or lacks one of its groups.

    Raises:
        RunDirectoryError: naming what is missing.
    """
    if not isinstance(config, dict) or not {"model", "ffn", "data"} <= config.keys():
        raise RunDirectoryError(f"{source} is not a configuration of this package.")
    # Most configurations have no further variants.
    for group in (*_GROUPS, *_OPTIONAL_GROUPS, *({EXTRAS, "finetune"} & config.keys())):
        value = config.get(group, _ABSENT)
        if not isinstance(value, dict) and (group in _GROUPS or value is not None):
            problem = "lacks the group" if value is _ABSENT else f"has a {type(value).__name__} in place of the group"
            raise RunDirectoryError(f"{source} {problem} {group}; restore it from another copy of the run.")


def _with_own_tokenizer(config: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Returns a saved configuration with the tokenizer that the run keeps, where the file or folder of it is gone."""
    named, own_file = config["data"].get("tokenizer"), run_dir / TOKENIZER
    if not is_missing_tokenizer(named) or not own_file.is_file():
        return config
    return {**config, "data": {**config["data"], "tokenizer": str(own_file)}}


def is_missing_tokenizer(named: object) -> bool:
    """Returns whether `named`, the value of `data.tokenizer`, is a path where nothing lies."""
    return isinstance(named, str) and named not in ("bpe", "bytes") and not expanded(named).exists()


def _with_new_names(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved configuration of an earlier version with the names of today.

    Its callback `diagnostics` was `vitals`, and its TensorBoard logger Lightning's, with which the default one of today
    has all keys in common.
    """
    callbacks, board = config.get("callbacks"), (config.get("logger") or {}).get("tensorboard")
    if isinstance(callbacks, dict) and "vitals" in callbacks:
        renamed = {"diagnostics" if key == "vitals" else key: value for key, value in callbacks.items()}
        if isinstance(renamed["diagnostics"], dict):
            renamed["diagnostics"] = {**renamed["diagnostics"], "_target_": "pkm_lightning.callbacks.Diagnostics"}
        config = {**config, "callbacks": renamed}
    if isinstance(board, dict) and board.get("_target_") == "lightning.pytorch.loggers.TensorBoardLogger":
        own = {**board, "_target_": "pkm_lightning.loggers.TensorBoardLogger"}
        config = {**config, "logger": {**config["logger"], "tensorboard": own}}
    return config


def missing_data_keys(data: Mapping[str, Any]) -> list[str]:
    """Returns the keys of a saved group `data` that its class needs and a run of an earlier version does not have."""
    parameters = inspect.signature(target_class(data, "data")).parameters.values()
    needed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return [f"data.{name}" for name in needed if name not in data]


def refuse_earlier_data(run_dir: Path, saved: Mapping[str, Any]) -> None:
    """Refuses to continue a run whose data were prepared otherwise by an earlier version.

    Raises:
        RunDirectoryError: naming a key that the run does not have, and what it can still be used for.
    """
    missing = missing_data_keys(saved["data"])
    if missing:
        raise RunDirectoryError(
            f"run_dir={run_dir} was started by an earlier version, whose data had no {missing[0]} and another order: "
            "it can be evaluated and exported, but not be continued; start a new run from its weights with "
            f"init_from={run_dir}, or continue it with that version."
        )


def without_fused(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved configuration with `table.learning=fused`, which is no longer offered, changed to `rows`.

    For runs that are only evaluated, where both are the same.
    """
    table = dict(config["table"])
    if table.get("learning") == "fused":
        table["learning"] = "rows"
    return {**config, "table": table}


def refuse_differences(run_dir: Path, saved: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuses what a continued run may not have changed.

    Raises:
        RunDirectoryError: naming the first keys that differ, with the saved and the new value.
    """
    different = differences(saved, new)
    if different:
        raise RunDirectoryError(
            f"run_dir={run_dir} holds a run with another configuration ({'; '.join(different[:5])}"
            f"{'; ...' if len(different) > 5 else ''}); leave the overrides out to continue it, choose another "
            "run_dir, or replace it with resume=never."
        )


def with_changes(saved: Mapping[str, Any], command: Mapping[str, Any], deleted: Collection[str] = ()) -> dict[str, Any]:
    """Returns `saved` with the groups and values of `command`, which is `saved` with the user's overrides on top.

    Args:
        saved, command: configurations.
        deleted: keys and groups that the command deletes, and `command` therefore lacks.
    """
    # Keys that the run was not started with are those of other verbs.
    own = {key: command[key] for key in saved if key in command and key not in COMMAND_KEYS}
    # A configuration without further variants does not have the key.
    own[EXTRAS] = command.get(EXTRAS)
    own |= keys_of_command(command)
    # An empty group is written in two ways.
    changed = {**saved, **{key: value for key, value in own.items() if value or saved.get(key)}}
    return {key: value for key, value in changed.items() if key not in deleted or not saved.get(key)}


def keys_of_command(command: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a command that apply to a continued run, whatever it was started with."""
    return {key: command.get(key) for key in OF_COMMAND}


def unresolved(saved: Mapping[str, Any], changed: Mapping[str, Any], chosen: Collection[str]) -> dict[str, Any]:
    """Returns `changed` as far as it can be compared to `saved` before it is resolved.

    A group that the command has chosen, one of `chosen`, has values that only `resolve` completes; another plugin in it
    is another run in any case.
    """
    same = {
        group
        for group in chosen
        if group in _GROUPS and group in changed and saved[group].get("_target_") == changed[group].get("_target_")
    }
    known = {key: saved[key] if key in same else value for key, value in changed.items()}
    if EXTRAS in chosen and known.get(EXTRAS):
        extras = saved.get(EXTRAS) or {}
        known[EXTRAS] = {
            name: extras[name] if _is_same_variant(extras.get(name), extra) else extra
            for name, extra in known[EXTRAS].items()
        }
    return known


def _is_same_variant(saved: Any, changed: Any) -> bool:
    return bool(saved) and saved["ffn"].get("_target_") == changed["ffn"].get("_target_")


def differences(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns `key: saved value -> new value` for each difference that a continued run may not have.

    A group that one side lacks, such as a removed callback, is one difference.
    """
    # A path is saved as an absolute one, and may be repeated as it was typed.
    sides = with_absolute_files(dict(saved)), with_absolute_files(dict(new))
    return [f"{key}: {_shown(left)} -> {_shown(right)}" for key, left, right in _differing(*sides, "")]


def _differing(saved: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if path and (path.split(".")[0] in COMMAND_KEYS or may_change_on_resume(path)):
        return
    if isinstance(saved, Mapping) and isinstance(new, Mapping):
        targets = saved.get("_target_"), new.get("_target_")
        if path in _GROUPS and targets[0] != targets[1]:  # another plugin: its keys are others, too
            yield path, *targets
            return
        for key in {**saved, **new}:
            # A run of an earlier version lacks the options that its classes have got since.
            if key in saved or not _is_default(new, key):
                yield from _differing(saved.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}".lstrip("."))
    elif saved != new:
        yield path, saved, new


def _is_default(arguments: Mapping[str, Any], name: str) -> bool:
    """Returns whether a configuration without `name` means the same.

    So does one whose constructor would take the same value, and of a group without a constructor an empty value.
    """
    if "_target_" not in arguments:
        return arguments[name] in (None, [], {})
    if str(name).startswith("_") and name != "_target_":  # of `match=`, which has been solved
        return True
    parameter = inspect.signature(target_class(arguments, name)).parameters.get(name)
    if parameter is None:  # a key of the builder
        return arguments[name] is None
    return bool(parameter.default == arguments[name])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("_target_", "{...}"))
    return "(absent)" if value is _ABSENT else str(value)


def may_change_on_resume(key: str) -> bool:
    """Returns whether `key`, as on a command line, is one that a continued run may change."""
    return _changeable_key(key) is not None


def _changeable_key(key: str) -> str | None:
    path = key.lstrip("+~").split("@")[0].replace("/", ".")
    of_extra = _FILE_OF_EXTRA.fullmatch(path)
    if of_extra:
        return of_extra[0]
    return next((known for known in _CHANGEABLE if path == known or path.startswith(f"{known}.")), None)


def with_machine_overrides(saved: Mapping[str, Any], new: Mapping[str, Any], changed: Iterable[str]) -> dict[str, Any]:
    """Returns `saved` with those of the `changed` keys that a continued run may change as in `new`."""
    changed_config = copy.deepcopy(dict(saved))
    for key in changed:
        group, *names = (_changeable_key(key) or "").split(".")
        if names:
            source, target = new[group], changed_config.setdefault(group, {})
            for name in names[:-1]:
                source, target = source[name], target[name]
            target[names[-1]] = source[names[-1]]
        elif group in new:
            changed_config[group] = new[group]
            if group == "devices":
                changed_config["trainer"]["devices"] = new["trainer"]["devices"]
    return changed_config
