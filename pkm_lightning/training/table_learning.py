"""How the value tables of a configuration learn, and the optimizers that update them.

| `table.learning` | table gradient | updated once per step | does not work with |
|---|---|---|---|
| `dense` | N x V, from autograd | every row, by `optim.optimizer` | - |
| `rows` | staged reads | the rows that were read, by `table.optimizer` | fp16 (`trainer.precision=16-*`) |

`pkm_lightning.build.checks.check_learning` refuses what does not work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.build.optimizer import make_optimizer
from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable, row_learning_tables
from pkm_lightning.model.accounting import optimizer_bytes
from pkm_lightning.ops.row_update import state_bytes
from pkm_lightning.training.optimizer import parameter_groups


def trainer_optimizer(model: nn.Module, config: Mapping[str, Any], *, with_rows: bool) -> Optimizer:
    """Returns the optimizer that the Trainer steps: of the groups by role and, `with_rows`, of row-learning tables.

    Raises:
        ConfigError: as `make_optimizer`.
    """
    optim = config["optim"]
    groups = parameter_groups(model, optim)
    tables = row_learning_tables(model) if with_rows else {}
    # Only tables may be left to train: torch's optimizers refuse to be made of nothing.
    dense = None if tables and not groups else make_optimizer(optim["optimizer"], groups)
    if not tables:
        assert dense is not None
        return dense
    for group in dense.param_groups if dense is not None else ():
        # A plugin may have a parameter of the role `table`. Monitors need every name once.
        if group["name"] == "table":
            group["name"] = "table_dense"
    return _row_optimizer(dense, tables, config)


def table_only_optimizer(model: nn.Module, config: Mapping[str, Any]) -> Optimizer | None:
    """Returns an optimizer of the tables that an engine does not own; None where there is none.

    Engines that own all parameters, such as DeepSpeed, get a model whose tables are unregistered.
    """
    tables = [t for t in model.modules() if isinstance(t, ValueTable) and not t.is_registered]
    rows = {name: table for name, table in row_learning_tables(model).items() if table in tables}
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


def optimizer_state_bytes(model: nn.Module, config: Mapping[str, Any]) -> int:
    """Returns the bytes of all optimizer states: two values of AdamW per parameter, and the row rule's for tables."""
    total = optimizer_bytes(model)
    tables = row_learning_tables(model).values()
    if tables:
        rows: RowOptimizer = instantiate(config["table"]["optimizer"], "table.optimizer")
        for table in tables:
            total += state_bytes(rows.rule, table.weight)
    return total
