"""How the value tables of a configuration learn: what cannot work is refused, and the optimizer gets its row part.

| `table.learning` | table gradient | updated by | refuses |
|---|---|---|---|
| `dense` | N x D, autograd's | `optim.optimizer`, each step, every row | - |
| `rows` | staged reads | `table.optimizer`, each step, touched rows | 16-bit floats (fp16) |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.errors import ConfigError, check_choice
from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable
from pkm_lightning.model.accounting import optimizer_bytes
from pkm_lightning.ops.row_update import state_bytes


def check_learning(config: Mapping[str, Any]) -> None:
    """Refuse settings that a way of learning cannot work with; called before anything is built.

    Raises:
        ConfigError: with the setting, and what to say instead.
    """
    table, optim, trainer = config["table"], config["optim"], config["trainer"]
    learning = table.get("learning", "dense")
    if learning == "fused":
        raise ConfigError(
            "table.learning=fused is no longer offered; set table.learning=rows, which makes the same updates in the "
            "same time. A run that was trained with it can be evaluated and exported, but not continued."
        )
    check_choice("table.learning", learning, ("dense", "rows"))
    if learning == "dense":
        return
    rows: RowOptimizer = instantiate(table["optimizer"], "table.optimizer")
    rows.check_decay(optim["table_weight_decay"])
    if str(trainer["precision"]).startswith("16"):
        raise ConfigError(
            f"trainer.precision={trainer['precision']} does not work with table.learning={learning}: its loss scaling "
            "knows no staged gradients; set trainer.precision=bf16-mixed, or table.learning=dense."
        )


def without_learning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved configuration that is only evaluated, with `fused`, an earlier way of learning, as `rows`."""
    table = dict(config["table"])
    if table.get("learning") == "fused":
        table["learning"] = "rows"
    return {**config, "table": table}


def with_tables(dense: Optimizer, model: nn.Module, config: Mapping[str, Any]) -> Optimizer:
    """`dense`, joined by row optimizers where the model has tables that learn by rows."""
    tables = learning_tables(model)
    if not tables:
        return dense
    for group in dense.param_groups:
        if group["name"] == "table":  # a plugin's own parameter of that role; monitors want every name once
            group["name"] = "table_dense"
    return _row_optimizer(dense, tables, config)


def optimizer_apart(model: nn.Module, config: Mapping[str, Any]) -> Optimizer | None:
    """An optimizer of the tables alone, where an engine owns all parameters and their weights are none; else None."""
    tables = [t for t in model.modules() if isinstance(t, ValueTable) and not t.is_registered]
    rows = {name: table for name, table in learning_tables(model).items() if table in tables}
    if rows:
        return _row_optimizer(None, rows, config)
    weights = [table.weight for table in tables if table.weight.requires_grad]
    if not weights:
        return None
    optim = config["optim"]
    group = {
        "name": "table",
        "params": weights,
        "lr": optim["lr"] * optim["table_lr_factor"],
        "weight_decay": optim["table_weight_decay"],
    }
    optimizer: Optimizer = instantiate(optim["optimizer"], "optim.optimizer", params=[group])
    return optimizer


def _row_optimizer(
    dense: Optimizer | None, tables: Mapping[str, ValueTable], config: Mapping[str, Any]
) -> TableOptimizer:
    optim = config["optim"]
    return TableOptimizer(
        dense,
        tables,
        rows=instantiate(config["table"]["optimizer"], "table.optimizer"),
        lr=optim["lr"] * optim["table_lr_factor"],
        weight_decay=optim["table_weight_decay"],
        seed=int(config["seed"]),
    )


def learning_tables(model: nn.Module) -> dict[str, ValueTable]:
    """The model's tables that learn by rows, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ValueTable) and module.stage is not None
    }


def optimizer_state_bytes(model: nn.Module, config: Mapping[str, Any]) -> int:
    """Bytes that the optimizers keep: AdamW's two values of each parameter, and what the row rule keeps for a table."""
    total = optimizer_bytes(model)
    tables = learning_tables(model).values()
    if tables:
        rows: RowOptimizer = instantiate(config["table"]["optimizer"], "table.optimizer")
        for table in tables:
            total += state_bytes(rows.rule, table.weight)
    return total
