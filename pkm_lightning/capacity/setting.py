"""What of a configuration decides how a model is spread: ranks, strategy, precision, batches, the tables' way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pkm_lightning.memory.mesh import table_members

Config = Mapping[str, Any]

#: Precisions as Lightning abbreviates them.
_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
_ITEM = {"bf16-true": 2, "16-true": 2, "64-true": 8}
_STRATEGIES = {"DDP": "ddp", "DDPStrategy": "ddp", "FSDP2": "fsdp", "DeepSpeed": "zero", "DeepSpeedStrategy": "zero"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """See the letters in `pkm_lightning.capacity`.

    Args:
        strategy: `single`, `ddp`, `fsdp`, `zero1` to `zero3`, or `other`.
        world: ranks W.
        accumulate: micro-batches a step A.
        tokens: tokens a rank and micro-batch T; None where the data do not say.
        item: bytes of a value of a weight b.
        table_item: the same of a table.
        on_host: the model is trained on the CPU.
        shard, members: `table.shard`, `none` in a group of one, and P.
        learning, rule: `table.learning`, and the rule of `table.optimizer`.
        tables_on_host: `table.device=cpu`, beside a model on an accelerator or not.
        checkpointing: blocks run their forward twice.
    """

    strategy: str
    world: int
    accumulate: int
    tokens: int | None
    item: int
    table_item: int
    on_host: bool
    shard: str
    members: int
    learning: str
    rule: str
    tables_on_host: bool
    checkpointing: bool

    @property
    def replicas(self) -> int:
        """Copies of a table R."""
        return self.world // self.members

    @property
    def wide(self) -> int:
        """Bytes of a sum c."""
        return max(4, self.item)

    @classmethod
    def of(cls, config: Config) -> Setting:
        """That of a resolved configuration.

        Raises:
            ConfigError: a group of tables that does not divide the ranks.
        """
        trainer, table = config["trainer"], config["table"]
        node = device_count(trainer["devices"], trainer["accelerator"])
        world = node * int(trainer.get("num_nodes") or 1)
        strategy = strategy_kind(config["strategy"])
        members = table_members(table, world, node)
        precision = precision_name(trainer["precision"])
        # DeepSpeed casts its parameters, which tables are not, where the others leave that to autocast.
        item = 2 if strategy.startswith("zero") and "16" in precision else _ITEM.get(precision, 4)
        accumulate = int(trainer["accumulate_grad_batches"])
        optimizer = table.get("optimizer") or {}
        return cls(
            strategy=strategy,
            world=world,
            accumulate=accumulate,
            tokens=_tokens(config["data"], world * accumulate),
            item=item,
            table_item=_ITEM.get(precision, 4),
            on_host=str(trainer["accelerator"]) == "cpu",
            shard=str(table.get("shard", "none")) if members > 1 else "none",
            members=members,
            learning=str(table.get("learning", "dense")),
            rule=str(optimizer.get("rule", "sgd")),
            tables_on_host=str(table.get("device", "auto")) == "cpu" or str(trainer["accelerator"]) == "cpu",
            checkpointing=bool(config["model"]["activation_checkpointing"]),
        )


def device_count(devices: Any, accelerator: Any) -> int:
    """Processes of a node that `trainer.devices` asks for: a number, a list of devices, or all there are."""
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
    """`single`, `ddp`, `fsdp`, `zero1` to `zero3`, or `other`, by the name of its class."""
    if not strategy:
        return "single"
    kind = _STRATEGIES.get(str(strategy.get("_target_")).rpartition(".")[2], "other")
    return f"zero{strategy.get('stage', 2)}" if kind == "zero" else kind


def precision_name(precision: Any) -> str:
    """`trainer.precision` in full."""
    return _PRECISIONS.get(str(precision), str(precision))


def _tokens(data: Config, parts: int) -> int | None:
    rows, length = data.get("global_batch_size"), data.get("seq_len")
    if not isinstance(rows, int) or not isinstance(length, int):
        return None
    return -(-rows // parts) * length
