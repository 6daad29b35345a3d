"""From a resolved configuration to a model: plugins in their layers, and the value tables that they share or own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pkm_lightning.build.freezing import freeze_parameters
from pkm_lightning.build.instantiate import accepted_keywords, instantiate, target_class
from pkm_lightning.build.stored_tables import table_keywords
from pkm_lightning.capacity.setting import PRECISIONS, precision_name
from pkm_lightning.errors import ConfigError, check_flag, check_integer, check_range, nearest
from pkm_lightning.ffn import TableSpec
from pkm_lightning.memory import TableMesh, ValueTable
from pkm_lightning.model import Placement, Transformer
from pkm_lightning.model.plugin_checks import CONTRACT, called, check_plugins

Config = Mapping[str, Any]

#: Keys of `model` that the transformer does not take as they stand.
_BUILDER_KEYS = ("n_layers", "base_ffn", "ffn_dim", "memory", "compile")
#: Facts about a trunk with a `_target_`, which `complete` found in its files.
_FACTS = ("dim", "vocab_size", "tokenizer_digest")
#: Arguments of the transformer that are built here, and are not keys of `model`.
_BUILT_ARGUMENTS = {"ffns", "tables", "write_after"}
#: Keys of `table` that a `ValueTable` does not take.
_TABLE_BUILDER_KEYS = ("shared", "optimizer", "shard", "group", "trainable", "path", "tensor")


def build_model(config: Config, table_mesh: TableMesh | None = None) -> Transformer:
    """Builds the transformer of `config`, whose `model.vocab_size` is a number.

    It is allocated on the device of the current `torch.device` context (`meta` allocates nothing); of a sharded table,
    only this rank's shard is allocated.

    Raises:
        ConfigError: sizes, layers or classes that do not fit.
    """
    model = config["model"]
    # A configuration of the model alone, as an exported folder holds it, has no keys of training.
    frozen = (config.get("optim") or {}).get("freeze") or ()
    if "_target_" in model:
        trunk = _build_trunk(model)
        freeze_parameters(trunk, frozen)
        return trunk
    check_integer("model.n_layers", model["n_layers"], low=1)
    check_integer("model.dim", model["dim"], low=1)
    n_layers = int(model["n_layers"])
    if not isinstance(model["vocab_size"], int):
        raise ConfigError(
            f"model.vocab_size={model['vocab_size']} needs a data module with a vocab_size; set it to a number."
        )
    placement: Placement = instantiate(config["placement"], "placement")
    placed, write_after = placement.resolve(n_layers), placement.delay(n_layers)
    tables = _build_tables(config, len(placed), table_mesh)
    ffns: list[nn.Module] = []
    for layer in range(n_layers):
        common = {"dim": int(model["dim"]), "layer": layer, "n_layers": n_layers}
        if layer not in placed:
            ffns.append(instantiate(model["base_ffn"], "model.base_ffn", **common))
            continue
        variant = instantiate(config["ffn"], "ffn", **common, **_tables_of(tables, placed.index(layer)))
        base = (
            instantiate(model["base_ffn"], "model.base_ffn", **common)
            if placement.mode == "parallel"
            else nn.Identity()
        )
        ffns.append(placement.combine(base, variant, defer=write_after > 0))
    arguments = {str(name): value for name, value in model.items() if name not in _BUILDER_KEYS}
    unknown = arguments.keys() - (inspect.signature(Transformer).parameters.keys() - _BUILT_ARGUMENTS)
    if unknown:
        raise ConfigError(
            f"model.{min(unknown)} is not a key of model; remove it.{nearest(min(unknown), model.keys() - unknown)}"
        )
    flat = [table for group in tables for table in group]
    transformer = Transformer(**arguments, ffns=ffns, tables=flat, write_after=write_after)
    freeze_parameters(transformer, frozen)
    return transformer


def complete_trunk(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `config` with what the files of a trunk that `model._target_` names say about it.

    Raises:
        PkmError: files that are missing, damaged or not of such a model.
    """
    model = config.get("model")
    if not isinstance(model, Mapping) or "_target_" not in model:
        return config
    complete = getattr(target_class(model, "model"), "complete", None)
    return config if complete is None else complete(config)


def _build_trunk(model: Config) -> Transformer:
    """Builds the trunk that `model._target_` names, which has the interface of `pkm_lightning.model.Trunk`."""
    # By keyword and not in the configuration, since Hydra would make objects of a `_target_` in a foreign file.
    built = {name: model[name] for name in ("architecture",) if name in model}
    keys = {name: value for name, value in model.items() if name not in (*_FACTS, *_BUILDER_KEYS, *built)}
    trunk: Transformer = instantiate(keys, "model", **built)
    return trunk


