"""Every key of a configuration: those that no class declares, and the ranges of those that a foreign class declares.

The keys of a class are its constructor's: kinds come from its annotations, ranges from its own checks. A new plugin
needs nothing here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from pkm_lightning.build.instantiate import accepted_keywords, check_keywords, target_class
from pkm_lightning.build.kinds import Range, check_kind
from pkm_lightning.build.variants import EXTRAS, MAIN, table_of
from pkm_lightning.errors import ConfigError, nearest
from pkm_lightning.ffn import Dense

_NAME = re.compile("[A-Za-z][A-Za-z0-9_]*")
Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]
# Layers and ranks are gone through one by one, so that a number beyond all that exist would take hours to refuse.
Layers = Annotated[int, Range(1, 4096)]
Size = Annotated[int, Range(1, 2**24)]
Processes = Literal[-1] | Annotated[int, Range(1, 2**16)]
_LARGEST_WORLD = 2**20
#: What a command line writes for none of a group, instead of deleting it.
NONE_OF = {"callbacks": "none", "logger": "none", "strategy": "single"}
#: Groups within another one: the key of what they choose, and the name by which a command line chooses it.
NESTED_GROUPS = {"table.optimizer": "table/optimizer", "model.base_ffn": "ffn@model.base_ffn"}
#: Keys of the trainer whose values may follow from the data.
_AUTO = (("max_steps", "auto"), ("val_check_interval", "auto"))
#: Arguments that the builder passes.
_BUILT = {
    "ffn": ("dim", "layer", "n_layers", "vocab_size", "table", "table_number", "table_reader"),
    "model.base_ffn": ("dim", "layer", "n_layers", "vocab_size"),
    "table": ("rows", "dim"),
    "optim.optimizer": ("params",),
}


class MemoryKeys(TypedDict):
    """`model.memory`: sizes that the YAMLs of memory plugins refer to."""

    n_keys: Count
    heads: Count
    knn: Count
    key_dim: Count


class ModelKeys(TypedDict):
    """`model`, whose other keys `Transformer` takes."""

    dim: Size
    n_layers: Layers
    n_heads: Size
    n_kv_heads: Size
    ffn_dim: NotRequired[Size]
    vocab_size: int | str
    rope_theta: Annotated[float, Range(1)]
    norm_eps: Share
    tied: bool
    document_mask: bool
    reset_positions: bool
    compile: bool
    activation_checkpointing: bool
    base_ffn: dict[str, Any]
    memory: NotRequired[MemoryKeys]


class TrunkKeys(TypedDict):
    """`model` with a `_target_`, whose other keys that class takes."""

    dim: Size
    n_layers: Layers
    vocab_size: int
    compile: bool
    activation_checkpointing: bool
    memory: NotRequired[MemoryKeys]


class OptimizerKeys(TypedDict, total=False):
    """`optim.optimizer`: what the arguments of torch's optimizers mean."""

    betas: list[Annotated[float, Range(0, 1 - 1e-9)]]
    eps: NotNegative | list[NotNegative | None]  # Adafactor takes two
    momentum: Share
    lr: NotNegative
    weight_decay: NotNegative


class OptimKeys(TypedDict):
    """`optim`."""

    optimizer: OptimizerKeys
    lr: NotNegative
    weight_decay: NotNegative
    table_lr_factor: NotNegative
    key_lr_factor: NotRequired[NotNegative]
    table_weight_decay: NotNegative
    clip_norm: NotNegative | None
    table_clip_norm: NotNegative | None
    schedule: Literal["cosine", "linear", "wsd"]
    warmup_share: Share
    warmup_steps: NotRequired[Annotated[int, Range(0)] | None]
    final_factor: Share
    decay_share: Share
    freeze: NotRequired[list[str] | None]


class TrainerKeys(TypedDict):
    """`trainer`: the arguments of Lightning's Trainer that have a range, or that the package reads itself."""

    accelerator: str
    devices: Processes | str | list[int]
    num_nodes: Annotated[int, Range(1, 2**16)]
    precision: (
        Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true", "16-true"]
        | Literal["32", "16", "bf16", "64", 32, 16, 64]
    )
    max_steps: Count | Literal["auto"]
    max_epochs: NotRequired[Literal[-1] | Count | None]
    min_steps: NotRequired[Annotated[int, Range(0)] | None]
    min_epochs: NotRequired[Annotated[int, Range(0)] | None]
    accumulate_grad_batches: Count
    val_check_interval: Annotated[int, Range(1)] | Annotated[float, Range(1e-9, 1)] | str | dict[str, int]
    check_val_every_n_epoch: NotRequired[Count | None]
    log_every_n_steps: Count
    num_sanity_val_steps: NotRequired[Annotated[int, Range(-1)]]
    gradient_clip_val: NotRequired[NotNegative | None]


