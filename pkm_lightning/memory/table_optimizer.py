"""One torch optimizer for a model with value tables: any dense optimizer, and row optimizers for the tables.

Schedulers, loggers and checkpoints see one optimizer whose last group, `table`, holds the tables' weights.

Letters: N rows, D values a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pkm_lightning.errors import ConfigError, check_choice, check_range
from pkm_lightning.memory.value_table import ValueTable
from pkm_lightning.ops.row_update import RowRule, row_update
from pkm_lightning.ops.row_update.rules import KINDS, new_state


class RowOptimizer:
    """How touched rows move: a rule of `pkm_lightning.ops.row_update.rules` and its constants.

    Args:
        rule: `lazy_adam`, `row_adagrad`, `sgd` or `catch_up_adam`.
        betas: decay of the first and of the second moment, for the Adams; the first is 0 for `catch_up_adam`.
        eps: added to the root, for all but `sgd`.

    Raises:
        ConfigError: an unknown rule or a constant out of range.
    """

    def __init__(self, *, rule: str, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> None:
        check_choice("table.optimizer.rule", rule, KINDS)
        if len(betas) != 2:
            raise ConfigError(f"table.optimizer.betas={list(betas)} must be two numbers.")
        for beta in betas:
            check_range("table.optimizer.betas", beta, 0, 1 - 1e-9)
        check_range("table.optimizer.eps", eps, 0)
        if rule == "catch_up_adam" and betas[0] != 0:
            raise ConfigError(
                f"table.optimizer.betas={list(betas)}: catch_up_adam is exact without momentum only; set the first to "
                "0, or say table/optimizer=lazy_adam."
            )
        self.rule, self.betas, self.eps = rule, (betas[0], betas[1]), eps


class TableOptimizer(Optimizer):
    """Steps `dense` as it is, and each table by what its reads have staged since `zero_grad`.

    A table that learns `fused` is updated at the end of the backward pass instead, by the learning rate of that moment.
    A step without a read leaves a table and its count of updates as they are.

    Args:
        dense: the optimizer of all other parameters; it may be of any class.
        tables: the tables that learn by rows, by a name that stays the same from run to run.
        rows: how their rows move.
        lr: learning rate of the tables; a scheduler moves it like every group's.
        weight_decay: decoupled decay, at each update, of the rows that were read.
        seed: of the stochastic rounding of bf16 tables.

    Raises:
        ConfigError: a decay with `catch_up_adam`: rows that wait for their read would have to be decayed before it.
    """

    def __init__(
        self,
        dense: Optimizer,
        tables: Mapping[str, ValueTable],
        *,
        rows: RowOptimizer,
        lr: float,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        if rows.rule == "catch_up_adam" and weight_decay:
            raise ConfigError(
                f"optim.table_weight_decay={weight_decay}: catch_up_adam is the dense algorithm without decay only; "
                "set it to 0, or say table/optimizer=lazy_adam."
            )
        self.dense, self.rows, self.seed = dense, rows, seed
        self.tables = dict(tables)
        weights = [table.weight for table in self.tables.values()]
        super().__init__([{"name": "table", "params": weights, "lr": lr, "weight_decay": weight_decay}], {})
        self._table_group = self.param_groups[0]
        self.defaults = dense.defaults
        self._join()
        for table in self.tables.values():
            self.state[table.weight] = {"step": 0, **new_state(rows.rule, table.lines)}
            if table.learning == "fused" and table.stage is not None:
                table.stage.when_backward_ends = _Update(self, table)

    def _join(self) -> None:
        """Groups and states are those of `dense`, the same objects, and the tables' beside them."""
        tables = {weight: self.state[weight] for weight in self._table_group["params"] if weight in self.state}
        self.param_groups = [*self.dense.param_groups, self._table_group]
        self.state = self.dense.state
        self.state.update(tables)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of everything; `closure` computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.dense.step()
        for table in self.tables.values():
            if table.learning == "rows":
                self.update(table)
        return loss

    @torch.no_grad()
    def update(self, table: ValueTable) -> None:
        """Applies what is staged for one table.

        Raises:
            ConfigError: the first step staged nothing, so the table would never learn.
        """
        state = self.state[table.weight]
        gradient = table.stage.gradient() if table.stage is not None else None
        if table.stage is None or gradient is None:
            if state["step"] == 0:
                raise ConfigError(
                    f"the table of shape {tuple(table.weight.shape)} learns by rows, but no read of it was seen in the "
                    "first step: read it by calling it, table(ids, weights) or table.dot(x, ids), not through "
                    "table.weight; or say table.learning=dense."
                )
            return
        state["step"] += 1
        name = next(name for name, one in self.tables.items() if one is table)
        rule = RowRule(
            kind=self.rows.rule,
            lr=self._table_group["lr"],
            weight_decay=self._table_group["weight_decay"],
            betas=self.rows.betas,
            eps=self.rows.eps,
            step=state["step"],
            seed=zlib.crc32(f"{self.seed}/{name}/{state['step']}".encode()),
        )
        kept = {key: value for key, value in state.items() if key != "step"}
        row_update(table.lines, gradient, rule, kept, scale=table.stage.scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients, staged reads among them."""
        self.dense.zero_grad(set_to_none)
        for table in self.tables.values():
            if table.stage is not None:
                table.stage.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both parts; a table's state is copied into the tensors that are there, in their own dtype.

        Raises:
            ValueError: groups or states of another model or another row optimizer.
        """
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != sizes:
            raise ValueError(f"the optimizer state has other parameter groups than this model's, of sizes {sizes}.")
        n_dense, states = sum(sizes[:-1]), state_dict["state"]
        dense_states = {number: state for number, state in states.items() if number < n_dense}
        self.dense.load_state_dict({"state": dense_states, "param_groups": groups[:-1]})
        self._table_group.update({key: value for key, value in groups[-1].items() if key != "params"})
        for number, weight in enumerate(self._table_group["params"], n_dense):
            own, saved = self.state[weight], states[number]
            if own.keys() != saved.keys():
                raise ValueError(f"the table's optimizer state holds {sorted(saved)}, {self.rows.rule} {sorted(own)}.")
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    own[key].copy_(value)
                else:
                    own[key] = value
        self._join()


class _Update:
    """Called at the end of backward: updates a table and forgets what was staged for it."""

    def __init__(self, optimizer: TableOptimizer, table: ValueTable) -> None:
        self.optimizer, self.table = optimizer, table

    def __call__(self) -> None:
        self.optimizer.update(self.table)
        assert self.table.stage is not None
        self.table.stage.clear()
