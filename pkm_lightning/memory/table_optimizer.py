"""One torch optimizer for a model with value tables: any dense optimizer, and row optimizers for the tables.

Schedulers, loggers and checkpoints see one optimizer whose last group, `table`, holds the tables' weights.

Letters: N rows, D values a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pkm_lightning.errors import ConfigError, check_choice, check_range
from pkm_lightning.memory.replicas import norm_over_members
from pkm_lightning.memory.value_table import ValueTable
from pkm_lightning.ops.row_update import RowGradient, RowRule, row_gradient_squares, row_update
from pkm_lightning.ops.row_update.rules import KINDS, new_state

_STEPS_UNSEEN = 10


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
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ConfigError(f"table.optimizer.betas={betas!r} must be two numbers, as in [0.9, 0.95].")
        for beta in betas:
            check_range("table.optimizer.betas", beta, 0, 1 - 1e-9)
        check_range("table.optimizer.eps", eps, 0)
        if rule == "catch_up_adam" and betas[0] != 0:
            raise ConfigError(
                f"table.optimizer.betas={list(betas)}: catch_up_adam is exact without momentum only; set the first to "
                "0, or set table/optimizer=lazy_adam."
            )
        self.rule, self.betas, self.eps = rule, (betas[0], betas[1]), eps

    def check_decay(self, weight_decay: float) -> None:
        """Refuse a decay that the rule cannot make up for: rows that wait would have to be decayed before their read.

        Raises:
            ConfigError: a decay with `catch_up_adam`.
        """
        if self.rule == "catch_up_adam" and weight_decay:
            raise ConfigError(
                f"optim.table_weight_decay={weight_decay}: catch_up_adam is the dense algorithm without decay only; "
                "set it to 0, or set table/optimizer=lazy_adam."
            )


class TableOptimizer(Optimizer):
    """Steps `dense` as it is, and each table by what its reads have staged since `zero_grad`.

    A table that learns `fused` is updated at the end of the backward pass instead, by that moment's learning rate.
    A step without a read leaves a table and its count of updates as they are. A loop of your own clears the gradients
    by this optimizer's `zero_grad`, not the model's: only the former knows of staged reads. It can neither be copied
    nor pickled; save its `state_dict`.

    Args:
        dense: the optimizer of all other parameters, of any class; None: another engine steps them.
        tables: the tables that learn by rows, by a name that stays the same from run to run.
        rows: how their rows move.
        lr: learning rate of the tables; a scheduler moves it like every group's.
        weight_decay: decoupled decay, at each update, of the rows that were read.
        seed: of the stochastic rounding of bf16 tables.

    Raises:
        ConfigError: as `RowOptimizer.check_decay`.
        ValueError: a table that learns densely.
    """

    def __init__(
        self,
        dense: Optimizer | None,
        tables: Mapping[str, ValueTable],
        *,
        rows: RowOptimizer,
        lr: float,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        rows.check_decay(weight_decay)
        dense_tables = [name for name, table in tables.items() if table.stage is None]
        if dense_tables:
            raise ValueError(
                f"{', '.join(dense_tables)} learns densely or not at all; leave it to the dense optimizer."
            )
        self.dense, self.rows, self.seed = dense, rows, seed
        self.tables = dict(tables)
        weights = [table.weight for table in self.tables.values()]
        super().__init__([{"name": "table", "params": weights, "lr": lr, "weight_decay": weight_decay}], {})
        self._table_group = self.param_groups[0]
        self._names = {table.weight: name for name, table in self.tables.items()}
        self.defaults = {}  # the two parts have not one in common
        self._join()
        for table in self.tables.values():
            self.state[table.weight] = {"step": 0, **new_state(rows.rule, table.weight)}
            if table.learning == "fused" and table.stage is not None:
                table.stage.when_backward_ends = _Update(self, table)
        self._steps_unseen = 0

    def _join(self) -> None:
        """Groups and states are those of `dense`, the same objects, and the tables' beside them."""
        tables = {weight: self.state[weight] for weight in self._table_group["params"] if weight in self.state}
        if self.dense is not None:
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
        if self.dense is not None:
            self.dense.step()
        for name, table in self.tables.items():
            if table.weight.requires_grad:
                raise ConfigError(
                    f"{name}.weight requires a gradient, which a table that learns by rows must not: freeze and "
                    "unfreeze the other parameters only, or set table.learning=dense."
                )
            if table.learning == "rows":
                self.update(table)
        self._check_seen()
        return loss

    def _check_seen(self) -> None:
        """A table that is read behind its back learns nothing, and no loss would say so."""
        unseen = [name for name, table in self.tables.items() if table.stage is not None and not table.stage.seen]
        self._steps_unseen = self._steps_unseen + 1 if unseen else 0
        if self._steps_unseen == _STEPS_UNSEEN:
            raise ConfigError(
                f"{', '.join(unseen)}: no read was seen in {_STEPS_UNSEEN} steps, so nothing is learned: read a table "
                "by calling it, table(ids, weights) or table.dot(x, ids), not through its weight; or say "
                "table.learning=dense."
            )

    @torch.no_grad()
    def update(self, table: ValueTable) -> None:
        """Applies what is staged for one table."""
        assert table.stage is not None
        state = self.state[table.weight]
        gradient = table.stage.gradient(table.weight)
        if gradient is None:
            return
        state["step"] += 1
        rule = RowRule(
            kind=self.rows.rule,
            lr=self._table_group["lr"],
            weight_decay=self._table_group["weight_decay"],
            betas=self.rows.betas,
            eps=self.rows.eps,
            step=state["step"],
            seed=self._rounding_seed(table, state["step"]),
        )
        for key, value in state.items():
            # A Trainer moves all optimizer states to its device; those of a table in host memory belong beside it.
            if isinstance(value, Tensor) and value.device != table.weight.device:
                state[key] = value.to(table.weight.device)
        kept = {key: value for key, value in state.items() if key != "step"}
        squares_U = self._whole_row_squares(table, gradient)
        row_update(table.weight, gradient, rule, kept, scale=table.stage.scale, row_squares_U=squares_U)

    def _rounding_seed(self, table: ValueTable, step: int) -> int:
        member = f"/{table.mesh.member}" if table.is_split and table.mesh is not None else ""
        return zlib.crc32(f"{self.seed}/{self._names[table.weight]}/{step}{member}".encode()) & 0x7FFFFFFF

    def _whole_row_squares(self, table: ValueTable, gradient: RowGradient) -> Tensor | None:
        """For a rule that needs the mean over a whole row of which this rank holds a part of the columns."""
        mesh = table.mesh
        if self.rows.rule != "row_adagrad" or mesh is None or mesh.shard != "dim":
            return None
        squares_U = row_gradient_squares(gradient)
        torch.distributed.all_reduce(squares_U, group=mesh.member_group(squares_U.device))
        return squares_U / (table.weight.shape[1] * mesh.members)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of dense parameters."""
        if not hasattr(self, "_table_group"):  # the base class adds the tables
            super().add_param_group(param_group)
            return
        if self.dense is None:
            raise ValueError("this optimizer has tables only; give dense parameters to the engine that steps them.")
        self.dense.add_param_group(param_group)
        self._join()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a TableOptimizer belongs to its model's tables and cannot be copied; save its state_dict().")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients, staged reads among them."""
        if self.dense is not None:
            self.dense.zero_grad(set_to_none)
        for table in self.tables.values():
            if table.stage is not None:
                table.stage.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both parts; a table's state is copied into the tensors that are there, in their own dtype.

        Raises:
            ValueError: groups or states of another model or another row optimizer.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != sizes:
            raise ValueError(
                f"the optimizer state has groups of {[len(group['params']) for group in groups]} parameters, this "
                f"model's optimizer of {sizes}."
            )
        n_dense = sum(sizes[:-1])
        tables = list(enumerate(self._table_group["params"], n_dense))
        for number, weight in tables:
            self._check_state(states.get(number, {}), self.state[weight])
        dense_states = {number: state for number, state in states.items() if number < n_dense}
        if self.dense is not None:
            self.dense.load_state_dict({"state": dense_states, "param_groups": groups[:-1]})
        self._table_group.update({key: value for key, value in groups[-1].items() if key != "params"})
        for number, weight in tables:
            own = self.state[weight]
            for key, value in states[number].items():
                if isinstance(value, Tensor):
                    own[key].copy_(value)
                else:
                    own[key] = value
        self._join()

    def _check_state(self, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        def shapes(state: Mapping[str, Any]) -> dict[str, object]:
            return {
                name: tuple(value.shape) if isinstance(value, Tensor) else "number" for name, value in state.items()
            }

        if shapes(saved) != shapes(own):
            raise ValueError(
                f"the saved optimizer state of a table is {shapes(saved)}, but {self.rows.rule} keeps {shapes(own)}: "
                "it was written with another table/optimizer or table.learning."
            )


class _Update:
    """Called at the end of backward: updates a table and forgets what was staged for it."""

    def __init__(self, optimizer: TableOptimizer, table: ValueTable) -> None:
        self.optimizer, self.table = optimizer, table

    def __call__(self) -> None:
        self.optimizer.update(self.table)
        assert self.table.stage is not None
        self.table.stage.clear()


def clip_tables(tables: Sequence[ValueTable], others: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales the gradients of `tables`, staged or autograd's, and `others`, to a common L2 norm of at most `max_norm`.

    Args:
        tables: at least one; every rank must give the same.
        others: dense gradients that belong to the same norm, equal on all ranks or DTensors.
        max_norm: the limit; None only measures.

    Returns:
        The norm before clipping, a scalar tensor, the same on every rank.
    """
    dense = list(others)
    norms = [_table_norm(table) for table in tables] + [whole(grad.norm()) for grad in dense]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    if max_norm is not None:
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
        for table in tables:
            if table.stage is not None:
                table.stage.scale = table.stage.scale * factor
        for grad in (*dense, *(table.weight.grad for table in tables if table.weight.grad is not None)):
            part = grad.to_local() if isinstance(grad, DTensor) else grad
            part.mul_(factor.to(part))
    return total


def _table_norm(table: ValueTable) -> Tensor:
    if table.stage is not None:
        return table.stage.norm(table.weight)
    grad = table.weight.grad
    return norm_over_members(torch.zeros(()) if grad is None else whole(grad.norm()), table.mesh)


def whole(value: Tensor) -> Tensor:
    """A plain tensor of what may be a DTensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value