class StrategyKeys(TypedDict, total=False):
    """`strategy`: DeepSpeed's stage, and what Lightning passes on to torch's DistributedDataParallel without a look."""

    stage: Annotated[int, Range(1, 3)]
    gradient_as_bucket_view: bool
    broadcast_buffers: bool
    find_unused_parameters: bool
    static_graph: bool


class TableKeys(TypedDict):
    """`table`, whose other keys `ValueTable` takes."""

    shared: bool
    trainable: NotRequired[bool]
    path: NotRequired[str | None]
    tensor: NotRequired[str | list[str] | None]
    optimizer: NotRequired[dict[str, Any]]
    shard: NotRequired[str]
    group: NotRequired[int | str]


class ExtraTableKeys(TypedDict, total=False):
    """The keys of `table` that an entry of `extra_ffns` has of its own."""

    shared: bool
    trainable: bool
    device: str | None
    path: str | None
    tensor: str | list[str] | None


class ExtraKeys(TypedDict):
    """An entry of `extra_ffns`."""

    ffn: dict[str, Any]
    placement: dict[str, Any]
    table: NotRequired[ExtraTableKeys]


class RunKeys(TypedDict):
    """A whole configuration; `model` is that of our transformer or of another trunk."""

    model: dict[str, Any]
    ffn: dict[str, Any]
    placement: dict[str, Any]
    table: TableKeys
    extra_ffns: NotRequired[dict[str, ExtraKeys] | None]
    data: dict[str, Any]
    optim: OptimKeys
    finetune: NotRequired[dict[str, Any] | None]
    strategy: StrategyKeys | None
    trainer: TrainerKeys
    callbacks: dict[str, dict[str, Any] | None] | None
    logger: dict[str, dict[str, Any] | None] | None
    devices: NotRequired[Processes | str | list[int]]
    device_memory: NotRequired[NotNegative | None]
    seed: Annotated[int, Range(0, 2**32 - 1)]
    match: Literal["none", "flops", "params"]
    match_budget: Annotated[float, Range(1)] | None
    init_from: NotRequired[str | None]
    run_dir: str
    resume: NotRequired[Literal["auto", "always", "never"]]
    ckpt: NotRequired[str | None]
    trust_config: NotRequired[bool]
    format: NotRequired[Literal["text", "json", "safetensors", "hf", "ngram"] | None]
    out: NotRequired[str | None]


