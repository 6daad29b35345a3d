"""The zero start of a plugin that sums rows of a table: zero rows, or a zero matrix behind rows that must stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pkm_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from pkm_lightning.memory import ValueTable


def zero_rows(plugin: nn.Module, table: ValueTable, matrix: Tensor | None) -> None:
    """Sets the rows of `table` to zero, or `matrix` where the rows are frozen or begin with those of a file.

    Args:
        plugin: that reads the table, for errors.
        table: its rows are summed, so that the output is zero where they are.
        matrix: what the sum is multiplied by; None: nothing.

    Raises:
        ConfigError: the rows must stay, and there is no matrix.
    """
    if table.learns and table.first_rows is None:
        nn.init.zeros_(table.weight)
    elif matrix is not None:
        nn.init.zeros_(matrix)
    else:
        why = "are frozen" if table.first_rows is None else "begin with those of table.path"
        raise ConfigError(
            f"{type(plugin).__name__} cannot start with an output of zero, since its rows {why} and no matrix follows "
            "them; let rows that are drawn learn (table.trainable=true), take MemoryPlus, or set "
            "placement.zero_start=false."
        )
