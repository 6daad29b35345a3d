"""What can be looked at and masked: readers, and the sets of slots that they share.

A set is `table0`, `table1`, ... for value tables whose rows are the slots of some readers, and has the reader's name,
such as `layer2.expert`, for experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pkm_lightning.errors import ConfigError, nearest
from pkm_lightning.memory import MaskableReads, ValueTable
from pkm_lightning.usage.slot_readers import HasPlugins, Reader, TableSet, find_readers, find_tables


@dataclass(frozen=True)
class SlotSet:
    """Slots that one or several readers read.

    Attributes:
        name: as in the module's docstring.
        kind: `row` of value tables, or `expert`.
        count: number of slots N.
        readers: those that read them.
        by_tokens: whether tokens alone decide which slots are read.
    """

    name: str
    kind: str
    count: int
    readers: tuple[Reader, ...]
    by_tokens: bool = False


def inspected_readers(model: HasPlugins) -> dict[str, Reader]:
    """Returns the readers of value tables and of experts, by name.

    Slots that are neither, such as the virtual ones of UltraMem, are other names for reads that are there already.

    Raises:
        ConfigError: the model has no such readers.
    """
    readers = {name: reader for name, reader in find_readers(model).items() if maskable_modules(reader)}
    if not readers:
        raise ConfigError(
            "the model has neither value tables nor experts that declare their slots: nothing to inspect."
        )
    return readers


def maskable_modules(reader: Reader) -> tuple[MaskableReads, ...]:
    """Returns the value tables of a reader, or its experts."""
    if reader.slots.tables:
        return reader.slots.tables
    if any(slots.tables for slots in reader.plugin.slots()):  # type: ignore[operator]
        return ()
    modules = (module for module in reader.plugin.modules() if isinstance(module, MaskableReads))
    return tuple(module for module in modules if not isinstance(module, ValueTable))


def slot_sets(readers: Mapping[str, Reader]) -> dict[str, SlotSet]:
    """Returns the sets of slots of `readers`, by name."""
    tables: dict[str, TableSet] = find_tables(dict(readers))
    sets = {}
    for name, table in tables.items():
        of_set = tuple(readers[reader] for reader in table.readers)
        count = max(reader.slots.count for reader in of_set)
        sets[name] = SlotSet(name, "row", count, of_set, table.by_tokens)
    for name, reader in readers.items():
        if not reader.slots.tables:
            sets[name] = SlotSet(name, "expert", reader.slots.count, (reader,))
    return sets


def set_of_readers(sets: Mapping[str, SlotSet]) -> dict[str, SlotSet]:
    """Returns the set of each reader, by the reader's name."""
    return {reader.name: one for one in sets.values() for reader in one.readers}


def find_set(sets: Mapping[str, SlotSet], name: str, key: str = "slots") -> SlotSet:
    """Returns the set `name`.

    Raises:
        ConfigError: there is none, with the names that there are.
    """
    if name not in sets:
        allowed = ", ".join(f"{one.name} ({one.count:,} slots)" for one in list(sets.values())[:8])
        raise ConfigError(f"{key}={name} is no set of slots of this model; allowed: {allowed}.{nearest(name, sets)}")
    return sets[name]
