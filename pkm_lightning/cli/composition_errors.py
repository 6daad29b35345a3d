"""Hydra's and OmegaConf's errors in one line, with the allowed values and the nearest spelling."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

import pkm_lightning.configs
from pkm_lightning.build.keys import NESTED_GROUPS, NONE_OF
from pkm_lightning.build.variants import EXTRAS
from pkm_lightning.cli.command_keys import GROUPS, VERBS_OF
from pkm_lightning.compare.overrides import key_of, quoted
from pkm_lightning.errors import nearest

#: How the names of stored groups of a saved run begin; see `pkm_lightning.cli.saved_overrides`.
SAVED = "saved_"
_NOT_OVERRIDDEN = re.compile(r"Could not override '([^']+)'")
#: Groups of which a command may choose several options.
_GROUPS_OF_LISTS = ("callbacks", "logger", EXTRAS)
#: Last parts of keys as PEFT and other verbs name them.
_OTHER_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "prompt": "text",
    "prompts_file": "texts_file",
    "text": "prompt",
    "texts_file": "prompts_file",
}
#: What `data=` of `prepare` alone writes is used in other ways.
_PREPARED = {
    "invented": (
        "`prepare data=invented out=FOLDER` writes it, and data=jsonl data.path=FOLDER/train.jsonl trains on it."
    ),
    "benchmarks": "`prepare data=benchmarks out=FOLDER` writes it, and `evaluate tasks_dir=FOLDER` asks it.",
}
#: As many keys are listed where one of them is probably meant.
_FEW = 12
_SWEEP = re.compile(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'")


def explain(error: BaseException, arguments: Sequence[str] = (), name: str = "config") -> str:
    """Returns one sentence for `error`, which the overrides `arguments` of the configuration `name` led to."""
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        # The groups of a saved run, which the command line chooses by itself, are no options.
        options = [choice for choice in error.options if not choice.startswith(SAVED)]
        if group.startswith("hydra/"):
            return _missing_plugin(group, option, options)
        return _unknown_option(group, option, options)
    if isinstance(error, MissingConfigException) and "/" in str(error.missing_cfg_file):
        # One of a list, whose options Hydra does not name.
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return _unknown_option(group, option, sorted(options_of(group)))
    if ambiguous := _SWEEP.search(str(error)):
        return _several_values(ambiguous.group(1))
    if isinstance(error, ConfigCompositionException):
        unknown = _NOT_OVERRIDDEN.search(str(error))
        if unknown:
            return _unknown_key(unknown.group(1), arguments, name)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, InterpolationResolutionError) and error.full_key:
        reason = " ".join(str(error.msg).split())
        return f"{error.full_key} refers to a key that is missing ({reason}); set that key, or do not delete it with ~."
    if isinstance(error, BrokenPipeError):
        return "what read the output closed it before all was written; read it to its end, or write it to out=FILE."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another path or free the disk."
    return " ".join((str(error) or str(error.__cause__ or "")).split()) or type(error).__name__


def explain_composition(error: BaseException, arguments: Sequence[str]) -> str:
    """Returns one sentence for an `error` of Hydra's that does not name which of `arguments` led to it."""
    choices = [argument for argument in arguments if "." not in argument.split("=")[0] or "@" in argument]
    null = next((a for a in choices if a.endswith("=null") and key_of(a).split("@")[0] in GROUPS), None)
    if null and "must be a string or a list" in str(error):
        group = key_of(null)
        none = {EXTRAS: "[]", **NONE_OF}.get(group)
        return f"{null}: a group takes the name of an option; write {group}={none or 'NAME'}, or leave it out."
    return f"{' '.join(choices)}: does not compose ({explain(error)})."


def _several_values(override: str) -> str:
    key, _, value = override.partition("=")
    # Of most groups one option is chosen; range(1,3) stands for nothing but a sweep.
    chosen_once = key in GROUPS and key not in _GROUPS_OF_LISTS
    if chosen_once or "(" in value:
        return f"{override} is several values; choose one, or sweep them with fit -m."
    as_list, as_text = f"{key}=[{value}]", f'"{key}={quoted(value)}"'
    meanings = f"{as_list} if a list is meant" + ("" if key in GROUPS else f", {as_text} if a text")
    return f"{override} is several values; write {meanings}, or sweep them with fit -m."


def _unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    if group == "data" and option in _PREPARED:
        return f"data={option} is for prepare: {_PREPARED[option]}"
    allowed = f"{', '.join(options)}.{nearest(option, options)}"
    return f"{group}={option} is not known; allowed: {allowed} --config-dir=DIR adds a folder of your own YAMLs."