def build_meta_model(config: Config) -> Transformer:
    """Builds the same model on the meta device, in the dtype that the Trainer would give it: shapes without memory."""
    with weight_dtype(config), torch.device("meta"):
        return build_model(config)


def check_foreign_plugins(model: Transformer, config: Config) -> None:
    """Refuses plugins from outside the package that break their contract; see `check_plugins`.

    Raises:
        ConfigError: naming the plugin and what the contract asks for.
    """
    with weight_dtype(config):
        check_plugins((plugin for _, _, plugin in model.plugins()), int(config["model"]["dim"]))


@contextlib.contextmanager
def weight_dtype(config: Config) -> Iterator[None]:
    """Makes weights within the block in the dtype that the Trainer would give them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(PRECISIONS[precision_name(config["trainer"]["precision"])])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tables_of(groups: list[list[ValueTable]], place: int) -> dict[str, ValueTable | list[ValueTable]]:
    """Returns the keyword `table` of the plugin at `place` among the placed layers: one table, a list, or nothing."""
    if not groups:
        return {}
    group = groups[place % len(groups)]
    return {"table": group[0] if len(group) == 1 else group}


def placed_layers(config: Config) -> list[int]:
    """Returns the numbers of the layers that carry the variant."""
    placement: Placement = instantiate(config["placement"], "placement")
    return placement.resolve(int(config["model"]["n_layers"]))


def attention_context(config: Config) -> int:
    """Returns the tokens in attention for cost figures: `data.seq_len`, or 1 if the data has no such key."""
    return int(config["data"].get("seq_len") or 1)


def _build_tables(config: Config, n_placed: int, mesh: TableMesh | None) -> list[list[ValueTable]]:
    """Builds one group of tables for all layers if `table.shared`, else one per placed layer; none if not needed.

    A plugin needs tables if its constructor takes the keyword `table`.
    """
    cls = target_class(config["ffn"], "ffn")
    if "table" not in accepted_keywords(cls, {"table": None}) or not n_placed:
        return []
    arguments = {str(k): v for k, v in config["ffn"].items() if not str(k).startswith("_")}
    if not hasattr(cls, "table_spec"):
        raise ConfigError(
            f"ffn._target_={config['ffn']['_target_']} takes a table, but has no class method "
            "table_spec(**arguments) that returns its rows and dim."
        )
    sizes = {"dim": int(config["model"]["dim"]), "n_layers": int(config["model"]["n_layers"])}
    parameters = inspect.signature(cls.table_spec).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        sizes = {name: value for name, value in sizes.items() if name in parameters}
    spec = _checked_spec(f"{config['ffn']['_target_']}.table_spec", cls.table_spec, {**sizes, **arguments})
    check_flag("table.shared", config["table"]["shared"])
    settings = {name: value for name, value in config["table"].items() if name not in _TABLE_BUILDER_KEYS}
    shape: dict[str, Any] = {"rows": spec.rows, "dim": spec.dim, "std": spec.std}
    # Every rank reads a file for itself.
    if mesh is not None and config["table"].get("device") != "mmap":
        shape["mesh"] = mesh
    if spec.slices > 1:
        shape["slices"] = spec.slices
    groups = 1 if config["table"]["shared"] else n_placed
    own = [table_keywords(config["table"], spec, n, groups * spec.count) for n in range(groups * spec.count)]
    tables = [instantiate(settings, "table", **shape, **keywords) for keywords in own]
    return [tables[first : first + spec.count] for first in range(0, len(tables), spec.count)]


def _checked_spec(name: str, table_spec: Callable[..., Any], arguments: dict[str, Any]) -> TableSpec:
    """Returns the tables that a plugin requests; refuses a method that raises, and what is no `TableSpec` of sizes."""
    spec = called(name, table_spec, **arguments)
    if not isinstance(spec, TableSpec):
        raise ConfigError(f"{name} returned {spec!r:.60}; it returns a TableSpec(rows=, dim=) ({CONTRACT}).")
    for size in ("rows", "dim", "count", "slices"):
        check_integer(f"{name}(...).{size}", getattr(spec, size), low=1)
    if spec.std is not None:
        check_range(f"{name}(...).std", spec.std, 0)
    check_flag(f"{name}(...).trainable", spec.trainable)
    return spec
