"""Who reads which slots: every `Slots` of every layer's plugins, by a name, and the tables that several layers share.

Names: `layer3.slot`; where two FFNs stand side by side `layer3.base.expert` and `layer3.variant.slot`. A set of tables
is `table0`, `table1`, ... in the order of its first layer; PEER's two tables, read by the same ids, are one set, and so
are all tables that one reader joins to another's: row n of each is one slot.

Letters: B sequences, T tokens of the micro-batch, H heads, K slots a head, C = H * K, N slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pkm_lightning.ffn import HasSlots, Slots
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Traces, Transformer
from pkm_lightning.model.placement import named_plugins, plugin_entries
from pkm_lightning.usage.slot_checks import check_slots, check_trace


class Reads(NamedTuple):
    """The reads of one micro-batch."""

    #: Slots, (T, H, K); out of range where an expert has not chosen the token.
    ids_THK: Tensor
    #: Their weights, signed, (T, H, K).
    weights_THK: Tensor
    #: False at padding, (T,), or None.
    valid_T: Tensor | None
    #: Experts have chosen tokens: a token's slots are no read of its own.
    slots_choose: bool


@dataclass(frozen=True)
class Reader:
    """What one layer reads of one kind.

    Attributes:
        name: as in the module's docstring.
        layer: number of the block.
        part: `ffn`, `ffn.base` or `ffn.variant`.
        plugin: the FFN that reads.
        slots: what its trace numbers.
        told: names of all slots of the plugin.
    """

    name: str
    layer: int
    part: str
    plugin: nn.Module
    slots: Slots
    told: tuple[str, ...]

    def reads(self, traces: Traces, batch: dict[str, Tensor]) -> Reads | None:
        """The reads among the `traces` of a micro-batch; None where the plugin has traced none of this name.

        Raises:
            ConfigError: a trace of other names or shapes than the plugin's `slots()` say.
        """
        trace, name = plugin_entries(self.part, traces.get(self.layer, {})), self.slots.name
        check_trace(self.name.removesuffix(f".{name}"), self.plugin, self.slots, trace, batch, self.told)
        chosen = trace.get(f"{name}_chosen")
        if f"{name}_ids" in trace:
            ids = trace[f"{name}_ids"]
        elif chosen is not None:
            # As many reads a token as there are experts, most of them of no slot.
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
        readers: names of the layers' readers, of which each reads one of the tables at least.
    """

    name: str
    tables: tuple[ValueTable, ...]
    readers: tuple[str, ...]


def find_readers(model: Transformer, max_slots: int | None = None) -> dict[str, Reader]:
    """All readers of `model`, by name; a plugin that does not state its slots has none.

    Args:
        model: of which no weight is looked at.
        max_slots: readers of more slots are left out; None: all.

    Raises:
        ConfigError: a plugin states slots that cannot be.
    """
    readers = {}
    for layer, block in enumerate(model.blocks):
        for part, plugin in named_plugins(block.ffn):  # type: ignore[arg-type]
            if isinstance(plugin, HasSlots):
                place, told = part.replace("ffn", f"layer{layer}", 1), plugin.slots()
                check_slots(place, plugin, told)
                for slots in told:
                    if max_slots is not None and slots.count > max_slots:
                        continue
                    names = tuple(one.name for one in told)
                    reader = Reader(f"{place}.{slots.name}", layer, part, plugin, slots, names)
                    readers[reader.name] = reader
    return readers


def find_tables(readers: dict[str, Reader]) -> dict[str, TableSet]:
    """All sets of tables that `readers` read, by name: readers that have any table in common share one set."""
    groups: list[list[Reader]] = []
    for reader in readers.values():
        if reader.slots.tables:
            own = {id(table) for table in reader.slots.tables}
            touched = [group for group in groups if any(id(t) in own for one in group for t in one.slots.tables)]
            joined = [one for group in touched for one in group] + [reader]
            # A group keeps the place of its first reader.
            place = groups.index(touched[0]) if touched else len(groups)
            groups = [group for group in groups if group not in touched]
            groups.insert(place, joined)
    sets = {}
    for number, group in enumerate(groups):
        tables = {id(table): table for reader in group for table in reader.slots.tables}
        names = tuple(reader.name for reader in group)
        sets[f"table{number}"] = TableSet(f"table{number}", tuple(tables.values()), names)
    return sets