def _missing_plugin(group: str, option: str, options: Sequence[str]) -> str:
    """Returns the sentence for an option of Hydra that a plugin would bring, such as another sweeper."""
    install = {
        "optuna": "pip install 'pkm_lightning[sweeps]'",
        "tpe": "pip install 'pkm_lightning[sweeps]'",
    }.get(option, f"install the plugin of Hydra that has it, or choose one of: {', '.join(options)}")
    return f"{group}={option} is not installed; {install}."


def options_of(group: str) -> dict[str, Any]:
    """Returns the content of the package's YAMLs of a group, by their names."""
    files = (Path(pkm_lightning.configs.__file__).parent / group).glob("*.yaml")
    contents = {file.stem: OmegaConf.to_container(OmegaConf.load(file), resolve=False) for file in files}
    # A file of the package _global_ has the group as a key, beside those of other groups.
    return {name: content.get(group, content) for name, content in contents.items() if isinstance(content, dict)}


def _unreadable(override: str) -> str:
    """Returns the sentence for an argument that Hydra's grammar does not allow, with the quoted form that it does."""
    key, separator, value = override.partition("=")
    if not separator or not key.strip("+~"):
        return f"{override!r} is not an override; write KEY=VALUE, or ~KEY to delete one."
    quoted_value = quoted(value)
    if value.startswith("[") and value.endswith("]"):
        items = [item.strip().strip("'\"") for item in value[1:-1].split(",")]
        quoted_value = f"[{','.join(map(quoted, items))}]"
    suggestion = f"{key}={quoted_value}"
    try:
        OverridesParser.create().parse_override(suggestion)
    except HydraException:
        return f"{override}: this value cannot be read; quote the texts in it."
    # A shell keeps single quotes only within double ones.
    shown = f'"{suggestion}"' if not set('"$`\\!') & set(suggestion) else shlex.quote(suggestion)
    return f"{override}: the value of {key} has characters that need quotes; write {shown}."


def _unknown_key(key: str, arguments: Sequence[str], name: str) -> str:
    other = _OTHER_NAMES.get(key)
    if other and name in VERBS_OF.get(other, ()):
        return f"{key} is a key of {', '.join(VERBS_OF[key])} only; write {other}=VALUE."
    if key in VERBS_OF:
        return f"{key} is a key of {', '.join(VERBS_OF[key])} only; leave it out."
    known = sorted({*_keys(config_of_groups(arguments, name), ""), *NESTED_GROUPS.values()})
    group, *path = key.split(".")
    if group == EXTRAS and path and f"{group}.{path[0]}" not in known:
        return f"{key}: the command has no variant {path[0]}; extra_ffns={path[0]} chooses it, [NAME,NAME] several."
    parent, _, leaf = key.rpartition(".")
    if parent and leaf in GROUPS:
        return f"{key} is not a key of the configuration; {leaf} is a group of its own: write {leaf}=NAME."
    if "/" in key and key.replace("/", ".") in known:
        return f"{key} is not a group; write {key.replace('/', '.')}=VALUE."
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    leaves = [k.rpartition(".")[2] for k in siblings]
    if parent and _OTHER_NAMES.get(leaf) in leaves:
        return f"{key} is not a key of the configuration; write {parent}.{_OTHER_NAMES[leaf]}=VALUE."
    # Keys of the same group begin alike, and would be near to any.
    elsewhere = [k for k in known if parent not in known or k.rpartition(".")[2] == leaf]
    hint = nearest(leaf, leaves) or nearest(key, elsewhere)
    where = f"{parent} has" if parent else "the configuration has"
    names = ", ".join(leaves)
    allowed = f" {where}: {names}." if names and not (hint and len(leaves) > _FEW) else ""
    if names == "_target_":
        return (
            f"{key} is not a key of the configuration; +{key}=VALUE would add one, for an argument of the class in "
            f"{parent}._target_."
        )
    chosen = NESTED_GROUPS.get(parent, parent)
    options = options_of(chosen.partition("@")[0]) if parent else {}
    if others := sorted(option for option, content in options.items() if leaf in content):
        names = " or ".join(others)
        return (
            f"{key} is not a key of the configuration, but of {chosen}={names}; choose that, or leave it out.{allowed}"
        )
    return f"{key} is not a key of the configuration; +{key}=VALUE would add one.{hint}{allowed}"


def config_of_groups(arguments: Sequence[str], name: str = "config") -> DictConfig:
    """Composes the groups that `arguments` choose, or the default ones where those do not compose."""
    choices = [a for a in arguments if not a.startswith(("-", "hydra")) and "=" in a and "." not in key_of(a)]
    GlobalHydra.instance().clear()
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        try:
            return compose(name, overrides=choices)
        except HydraException:
            return compose(name)


def _keys(node: object, path: str) -> Iterator[str]:
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, Mapping):
        for name, value in node.items():
            where = f"{path}.{name}" if path else str(name)
            yield where
            yield from _keys(value, where)
