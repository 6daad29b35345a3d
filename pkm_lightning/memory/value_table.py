"""The rows that a memory reads: N x D parameters of which one token touches a few.

Letters: N rows, D values a row, T reads, K rows a read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.ops import weighted_gather

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class ValueTable(nn.Module):
    """A table of `rows` x `dim` values, read by ids and weights.

    The model owns a table once; layers that share it hold a reference that is not registered (`TableReference`), so
    that no class attribute and no global is needed and two models in one process never meet.

    Args:
        rows: slots N.
        dim: values a row D.
        std: standard deviation of the initial rows; None takes dim**-0.5.
        trainable: False keeps the rows as they were drawn (SimVQ: a trained map after the read moves all of them).
    """

    #: The optimizer gives tables a learning rate, a decay and a clipping norm of their own.
    parameter_roles: ClassVar[dict[str, str]] = {"weight": "table"}

    def __init__(self, *, rows: int, dim: int, std: float | None = None, trainable: bool = True) -> None:
        super().__init__()
        self.std = dim**-0.5 if std is None else std
        self.weight = nn.Parameter(torch.empty(rows, dim), requires_grad=trainable)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rows from N(0, std**2)."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, ids_TK: Int[Tensor, "T K"], weights_TK: Float[Tensor, "T K"]) -> Float[Tensor, "T D"]:
        """`sum_k weights[t, k] * weight[ids[t, k]]` in the table's dtype."""
        return weighted_gather(self.weight, ids_TK, weights_TK)

    def extra_repr(self) -> str:
        """Rows and values a row, for `print(model)`."""
        return f"rows={self.weight.shape[0]}, dim={self.weight.shape[1]}"


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
