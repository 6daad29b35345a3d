"""The contract of a row optimizer: its state per row or per value, and the update of the rows that were read.

Letters: N rows, V values per row, U rows that were read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from pkm_lightning.ops.huge_pages import huge_zeros

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class RowState(NamedTuple):
    """One tensor of an optimizer's state."""

    #: `value`: one number per value of the table; `row`: one per row; `column`: one per column, for all rows.
    per: str
    #: None: fp32, which updates are computed in. For an fp64 table every floating state is fp64.
    dtype: torch.dtype | None = None

    def shape(self, table_NV: Tensor) -> tuple[int, ...]:
        """Returns the shape of this state for a table."""
        return {"value": tuple(table_NV.shape), "row": (len(table_NV),), "column": (table_NV.shape[1],)}[self.per]

    def dtype_for(self, table_NV: Tensor) -> torch.dtype:
        """Returns the dtype of this state for a table."""
        if self.dtype is None or (self.dtype.is_floating_point and table_NV.dtype is torch.float64):
            return torch.promote_types(table_NV.dtype, torch.float32)
        return self.dtype


#: The prefix of the names of states per column, and of no others. Where a checkpoint is resharded or the state of a row
#: is reset, the shape does not suffice: a table may have as many rows as columns.
COLUMN_STATE = "column_"


@dataclass(frozen=True, kw_only=True)
class UpdateStep:
    """The numbers of one update, which change from step to step.

    Args:
        lr: learning rate.
        weight_decay: factor of the decoupled decay of the rows that were read.
        number: number of this update, from 1.
        seed: of the stochastic rounding, 0 to 2**31 - 1; another one for every update.

    Raises:
        ValueError: a number out of range.
    """

    lr: float
    weight_decay: float = 0.0
    number: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"row_update: number={self.number}; updates are counted from 1.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"row_update: seed={self.seed}; allowed: 0 to 2**31 - 1.")


