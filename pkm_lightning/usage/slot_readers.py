"""Readers of slots: every `Slots` of every layer's plugins, by a name, and the tables that several layers share.

Names are `layer3.slot`; `layer3.base.expert` and `layer3.variant.slot` where two FFNs stand side by side;
`layer3.before.slot` and `layer3.after.slot` of plugins in front of the block and behind it. A set of tables is
`table0`, `table1`, ... in the order of its first layer. PEER's two tables, which are read by the same ids, are one set,
and so are all tables that a reader connects: row n of each of them is one slot.

Letters: C reads per token over all heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pkm_lightning.ffn import HasRowIds, HasSlots, Slots
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Traces
from pkm_lightning.model.plugin_outputs import plugin_entries
from pkm_lightning.usage.slot_checks import check_slots, check_trace


class HasPlugins(Protocol):
    """A model that lists its plugins: a `Transformer`, or the layers of any module (`usage.loop_revival`)."""

    def plugins(self) -> Iterable[tuple[int, str, nn.Module]]:
        """Returns layer, name within the layer and module of each plugin."""


class Reads(NamedTuple):
    """The reads of one micro-batch."""

    #: Slots, (T, H, K); out of range where an expert has not chosen the token.
    ids_THK: Tensor
    #: Their weights, signed, (T, H, K).
    weights_THK: Tensor
    #: False at padding, (T,), or None.
    valid_T: Tensor | None
    #: Experts have chosen tokens, so that the slots of a token are not one read.
    slots_choose: bool


@dataclass(frozen=True)
class Reader:
    """The reads of one layer of one kind of slots.

    Attributes:
        name: as in the module's docstring.
        layer: number of the block.
        part: the plugin, as `named_plugins` names it.
        plugin: the FFN that reads.
        slots: the slots that the ids in its trace number.
        slot_names: names of all slots of the plugin.
    """

    name: str
    layer: int
    part: str
    plugin: nn.Module
    slots: Slots
    slot_names: tuple[str, ...]

    def reads(self, traces: Traces, batch: dict[str, Tensor]) -> Reads | None:
        """Returns the reads in the `traces` of a micro-batch; None if the plugin has traced none of these slots.

        Raises:
            ConfigError: a trace of other names or shapes than the plugin's `slots()` declare.
        """
        trace, name = plugin_entries(self.part, traces.get(self.layer, {})), self.slots.name
        check_trace(self.name.removesuffix(f".{name}"), self.plugin, self.slots, trace, batch, self.slot_names)
        chosen = trace.get(f"{name}_chosen")
        if f"{name}_ids" in trace:
            ids = trace[f"{name}_ids"]
        elif chosen is not None:
            # One id per token and expert, out of range where not chosen: no shape depends on values.
            ids = torch.arange(chosen.shape[-1], device=chosen.device).where(chosen, self.slots.count)
        else:
            return None
        weights, valid_BT = trace[f"{name}_weights"], batch.get("valid")
        heads = ids.shape[2] if ids.ndim == 4 else 1
        return Reads(
            ids.reshape(-1, heads, ids.shape[-1]),
            weights.reshape(-1, heads, ids.shape[-1]),
            None if valid_BT is None else valid_BT.flatten(),
            slots_choose=f"{name}_ids" not in trace,
        )


@dataclass(frozen=True)
class TableSet:
    """Tables whose rows are the slots of some readers.

    Attributes:
        name: `table0`, `table1`, ...
        tables: those tables, all with the same number of rows.
        readers: names of the readers, each of which reads at least one of the tables.
        by_tokens: whether tokens alone decide which rows all of them read.
    """

    name: str
    tables: tuple[ValueTable, ...]
    readers: tuple[str, ...]
    by_tokens: bool = False


def find_readers(model: HasPlugins, max_slots: int | None = None) -> dict[str, Reader]:
    """Returns all readers of `model` by name; a plugin that does not declare its slots has none.

    Args:
        model: the model; its weights are not read.
        max_slots: readers of more slots are omitted; None: none is.

    Raises:
        ConfigError: a plugin declares inconsistent slots.
    """
    readers = {}
    for layer, part, plugin in model.plugins():
        if isinstance(plugin, HasSlots):
            place, declared = _place(layer, part), plugin.slots()
            check_slots(place, plugin, declared)
            names = tuple(slots.name for slots in declared)
            for slots in declared:
                if max_slots is None or slots.count <= max_slots:
                    reader = Reader(f"{place}.{slots.name}", layer, part, plugin, slots, names)
                    readers[reader.name] = reader
    return readers


def _place(layer: int, part: str) -> str:
    """Returns the name of a plugin: `layer3`, `layer3.base`, `layer3.before`."""
    within = part.removeprefix("ffn").removeprefix(".")
    return f"layer{layer}.{within}" if within else f"layer{layer}"


def find_tables(readers: dict[str, Reader]) -> dict[str, TableSet]:
    """Returns all sets of tables that `readers` read, by name; readers with a table in common share a set."""
    groups: list[list[Reader]] = []
    for reader in readers.values():
        if reader.slots.tables:
            ids = {id(table) for table in reader.slots.tables}
            # A reader of two tables may connect groups that had nothing in common before.
            connected = [group for group in groups if any(id(t) in ids for one in group for t in one.slots.tables)]
            merged = [one for group in connected for one in group] + [reader]
            # A group keeps the place of its first reader.
            place = groups.index(connected[0]) if connected else len(groups)
            groups = [group for group in groups if group not in connected]
            groups.insert(place, merged)
    sets = {}
    for number, group in enumerate(groups):
        tables = {id(table): table for reader in group for table in reader.slots.tables}
        names = tuple(reader.name for reader in group)
        by_tokens = all(isinstance(reader.plugin, HasRowIds) for reader in group)
        sets[f"table{number}"] = TableSet(f"table{number}", tuple(tables.values()), names, by_tokens)
    return sets
