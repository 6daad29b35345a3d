"""The one place where a configuration becomes objects: which classes it may name, and errors for what cannot be built.

The command line and `--config-dir` are trusted. A configuration read back from a run directory or a checkpoint is data:
it may only name classes of this package, and of lightning and torch only the kinds that a configuration is made of,
unless the user sets `trust_config=true`.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from pkm_lightning.build.finetuning_method import FinetuningMethod
from pkm_lightning.build.kinds import check_kinds
from pkm_lightning.errors import ConfigError, PkmError
from pkm_lightning.memory import RowOptimizer
from pkm_lightning.model.placement import Placement
from pkm_lightning.model.plugin_checks import called

_TRUSTED_ROOTS = ("pkm_lightning", "lightning", "torch")
# Not every class of torch is harmless to construct: torch.distributed.elastic's SubprocessHandler starts a program.
_TRUSTED_KINDS = (
    nn.Module,
    Optimizer,
    Placement,
    L.Trainer,
    L.Callback,
    L.LightningDataModule,
    Logger,
    Strategy,
    Profiler,
    RowOptimizer,
    FinetuningMethod,
)


def instantiate(config: Mapping[str, Any] | DictConfig, key: str, **keywords: Any) -> Any:
    """Builds the object that `config` describes by `_target_` and keywords; errors name `key`, its place.

    Of `keywords` only those are passed that the constructor names (or that its `**kwargs` would take).

    Raises:
        ConfigError: no `_target_`, a class that cannot be imported, or arguments that it does not take.
    """
    cls = target_class(config, key)
    accepted = accepted_keywords(cls, keywords)
    plain_config: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    _check_names(cls, plain_config, accepted, key)
    check_kinds(cls, plain_config, key)
    plain = {name: value for name, value in config.items() if not str(name).startswith("_") or name in _HYDRA_KEYS}
    try:
        # Partial first: Hydra deep-copies the arguments that it is given, and a value table must stay one object.
        make = hydra_instantiate({"_convert_": "all", "_partial_": True, **plain})
    except InstantiationException as error:
        if isinstance(error.__cause__, PkmError):
            raise error.__cause__ from None
        raise
    # An error inside our own or Lightning's classes is a defect or already explained: its traceback is of use.
    is_foreign = cls.__module__.partition(".")[0] not in _TRUSTED_ROOTS
    return called(f"{key}: the constructor of {cls.__name__}", make, **accepted) if is_foreign else make(**accepted)


def check_kind(value: object, kind: type, config: Mapping[str, Any] | DictConfig, key: str) -> None:
    """Refuses an object of `config` that is not a `kind`.

    Raises:
        ConfigError: naming the key, the class and what is due there.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{key}._target_={config['_target_']} is not a {kind.__module__}.{kind.__qualname__}.")


def check_keywords(config: Mapping[str, Any], key: str, built: Iterable[str] = ()) -> None:
    """Refuses keywords that the class of `config._target_` does not take or that it lacks, and values of a wrong kind.

    Nothing is constructed; the builder will pass those of the keywords `built` that the class takes.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    cls = target_class(config, key)
    _check_names(cls, config, accepted_keywords(cls, dict.fromkeys(built)), key)
    check_kinds(cls, config, key)


def _check_names(cls: type, config: Mapping[str, Any], keywords: Mapping[str, Any], key: str) -> None:
    for where, _ in _values_of("_args_", config, key):
        raise ConfigError(f"{where} would pass arguments by position; write each of them under its name.")
    configured = {str(name): None for name in config if not str(name).startswith("_")}
    for name in configured.keys() & keywords.keys():
        raise ConfigError(f"{key}.{name} follows from the rest of the configuration; remove it.")
    signature = inspect.signature(cls)
    try:
        signature.bind(**{**configured, **keywords})
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise ConfigError(f"{key}: {cls.__name__} {error}; it takes: {names}.") from None


_HYDRA_KEYS = ("_target_", "_convert_", "_recursive_")


def target_class(config: Mapping[str, Any] | DictConfig, key: str) -> type:
    """Returns the class that `config._target_` names.

    Raises:
        ConfigError: it is missing, cannot be imported, or is no class whose arguments can be read.
    """
    missing = isinstance(config, DictConfig) and OmegaConf.is_missing(config, "_target_")
    if missing or not config.get("_target_"):
        raise ConfigError(f"{key}._target_ is not set; name your class, as in {key}._target_=my_module.MyClass.")
    target = str(config["_target_"])
    try:
        cls = pkgutil.resolve_name(target)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{key}._target_={target} cannot be imported ({reason}); its file must lie on the import path or in the "
            "working directory."
        ) from None
    if not isinstance(cls, type):
        raise ConfigError(f"{key}._target_={target} is not a class.")
    try:
        inspect.signature(cls)
    except (TypeError, ValueError):  # classes of C
        raise ConfigError(f"{key}._target_={target} does not declare what it takes; name a class of Python.") from None
    return cls


def accepted_keywords(cls: type, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Selects those of `keywords` that the constructor of `cls` names or takes through `**kwargs`."""
    if not any("__init__" in vars(base) for base in cls.__mro__[:-1] if base is not nn.Module):
        # The class defines no constructor: nn.Module's takes **kwargs only to refuse them.
        return {}
    parameters = inspect.signature(cls).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(keywords)
    names = {p.name for p in parameters}
    return {name: value for name, value in keywords.items() if name in names}


def check_trusted(
    config: Mapping[str, Any], source: str, remedy: str = "repeat the command with trust_config=true"
) -> None:
    """Refuses a configuration read back from `source` that names anything but trusted classes.

    Args:
        config: a configuration or a part of one.
        source: where it was read from, for the error.
        remedy: what someone who trusts it does, for the error.

    Raises:
        ConfigError: naming the offending key and target, and how to trust it.
    """
    if any("${" in text for text in _texts(config)):
        raise ConfigError(
            f"{source} holds an interpolation, ${{...}}; saved configurations are resolved: write a value."
        )
    # By position an argument has no name, by which a path would be recognised as one.
    for key, _ in _values_of("_args_", config, ""):
        raise ConfigError(f"{source} holds {key}, arguments by position; write each of them under its name.")
    targets = ((key, str(value)) for key, value in _values_of("_target_", config, "") if value is not None)
    for key, target in targets:
        try:
            trusted = target.split(".")[0] in _TRUSTED_ROOTS and _is_trusted_class(target)
        except Exception:  # an import that fails for any reason is not trusted either
            trusted = False
        if not trusted:
            raise ConfigError(
                f"{source} names {key}={target}, code that a saved configuration may not run unasked (allowed: classes "
                f"of pkm_lightning, lightning and torch of the kinds {', '.join(k.__name__ for k in _TRUSTED_KINDS)}); "
                f"if it is yours, {remedy}."
            )


def _is_trusted_class(target: str) -> bool:
    # The class must be defined there too: a trusted module may have imported subprocess.Popen, for example.
    cls = pkgutil.resolve_name(target)
    if not isinstance(cls, type):
        return False
    return cls.__module__.split(".")[0] in _TRUSTED_ROOTS and issubclass(cls, _TRUSTED_KINDS)


def _texts(node: Any) -> Iterator[str]:
    """Yields all keys and values as texts, one after another: together they may be larger than the memory."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value)
    else:
        yield str(node)


def _values_of(name: str, node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields the dotted place and the value of each key `name`, at any depth."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            if key == name:
                yield where, value
            else:
                yield from _values_of(name, value, where)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _values_of(name, value, f"{path}[{i}]")
