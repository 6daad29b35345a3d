"""One torch optimizer for a model with value tables: any dense optimizer, and a row optimizer for the tables.

Schedulers, loggers and checkpoints see one optimizer whose last group, `table`, holds the weights of the tables.

Letters: U rows that were read.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory.mesh import TableMesh
from pkm_lightning.memory.row_optimizer import RowOptimizer
from pkm_lightning.memory.value_table import ValueTable
from pkm_lightning.ops.row_update import RowGradient, UpdateStep, new_state, row_gradient_squares, row_update

# Steps after which a table that was never read ends the run with an error, and so do reads that were never cleared; not
# 1, because a table may first be read in a later step, and a loop may step twice by one gradient.
_STEPS_UNREAD = _STEPS_UNCLEARED = 10


class TableOptimizer(Optimizer):
    """An optimizer that steps `dense`, and each table by the reads that were staged since `zero_grad`.

    A step without a read changes neither the table nor its number of updates. A custom training loop must clear the
    gradients by the `zero_grad` of this optimizer, not of the model, because only the former clears staged reads; a
    loop that forgets it ends with an error. The optimizer can neither be copied nor pickled; save its `state_dict`.

    Args:
        dense: the optimizer of all other parameters, of any class; None if another engine steps them.
        tables: the tables that learn by rows, by a name that stays the same between runs; see `row_learning_tables`.
        rows: the rule by which rows are updated, or its name: `catch_up_adam`, `factored_adam`, `lazy_adam`,
            `row_adagrad` or `sgd`.
        lr: learning rate of the tables; schedulers change it as that of any group.
        weight_decay: decoupled decay of the rows that were read, at each update.
        seed: seed of the stochastic rounding of bf16 tables.

    Raises:
        ConfigError: as `RowOptimizer.check_decay`, or a table that `fully_shard` has sharded.
        ValueError: a table that does not learn by rows, or that `dense` has among its parameters.

    Example:
        >>> import torch
        >>> from pkm_lightning import MemoryPlus, TableOptimizer, ValueTable, row_learning_tables
        >>> layer = MemoryPlus(dim=8, n_keys=16, table=ValueTable(rows=16**2, dim=8, learning="rows"))
        >>> dense = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
        >>> optimizer = TableOptimizer(dense, row_learning_tables(layer), lr=1e-2)
        >>> layer(torch.randn(4, 8)).y_BTD.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        dense: Optimizer | None,
        tables: Mapping[str, ValueTable],
        *,
        rows: RowOptimizer | str = "lazy_adam",
        lr: float,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        rows = RowOptimizer(rule=rows) if isinstance(rows, str) else rows
        rows.check_decay(weight_decay)
        dense_tables = [name for name, table in tables.items() if table.stage is None]
        if dense_tables:
            raise ValueError(
                f"{', '.join(dense_tables)} learns densely or not at all; pass it to the dense optimizer instead."
            )
        _check_dense(dense, tables)
        _check_sharding(tables)
        self.dense, self.rows, self.seed = dense, rows, seed
        self.tables = dict(tables)
        weights = [table.weight for table in self.tables.values()]
        super().__init__([{"name": "table", "params": weights, "lr": lr, "weight_decay": weight_decay}], {})
        self._table_group = self.param_groups[0]
        self._names = {table.weight: name for name, table in self.tables.items()}
        self.defaults = {}  # the dense optimizer and the tables share no defaults
        self._join()
        for table in self.tables.values():
            self.state[table.weight] = {"step": 0, **new_state(rows.rule, table.weight)}
            assert table.stage is not None
            table.stage.has_optimizer = True
        self._steps_unread = self._steps_uncleared = 0

    def _join(self) -> None:
        """Joins groups and states: those of `dense`, as the same objects, and those of the tables."""
        tables = {weight: self.state[weight] for weight in self._table_group["params"] if weight in self.state}
        if self.dense is not None:
            self.param_groups = [*self.dense.param_groups, self._table_group]
            self.state = self.dense.state
        self.state.update(tables)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters and tables, after `closure`, if given, has computed the gradients."""
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
            self.update(table)
        self._check_reads()
        self._steps_uncleared += 1
        if self._steps_uncleared > _STEPS_UNCLEARED:
            raise ConfigError(
                f"{_STEPS_UNCLEARED} steps were made without clearing the staged reads, so that each repeated those of "
                "the steps before it: call zero_grad() of this optimizer, not of the model or the dense optimizer; in "
                "a loop that is not yours, optimizer.register_step_post_hook(lambda done, *_: done.zero_grad())."
            )
        return loss

    def _check_reads(self) -> None:
        """Refuses tables that are read through their weight: they would learn nothing, without any error."""
        unread = [name for name, table in self.tables.items() if table.stage is not None and not table.stage.was_read]
        self._steps_unread = self._steps_unread + 1 if unread else 0
        if self._steps_unread == _STEPS_UNREAD:
            raise ConfigError(
                f"{', '.join(unread)}: no read was seen in {_STEPS_UNREAD} steps, so nothing is learned: read a table "
                "by calling it, table(ids, weights) or table.dot(x, ids), not through its weight; or set "
                "table.learning=dense."
            )

    @torch.no_grad()
    def update(self, table: ValueTable) -> None:
        """Updates one table by its staged reads. Collective: call on all ranks."""
        assert table.stage is not None
        state = self.state[table.weight]
        gradient = table.stage.gradient(table.weight)
        if gradient is None:
            return
        version = table.weight._version
        state["step"] += 1
        step = UpdateStep(
            lr=self._table_group["lr"],
            weight_decay=self._table_group["weight_decay"],
            number=state["step"],
            seed=self._rounding_seed(table, state["step"]),
        )
        for key, value in state.items():
            # Lightning moves all optimizer states to the Trainer's device, but a table may lie in host memory.
            if isinstance(value, Tensor) and value.device != table.weight.device:
                state[key] = value.to(table.weight.device)
        row_state = {key: value for key, value in state.items() if key != "step"}
        rule, mesh = self.rows.rule, table.mesh
        column_sums = functools.partial(_column_sums, mesh) if table.is_split and mesh is not None else None
        row_update(
            table.weight,
            gradient,
            rule,
            step,
            row_state,
            scale=table.stage.scale,
            mean_squares_U=self._mean_squares(table, gradient, rule.column_weights(row_state, step)),
            column_sums=column_sums,
        )
        # Kernels write past autograd, which counts the changes of a tensor.
        torch.autograd.graph.increment_version(table.weight)
        if table.prefetcher is not None:
            table.prefetcher.record_update(table, version, gradient.segments.rows_U)

    def _rounding_seed(self, table: ValueTable, step: int) -> int:
        # Parts of a table must not be rounded by the same bits, but replicas of a part must.
        member = f"/{table.mesh.member}" if table.is_split and table.mesh is not None else ""
        # crc32 instead of hash(), which differs between processes.
        return zlib.crc32(f"{self.seed}/{self._names[table.weight]}/{step}{member}".encode()) & 0x7FFFFFFF

    def _mean_squares(self, table: ValueTable, gradient: RowGradient, weights_V: Tensor | None) -> Tensor | None:
        """Returns mean(g**2) over whole rows for a rule that needs it, where this rank holds a part of the columns."""
        mesh = table.mesh
        if not self.rows.rule.needs_mean_squares or mesh is None or mesh.shard != "dim":
            return None
        squares_U = row_gradient_squares(gradient, weights_V)
        torch.distributed.all_reduce(squares_U, group=mesh.member_group(squares_U.device))
        return squares_U / (table.weight.shape[1] * mesh.members)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of dense parameters."""
        # The constructor of the base class adds the group of the tables by this method.
        if not hasattr(self, "_table_group"):
            super().add_param_group(param_group)
            return
        if self.dense is None:
            raise ValueError("this optimizer has tables only; pass dense parameters to the engine that steps them.")
        self.dense.add_param_group(param_group)
        self._join()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a TableOptimizer refers to the tables of its model and cannot be copied; save its state_dict()."
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients, staged reads included."""
        self._steps_uncleared = 0
        if self.dense is not None:
            self.dense.zero_grad(set_to_none)
        for table in self.tables.values():
            if table.stage is not None:
                table.stage.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the states of the dense optimizer and of the tables, the latter into the present tensors and dtypes.

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
            state = self.state[weight]
            for key, value in states[number].items():
                # torch's own load_state_dict would cast states to the dtype of the weight, bf16 for bf16 tables.
                if isinstance(value, Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = value
        self._join()

    def _check_state(self, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
        def shapes(state: Mapping[str, Any]) -> dict[str, object]:
            return {
                name: tuple(value.shape) if isinstance(value, Tensor) else "number" for name, value in state.items()
            }

        if shapes(saved) != shapes(present):
            raise ValueError(
                f"the saved optimizer state of a table is {shapes(saved)}, but {self.rows.rule.name} keeps "
                f"{shapes(present)}: it was written with another table/optimizer or table.learning."
            )


def _check_dense(dense: Optimizer | None, tables: Mapping[str, ValueTable]) -> None:
    """Refuses a dense optimizer that has tables too: states are saved by the place of a parameter among all groups."""
    held = {id(parameter) for group in ([] if dense is None else dense.param_groups) for parameter in group["params"]}
    both = [name for name, table in tables.items() if id(table.weight) in held]
    if both:
        raise ValueError(
            f"{', '.join(both)} is also among the parameters of the dense optimizer; make that of "
            "[p for p in model.parameters() if p.requires_grad]."
        )


def _check_sharding(tables: Mapping[str, ValueTable]) -> None:
    """Refuses tables that FSDP has sharded: reads go by the rows of the whole table, or of the table's own mesh."""
    sharded = [name for name, table in tables.items() if isinstance(table.weight, DTensor)]
    if sharded:
        raise ConfigError(
            f"{', '.join(sharded)} is sharded by fully_shard, which a table that learns by rows cannot be: leave it "
            "out, fully_shard(..., ignored_params={table.weight}), or make the table with learning='dense'."
        )


def _column_sums(mesh: TableMesh, sums_V: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums over the rows of all members, and their mean over the columns of all members.

    Collective: call on all members. Replicas have the same sums, since their gradient is merged before.
    """
    group = mesh.member_group(sums_V.device)
    if mesh.shard == "row":
        torch.distributed.all_reduce(sums_V, group=group)
        return sums_V, sums_V.mean()
    # Members have equally many columns.
    mean = sums_V.mean() / mesh.members
    torch.distributed.all_reduce(mean, group=group)
    return sums_V, mean
