"""Revival of dead rows and sub-keys: which of them change in a step, and what they become.

Letters: M rows or sub-keys that change, T queries, P values of a half key; a 2 is the two halves of a product key.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pkm_lightning.errors import ConfigError, check_choice, check_integer, check_range
from pkm_lightning.memory.addressing import Addressing
from pkm_lightning.memory.revival import copy_rows, forget_rows, keys_for_worst_served, write_keys
from pkm_lightning.ops.ranks import full_tensor, is_distributed
from pkm_lightning.usage.counters import UsageCounters
from pkm_lightning.usage.revival_history import RevivalHistory
from pkm_lightning.usage.slot_metrics import dead_slots

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pkm_lightning.memory import ValueTable
    from pkm_lightning.usage.query_recorder import QueryRecorder
    from pkm_lightning.usage.slot_readers import Reader, TableSet

#: Queries per head from which new sub-keys are chosen.
_MOST_QUERIES = 4096


@dataclass(frozen=True)
class Revival:
    """A revival at the end of `step`. Its methods are collective: call them on all ranks.

    Attributes:
        counters: the reads, from which dead and busy slots follow.
        history: the earlier revivals; this one is added to it.
        states: the states of all optimizers, by parameter.
        dead_after, max_share, noise: as of `SlotRevival`.
        seed: the seed of the run.
        step: the step that has ended.
    """

    counters: UsageCounters
    history: RevivalHistory
    states: Sequence[Mapping[Any, dict[str, Any]]]
    dead_after: int
    max_share: float
    noise: float
    seed: int
    step: int

    def revive(self, recorder: QueryRecorder) -> None:
        """Moves the dead sub-keys of the recorder's layers, and gives dead rows new values; forgets the queries.

        With layers in the recorder, rows change only where a moved sub-key leads to them; without, everywhere.
        """
        reached = {
            name: self.keys(name, recorder.addressing[name], *queries) for name, queries in recorder.queries.items()
        }
        for name, tables in self.counters.tables.items():
            within = [reached[reader] for reader in tables.readers if reader in reached]
            if within or not recorder.addressing:
                self.rows(name, torch.stack(within).any(0) if within else None)
        recorder.queries.clear()

    def rows(self, name: str, within_N: Tensor | None) -> None:
        """Makes dead rows of a set of tables copies of the busiest rows of the window, each copied in turn.

        Args:
            name: the name of the set.
            within_N: the rows that may change, (N,) bool; None: all.
        """
        last_N = self.counters.last_read(name)
        rows_M = self._dead(self.history.last_change(name, last_N), within_N)[: math.ceil(self.max_share * len(last_N))]
        counts_N = self.counters.total(name, "window").counts_N
        # A row that is dead may still have reads in the window.
        counts_N = counts_N.masked_fill(dead_slots(last_N, self.counters.clock, self.dead_after), 0)
        busiest_N = counts_N.argsort(descending=True, stable=True)[: int((counts_N > 0).sum())]
        tables = _revivable(self.counters.tables[name])
        if not (len(rows_M) and len(busiest_N) and tables):
            return
        sources_M = busiest_N[torch.arange(len(rows_M), device=rows_M.device) % len(busiest_N)]
        for number, table in enumerate(tables):
            copy_rows(table, rows_M, sources_M, noise=self.noise, seed=self._seed(f"{name}/{number}"))
            # Moments of the old row would pull the new one towards it.
            for state in self.states:
                if table.weight in state:
                    forget_rows(state[table.weight], table, rows_M)
        self._add_to_history(name, torch.zeros_like(last_N, dtype=torch.bool).index_fill(0, rows_M, True))

    def keys(self, name: str, addressing: Addressing, q_TH2P: Tensor, valid_T: Tensor | None) -> Tensor:
        """Moves the dead sub-keys per head and half of a layer to its worst-served queries.

        Returns:
            True for the slots that a moved sub-key is part of, (N,) bool.
        """
        keys_H2SP = addressing.keys.keys
        heads, _, n_keys, _ = keys_H2SP.shape
        last_H2S = self.counters.heads[name].by_sub_key(self.counters.last_read_of_heads(name), torch.amax)
        q_TH2P = _sample(q_TH2P, valid_T)
        # All heads share one set of sub-keys, so their reads and their queries are joined.
        if heads == 1:
            last_H2S = last_H2S.amax(0, keepdim=True)
            q_TH2P = q_TH2P.flatten(0, 1)[:, None]
        changed_H2S = self.history.last_change(name, last_H2S)
        moved_H2S = torch.zeros_like(last_H2S, dtype=torch.bool)
        reached_SS = torch.zeros(n_keys, n_keys, dtype=torch.bool, device=last_H2S.device)
        for head in range(heads):
            for half in (0, 1):
                dead_M = self._dead(changed_H2S[head, half])[: math.ceil(self.max_share * n_keys)]
                if len(dead_M):
                    new_MP = self._new_keys(
                        f"{name}/{head}/{half}", addressing, q_TH2P[:, head, half], head, half, dead_M
                    )
                    write_keys(keys_H2SP, head, half, dead_M, new_MP)
                    self._forget_keys(keys_H2SP, head, half, dead_M)
                    (reached_SS if half == 0 else reached_SS.T)[dead_M] = True
                    moved_H2S[head, half, dead_M] = True
        self._add_to_history(name, moved_H2S)
        return reached_SS.flatten()

    def _add_to_history(self, name: str, is_revived_N: Tensor) -> None:
        self.history.add(name, is_revived_N, step=self.step, clock=self.counters.clock)

    def _dead(self, changed_N: Tensor, within_N: Tensor | None = None) -> Tensor:
        """Returns the slots neither read nor revived for `dead_after` steps, the longest first, equal ones by index."""
        is_dead_N = dead_slots(changed_N, self.counters.clock, self.dead_after)
        if within_N is not None:
            is_dead_N = is_dead_N & within_N
        dead_M = is_dead_N.nonzero().flatten()
        return dead_M[changed_N[dead_M].argsort(stable=True)]

    def _new_keys(
        self, what: str, addressing: Addressing, q_TP: Tensor, head: int, half: int, dead_M: Tensor
    ) -> Tensor:
        norm, keys_SP = addressing.keys.norm, full_tensor(addressing.keys.keys.detach())[head, half].to(q_TP.dtype)
        if norm is not None:
            assert norm.weight is not None
            q_TP = q_TP * full_tensor(norm.weight.detach()).to(q_TP.dtype)
        new_MP = keys_for_worst_served(
            q_TP, keys_SP, dead_M, normalised=norm is not None, noise=self.noise, seed=self._seed(what)
        )
        # Each rank has seen other queries, and all must write the same sub-keys.
        if is_distributed():
            dist.broadcast(new_MP, src=0)
        return new_MP

    def _forget_keys(self, keys_H2SP: nn.Parameter, head: int, half: int, dead_M: Tensor) -> None:
        for state in self.states:
            for value in state.get(keys_H2SP, {}).values():
                if getattr(value, "shape", None) == keys_H2SP.shape:
                    write_keys(value, head, half, dead_M, 0.0)

    def _seed(self, what: str) -> int:
        return zlib.crc32(f"{self.seed}/revival/{self.step}/{what}".encode())


def check_settings(
    prefix: str, *, every_n_steps: int, dead_after: int, max_share: float, source: str, noise: float
) -> None:
    """Refuses settings of a revival out of range.

    Args:
        prefix: of the names, for the message: `callbacks.slot_revival.`, or empty for arguments of a function.
        every_n_steps, dead_after, max_share, source, noise: as of `SlotRevival`.

    Raises:
        ConfigError: naming the setting and what is allowed.
    """
    check_integer(f"{prefix}every_n_steps", every_n_steps, low=1)
    check_integer(f"{prefix}dead_after", dead_after, low=1)
    check_range(f"{prefix}max_share", max_share, 0, 1)
    check_choice(f"{prefix}source", source, ("busy", "queries"))
    check_range(f"{prefix}noise", noise, 0)


def check_revivable(key: str, tables: Iterable[TableSet]) -> None:
    """Refuses a model without rows that could be revived.

    Args:
        key: the key of the callback, for the message.
        tables: all tables of the model.

    Raises:
        ConfigError: no table learns, or tokens alone decide which rows are read, whatever their values.
    """
    learning = [one for one in tables if any(table.learns for table in one.tables)]
    if not learning:
        raise ConfigError(f"{key}: no table of this model learns, so there is nothing to revive; leave it out.")
    if not any(map(_revivable, learning)):
        raise ConfigError(
            f"{key}: tokens alone decide which rows of this model's tables are read, so new values bring no reads; "
            "leave it out."
        )


def _revivable(tables: TableSet) -> list[ValueTable]:
    return [] if tables.by_tokens else [table for table in tables.tables if table.learns]


def addressing_by_reader(prefix: str, readers: Mapping[str, Reader]) -> dict[str, Addressing]:
    """Returns the product-key retrieval of the readers whose slots are pairs of sub-keys, by name.

    Args:
        prefix: as of `check_settings`.
        readers: those of the model.

    Raises:
        ConfigError: there are none.
    """
    every = {name: addressing_of(reader.plugin) for name, reader in readers.items() if reader.slots.n_keys}
    addressing = {name: part for name, part in every.items() if part is not None}
    if not addressing:
        raise ConfigError(
            f"{prefix}source=queries moves the sub-keys of product keys (ffn=pkm, memory, memory_plus, peer), and "
            "this model has none; set source=busy."
        )
    return addressing


def addressing_of(plugin: nn.Module) -> Addressing | None:
    """Returns the product-key retrieval within a plugin, None if it has none."""
    return next((part for part in plugin.modules() if isinstance(part, Addressing)), None)


def _sample(q_TH2P: Tensor, valid_T: Tensor | None) -> Tensor:
    """Returns the queries of real tokens, or an even sample of them if they are many."""
    if valid_T is not None and bool(valid_T.any()):
        q_TH2P = q_TH2P[valid_T]
    return q_TH2P[:: -(-len(q_TH2P) // _MOST_QUERIES)]
