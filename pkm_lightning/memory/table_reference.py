"""Who registers a value table: the model, once for all layers that share it, or else each layer that reads it.

A table that nobody registers would be in no `state_dict`, and no `.to()` would move it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory.row_prefetch import ReadTable
from pkm_lightning.memory.value_table import ValueTable


class TableReference(nn.Module):
    """A reference of a layer to a table, which registers the table until a model takes it over.

    From then on the model alone moves and saves the table, so that one shared by several layers is in its `state_dict`
    once, and a layer that leaves its model leaves its values there. Deep copies of layers share one copy.

    Attributes:
        table: the table.

    Example: `examples/own_ffn.py`.
    """

    table: ValueTable

    def __init__(self, table: ValueTable) -> None:
        super().__init__()
        self.table = table

    def release(self) -> None:
        """Keeps the table, but registers it no longer."""
        table = self._modules.pop("table", None)
        if table is not None:
            # Past nn.Module.__setattr__, which would register it again.
            self.__dict__["table"] = table


def take_over_tables(model: nn.Module, tables: Iterable[nn.Module]) -> None:
    """Removes from the layers of `model` the registration of those tables that `model` itself registers."""
    registered = {id(table) for table in tables}
    for reference in list(model.modules()):
        if isinstance(reference, TableReference) and id(reference.table) in registered:
            reference.release()


def row_learning_tables(model: nn.Module) -> dict[str, ValueTable]:
    """Returns the tables of `model` that learn by rows, by name: those that a `TableOptimizer` is to step.

    Example:
        >>> import torch
        >>> from pkm_lightning import MemoryPlus, TableOptimizer, ValueTable, row_learning_tables
        >>> layer = MemoryPlus(dim=8, n_keys=16, table=ValueTable(rows=16**2, dim=8, learning="rows"))
        >>> list(row_learning_tables(layer))
        ['values.reference.table']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ValueTable) and module.stage is not None
    }


def own_parameters(plugin: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters of a plugin, without those of value tables."""
    for module in plugin.modules():
        if not isinstance(module, ReadTable):
            yield from module.parameters(recurse=False)


def count_parameters(plugin: nn.Module) -> int:
    """Returns the number of parameters of a plugin, without those of value tables."""
    return sum(parameter.numel() for parameter in {id(p): p for p in own_parameters(plugin)}.values())


def check_table(table: ValueTable, rows: int, dim: int, *, named: str) -> None:
    """Refuses a table whose shape is not (rows, dim).

    Args:
        table: the table that a plugin was given.
        rows, dim: the shape that the plugin needs.
        named: the configuration keys that determine that shape.

    Raises:
        ConfigError: with both shapes.
    """
    if (table.rows, table.dim) != (rows, dim):
        raise ConfigError(
            f"table has shape {(table.rows, table.dim)}, but {named} need {(rows, dim)}: layers that share a table "
            "need the same sizes."
        )
