"""Overrides of a command about a saved run: Hydra applies them to the saved configuration, not to the defaults.

Each group of the saved configuration becomes an option of its group in Hydra's ConfigStore, and the command line
chooses these options before those that the user chooses. The whole grammar of overrides, its refusals and its
interpolations then hold for a saved run as they do for a new one.

The weights of `init_from` decide the architecture in the same way. An experiment describes a whole run, and a sweep has
a directory per job: both are composed from the defaults.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from pkm_lightning.cli.command_keys import GROUPS
from pkm_lightning.cli.composition_errors import SAVED, config_of_groups
from pkm_lightning.cli.paths import expanded
from pkm_lightning.errors import PkmError

#: Verbs whose `run_dir` or `ckpt` names what the command is about; `fit` has a rule of its own.
VERBS_ON_SAVED = ("validate", "test", "predict")
#: The choice of `model.base_ffn`, which a saved configuration holds under `model`.
_BASE = "ffn@model.base_ffn"
#: Group of the keys that belong to no group.
_TOP = "saved_run"
_TOP_KEYS = ("devices", "device_memory", "seed", "match", "match_budget", "init_from")
_WHOLE_RUNS = ("experiment", "debug")


def on_saved_run(verb: str, arguments: Sequence[str]) -> list[str]:
    """Returns the command line with which Hydra composes what `arguments` make of the saved run that they name.

    Where they name none, and where `fit` starts a new run, these are the arguments themselves.

    Raises:
        PkmError: an evaluation's saved configuration is missing, damaged or not trusted; `fit` itself reports these.
    """
    given = get_args_parser().parse_args(list(arguments))
    try:
        overrides = OverridesParser.create().parse_overrides(given.overrides)
    except HydraException:  # which Hydra will report
        return list(arguments)
    chosen = {override.get_key_element().lstrip("+~") for override in overrides}
    is_swept = given.multirun or any(override.is_sweep_override() for override in overrides)
    saved = None if is_swept or chosen & set(_WHOLE_RUNS) else _saved_config(verb, overrides)
    flags = [argument for argument in arguments if argument not in given.overrides]
    if saved is not None:
        fitted = (_fitted(override, saved, chosen, arguments) for override in overrides)
        return [*flags, *_choices(saved, chosen, GROUPS), *(override for override in fitted if override is not None)]
    architecture = _architecture(verb, overrides)
    if architecture is not None:
        groups = tuple(group for group in GROUPS if group in architecture)
        return [*flags, *_choices(architecture, chosen, groups), *given.overrides]
    return list(arguments)


def is_saved_choice(override: str) -> bool:
    """Returns whether `on_saved_run` has added `override`."""
    return override.partition("=")[2].startswith(SAVED)


def _saved_config(verb: str, overrides: Sequence[Override]) -> dict[str, Any] | None:
    """Returns the saved configuration that the command is about; None if there is none that is to be used."""
    if verb != "fit" and verb not in VERBS_ON_SAVED:
        return None
    values = {o.key_or_group: o.value() for o in overrides if not o.is_delete()}
    run_dir, ckpt = values.get("run_dir"), values.get("ckpt")
    if (run_dir is None) == (ckpt is None) or "${" in f"{run_dir}{ckpt}":
        return None
    place = Path(expanded("run_dir", str(run_dir)) if ckpt is None else expanded("ckpt", str(ckpt))).absolute()
    if not (place.exists() if verb != "fit" else place.is_dir() and ckpt is None):
        return None
    # These import the readers of checkpoints, for which a command that names no run need not wait.
    from pkm_lightning.cli.places import cache_of
    from pkm_lightning.cli.resume import saved_config, saved_config_of
    from pkm_lightning.cli.run_directory import continues_run

    trust, cache = values.get("trust_config") is True, cache_of({"data": {"cache_dir": values.get("data.cache_dir")}})
    if ckpt is not None:
        return saved_config_of(place, trust=trust, cache=cache)
    if verb != "fit":
        return saved_config(place, trust=trust, cache=cache)
    try:
        if not continues_run(place, str(values.get("resume", "auto"))):
            return None
        return saved_config(place, trust=trust, cache=cache)
    except PkmError:
        # One that is not trusted is only compared, with the whole command that started it.
        return None


def is_of_saved_run(override: str) -> bool:
    """Returns whether `on_saved_run` has added `override` for a run that is continued or evaluated."""
    return override.startswith(f"+{_TOP}={SAVED}")


def _architecture(verb: str, overrides: Sequence[Override]) -> dict[str, Any] | None:
    """Returns the groups that the weights of `init_from` decide; None without it, or where `fit` will refuse it."""
    values = {override.key_or_group: override.value() for override in overrides if not override.is_sweep_override()}
    place = values.get("init_from")
    if verb != "fit" or not isinstance(place, str):
        return None
    from pkm_lightning.cli.initial_weights import InitialWeights

    try:
        return InitialWeights(expanded("init_from", place), trust=values.get("trust_config") is True).architecture
    except PkmError:
        return None


def _choices(saved: Mapping[str, Any], chosen: set[str], groups: Sequence[str]) -> list[str]:
    """Stores those `groups` of `saved` that the command does not choose, and returns the overrides that choose them."""
    nodes = {group: _escaped(saved.get(group) or {}) for group in groups if group not in chosen}
    if "devices" in chosen and "trainer" in nodes:  # an alias, which the saved configuration has resolved
        nodes["trainer"]["devices"] = "${devices}"
    top = {key: _escaped(saved[key]) for key in _TOP_KEYS if key in saved}
    # A digest, so that a name has one content.
    name = SAVED + hashlib.sha256(json.dumps([nodes, top], default=str).encode()).hexdigest()[:12]
    store = ConfigStore.instance()
    _forget_earlier(store.repo)
    if "model" in nodes:
        if _BASE in chosen:
            nodes["model"].pop("base_ffn", None)
        else:
            defaults: list[Any] = ["_self_", {"override /ffn@_global_.model.base_ffn": None}]
            if "_target_" in nodes["model"] and "optim" not in nodes:  # as configs/model/hf.yaml does
                defaults.append({"override /optim@_global_.optim": "pretrained"})
            nodes["model"] = {"defaults": defaults, **nodes["model"]}
    if isinstance(nodes.get("table", {}).get("optimizer"), dict):
        # A group within a group, so that `table/optimizer=NAME` has something to override.
        store.store(name, nodes["table"].pop("optimizer"), group="table/optimizer")
        nodes["table"] = {"defaults": [{"optimizer": name}, "_self_"], **nodes["table"]}
    for group, node in nodes.items():
        store.store(name, node, group=group)
    choices = [f"{group}={name}" for group in nodes]
    if groups != GROUPS:
        return choices
    store.store(name, top, group=_TOP, package="_global_")
    return [*choices, f"+{_TOP}={name}"]


def _forget_earlier(groups: dict[str, Any]) -> None:
    """Removes the groups of earlier commands of this process: Hydra copies the whole store at each composition."""
    for name, node in list(groups.items()):
        if isinstance(node, dict):
            _forget_earlier(node)
        elif name.startswith(SAVED):
            del groups[name]


def _escaped(node: Any) -> Any:
    """Returns a copy of resolved values in which OmegaConf finds no interpolation."""
    if isinstance(node, Mapping):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_escaped(value) for value in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


def _fitted(override: Override, saved: Mapping[str, Any], chosen: set[str], arguments: Sequence[str]) -> str | None:
    """Returns the text of `override` in a form that repeats without an error what made `saved`; None to leave it out.

    Hydra refuses to add what is there and to delete what is not, which is what the first command did.
    """
    key, text = str(override.key_or_group), str(override.input_line)
    if "." not in key or key.split(".")[0] in chosen:
        return text
    exists = _holds(saved, key)
    if override.is_add() and not override.is_force_add() and exists:
        return f"+{text}"
    if override.is_delete() and not exists and _holds(config_of_groups(arguments), key):
        return None
    return text


def _holds(node: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(node, Mapping | DictConfig) or name not in node:
            return False
        node = node[name]
    return True