class KernelFactors(NamedTuple):
    """Numbers per row of one update, which torch computes before a kernel updates the rows."""

    #: (1, U) or (2, U), in any floating dtype; the kernels have them in that of sums.
    rows_FU: Tensor
    #: The states per row that they come from, by name: (U,) each, after the update.
    states: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """A row optimizer; a subclass is one file of `rules/`. Its fields are its constants, keys of `table.optimizer`.

    Args:
        betas: decay of the first and of the second moment, each from 0 to below 1; rules without moments ignore it.
        eps: added to a root before the division by it; rules without a root ignore it.

    Raises:
        ValueError: a constant out of range. The message opens with NAME=VALUE; users see `table.optimizer.` before it.

    Example: `pkm_lightning/ops/row_update/rules/lazy_adam.py`; how to add one is in `CONTRIBUTING.md`.
    """

    #: The name in `table.optimizer.rule`, and that of the file.
    name: ClassVar[str]
    #: The state of a table, by name: it starts as zeros, is saved in checkpoints, and is sharded as the table is.
    #: The name `step` is taken by the number of the update. A constant may add states to those of the class: the
    #: instance then has a mapping of its own.
    state: ClassVar[Mapping[str, RowState]] = {}
    #: `update` needs the mean of g**2, weighted by `column_weights`, over the whole row. Ranks that hold columns of a
    #: row then add their sums.
    needs_mean_squares: ClassVar[bool] = False
    #: `update_columns` follows each update. Ranks that hold different rows then add their sums.
    needs_column_sums: ClassVar[bool] = False
    #: Why no weight decay can be combined with the rule; None: the decay below is applied before each update.
    refuses_decay: ClassVar[str | None] = None
    #: Backends with a kernel for the rule, of `cpu` (numba) and `triton`; on all others `update` runs.
    kernels: ClassVar[tuple[str, ...]] = ()

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: each must be from 0 to below 1.")

    def update(
        self,
        rows_UV: Float[Tensor, "U V"],
        grad_UV: Float[Tensor, "U V"],
        state: Mapping[str, Tensor],
        index_U: Int[Tensor, " U"],
        step: UpdateStep,
        mean_squares_U: Float[Tensor, " U"] | None,
    ) -> Float[Tensor, "U V"]:
        """Returns the rows after one update, and updates their entries of `state` in place.

        Args:
            rows_UV: the rows that were read, already decayed, in fp32 (fp64 for fp64 tables). On a rank that holds
                a part of the columns these are its columns only.
            grad_UV: their gradients, in the same dtype.
            state: tensors of the whole table, named and shaped as `state` of the class states.
            index_U: the numbers of the rows, each of them once: `state["sum"][index_U]` are their entries.
            step: the numbers of this update.
            mean_squares_U: mean of g**2 over the whole row, weighted by `column_weights`, where `needs_mean_squares`;
                else None.
        """
        raise NotImplementedError

    def kernel_factors(
        self,
        state: Mapping[str, Tensor],
        index_U: Int[Tensor, " U"],
        step: UpdateStep,
        mean_squares_U: Float[Tensor, " U"] | None,
    ) -> KernelFactors | None:
        """Returns what kernels of the rule take per row; None: nothing. Leaves `state` as it is.

        The arguments are those of `update`, but a row may be among `index_U` several times.
        """
        return None

    def kernel_columns(self, state: Mapping[str, Tensor], step: UpdateStep) -> Float[Tensor, " V"] | None:
        """Returns what kernels of the rule take per column; None: nothing."""
        return None

    def column_weights(self, state: Mapping[str, Tensor], step: UpdateStep) -> Float[Tensor, " V"] | None:
        """Returns the weight of each column in the mean of g**2 over a row; None: all are 1."""
        return None

    def update_columns(
        self, state: Mapping[str, Tensor], sums_V: Float[Tensor, " V"], mean: Float[Tensor, ""], step: UpdateStep
    ) -> None:
        """Updates the states per column in place, once all rows of an update have been updated.

        Args:
            state: as in `update`.
            sums_V: for each column the sum over all updated rows of g**2 / (the row's mean square), on all ranks.
            mean: their mean over all columns, on all ranks.
            step: the numbers of this update.
        """
        raise NotImplementedError

    def decay(self, rows_UV: Float[Tensor, "U V"], step: UpdateStep) -> Float[Tensor, "U V"]:
        """Returns the rows after decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101)."""
        return rows_UV - step.lr * step.weight_decay * rows_UV

    def bias_corrections(self, step: UpdateStep) -> tuple[float, float]:
        """Returns 1 - b1**t and the root of 1 - b2**t for update t, by which Adam divides its moments."""
        beta1, beta2 = self.betas
        return 1 - beta1**step.number, (1 - beta2**step.number) ** 0.5


def inverse(mean_squares_U: Tensor) -> Tensor:
    """Returns 1 / (the mean squares of the rows), and 0 for a row whose gradient is zero."""
    return torch.where(mean_squares_U > 0, mean_squares_U.reciprocal(), 0.0)


def new_state(rule: type[RowRule] | RowRule, table_NV: Tensor) -> dict[str, Tensor]:
    """Returns the state of `rule` before the first update: zeros, on the table's device."""
    return {
        name: huge_zeros(*part.shape(table_NV), dtype=part.dtype_for(table_NV), device=table_NV.device)
        for name, part in rule.state.items()
    }


def state_bytes(rule: type[RowRule] | RowRule, table_NV: Tensor) -> int:
    """Returns the bytes that `rule` keeps for a table, which may be on the meta device."""
    return sum(math.prod(part.shape(table_NV)) * part.dtype_for(table_NV).itemsize for part in rule.state.values())


def check_state(rule: RowRule, state: Mapping[str, Tensor], table_NV: Tensor) -> None:
    """Refuses a state that is not that of `rule` for this table.

    Raises:
        ValueError: names, shapes, dtypes or devices differ.
    """
    expected = {name: (part.shape(table_NV), part.dtype_for(table_NV)) for name, part in rule.state.items()}
    actual = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    if actual != expected or any(value.device != table_NV.device for value in state.values()):
        raise ValueError(f"row_update: {rule.name} needs the state {expected} on {table_NV.device}, got {actual}.")