def check_keys(config: Mapping[str, Any], *, training: bool) -> None:
    """Refuses a value of a wrong kind or out of range, a missing key, and a keyword that a class does not take.

    Nothing is constructed. Without `training` the callbacks and loggers, which then have no effect, are left out.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    for group, option in NONE_OF.items():
        if group not in config:
            raise ConfigError(f"{group} is missing; write {group}={option} for none, or do not delete it with ~.")
    _check_groups(config)
    check_kind("", config, RunKeys)
    check_kind("model", config["model"], TrunkKeys if "_target_" in config["model"] else ModelKeys)
    unknown = sorted(set(config["optim"]) - set(OptimKeys.__annotations__))
    if unknown:
        raise ConfigError(
            f"optim.{unknown[0]} is not a key of optim; remove it.{nearest(unknown[0], OptimKeys.__annotations__)}"
        )
    for name, extra in (config.get(EXTRAS) or {}).items():
        _check_extra(name, extra)
    _check_base(config["model"].get("base_ffn"))
    for key, described in _described_objects(config, training=training):
        if described:
            kind = key.rpartition(".")[2] if key.startswith(f"{EXTRAS}.") else key
            check_keywords(described, key, built=_BUILT.get(kind, ()))
    trainer = config["trainer"]
    if isinstance(trainer["devices"], int) and trainer["devices"] * trainer["num_nodes"] > _LARGEST_WORLD:
        raise ConfigError(
            f"trainer.devices={trainer['devices']} on trainer.num_nodes={trainer['num_nodes']} nodes are more than "
            f"{_LARGEST_WORLD:,} processes; set fewer."
        )


def _check_groups(config: Mapping[str, Any]) -> None:
    """Refuses the name of an option at a key of a group within another one, which a command line chooses otherwise."""
    groups = dict(NESTED_GROUPS)
    extras = config.get(EXTRAS)
    for name, extra in extras.items() if isinstance(extras, Mapping) else ():
        if isinstance(extra, str):
            raise ConfigError(
                f"{EXTRAS}.{name}={extra} is no option of a group; write {EXTRAS}={name} for the variant, and set its "
                f"keys, as in {EXTRAS}.{name}.placement.layers=[1]."
            )
        groups |= {f"{EXTRAS}.{name}.{group}": f"{group}@{EXTRAS}.{name}.{group}" for group in ("ffn", "placement")}
    for key, group in groups.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str):
            raise ConfigError(f"{key}={value} names an option of a group; write {group}={value}.")


def _check_base(base: Mapping[str, Any] | None) -> None:
    """Refuses another class than `Dense` with keys of `Dense`, over which Hydra merges what a YAML writes."""
    if not base or base.get("_target_") == f"pkm_lightning.ffn.{Dense.__name__}":
        return
    cls = target_class(base, "model.base_ffn")
    unknown = base.keys() & inspect.signature(Dense).parameters.keys()
    unknown -= accepted_keywords(cls, dict.fromkeys(unknown)).keys()
    if unknown:
        raise ConfigError(
            f"model.base_ffn has keys of ffn@model.base_ffn=dense that {cls.__name__} does not take "
            f"({', '.join(sorted(unknown))}); set ffn@model.base_ffn=custom, which has none, or begin the model's YAML "
            "with defaults: [override /ffn@_global_.model.base_ffn: custom, _self_]."
        )


def _check_extra(name: object, extra: Mapping[str, Any]) -> None:
    """Refuses a name that a command line cannot write as a key, and keys that an entry does not have."""
    key = f"{EXTRAS}.{name}"
    # YAML reads some names as other kinds: yes as true, null as none.
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == MAIN:
        raise ConfigError(
            f"{key}: the name of a variant begins with a letter of a to z, consists of these, digits and _, as in "
            f"memory_plus, and is not {MAIN}; rename it."
        )
    unknown = sorted(map(str, extra.keys() - ExtraKeys.__annotations__))
    if unknown:
        raise ConfigError(
            f"{key}.{unknown[0]} is not a key of an extra variant, which has {', '.join(ExtraKeys.__annotations__)}; "
            f"remove it.{nearest(unknown[0], ExtraKeys.__annotations__)}"
        )
    of_table = sorted(map(str, (extra.get("table") or {}).keys() - ExtraTableKeys.__annotations__))
    if of_table:
        raise ConfigError(
            f"{key}.table.{of_table[0]} is not set per variant, only {', '.join(ExtraTableKeys.__annotations__)} are; "
            f"table.{of_table[0]} holds for all tables.{nearest(of_table[0], ExtraTableKeys.__annotations__)}"
        )


def _described_objects(config: Mapping[str, Any], *, training: bool) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """Yields each part of `config` that a class is made from, with its key."""
    for key in ("data", "ffn", "placement", "strategy"):
        yield key, config[key]
    # Numbers that are not known yet; see `complete_length`.
    yield "trainer", {name: value for name, value in config["trainer"].items() if (name, value) not in _AUTO}
    yield "model.base_ffn", config["model"].get("base_ffn")
    table = config["table"]
    yield "table", _without_builder_keys(table)
    yield "table.optimizer", table.get("optimizer")
    for name, extra in (config.get(EXTRAS) or {}).items():
        yield f"{EXTRAS}.{name}.ffn", extra["ffn"]
        yield f"{EXTRAS}.{name}.placement", extra["placement"]
        yield f"{EXTRAS}.{name}.table", _without_builder_keys(table_of(config, extra))
    yield "optim.optimizer", config["optim"]["optimizer"]
    yield "finetune", config.get("finetune")
    for group in ("callbacks", "logger") if training else ():
        for name, described in (config[group] or {}).items():
            yield f"{group}.{name}", described


def _without_builder_keys(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in TableKeys.__annotations__}
