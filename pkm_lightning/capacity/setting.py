"""The part of a configuration that decides how a model is distributed: ranks, strategy, precision, batches, tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pkm_lightning.memory import RowOptimizer
from pkm_lightning.memory.mesh import table_members
from pkm_lightning.ops.row_update import RowRule

Config = Mapping[str, Any]

#: The dtype of the weights under each precision of Lightning that is offered; `mixed` casts within the forward.
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "64-true": torch.float64,
    "16-mixed": torch.float32,
    "16-true": torch.float16,
}
#: Lightning's abbreviations of precisions.
_ABBREVIATED = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
_STRATEGIES = {"DDP": "ddp", "DDPStrategy": "ddp", "FSDP2": "fsdp", "DeepSpeed": "zero", "DeepSpeedStrategy": "zero"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings of a distributed run; the letters are those of `pkm_lightning.capacity`.

    Args:
        strategy: `single`, `ddp`, `fsdp`, `zero1` to `zero3`, or `other`.
        world: W, ranks.
        accumulate: A, micro-batches per step.
        tokens: T, tokens per rank and micro-batch; None where the data module has no fixed sizes.
        length: tokens per sequence, of which `tokens` is a multiple; None likewise.
        item: b, bytes of a dense value.
        mixed: products run in 16 bit with weights in 32 bit.
        table_item: v, bytes of a table's value.
        on_host: the model is trained on the CPU.
        shard: `table.shard`; `none` in a group of one.
        members: P, ranks that hold one table together.
        learning: `table.learning`.
        rule: that of `table.optimizer`, with its constants; gradient descent where there is none.
        tables_on_host: tables are in host memory, with the model or by `table.device=cpu`.
        checkpointing: activation checkpointing runs the forward of blocks twice.
        devices_differ: a variant of `extra_ffns` has a `table.device` of its own, so that each table knows where it is.
    """

    strategy: str
    world: int
    accumulate: int
    tokens: int | None
    length: int | None
    item: int
    mixed: bool
    table_item: int
    on_host: bool
    shard: str
    members: int
    learning: str
    rule: RowRule
    tables_on_host: bool
    checkpointing: bool
    devices_differ: bool = False

    @property
    def replicas(self) -> int:
        """R, copies of a table."""
        return self.world // self.members

    @property
    def sum_bytes(self) -> int:
        """c, bytes of a sum."""
        return max(4, self.item)

    @classmethod
    def of(cls, config: Config) -> Setting:
        """Returns the setting of a resolved configuration.

        Raises:
            ConfigError: `table.group` does not divide the ranks, or `table.optimizer` is impossible.
        """
        trainer, table = config["trainer"], config["table"]
        node = device_count(trainer["devices"], trainer["accelerator"])
        world = node * int(trainer.get("num_nodes") or 1)
        strategy = strategy_kind(config["strategy"])
        members = table_members(table, world, node)
        precision = precision_name(trainer["precision"])
        # DeepSpeed casts its parameters, but not the tables; the other strategies leave casting to autocast.
        table_item = PRECISIONS[precision].itemsize
        item = 2 if strategy.startswith("zero") and "16" in precision else table_item
        accumulate = int(trainer["accumulate_grad_batches"])
        return cls(
            strategy=strategy,
            world=world,
            accumulate=accumulate,
            tokens=_tokens(config["data"], world * accumulate),
            length=_length(config["data"]),
            item=item,
            mixed=precision.endswith("-mixed") and item == 4,
            table_item=table_item,
            on_host=str(trainer["accelerator"]) == "cpu",
            shard=str(table.get("shard", "none")) if members > 1 else "none",
            members=members,
            learning=str(table.get("learning", "dense")),
            rule=_row_rule(table.get("optimizer") or {"rule": "sgd"}),
            tables_on_host=str(table.get("device", "auto")) == "cpu" or str(trainer["accelerator"]) == "cpu",
            checkpointing=bool(config["model"]["activation_checkpointing"]),
            devices_differ=any(
                (extra.get("table") or {}).get("device") for extra in (config.get("extra_ffns") or {}).values()
            ),
        )


def device_count(devices: Any, accelerator: Any) -> int:
    """Counts the processes per node that `trainer.devices` names: a number, a list of devices, or all devices."""
    if isinstance(devices, list | tuple):
        return max(1, len(devices))
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    try:
        number = int(devices)
    except (TypeError, ValueError):
        number = -1
    if number > 0:
        return number
    return max(1, torch.cuda.device_count()) if str(accelerator) != "cpu" else 1


def strategy_kind(strategy: Config | None) -> str:
    """Returns `single`, `ddp`, `fsdp`, `zero1` to `zero3`, or `other`, by the name of the strategy's class."""
    if not strategy:
        return "single"
    kind = _STRATEGIES.get(str(strategy.get("_target_")).rpartition(".")[2], "other")
    return f"zero{strategy.get('stage', 2)}" if kind == "zero" else kind


def precision_name(precision: Any) -> str:
    """Returns the full name of `trainer.precision`, a key of `PRECISIONS`; what Lightning does not know as it is."""
    return "32-true" if precision is None else _ABBREVIATED.get(str(precision), str(precision))


def _row_rule(optimizer: Config) -> RowRule:
    return RowOptimizer(**{key: value for key, value in optimizer.items() if not key.startswith("_")}).rule


def _tokens(data: Config, parts: int) -> int | None:
    rows, length = data.get("global_batch_size"), _length(data)
    return -(-rows // parts) * length if isinstance(rows, int) and length is not None else None


def _length(data: Config) -> int | None:
    length = data.get("seq_len")
    return length if isinstance(length, int) else None
