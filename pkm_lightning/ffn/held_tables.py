"""The tables of a plugin: those that it was given, or new ones of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn.base import TableSpec
from pkm_lightning.memory import ValueTable, check_table


def hold_tables(
    plugin: nn.Module, given: ValueTable | Sequence[ValueTable] | None, spec: TableSpec, *, named: str
) -> list[ValueTable]:
    """Returns the tables of `plugin`, which keeps each in a `TableReference`.

    Args:
        plugin: that reads them.
        given: the constructor's `table`; None for new ones as `spec` requests, which learn densely.
        spec: the request of the plugin.
        named: the configuration keys that determine the shape, for errors.

    Raises:
        ConfigError: tables of another number or shape.
    """
    if given is None:
        tables = [_new_table(spec) for _ in range(spec.count)]
    elif spec.count == 1:
        if not isinstance(given, ValueTable):
            raise ConfigError(
                f"table={given!r:.60} is no ValueTable; {type(plugin).__name__} needs "
                f"ValueTable(rows={spec.rows}, dim={spec.dim}), or makes one where table is left out."
            )
        tables = [given]
    elif isinstance(given, Sequence) and len(given) == spec.count:
        tables = list(given)
    else:
        raise ConfigError(f"{type(plugin).__name__} needs a list of {spec.count} tables ({named}).")
    for table in tables:
        check_table(table, spec.rows, spec.dim, named=named)
    for table in tables:
        if table.slices != spec.slices:
            raise ConfigError(
                f"table has {table.slices} slices per row, but {named} need {spec.slices}; make it with "
                f"slices={spec.slices}."
            )
    return tables


def _new_table(spec: TableSpec) -> ValueTable:
    return ValueTable(rows=spec.rows, dim=spec.dim, std=spec.std, trainable=spec.trainable, slices=spec.slices)
