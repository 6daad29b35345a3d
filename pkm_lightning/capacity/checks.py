"""Refuses what cannot work on several devices or cannot fit, before the launch, and names what would work."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pkm_lightning.capacity.figures import amount, make_plan, total
from pkm_lightning.capacity.setting import Setting, device_count, precision_name, strategy_kind
from pkm_lightning.errors import ConfigError, check_range
from pkm_lightning.ffn import HasReads
from pkm_lightning.memory.mesh import check_dim, check_rows
from pkm_lightning.ops.row_update import RowRule, find_rule, rule_names

if TYPE_CHECKING:
    from pkm_lightning.capacity.figures import Plan
    from pkm_lightning.memory import ValueTable
    from pkm_lightning.model import Transformer

_FSDP_PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-true")
#: Ids are int32 in the kernels and between ranks.
_LARGEST_ID = 2**31 - 1


def check_setting(model: Transformer, config: Mapping[str, Any]) -> None:
    """Refuses ranks, strategies, precisions and tables that cannot work together, whatever memory there is.

    Raises:
        ConfigError: naming an alternative.
    """
    _check_strategy(config)
    if config.get("device_memory") is not None:
        check_range("device_memory", config["device_memory"], 0)
    setting = Setting.of(config)
    _check_columns(model, setting)
    for table in model.value_tables:
        if table.n_lines - 1 > _LARGEST_ID:
            sliced = f" in {table.slices} slices each" if table.slices > 1 else ""
            readers, most = _readers(model, table), (_LARGEST_ID + 1) // table.slices
            raise ConfigError(
                f"{readers}a value table of {table.rows:,} rows{sliced} has {table.n_lines:,} ids, beyond int32; "
                f"choose fewer slots, at most {most:,} rows, or set table=own for a smaller table per layer."
            )


def _check_columns(model: Transformer, setting: Setting) -> None:
    tables: list[ValueTable] = list(model.tables)  # type: ignore[arg-type]
    for table in tables:
        try:
            check_dim(setting.shard, table.dim // table.slices, setting.members)
            check_rows(setting.shard, table.n_lines, setting.members)
        except ConfigError as error:
            raise ConfigError(f"{_readers(model, table)}{error}") from None


def _readers(model: Transformer, table: ValueTable) -> str:
    """Returns the plugins that read `table`, as the beginning of a message; empty where all tables are alike."""
    if len({(other.n_lines, other.dim) for other in model.value_tables}) < 2:
        return ""
    readers = [
        f"{type(plugin).__name__} of layer {layer}"
        for layer, _, plugin in model.plugins()
        if isinstance(plugin, HasReads) and any(read.table is table for read in plugin.reads())
    ]
    return f"{', '.join(readers)}: " if readers else ""


def _check_strategy(config: Mapping[str, Any]) -> None:
    trainer = config["trainer"]
    nodes = int(trainer.get("num_nodes") or 1)
    devices = device_count(trainer["devices"], trainer["accelerator"])
    kind, precision = strategy_kind(config["strategy"]), precision_name(trainer["precision"])
    if kind == "single" and devices * nodes > 1:
        several = f"trainer.devices={trainer['devices']}" if devices > 1 else f"trainer.num_nodes={nodes}"
        raise ConfigError(
            f"{several} needs a strategy for several processes; set strategy=ddp, or strategy=fsdp to share the dense "
            "weights too."
        )
    if kind == "fsdp" and precision not in _FSDP_PRECISIONS:
        raise ConfigError(
            f"trainer.precision={trainer['precision']} does not work with strategy=fsdp; allowed: "
            f"{', '.join(_FSDP_PRECISIONS)}."
        )
    if kind.startswith("zero") and precision == "64-true":
        raise ConfigError(
            f"trainer.precision={trainer['precision']} does not work with DeepSpeed; set trainer.precision=32-true, or "
            "strategy=ddp."
        )
    # DeepSpeed is not imported here: that takes seconds.
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "this strategy needs DeepSpeed, which is not installed; run pip install deepspeed, or strategy=fsdp, which "
            "shares as much."
        )


def check_memory(plan: Plan, limit: float, model: Transformer, config: Mapping[str, Any]) -> None:
    """Refuses a plan of more than `limit` bytes per device.

    Raises:
        ConfigError: naming changes whose plans fit.
    """
    if plan.memory_total <= limit:
        return
    fitting: list[str] = []
    for change, needed in _alternatives(model, config):
        # Of several divisions of the batch the first that fits is enough.
        divides = "accumulate" in change and any("accumulate" in other for other in fitting)
        if needed is not None and needed <= limit and not divides:
            fitting.append(f"{change} ({amount(needed)})")
    advice = (
        f"this fits: {'; or '.join(fitting[:4])}"
        if fitting
        else "no other way of splitting it fits: choose fewer rows or a smaller batch"
    )
    largest = max(_held(plan).items(), key=lambda item: item[1])
    without = " without activations" if plan.memory.activations is None else ""
    raise ConfigError(
        f"a device needs {amount(plan.memory_total)}{without} (the most for "
        f"{largest[0].replace('_', ' ')}, {amount(largest[1])}), but has {amount(limit)} (device_memory); "
        f"{advice}."
    )


def _held(plan: Plan) -> dict[str, int]:
    return {name: value or 0 for name, value in vars(plan.memory).items()}


def _alternatives(model: Transformer, config: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """Yields changes as overrides, the smallest first, and the bytes per device that each would need."""
    setting = Setting.of(config)
    changes = _smaller_activations(setting)
    has_tables = bool(list(model.tables))
    if has_tables and setting.learning == "dense":
        changes.append(("table.learning=rows", {"table.learning": "rows"}))
    if has_tables:
        # Rules without a first moment refuse another first number.
        betas = (0.0, 0.95)
        changes += [
            (
                f"table/optimizer={rule.name}",
                {"table.learning": "rows", "table.optimizer": {"rule": rule.name, "betas": betas}},
            )
            for rule in _frugal_rules()
            if rule.name != setting.rule.name
        ]
    if has_tables:
        split = [n for n in range(setting.members + 1, setting.world + 1) if setting.world % n == 0]
        for shard in ("dim", "row") if setting.shard == "none" else (setting.shard,):
            changes += [
                (f"table.shard={shard} table.group={n}", {"table.shard": shard, "table.group": n}) for n in split
            ]
    if setting.strategy in ("ddp", "zero1", "zero2"):
        changes.append(("strategy=fsdp", {"strategy": {"_target_": "FSDP2"}}))
    if has_tables and not setting.tables_on_host:
        changes.append(("table.device=cpu", {"table.device": "cpu"}))
    yield from _needs(model, config, changes)
    yield from _needs(model, config, _more_devices(config, setting, has_tables=has_tables))


def _smaller_activations(setting: Setting) -> list[tuple[str, dict[str, Any]]]:
    """Returns recomputation, divisions of the batch, and both together."""
    rows = 0 if setting.tokens is None or setting.length is None else setting.tokens // setting.length
    divisions = [setting.accumulate * factor for factor in (2, 4, 8) if rows and rows % factor == 0]
    divided: list[tuple[str, dict[str, Any]]] = [
        (f"trainer.accumulate_grad_batches={n}", {"trainer.accumulate_grad_batches": n}) for n in divisions
    ]
    if setting.checkpointing:
        return divided
    words, change = "model.activation_checkpointing=true", {"model.activation_checkpointing": True}
    both = [(f"{words} {more_words}", {**change, **more}) for more_words, more in divided]
    return [(words, change), *divided, *both]


def _frugal_rules() -> list[type[RowRule]]:
    """Adaptive row optimizers that keep no numbers per value."""
    rules = [find_rule(name) for name in rule_names()]
    return [rule for rule in rules if rule.state and all(state.per != "value" for state in rule.state.values())]


def _more_devices(config: Mapping[str, Any], setting: Setting, *, has_tables: bool) -> list[tuple[str, dict[str, Any]]]:
    changes = []
    strategy = {} if setting.strategy not in ("single", "ddp") else {"strategy": {"_target_": "FSDP2"}}
    shard = "row" if setting.shard == "row" else "dim"
    grouped = {"table.shard": shard, "table.group": "world"} if has_tables else {}
    # The tokens per rank stay the same, since reads are staged for the tokens of all members.
    rows = config["data"].get("global_batch_size")
    for factor in (2, 4, 8, 16, 32, 64):
        devices = device_count(config["trainer"]["devices"], config["trainer"]["accelerator"]) * factor
        batch = {"data.global_batch_size": rows * factor} if isinstance(rows, int) else {}
        words = [f"devices={devices}", *(["strategy=fsdp"] if strategy else [])]
        words += [f"table.shard={shard}", "table.group=world"] if grouped else []
        changes.append((" ".join(words), {"trainer.devices": devices, **strategy, **grouped, **batch}))
    return changes


def _needs(
    model: Transformer, config: Mapping[str, Any], changes: list[tuple[str, dict[str, Any]]]
) -> Iterator[tuple[str, int | None]]:
    for words, change in changes:
        trial = _changed(config, change)
        try:  # a change can itself be impossible, such as a group that does not divide the table
            setting = Setting.of(trial)
            _check_columns(model, setting)
            yield words, total(make_plan(model, trial).memory)
        except ConfigError:
            yield words, None


def _changed(config: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**config, **{key: copy.copy(config[key]) for key in ("trainer", "table", "data", "model")}}
    for key, value in change.items():
        group, _, name = key.partition(".")
        if name:
            changed[group][name] = value
        else:
            changed[group] = value
    return changed
