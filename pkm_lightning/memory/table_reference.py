"""Who holds a value table: the model, once for all layers that share it, or the layer that it was made for.

A table that nobody registers would be in no `state_dict`: a layer registers its tables until a model takes them over.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory.row_prefetch import ReadTable
from pkm_lightning.memory.value_table import ValueTable


class TableReference:
    """A reference to a table that does not register it as a sub-module; deep copies of holders share one copy.

    The plugin that holds one relies on someone else to register the table, as a model of this package does; a plugin
    for other models calls `own_tables` too.

    Example: `examples/own_ffn.py`.
    """

    def __init__(self, table: ValueTable) -> None:
        self.table = table


class OwnTables(nn.ModuleList):
    """The tables of a layer, registered in it since no model has taken them over."""


def own_tables(layer: nn.Module, tables: Iterable[nn.Module]) -> None:
    """Registers `tables` in `layer` as `own_tables.0`, `own_tables.1`, ..., until a model takes them over."""
    layer.own_tables = OwnTables(tables)


def take_over_tables(model: nn.Module, tables: Iterable[nn.Module]) -> None:
    """Removes from the layers of `model` the registration of those tables that `model` itself registers.

    Otherwise a table shared by several layers would be in the `state_dict` once per layer.
    """
    registered = {id(table) for table in tables}
    for layer in list(model.modules()):
        own = layer._modules.get("own_tables")
        if isinstance(own, OwnTables) and all(id(table) in registered for table in own):
            del layer._modules["own_tables"]


def row_learning_tables(model: nn.Module) -> dict[str, ValueTable]:
    """Returns the tables of `model` that learn by rows, by name: those that a `TableOptimizer` is to step.

    Example:
        >>> import torch
        >>> from pkm_lightning import MemoryPlus, TableOptimizer, ValueTable, row_learning_tables
        >>> layer = MemoryPlus(dim=8, n_keys=16, table=ValueTable(rows=16**2, dim=8, learning="rows"))
        >>> list(row_learning_tables(layer))
        ['own_tables.0']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ValueTable) and module.stage is not None
    }


def count_parameters(plugin: nn.Module) -> int:
    """Returns the number of parameters of a plugin, without those of value tables."""
    tables = [module for module in plugin.modules() if isinstance(module, ReadTable)]
    in_tables = {id(parameter) for table in tables for parameter in table.parameters()}
    return sum(parameter.numel() for parameter in plugin.parameters() if id(parameter) not in in_tables)


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
