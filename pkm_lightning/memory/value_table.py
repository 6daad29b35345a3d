"""The rows that a memory reads: N x D parameters of which one token touches a few.

Letters: N rows, D values a row, T reads, K rows a read, G groups a read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError, check_choice, check_integer
from pkm_lightning.memory.staging import RowStage
from pkm_lightning.ops import gathered_dot, weighted_gather
from pkm_lightning.ops.segments import read_sources

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class ValueTable(nn.Module):
    """A table of `rows` x `dim` values, read by ids and weights.

    The model owns a table once; layers that share it hold a reference that is not registered (`TableReference`), so
    that no class attribute and no global is needed and two models in one process never meet.

    Layers read it by calling it or by `dot`; `weight` itself is for checkpoints. With `learning` rows or fused
    `weight` requires no gradient: a read leaves its part of the gradient in `stage`, and a `TableOptimizer` updates the
    rows that were read. Whatever runs backward through a read stages it, `torch.autograd.grad` in evaluation too: what
    should not be learned from is cleared by `TableOptimizer.zero_grad`, or read under `torch.no_grad`.

    Args:
        rows: slots N.
        dim: values a row D.
        std: standard deviation of the initial rows; None takes dim**-0.5.
        trainable: False keeps the rows as they were drawn (SimVQ: a trained map after the read moves all of them).
        slices: equal parts of a row that are read each for itself; ids then count slices, `row * slices + slice`, and a
            slice is what a row optimizer takes for a row.
        learning: `dense` (autograd's N x D gradient, any torch optimizer), `rows` (one update of the touched rows an
            optimizer step) or `fused` (the same at the end of backward).
        device: `auto` goes where the model goes; `cpu` stays in host memory, ids and outputs travel.

    Raises:
        ConfigError: an unknown word, or `slices` that do not divide `dim`.
    """

    #: The optimizer gives tables a learning rate, a decay and a clipping norm of their own.
    parameter_roles: ClassVar[dict[str, str]] = {"weight": "table"}

    def __init__(
        self,
        *,
        rows: int,
        dim: int,
        std: float | None = None,
        trainable: bool = True,
        slices: int = 1,
        learning: str = "dense",
        device: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("table.learning", learning, ("dense", "rows", "fused"))
        check_choice("table.device", device, ("auto", "cpu"))
        check_integer("slices", slices, low=1)
        if dim % slices:
            raise ConfigError(f"slices={slices} do not divide the {dim} values of a row.")
        self.std = dim**-0.5 if std is None else std
        self.learning, self.slices, self.stays_on_cpu = learning, slices, device == "cpu"
        by_rows = trainable and learning != "dense"
        self.stage = RowStage(rows * slices) if by_rows else None
        # A parameter that requires a gradient gets one of its own size as soon as an optimizer's state is loaded.
        # A Trainer builds models within the context of its device; models of which only shapes are wanted, on meta.
        here = torch.empty(0).device
        home = torch.device("cpu") if self.stays_on_cpu and here.type != "meta" else here
        self.weight = nn.Parameter(torch.empty(rows, dim, device=home), requires_grad=trainable and not by_rows)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rows from N(0, std**2)."""
        nn.init.normal_(self.weight, std=self.std)

    @property
    def lines(self) -> Tensor:
        """What ids count: rows, or slices of rows; a view of `weight`, (N * slices, D / slices)."""
        return self.weight.view(-1, self.weight.shape[1] // self.slices)

    def forward(
        self,
        ids_TK: Int[Tensor, "T K"],
        weights_TK: Float[Tensor, "T K"],
        groups_TK: Int[Tensor, "T K"] | None = None,
        n_groups: int | None = None,
    ) -> Float[Tensor, "T D"] | Float[Tensor, "T G D"]:
        """`sum_k weights[t, k] * lines[ids[t, k]]` in the table's dtype; with groups, one sum a group."""
        home = weights_TK.device
        ids_TK, weights_TK = self._here(ids_TK), self._here(weights_TK)
        groups_TK = None if groups_TK is None else self._here(groups_TK)
        y = weighted_gather(self.lines, ids_TK, weights_TK, groups_TK=groups_TK, n_groups=n_groups)
        if self.stage is not None and torch.is_grad_enabled():
            if groups_TK is None or n_groups is None:
                y = self.stage.watch_sum(y, ids_TK, weights_TK)
            else:
                sources_TK = read_sources(ids_TK, groups_TK, n_groups)
                y = self.stage.watch_sum(y.flatten(0, 1), ids_TK, weights_TK, sources_TK).view_as(y)
        return y.to(home)

    def dot(self, x_TD: Float[Tensor, "T D"], ids_TK: Int[Tensor, "T K"]) -> Float[Tensor, "T K"]:
        """`<lines[ids[t, k]], x[t]>` in the table's dtype."""
        home = x_TD.device
        ids_TK, x_TD = self._here(ids_TK), self._here(x_TD).to(self.weight.dtype)
        dots_TK = gathered_dot(self.lines, x_TD, ids_TK)
        if self.stage is not None and torch.is_grad_enabled():
            dots_TK = self.stage.watch_dot(dots_TK, ids_TK, x_TD)
        return dots_TK.to(home)

    def _here(self, value: Tensor) -> Tensor:
        return value.to(self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueTable:
        """Moves and casts with the model; a table that stays on the CPU only casts."""
        if self.stays_on_cpu and not self.weight.is_meta:
            return super()._apply(lambda value: value.to(fn(value[:0]).dtype), recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Rows, values a row and way of learning, for `print(model)`."""
        return f"rows={self.weight.shape[0]}, dim={self.weight.shape[1]}, learning={self.learning}"


class TableReference:
    """Holds a table without registering it as a sub-module of the holder; deep copies keep pointing at one copy."""

    def __init__(self, table: ValueTable) -> None:
        self.table = table


def product_slots(n_keys: int) -> int:
    """Slots that two halves of `n_keys` sub-keys address.

    Raises:
        ConfigError: `n_keys` is no whole number from 1 to 46,340: ids are int32.
    """
    check_integer("ffn.n_keys", n_keys, low=1, high=46_340)
    return n_keys**2


def check_table(table: ValueTable, rows: int, dim: int, *, named: str) -> None:
    """Refuse a table of another shape than (rows, dim); `named` says which keys of the plugin ask for that shape.

    Raises:
        ConfigError: with both shapes.
    """
    if tuple(table.weight.shape) != (rows, dim):
        raise ConfigError(
            f"table has shape {tuple(table.weight.shape)}, but {named} need {(rows, dim)}: layers that share a table "
            "need the same sizes."
        )
